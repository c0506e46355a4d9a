"""Vocabularies as GGUF files have them: values named `tokenizer.ggml.*`.

SentencePiece's have tokens, scores and kinds (`llama`); byte-level BPE's tokens, kinds, merges and
the name of a pre-tokenizer (`gpt2`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from minllama.system.errors import UsageError
from minllama.vocabulary.byte_bpe import ByteBPE, pack
from minllama.vocabulary.pre_tokenizers import IGNORE_MERGES, PRE_TOKENIZERS, find_pre_tokenizer
from minllama.vocabulary.sentence_piece_file import (
    BYTE,
    CONTROL,
    LARGEST_SCORE,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    build_model,
)
from minllama.vocabulary.symbols import find_overlap
from tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
NO_VOCABULARY = ("None", "none", "no_vocab")  # as a model's kind: what llama.cpp writes, or nothing


def vocabulary_values(tokenizer: Tokenizer) -> dict[str, Any]:
    """The values that describe a vocabulary."""
    vocabulary = tokenizer.vocabulary
    overlap = find_overlap([*vocabulary.added_tokens])
    if overlap is not None:
        print(
            f"note: where the symbols {overlap[0]!r} and {overlap[1]!r} overlap in a text, "
            "llama.cpp may give other ids: it looks for one after the other, not from the left",
            file=sys.stderr,
        )
    describe = _byte_bpe_values if isinstance(vocabulary, ByteBPE) else _sentence_piece_values
    bos, eos = vocabulary.stated_marks
    values = {
        "tokens": [vocabulary.name(i) for i in range(vocabulary.size)],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": False,
        "add_space_prefix": vocabulary.opening_space,
        **describe(vocabulary),
    }
    return {f"{PREFIX}{key}": value for key, value in values.items()}


def _sentence_piece_values(vocabulary: Any) -> dict[str, Any]:
    sp, ids = vocabulary.processor, range(vocabulary.size)
    symbols = {} if vocabulary.opening_space else {i: s for s, i in vocabulary.added_tokens.items()}
    asked = {UNKNOWN: sp.is_unknown, CONTROL: sp.is_control, UNUSED: sp.is_unused, BYTE: sp.is_byte}
    asked[USER_DEFINED] = symbols.__contains__
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [symbols.get(i, vocabulary.name(i)) for i in ids],
        "scores": [sp.get_score(i) for i in ids],
        "token_type": [
            next((kind for kind, is_it in asked.items() if is_it(i)), NORMAL) for i in ids
        ],
        "unknown_token_id": sp.unk_id(),
        "padding_token_id": sp.unk_id(),  # stands for nothing in a text of such a vocabulary
    }


def _byte_bpe_values(vocabulary: ByteBPE) -> dict[str, Any]:
    _note_what_is_dropped(vocabulary)
    kind_of = dict.fromkeys(vocabulary.control_tokens.values(), CONTROL)
    kind_of |= dict.fromkeys(vocabulary.added_tokens.values(), USER_DEFINED)
    values = {
        "model": "gpt2",
        "pre": vocabulary.pre_tokenizer,
        "token_type": [kind_of.get(i, NORMAL) for i in range(vocabulary.size)],
        "merges": [" ".join(pair) for pair in vocabulary.merges],
    }
    padding = vocabulary.control_tokens.get(vocabulary.settings.get("pad_token"))
    return values if padding is None else values | {"padding_token_id": padding}


def _note_what_is_dropped(vocabulary: ByteBPE) -> None:
    """Say what decides the ids of some texts and has no place in a GGUF file."""
    ignores = vocabulary.file["model"]["ignore_merges"]
    dropped = {
        "normalizer NFC, by which accents join their letters,": vocabulary.file["normalizer"],
        f"ignore_merges {ignores}": ignores != (vocabulary.pre_tokenizer in IGNORE_MERGES),
    }
    for what in filter(dropped.get, dropped):
        print(
            f"note: the vocabulary's {what} has no place in a GGUF file: whoever reads it, as "
            "llama.cpp, may give some texts other ids",
            file=sys.stderr,
        )


def rebuilt_vocabulary(path: Path, metadata: dict[str, Any]) -> bytes | None:
    """The vocabulary that a file's values describe; None where they describe none.

    Tokens, scores, merges and kinds are those of the file, so text gets the ids that it had in
    training. Raises UsageError, naming `path`, where they are of another kind or do not fit.
    """
    values = {k[len(PREFIX) :]: value for k, value in metadata.items() if k.startswith(PREFIX)}
    model, readers = str(values.get("model")), {"llama": _sentence_piece, "gpt2": _byte_bpe}
    if model in NO_VOCABULARY:
        return None
    if model not in readers:
        raise UsageError(
            f"{path}: its vocabulary is of the kind {model[:40]!r}: {' and '.join(readers)} are "
            "read"
        )
    tokens, kinds = values.get("tokens"), values.get("token_type")
    marks = [values.get(f"{mark}_token_id") for mark in ("bos", "eos")]
    fit = (
        all(isinstance(column, list) for column in (tokens, kinds))
        and len(tokens) == len(kinds)
        and {*map(type, tokens)} == {str}
        and {*map(type, kinds)} == {int}
        and {*kinds} <= {*range(1, 7)}
        and all(i is None or (type(i) is int and 0 <= i < len(tokens)) for i in marks)
    )
    if not fit:
        raise _misfit(path)
    bos, eos = (None if i is None else tokens[i] for i in marks)
    return readers[model](path, values, bos, eos)


def _misfit(path: Path) -> UsageError:
    return UsageError(
        f"{path}: its tokens, scores, merges, token types, BOS and EOS do not fit together"
    )


def _sentence_piece(path: Path, values: dict[str, Any], bos: str | None, eos: str | None) -> bytes:
    tokens, scores, kinds = values["tokens"], values.get("scores"), values["token_type"]
    fit = (
        bos is not None
        and eos is not None
        and isinstance(scores, list)
        and len(scores) == len(tokens)
        and {*map(type, scores)} <= {int, float}
        and all(abs(score) <= LARGEST_SCORE for score in scores)  # not so of NaN
    )
    if not fit:
        raise _misfit(path)
    dummy_prefix = bool(values.get("add_space_prefix", True))
    return build_model(
        tokens, scores, kinds, bos=bos, eos=eos, dummy_prefix=dummy_prefix, where=str(path)
    )


def _byte_bpe(path: Path, values: dict[str, Any], bos: str | None, eos: str | None) -> bytes:
    merges, pre = values.get("merges"), str(values.get("pre"))
    if not isinstance(merges, list) or {*map(type, merges)} - {str}:
        raise _misfit(path)
    name = find_pre_tokenizer(pre)
    if name is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise UsageError(
            f"{path}: tokenizer.ggml.pre {pre[:40]!r} is not one of {known}: how text is cut into "
            "words is not known, and another way gives wrong ids"
        )
    tokens, kinds = values["tokens"], values["token_type"]
    adds_bos = bool(values.get("add_bos_token", name == "llama-bpe"))  # llama.cpp's default
    file = {
        "added_tokens": [
            {"id": i, "content": token, "special": kind == CONTROL}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "pre_tokenizer": PRE_TOKENIZERS[name],
        "model": {
            "ignore_merges": name in IGNORE_MERGES,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    padding = values.get("padding_token_id")
    settings = {"bos_token": bos, "eos_token": eos, "add_bos_token": adds_bos}
    if type(padding) is int and 0 <= padding < len(tokens):
        settings["pad_token"] = tokens[padding]
    return pack(file, settings, str(path))
