"""The shape of a Llama: all that its computation depends on beside its weights.

Imports neither torch nor numpy. Knows the relatives of Llama 2 that differ from it in no more than
a few numbers and two switches: Llama 3, TinyLlama, SmolLM2, Mistral, Qwen2 and Qwen3.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from minllama.system.errors import UsageError

# Smallest and largest value of each number, which has the type of its bounds. A file may claim any
# shape: an absurd one is refused before anything is allocated.
SHAPE_BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**24),
    "dim": (1, 2**17),
    "n_layers": (1, 1000),
    "n_heads": (1, 2**12),
    "n_kv_heads": (1, 2**12),
    "head_dim": (1, 2**17),  # below the two that it is derived from, which are checked first
    "multiple_of": (1, 2**17),
    "hidden_dim": (1, 2**19),  # likewise
    "max_seq_len": (1, 2**24),
    "dropout": (0.0, 0.99),
    "layer_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
}
SCALING_BOUNDS: dict[str, tuple[float, float]] = {
    "factor": (1.0, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, 2**24),
}
MAX_ROTARY = 2**26  # entries of the rotary table, of 4 bytes
# What the `model_args` of the original, llama2.c and Meta have beside the shape, and is not looked
# at: all but the first two are about memory, or follow from the tensors.
HARMLESS_ARGS = {
    "position_embedding_type",  # the original has rotary positions whatever it says
    "ffn_dim_multiplier",  # hidden_dim is seen from the tensors
    *("use_cache", "max_batch_size", "initializer_range", "model_type", "architectures"),
    *("torch_dtype", "dtype", "device", "flash", "flash_attn", "model_parallel_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_name_or_path"),
}


def check_bounds(label: str, value: Any, bounds: tuple[float, float]) -> None:
    """Raise UsageError for what is no number of the bounds' type between them."""
    least, most = bounds
    whole = isinstance(least, int)
    right = isinstance(value, int if whole else int | float)
    if not right or isinstance(value, bool) or not least <= value <= most:
        noun = "a whole number" if whole else "a number"
        raise UsageError(f"{label} {value!r}: must be {noun} from {least:g} to {most:g}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are slowed down for a longer context than the one first trained on.

    "linear": all pairs alike, by `factor` (arXiv:2306.15595). "llama3": by `factor` the pairs that
    turn less than `low_freq_factor` times within the original context; not at all those that turn
    more than `high_freq_factor` times; the ones between by something between. The names are those
    of Hugging Face's config.json. Raises UsageError for values that are none.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None  # these three of llama3 alone
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise UsageError(f"rope_scaling {self.rope_type!r} is not supported: linear or llama3")
        for name, bounds in SCALING_BOUNDS.items():
            if name == "factor" or self.rope_type == "llama3":
                check_bounds(f"rope_scaling's {name}", getattr(self, name), bounds)
            elif getattr(self, name) is not None:
                raise UsageError(f"rope_scaling 'linear' has no {name}")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            pair = f"{self.low_freq_factor} and {self.high_freq_factor}"
            raise UsageError(f"rope_scaling: low_freq_factor is not below high_freq_factor: {pair}")

    @classmethod
    def from_plain(cls, plain: Any) -> RopeScaling:
        """Read the dict that `to_plain` made; UsageError for anything else."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(plain, dict) or not {"rope_type", "factor"} <= plain.keys() <= names:
            raise UsageError(f"rope_scaling {str(plain)[:80]!r}: not a type with its factors")
        return cls(**plain)

    def to_plain(self) -> dict[str, Any]:
        """What there is of it, as plain types."""
        return {name: v for name, v in dataclasses.asdict(self).items() if v is not None}

    def divisor(self, frequency: float) -> float:
        """By how much a pair is slowed down that turns by `frequency`, in radians, a position."""
        if self.rope_type == "linear":
            return float(self.factor)
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        unchanged = min(max((turns - low) / (high - low), 0.0), 1.0)
        return 1 / (unchanged + (1 - unchanged) / self.factor)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama; its fields are the `model_args` of weights files.

    Raises UsageError for an invalid shape.
    """

    vocab_size: int = 32000
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = None  # None: as many as n_heads (no grouped-query attention)
    hidden_dim: int | None = None  # None: 2/3 of 4 x dim, rounded up to multiple_of
    multiple_of: int = 32
    max_seq_len: int = 1024
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    head_dim: int | None = None  # None: dim / n_heads; D in the shapes
    rope_scaling: RopeScaling | None = None  # may be given as its plain dict
    attention_bias: bool = False  # query, key and value have one, as in Qwen2
    qk_norm: bool = False  # RMSNorm of each head's query and key, as in Qwen3

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen
        if self.n_kv_heads is None:
            set_field(self, "n_kv_heads", self.n_heads)
        heads = f"--n_heads {self.n_heads}"
        derived = self.head_dim is None
        for name, bounds in SHAPE_BOUNDS.items():
            if name == "head_dim" and derived:
                if self.dim % self.n_heads:
                    near = self.n_heads * max(1, round(self.dim / self.n_heads))
                    raise UsageError(
                        f"--dim {self.dim} is not divisible by {heads}; --dim {near} is"
                    )
                set_field(self, "head_dim", self.dim // self.n_heads)
            if name == "hidden_dim" and self.hidden_dim is None:
                rounded_up = -(-int(8 * self.dim / 3) // self.multiple_of) * self.multiple_of
                set_field(self, "hidden_dim", rounded_up)
            check_bounds(f"--{name}", getattr(self, name), bounds)
            set_field(self, name, type(bounds[0])(getattr(self, name)))  # 500000 as 500000.0
        for name in ("tie_word_embeddings", "attention_bias", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} {getattr(self, name)!r}: true or false")
        if self.head_dim % 2:  # rotary embeddings rotate pairs of numbers
            what = f"--dim {self.dim} / {heads} =" if derived else "head_dim"
            raise UsageError(f"{what} {self.head_dim}: must be even")
        if self.n_heads % self.n_kv_heads:
            raise UsageError(f"--n_kv_heads {self.n_kv_heads}: must be a divisor of {heads}")
        if self.max_seq_len * self.head_dim > MAX_ROTARY:
            raise UsageError(
                f"--max_seq_len {self.max_seq_len} x {self.head_dim} numbers per head: the rotary "
                f"table may have {MAX_ROTARY:,} entries"
            )
        if not isinstance(self.rope_scaling, RopeScaling | None):
            set_field(self, "rope_scaling", RopeScaling.from_plain(self.rope_scaling))

    @property
    def query_dim(self) -> int:
        """Width of all query heads side by side, H x D; `dim` in most Llamas."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads side by side, H_kv x D, and of all value heads."""
        return self.n_kv_heads * self.head_dim

    def to_model_args(self) -> dict[str, Any]:
        """The plain dict that weights files carry as `model_args`.

        What was added to Llama 2 is in it where it is used: what other programs read, which know
        nothing of it, stays readable for them, and checkpoints of before stay the same.
        """
        args = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            args["rope_scaling"] = self.rope_scaling.to_plain()
        if self.query_dim == self.dim:
            args["head_dim"] = None
        for name in ("head_dim", "rope_scaling", "attention_bias", "qk_norm"):
            if not args[name]:
                del args[name]
        return args

    @classmethod
    def from_model_args(cls, model_args: dict[str, Any]) -> LlamaConfig:
        """Read the `model_args` of this program, the original or llama2.c.

        Missing keys have the default; `norm_eps` is llama2.c's name. Raises UsageError for a key
        that is not known and may change what the model computes, unless it is off.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        renamed = {"norm_eps": "layer_norm_eps"}
        named = {renamed.get(key, key): value for key, value in model_args.items()}
        for key in named.keys() - known - HARMLESS_ARGS:
            value = named[key]
            if value is not None and (value or not isinstance(value, int | float | str)):
                raise UsageError(
                    f"{str(key)[:40]} {str(value)[:40]!r} is not known to this program, and may "
                    "change what the model computes: another architecture, or a newer version"
                )
        return cls(**{key: value for key, value in named.items() if key in known})

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; a tied output head is counted as the embedding."""
        head_norms = 2 * self.head_dim if self.qk_norm else 0
        biases = self.query_dim + 2 * self.kv_dim if self.attention_bias else 0
        return {
            "embedding": self.vocab_size * self.dim,
            "attention": self.n_layers * 2 * self.dim * (self.query_dim + self.kv_dim),
            "feed_forward": self.n_layers * 3 * self.dim * self.hidden_dim,
            "norms": (2 * self.n_layers + 1) * self.dim + self.n_layers * head_norms,
            "biases": self.n_layers * biases,
            "output": 0 if self.tie_word_embeddings else self.vocab_size * self.dim,
        }

    @property
    def parameters(self) -> int:
        """Those of all parts."""
        return sum(self.parameter_counts().values())

    def block_parameters(self) -> tuple[int, int]:
        """Parameters of the layers, and of the rest: embedding, last norm and output head."""
        counts = self.parameter_counts()
        around = counts["embedding"] + counts["output"] + self.dim
        return self.parameters - around, around

    def flops_per_token(self, sequence_length: int, *, logits: bool) -> float:
        """FLOPs to train on one token: 6 per weight, and 6 L T d for attention.

        As PaLM counts (Chowdhery et al. 2022, appendix B), with the causal half of the attention.
        The embedding is a look-up and free; the output head counts where there are logits.
        """
        counts = self.parameter_counts()
        weights = counts["attention"] + counts["feed_forward"]
        weights += self.vocab_size * self.dim if logits else 0
        return 6.0 * weights + 6.0 * self.n_layers * sequence_length * self.query_dim
