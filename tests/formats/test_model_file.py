"""Reading any file: which format it is, and what is none of them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from oracles import make_llama

import check_model_precision
from config import LlamaConfig
from llama import Llama
from minllama.formats.model_file import FORMATS, read_model
from minllama.formats.stored_model import parameter_shapes
from minllama.system.errors import UsageError


@pytest.fixture
def model(tiny_config: LlamaConfig) -> Llama:
    return make_llama(tiny_config)


def test_shapes_are_those_of_the_model(model: Llama):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert parameter_shapes(model.config) == shapes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b"Once upon a time there was a girl who loved models.\n" * 9, "not a model"),
        ("empty.pt", b"", "not a model file"),
        ("zip.pt", b"PK\x03\x04 and then nothing", "cut off"),
        ("zeros.bin", bytes(5000), "not a model file"),
        ("huge.bin", struct.pack("<7i", 2**17, 2**19, 1000, 8, 8, 2**24, 64) + bytes(9), "cut off"),
        ("int9.bin", struct.pack("<Ii7iBi", 0x616B3432, 9, *[8] * 7, 1, 64), "not a model file"),
    ],
)
def test_what_is_no_model_file_says_so(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name}: .*{message}"):
        read_model(tmp_path / name)


def test_a_path_without_a_model_says_so(tmp_path: Path):
    with pytest.raises(UsageError, match="none.pt: no such file"):
        read_model(tmp_path / "none.pt")
    with pytest.raises(UsageError, match="the folder holds no model"):
        read_model(tmp_path)
    for name in ("final-model.pt", "pretrain-step-3.pt"):  # it said that there was no .pt file
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="is a folder; name one of its files, .*final-model.pt$"):
        read_model(tmp_path)


def test_every_format_can_be_written_and_is_offered():
    """The command line answers before torch is imported, so it has the names a second time."""
    assert {name.partition("-")[0] for name in check_model_precision.FORMATS} == FORMATS.keys()
