"""The formats of model files, and reading any of them: which one it is is told by its content.

A new format is a module with `recognizes`, `read`, `contents` and `write`, the name of the PACKAGE
that it needs and of a file that it writes BESIDE the model, or None, and a line in FORMATS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from types import ModuleType

from minllama.formats import gguf, hugging_face, litgpt, llama2c, peft, pt_model
from minllama.formats.pt_file import STATE_FILE
from minllama.formats.stored_model import Contents, StoredModel
from minllama.system.errors import UsageError
from minllama.system.files import open_regular
from tokenizer import Tokenizer

MOST_PADDING = 512  # rows that round an embedding up, which is faster on GPUs
FORMATS: dict[str, ModuleType] = {  # by the names that --convert takes; the first that fits is it
    "pt": pt_model,
    "gguf": gguf,
    "hf": hugging_face,
    "bin": llama2c,  # whose oldest version begins with no mark of its own
}
READ_ONLY = (litgpt, peft)  # looked at first: their folders and files are of other formats' kinds


def format_named(target: str) -> ModuleType:
    """The module of FORMATS that --convert `target` means: bin-int8 is bin."""
    return FORMATS[target.partition("-")[0]]


def format_of(path: Path) -> ModuleType:
    """The module that reads this file or folder; UsageError where there is none."""
    head = b""
    if (path / STATE_FILE).is_file():
        raise UsageError(
            f"{path}: is a sharded checkpoint: resume it (--resume {path}, one process is enough) "
            "to get final-model.pt"
        )
    if not path.is_dir():
        with open_regular(path) as file:
            head = file.read(8)
    formats = (*READ_ONLY, *FORMATS.values())
    return next(each for each in formats if each.recognizes(path, head))


def read_model(path: Path) -> StoredModel:
    """Read a model of any of the formats; UsageError, naming file and tensor, for anything else.

    Rows of the embedding beyond its vocabulary, up to a round number, are left out, and it is said.
    """
    stored = format_of(path).read(path)
    rows, pieces = stored.config.vocab_size, _pieces(stored.vocabulary)
    if pieces is None or not 0 < rows - pieces <= MOST_PADDING:
        return stored
    print(
        f"note: {path}: {rows - pieces} of the embedding's {rows:,} rows are beyond the "
        f"vocabulary's {pieces:,} pieces, and left out",
        file=sys.stderr,
    )
    tables = ("tok_embeddings.weight", "output.weight")
    cut = {name: stored.weights[name][:pieces] for name in tables}
    config = dataclasses.replace(stored.config, vocab_size=pieces)
    return stored._replace(config=config, weights=stored.weights | cut)


def _pieces(vocabulary: bytes | None) -> int | None:
    """The size of a vocabulary, None for one that cannot be read: whoever uses it will say so."""
    with contextlib.suppress(UsageError):
        return None if vocabulary is None else Tokenizer(tokenizer_model=vocabulary).n_words
    return None


def read_contents(path: Path) -> Contents:
    """All that a file of any of the formats holds; UsageError where that cannot be read."""
    return format_of(path).contents(path)
