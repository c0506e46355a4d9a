"""What a run is: the model's shape, its presets, and every option of the command line.

Pure Python: importing this module loads neither torch nor numpy, so `--help` answers at once and
bad input is found before any work. It knows nothing of tensors, of files' contents or of devices;
what only the data or the machine can tell is checked where it is first known.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

DATA_DIR = Path(__file__).resolve().parent / "data"
SHIPPED_MODEL = DATA_DIR / "stories-tiny.pt"
IGNORE_INDEX = -100  # a target that is no target: padding


Parsed = typing.TypeVar("Parsed")


class UsageError(ValueError):
    """Bad input. The message is for the user: what was given, where, and the remedy."""


class RunFailed(Exception):
    """A run that cannot go on or end as it should, through no bad input; a line for the user."""


def fingerprint(model_bytes: bytes) -> str:
    """What a vocabulary is called in messages: the first 16 hex digits of its file's SHA-256."""
    return hashlib.sha256(model_bytes).hexdigest()[:16]


# ---------------------------------------------------------------------------- the model's shape


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama. Field names are the `model_args` keys of weights files.

    Raises UsageError for a shape that no Llama can have.
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

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # frozen, but still being made
        if self.n_kv_heads is None:
            set_field(self, "n_kv_heads", self.n_heads)
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"--{name} {value}: must be a whole number of at least 1")
        if self.hidden_dim is None:
            rounded_up = -(-int(8 * self.dim / 3) // self.multiple_of) * self.multiple_of
            set_field(self, "hidden_dim", rounded_up)
        if self.dim % self.n_heads:
            near = self.n_heads * max(1, round(self.dim / self.n_heads))
            raise UsageError(
                f"--dim {self.dim} is not divisible by --n_heads {self.n_heads}: every head gets "
                f"dim / n_heads numbers; --dim {near} would do"
            )
        if self.head_dim % 2:
            raise UsageError(
                f"--dim {self.dim} / --n_heads {self.n_heads} = {self.head_dim}: rotary embeddings "
                "turn pairs of numbers, so the size of a head must be even"
            )
        if self.n_heads % self.n_kv_heads:
            raise UsageError(
                f"--n_heads {self.n_heads} is not divisible by --n_kv_heads {self.n_kv_heads}: "
                "each key/value head serves the same number of query heads"
            )

    @property
    def head_dim(self) -> int:
        """Numbers per attention head, D in the shapes."""
        return self.dim // self.n_heads

    def to_model_args(self) -> dict[str, Any]:
        """The plain dict that weights files carry as `model_args`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_model_args(cls, model_args: dict[str, Any]) -> LlamaConfig:
        """Read `model_args` of this program, the original or llama2.c; unknown keys are theirs.

        llama2.c names the normalisation's epsilon `norm_eps`; both leave out what they do not have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        renamed = {"norm_eps": "layer_norm_eps"}
        named = {renamed.get(key, key): value for key, value in model_args.items()}
        return cls(**{key: value for key, value in named.items() if key in known})

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; a tied output head counts once, in the embedding."""
        kv_dim = self.n_kv_heads * self.head_dim
        return {
            "embedding": self.vocab_size * self.dim,
            "attention": self.n_layers * (2 * self.dim * self.dim + 2 * self.dim * kv_dim),
            "feed_forward": self.n_layers * 3 * self.dim * self.hidden_dim,
            "norms": (2 * self.n_layers + 1) * self.dim,
            "output": 0 if self.tie_word_embeddings else self.vocab_size * self.dim,
        }

    def block_parameters(self) -> tuple[int, int]:
        """Parameters in the layers, and in what is around them: embedding, last norm and head."""
        counts = self.parameter_counts()
        around = counts["embedding"] + counts["output"] + self.dim
        return sum(counts.values()) - around, around

    def flops_per_token(self, sequence_length: int, *, logits: bool) -> float:
        """Floating-point operations to train on one token: 6 per weight, 6 L T d for attention.

        PaLM's count (Chowdhery et al. 2022, appendix B) with the causal half of the attention; the
        embedding's look-up is free, the output head's product, where there are logits, is not.
        """
        counts = self.parameter_counts()
        weights = counts["attention"] + counts["feed_forward"]
        weights += self.vocab_size * self.dim if logits else 0
        return 6.0 * weights + 6.0 * self.n_layers * sequence_length * self.dim


@dataclass(frozen=True)
class Preset:
    """A named model size: the flags it stands for and the learning rate it pretrains well with."""

    shape: dict[str, Any]
    pretrain_lr: float


PRESETS: dict[str, Preset] = {
    "tiny": Preset({"dim": 128, "n_layers": 4, "n_heads": 2}, pretrain_lr=5e-3),
    "stories15M": Preset({"dim": 288, "n_layers": 6, "n_heads": 6}, pretrain_lr=1e-3),
    "stories42M": Preset({"dim": 512, "n_layers": 8, "n_heads": 8}, pretrain_lr=5e-4),
    "stories110M": Preset({"dim": 768, "n_layers": 12, "n_heads": 12}, pretrain_lr=5e-4),
    "1.1B": Preset(  # TinyLlama
        {
            "dim": 2048,
            "n_layers": 22,
            "n_heads": 32,
            "n_kv_heads": 4,
            "hidden_dim": 5632,
            "tie_word_embeddings": False,
        },
        pretrain_lr=4e-4,
    ),
    "7B": Preset(  # Llama-2-7B
        {
            "dim": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "hidden_dim": 11008,
            "tie_word_embeddings": False,
        },
        pretrain_lr=3e-4,
    ),
}


# ---------------------------------------------------------------------------- the plan of a run

# Logits that stand at once, by device: the loss is computed in chunks of them. On a CPU chunks near
# the size of its cache are fastest; a GPU wants larger products.
LOGITS_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28, "mps": 2**28}
# Tokens up to which training on a CPU keeps attention's scores for the backward pass: that is
# faster, and with longer rows the scores' memory is worth more than the time.
SCORES_KEPT = 1024
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a process takes before it has a model: Python and torch with their kernels, CUDA's context.
PROCESS_BYTES = {"cpu": 400 * 10**6, "cuda": 500 * 10**6, "mps": 400 * 10**6}


def human_size(size: float) -> str:
    """Bytes as people read them: 226 MB, 1.17 GB (powers of 1,000)."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def human_time(seconds: float) -> str:
    """A duration as people read it: 45 s, 3 min 20 s, 2 h 5 min, 98 days 21 h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# What --compile auto reckons with on a CPU: operations per second and thread of an eager step, the
# share of its time that a compiled one saves (4 to 15 %), and seconds that compiling takes.
EAGER_FLOPS = {"float32": 60e9, "bfloat16": 120e9, "float16": 60e9}
COMPILED_SAVES, COMPILING_TAKES = 0.08, 35


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run will do and need, by arithmetic alone.

    A step trains on `micro_batch_size * accumulation_steps * world_size` sequences of at most
    `sequence_length` tokens. Memory is that of one process, in bytes.
    """

    config: LlamaConfig
    trainable_parameters: int
    muon_parameters: int  # of those: Muon keeps one number for each, AdamW two
    sequences: int  # to train on: chunks of text, or labelled sentences
    tokens: int  # in those sequences
    sequence_length: int
    logits_width: int  # logits per target: the vocabulary's size, or the number of labels
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    epochs: int
    max_steps: int | None
    warmup_steps_given: int | None
    dtype: str
    device: str  # cpu, cuda or mps
    activation_checkpointing: bool
    keep_last: int
    checkpoints_kept: int  # those of epochs, which are not deleted
    parallel: str = "ddp"  # ddp: a whole model per process; fsdp: a share of every block

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass over the data, a last short one included: at least 1."""
        return max(1, -(-self.sequences // self.sequences_per_step))

    @property
    def schedule_steps(self) -> int:
        """Steps that the learning rate's schedule spans: all epochs."""
        return self.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Steps after which the run ends: `max_steps` may come before the schedule's end."""
        return min(self.max_steps or self.schedule_steps, self.schedule_steps)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warmup: as given, else 5 % of the schedule."""
        if self.warmup_steps_given is not None:
            return self.warmup_steps_given
        return round(0.05 * self.schedule_steps)

    def activation_bytes(self) -> int:
        """What a micro-batch keeps for the backward pass, for attention that keeps no scores."""
        config, compute = self.config, DTYPE_BYTES[self.dtype]
        kv_dim = config.n_kv_heads * config.head_dim
        residual = 4 * config.dim  # the residual stream stays in float32
        layer = 2 * residual + compute * (5 * config.dim + 3 * kv_dim + 4 * config.hidden_dim)
        if self.device == "cpu" and self.sequence_length <= SCORES_KEPT:
            layer += compute * config.n_heads * self.sequence_length
        layers = config.n_layers * layer
        if self.activation_checkpointing:
            layers = config.n_layers * residual + layer
        return self.micro_batch_size * self.sequence_length * (layers + 3 * residual)

    def flops_per_token(self) -> float:
        """Operations to train on one token; of finetuning, as if all weights were trained."""
        logits = self.logits_width == self.config.vocab_size
        return self.config.flops_per_token(self.sequence_length, logits=logits)

    def compiling_pays(self, threads: int) -> tuple[bool, str]:
        """Whether a run on this many CPU threads is long enough to compile for, and why."""
        tokens = self.tokens * self.last_step / self.steps_per_epoch / self.world_size
        seconds = tokens * self.flops_per_token() / (EAGER_FLOPS[self.dtype] * threads)
        saved = COMPILED_SAVES * seconds
        reason = (
            f"it would save about {human_time(saved)} of {human_time(seconds)} and takes about "
            f"{human_time(COMPILING_TAKES)}"
        )
        return saved > 2 * COMPILING_TAKES, reason

    @property
    def shards(self) -> int:
        """Processes that share out weights, gradients and the optimizer's moments."""
        return self.world_size if self.parallel == "fsdp" else 1

    def gathered_bytes(self) -> int:
        """What a process holds of the weights beside its own float32 share of them.

        Sharded: of two blocks the weights in `dtype`, one used and one on its way, of one its
        gradients, in `dtype` and as float32 for the exchange; embedding and head whole, in float32,
        with their gradients. Whole: autocast's copies of the matrices.
        """
        compute = DTYPE_BYTES[self.dtype]
        blocks, rest = self.config.block_parameters()
        if self.shards > 1:
            return blocks // self.config.n_layers * (3 * compute + 4) + 8 * rest
        return compute * blocks if self.dtype != "float32" else 0

    def memory(self) -> dict[str, int]:
        """Bytes by part while training."""
        weights = 4 * sum(self.config.parameter_counts().values())
        logits = 4 * self.micro_batch_size * self.sequence_length * self.logits_width
        return {
            "weights": weights // self.shards,
            "gradients": 4 * self.trainable_parameters // self.shards,
            "optimizer": self.optimizer_bytes() // self.shards,
            "copies": self.gathered_bytes(),
            "activations": self.activation_bytes(),
            "logits": 2 * min(logits, LOGITS_CHUNK_BYTES[self.device]),
            "process": PROCESS_BYTES[self.device],
        }

    def optimizer_bytes(self) -> int:
        """The optimizer's moments: two float32 numbers for each parameter, one where it is Muon."""
        return 8 * self.trainable_parameters - 4 * self.muon_parameters

    def checkpoint_bytes(self) -> int:
        """A resumable checkpoint: float32 weights and the optimizer's moments."""
        return 4 * sum(self.config.parameter_counts().values()) + self.optimizer_bytes()

    def weights_file_bytes(self, save_dtype: str) -> int:
        """A weights file: the weights alone, a tied embedding once."""
        return DTYPE_BYTES[save_dtype] * sum(self.config.parameter_counts().values())

    def disk_bytes(self, save_dtype: str) -> int:
        """Everything the run will have written, a file being replaced counted twice."""
        checkpoints = self.checkpoints_kept + self.keep_last + 1
        return checkpoints * self.checkpoint_bytes() + 3 * self.weights_file_bytes(save_dtype)

    def lines(self, *, noun: str, save_dtype: str, available: int | None) -> list[str]:
        """The plan as a person reads it; `noun` is what a sequence is called."""
        counts, memory = self.config.parameter_counts(), self.memory()
        config = self.config
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        needs = ", ".join(f"{name} {human_size(size)}" for name, size in memory.items() if size)
        have = f"; {human_size(available)} available" if available else ""
        processes = f" x {self.world_size} processes" if self.world_size > 1 else ""
        moments = "moments" if self.muon_parameters else "two moments of each"
        ends = ""
        if self.last_step < self.schedule_steps:
            ends = f", ended after {self.last_step:,} by --max_steps"
        per_process = f" per process ({self.parallel})" if self.world_size > 1 else ""
        return [
            f"model        {sum(counts.values()):,} parameters: {parts}",
            f"             dim {config.dim}, {config.n_layers} layers, {config.n_heads} heads "
            f"({config.n_kv_heads} key/value), vocabulary {config.vocab_size:,}, "
            f"context {config.max_seq_len:,}",
            f"data         {self.tokens:,} tokens in {self.sequences:,} {noun} of up to "
            f"{self.sequence_length:,}",
            f"steps        {self.steps_per_epoch:,} per epoch x {self.epochs:,} epochs = "
            f"{self.schedule_steps:,}, of {self.sequences_per_step:,} {noun} "
            f"({self.micro_batch_size} x {self.accumulation_steps} accumulated{processes}); "
            f"warmup {self.warmup_steps:,}{ends}",
            f"memory       {human_size(sum(memory.values()))} in {self.dtype}{per_process}: "
            f"{needs}{have}",
            f"files        weights {human_size(self.weights_file_bytes(save_dtype))} "
            f"({save_dtype}), resumable checkpoint {human_size(self.checkpoint_bytes())} "
            f"(float32 weights and the optimizer's {moments})",
        ]


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes of one size, and what training on them takes, by arithmetic alone.

    Exchanges go round a ring of all GPUs at the pace of its slowest link: `intra_node` bytes/s each
    way between two GPUs of a node, `inter_node` each way between two nodes, all adapters together.
    """

    gpus_per_node: int
    flops: float  # a GPU's peak, per second
    mfu: float  # share of it that the computing alone reaches, recomputing counted too
    intra_node: float
    inter_node: float

    def compute_seconds(self, plan: TrainingPlan) -> float:
        """An optimizer step's computing on one GPU."""
        tokens = plan.sequences_per_step // plan.world_size * plan.sequence_length
        again = 4 / 3 if plan.activation_checkpointing else 1  # the forward pass, a third, twice
        return tokens * plan.flops_per_token() * again / (self.flops * self.mfu)

    def exchanged_bytes(self, plan: TrainingPlan) -> float:
        """What each GPU sends, and receives, per optimizer step.

        DDP: a ring's all-reduce of the float32 gradients sends 2 (N-1)/N of them. FSDP: of each
        micro-batch a block's weights in `dtype` for the forward and for the backward pass, and its
        gradients in float32, (N-1)/N of each; embedding and head once each way, in float32.
        """
        share = (plan.world_size - 1) / plan.world_size
        blocks, around = plan.config.block_parameters()
        if plan.parallel == "ddp":
            return 2 * share * 4 * (blocks + around)
        per_block = 2 * DTYPE_BYTES[plan.dtype] + 4
        return plan.accumulation_steps * share * (per_block * blocks + 8 * around)

    def exchange_seconds(self, plan: TrainingPlan) -> float:
        """That traffic's time, were nothing computed meanwhile."""
        one_node = plan.world_size <= self.gpus_per_node
        slowest = self.intra_node if one_node else min(self.intra_node, self.inter_node)
        return self.exchanged_bytes(plan) / slowest

    def step_seconds(self, plan: TrainingPlan) -> float:
        """An optimizer step with the exchange behind the computing, as far as it fits there.

        DDP's fits behind the backward pass of the last micro-batch, FSDP's behind everything.
        """
        compute, exchange = self.compute_seconds(plan), self.exchange_seconds(plan)
        behind = compute
        if plan.parallel == "ddp":
            backward = 3 / 4 if plan.activation_checkpointing else 2 / 3
            behind = backward * compute / plan.accumulation_steps
        return compute + max(0.0, exchange - behind)

    def lines(self, plan: TrainingPlan) -> list[str]:
        """Traffic, speed and time as a person reads them."""
        step, compute = self.step_seconds(plan), self.compute_seconds(plan)
        exchange = self.exchange_seconds(plan)
        tokens = plan.sequences_per_step * plan.sequence_length
        rate = tokens / step
        reached = rate * plan.flops_per_token() / (plan.world_size * self.flops)
        nodes = -(-plan.world_size // self.gpus_per_node)
        return [
            f"cluster      {plan.world_size:,} GPUs in {nodes:,} node{'s' * (nodes > 1)}, "
            f"{self.flops / 1e12:,.0f} TFLOP/s each, of which computing reaches {self.mfu:.0%}; "
            f"links {self.intra_node / 1e9:,.0f} GB/s within a node, "
            f"{self.inter_node / 1e9:,.0f} GB/s between nodes",
            f"exchange     {human_size(self.exchanged_bytes(plan))} per GPU and step "
            f"({plan.parallel}): {exchange:.3g} s",
            f"step         {tokens:,} tokens: computing {compute:.3g} s; {step:.3g} s with the "
            f"exchange behind it as far as it fits, {compute + exchange:.3g} s one after the other",
            f"speed        {rate:,.0f} tokens/s, {rate / plan.world_size:,.0f} per GPU, "
            f"MFU {reached:.1%}",
            f"time         {human_time(1e9 / rate)} per billion tokens, "
            f"{human_time(plan.last_step * step)} for the run",
        ]


# ---------------------------------------------------------------------------- the options


EMBEDDED_SEQ_LEN = 256  # of the embedded stories, which are shorter: more steps, sooner done


def flag(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    many: bool = False,
    metavar: str | None = None,
    alone: str | None = None,
) -> Any:
    """A dataclass field that is a command-line flag: its help and the bounds of its value.

    `alone` is what a flag of choices means when it is typed without one.
    """
    bounds = {"at_least": at_least, "above": above, "below": below}
    metadata = {"help": help, "bounds": bounds, "many": many, "metavar": metavar, "alone": alone}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunOptions:
    """the run"""

    option: Literal["pretrain", "finetune", "prompt", "generate"] = flag("generate", "what to do")
    seed: int = flag(1337, "of every random number", at_least=0, below=2**63)
    use_gpu: bool = flag(False, "train or run on CUDA or Apple's MPS where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the arithmetic; auto: bfloat16 where the device multiplies it fast"
    )
    compile: Literal["auto", "on", "off"] = flag(
        "auto",
        "torch.compile the model, which takes half a minute; auto: to pretrain on the CPU, where "
        "the plan says that it pays; --compile alone: on",
        alone="on",
    )
    plan: bool = flag(False, "print the plan of the run (sizes, steps, memory) and stop")
    save_dir: Path = flag(Path("checkpoints"), "folder of the run's checkpoints and records")
    resume: str | None = flag(
        None, "go on from this checkpoint; auto: the newest of --save_dir", metavar="FILE|auto"
    )
    overwrite: bool = flag(False, "remove the files of an earlier run in --save_dir first")


@dataclass(frozen=True)
class ModelOptions:
    """the model"""

    model_size: Literal["tiny", "stories15M", "stories42M", "stories110M", "1.1B", "7B"] = flag(
        "tiny", "preset of the shape to pretrain; the flags below change it"
    )
    dim: int | None = flag(None, "width of the model", at_least=1)
    n_layers: int | None = flag(None, "number of layers", at_least=1)
    n_heads: int | None = flag(None, "attention heads per layer", at_least=1)
    n_kv_heads: int | None = flag(None, "key/value heads; fewer than --n_heads: GQA", at_least=1)
    hidden_dim: int | None = flag(None, "width of the feed-forward network", at_least=1)
    max_seq_len: int = flag(
        1024, "context in tokens; text is cut into chunks of it; the stories: 256", at_least=1
    )
    dropout: float = flag(0.0, "dropout of the model while training", at_least=0, below=1)
    tokenizer_model: Path | None = flag(
        None, "SentencePiece vocabulary; unset: the model file's own, or the embedded one"
    )
    pretrained_model_path: Path | None = flag(
        None,
        "model file or folder to finetune, prompt or generate with; unset: "
        "./checkpoints/final-model.pt, else ./stories42M.pt, else the shipped model",
    )


@dataclass(frozen=True)
class PretrainDataOptions:
    """text to pretrain on"""

    pretrain_data: tuple[str, ...] = flag(
        (), "files, folders or globs: .txt, .jsonl, each also .gz; unset: the stories", many=True
    )
    val_data: tuple[str, ...] = flag((), "the same, held out for validation", many=True)
    val_fraction: float = flag(
        0.05, "share of the text held out where --val_data is unset; 0: none", at_least=0, below=1
    )
    document_per_line: bool = flag(False, "every line of a text file is a document of its own")
    text_field: str = flag("text", "field of a .jsonl line that holds the text; a.b goes deeper")
    sentences_only: bool = flag(False, "of `label ||| sentence` files read only the sentences")
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "bytes that are not UTF-8: stop and name the line, or put U+FFFD"
    )
    cache_dir: Path = flag(Path("token_cache"), "folder of the tokenized text")


@dataclass(frozen=True)
class TrainOptions:
    """training"""

    epochs: int = flag(5, "passes over the data", at_least=1)
    max_steps: int | None = flag(
        None, "end the run early, after this many optimizer steps in all", at_least=1
    )
    gradient_accumulation_steps: int = flag(
        1, "micro-batches per optimizer step; equals one big batch", at_least=1
    )
    optimizer: Literal["adamw", "muon"] = flag(
        "adamw",
        "muon: Muon on the matrices inside the layers, AdamW on the rest, with the same learning "
        "rate, schedule and decay",
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = flag(
        "cosine", "what follows the warmup; wsd: constant, then linear over the last fifth"
    )
    warmup_steps: int | None = flag(
        None, "steps of linear warmup; unset: 5 %% of the run", at_least=0
    )
    min_lr: float = flag(0.0, "learning rate at the end of the schedule", at_least=0)
    weight_decay: float | None = flag(
        None,
        "decay of the weights, on matrices only; unset: 0.1 to pretrain, 0 to finetune",
        at_least=0,
    )
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: never clipped", at_least=0)
    activation_checkpointing: bool = flag(
        False, "recompute each layer in the backward pass: less memory, a third slower"
    )
    profile: bool = flag(
        False, "profile a few steps: a table of where they go, and profile.json.gz for a viewer"
    )
    checkpoint_interval: int = flag(
        1000, "optimizer steps between resumable checkpoints; 0: none", at_least=0
    )
    keep_last: int = flag(2, "step checkpoints to keep; 0: all", at_least=0)
    on_nonfinite: Literal["rollback", "stop"] = flag(
        "rollback",
        "after 10 steps in a row whose loss or gradients are not finite: go back to the last good "
        "checkpoint with half the learning rate, or stop",
    )


@dataclass(frozen=True)
class ClusterOptions:
    """several processes (torchrun)"""

    global_batch_size: int | None = flag(
        None,
        "sequences per optimizer step over all processes; unset: micro-batch x accumulation x "
        "processes; given: the accumulation follows from it",
        at_least=1,
    )
    parallel: Literal["ddp", "fsdp"] = flag(
        "ddp", "each process holds the whole model, or its share of every block (FSDP2)"
    )
    dist_timeout: int = flag(
        600, "seconds that the processes wait for one that lags before all of them end", at_least=1
    )


@dataclass(frozen=True)
class PretrainOptions:
    """--option pretrain"""

    pretrain_batch_size: int = flag(8, "chunks per micro-batch", at_least=1)
    pretrain_lr: float | None = flag(
        None, "peak learning rate; unset: what suits --model_size", above=0
    )
    eval_interval: int = flag(
        0, "optimizer steps between validations; 0: at the end of each epoch", at_least=0
    )
    save_interval: int = flag(50, "epochs between pretrain-epoch-N.pt", at_least=1)
    best_model_interval: int = flag(1, "epochs between looks for a new best-model.pt", at_least=1)
    save_dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "float32", "of the weights in final-model.pt and best-model.pt"
    )


@dataclass(frozen=True)
class OtherMachineOptions:
    """--plan for other machines: the defaults are NVIDIA's H100, its links by the data sheet"""

    world_size: int | None = flag(None, "plan for this many GPUs", at_least=1)
    plan_tokens: float | None = flag(
        None, "tokens of text, e.g. 3e12; unset: those of --pretrain_data", at_least=2
    )
    vocab_size: int | None = flag(
        None, "tokens of the vocabulary; unset: those of --tokenizer_model", at_least=1
    )
    gpus_per_node: int = flag(8, "GPUs that share a machine", at_least=1)
    gpu_memory_gb: float = flag(80, "memory of a GPU", above=0)
    gpu_tflops: float = flag(989, "peak of a GPU in --dtype, dense", above=0)
    mfu: float = flag(0.4, "share of that peak that the computing alone reaches", above=0)
    intra_node_gb_s: float = flag(450, "GB/s each way between two GPUs of a node", above=0)
    inter_node_gb_s: float = flag(
        400, "GB/s each way between two nodes, all network adapters together", above=0
    )


@dataclass(frozen=True)
class LabelledDataOptions:
    """labelled data (finetune, prompt)"""

    train: Path | None = flag(None, "`label ||| sentence` lines; unset: the embedded reviews")
    dev: Path | None = flag(None, "the same, to choose the best epoch by")
    test: Path | None = flag(None, "the same, for the last figures")
    label_names: Path | None = flag(
        None, "JSON list of the labels' names; unset: NAME-label-mapping.json beside --train"
    )
    batch_size: int = flag(8, "sentences per batch", at_least=1)
    max_sentence_len: int | None = flag(None, "tokens of a sentence to read", at_least=1)
    dev_out: Path | None = flag(
        None, "predictions on --dev; unset: named after data set and option"
    )
    test_out: Path | None = flag(None, "predictions on --test; likewise")


@dataclass(frozen=True)
class FinetuneOptions:
    """--option finetune"""

    lr: float = flag(2e-5, "peak learning rate", above=0)
    hidden_dropout_prob: float = flag(0.3, "dropout before the linear head", at_least=0, below=1)
    freeze_backbone: bool = flag(False, "train the linear head alone")
    lora_rank: int | None = flag(
        None, "train adapters of this rank instead of the full weights", at_least=1
    )
    early_stopping: int | None = flag(
        None, "stop after this many epochs without a better dev accuracy", at_least=1
    )


@dataclass(frozen=True)
class PromptOptions:
    """--option prompt"""

    prompt_template: str = flag(
        "{sentence} Is this movie {labels}? This movie is",
        "text before the label; {sentence} and {labels} are filled in, \\n is a newline",
    )
    label_norm: Literal["sum", "token", "byte", "pmi"] = flag(
        "sum",
        "score of a label: its log-probability, per token, per byte, or less the one it has "
        "without the sentence",
    )
    shots: int = flag(0, "labelled examples from --train to put before each prompt", at_least=0)


@dataclass(frozen=True)
class GenerateOptions:
    """--option generate"""

    prompt: tuple[str, ...] = flag((), "text to continue; repeatable", metavar="TEXT")
    prompt_file: Path | None = flag(None, "continue every line of this file")
    interactive: bool = flag(False, "type prompts, read continuations; Ctrl-D ends")
    weights: Literal["float32", "bfloat16", "int8"] = flag(
        "float32", "what the weights are rounded to: fewer bytes are read, and text comes, faster"
    )
    max_new_tokens: int = flag(75, "tokens to add", at_least=1)
    num_samples: int = flag(1, "continuations of each prompt", at_least=1)
    temperature: float | None = flag(
        None,
        "0: the likeliest token; 1: as the model says; unset: 0.8, and without a prompt both 0 "
        "and 1, as the original",
        at_least=0,
    )
    top_k: int | None = flag(None, "sample among this many likeliest tokens", at_least=1)
    top_p: float | None = flag(
        None, "sample among the likeliest that make up this probability", above=0
    )
    min_p: float | None = flag(
        None, "drop tokens less likely than this share of the likeliest", at_least=0, below=1
    )
    repetition_penalty: float = flag(1.0, "above 1: avoid what was said before", above=0)
    stop: tuple[str, ...] = flag(
        (), "end a continuation before this text; repeatable", metavar="TEXT"
    )
    generated_sentence_low_temp_out: Path = flag(
        Path("generated-sentence-temp-0.txt"), "the original's file at temperature 0"
    )
    generated_sentence_high_temp_out: Path = flag(
        Path("generated-sentence-temp-1.txt"), "the original's file at temperature 1"
    )


# A resumed run asks these of the command line, and everything else of its checkpoint.
ANEW_ON_RESUME = frozenset(
    "option use_gpu plan profile save_dir resume overwrite max_steps cache_dir dist_timeout".split()
)

# The groups in the order `--help` shows them; later bases come first in a dataclass's fields.
OPTION_GROUPS = (
    RunOptions,
    ModelOptions,
    PretrainDataOptions,
    TrainOptions,
    ClusterOptions,
    PretrainOptions,
    OtherMachineOptions,
    LabelledDataOptions,
    FinetuneOptions,
    PromptOptions,
    GenerateOptions,
)


@dataclass(frozen=True)
class Options(
    GenerateOptions,
    PromptOptions,
    FinetuneOptions,
    LabelledDataOptions,
    OtherMachineOptions,
    PretrainOptions,
    ClusterOptions,
    TrainOptions,
    PretrainDataOptions,
    ModelOptions,
    RunOptions,
):
    """Everything the command line says, checked as far as it can be without data or device."""

    given: frozenset[str] = frozenset()  # names of the flags that were typed

    def to_plain(self) -> dict[str, Any]:
        """The options as JSON and checkpoints hold them: strings, numbers, lists, None."""
        plain = dataclasses.asdict(self)
        del plain["given"]
        for name, value in plain.items():
            if isinstance(value, Path):
                plain[name] = value.as_posix()
            elif isinstance(value, tuple):
                plain[name] = list(value)
        return plain

    def resumed(self, stored: dict[str, Any]) -> Options:
        """These options with those of a checkpoint for every flag that was not typed.

        Where the run writes, what it computes on and when it ends early are not the checkpoint's.
        Its global batch is, for whatever micro-batch and number of processes; only an accumulation
        that was typed makes another one, which is then refused.
        """
        kept = self.given | ANEW_ON_RESUME
        name = "gradient_accumulation_steps"
        if name in self.given and getattr(self, name) != stored.get(name):
            kept |= {"global_batch_size"}
        changes = {}
        for field in dataclasses.fields(self):
            if field.name in stored and field.name not in kept and "help" in field.metadata:
                value = stored[field.name]
                if isinstance(value, list):
                    value = tuple(value)
                elif field.name == "compile" and isinstance(value, bool):  # a plain flag, once
                    value = "on" if value else "off"
                elif isinstance(value, str) and "Path" in str(field.type):
                    value = Path(value)
                changes[field.name] = value
        return dataclasses.replace(self, **changes)

    def llama_config(self, vocab_size: int) -> LlamaConfig:
        """The shape to pretrain: the preset, changed by the single flags."""
        shape = dict(PRESETS[self.model_size].shape)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim"):
            if getattr(self, name) is not None:
                shape[name] = getattr(self, name)
        if self.dim is not None and self.hidden_dim is None:
            shape.pop("hidden_dim", None)  # another width than the preset's: derive it again
        if self.n_heads is not None and self.n_kv_heads is None:
            shape.pop("n_kv_heads", None)
        return LlamaConfig(
            vocab_size=vocab_size, max_seq_len=self.max_seq_len, dropout=self.dropout, **shape
        )

    def muon_parameters(self, config: LlamaConfig) -> int:
        """How many parameters of a pretraining Muon updates: those of the layers' matrices."""
        counts = config.parameter_counts()
        return counts["attention"] + counts["feed_forward"] if self.optimizer == "muon" else 0

    @property
    def micro_batch_size(self) -> int:
        """Sequences that a process trains on at once, of the option at hand."""
        return self.pretrain_batch_size if self.option == "pretrain" else self.batch_size

    def with_global_batch(self, world_size: int) -> Options:
        """These options with the global batch settled, as given or as so many processes make it.

        Raises UsageError for one that they cannot make of whole micro-batches.
        """
        at_once = self.micro_batch_size * world_size
        if self.global_batch_size is None:
            whole = at_once * self.gradient_accumulation_steps
            return dataclasses.replace(self, global_batch_size=whole)
        if self.global_batch_size % at_once:
            name = "--pretrain_batch_size" if self.option == "pretrain" else "--batch_size"
            remedy = f"give a multiple of {at_once}"
            share, rest = divmod(self.global_batch_size, world_size)
            if not rest:
                remedy += f", or {name} {math.gcd(share, self.micro_batch_size)}"
            processes = f" x {world_size} processes = {at_once}" if world_size > 1 else ""
            raise UsageError(
                f"--global_batch_size {self.global_batch_size} is not divisible by "
                f"{name} {self.micro_batch_size}{processes}: {remedy}"
            )
        return self

    def peak_lr(self) -> float:
        """The learning rate after warmup of the option at hand."""
        if self.option != "pretrain":
            return self.lr
        return self.pretrain_lr or PRESETS[self.model_size].pretrain_lr

    def cluster(self) -> Cluster:
        """The machines to plan for."""
        return Cluster(
            gpus_per_node=self.gpus_per_node,
            flops=self.gpu_tflops * 1e12,
            mfu=self.mfu,
            intra_node=self.intra_node_gb_s * 1e9,
            inter_node=self.inter_node_gb_s * 1e9,
        )


# ---------------------------------------------------------------------------- reading them


class OneLineParser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of printing its usage over the message."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def with_underscores(word: str) -> str:
    """`--save-dir=x` as `--save_dir=x`: both spellings are accepted, one is known inside."""
    return re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)


def number_reader(kind: type, bounds: dict[str, float | None]) -> Callable[[str], Any]:
    """A function that reads a number within the bounds or raises argparse's error."""
    noun = "a whole number" if kind is int else "a number"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            glued = re.match(r"(.+?)(--\w.*)", text)
            remedy = f"; a space is missing before {glued[2]}" if glued else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}{remedy}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}")
        checks = {
            "at_least": ("at least", lambda bound: value >= bound),
            "above": ("above", lambda bound: value > bound),
            "below": ("below", lambda bound: value < bound),
        }
        for key, (words, holds) in checks.items():
            if bounds[key] is not None and not holds(bounds[key]):
                raise argparse.ArgumentTypeError(f"{text} must be {words} {bounds[key]:g}")
        return value

    return read


def add_flag(group: Any, field: dataclasses.Field, annotation: Any) -> None:
    """Add one dataclass field to an argparse group, its type taken from the annotation."""
    text = field.metadata["help"]
    if field.default not in (None, (), False):
        text += f" (default: {field.default})"
    settings: dict[str, Any] = {"dest": field.name, "default": field.default, "help": text}
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    if annotation is bool:
        settings["action"] = "store_true"
    elif typing.get_origin(annotation) is Literal:
        settings["choices"] = typing.get_args(annotation)
        if field.metadata["alone"]:
            settings |= {"nargs": "?", "const": field.metadata["alone"]}
    elif typing.get_origin(annotation) is tuple:
        settings |= {"nargs": "+"} if field.metadata["many"] else {"action": "append"}
        settings["metavar"] = field.metadata["metavar"] or "PATH"
        settings["default"] = None  # argparse would append to a default
    else:
        kind = kinds[0] if kinds else annotation
        numeric = kind in (int, float)
        settings["type"] = number_reader(kind, field.metadata["bounds"]) if numeric else kind
        words = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
        settings["metavar"] = field.metadata["metavar"] or words[kind]
    group.add_argument(f"--{field.name}", **settings)


def build_parser() -> argparse.ArgumentParser:
    """The command line of run_llama.py, generated from the option groups."""
    parser = OneLineParser(
        prog="run_llama.py",
        usage="python run_llama.py --option {pretrain,finetune,prompt,generate} [options]",
        description="Pretrain a small Llama from scratch; finetune, prompt and generate with it.",
        epilog="Every option is accepted with _ and with -, e.g. --save_dir and --save-dir.",
        allow_abbrev=False,
    )
    for group_class in OPTION_GROUPS:
        group = parser.add_argument_group(group_class.__doc__)
        annotations = typing.get_type_hints(group_class)
        for field in dataclasses.fields(group_class):
            add_flag(group, field, annotations[field.name])
    return parser


def parse_options(arguments: Sequence[str]) -> Options:
    """Read and check the command line.

    Raises UsageError with every problem found, a line each; exits 0 after `--help`.
    """
    parser = build_parser()
    parser.set_defaults(max_seq_len=None)
    words = [with_underscores(word) for word in arguments]
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError("\n".join(unknown_argument(parser, word) for word in unknown))
    values = vars(namespace)
    if values["max_seq_len"] is None:
        own_text = values["pretrain_data"] or values["plan_tokens"]
        embedded = values["option"] == "pretrain" and not own_text
        values["max_seq_len"] = EMBEDDED_SEQ_LEN if embedded else Options.max_seq_len
    for field in dataclasses.fields(Options):
        if isinstance(field.default, tuple):
            values[field.name] = tuple(values[field.name] or ())
    typed = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    options = Options(**values, given=frozenset(typed & {*values}))
    problems = find_problems(options)
    if problems:
        raise UsageError("\n".join(problems))
    return options


def parse_or_exit(
    parse: Callable[[Sequence[str]], Parsed], program: str, arguments: Sequence[str]
) -> Parsed:
    """What `parse` makes of a command line; on a bad one a line per problem and exit status 2.

    For scripts to call before they import torch, which takes seconds. Of several processes, which
    all have the same command line, the first one prints.
    """
    try:
        return parse(arguments)
    except UsageError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0":
            report_usage_error(program, error)
        sys.exit(2)


def report_usage_error(program: str, error: Exception) -> None:
    """Print each problem of the error on a line of its own."""
    for line in str(error).splitlines():
        print(f"{program}: error: {line}", file=sys.stderr)


def unknown_argument(parser: argparse.ArgumentParser, word: str) -> str:
    """What to say of a word the parser does not know: the nearest flag, if any is near."""
    flags = [text for action in parser._actions for text in action.option_strings]
    if word in typing.get_args(typing.get_type_hints(Options)["option"]):
        return f"{word}: did you mean --option {word}?"
    near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
    remedy = f"did you mean {near[0]}?" if near else "--help lists the options"
    return f"{word}: no such option; {remedy}"


# The options that a group of flags is for; of the groups left out, all.
GROUP_IS_FOR: dict[type, tuple[str, ...]] = {
    PretrainDataOptions: ("pretrain",),
    PretrainOptions: ("pretrain",),
    OtherMachineOptions: ("pretrain",),
    TrainOptions: ("pretrain", "finetune"),
    ClusterOptions: ("pretrain", "finetune"),
    LabelledDataOptions: ("finetune", "prompt"),
    FinetuneOptions: ("finetune",),
    PromptOptions: ("prompt",),
    GenerateOptions: ("generate",),
}
ALSO_FOR = {"save_dtype": "finetune"}
INSTEAD = {
    ("pretrain", "lr"): "--pretrain_lr",
    ("pretrain", "batch_size"): "--pretrain_batch_size",
    ("finetune", "pretrain_lr"): "--lr",
    ("finetune", "pretrain_batch_size"): "--batch_size",
}


def find_idle_flags(options: Options) -> list[str]:
    """A note for each flag typed that the option at hand does not look at."""
    notes = []
    for group, meant_for in GROUP_IS_FOR.items():
        for field in dataclasses.fields(group):
            name = field.name
            if name not in options.given or options.option in (*meant_for, ALSO_FOR.get(name)):
                continue
            instead = INSTEAD.get((options.option, name))
            remedy = f": {instead} has" if instead else ""
            notes.append(f"note: --{name} has no effect on --option {options.option}{remedy}")
    return notes


def find_problems(options: Options) -> list[str]:
    """What the options contradict among themselves; one line each, naming flag, value, remedy."""
    problems = []
    if options.option == "pretrain":
        try:
            options.llama_config(vocab_size=32000)
        except UsageError as error:
            problems.append(str(error))
    if options.min_lr > options.peak_lr():
        name = "--pretrain_lr" if options.option == "pretrain" else "--lr"
        problems.append(
            f"--min_lr {options.min_lr:g} is above {name} {options.peak_lr():g}: the schedule "
            "falls, so give a smaller one"
        )
    if options.option in ("prompt", "generate"):
        problems += [
            f"--{name} is for --option pretrain and finetune, which train; leave it out"
            for name in ("plan", "resume", "profile")
            if name in options.given
        ]
    elsewhere = [field.name for field in dataclasses.fields(OtherMachineOptions)]
    if not (options.plan and options.world_size):
        problems += [
            f"--{name} is for --plan with --world_size N, the plan for other machines; leave it out"
            for name in elsewhere
            if name in options.given
        ]
    if options.mfu > 1:
        problems.append(f"--mfu {options.mfu:g} must be at most 1: it is a share of the peak")
    if options.top_p is not None and options.top_p > 1:
        problems.append(f"--top_p {options.top_p:g} must be at most 1: it is a probability")
    finetune = options.option == "finetune"
    if finetune and options.freeze_backbone and options.lora_rank:
        problems.append("--freeze_backbone and --lora_rank exclude each other: give one")
    if finetune and options.freeze_backbone and options.optimizer == "muon":
        problems.append(
            "--optimizer muon is for the matrices inside the layers, which --freeze_backbone does "
            "not train: leave one of the two out"
        )
    if {"global_batch_size", "gradient_accumulation_steps"} <= options.given:
        problems.append(
            "--gradient_accumulation_steps follows from --global_batch_size, the micro-batch and "
            "the number of processes: give one of the two"
        )
    if options.parallel == "fsdp" and options.optimizer == "muon":
        problems.append(
            "--optimizer muon needs whole matrices, and --parallel fsdp shares them out: leave one "
            "of the two out"
        )
    if finetune and options.parallel == "fsdp" and options.lora_rank:
        problems.append(
            "--parallel fsdp and --lora_rank exclude each other: adapters have few gradients and "
            "little optimizer state to shard, so leave --parallel out"
        )
    if options.resume and options.overwrite:
        problems.append("--resume goes on with a run, --overwrite removes it: give one")
    unknown = {*re.findall(r"\{\w*\}", options.prompt_template)} - {"{sentence}", "{labels}"}
    if unknown:
        problems.append(
            f"--prompt_template {options.prompt_template!r}: {', '.join(sorted(unknown))} is not "
            "filled in; {sentence} and {labels} are"
        )
    if "{sentence}" not in options.prompt_template:
        problems.append(
            f"--prompt_template {options.prompt_template!r} lacks {{sentence}}: "
            "the place the sentence goes"
        )
    if options.train is None and (options.dev or options.test):
        problems.append("--dev and --test need --train: the labels are learnt from it")
    return problems
