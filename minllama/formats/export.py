"""Writing a model in any of the formats: everything is read back before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llama import Llama, model_payload
from minllama.formats import pt_model
from minllama.formats.model_file import format_named
from minllama.formats.pt_model import Classifier
from minllama.system.errors import UsageError
from minllama.system.files import is_text
from tokenizer import Tokenizer


def export(
    model: Llama,
    target: str,
    output: Path,
    *,
    dtype: str,
    tokenizer: Tokenizer | None,
    extra: dict[str, Any],
    classifier: Classifier | None = None,
) -> list[Path]:
    """Write a model as `target`: pt, bin, bin-int8, gguf or hf; returns the paths written.

    `extra` is put into a .pt file beside the model; other formats hold of it a `classifier` or
    refuse it. Raises UsageError for what the format cannot hold, where the disk takes no more, and
    if what was read back is not what was written.
    """
    if target in ("gguf", "hf") and not is_text(output):  # safetensors, and Ollama's recipe
        raise UsageError(f"--output {output}: --convert {target} needs a name that is UTF-8")
    holds = {} if classifier is None or target == "pt" else {"classifier": classifier}
    if holds and target != "hf":
        raise UsageError(
            f"--convert {target}: the model is a classifier, and this format has no place for its "
            "head: --convert pt keeps it"
        )
    try:
        if target == "pt":
            payload = model_payload(model, getattr(torch, dtype)) | extra
            return pt_model.write(model, payload, output, dtype)
        dtype = "int8" if target == "bin-int8" else dtype
        format = format_named(target)
        return format.write(model, output, dtype=dtype, tokenizer=tokenizer, **holds)
    except OSError as error:
        raise UsageError(
            f"--output {output}: cannot be written ({error.strerror or error})"
        ) from None
