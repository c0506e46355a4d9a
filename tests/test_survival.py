"""Nothing is ever lost: runs that are killed, crashed, starved and fed with damaged files."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import survivor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from survivor import run_here, write_text_file

from minllama.formats import pt_file
from minllama.formats.pt_file import load_pt, save_pt
from minllama.machine.ranks import Ranks
from minllama.runs.checkpoints import load_checkpoint
from minllama.runs.run_folder import RunFolder
from minllama.system import signals
from minllama.system.errors import UsageError
from minllama.text.documents import read_documents
from minllama.text.labelled import read_labelled
from minllama.text.reading import Reading
from minllama.training import setup


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder with the training text in it."""
    write_text_file(tmp_path)
    return tmp_path


def assert_all_survived(tally: survivor.Tally) -> None:
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.tried == tally.survived and tally.tried.total()


# ---------------------------------------------------------------------------- the whole harness


def test_killed_runs_end_as_if_they_never_were(tmp_path):
    """SIGKILL at random moments and inside a save, dropout on: bit-equal in the end."""
    tally = survivor.kills(tmp_path, 6, steps=30)
    assert_all_survived(tally)
    assert tally.tried.total() == 6
    assert tally.tried["SIGKILL in the middle of a save"] <= 1  # a slow machine may miss it


@pytest.mark.soak
def test_two_hundred_kills(tmp_path):
    """The same, 200 times."""
    assert_all_survived(survivor.kills(tmp_path, 200, seed=1))


@pytest.mark.parametrize(
    ("kind", "every"), [("a save", 23), ("a sharded save", 23), ("replacing a folder", 2)]
)
def test_some_crash_points_of_a_save(tmp_path, kind, every):
    """The process ends at a write, fsync, rename or deletion: what is there is always whole."""
    assert_all_survived(survivor.crash_points(tmp_path, every=every, kinds=[kind]))


@pytest.mark.soak
def test_every_crash_point_of_a_save(tmp_path):
    """The same at each point."""
    assert_all_survived(survivor.crash_points(tmp_path))


def test_failing_disks(tmp_path):
    """Full, broken, forbidden, losing bytes: the old file stays, the run continues, saves again."""
    assert_all_survived(survivor.faults(tmp_path))


def test_hundreds_of_damaged_files(tmp_path):
    """Flipped bits and truncations of checkpoint, weights file and token cache are all found.

    A digest of the tensors alone left the padding between them and the archive's own records open.
    """
    tally = survivor.corruption(tmp_path, 400)
    assert_all_survived(tally)
    assert tally.tried.total() == 400


@pytest.mark.skipif(os.name == "nt", reason="Windows raises SIGTERM by ending the process")
def test_signals_in_every_phase(tmp_path):
    """While tokenizing, in the first step, validating, saving, finetuning and generating."""
    tally = survivor.signals(tmp_path)
    assert_all_survived(tally)
    assert tally.tried.keys() == {"SIGINT", "SIGTERM", "SIGHUP"} == {*signals.HANDLED}


def test_a_second_ctrl_c_quits_at_once(text, monkeypatch):
    """In the middle of a save: the one before stays whole, nothing half-written is left."""
    real = pt_file.verify_seal

    def twice(path: Path) -> str | None:
        if "step-6" in path.name:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(path)

    monkeypatch.setattr(pt_file, "verify_seal", twice)
    status, said = run_here(text, "--max_steps", "30", "--save_dir", "run")
    assert status == 130 and "Traceback" not in said
    assert [path.name for path in (text / "run").glob("*.pt")] == ["pretrain-step-3.pt"]
    assert not list((text / "run").glob(".*"))
    load_checkpoint(text / "run" / "pretrain-step-3.pt")


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1 MB: checkpoints fail for want of room, the last one and exit status 1."""
    disk = tmp_path / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        write_text_file(tmp_path)
        words = ["--save_dir", "run", "--max_steps", "12", "--keep_last", "0"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup, "free_disk", lambda folder: 10**9)  # it filled up later
            status, said = run_here(tmp_path, *words)
        assert status == 1 and "No space left" in said and "warning: checkpoint" in said
        assert said.splitlines()[-1].count("error:") == 1
        paths = [*disk.glob("*.pt")]
        steps = [load_pt(path).get("progress", {}).get("step", 0) for path in paths]
        assert max(steps) >= 3
        assert not list(disk.glob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------------------- resuming


def test_a_sound_file_of_other_things_is_one_line(text):
    """The checksum only says that a file is what somebody wrote."""
    assert run_here(text, "--max_steps", "3", "--save_dir", "run")[0] == 0
    path = text / "run" / "pretrain-step-3.pt"
    payload = load_checkpoint(path)
    for change in (
        {"progress": {"step": 3, "tokens": "many"}},
        {"optimizer": {}},
        {"rng": {}},
        {"model": {}},
        {"options": 5},
        {"options": {"seed": "many"}},
        {"identity": {}},
    ):
        save_pt(path, payload | change)
        status, said = run_here(text, "--max_steps", "3", "--save_dir", "run", "--resume", "auto")
        assert status == 2 and "Traceback" not in said and "error:" in said, change


def test_what_a_killed_run_left_behind_is_cleared_up(text):
    """Half-written files of the run, and a run.json that the crash cut, which is kept aside."""
    (text / "run").mkdir()
    left = [".pretrain-step-3.pt.01234567.tmp", ".final-model.pt.01234567.tmp"]
    for name in (*left, ".notes.txt.01234567.tmp"):
        (text / "run" / name).write_bytes(b"half")
    (text / "run" / "run.json").write_text('{"starts": [{"opt', encoding="utf-8")
    status, said = run_here(text, "--max_steps", "1", "--save_dir", "run", "--resume", "auto")
    assert status == 0 and "run.json was damaged; it is kept as run.json.damaged" in said
    assert [path.name for path in (text / "run").glob(".*")] == [".notes.txt.01234567.tmp"]
    starts = json.loads((text / "run" / "run.json").read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 1


def test_two_runs_in_one_folder(text):
    """The second is refused in one line that names the first, and touches nothing."""
    (text / "run").mkdir()
    with RunFolder(text / "run", "pretrain").locked(Ranks()):
        status, said = run_here(text, "--max_steps", "1", "--save_dir", "run")
        assert status == 2 and said.count("error:") == 1
        assert f"process {os.getpid()} on {platform.node()}" in said.splitlines()[-1]
        assert [path.name for path in (text / "run").iterdir()] == ["run.lock"]
    assert run_here(text, "--max_steps", "1", "--save_dir", "run")[0] == 0


# ---------------------------------------------------------------------------- odd input

TEXTS = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from([
            b'{"text": "a b"}', b'{"text": 1}', b"{}", b"", b"[1]", b"null", b'{"text": ""}',
            b"0 ||| good", b"x ||| y", b"|||", b"\xef\xbb\xbf", b"\r\n", b"\0", b"\xff",
            "\U0001f98a".encode(), b"\xf0\x9f", b"99999999999 ||| z", b'{"text": {"text": "x"}}',
        ]), max_size=8,
    ).map(b"\n".join),
)  # fmt: skip


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=TEXTS, suffix=st.sampled_from([".txt", ".jsonl", ".txt.gz"]), lines=st.booleans())
def test_any_file_is_read_or_refused(tmp_path, content, suffix, lines):
    """Bytes of all kinds: documents or labelled sentences, or one line that names the file."""
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(content)
    for read in (
        lambda: list(read_documents(path, Reading(document_per_line=lines))),
        lambda: read_labelled(path, labels=["0", "1"]),
    ):
        try:
            read()
        except UsageError as error:
            assert path.name in str(error) and "\n" not in str(error)
