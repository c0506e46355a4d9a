"""GGUF, the model files of llama.cpp and Ollama: named values, then tensors; read and written.

Knows the container, its number formats and its vocabularies, nothing of a model's shape. A file is
untrusted: every size in it is compared with what there is before anything is made of it. The
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minllama.system.errors import UsageError
from tokenizer import Tokenizer

GGUF_MAGIC = b"GGUF"
VERSION = 3  # 2 is the same but for big-endian machines; 1 had sizes of 4 bytes
ALIGNMENT = 32  # of each tensor, where a file names no other
HEADER_BYTES = 64 << 20  # of all before the tensors: a vocabulary of 256,000 tokens needs 16 MB
MOST_ENTRIES = 10_000  # values, and tensors: a Llama of 1,000 layers has 9,003
NAME_CHARS = 256  # of a value or a tensor

SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # codes of struct and numpy
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9


class NumberFormat(NamedTuple):
    """How a tensor's numbers lie in the file: `size` bytes for each block of `block` numbers."""

    code: int  # ggml's number for it
    file_type: int  # llama.cpp's number for a file that holds mostly this
    block: int
    size: int


FORMATS = {
    "float32": NumberFormat(0, 0, 1, 4),
    "float16": NumberFormat(1, 1, 1, 2),
    "bfloat16": NumberFormat(30, 32, 1, 2),
    "q8_0": NumberFormat(8, 7, 32, 34),  # a float16 scale and 32 int8
}
OTHER_FORMATS = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"}
OTHER_FORMATS |= {13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 39: "MXFP4"}


class Stored(NamedTuple):
    """What a GGUF file holds."""

    values: dict[str, Any]  # arrays of numbers as numpy arrays, of strings as lists
    tensors: dict[str, Tensor]  # Q8_0 as float32
    dtypes: dict[str, str]  # a key of FORMATS for each tensor
    sizes: dict[str, int]  # bytes of each in the file


# ---------------------------------------------------------------------------- numbers


def format_of(shape: Sequence[int], dtype: str) -> str:
    """The number format of a tensor in a file of `dtype`, as llama.cpp's converter chooses it.

    Vectors stay float32, and rows that are not whole blocks of Q8_0 are float16.
    """
    if len(shape) == 1:
        return "float32"
    return "float16" if shape[-1] % FORMATS[dtype].block else dtype


def encode(tensor: Tensor, dtype: str) -> Tensor:
    """The bytes of a tensor in a number format, as uint8."""
    if dtype != "q8_0":
        return tensor.to(getattr(torch, dtype)).contiguous().view(-1).view(torch.uint8)
    blocks = tensor.float().reshape(-1, 32)
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    inverse = torch.where(scales.half() > 0, 1 / scales, 0.0)  # a block of zeros stays one
    scaled = blocks * inverse
    numbers = torch.where(scaled < 0, (scaled - 0.5).ceil(), (scaled + 0.5).floor())  # C's roundf
    parts = (scales.half().view(torch.uint8), numbers.to(torch.int8).view(torch.uint8))
    return torch.cat(parts, dim=1).view(-1)


def decode(data: Tensor, dtype: str, shape: Sequence[int]) -> Tensor:
    """The inverse of encode; Q8_0 comes as float32."""
    if dtype != "q8_0":
        return data.view(getattr(torch, dtype)).view(*shape)
    blocks = data.view(-1, 34)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return (blocks[:, 2:].view(torch.int8) * scales).view(*shape)


def rounded(tensor: Tensor, dtype: str) -> Tensor:
    """What a reader finds of a tensor in a file of `dtype`, in float32."""
    used = format_of(tensor.shape, dtype)
    return decode(encode(tensor, used), used, tensor.shape).float()


# ---------------------------------------------------------------------------- writing


def write_gguf(
    file: BinaryIO, values: dict[str, Any], tensors: dict[str, Tensor], dtype: str
) -> None:
    """Write a file of version 3; ints become uint32, floats float32, lists arrays."""
    counts = struct.pack("<4sIQQ", GGUF_MAGIC, VERSION, len(tensors), len(values))
    header = bytearray(counts)
    for key, value in values.items():
        kind = _kind(value)
        header += _text(key) + struct.pack("<I", kind) + _value(value, kind)
    offset = 0
    for name, tensor in tensors.items():
        used = FORMATS[format_of(tensor.shape, dtype)]
        place = struct.pack(
            f"<I{tensor.dim()}QIQ", tensor.dim(), *tensor.shape[::-1], used.code, offset
        )
        header += _text(name) + place
        offset += _aligned(tensor.numel() // used.block * used.size, ALIGNMENT)
    file.write(header.ljust(_aligned(len(header), ALIGNMENT), b"\0"))
    for tensor in tensors.values():
        data = encode(tensor, format_of(tensor.shape, dtype)).numpy()
        file.write(data)
        file.write(bytes(-len(data) % ALIGNMENT))


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(value: Any) -> int:
    return {bool: BOOL, int: UINT32, float: FLOAT32, str: STRING, list: ARRAY}[type(value)]


def _value(value: Any, kind: int) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind != ARRAY:
        return struct.pack(f"<{SCALARS[kind]}", value)
    kind = {UINT32: INT32}.get(_kind(value[0]), _kind(value[0]))  # token types are signed
    head = struct.pack("<IQ", kind, len(value))
    return head + b"".join(_value(item, kind) for item in value)


# ---------------------------------------------------------------------------- reading


class _Header:
    """The values before the tensors, read one after another and never beyond the file's end."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.left = min(path.stat().st_size, HEADER_BYTES)

    def error(self, problem: str) -> UsageError:
        return UsageError(f"{self.path}: {problem}")

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.error("its header claims more than the file has: cut off or no GGUF file")
        self.left -= count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.error(f"{data[:40]!r} in its header is not UTF-8") from None

    def count(self) -> int:
        found = self.number("Q")
        if found > MOST_ENTRIES:
            raise self.error(f"its header claims {found:,} entries: cut off or no GGUF file")
        return found

    def name(self) -> str:
        found = self.text()
        if len(found) > NAME_CHARS or not found.isprintable():
            raise self.error(f"{found[:40]!r} in its header is no name")
        return found

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(self.scalar(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind != STRING:
            dtype = np.dtype(f"<{self.scalar(kind)}")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return [self.text() for _ in range(count)]

    def scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            what = "an array of arrays" if kind == ARRAY else f"a value of the unknown type {kind}"
            raise self.error(f"its header holds {what}")
        return SCALARS[kind]


def read_gguf(path: Path) -> Stored:
    """Read a file of version 2 or 3. Raises UsageError, naming what is wrong, for any other.

    Its tensors must follow each other without gap or overlap, as llama.cpp asks, and must be of
    one of FORMATS.
    """
    with path.open("rb") as file:
        header = _Header(path, file)
        magic, version = header.take(4), header.number("I")
        if magic != GGUF_MAGIC or version not in (2, VERSION):
            raise header.error(f"GGUF version {version} is not read, only 2 and 3, little-endian")
        n_tensors, n_values = header.count(), header.count()
        values: dict[str, Any] = {}
        for _ in range(n_values):
            key, kind = header.name(), header.number("I")
            if key in values:
                raise header.error(f"{key} is there twice")
            values[key] = header.value(kind)
        alignment = values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment not in (8 << i for i in range(10)):
            raise header.error(
                f"general.alignment {str(alignment)[:40]!r} is not read, only 8 to 4096"
            )
        places: dict[str, tuple[tuple[int, ...], str]] = {}
        sizes: dict[str, int] = {}
        end = 0
        for _ in range(n_tensors):
            name, shape, dtype, offset = _place(header)
            if name in places:
                raise header.error(f"tensor {name} is there twice")
            if offset != _aligned(end, alignment):
                where = f"at byte {offset:,}, not where the one before it ends"
                raise header.error(f"tensor {name} lies {where}")
            places[name] = shape, dtype
            sizes[name] = math.prod(shape) // FORMATS[dtype].block * FORMATS[dtype].size
            end = offset + sizes[name]
        start = _aligned(file.tell(), alignment)
        if start + end > path.stat().st_size:  # found before anything of that size is made
            raise header.error(
                f"{path.stat().st_size:,} bytes where its header asks for {start + end:,}: "
                "it is cut off"
            )
        tensors = {}
        for name, (shape, dtype) in places.items():
            file.seek(start)
            data = torch.from_numpy(np.fromfile(file, np.uint8, sizes[name]))
            tensors[name] = decode(data, dtype, shape)
            start += _aligned(sizes[name], alignment)
    return Stored(values, tensors, {name: dtype for name, (_, dtype) in places.items()}, sizes)


def _place(header: _Header) -> tuple[str, tuple[int, ...], str, int]:
    """Name, shape, number format and offset of the next tensor."""
    name, n_dims = header.name(), header.number("I")
    if not 1 <= n_dims <= 4:
        raise header.error(f"tensor {name} has {n_dims:,} dimensions")
    shape = tuple(header.number("Q") for _ in range(n_dims))[::-1]
    if 0 in shape:
        raise header.error(f"tensor {name} has no numbers: its shape is {shape}")
    code, offset = header.number("I"), header.number("Q")
    dtype = next((dtype for dtype, used in FORMATS.items() if used.code == code), None)
    if dtype is None:
        raise header.error(
            f"tensor {name} is stored as {OTHER_FORMATS.get(code, f'type {code}')}, and only "
            f"{', '.join(FORMATS)} are read: llama.cpp's llama-quantize --allow-requantize makes "
            "Q8_0 of it"
        )
    if shape[-1] % FORMATS[dtype].block:
        raise header.error(f"tensor {name}: {dtype} rows of {shape[-1]:,} are no whole blocks")
    return name, shape, dtype, offset


# ---------------------------------------------------------------------------- vocabularies

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # as in SentencePiece's own files


def vocabulary_values(tokenizer: Tokenizer) -> dict[str, Any]:
    """The values that describe a BPE vocabulary, whose pieces are of no other kinds than these."""
    sp, ids = tokenizer.sp_model, range(tokenizer.n_words)
    asked = {UNKNOWN: sp.is_unknown, CONTROL: sp.is_control, UNUSED: sp.is_unused, BYTE: sp.is_byte}
    values = {
        "model": "llama",  # SentencePiece's BPE
        "pre": "default",
        "tokens": [sp.id_to_piece(i) for i in ids],
        "scores": [sp.get_score(i) for i in ids],
        "token_type": [
            next((kind for kind, is_it in asked.items() if is_it(i)), NORMAL) for i in ids
        ],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "unknown_token_id": sp.unk_id(),
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": True,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def rebuilt_vocabulary(path: Path, values: dict[str, Any]) -> bytes | None:
    """The SentencePiece model that a file's values describe; None for a vocabulary of another kind.

    Pieces, scores and kinds are those of the file, so text gets the ids that it had in training.
    Raises UsageError, naming `path`, where they do not fit together.
    """
    prefix = "tokenizer.ggml."
    said = {key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix)}
    if said.get("model") != "llama":
        return None
    tokens, scores, kinds = (said.get(key) for key in ("tokens", "scores", "token_type"))
    bos, eos = said.get("bos_token_id"), said.get("eos_token_id")
    right = (
        isinstance(tokens, list)
        and all(isinstance(column, np.ndarray) for column in (scores, kinds))
        and len(tokens) == len(scores) == len(kinds)
        and all(type(i) is int and 0 <= i < len(tokens) for i in (bos, eos))
        and set(kinds.tolist()) <= {*range(1, 7)}
        and np.isfinite(scores).all()
    )
    if not right:
        raise UsageError(
            f"{path}: its tokens, scores, token types, BOS and EOS do not fit together"
        )
    pieces = (
        _field(1, _field(1, token) + _field(2, float(score)) + _field(3, int(kind)))
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
    )
    bpe, bytes_for_the_rest = _field(3, 2), _field(35, int(BYTE in kinds))
    trainer = bpe + bytes_for_the_rest + _field(46, tokens[bos]) + _field(47, tokens[eos])
    dummy_prefix = _field(3, int(bool(said.get("add_space_prefix", True))))
    normalizer = _field(1, "identity") + dummy_prefix + _field(4, 0)  # 4: trims no spaces
    model = b"".join([*pieces, _field(2, trainer), _field(3, normalizer)])
    try:
        Tokenizer(tokenizer_model=model)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return model


def _field(number: int, value: str | bytes | int | float) -> bytes:
    """A field of a Protocol Buffers message, which SentencePiece's files are."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    """Seven bits to a byte, the lowest first."""
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])
