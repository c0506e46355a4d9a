"""Vocabularies in files: which kind it is is told by the content."""

from __future__ import annotations

import contextlib
import functools
import re
from pathlib import Path

from minllama.system.errors import UsageError
from minllama.system.files import read_json_object, read_whole
from minllama.vocabulary.base import MODEL_BYTES, Vocabulary
from minllama.vocabulary.byte_bpe import FILE, ByteBPE, pack, read_object, read_settings
from minllama.vocabulary.sentence_piece import SentencePiece
from minllama.vocabulary.sentence_piece_file import from_tokenizer_json, has_byte_fallback

NAMES = ("tokenizer.model", "tokenizer.json")  # in a folder; the first that is there is it
CONFIG = "tokenizer_config.json"


@functools.lru_cache(maxsize=2)  # a model's is asked for when it is read and when it is used
def open_vocabulary(content: bytes, where: str) -> Vocabulary:
    """The vocabulary of a model file's bytes; UsageError, naming `where`, for anything else."""
    if content[:1] == b"{":
        return ByteBPE(content, where)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        raise UsageError(
            f"{where}: is tiktoken's, as Meta's Llama 3 has: name the tokenizer.json of the same "
            "model, from its Hugging Face folder, with --tokenizer_model"
        )
    return SentencePiece(content, where)


def read_vocabulary_file(path: Path) -> bytes:
    """The bytes that model files carry of a vocabulary: a SentencePiece model's, or a packed
    tokenizer.json.

    With a tokenizer.json the tokenizer_config.json beside it is read; where it is SentencePiece's
    kind of BPE, the model is made of it. A folder means the one in it. Raises UsageError.
    """
    if path.is_dir():
        return _read_folder(path)
    content = read_whole(path, MODEL_BYTES)
    if content[:1] != b"{":
        return content
    file = read_object(content, str(path))
    if FILE in file:  # packed already
        return content
    config = path.with_name(CONFIG)
    settings = read_json_object(config) if config.exists() else {}
    if has_byte_fallback(file):
        return from_tokenizer_json(file, read_settings(file, settings), str(path))
    return pack(file, settings, str(path))


def _read_folder(folder: Path) -> bytes:
    """Of a tokenizer.model and a tokenizer.json the first, unless it is of another kind than
    SentencePiece's, or the second has tokens that were added to it.
    """
    files = [folder / name for name in NAMES if (folder / name).exists()]
    if not files:
        raise UsageError(f"{folder}: the folder holds no {' and no '.join(NAMES)}")
    if len(files) == 1:
        return read_vocabulary_file(files[0])
    model, file = files
    content = read_whole(model, MODEL_BYTES)
    try:
        size = SentencePiece(content, str(model)).size
    except UsageError:
        return read_vocabulary_file(file)
    with contextlib.suppress(UsageError):
        other = read_vocabulary_file(file)
        if other[:1] != b"{" and SentencePiece(other, str(file)).size > size:
            return other
    return content
