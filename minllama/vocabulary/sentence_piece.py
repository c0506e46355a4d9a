"""SentencePiece models: Llama 1's and 2's vocabularies, and those that are trained here.

The file is a Protocol Buffers message:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import sentencepiece

from minllama.system.errors import UsageError
from minllama.vocabulary.base import Vocabulary

SPACE = "\u2581"  # SentencePiece's visible sign for a space
# Begins a vocabulary made here; 64 hex digits follow, the SHA-256 of the rest. To SentencePiece it
# is a field (number 1000, of 80 bytes) that it does not know and passes over.
SEAL = b"\xc2\x3e\x50minllama sha256 "
# A text may be cut before a newline, and at a single space, which the right part gets back as the
# space that is put before every text.
CUT = re.compile(rf"(?=\n)|(?<=[^ {SPACE}]) (?=[^ {SPACE}])")
# Where no space is put before a text, the right part keeps its own.
CUT_BEFORE_SPACE = re.compile(rf"(?=\n)|(?<=[^ {SPACE}])(?= [^ {SPACE}])")
PIECES, KIND, USER_DEFINED = 1, 3, 4  # a field of the model, one of a piece, and a value of that


class SentencePiece(Vocabulary):
    """A vocabulary of SentencePiece's; `processor` is its own object.

    Raises UsageError, naming `where` the bytes came from, for anything else, and for one without
    BOS and EOS.
    """

    kind = "SentencePiece"

    def __init__(self, content: bytes, where: str) -> None:
        self.content = content
        self.processor = _load(content, where)
        self.size = self.processor.vocab_size()
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        self.unknown_id = self.processor.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UsageError(f"{where}: has no BOS or no EOS token, which mark documents here")

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Token ids of each text, without BOS and EOS."""
        if hasattr(self.processor, "EncodeAsNumpy"):  # since 0.2.2: no Python object per token
            return self.processor.encode(list(texts), num_threads=threads, return_type="numpy")
        encoded = self.processor.encode(list(texts), num_threads=threads)
        return [np.array(ids, np.int32) for ids in encoded]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.processor.encode(text)

    def encode_behind(self, text: str) -> list[int]:
        """Token ids of a text behind another; a newline, which no piece joins to it, takes the
        space."""
        return self.encode(f"\n{text}")[len(self.encode("\n")) :]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; the space that was put before a text is taken off."""
        return self.processor.decode(ids)

    def name(self, token: int) -> str:
        """The piece of a token, with SPACE for each space."""
        return self.processor.id_to_piece(token)

    @cached_property
    def token_texts(self) -> list[bytes]:
        """The bytes of UTF-8 that each token spells; none for control and unknown tokens."""
        sp, texts = self.processor, [b""] * self.size
        for token in range(self.size):
            if sp.is_byte(token):
                texts[token] = bytes([int(self.name(token)[3:5], 16)])
            elif not sp.is_control(token) and not sp.is_unknown(token):
                texts[token] = piece_text(self.name(token))
        return texts

    @cached_property
    def byte_tokens(self) -> list[int]:
        """The 256 byte tokens but for the newline's.

        SentencePiece learns from lines, so no vocabulary has another token for a newline.
        """
        newline = self.processor.piece_to_id("<0x0A>")
        return [i for i in range(self.size) if self.processor.is_byte(i) and i != newline]

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """BOS, EOS and others that no text is encoded to, by name."""
        return {self.name(i): i for i in range(self.size) if self.processor.is_control(i)}

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """The symbols that its maker defined, by their text."""
        fields = _fields(self.content)
        pieces = (value for number, value in fields if number == PIECES and type(value) is bytes)
        return {
            self.name(i).replace(SPACE, " "): i
            for i, piece in enumerate(pieces)
            if (KIND, USER_DEFINED) in _fields(piece)
        }

    @cached_property
    def opening_space(self) -> bool:
        """Whether a space is put before every text (SentencePiece's dummy prefix)."""
        return self.processor.normalize("a").startswith(SPACE)

    @property
    def is_plain_bpe(self) -> bool:
        """Whether this is BPE over unchanged text with a space before it, as Llama's are."""
        return self.opening_space and self.is_bpe

    @cached_property
    def is_bpe(self) -> bool:
        """Whether this is BPE over unchanged text, but for a space that may be put before it.

        Only of such a vocabulary it is known how a text may be cut and which merges it has.
        SentencePiece has no call for it, so this goes by signs: an identity normaliser is named in
        the file, and BPE's scores are ranks, where a unigram's are logarithms.
        """
        sp, before = self.processor, SPACE * self.opening_space
        return (
            b"\n\x08identity" in self.content
            and sp.normalize(" a  \ufb01 ") == before + "\u2581a\u2581\u2581\ufb01\u2581"
            and all(sp.get_score(i).is_integer() for i in range(self.size))
            and sp.is_byte(sp.piece_to_id("<0x00>"))
        )

    @cached_property
    def cut(self) -> re.Pattern[str] | None:
        """Where a text may be cut: nowhere, unless it is known that the ids stay the same.

        BPE merges neighbours only into pieces of the vocabulary: no piece may join a newline to
        anything, or hold a space behind another character.
        """
        pieces = [self.name(i) for i in range(self.size) if not self.processor.is_byte(i)]
        joins = any(
            ("\n" in piece and piece != "\n") or SPACE in piece.lstrip(SPACE) for piece in pieces
        )
        if joins or not self.is_bpe:
            return None
        return CUT if self.opening_space else CUT_BEFORE_SPACE


def piece_text(piece: str) -> bytes:
    """The text of a normal piece."""
    return piece.replace(SPACE, " ").encode()


def sealed(data: bytes) -> bytes:
    """A SentencePiece model behind its checksum."""
    return SEAL + hashlib.sha256(data).hexdigest().encode() + data


def _load(data: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    # A damaged seal is one too. Vocabularies that were not made here have none.
    like_a_seal = sum(a == b for a, b in zip(data, SEAL, strict=False))
    if like_a_seal > len(SEAL) // 2 and data != sealed(data[len(SEAL) + 64 :]):
        raise UsageError(f"{where} is damaged: its bytes do not match its SHA-256")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
        if processor.vocab_size() < 1:
            raise ValueError("no pieces")
        # One damaged byte may leave a piece that is not UTF-8.
        processor.id_to_piece(list(range(processor.vocab_size())))
    except (RuntimeError, ValueError, TypeError, OSError):
        raise UsageError(f"{where}: not a SentencePiece model ({len(data):,} bytes)") from None
    return processor


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a Protocol Buffers message that SentencePiece has read: number and value.

    Numbers of 4 and 8 bytes are left as bytes. Ends at a group, which has gone out of use.
    """
    at, sizes = 0, {1: 8, 5: 4}

    def varint() -> int:  # seven bits to a byte, the lowest first
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield number, varint()
            continue
        size = varint() if wire_type == 2 else sizes.get(wire_type)
        if size is None:
            return
        yield number, message[at : at + size]
        at += size
