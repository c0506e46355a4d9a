"""llama2.c's .bin files: a header of a few numbers, then the tensors without names.

Versions 0 (run.c's, float32), 1 (the same, other order) and 2 (runq's, int8 in groups that share a
scale) are read; 0 and 2 are written, with the vocabulary beside them in a file of llama2.c's own.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig
from minllama.formats.stored_model import (
    Contents,
    StoredModel,
    architecture_for,
    parameter_shapes,
    read_shape,
)
from minllama.system.errors import UsageError
from minllama.system.files import atomic_write, open_regular
from tokenizer import Tokenizer, export_tokenizer_bin, tokenizer_bin

if TYPE_CHECKING:
    from llama import Llama

MAGIC = 0x616B3432  # "ak42": of versions 1 and 2; version 0 has no magic
HEADER = {0: 28, 1: 256, 2: 256}  # bytes before the tensors, by version
SHAPE = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
ATTENTION_NAMES = {  # llama2.c's and Meta's names of what the original renamed
    "attention.wq": "attention.compute_query",
    "attention.wk": "attention.compute_key",
    "attention.wv": "attention.compute_value",
    "attention.wo": "attention.compute_output",
}
ROTARY = ("freqs_cos", "freqs_sin")  # tables in files of version 0, which are computed here
PACKAGE, BESIDE = None, "tokenizer.bin"  # the vocabulary


def tensor_order(n_layers: int, *, version: int, tied: bool) -> list[str]:
    """The tensors in the file's order, by our names: each matrix of all layers in turn."""

    def each(*names: str) -> list[str]:
        return [f"layers.{i}.{name}.weight" for name in names for i in range(n_layers)]

    attention = each(*ATTENTION_NAMES.values())
    feed_forward = each("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    table, norm, head = "tok_embeddings.weight", "norm.weight", [] if tied else ["output.weight"]
    if version == 0:
        layers = [*each("attention_norm"), *attention, *each("ffn_norm"), *feed_forward]
        return [table, *layers, norm, *ROTARY, *head]
    norms = [*each("attention_norm", "ffn_norm"), norm]
    return [*norms, table, *attention, *feed_forward, *head]


# ---------------------------------------------------------------------------- reading


def read_version(path: Path) -> int:
    """The version that the first bytes name; 0 where they are no magic."""
    with open_regular(path) as file:
        magic, version = struct.unpack("<Ii", file.read(8).ljust(8, b"\0"))
    return version if magic == MAGIC else 0


def recognizes(path: Path, head: bytes) -> bool:
    """Whether it can be of this format: any file, until its header is read."""
    return path.is_file()


def read(path: Path) -> StoredModel:
    """Read a model of any version, int8 widened to float32; UsageError for any other file."""
    version = read_version(path)
    with open_regular(path) as file:
        header = file.read(256).ljust(256, b"\0")
        numbers = struct.unpack_from("<7i", header, 8 if version else 0)
        tied = header[36] == 1 if version else numbers[5] > 0  # version 0: the vocabulary's sign
        group = struct.unpack_from("<i", header, 37)[0] if version == 2 else 0
        known = version in (0, 1) or (version == 2 and group > 0 == numbers[0] % group)
        if not known or 0 in numbers or max(map(abs, numbers)) >= 2**26:  # text looks like that
            raise UsageError(
                f"{path}: not a model file: neither .pt nor GGUF nor llama2.c's .bin; a model of "
                "Hugging Face is a folder"
            )
        args = dict(zip(SHAPE, numbers, strict=True))
        args |= {"vocab_size": abs(args["vocab_size"]), "tie_word_embeddings": tied}
        config = read_shape(path, args)
        shapes = parameter_shapes(config)
        shapes |= dict.fromkeys(ROTARY, (config.max_seq_len, config.head_dim // 2))
        order = tensor_order(config.n_layers, version=version, tied=tied)
        want, size = HEADER[version], path.stat().st_size
        for shape in map(shapes.get, order):
            count = math.prod(shape)
            want += count + 4 * (count // group) if group and len(shape) == 2 else 4 * count
        if size != want:  # found before anything of the claimed size is made
            raise UsageError(
                f"{path}: {size:,} bytes where a llama2.c file with this header has {want:,}: "
                "it is cut off or no model file"
            )
        file.seek(HEADER[version])
        weights = {name: _read_tensor(file, shapes[name], group) for name in order}
    for name in ROTARY:
        weights.pop(name, None)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    return StoredModel(config, weights).checked(path)


def _read_tensor(file: BinaryIO, shape: tuple[int, ...], group: int) -> Tensor:
    count = math.prod(shape)
    if not group or len(shape) == 1:
        return torch.from_numpy(np.fromfile(file, "<f4", count)).view(shape)
    quantized = torch.from_numpy(np.fromfile(file, "i1", count)).view(-1, group)
    scales = torch.from_numpy(np.fromfile(file, "<f4", count // group))
    return (quantized * scales[:, None]).view(shape)


def contents(path: Path) -> Contents:
    """The tensors under our names, since the file has none, and which of them are int8."""
    version, weights = read_version(path), read(path).weights
    label, values = f"llama2.c version {version}", {"model": weights}
    if version != 2:
        return Contents(label, values)
    dtypes = {name: "int8" for name, tensor in weights.items() if tensor.dim() == 2}
    return Contents(label, values, dtypes, path.stat().st_size - HEADER[version])


# ---------------------------------------------------------------------------- writing


def write(model: Llama, output: Path, *, dtype: str, tokenizer: Tokenizer | None) -> list[Path]:
    """Write version 0 in float32 or version 2 in int8, the vocabulary beside it; both paths."""
    architecture_for(model.config, "bin")
    for name, only in (("layer_norm_eps", 1e-5), ("rope_theta", 10000.0)):  # built into run.c
        value = getattr(model.config, name)
        if value != only:
            raise UsageError(f"llama2.c knows only {name} {only:g}, not {value:g}")
    if tokenizer is not None:
        tokenizer_bin(tokenizer)  # refuses another kind before anything is written
    group = group_size(model.config) if dtype == "int8" else None
    want = dequantized(model, group) if group else model.state_dict()
    with atomic_write(output, verify=lambda p: read(p).check_read_back(p, want)) as file:
        write_bin(model, file, group)
    if tokenizer is None:
        return [output]
    vocabulary = output.with_name(BESIDE)
    export_tokenizer_bin(tokenizer, vocabulary)
    return [output, vocabulary]


def write_bin(model: Llama, file: BinaryIO, group: int | None) -> None:
    """Header and tensors: version 0, or version 2 with the size of its groups."""
    config, tied = model.config, model.config.tie_word_embeddings
    numbers = {name: getattr(config, name) for name in SHAPE}
    if group:
        header = struct.pack("<Ii7iBi", MAGIC, 2, *numbers.values(), tied, group)
        file.write(header.ljust(HEADER[2], b"\0"))
    else:
        numbers["vocab_size"] *= 1 if tied else -1  # all that says so
        file.write(struct.pack("<7i", *numbers.values()))
    cos, sin = model.rotary[:, 0].unbind(-1)
    state = {**model.state_dict(), "freqs_cos": cos, "freqs_sin": sin}
    for name in tensor_order(config.n_layers, version=2 if group else 0, tied=tied):
        in_int8 = group and state[name].dim() == 2
        for part in quantize(state[name], group) if in_int8 else (state[name],):
            file.write(part.contiguous().numpy())


def group_size(config: LlamaConfig) -> int:
    """Numbers that share a scale: 64, halved until rows of dim and hidden_dim divide into groups.

    llama2.c's exporter looks at dim alone, but runq reads w2 by rows of hidden_dim.
    """
    group = 64
    while config.dim % group or config.hidden_dim % group:
        group //= 2
    return group


def quantize(tensor: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int8 numbers and a float32 scale for each group of them, symmetric about zero."""
    grouped = tensor.reshape(-1, group)
    scales = grouped.abs().amax(dim=1) / 127
    divisors = torch.where(scales > 0, scales, 1.0)  # a group of zeros stays one
    return torch.round(grouped / divisors[:, None]).to(torch.int8), scales


def dequantized(model: Llama, group: int) -> dict[str, Tensor]:
    """What a reader of the int8 file must find."""
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.dim() == 2:
            numbers, scales = quantize(tensor, group)
            state[name] = (numbers * scales[:, None]).view(tensor.shape)
    return state
