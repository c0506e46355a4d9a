"""Every format: exact, and read back before it gets its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import assert_holds, make_model, write

import minllama.formats.hugging_face as H
import minllama.formats.llama2c as L
from check_model_precision import inspect
from llama import load_pretrained
from minllama.formats.model_file import format_named
from minllama.system.errors import UsageError
from tokenizer import Tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["bin", "hf", "pt"])
def test_float32_is_written_exactly(tmp_path: Path, tied: bool, target: str):
    if target == "hf":
        pytest.importorskip("safetensors")
    model = make_model(tie_word_embeddings=tied)
    assert write(model, target, tmp_path / "there") == [tmp_path / "there"]
    assert_holds(tmp_path / "there", model.state_dict())
    assert load_pretrained(tmp_path / "there").config.tie_word_embeddings == tied


@pytest.mark.parametrize("target", ["pt", "hf"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_precision_of_what_is_written(tmp_path: Path, tokenizer: Tokenizer, name: str, target: str):
    """Half the bytes for half the bits; the vocabulary comes along."""
    if target == "hf":
        pytest.importorskip("safetensors")
    model = make_model(tokenizer)
    write(model, target, tmp_path / "it", dtype=name, tokenizer=tokenizer)
    report = inspect(tmp_path / "it", verify=True)
    assert report.dtypes == {name: 21 if target == "pt" else 20} and report.sound
    assert report.parts["weights"] == report.parameters * (4 if name == "float32" else 2)
    dtype = getattr(torch, name)
    assert_holds(
        tmp_path / "it", {key: w.to(dtype).float() for key, w in model.state_dict().items()}
    )
    assert load_pretrained(tmp_path / "it").vocabulary == model.vocabulary


@pytest.mark.parametrize("target", ["gguf", "hf"])
def test_a_name_that_is_no_text_is_refused_before_anything_is_written(tmp_path: Path, target: str):
    """safetensors called what it had written damaged, and Ollama's recipe was an encoding error."""
    with pytest.raises(UsageError, match=f"--output .*: --convert {target} needs a name that is"):
        write(make_model(), target, tmp_path / "\udcb2\udce2")
    assert not [*tmp_path.iterdir()]


def test_a_failing_self_check_publishes_nothing(tmp_path: Path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(L, "write_bin", lambda model, file, group: file.write(b"half a file"))
    with pytest.raises(UsageError, match="not a model file"):
        write(model, "bin", tmp_path / "a.bin")
    real = H.to_half_split
    monkeypatch.setattr(H, "to_half_split", lambda weight, heads: -real(weight, heads))
    # Which it no longer said, since a run that reads its model back has the same check.
    message = "self-check: layers.0.attention.compute_.* differs; nothing written$"
    with pytest.raises(UsageError, match=message):
        write(model, "hf", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_kept_where_its_replacement_fails(tmp_path: Path, monkeypatch):
    """It is moved aside only when the new one is whole, and back if that cannot take its name."""
    model, folder = make_model(), tmp_path / "hf"
    write(model, "hf", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(H.StoredModel, "check_read_back", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(make_model(rope_theta=7.0), "hf", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("target", ["pt", "bin", "bin-int8", "gguf", "hf"])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path, tokenizer: Tokenizer, target: str):
    """Of a .pt file and a Hugging Face folder it was a traceback, of the others it named "a file".

    What was there stays, and no temporary is left.
    """
    resource = pytest.importorskip("resource")
    if package := format_named(target).PACKAGE:
        pytest.importorskip(package)
    model, output = make_model(tokenizer), tmp_path / "it"
    write(model, target, output, tokenizer=tokenizer)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, most))  # a full disk that needs no disk
    try:
        with pytest.raises(UsageError, match=r"--output .*it: cannot be written \(File too large"):
            write(model, target, output, tokenizer=tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
