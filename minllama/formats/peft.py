"""Adapter folders of PEFT: LoRA's matrices, merged into the model that they name. Read alone.

The model must be a folder on this computer: nothing is downloaded. Another kind of adapter, or one
that trained more than matrices, is merged by PEFT: `model.merge_and_unload()`.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from minllama.formats import hugging_face
from minllama.formats.hugging_face_vocabulary import read_template
from minllama.formats.stored_model import Contents, StoredModel
from minllama.system.errors import UsageError
from minllama.system.files import read_json_object

SHAPE, WEIGHTS = "adapter_config.json", hugging_face.ADAPTER
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# What says nothing of what is added to the weights, or is looked at by itself. All else is off.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_type"),
    *("lora_alpha", "r", "target_modules", "exclude_modules", "task_type", "revision"),
    *("layers_to_transform", "layers_pattern", "peft_version", "megatron_core", "use_rslora"),
    *("init_lora_weights", "bias", "ensure_weight_tying", "qalora_group_size"),
}
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian"),  # others have changed the model, too
}


def recognizes(path: Path, head: bytes) -> bool:
    """Whether it is such a folder, with no whole model in it, or a file of its."""
    if not path.is_dir():
        return path.name in (SHAPE, WEIGHTS) and path.with_name(SHAPE).exists()
    whole = hugging_face.weight_files(path)  # config.json alone is the shape of the model named
    return (path / SHAPE).exists() and not any((path / name).exists() for name in whole)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def contents(path: Path) -> Contents:
    """The adapter's own tensors, by their names in the file."""
    folder = _folder(path)
    return Contents("PEFT adapter", {"model": hugging_face.load_tensors(folder, [WEIGHTS])})


def read(path: Path) -> StoredModel:
    """Read the model that the adapter names, with the adapter merged. Raises UsageError.

    A chat template beside the adapter, with which it was trained, replaces the model's.
    """
    folder = _folder(path)
    file, settings = folder / SHAPE, read_json_object(folder / SHAPE)
    for key, only in ONLY.items():
        if settings.get(key) not in only:
            got = str(settings.get(key))[:40]
            raise UsageError(f"{file}: {key} {got!r} is not supported: merge it with PEFT")
    for key in settings.keys() - HARMLESS:
        if settings[key]:
            raise UsageError(f"{file}: {key[:40]} is not supported: merge it with PEFT")
    base = _base(file, settings.get("base_model_name_or_path"))
    model = hugging_face.read(base, low_rank=_products(folder, settings))
    return model._replace(chat_template=read_template(folder) or model.chat_template)


def _base(file: Path, named: Any) -> Path:
    """The folder of the model that is named, from here or from the adapter's own folder."""
    if isinstance(named, str) and named:
        for folder in (Path(named), file.parent / named):
            with contextlib.suppress(OSError, ValueError):  # what no folder can be called
                if (folder / "config.json").is_file():
                    return folder
    raise UsageError(
        f"{file}: is an adapter to {str(named)[:80]!r}, which is no folder of a model here: "
        "download that, and name its folder under base_model_name_or_path"
    )


def _products(folder: Path, settings: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """By the names of the matrices to add to: B, scaled, and A. UsageError for other tensors."""
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    numbers = [type(number) in (int, float) for number in (rank, alpha)]
    if not all(numbers) or not 0 < rank < math.inf or not math.isfinite(alpha):
        got = f"r {str(rank)[:40]!r} and lora_alpha {str(alpha)[:40]!r}"
        raise UsageError(f"{folder / SHAPE}: {got} are no numbers")
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    tensors = hugging_face.load_tensors(folder, [WEIGHTS])
    products = {}
    for name in tensors:
        stem = name.removesuffix(A).removesuffix(B)
        a, b = tensors.get(stem + A), tensors.get(stem + B)
        paired = name != stem and a is not None and b is not None
        fit = paired and a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == rank
        if not fit or not a.is_floating_point() or not b.is_floating_point():
            raise UsageError(
                f"{folder / WEIGHTS}: tensor {name} is no part of a pair of rank {rank}"
            )
        products[f"{stem.removeprefix(PREFIX)}.weight"] = scaling * b.float(), a.float()
    return products
