"""`.pt` files: sealed with a checksum, read without running code, checked before use."""

from __future__ import annotations

import codecs
import errno
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import survivor
import torch
from golden import make_golden
from golden.make_golden import EXPECTED, FOLDER
from survivor import Malicious, content_digest, detected, refusal, small_payload, tiny_model

from llama import load_pretrained
from minllama.formats import pt_file
from minllama.formats.pt_file import (
    FORMAT_VERSION,
    SEAL,
    load_pt,
    save_pt,
    tensors_in,
    torch_can_map,
    verify_seal,
)
from minllama.runs.checkpoints import load_checkpoint, summarize
from minllama.system.errors import UsageError

LOADERS = [load_pt, load_pretrained, load_checkpoint, summarize]

pytestmark = pytest.mark.usefixtures("empty_folder")


# ---------------------------------------------------------------------------- writing


def test_what_is_saved_is_what_is_loaded():
    """Tensors of all kinds, plain values, nested; tied tensors are one storage, once on disk."""
    tied = torch.randn(200, 100)
    payload = {
        "model": {"a": tied, "b": tied, "empty": torch.empty(0, 3), "scalar": torch.tensor(2)},
        "half": [torch.randn(3).to(torch.bfloat16), torch.tensor([True, False])],
        "plain": {"text": "\N{FOX FACE}", "none": None, "list": [1, 2.5, (True,)]},
    }
    digest = save_pt(Path("a.pt"), payload)
    found = load_pt(Path("a.pt"))
    assert content_digest(found) == content_digest(payload | {"format_version": FORMAT_VERSION})
    assert found["model"]["a"].data_ptr() == found["model"]["b"].data_ptr()
    assert Path("a.pt").stat().st_size < 1.5 * tied.nbytes
    assert verify_seal(Path("a.pt")) == digest and [*Path().iterdir()] == [Path("a.pt")]


def test_any_program_reads_a_sealed_file():
    """The original loads with torch.load; an archive tool sees an ordinary archive."""
    path = Path("weights.pt")
    digest = save_pt(path, make_golden.weights())
    assert torch.load(path, weights_only=True).keys() >= {"model", "model_args"}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment == SEAL + digest.encode()


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        ("disk full", errno.ENOSPC),
        ("I/O error", errno.EIO),
        ("permission denied", errno.EACCES),
        ("short write", errno.EIO),
    ],
)
def test_a_disk_that_fails_leaves_the_old_file(fault, number):
    """Its own error is raised, which torch's writer hides behind one of its own."""
    save_pt(Path("a.pt"), small_payload(1))
    before = Path("a.pt").read_bytes()
    with survivor.FAULTS[fault](), pytest.raises(OSError) as error:
        save_pt(Path("a.pt"), small_payload(2))
    assert error.value.errno == number
    assert Path("a.pt").read_bytes() == before and [*Path().iterdir()] == [Path("a.pt")]


# ---------------------------------------------------------------------------- versions


def test_the_golden_weights_load_for_ever():
    """What a user has on the disk."""
    path = FOLDER / "weights-v2.pt"
    assert content_digest(load_pt(path)) == EXPECTED[path.name]["content"]
    model = load_pretrained(path)
    for found, made in zip(model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(found, made)


def test_what_is_written_today_is_the_newest_golden():
    """A change of the content needs a new format version, and golden files of it."""
    payload = make_golden.weights() | {"format_version": FORMAT_VERSION}
    name = f"weights-v{FORMAT_VERSION}.pt"
    assert content_digest(payload) == EXPECTED[name]["content"]


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "format version 1, which an early MinLlama wrote"), (99, "99, and .*update it")],
)
def test_other_versions_are_refused(version, message):
    """Rather than misread. Version 1 had its checksum among the keys."""
    payload = make_golden.weights() | {"format_version": version, "digest": "0" * 64}
    torch.save(payload, "other.pt")
    for load in (load_pt, load_pretrained):
        with pytest.raises(UsageError, match=message):
            load(Path("other.pt"))
        refusal(load, Path("other.pt"))


# ---------------------------------------------------------------------------- damage


def test_a_seal_that_is_gone_is_missed():
    """A file cut off before its checksum is still an archive that loads."""
    path = Path("weights.pt")
    save_pt(path, make_golden.weights())
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(SEAL) - 2] + b"\0\0")
    torch.load(path, weights_only=True)
    assert "checksum is gone" in refusal(load_pretrained, path)


def test_damaged_files_of_other_programs_are_found():
    """torch.save leaves a CRC-32 of each part: a flipped bit changes nothing that is loaded, or it
    is found."""
    torch.save(make_golden.weights(), "sound.pt")
    content, path = Path("sound.pt").read_bytes(), Path("damaged.pt")
    expected, chance, found = content_digest(load_pt("sound.pt")), random.Random(0), 0
    for _ in range(150):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        if detected(lambda: load_pt(path)):
            found += 1
        else:
            assert content_digest(load_pt(path)) == expected
    assert found > 75


def test_a_file_that_is_none():
    """Missing, a folder, empty, text, a pickle of something else."""
    Path("folder.pt").mkdir()
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("hello", encoding="utf-8")
    Path("list.pt").write_bytes(pickle.dumps([1, 2]))
    torch.save([1, 2], "list-2.pt")
    torch.save({"state_dict": {}}, "other.pt")
    torch.save({"model": {"a": [1]}}, "no-tensor.pt")
    for path in [Path("missing.pt"), *Path().iterdir()]:
        refusal(load_pt, path)


# ---------------------------------------------------------------------------- malice


@pytest.mark.parametrize("load", LOADERS)
def test_code_in_a_file_is_never_run(load):
    """Also under a valid checksum, which anybody can make."""
    path = Path("evil.pt")
    save_pt(path, small_payload(1) | {"options": Malicious()})
    assert verify_seal(path)
    assert "none of it was run" in refusal(load, path)
    path.write_bytes(pickle.dumps(Malicious()))
    refusal(load, path)
    torch.save({"model": {"a": Malicious()}}, path, _use_new_zipfile_serialization=False)
    refusal(load, path)
    assert not Path("executed").exists()


@pytest.mark.parametrize("place", ["model", "elsewhere"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(1).expand(10**12), "larger than what the file holds"),
        (lambda: torch.zeros(4).as_strided((10**6, 4), (0, 1)), "larger than what the file holds"),
        (
            lambda: torch.sparse_coo_tensor([[0]], [1.0], (10**12,), check_invariants=True),
            "not a plain array",
        ),
        (lambda: torch.empty(10**12, device="meta"), "not a plain array"),
    ],
    ids=["expanded", "strided", "sparse", "meta"],
)
def test_tensors_that_are_not_in_the_file_are_refused(make, message, place):
    """A few bytes that claim terabytes, and would take them when the model is made of them."""
    payload = make_golden.weights()
    if place == "model":
        payload["model"]["norm.weight"] = make()
    else:
        payload["optimizer"] = {"state": {0: [make()]}}
    save_pt(Path("claim.pt"), payload)
    said = refusal(load_pt, Path("claim.pt"))
    assert message in said and ("norm.weight" in said or "optimizer.state.0.0" in said)


def test_tensors_that_are_the_same_bytes_are_refused():
    """Three hundred layers of one matrix: 2.4 MB, of which a model of 3 GB was made."""
    matrix = torch.zeros(8, 8)
    tensors = {f"layers.{i}.feed_forward.w1.weight": matrix.view(8, 8) for i in range(300)}
    save_pt(Path("shared.pt"), {"model": tensors, "model_args": {}})
    assert "larger than what the file holds" in refusal(load_pt, Path("shared.pt"))


class Call:
    """Pickled as a call."""

    def __init__(self, *what: object) -> None:
        self.what = what

    def __reduce__(self) -> tuple:
        return self.what[0], self.what[1:]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda: Call(bytearray, 2**20),
        lambda: Call(codecs.encode, Call(codecs.encode, b"aaaa", "hex"), "Hex-Codec"),
    ],
    ids=["bytearray", "hex"],
)
def test_calls_that_fill_the_memory_are_refused(call, zipped):
    """torch.load of a file of 1 kB took 4 GB, before anything of it could be looked at."""
    payload = {"model": {"a": torch.zeros(4)}, "bytes": b"\xff"}
    kind = {"_use_new_zipfile_serialization": zipped}
    torch.save(payload | {"name": "utf-8"}, "honest.pt", **kind)
    assert load_pt("honest.pt")["bytes"] == b"\xff"
    torch.save(payload | {"options": [call()]}, "call.pt", **kind)
    assert "can fill the memory" in refusal(load_pt, Path("call.pt"))


@pytest.mark.parametrize("name", [1, None, ("a", "b"), b"norm.weight"])
def test_names_of_tensors_are_texts(name):
    """Sorting or joining them later ended in a TypeError."""
    payload = make_golden.weights()
    payload["model"][name] = torch.zeros(1)
    save_pt(Path("named.pt"), payload)
    for load in (load_pt, load_pretrained):
        refusal(load, Path("named.pt"))


def test_absurd_claims_are_refused_unread(monkeypatch):
    """A deflated file of zeros, and a tensor of 2^31 numbers over a storage of four."""
    payload = make_golden.weights()
    payload["model"]["norm.weight"] = torch.zeros(4)
    torch.save(payload, "sound.pt")

    def changed(name: str, change: Callable[[str, bytes], bytes], how: int) -> Path:
        with zipfile.ZipFile("sound.pt") as sound, zipfile.ZipFile(name, "w", how) as archive:
            for part in sound.infolist():
                archive.writestr(part.filename, change(part.filename, sound.read(part)), how)
        return Path(name)

    def inflate(name: str, content: bytes) -> bytes:
        return bytes(10_000_000) if name.endswith("/data/0") else content

    def enlarge(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        assert b"K\x04\x85" in content  # the shape (4,) becomes (2^31 - 1,)
        return content.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")

    bomb = changed("bomb.pt", inflate, zipfile.ZIP_DEFLATED)
    claim = changed("claim.pt", enlarge, zipfile.ZIP_STORED)
    for load in LOADERS:
        refusal(load, claim)
    for reader in (torch, "load"), (zipfile.ZipFile, "open"), (zipfile.ZipFile, "testzip"):
        monkeypatch.setattr(*reader, None)
    for load in LOADERS:
        assert "claims 10" in refusal(load, bomb)


def _doubled(times: int) -> list:
    """A list that spells 2^times values, in a few bytes each: every one holds the last twice."""
    node: list = [1]
    for _ in range(times):
        node = [node, node]
    return node


def _in_itself() -> list:
    node: list = []
    node.append(node)
    return node


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _doubled(60), "lists in 33 others"),
        (lambda: _doubled(25), "more than 1,000,000 values"),
        (_in_itself, "lists in 33 others"),
        (lambda: 10**400, f"a number of {(10**400).bit_length():,} bits as progress.step"),
    ],
    ids=["deep", "wide", "circle", "number"],
)
def test_a_small_file_that_spells_a_large_one_is_refused(load, make, message, monkeypatch):
    """Sixty lists, each of the one before twice, kept every reader busy for ever: a graph was
    walked as a tree. A number of 5,000 digits cannot even be printed."""
    if load is not load_pt:  # a million values take a second, once
        monkeypatch.setattr(pt_file, "MOST_VALUES", 10_000)
        message = message.replace("1,000,000", "10,000")
    payload = make_golden.weights() | {"optimizer": {}, "scaler": {}, "rng": {}, "identity": {}}
    torch.save(payload | {"progress": {"step": make()}}, "graph.pt")
    assert Path("graph.pt").stat().st_size < 200_000
    said = refusal(load, Path("graph.pt"))
    assert message in said and "graph.pt" in said


def test_what_is_shared_a_few_times_is_no_graph():
    """Pickle writes a tuple that several groups have, such as AdamW's betas, once."""
    betas = (0.9, 0.999)
    payload = {"model": {"a": torch.zeros(1)}, "groups": [{"betas": betas} for _ in range(1000)]}
    torch.save(payload, "shared.pt")
    assert load_pt("shared.pt")["groups"][999] == {"betas": betas}


def test_tensors_in_nested_content():
    """By their dotted names, for messages."""
    a, b = torch.zeros(1), torch.ones(1)
    found = tensors_in({"x": {"y": a}, 0: [1, (b, "c")]})
    assert [name for name, _ in found] == ["x.y", "0.1.0"]
    assert found[0][1] is a and found[1][1] is b


# ---------------------------------------------------------------------------- names


@pytest.mark.skipif(os.name == "nt", reason="names there are UTF-16, whatever the locale")
def test_a_name_that_is_not_utf8_on_the_disk():
    """A run in a folder named in Chinese, in a GBK locale, trained, and could not be read again.

    torch.load(mmap=True) opened the UTF-8 of the name: "it is damaged or cut off; copy it again".
    """
    folder = Path(os.fsdecode("训练".encode("gbk")))  # the same in a UTF-8 locale: no UTF-8 name
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    payload = {"model": {"a": torch.randn(3)}}
    save_pt(folder / "a.pt", payload)
    assert torch.equal(load_pt(folder / "a.pt")["model"]["a"], payload["model"]["a"])
    assert torch_can_map(Path("训练.pt")) == (sys.getfilesystemencoding() == "utf-8")


def test_the_real_reason_is_shown(monkeypatch):
    """The name of an exception alone sent the user to copy a file that was whole."""
    save_pt(Path("a.pt"), {"model": {"a": torch.randn(3)}})

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    error: Exception = OSError(errno.ESTALE, "Stale file handle")
    with pytest.raises(UsageError, match=r"a\.pt: cannot be read \(Stale file handle\)"):
        load_pt("a.pt")
    error = RuntimeError("unable to map\nthis file")
    with pytest.raises(UsageError, match=r"\(RuntimeError: unable to map this file\)"):
        load_pt("a.pt")
