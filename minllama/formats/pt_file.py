"""`.pt` files: written with a SHA-256 of every byte, read without running code, checked before use.

A file is what torch.save writes, a zip archive, whose comment holds the checksum, so that any other
program reads it too. Knows nothing of what the tensors are for.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from minllama.system.errors import UsageError
from minllama.system.files import READ_BYTES, atomic_write, open_regular

FORMAT_VERSION = 2  # 1 had its checksum inside, and its own way to compute it
REASON_CHARS = 200  # of what torch says of a file that it cannot read
# What a file may hold, each value counted as often as it is met: a few hundred bytes can spell a
# list of lists that a walk would not end in. A checkpoint has some 700 for each rank.
MOST_VALUES, MOST_DEPTH, MOST_BITS = 1_000_000, 32, 128
PICKLES_BEFORE_2020 = 5  # in a file: two numbers, its machine, the content, the tensors' keys
LONGEST_CODEC = 40  # letters of its name
STATE_FILE = "state.pt"  # of a sharded checkpoint, a folder: its plain values
SEAL = b"minllama sha256 "  # begins the comment at the end of the file; 64 hex digits follow


class SealingFile:
    """Passes on to `file` what torch.save writes; `seal` ends it with the SHA-256 of every byte.

    It sums what was meant to be written, so reading back finds what the disk did not take.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()
        self.held = b""  # the last two bytes: the size of the archive's comment

    def write(self, data: bytes | memoryview) -> int:
        """Write all but the last two bytes so far."""
        view = memoryview(data).cast("B")
        held = self.held + bytes(view[-2:])
        self._pass_on(held[:-2])
        self._pass_on(view[:-2])
        self.held = held[-2:]
        return len(data)

    def flush(self) -> None:
        """For torch.save; whoever opened the file flushes it."""

    def seal(self) -> str:
        """Write the rest and the checksum, which is returned."""
        assert self.held == b"\0\0", "torch.save ended its archive with a comment of its own"
        self._pass_on(struct.pack("<H", len(SEAL) + 64))
        self.file.write(SEAL + self.sum.hexdigest().encode())
        return self.sum.hexdigest()

    def _pass_on(self, data: bytes | memoryview) -> None:
        self.sum.update(data)
        self.file.write(data)


def write_sealed(file: BinaryIO, payload: dict[str, Any]) -> str:
    """Write tensors and plain values, and behind them the SHA-256 of every byte; returns it.

    Raises OSError.
    """
    sealing = SealingFile(file)
    try:
        torch.save(payload | {"format_version": FORMAT_VERSION}, sealing)
    except RuntimeError as error:  # torch's writer hides what the file raised
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    return sealing.seal()


def verify_seal(path: Path) -> str | None:
    """Read every byte of a sealed file; returns its SHA-256 in hex, None for one without a seal.

    Raises UsageError where a byte is not what was written, and where it cannot be read.
    """
    with open_regular(path) as file:
        left = file.seek(0, 2) - len(SEAL) - 64
        file.seek(max(0, left))
        seal = file.read()
        if not seal.startswith(SEAL):
            return None
        file.seek(0)
        digest = hashlib.sha256()
        while left > 0 and (data := file.read(min(left, READ_BYTES))):
            digest.update(data)
            left -= len(data)
    if seal[len(SEAL) :] != digest.hexdigest().encode():
        raise UsageError(f"{path} is damaged: its bytes do not match its SHA-256")
    return digest.hexdigest()


def save_pt(path: Path, payload: dict[str, Any]) -> str:
    """Write a sealed file, whole and read back, or not at all; returns its SHA-256.

    Raises OSError, and then `path` is as it was.
    """

    def verify(temporary: Path) -> None:
        with contextlib.suppress(UsageError):
            if verify_seal(temporary) == digest:
                return
        raise OSError(errno.EIO, "what was read back is not what was written", str(path))

    with atomic_write(path, verify=verify) as file:
        digest = write_sealed(file, payload)
    return digest


def state_file(path: Path) -> Path:
    """The file of a checkpoint that holds its plain values: itself, or one in its folder."""
    return path / STATE_FILE if path.is_dir() else path


def is_pt(head: bytes) -> bool:
    """Whether a file that begins so is what torch.save writes, today's or that before 2020."""
    return head[:2] in (b"PK", b"\x80\x02")


def load_pt(path: str | Path, *, verify: bool = True, digest: str | None = None) -> dict[str, Any]:
    """Everything a .pt file holds, its tensors mapped from the disk where it can be, no code run.

    `verify` reads every byte of a file that carries checksums, and compares with `digest` if that
    is given. Raises UsageError for one that is damaged or of another format version, and unless it
    is a dict with a dict of tensors under 'model', each of them held whole by the file.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            if not is_pt(file.read(2)):
                raise UsageError(f"{path}: no .pt file, neither a weights file nor a checkpoint")
        seal = verify_seal(path) if verify else None
        if verify and digest not in (None, seal):
            raise UsageError(f"{path} is damaged: its bytes do not match its SHA-256")
        unsealed = verify and seal is None
        archive = zipfile.is_zipfile(path)  # else torch's format before 2020, or cut off
        if archive:
            _check_archive(path, checksums=unsealed)
        else:
            with open_regular(path) as file:
                for _ in range(PICKLES_BEFORE_2020):
                    _check_pickle(path, file)
        mapped = archive and torch_can_map(path)
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        payload = _with_model_key(payload)
        _check_payload(path, payload, unsealed=unsealed)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        reason = "carries code or objects beyond tensors and plain values, and none of it was run"
        if "unsupported" not in str(error).lower():
            reason = "is damaged or no model file"
        raise UsageError(f"{path}: {reason}; get a file of plain weights") from None
    except Exception as error:  # torch.load raises what the damage happens to hit
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a wrong seek
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:REASON_CHARS]
        raise UsageError(f"{path}: it is damaged or cut off; copy it again ({reason})") from None
    return payload


def torch_can_map(path: Path) -> bool:
    """Whether torch, which opens the UTF-8 of a name, finds the file to map under it.

    In a locale of another encoding, such as zh_CN.GBK, the disk has other bytes for the name.
    """
    return os.name == "nt" or os.fsencode(path) == str(path).encode("utf-8", "replace")


def _with_model_key(payload: Any) -> Any:
    """The content with its tensors under 'model', where other programs have them elsewhere.

    Lightning has them under 'state_dict'; a raw state dict is nothing but tensors.
    """
    if not isinstance(payload, dict) or "model" in payload:
        return payload
    weights = payload.get("state_dict")
    if isinstance(weights, dict) and weights:
        return {k: v for k, v in payload.items() if k != "state_dict"} | {"model": weights}
    only_tensors = payload and all(isinstance(value, Tensor) for value in payload.values())
    return {"model": payload} if only_tensors else payload


def _check_payload(path: Path, payload: Any, *, unsealed: bool) -> None:
    try:
        tensors = tensors_in(payload)
    except ValueError as error:
        raise UsageError(f"{path}: holds {error}: no model and no checkpoint") from None
    weights = payload.get("model") if isinstance(payload, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(w, Tensor) for name, w in weights.items()
    ):
        raise UsageError(f"{path}: no tensors under the key 'model': not a weights file of a Llama")
    version = payload.get("format_version")
    if version == 1:
        raise UsageError(
            f"{path}: has format version 1, which an early MinLlama wrote and only that reads"
        )
    if version not in (None, FORMAT_VERSION):  # None: of another program
        raise UsageError(
            f"{path}: has the format version {str(version)[:20]}, and this program reads "
            f"{FORMAT_VERSION}: update it"
        )
    if version is not None and unsealed:
        raise UsageError(
            f"{path} is damaged: its checksum is gone; it was cut off, or saved by another program"
        )
    left = 2 * path.stat().st_size  # what is tied has two names
    for name, tensor in tensors:
        # What a small file can claim: an expanded, sparse or meta tensor has no bytes in it, and
        # many may be the same bytes.
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise UsageError(f"{path}: tensor {name} is not a plain array of numbers")
        size = tensor.numel() * tensor.element_size()
        left -= size
        if size > tensor.untyped_storage().nbytes() or left < 0:
            raise UsageError(f"{path}: tensor {name} is larger than what the file holds")


def tensors_in(node: Any) -> list[tuple[str, Tensor]]:
    """Every tensor in nested dicts and lists, by its dotted name.

    Raises ValueError for what is too much, too deep or too large a number for any later use of it.
    """
    left = MOST_VALUES

    def walk(node: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        nonlocal left
        left -= 1
        if left < 0 or depth > MOST_DEPTH:
            what = f"more than {MOST_VALUES:,} values" if left < 0 else f"lists in {depth} others"
            raise ValueError(what)
        if isinstance(node, Tensor):
            yield name, node
        elif isinstance(node, int) and node.bit_length() > MOST_BITS:
            raise ValueError(f"a number of {node.bit_length():,} bits as {name}")
        elif isinstance(node, dict | list | tuple | set):
            children = node.items() if isinstance(node, dict) else enumerate(node)
            for key, child in children:
                if not isinstance(key, str | int | float | None):
                    raise ValueError(f"a {type(key).__name__} as a name")
                yield from walk(child, f"{name}.{key}" if name else str(key), depth + 1)

    return list(walk(node, "", 0))


def _check_archive(path: Path, *, checksums: bool) -> None:
    """Refuse an archive that would unpack to more than the file holds, before it does.

    `checksums` reads every byte of its parts and compares their CRC-32, all that other programs'
    files have.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        size = sum(part.file_size for part in parts)
        if size > path.stat().st_size or any(part.compress_type for part in parts):
            raise UsageError(f"{path}: claims {size:,} bytes of content, more than the file holds")
        broken = archive.testzip() if checksums else None
        if broken is not None:
            raise UsageError(f"{path} is damaged: the checksum of {broken} is wrong; copy it again")
        for part in parts:
            if part.filename.endswith(".pkl"):
                _check_pickle(path, io.BytesIO(archive.read(part)))


def _check_pickle(path: Path, file: BinaryIO) -> None:
    """Refuse a pickle that would make more of what it holds, where torch.load lets it."""
    called, texts = set(), []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            called.add(argument.split(" ")[-1])
        elif isinstance(argument, str) and len(argument) <= LONGEST_CODEC:
            texts.append(argument)
    # bytearray(n) has n bytes; `encode`, by which bytes are pickled, has codecs that double them.
    if "bytearray" in called or ("encode" in called and any(map(_lengthens, texts))):
        raise UsageError(f"{path}: holds a call that can fill the memory; get a file of weights")


def _lengthens(codec: str) -> bool:
    with contextlib.suppress(LookupError, ValueError):
        return codecs.lookup(codec).name in ("base64", "hex", "quopri", "uu")
    return False
