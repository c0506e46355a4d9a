"""Models in .pt files: weights files, checkpoints and classifiers, of this program and of others.

The original's files have our names; llama2.c's have its own, and wrappers put prefixes before them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from config import fingerprint
from minllama.formats.llama2c import ATTENTION_NAMES
from minllama.formats.pt_file import is_pt, load_pt, write_sealed
from minllama.formats.stored_model import Contents, StoredModel, as_stored, read_shape
from minllama.system.errors import UsageError
from minllama.system.files import atomic_write
from minllama.text.chat import ChatTemplate

if TYPE_CHECKING:
    from llama import Llama

PACKAGE = BESIDE = None
# Beside a fine-tuned model.
CLASSIFIER_KEYS = ("classifier_head", "label_names", "label_texts", "pooling")
ADAPTERS = ".lora_"  # in the names of a LoRA finetuning's own tensors


def own_name(name: str) -> str:
    """Our name of a .pt file's tensor: wrappers' prefixes dropped, llama2.c's names translated."""
    name = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("llama.")
    for theirs, ours in ATTENTION_NAMES.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def recognizes(path: Path, head: bytes) -> bool:
    """Whether a file that begins so is of this format."""
    return is_pt(head)


def read(path: Path, *, without_adapters: bool = False) -> StoredModel:
    """Read a model, which passes over the optimizer of a checkpoint and a classifier's head.

    `without_adapters` passes over those of a LoRA finetuning's checkpoint, too: what is left is
    the model that it began with. Raises UsageError.
    """
    payload = load_pt(path)
    weights = {
        own_name(name): tensor
        for name, tensor in payload["model"].items()
        if not (without_adapters and ADAPTERS in name)
    }
    # llama2.c's rotary tables are computed here; a classifier's head is not the Llama's.
    for name in ("freqs_cos", "freqs_sin", "classifier_head.weight", "classifier_head.bias"):
        weights.pop(name, None)
    defaults: dict[str, Any] = {}
    gate = weights.get("layers.0.feed_forward.w1.weight")
    if gate is not None and gate.dim() == 2:
        defaults["hidden_dim"] = gate.shape[0]
    table, head = weights.get("tok_embeddings.weight"), weights.get("output.weight")
    if table is not None and head is not None:
        defaults["tie_word_embeddings"] = torch.equal(table, head)
    config = read_shape(path, payload.get("model_args"), **defaults)
    vocabulary, template = read_vocabulary(path, payload), None
    if "chat_template" in payload:
        template = ChatTemplate.from_stored(payload["chat_template"], path)
    return StoredModel(config, weights, vocabulary, template).checked(path)


def read_vocabulary(path: Path, payload: dict[str, Any]) -> bytes | None:
    """The vocabulary that a .pt file carries, if any; UsageError for one that is damaged."""
    vocabulary = payload.get("vocabulary")
    if vocabulary is None:
        return None
    if not isinstance(vocabulary, Tensor) or vocabulary.dtype != torch.uint8:
        raise UsageError(f"{path}: 'vocabulary' is not a tensor of bytes")
    content = vocabulary.numpy().tobytes()
    actual, stated = fingerprint(content), payload.get("vocabulary_fingerprint")
    if actual != stated:
        raise UsageError(
            f"{path}: its vocabulary has the fingerprint {actual} where it says "
            f"{str(stated)[:40]}: the file is damaged; copy it again"
        )
    return content


def contents(path: Path) -> Contents:
    """All that the file holds, its checksum not looked at."""
    values = load_pt(path, verify=False)
    if "optimizer" not in values:
        return Contents("weights file", values)
    adapters = any(ADAPTERS in name for name in values["model"])
    kind = "resumable checkpoint" + " with adapters" * adapters
    return Contents(kind, values, adapters=adapters)


def write(model: Llama, payload: dict[str, Any], output: Path, dtype: str) -> list[Path]:
    """Write the payload of a model, as llama.model_payload makes it, in this dtype."""
    want = as_stored(model, dtype)
    with atomic_write(output, verify=lambda p: read(p).check_read_back(p, want)) as file:
        write_sealed(file, payload)
    return [output]


# ---------------------------------------------------------------------------- classifiers


class Classifier(NamedTuple):
    """What a fine-tuning adds to a model: the head's weight (labels, dim) and bias, and names.

    `pooling` is what the head was trained to read.
    """

    head: dict[str, Tensor]
    label_names: list[str]
    pooling: str
    label_texts: list[str] | None = None  # how files write the labels, unless counted from 0


def read_classifier(path: Path) -> Classifier | None:
    """The classifier in a fine-tuned model's file; None for a model without one.

    Raises UsageError for a head that is not that of as many labels, or reads what is not known.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if not is_pt(file.read(2)):
            return None
    payload = load_pt(path, verify=False)  # load_pretrained verifies
    head, names = payload.get("classifier_head"), payload.get("label_names")
    if head is None and names is None:
        return None
    args = payload.get("model_args")
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not (named and isinstance(head, dict) and isinstance(args, dict)):
        raise UsageError(f"{path}: its classifier is no head with a name for each label")
    shapes = {"weight": (len(names), args.get("dim")), "bias": (len(names),)}
    if head.keys() != shapes.keys():
        raise UsageError(f"{path}: its classifier's head is not a weight and a bias")
    for name, shape in shapes.items():
        tensor = head[name]
        if not (isinstance(tensor, Tensor) and tuple(tensor.shape) == shape):
            raise UsageError(f"{path}: classifier_head.{name} does not have the shape {shape}")
    pooling = payload.get("pooling", "last")  # files of before there were two do not say
    if pooling not in ("last", "mean"):
        raise UsageError(f"{path}: its classifier's pooling is {pooling!r}, not last or mean")
    texts = payload.get("label_texts")
    if texts is not None and not (
        isinstance(texts, list)
        and len(texts) == len({*map(str, texts)}) == len(names)
        and all(isinstance(text, str) for text in texts)
    ):
        raise UsageError(f"{path}: its classifier has not a text for each label")
    return Classifier(head, names, pooling, texts)
