"""Models in .pt files: weights files, checkpoints and classifiers, of this program and of others.

The original's files have our names; llama2.c's and Meta's have their own, and wrappers put prefixes
before them. Meta's are a folder: consolidated.00.pth, and params.json with the shape.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from config import LlamaConfig, fingerprint
from minllama.formats.llama2c import ATTENTION_NAMES
from minllama.formats.pt_file import is_pt, load_pt, write_sealed
from minllama.formats.stored_model import Contents, StoredModel, as_stored, read_shape, same_bits
from minllama.system.errors import UsageError
from minllama.system.files import atomic_write, is_text, open_regular, read_json_object
from minllama.text.chat import template_from_stored
from minllama.vocabulary.files import read_vocabulary_file

if TYPE_CHECKING:
    from llama import Llama

PACKAGE = BESIDE = None
# Beside a fine-tuned model.
CLASSIFIER_KEYS = ("classifier_head", "label_names", "label_texts", "pooling")
ADAPTERS = ".lora_"  # in the names of a LoRA finetuning's own tensors
WRAPPERS = ("_orig_mod.", "module.", "llama.", "model.")  # compiled, DDP, a classifier, Lightning
ROTARY = ("freqs_cos", "freqs_sin", "freqs_cis", "rope.freqs", "rotary_emb.inv_freq")
SHAPE_NAMES = {"norm_eps", *(field.name for field in dataclasses.fields(LlamaConfig))}
CONSOLIDATED, PARAMS = "consolidated.00.pth", "params.json"  # Meta's


def own_name(name: str) -> str:
    """Our name of a .pt file's tensor: wrappers' prefixes dropped, llama2.c's names translated."""
    while prefix := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    for theirs, ours in ATTENTION_NAMES.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def recognizes(path: Path, head: bytes) -> bool:
    """Whether a file that begins so is of this format, or it is a folder of Meta's."""
    if path.name.startswith("pytorch_model"):  # of Hugging Face
        return False
    return is_pt(head) or ((path / CONSOLIDATED).exists() and not (path / "config.json").exists())


def _file(path: Path) -> Path:
    """The file itself, or the one in a folder of Meta's."""
    return path / CONSOLIDATED if path.is_dir() else path


def _load(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """All that a file holds, with the shape under 'model_args' from where other programs put it."""
    payload, params = load_pt(path, verify=verify), path.with_name(PARAMS)
    args = payload.get("hyper_parameters")  # Lightning's: the shape, alone or among others
    if isinstance(args, dict):
        args = args.get("model_args", {name: args[name] for name in args.keys() & SHAPE_NAMES})
    else:
        args = None
    if path.suffix == ".pth" and params.exists():
        if len(list(path.parent.glob("consolidated.*.pth"))) > 1:
            raise UsageError(f"{path.parent}: holds a model in several parts; one is read")
        args = {"max_seq_len": 2048} | read_json_object(params)  # Llama 1's, for it does not say
        if args.pop("use_scaled_rope", False):
            args |= {"rope_scaling": meta_rope_scaling(args), "max_seq_len": 131_072}
    return payload if "model_args" in payload or args is None else payload | {"model_args": args}


def meta_rope_scaling(params: dict[str, Any]) -> dict[str, Any]:
    """What `use_scaled_rope` stands for in a params.json of Meta's, which has no numbers of it.

    Llama 3.1 and 3.3 slow down by 8; the two models of 3.2 without pictures, known by their width,
    by 32.
    """
    factor = 32.0 if params.get("dim") in (2048, 3072) else 8.0
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = {"original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **numbers, **original}


def read(path: Path, *, without_adapters: bool = False) -> StoredModel:
    """Read a model, which passes over the optimizer of a checkpoint and a classifier's head.

    `without_adapters` passes over those of a LoRA finetuning's checkpoint, too: what is left is
    the model that it began with. Raises UsageError.
    """
    path = _file(path)
    payload = _load(path)
    weights: dict[str, Tensor] = {}
    for name, tensor in payload["model"].items():
        if without_adapters and ADAPTERS in name:
            continue
        ours = own_name(name)
        if ours in weights and not same_bits(weights[ours], tensor):
            raise UsageError(f"{path}: tensor {name[:80]} is another one than its {ours[:80]}")
        weights[ours] = tensor
    # Rotary tables are computed here; a classifier's head is not the Llama's.
    for name in list(weights):
        if name.endswith(ROTARY) or name in ("classifier_head.weight", "classifier_head.bias"):
            del weights[name]
    table, args = weights.get("tok_embeddings.weight"), payload.get("model_args")
    if args is None:
        problem = "no dict 'model_args', which gives the shape of the model"
        if table is None:
            problem = f"its tensors, such as {min(weights, default='none')[:40]!r}, are no Llama's"
        else:
            problem += f", and no {PARAMS} beside it: save {{'model': ..., 'model_args': ...}}"
        raise UsageError(f"{path}: {problem}")
    if isinstance(args, dict) and args.get("vocab_size") == -1:  # Meta's: as the tokenizer has
        args = args | {"vocab_size": None}
    if isinstance(args, dict) and args.get("tie_word_embeddings") is True and table is not None:
        weights.setdefault("output.weight", table)
    config = read_shape(path, args, **_seen_shape(weights))
    vocabulary, template = read_vocabulary(path, payload), None
    if path.name == CONSOLIDATED and (beside := path.with_name("tokenizer.model")).exists():
        vocabulary = read_vocabulary_file(beside)
    if "chat_template" in payload:
        template = template_from_stored(payload["chat_template"], path)
    return StoredModel(config, weights, vocabulary, template).checked(path)


def _seen_shape(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What of the shape the tensors show, for files that do not say it."""
    table, head = weights.get("tok_embeddings.weight"), weights.get("output.weight")
    gate = weights.get("layers.0.feed_forward.w1.weight")
    seen: dict[str, Any] = {}
    if gate is not None and gate.dim() == 2:
        seen["hidden_dim"] = gate.shape[0]
    if table is not None and table.dim() == 2:
        seen["vocab_size"] = table.shape[0]
    if table is not None and head is not None:
        seen["tie_word_embeddings"] = same_bits(table, head)
    return seen


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
        said = stated if isinstance(stated, str) else type(stated).__name__
        raise UsageError(
            f"{path}: its vocabulary has the fingerprint {actual} where it says {said[:40]}: the "
            "file is damaged; copy it again"
        )
    return content


def contents(path: Path) -> Contents:
    """All that the file holds, its checksum not looked at."""
    values = _load(_file(path), verify=False)
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
    with open_regular(path) as file:
        if not is_pt(file.read(2)):
            return None
    payload = load_pt(path, verify=False)  # load_pretrained verifies
    head, names = payload.get("classifier_head"), payload.get("label_names")
    if head is None and names is None:
        return None
    args = payload.get("model_args")
    named = (
        isinstance(names, list) and names and all(isinstance(n, str) and is_text(n) for n in names)
    )
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
