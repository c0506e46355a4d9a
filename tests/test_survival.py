"""Nothing is ever lost: runs that are killed, crashed, starved and fed with damaged files."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import survivor
import torch
from golden import make_golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from survivor import detected, run_here, small_payload, tiny_model, write_text_file
from torch import nn

import llama
import run_llama
import utils
from config import Options, RunFailed, UsageError, parse_options
from llama import content_digest, load_payload, load_pretrained, verify_seal
from tokenizer import Reading, read_documents
from utils import RunFolder, load_checkpoint, read_labelled, save_checkpoint

GOLDEN = Path(make_golden.__file__).parent
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder with the training text in it."""
    write_text_file(tmp_path)
    return tmp_path


def records(folder: Path) -> list[dict]:
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def assert_all_survived(tally: survivor.Tally) -> None:
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.tried == tally.survived and tally.tried.total()


# ---------------------------------------------------------------------------- the whole harness


def test_killed_runs_end_as_if_they_never_were(tmp_path):
    """SIGKILL at random moments and inside saves, dropout on: bit-equal in the end."""
    tally = survivor.kills(tmp_path, 8)
    assert_all_survived(tally)
    assert tally.tried.total() == 8
    assert 1 <= tally.tried["SIGKILL in the middle of a save"] <= 2  # a slow machine may miss one


@pytest.mark.soak
def test_two_hundred_kills(tmp_path):
    """The same, 200 times."""
    assert_all_survived(survivor.kills(tmp_path, 200, seed=1))


def test_every_seventh_crash_point_of_a_save(tmp_path):
    """The process ends at a write, fsync, rename or unlink: a whole checkpoint is always there."""
    assert_all_survived(survivor.crash_points(tmp_path, every=7))


@pytest.mark.soak
def test_every_crash_point_of_a_save(tmp_path):
    """The same at each point."""
    assert_all_survived(survivor.crash_points(tmp_path))


def test_failing_disks(tmp_path):
    """Full, broken, forbidden, losing bytes: the old file stays, the run goes on, saves again."""
    assert_all_survived(survivor.faults(tmp_path))


def test_a_thousand_damaged_files(tmp_path):
    """Flipped bits and truncations of checkpoint, weights file and token cache are all found.

    A digest of the tensors alone left the padding between them and the archive's own records open.
    """
    tally = survivor.corruption(tmp_path, 1200)
    assert_all_survived(tally)
    assert tally.tried.total() == 1200


@pytest.mark.skipif(os.name == "nt", reason="Windows raises SIGTERM by ending the process")
def test_signals_in_every_phase(tmp_path):
    """While tokenizing, in the first step, validating, saving, finetuning and generating."""
    assert_all_survived(survivor.signals(tmp_path))


def test_a_second_ctrl_c_quits_at_once(text, monkeypatch):
    """In the middle of a save: the one before stays whole, nothing half-written is left."""
    calls, real = [], utils.verify_seal

    def twice(path):
        calls.append(path.name)
        if "step-6" in path.name:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return real(path)

    monkeypatch.setattr(utils, "verify_seal", twice)
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
            patch.setattr(run_llama, "free_disk", lambda folder: 10**9)  # it filled up later
            status, said = run_here(tmp_path, *words)
        assert status == 1 and "No space left" in said and "warning: checkpoint" in said
        assert said.splitlines()[-1].count("error:") == 1
        found, payload = RunFolder(disk, "pretrain").find_checkpoint("auto")
        assert payload["progress"]["step"] >= 3
        for path in disk.glob("*.pt"):
            load_checkpoint(path)
        assert not list(disk.glob(".*.tmp"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_records_that_the_disk_does_not_take_come_later(tmp_path, capsys):
    """A full disk ended the run in the middle of a line of metrics.jsonl."""
    log = utils.MetricsLog(tmp_path / "metrics.jsonl", last_step=0)
    log.append({"step": 1})
    log.file.close()
    log.file = open("/dev/full", "wb") if Path("/dev/full").exists() else None
    log.append({"step": 2})
    log.append({"step": 3})
    log.rewind(2)
    log.append({"step": 3})
    log.close()
    assert [record["step"] for record in utils.read_records(log.path)] == [1, 2, 3]
    assert "No space left" in capsys.readouterr().out or not Path("/dev/full").exists()


class TornFile(io.BytesIO):
    """A disk that fills up in the middle of a line."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def write(self, data):
        with self.path.open("ab") as file:
            file.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_line_that_was_cut_is_written_again(tmp_path, capsys):
    """By a failing disk in the run, and by a crash before it: each step stands there once."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    log = utils.MetricsLog(path, last_step=2, window=2)
    assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'
    log.close()
    log.file = TornFile(path)
    log.append({"step": 3})
    assert path.read_text(encoding="utf-8").endswith('{"step": 2}\n{"ste')
    log.append({"step": 4})
    log.close()
    assert [record["step"] for record in utils.read_records(path)] == [1, 2, 3, 4]
    assert "No space left" in capsys.readouterr().out


def test_a_long_run_does_not_grow_by_its_records(tmp_path):
    """All records once stayed in memory: a gigabyte in a run of a million steps."""
    log = utils.MetricsLog(tmp_path / "metrics.jsonl", last_step=0, window=3)
    for step in range(1, 11):
        log.append({"step": step})
    assert [record["step"] for record in log.records] == [8, 9, 10] and not log.unwritten
    log.rewind(5)
    assert [record["step"] for record in log.records] == [3, 4, 5]
    log.append({"step": 6})
    log.close()
    again = utils.MetricsLog(log.path, last_step=6, window=3)
    again.close()
    assert [record["step"] for record in again.records] == [4, 5, 6]
    assert [record["step"] for record in utils.read_records(log.path)] == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_golden_files_load_for_ever(name, tmp_path):
    """Files of each format version: content, model, optimizer, progress and random numbers."""
    path = GOLDEN / name
    payload = load_checkpoint(path)
    assert content_digest(payload) == EXPECTED[name]["content"]
    model = load_pretrained(path)
    if "weights" in name:
        for found, made in zip(model.parameters(), tiny_model().parameters(), strict=True):
            assert torch.equal(found, made)
        return
    utils.check_resumable(path, payload)
    before = utils.random_state()
    try:
        assert make_golden.next_random(payload["rng"]) == EXPECTED[name]["next"]
    finally:
        utils.restore_random_state(before)
    progress = run_llama.Progress(**payload["progress"])
    assert progress.step == 1 and (progress.split, progress.lr_scale) == (
        (1, 1.0) if "v1" in name else (2, 0.5)
    )
    optimizer = run_llama.AdamW(run_llama.parameter_groups(tiny_model(), 0.1), lr=1e-3)
    optimizer.load_state_dict(payload["optimizer"])
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_what_is_written_today_is_the_newest_golden():
    """A change of the content needs a new format version, and golden files of it."""
    name = f"weights-v{llama.FORMAT_VERSION}.pt"
    payload = make_golden.weights() | {"format_version": llama.FORMAT_VERSION}
    assert content_digest(payload) == EXPECTED[name]["content"]


def test_damaged_files_of_version_1_are_found():
    """They carry a digest of their content: a flipped bit changes nothing that is loaded, or it is
    found."""
    chance, content = random.Random(0), (GOLDEN / "weights-v1.pt").read_bytes()
    expected, found = EXPECTED["weights-v1.pt"]["content"], 0
    path = Path("damaged.pt")
    for _ in range(150):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        if not detected(lambda: load_pretrained(path)):
            assert content_digest(load_checkpoint(path)) == expected
        else:
            found += 1
    assert found > 75


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    """Rather than misread: the remedy is a newer program."""
    path = tmp_path / "new.pt"
    torch.save(make_golden.weights() | {"format_version": 99}, path)
    with pytest.raises(UsageError, match="format version 99.*update"):
        load_pretrained(path)


def test_a_seal_that_is_gone_is_missed(tmp_path):
    """A file cut off before its checksum is still an archive that loads."""
    path = tmp_path / "weights.pt"
    save_checkpoint(path, make_golden.weights())
    assert verify_seal(path)
    content = path.read_bytes()
    unsealed = content[: content.rindex(llama.SEAL) - 2] + b"\0\0"
    path.write_bytes(unsealed)
    torch.load(path, weights_only=True)
    with pytest.raises(UsageError, match="checksum is gone"):
        load_pretrained(path)


def test_any_program_reads_a_sealed_file(tmp_path):
    """The original loads with torch.load; an archive tool sees an ordinary archive."""
    path = tmp_path / "weights.pt"
    save_checkpoint(path, make_golden.weights())
    assert torch.load(path, weights_only=True).keys() >= {"model", "model_args"}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(llama.SEAL)


class Malicious:
    """What a pickle can do to who loads it."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("load", [load_pretrained, load_checkpoint, utils.peek, load_payload])
def test_code_in_a_file_is_never_run(tmp_path, load):
    """Also under a valid checksum, which anybody can make."""
    path = tmp_path / "evil.pt"
    payload = small_payload(1) | {"options": Malicious()}
    save_checkpoint(path, payload)
    assert verify_seal(path)
    with pytest.raises(UsageError, match="none of it was run"):
        load(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UsageError):
        load(path)
    assert not Path("executed").exists()


@pytest.mark.parametrize("load", [load_pretrained, load_checkpoint, load_payload])
def test_absurd_claims_are_refused_without_allocating(tmp_path, load):
    """A deflated gigabyte of zeros, and a tensor of 2^40 numbers over a storage of four."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_checkpoint(tmp_path / "sound.pt", make_golden.weights())
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "sound.pt") as sound, zipfile.ZipFile(bomb, "w") as archive:
        for part in sound.infolist():
            content = sound.read(part)
            if part.filename.endswith("/data/0"):
                content = bytes(300_000_000)
            archive.writestr(part.filename, content, zipfile.ZIP_DEFLATED)
    del content
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="claims 300"):
        load(bomb)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000
    claim = tmp_path / "claim.pt"
    payload = make_golden.weights()
    payload["model"]["norm.weight"] = torch.zeros(4)
    torch.save(payload, tmp_path / "small.pt")
    with (
        zipfile.ZipFile(tmp_path / "small.pt") as sound,
        zipfile.ZipFile(claim, "w") as archive,
    ):
        for part in sound.infolist():
            content = sound.read(part)
            if part.filename.endswith("data.pkl"):  # the shape (4,) becomes (2^31 - 1,)
                assert content.count(b"K\x04\x85") >= 1
                content = content.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")
            archive.writestr(part.filename, content)
    with pytest.raises(UsageError):
        load(claim)


def test_a_weights_file_is_no_state_of_a_run(tmp_path, text):
    """`--resume final-model.pt` ended in a KeyError."""
    save_checkpoint(tmp_path / "final-model.pt", make_golden.weights())
    status, said = run_here(text, "--resume", "final-model.pt", "--save_dir", ".")
    assert status == 2 and "final-model.pt is a weights file" in said


def test_a_sound_file_of_other_things_is_one_line(text):
    """The checksum only says that a file is what somebody wrote."""
    assert run_here(text, "--max_steps", "3", "--save_dir", "run")[0] == 0
    path = text / "run" / "pretrain-step-3.pt"
    payload = load_checkpoint(path)
    for change in (
        {"progress": {"step": 3, "x": 1}},
        {"optimizer": {}},
        {"rng": {}},
        {"model": {}},
    ):
        save_checkpoint(path, payload | change)
        status, said = run_here(text, "--max_steps", "3", "--save_dir", "run", "--resume", "auto")
        assert status == 2 and "Traceback" not in said and "error:" in said


# ---------------------------------------------------------------------------- the run's folder


def test_keep_last_counts_only_what_the_run_wrote(tmp_path):
    """Neither other runs' files, nor best and final models, nor damaged or later checkpoints."""
    folder = RunFolder(tmp_path, "pretrain")
    for step in range(1, 7):
        save_checkpoint(folder.step_checkpoint(step), small_payload(step, "mine"))
    save_checkpoint(folder.step_checkpoint(50), small_payload(50, "another's"))
    save_checkpoint(folder.epoch_checkpoint(1), small_payload(2, "mine"))
    for name in ("final-model.pt", "best-model.pt", "pretrain-step-1-copy.pt"):
        save_checkpoint(tmp_path / name, small_payload(1, "mine"))
    folder.step_checkpoint(3).write_bytes(b"damaged")
    folder.prune(2, run_id="mine", step=5)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "pretrain-step-3.pt", "pretrain-step-4.pt", "pretrain-step-5.pt", "pretrain-step-6.pt",
        "pretrain-step-50.pt", "pretrain-epoch-1.pt", "final-model.pt", "best-model.pt",
        "pretrain-step-1-copy.pt",
    }  # fmt: skip


def test_the_newest_is_chosen_by_its_step_not_its_date(tmp_path, capsys):
    """Copying a folder gives its files new dates, in any order."""
    folder = RunFolder(tmp_path, "pretrain")
    for place, (path, step) in enumerate([
        (folder.epoch_checkpoint(2), 20), (folder.step_checkpoint(25), 25),
        (folder.step_checkpoint(9), 9), (folder.step_checkpoint(15), 15),
    ]):  # fmt: skip
        save_checkpoint(path, small_payload(step))
        os.utime(path, (1e9 + place, 1e9 + place))
    content = folder.step_checkpoint(25).read_bytes()
    assert folder.find_checkpoint("auto")[1]["progress"]["step"] == 25
    folder.step_checkpoint(25).write_bytes(content[:-500])
    path, payload = folder.find_checkpoint("auto")
    assert path.name == "pretrain-epoch-2.pt" and payload["progress"]["step"] == 20
    assert "skipped" in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_begins_anew(text):
    """--resume auto said to start without it, and the start said to add --resume auto."""
    assert run_here(text, "--max_steps", "3", "--save_dir", "run")[0] == 0
    for path in (text / "run").glob("*.pt"):
        path.unlink()
    status, said = run_here(text, "--max_steps", "3", "--save_dir", "run", "--resume", "auto")
    assert status == 0 and "begins anew" in said
    assert [record["step"] for record in records(text)] == [1, 2, 3]


def test_a_run_stopped_for_want_of_progress_stays_stopped(text):
    """Killed after its last checkpoint, it went on training past its early end."""
    survivor.write_labelled(text)
    assert run_here(text, "--max_steps", "2", "--save_dir", "model")[0] == 0
    words = (
        "--option finetune --pretrained_model_path model/final-model.pt --train toy-train.txt "
        "--dev toy-train.txt --save_dir run --lr 1e-9 --epochs 9 --early_stopping 1 "
        "--save_interval 1"
    ).split()
    status, said = run_here(text, *words)
    assert status == 0 and "stopped: no better dev_accuracy for 1 epochs" in said
    before = (text / "run" / "finetune-toy-metrics.jsonl").read_bytes()
    assert run_here(text, *words, "--resume", "auto")[0] == 0
    assert (text / "run" / "finetune-toy-metrics.jsonl").read_bytes() == before


def test_what_a_killed_run_left_half_written_is_removed(text):
    """A gigabyte for each kill; other files' temporaries are not ours."""
    (text / "run").mkdir()
    for name in (".pretrain-step-3.pt.123.tmp", ".final-model.pt.9.tmp", ".notes.txt.9.tmp"):
        (text / "run" / name).write_bytes(b"half")
    assert run_here(text, "--max_steps", "1", "--save_dir", "run")[0] == 0
    assert [path.name for path in (text / "run").glob(".*")] == [".notes.txt.9.tmp"]


def test_two_runs_in_one_folder(text):
    """The second is refused and names the first; a run of another kind has its own files."""
    (text / "run").mkdir()
    with RunFolder(text / "run", "pretrain").locked():
        status, said = run_here(text, "--max_steps", "1", "--save_dir", "run")
        assert status == 2 and f"process {os.getpid()} on " in said and said.count("error:") == 1
        with RunFolder(text / "run", "finetune-sst").locked():
            pass
    assert run_here(text, "--max_steps", "1", "--save_dir", "run")[0] == 0
    assert not (text / "run" / "run.lock").exists()


@pytest.mark.parametrize("change", ["dead", "reused", "garbled"])
def test_stale_locks_are_taken_over(text, change):
    """Of a process that has ended, whose number another one may have now, or cut off."""
    lock = text / "run" / "run.lock"
    lock.parent.mkdir()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    mine = utils.process_name(os.getpid())
    content = {
        "dead": json.dumps(mine | {"pid": child.pid}),
        "reused": json.dumps(mine | {"began": 1}),
        "garbled": '{"pid',
    }[change]
    if change == "reused" and mine["began"] is None:
        pytest.skip("this system does not tell when a process began")
    lock.write_text(content, encoding="utf-8")
    os.utime(lock, (1e9, 1e9))
    status, said = run_here(text, "--max_steps", "1", "--save_dir", "run")
    assert status == 0, said
    assert not lock.exists()


def test_a_lock_of_another_machine_is_respected(text):
    """Nothing can be known of its process from here; what to remove is said."""
    lock = text / "run" / "run.lock"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "began": 5}), encoding="utf-8")
    status, said = run_here(text, "--max_steps", "1", "--save_dir", "run")
    assert status == 2 and "elsewhere" in said and "run.lock" in said
    assert lock.exists()


# ---------------------------------------------------------------------------- numbers going wrong


class Poison:
    """Makes the loss of steps infinite, by the number of times a step's loss is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
        real = run_llama.optimizer_step

        def step(run):
            task = run.task
            if run.progress.step + 1 in bad and run.progress.lr_scale == 1.0:
                sick = lambda *inputs: task.loss(*inputs) * math.inf  # noqa: E731
                run.task = run_llama.dataclasses.replace(task, loss=sick)
            try:
                return real(run)
            finally:
                run.task = task

        monkeypatch.setattr(run_llama, "optimizer_step", step)


def test_a_step_that_is_not_finite_is_left_out_and_located(text, monkeypatch):
    """Before the update; the message names file and place of the chunks."""
    Poison(monkeypatch, {4})
    status, said = run_here(text, "--max_steps", "6", "--save_dir", "run")
    assert status == 0
    (line,) = [line for line in said.splitlines() if "skipped" in line]
    assert "step 4 skipped: its loss is not finite" in line
    assert "text.jsonl, token " in line and "and 2 more" in line
    assert records(text)[3]["loss"] is None and records(text)[4]["loss"] > 0
    for name in ("pretrain-step-6.pt", "pretrain-step-3.pt"):
        weights = load_checkpoint(text / "run" / name)["model"]
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_ten_bad_steps_roll_back_with_half_the_learning_rate(text, monkeypatch):
    """To the last checkpoint before them, not to one among them; each step recorded once."""
    Poison(monkeypatch, set(range(7, 40)))
    words = "--max_steps 20 --save_dir run --lr_scheduler constant --warmup_steps 0".split()
    status, said = run_here(text, *words)
    assert status == 0 and "back to step 6, with 0.5 of the learning rate" in said
    assert [record["step"] for record in records(text)] == list(range(1, 21))
    rates = [record["lr"] for record in records(text)]
    assert rates[:6] == [0.01] * 6 and rates[6:] == [0.005] * 14
    progress = load_checkpoint(text / "run" / "pretrain-step-20.pt")["progress"]
    assert progress["lr_scale"] == 0.5 and progress["skipped"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--on_nonfinite stop", "the last checkpoint is as it was"),
        ("--checkpoint_interval 0", "no earlier checkpoint"),
    ],
)
def test_where_going_back_is_not_wanted_or_not_possible(text, monkeypatch, words, message):
    """One line, exit status 1, and what is on the disk stays."""
    Poison(monkeypatch, set(range(5, 40)))
    status, said = run_here(text, "--max_steps", "30", "--save_dir", "run", *words.split())
    assert status == 1 and message in said and said.count("error:") == 1
    if "stop" in words:
        steps = [p.name for p in (text / "run").glob("*.pt")]
        assert "pretrain-step-12.pt" in steps


def test_going_back_ends_some_time(text, monkeypatch):
    """A text that is bad at any learning rate must not be tried for ever."""
    real = run_llama.backward
    monkeypatch.setattr(run_llama, "backward", lambda run, *rest: real(run, *rest) * (
        math.nan if run.progress.step >= 6 else 1))  # fmt: skip
    status, said = run_here(text, "--max_steps", "30", "--save_dir", "run")
    assert status == 1 and said.count("back to step 6") == 4 and "1/16" in said


def test_a_batch_without_targets_is_not_a_nan(text, monkeypatch):
    """Nothing to predict is a loss of 0 and no gradient, not 0 / 0."""
    real = run_llama.text_batch

    def empty(*arguments):
        batch = real(*arguments)
        targets = torch.full_like(batch.inputs[1], run_llama.IGNORE_INDEX)
        return run_llama.dataclasses.replace(batch, inputs=(batch.inputs[0], targets), targets=0)

    monkeypatch.setattr(run_llama, "text_batch", empty)
    status, said = run_here(text, "--max_steps", "2", "--save_dir", "run", "--val_fraction", "0")
    assert status == 0 and "not finite" not in said and records(text)[0]["loss"] == 0


def test_a_loss_spike_is_reported(capsys):
    """Six standard deviations above the last hundred; a few losses tell nothing."""
    earlier = [{"loss": 2.0 + 0.01 * (i % 5)} for i in range(60)] + [{"loss": None}]
    for loss, spikes in ((2.03, False), (2.5, True), (None, False)):
        record = {"step": 62, "loss": loss}
        run_llama.note_spike(record, earlier)
        assert ("loss_spike" in record) == spikes
        assert ("loss spike at step 62: 2.500" in capsys.readouterr().out) == spikes
    record = {"step": 3, "loss": 9.0}
    run_llama.note_spike(record, earlier[:5])
    assert "loss_spike" not in record


# ---------------------------------------------------------------------------- out of memory


class LittleMemory:
    """A device on which more than `rows` sequences at once do not fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception) -> None:
        real = nn.Embedding.forward

        def forward(module, tokens):
            if module.training and len(tokens) > rows:
                raise error
            return real(module, tokens)

        monkeypatch.setattr(nn.Embedding, "forward", forward)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_micro_batch(text, monkeypatch, error):
    """Same global batch, same order: without dropout the losses are those of enough memory."""
    words = "--max_steps 6 --dropout 0 --save_dir".split()
    assert run_here(text, *words, "enough")[0] == 0
    (text / "enough").rename(text / "run")
    expected = records(text)
    (text / "run").rename(text / "enough")
    LittleMemory(monkeypatch, 1, error)
    status, said = run_here(text, *words, "run")
    assert status == 0
    lines = [line for line in said.splitlines() if line.startswith("out of memory")]
    assert len(lines) == 2 and "each micro-batch of 4 is trained on in 4 parts" in lines[1]
    for one, other in zip(records(text), expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert (one["tokens"], one["lr"]) == (other["tokens"], other["lr"])


def test_the_split_is_remembered_and_resumes_bit_equal(text, monkeypatch):
    """A resumed run does not run out of memory again, and draws the same dropout."""
    LittleMemory(monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory"))
    assert run_here(text, "--max_steps", "6", "--save_dir", "whole")[0] == 0
    assert run_here(text, "--max_steps", "3", "--save_dir", "run")[0] == 0
    status, said = run_here(text, "--max_steps", "6", "--save_dir", "run", "--resume", "auto")
    assert status == 0 and "out of memory" not in said
    one, two = (load_checkpoint(text / name / "pretrain-step-6.pt") for name in ("whole", "run"))
    for part in ("model", "optimizer", "rng", "progress"):
        assert content_digest(one[part]) == content_digest(two[part])


def test_one_sequence_that_does_not_fit(text, monkeypatch):
    """There is nothing left to halve: one line with what helps."""
    LittleMemory(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    status, said = run_here(text, "--max_steps", "6", "--save_dir", "run")
    assert status == 1 and "one sequence at a time" in said and "--max_seq_len" in said


def test_other_errors_are_not_taken_for_it(monkeypatch):
    """A bug must show."""
    assert not run_llama.is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RunFailed):
        run_llama.halve_micro_batch(run_llama.Progress(split=4), 4)


# ---------------------------------------------------------------------------- odd input

FLAGS = [f"--{field.name}" for field in run_llama.dataclasses.fields(Options)]
WORDS = st.one_of(
    st.sampled_from([*FLAGS, "auto", "pretrain", "0", "-1", "1e9", "nan", "inf", "x.txt", ""]),
    st.text(max_size=12),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(WORDS, max_size=6))
def test_any_command_line_is_read_or_refused(words):
    """Options, or an error of lines that a person can read; never another exception."""
    try:
        with redirect_stdout(io.StringIO()):
            assert isinstance(parse_options(words), Options)
    except UsageError as error:
        assert str(error).strip()
    except SystemExit as asked_for_help:
        assert asked_for_help.code == 0


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
    max_examples=150,
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
        lambda: read_labelled(path, n_labels=2),
    ):
        try:
            read()
        except UsageError as error:
            assert path.name in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("length", [15, 16, 17, 18])
def test_texts_of_about_a_chunk_train(tmp_path, length):
    """chunk - 1, chunk and chunk + 1 tokens, BOS and EOS among them."""
    words = "a " * (length - 3)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": words.strip()}), encoding="utf-8")
    status, said = run_here(tmp_path, "--epochs", "1", "--save_dir", "run", "--val_fraction", "0")
    assert status == 0, said
    assert len(records(tmp_path)) == 1
