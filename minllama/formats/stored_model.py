"""A model as a file holds it, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from config import LlamaConfig
from minllama.system.errors import UsageError
from minllama.text.chat import Template

if TYPE_CHECKING:
    from llama import Llama


# What is read as it is: numbers of 8 bits have scales of their own somewhere.
REAL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# What a shape may have beyond Llama 2's, by the names of `extras`, and how an error calls it.
EXTRAS = {
    "head_dim": "heads that are not dim / n_heads wide",
    "linear": "rope_scaling linear",
    "llama3": "rope_scaling llama3",
    "attention_bias": "biases of queries, keys and values",
    "qk_norm": "norms of queries and keys",
}
# What of that each format can hold, by its names of the architectures. A .pt file holds all. A
# switch that a format cannot hold is refused: without it another model would be read back.
HOLDS: dict[str, dict[str, set[str]]] = {
    "bin": {"llama2.c": set()},
    "hf": {
        "llama": {"head_dim", "linear", "llama3"},
        "qwen2": {"head_dim", "linear", "llama3", "attention_bias"},
        "qwen3": {"head_dim", "linear", "llama3", "qk_norm"},
    },
    "gguf": {  # llama.cpp has llama3's positions, the tensor rope_freqs, for the first alone
        "llama": {"head_dim", "linear", "llama3"},
        "qwen2": {"head_dim", "linear", "attention_bias"},
        "qwen3": {"head_dim", "linear", "qk_norm"},
    },
}


class StoredModel(NamedTuple):
    """A model as a file holds it: exactly the tensors of its config, under our names."""

    config: LlamaConfig
    weights: dict[str, Tensor]  # in any floating dtype
    vocabulary: bytes | None = None  # where the file carries one
    chat_template: Template | None = None

    def checked(self, path: Path, their_name: Callable[[str], str] = str) -> StoredModel:
        """The model, of weights by the file's names for them, which `their_name` gives.

        Raises UsageError, naming file and tensor, if these are not the tensors of the config.
        """
        shapes = parameter_shapes(self.config)
        names = {their_name(name): name for name in shapes}
        missing = [name for name in names if name not in self.weights]
        surplus = [name for name in self.weights if name not in names]
        for problem, wrong in (("missing", missing), ("not of a Llama of this shape", surplus)):
            if wrong:
                others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                raise UsageError(f"{path}: tensor {wrong[0]}{others} {problem}")
        weights = {ours: self.weights[theirs] for theirs, ours in names.items()}
        for theirs, ours in names.items():
            tensor, shape = weights[ours], shapes[ours]
            if tuple(tensor.shape) != shape:
                got = f"{tuple(tensor.shape)} where its config asks for {shape}"
                raise UsageError(f"{path}: tensor {theirs} has the shape {got}")
            if tensor.dtype not in REAL_DTYPES:
                kind = f"{tensor.dtype}, not real numbers of 16 bits or more"
                raise UsageError(f"{path}: tensor {theirs} holds {kind}")
        table, head = weights["tok_embeddings.weight"], weights["output.weight"]
        if self.config.tie_word_embeddings and not same_bits(table, head):
            raise UsageError(f"{path}: says that embedding and output are tied, but they differ")
        return self._replace(weights=weights)

    def check_read_back(
        self, path: Path, want: dict[str, Tensor], *, outcome: str = "; nothing written"
    ) -> None:
        """UsageError, with what comes of it, unless the tensors read back from `path` are these."""
        for name, tensor in want.items():
            bits = self.weights[name].float().view(torch.int32)  # so that NaN equals itself
            if not torch.equal(bits, tensor.view(torch.int32)):
                raise UsageError(f"self-check: {name} read back from {path} differs{outcome}")


class Contents(NamedTuple):
    """All that a file holds, as it is stored, whether or not it is a model."""

    format: str
    values: dict[str, Any]  # under 'model' the tensors by the file's names; .pt files have more
    # Where tensors are packed and come as float32: what they are in the file, and how many bytes.
    dtypes: dict[str, str] = {}
    packed_bytes: int | None = None
    adapters: bool = False  # of a LoRA finetuning's checkpoint, among the tensors


def extras(config: LlamaConfig) -> list[str]:
    """What of EXTRAS a shape has."""
    scaling = config.rope_scaling and config.rope_scaling.rope_type
    has = {name: getattr(config, name) for name in ("attention_bias", "qk_norm")}
    has |= {"head_dim": config.query_dim != config.dim, scaling: True}
    return [name for name in EXTRAS if has.get(name)]


def architecture_for(config: LlamaConfig, target: str) -> str:
    """The first architecture of a format of HOLDS that has all that the shape has.

    Raises UsageError, which names what none has.
    """
    needed = extras(config)
    fitting = {
        format: [name for name, held in kinds.items() if held.issuperset(needed)]
        for format, kinds in HOLDS.items()
    }
    if fitting[target]:
        return fitting[target][0]
    has = " together with ".join(EXTRAS[name] for name in needed)
    others = " or ".join(["pt", *(format for format, names in fitting.items() if names)])
    raise UsageError(
        f"--convert {target}: the model has {has}, which {' or '.join(HOLDS[target])} in this "
        f"format cannot hold: --convert {others} can"
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the bit, which torch.equal cannot say of all dtypes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (one, other)))


# ---------------------------------------------------------------------------- reading


def read_shape(path: Path, args: Any, **defaults: Any) -> LlamaConfig:
    """The shape that a file's `model_args` ask for; `defaults` for what they leave out.

    Raises UsageError, naming the file, for an invalid one.
    """
    if not isinstance(args, dict):
        raise UsageError(f"{path}: no dict 'model_args', which gives the shape of the model")
    missing = {name: value for name, value in defaults.items() if args.get(name) is None}
    try:
        return LlamaConfig.from_model_args(args | missing)
    except (TypeError, ValueError) as error:  # UsageError is a ValueError
        raise UsageError(f"{path}: invalid Llama shape: {error}") from None


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor, in the model's order, a tied head under both names."""
    dim, hidden, query_dim, kv_dim = config.dim, config.hidden_dim, config.query_dim, config.kv_dim
    in_layer = {}
    for kind, width in (("query", query_dim), ("key", kv_dim), ("value", kv_dim)):
        in_layer[f"attention.compute_{kind}.weight"] = (width, dim)
        if config.attention_bias:
            in_layer[f"attention.compute_{kind}.bias"] = (width,)
    in_layer["attention.compute_output.weight"] = (dim, query_dim)
    if config.qk_norm:
        in_layer["attention.query_norm.weight"] = (config.head_dim,)
        in_layer["attention.key_norm.weight"] = (config.head_dim,)
    in_layer |= {
        "feed_forward.w1.weight": (hidden, dim),
        "feed_forward.w2.weight": (dim, hidden),
        "feed_forward.w3.weight": (hidden, dim),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }
    shapes = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for layer in range(config.n_layers):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    return shapes | {"norm.weight": (dim,), "output.weight": (config.vocab_size, dim)}


def translate(name: str, parts: dict[str, str], layers: str) -> str:
    """Another program's name of our tensor, by its names of the parts and of the list of layers."""
    stem, _, kind = name.rpartition(".")  # kind: weight or bias
    if not stem.startswith("layers."):
        return f"{parts[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"{layers}.{layer}.{parts[part]}.{kind}"


def to_half_split(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of queries or keys as `transformers` rotates them: i paired with i + D/2."""
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_adjacent_pairs(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of to_half_split: 2i paired with 2i + 1."""
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def reorder_heads(
    weights: dict[str, Tensor], config: LlamaConfig, order: Callable[[Tensor, int], Tensor]
) -> dict[str, Tensor]:
    """Our tensors, with the rows of queries and keys, their biases and their norms reordered."""
    heads = {"compute_query": config.n_heads, "compute_key": config.n_kv_heads}
    heads |= {"query_norm": 1, "key_norm": 1}  # one norm for all heads
    parts = {name: name.split(".")[-2] for name in weights}
    return {
        name: order(tensor, heads[parts[name]]) if parts[name] in heads else tensor
        for name, tensor in weights.items()
    }


# ---------------------------------------------------------------------------- writing


def as_stored(model: Llama, dtype: str) -> dict[str, Tensor]:
    """The float32 tensors that a reader must find in a file of one of torch's dtypes."""
    state = model.state_dict().items()
    want = {name: tensor.to(getattr(torch, dtype)).float() for name, tensor in state}
    check_finite(model, want, dtype)
    return want


def check_finite(model: Llama, want: dict[str, Tensor], dtype: str) -> None:
    """UsageError for a number of the model that is too large for the precision."""
    for name, tensor in model.state_dict().items():
        if tensor.isfinite().all() and not want[name].isfinite().all():
            raise UsageError(f"{name} has numbers beyond {dtype}: --save_dtype float32 holds them")
