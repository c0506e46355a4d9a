"""SentencePiece models made from what other files say of the same vocabulary.

GGUF has the pieces, scores and kinds themselves; a tokenizer.json of BPE with byte tokens, as
`transformers` writes for Llama 2's kind, has merges in their order, which is what the scores say.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from minllama.system.errors import UsageError
from minllama.vocabulary.sentence_piece import SPACE, SentencePiece

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as the files have it
LARGEST_SCORE = float(np.finfo(np.float32).max)  # they hold float32
BYTE_NAMES = {f"<0x{byte:02X}>" for byte in range(256)}


def build_model(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    bos: str,
    eos: str,
    dummy_prefix: bool,
    where: str,
) -> bytes:
    """A BPE model of these pieces over unchanged text; UsageError if SentencePiece takes it not.

    Symbols that their maker defined may have their spaces as they are, as the other files do.
    """
    pieces = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        token = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        pieces.append(_field(1, _field(1, token) + _field(2, float(score)) + _field(3, int(kind))))
    bpe, bytes_for_the_rest = _field(3, 2), _field(35, int(BYTE in kinds))
    trainer = bpe + bytes_for_the_rest + _field(46, bos) + _field(47, eos)
    normalizer = _field(1, "identity") + _field(3, int(dummy_prefix)) + _field(4, 0)  # trims none
    model = b"".join([*pieces, _field(2, trainer), _field(3, normalizer)])
    SentencePiece(model, where)
    return model


def _field(number: int, value: str | bytes | int | float) -> bytes:
    """A field of a Protocol Buffers message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


# ---------------------------------------------------------------------------- tokenizer.json


def has_byte_fallback(file: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind, and not byte-level BPE."""
    model = file.get("model")
    return isinstance(model, dict) and model.get("byte_fallback") is True


def from_tokenizer_json(file: dict[str, Any], settings: dict[str, Any], where: str) -> bytes:
    """The SentencePiece model of a tokenizer.json with byte fallback.

    `settings` are those of `byte_bpe.read_settings`. Where `tokenizers` puts spaces differently,
    behind an added token that is not special, the ids are SentencePiece's. Raises UsageError,
    naming `where`, for a file that does not fit together or whose rules are not SentencePiece's.
    """
    model, added = file["model"], file.get("added_tokens") or []
    try:
        ids = dict(model["vocab"]) | {each["content"]: each["id"] for each in added}
        special = {each["content"]: bool(each["special"]) for each in added}
        merges = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
        pairs = [("".join((left, right)), rank) for rank, (left, right) in enumerate(merges)]
        tokens = sorted(ids, key=ids.__getitem__)
        fits = [ids[token] for token in tokens] == [*range(len(tokens))] and model["type"] == "BPE"
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise UsageError(f"{where}: its vocab, merges and added tokens do not fit together")
    ranks = {piece: rank for piece, rank in reversed(pairs)}  # of several, the first
    kinds = [_kind(token, special, ranks, model.get("unk_token")) for token in tokens]
    names = {}
    for mark, usual in (("bos", "<s>"), ("eos", "</s>")):
        names[mark] = settings.get(f"{mark}_token") or usual
        if kinds[ids.get(names[mark], 0)] != CONTROL:
            raise UsageError(f"{where}: no control token is called {names[mark][:40]!r}")
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return build_model(
        tokens, scores, kinds, **names, dummy_prefix=_puts_space(file, where), where=where
    )


def _kind(token: str, special: dict[str, bool], ranks: dict[str, int], unknown: Any) -> int:
    if token == unknown:
        return UNKNOWN
    if token in special:
        return CONTROL if special[token] else USER_DEFINED
    if token in BYTE_NAMES:
        return BYTE
    # A piece of several letters that nothing merges into is never made.
    return NORMAL if len(token) == 1 or token in ranks else UNUSED


def _puts_space(file: dict[str, Any], where: str) -> bool:
    """Whether a space is put before a text; UsageError for rules that are not SentencePiece's."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    normalizer, words = file.get("normalizer"), file.get("pre_tokenizer")
    steps = normalizer.get("normalizers") if isinstance(normalizer, dict) else []
    steps = steps if isinstance(steps, list) and steps else [normalizer]
    if words is None and steps in ([prepend, replace], [replace]):
        return prepend in steps
    if normalizer is None and isinstance(words, dict) and words.get("type") == "Metaspace":
        rest = {key: words.get(key) for key in ("replacement", "split")}
        scheme = words.get("prepend_scheme")
        known = scheme in ("first", "always", "never")
        if rest == {"replacement": SPACE, "split": False} and known:
            return scheme != "never"
    raise UsageError(f"{where}: its normalizer or pre-tokenizer is not Llama's: not supported")
