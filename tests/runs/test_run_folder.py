"""A run's folder: its files, the lock on it, which checkpoint is resumed and which are kept."""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import several
from golden import make_golden
from running import assert_same
from survivor import small_payload, start_process

from config import parse_options
from minllama.cli.command_line import own_script, quoted
from minllama.formats.pt_file import STATE_FILE, save_pt
from minllama.machine.ranks import Ranks
from minllama.runs import report, run_folder
from minllama.runs.checkpoints import Checkpoints, read_on_main
from minllama.runs.run_folder import RunFolder, files_written
from minllama.system.errors import UsageError
from minllama.training.identity import command_to_train_on

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def folder() -> RunFolder:
    """The folder of a pretraining."""
    Path("run").mkdir()
    return RunFolder(Path("run"), "pretrain")


def names(folder: RunFolder) -> set[str]:
    return {path.name for path in folder.path.iterdir()}


def add(folder: RunFolder, *steps: int, run_id: str = "mine", skipped: int = 0) -> None:
    """Write a checkpoint of each step."""
    for step in steps:
        progress = {"step": step, "skipped": skipped}
        save_pt(folder.step_checkpoint(step), small_payload(step, run_id) | {"progress": progress})


def add_sharded(folder: RunFolder, step: int, run_id: str = "mine") -> Path:
    """Write a sharded checkpoint of one rank."""
    path = folder.path / f"pretrain-step-{step}-sharded"
    payload = small_payload(step, run_id)
    own = {key: payload[key] for key in ("model", "optimizer")}
    path.mkdir()
    shards = {"shard-0.pt": save_pt(path / "shard-0.pt", own)}
    save_pt(path / STATE_FILE, payload | {"model": {}, "optimizer": {}, "shards": shards})
    return path


# ---------------------------------------------------------------------------- the lock


def hold_lock(folder: str) -> None:
    """Hold the lock until killed."""
    with RunFolder(Path(folder), "pretrain").locked(Ranks()):
        Path(folder, "held").touch()
        time.sleep(60)


@pytest.fixture
def other_process(folder):
    """Another process that holds the lock."""
    process = start_process(hold_lock, str(folder.path.absolute()))
    while not Path("run", "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_until_the_first_is_gone(folder, other_process):
    """It names process and host. A process that is killed leaves no lock: the system frees it."""
    for _ in range(2):
        with pytest.raises(UsageError) as error, folder.locked(Ranks()):
            pytest.fail("two runs in one folder")
        message = str(error.value)
        assert "\n" not in message and message.startswith("--save_dir run: ")
        assert f"process {other_process.pid} on {platform.node()} is running in it" in message
    with RunFolder(folder.path, "finetune-sst").locked(Ranks()):
        pass  # a run of another kind has its own files
    other_process.kill()
    other_process.join()
    with folder.locked(Ranks()):
        assert Path("run", "run.lock").read_text("utf-8").startswith(f"{os.getpid()} ")


def test_the_lock_is_free_after_a_run_however_it_ends(folder):
    """run.lock may stay: it is the open file that is locked."""
    for error in (RuntimeError, KeyboardInterrupt, None):
        try:
            with folder.locked(Ranks()):
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt):
            pass
        with folder.locked(Ranks()):
            pass


@pytest.mark.skipif(os.name == "nt", reason="Windows does not remove an open file")
def test_a_run_that_was_refused_leaves_no_lock(folder):
    """A refused --resume left a `run.lock` in a folder where no run had ever been."""
    with pytest.raises(UsageError), folder.locked(Ranks()):
        raise UsageError("--pretrain_data x: no such file")
    assert not Path("run", "run.lock").exists()
    folder.add_start({"options": {}})
    with pytest.raises(UsageError), folder.locked(Ranks()):
        raise UsageError("--pretrain_data x: no such file")
    assert Path("run", "run.lock").exists()  # beside a run it is one of its files


@pytest.mark.skipif(os.name == "nt", reason="Windows does not rename a folder in use")
def test_a_run_that_was_refused_leaves_the_lock_of_the_one_in_its_place(folder):
    """Where the folder was replaced meanwhile it would have removed another run's lock."""
    with pytest.raises(UsageError), folder.locked(Ranks()):
        Path("run").rename("elsewhere")
        Path("run").mkdir()
        Path("run", "run.lock").touch()
        raise UsageError("--pretrain_data x: no such file")
    assert Path("run", "run.lock").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"pid', b"x" * 10_000])
def test_a_lock_file_that_nobody_holds_is_taken(folder, content):
    """Whatever is in it: of an earlier version, cut off, another machine's."""
    Path("run", "run.lock").write_bytes(content)
    with folder.locked(Ranks()):
        assert Path("run", "run.lock").read_text("utf-8").startswith(f"{os.getpid()} ")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other locks")
@pytest.mark.parametrize("content", ["", "12", "\udcff"])
def test_a_lock_that_does_not_say_whose_it_is(folder, content):
    """Another process has opened it and not written yet."""
    import fcntl

    path = Path("run", "run.lock")
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is running in it"), folder.locked(Ranks()):
            pytest.fail("two runs in one folder")


@pytest.mark.skipif(os.name == "nt", reason="Windows has other locks")
def test_a_file_system_without_locks(folder, monkeypatch, capsys):
    """Some network file systems: the run goes on, and says what it cannot prevent."""
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.locked(Ranks()):
        pass
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such thing")
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(folder, kind):
    """A link there would have another file of ours emptied, a pipe would be waited for."""
    path = Path("run", "run.lock")
    Path("victim").write_text("dear", encoding="utf-8")
    if "link" in kind:
        path.symlink_to(Path("victim" if kind == "link" else "new").absolute())
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UsageError, match=r"run\.lock") as error, folder.locked(Ranks()):
        pytest.fail("locked")
    assert "\n" not in str(error.value)
    assert Path("victim").read_text(encoding="utf-8") == "dear" and not Path("new").exists()


class TwoMachines(Ranks):
    """Rank 0 on one machine, whose folder this one does not see."""

    def on_main(self, work):
        work()
        return "1 elsewhere abc"

    def on_all(self, work):
        return work()


def test_machines_have_to_share_the_folder(folder, monkeypatch):
    """Else each would leave half of the shards where nobody looks for them."""
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)
    with (
        pytest.raises(UsageError, match="machine 1 .* does not see"),
        folder.locked(TwoMachines(world_size=2, rank=1, node=1, nodes=2)),
    ):
        pytest.fail("locked")


# ---------------------------------------------------------------------------- files


def test_runs_of_several_kinds_share_a_folder(folder):
    """Each sees and removes its own files alone, whatever the data sets are called."""
    other = RunFolder(folder.path, "finetune-sst")
    third = RunFolder(folder.path, "finetune-sst-step-1")
    mine = {"final-model.pt", "metrics.jsonl", "run.json", "pretrain-step-3.pt",
            "pretrain-epoch-1.pt", "pretrain-step-4-sharded"}  # fmt: skip
    others = {"finetune-sst-final-model.pt", "finetune-sst-epoch-2.pt", "finetune-sst-run.json"}
    thirds = {"finetune-sst-step-1-step-1.pt", "finetune-sst-step-1-best-model.pt"}
    strange = {"notes.txt", "pretrain-step-x.pt", "pretrain-step-3.pt.bak", "my-pretrain-step-3.pt",
               "final-model.pt.abandoned"}  # fmt: skip
    for name in mine | others | thirds | strange:
        (folder.path / name).write_bytes(b"x")
    (folder.path / "pretrain-step-4-sharded").unlink()
    (folder.path / "pretrain-step-4-sharded").mkdir()
    (folder.path / "pretrain-step-4-sharded" / STATE_FILE).write_bytes(b"x")
    for run, files in ((folder, mine), (other, others), (third, thirds)):
        run.file("run.json").unlink(missing_ok=True)
        run.add_start({})
        files.add(run.file("run.json").name)
        assert {path.name for path in run.own_files()} == files
    for name in ("pretrain-step-5.pt.abandoned", "pretrain-epoch-2.pt.abandoned"):
        (folder.path / name).write_bytes(b"x")  # what a resumed run of this prefix set aside
    for run in (other, folder):
        run.clear()
        assert not run.own_files()
    assert names(folder) == thirds | strange


def test_a_folder_with_a_run_in_it_is_not_written_over(folder):
    """Unless that is resumed or given up."""
    folder.check_free(resume=False, overwrite=False)
    folder.add_start({})
    with pytest.raises(UsageError, match=r"already holds a run \(run.json\).*--overwrite"):
        folder.check_free(resume=False, overwrite=False)
    folder.check_free(resume=True, overwrite=False)
    folder.check_free(resume=False, overwrite=True)
    RunFolder(folder.path, "finetune-sst").check_free(resume=False, overwrite=False)


def test_what_no_run_wrote_is_not_overwritten(folder):
    """--overwrite deleted any folder tensorboard/, and any report.html or final-model.pt."""
    for name in ("report.html", "final-model.pt", "pretrain-step-3.pt"):
        (folder.path / name).write_bytes(b"mine")
        with pytest.raises(UsageError, match=rf"--save_dir run: .*{name} .* move it"):
            folder.check_free(resume=False, overwrite=True)
        folder.clear()
        assert (folder.path / name).read_bytes() == b"mine"
        (folder.path / name).unlink()
    folder.add_start({"files": files_written({"tensorboard": False, "profile": None})})
    (folder.path / "report.html").write_bytes(b"the run's")
    folder.check_free(resume=False, overwrite=True)
    (folder.path / "tensorboard").mkdir()
    with pytest.raises(UsageError, match=r"--save_dir run: .*tensorboard .* move it"):
        folder.check_free(resume=False, overwrite=True)
    (folder.path / "loss-curve.svg").write_bytes(b"mine")  # a name that earlier versions used
    folder.clear()
    assert names(folder) == {"tensorboard", "loss-curve.svg"}


def test_overwriting_that_was_killed_can_be_repeated(folder, monkeypatch):
    """The record went before the checkpoints, which were then nobody's, and in the way for ever."""
    folder.add_start({"files": files_written({})})
    add(folder, 3, 6)
    for name in ("final-model.pt", "report.html"):
        (folder.path / name).write_bytes(b"the run's")
    real, left = run_folder.remove, [3]

    def remove(path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "remove", remove)
        with pytest.raises(KeyboardInterrupt):
            folder.clear()
    folder.check_free(resume=False, overwrite=True)
    folder.clear()
    assert not names(folder)


def test_what_a_killed_run_left_half_written_is_removed(folder):
    """A gigabyte for each kill; other files' temporaries are not ours."""
    ours = [".pretrain-step-3.pt.01234567.tmp", ".final-model.pt.89abcdef.tmp"]
    others = [".notes.txt.01234567.tmp", ".finetune-sst-best-model.pt.01234567.tmp"]
    for name in ours + others:
        (folder.path / name).write_bytes(b"half")
    unfinished = folder.path / "pretrain-step-6-sharded"
    unfinished.mkdir()
    (unfinished / "shard-0-01234567.pt").write_bytes(b"half")
    add_sharded(folder, 3)
    folder.remove_incomplete()
    assert names(folder) == {*others, "pretrain-step-3-sharded"}


def test_what_a_killed_second_save_of_a_step_left_is_removed(folder):
    """New shards and temporaries beside those that state.pt names, gigabytes for each kill."""
    path = add_sharded(folder, 3)
    sound = {file.name for file in path.iterdir()}
    left = ["shard-0-01234567.pt", ".shard-1-01234567.pt.89abcdef.tmp", ".state.pt.01234567.tmp"]
    for name in [*left, "notes.txt"]:
        (path / name).write_bytes(b"half")
    folder.remove_incomplete()
    assert {file.name for file in path.iterdir()} == sound | {"notes.txt"}
    assert folder.find_checkpoint("auto")[0] == path
    (path / STATE_FILE).write_bytes(b"damaged")  # what it named is not known
    folder.remove_incomplete()
    assert (path / "shard-0.pt").exists()


def test_every_start_is_on_record(folder):
    """The first and all that resume."""
    assert folder.starts() == []
    for number in range(3):
        folder.add_start({"number": number})
    assert folder.starts() == [{"number": number} for number in range(3)]


@pytest.mark.parametrize(
    "content", ["", '{"starts": [{"number', "[]", "{}", '{"starts": {}}', '{"starts": [1]}', "\0"]
)
def test_a_damaged_run_json_is_kept_aside(folder, content, capsys):
    """It ended every resume in an error, though nothing in it is needed."""
    path = folder.file("run.json")
    path.write_text(content, encoding="utf-8")
    assert folder.starts() == []
    folder.add_start({"number": 1})
    assert folder.starts() == [{"number": 1}]
    assert Path("run", "run.json.damaged").read_text(encoding="utf-8") == content
    (line,) = capsys.readouterr().out.splitlines()
    assert "run.json was damaged" in line and "run.json.damaged" in line
    assert json.loads(path.read_text(encoding="utf-8"))["starts"] == [{"number": 1}]


# ---------------------------------------------------------------------------- checkpoints


def prune(folder: RunFolder, keep_last: int) -> None:
    """As the run `mine` does that finds these files at its start."""
    checkpoints = Checkpoints(folder, Ranks(), sharded=False, keep_last=keep_last)
    checkpoints.list_own("mine")
    checkpoints.prune()


def test_keep_last_counts_only_what_the_run_wrote(folder):
    """Neither other runs' files, nor best and final models, nor damaged checkpoints."""
    add(folder, *range(1, 6))
    add(folder, 50, run_id="another's")
    for name in (
        "pretrain-epoch-1.pt",
        "final-model.pt",
        "best-model.pt",
        "pretrain-step-1-copy.pt",
    ):
        save_pt(folder.path / name, small_payload(2, "mine"))
    folder.step_checkpoint(3).write_bytes(b"damaged")
    prune(folder, 0)
    assert len(names(folder)) == 10
    prune(folder, 2)
    assert names(folder) == {
        "pretrain-step-3.pt", "pretrain-step-4.pt", "pretrain-step-5.pt",
        "pretrain-step-50.pt", "pretrain-epoch-1.pt", "final-model.pt", "best-model.pt",
        "pretrain-step-1-copy.pt",
    }  # fmt: skip


def test_sharded_checkpoints_are_found_and_pruned_like_others(folder, monkeypatch):
    """One that cannot be deleted whole is at least no checkpoint any more."""
    add(folder, 1, 4)
    for step in (2, 3):
        add_sharded(folder, step)
    assert folder.find_checkpoint("auto")[0].name == "pretrain-step-4.pt"
    prune(folder, 2)
    assert names(folder) == {"pretrain-step-3-sharded", "pretrain-step-4.pt"}
    folder.step_checkpoint(4).unlink()
    path, state = folder.find_checkpoint("auto")
    assert path.name == "pretrain-step-3-sharded" and state["progress"]["step"] == 3

    def rmtree(*_, **__) -> None:
        raise PermissionError("no")

    add(folder, 5)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", rmtree)
        prune(folder, 1)
    assert folder.checkpoints() == [folder.step_checkpoint(5)]
    folder.remove_incomplete()
    assert names(folder) == {"pretrain-step-5.pt"}


def test_the_newest_is_chosen_by_its_step_not_its_date(folder, capsys):
    """Copying a folder gives its files new dates, in any order."""
    for place, (path, step) in enumerate([
        (folder.epoch_checkpoint(2), 20), (folder.step_checkpoint(25), 25),
        (folder.step_checkpoint(9), 9), (folder.step_checkpoint(15), 15),
    ]):  # fmt: skip
        save_pt(path, small_payload(step))
        os.utime(path, (1e9 + place, 1e9 + place))
    content = folder.step_checkpoint(25).read_bytes()
    assert folder.find_checkpoint("auto")[1]["progress"]["step"] == 25
    folder.step_checkpoint(25).write_bytes(content[:-500])
    path, payload = folder.find_checkpoint("auto")
    assert path.name == "pretrain-epoch-2.pt" and payload["progress"]["step"] == 20
    assert "skipped" in capsys.readouterr().out


def test_of_two_of_one_step_the_later_is_chosen(folder):
    """A run that is stopped in an evaluation saves its step before the record is complete."""
    for path, step, pending in (
        (folder.step_checkpoint(20), 20, {"step": 20}),
        (folder.epoch_checkpoint(2), 20, None),
        (folder.step_checkpoint(40), 40, None),
        (folder.epoch_checkpoint(4), 40, {"step": 40}),
    ):
        progress = {"step": step, "skipped": 0, "pending": pending}
        save_pt(path, small_payload(step) | {"progress": progress})
    assert folder.find_checkpoint("auto")[0] == folder.step_checkpoint(40)
    for path in (folder.step_checkpoint(40), folder.epoch_checkpoint(4)):
        path.unlink()
    assert folder.find_checkpoint("auto")[0] == folder.epoch_checkpoint(2)


def test_a_file_under_a_checkpoints_name_that_is_none(folder, capsys):
    """A sound weights file, renamed, is skipped too."""
    add(folder, 3)
    save_pt(folder.step_checkpoint(9), make_golden.weights())
    assert folder.find_checkpoint("auto")[0] == folder.step_checkpoint(3)
    assert "skipped: " in capsys.readouterr().out
    prune(folder, 1)
    assert names(folder) == {"pretrain-step-3.pt", "pretrain-step-9.pt"}


def test_a_run_without_a_whole_checkpoint(folder):
    """None at all: it starts from the beginning. All of them damaged: the user decides."""
    assert folder.find_checkpoint("auto") is None
    (folder.path / "pretrain-step-6-sharded").mkdir()  # killed while it wrote the first one
    assert folder.find_checkpoint("auto") is None
    folder.step_checkpoint(3).write_bytes(b"damaged")
    with pytest.raises(UsageError, match="no whole pretrain checkpoint.*--overwrite"):
        folder.find_checkpoint("auto")


def test_a_named_checkpoint_is_taken_or_refused(folder):
    """No other one in its place."""
    add(folder, 3, 6)
    path = folder.step_checkpoint(3)
    found, payload = folder.find_checkpoint(str(path))
    assert found == path and payload["progress"]["step"] == 3
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="pretrain-step-3.pt"):
        folder.find_checkpoint(str(path))
    with pytest.raises(UsageError, match="no such file"):
        folder.find_checkpoint("run/pretrain-step-4.pt")


def test_going_back_passes_over_what_followed_bad_steps(folder):
    """And over other runs' checkpoints, later ones and damaged ones."""
    add(folder, 3, 6, 9)
    add(folder, 12, skipped=2)
    add(folder, 14, run_id="another's")
    assert folder.last_good("mine", 15)[0] == folder.step_checkpoint(9)
    assert folder.last_good("mine", 9)[1]["progress"]["step"] == 6
    folder.step_checkpoint(6).write_bytes(b"damaged")
    assert folder.last_good("mine", 9)[0] == folder.step_checkpoint(3)
    assert folder.last_good("mine", 3) is None


def test_a_future_that_was_given_up_is_set_aside(folder, capsys):
    """Else the next --resume auto would return to it."""
    add(folder, 3, 6)
    sharded = add_sharded(folder, 9)
    add(folder, 12, run_id="another's")
    folder.set_aside_later("mine", 3)
    assert names(folder) == {
        "pretrain-step-3.pt", "pretrain-step-6.pt.abandoned", f"{sharded.name}.abandoned",
        "pretrain-step-12.pt",
    }  # fmt: skip
    assert "set aside" in capsys.readouterr().out
    folder.set_aside_later("mine", 3)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "sharded",
    [False, True],
)
def test_a_future_is_given_up_twice(folder, sharded):
    """What was set aside before is replaced."""
    for _ in range(2):
        if sharded:
            add_sharded(folder, 6)
        else:
            add(folder, 6)
        folder.set_aside_later("mine", 3)
    assert len(names(folder)) == 1


def test_rank_0_alone_reads_a_checkpoint(folder):
    """Every rank once read all of it, which many machines ask of one network disk."""
    add(folder, 3, 6)
    read = []

    def on_rank(ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
        def find() -> tuple[Path, dict[str, Any]] | None:
            read.append(ranks.rank)
            return folder.find_checkpoint("auto")

        return read_on_main(ranks, find)

    (path, state), (told, shapes) = several.on_threads(2, on_rank)
    assert read == [0] and path == told == folder.step_checkpoint(6)
    assert shapes.keys() == state.keys() and shapes["progress"] == state["progress"]
    for name, tensor in state["model"].items():
        assert shapes["model"][name].is_meta and shapes["model"][name].shape == tensor.shape
    assert_same(state["rng"], shapes["rng"])
    assert read_on_main(Ranks(), lambda: None) is None
    assert read_on_main(Ranks(), lambda: (path, state))[1]["model"] == state["model"]


# ---------------------------------------------------------------------------- a run repeated


@pytest.mark.parametrize(
    "line",
    [
        "--option pretrain --epochs 7 --pretrain_data a 'b c' --save_dir run --use_gpu",
        "--option pretrain --pretrain_batch_size 4 --gradient_accumulation_steps 3 --val_data x",
        "--option pretrain --pretrain_batch_size 4 --global_batch_size 12 --compile off",
        "--option finetune --lr 1e-3 --train t --dev d --max_steps 3 --lora_rank 2",
    ],
)
def test_the_record_of_a_run_is_a_command_again(line, tmp_path, monkeypatch):
    """Who found a run of last month had to put its flags together from run.json by hand."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    options = parse_options(shlex.split(line))
    folder = RunFolder(Path("run"), options.option)
    assert folder.repeating_words() == []
    settled = options.with_global_batch(1)
    folder.add_start({"options": settled.to_plain(), "processes": 1})
    folder.add_start({"options": {"option": "of a resume"}, "processes": 1})
    again = parse_options(folder.repeating_words())
    assert again.save_dir.name == "run-again"
    plain = again.with_global_batch(1).to_plain() | {
        "save_dir": options.save_dir.as_posix(),
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
    }
    assert plain == settled.to_plain()


def test_the_record_of_a_run_in_the_current_folder(tmp_path, monkeypatch):
    """`--save_dir .` ended in a traceback, since "." has no name."""
    Path(tmp_path, "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = RunFolder(Path("."), "pretrain")
    options = parse_options(["--option", "pretrain", "--save_dir", "."])
    folder.add_start({"options": options.to_plain()})
    assert parse_options(folder.repeating_words()).save_dir == Path("here-again")
    assert "--save_dir here-2" in command_to_train_on(options, folder, Ranks())


def test_a_damaged_record_is_no_command(tmp_path):
    """It is shown to be pasted into a shell."""
    folder = RunFolder(tmp_path, "pretrain")
    folder.add_start({"options": {"option": "pretrain", "epochs": "3; rm x"}})
    with pytest.raises(UsageError, match="run.json's --epochs is '3; rm x'"):
        folder.repeating_words()


@pytest.mark.parametrize(
    ("start", "launcher"),
    [
        ({}, "python"),
        ({"processes": 1, "machines": 1}, "python"),
        ({"processes": "8", "machines": None}, "python"),  # damaged
        ({"processes": 8, "machines": 1}, "torchrun --standalone --nproc_per_node=8"),
        (
            {"processes": 8, "machines": 2},
            "torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400",
        ),
    ],
)
def test_a_run_is_repeated_with_its_launcher(start, launcher, tmp_path):
    """Runs that torchrun had started were told to be repeated, and trained on, with `python`."""
    folder = RunFolder(tmp_path, "pretrain")
    options = parse_options(["--option", "pretrain"])
    assert folder.repeating_command() is None
    folder.add_start({"options": options.to_plain(), **start})
    again = folder.repeating_command()
    assert again.startswith(f"{launcher} {quoted(own_script())} --option pretrain --save_dir ")
    if launcher != "python" and start["machines"] == 1:
        ranks = Ranks(world_size=8)
        assert command_to_train_on(options, folder, ranks).startswith(f"{launcher} ")
    words = {"options": options.to_plain(), "environment": {"command": ["run_llama.py"]}}
    page = report.describe_run("run", report.Curves(), [words | start])
    assert page["command"] == f"{launcher} run_llama.py"
