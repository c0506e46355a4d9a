"""A model as a file holds it, and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from config import LlamaConfig
from minllama.system.errors import UsageError
from minllama.text.chat import ChatTemplate

if TYPE_CHECKING:
    from llama import Llama


# What is read as it is: numbers of 8 bits have scales of their own somewhere.
REAL_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StoredModel(NamedTuple):
    """A model as a file holds it: exactly the tensors of its config, under our names."""

    config: LlamaConfig
    weights: dict[str, Tensor]  # in any floating dtype
    vocabulary: bytes | None = None  # where the file carries one
    chat_template: ChatTemplate | None = None

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

    def check_read_back(self, path: Path, want: dict[str, Tensor]) -> None:
        """UsageError unless the tensors, which were read back from `path`, are exactly these."""
        for name, tensor in want.items():
            bits = self.weights[name].float().view(torch.int32)  # so that NaN equals itself
            if not torch.equal(bits, tensor.view(torch.int32)):
                raise UsageError(
                    f"self-check: {name} read back from {path} differs; nothing written"
                )


class Contents(NamedTuple):
    """All that a file holds, as it is stored, whether or not it is a model."""

    format: str
    values: dict[str, Any]  # under 'model' the tensors by the file's names; .pt files have more
    # Where tensors are packed and come as float32: what they are in the file, and how many bytes.
    dtypes: dict[str, str] = {}
    packed_bytes: int | None = None
    adapters: bool = False  # of a LoRA finetuning's checkpoint, among the tensors


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
    dim, hidden, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    in_layer = {
        "attention.compute_query": (dim, dim),
        "attention.compute_key": (kv_dim, dim),
        "attention.compute_value": (kv_dim, dim),
        "attention.compute_output": (dim, dim),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    shapes = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for layer in range(config.n_layers):
        for name, shape in in_layer.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    return shapes | {"norm.weight": (dim,), "output.weight": (config.vocab_size, dim)}


def translate(name: str, parts: dict[str, str], layers: str) -> str:
    """Another program's name of our tensor, by its names of the parts and of the list of layers."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{parts[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"{layers}.{layer}.{parts[part]}.weight"


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
