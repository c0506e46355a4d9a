"""minllama/runs/metrics.py: a run's records in metrics.jsonl, over full disks, crashes, resumes."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minllama.runs.metrics import Metrics, read_records
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError


def open_metrics(folder: Path, done: int, **settings: bool) -> Metrics:
    """The metrics of a run, whose page is not written."""
    settings = {"last_step": lambda: 100, "save": lambda *_: None} | settings
    return Metrics(RunFolder(folder, "pretrain"), done, **settings)


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


class TornFile(io.BytesIO):
    """A disk that fills up in the middle of a line."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.real = path.open("ab")

    def fileno(self) -> int:
        return self.real.fileno()

    def write(self, data: bytes) -> int:
        with self.real:
            self.real.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_records_that_the_disk_does_not_take_come_later(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A full disk ended the run in the middle of a line of metrics.jsonl."""
    with open_metrics(tmp_path, 0) as metrics:
        metrics.append({"step": 1})
        metrics.file.close()
        metrics.file = TornFile(metrics.path)
        metrics.append({"step": 2})
        whole, torn = metrics.path.read_text(encoding="utf-8").split("\n")
        assert whole.startswith('{"step": 1, "elapsed": ') and torn == '{"ste'
        metrics.file = TornFile(metrics.path)
        metrics.append({"step": 3})
        metrics.rewind(2)
        metrics.append({"step": 3})
        metrics.sync()
    assert steps(metrics.path) == [1, 2, 3]
    assert "metrics.jsonl was not written" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_log_that_is_a_pipe_is_refused(tmp_path) -> None:
    """A resumed run waited at it for ever."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UsageError, match="metrics.jsonl: not a regular file"):
        open_metrics(tmp_path, 1)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_log_that_is_taken_away_begins_anew(replaced, tmp_path, capsys) -> None:
    """Its file removed, the run wrote into nowhere and ended with status 0 and without a log.

    What somebody put in its place, as editors do, is not cut off.
    """
    with open_metrics(tmp_path, 0) as metrics:
        metrics.append({"step": 1})
        metrics.path.rename(tmp_path / "elsewhere.jsonl")
        if replaced:
            metrics.path.write_bytes((tmp_path / "elsewhere.jsonl").read_bytes())
        metrics.append({"step": 2})
        metrics.append({"step": 3})
    assert steps(metrics.path) == ([1, 2, 3] if replaced else [2, 3])
    assert capsys.readouterr().out.count("was removed, renamed or replaced") == 1
    with open_metrics(tmp_path, 3):
        assert ("lacks 1 of 3 steps" in capsys.readouterr().out) != replaced


@pytest.mark.parametrize("value", ["1" + "0" * 400, '"x"', "[]", "NaN", "{}", "-Infinity"])
@pytest.mark.parametrize("name", ["step", "loss", "val_loss", "val_perplexity", "elapsed"])
def test_a_line_whose_figures_are_none_is_left_out(name, value, tmp_path) -> None:
    """What was computed from them after the training ended in a traceback."""
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 2.5}', f'{{"step": 2, "loss": 2, "{name}": {value}}}']
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    assert steps(path) == [1]


def test_a_line_that_a_crash_cut_is_written_again(tmp_path: Path) -> None:
    """Each step is in the file once, whatever was in it after the last checkpoint."""
    path = tmp_path / "metrics.jsonl"
    assert steps(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    assert steps(path) == [1, 2, 3]
    with open_metrics(tmp_path, 2) as metrics:
        assert path.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'
        assert metrics.curves.to_plain()["steps"]["step"] == [1, 2]
        metrics.append({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_a_long_run_does_not_grow_by_its_records(tmp_path: Path) -> None:
    """All records once stayed in memory: a gigabyte in a run of a million steps."""
    with open_metrics(tmp_path, 0) as metrics:
        for step in range(1, 11):
            metrics.append({"step": step})
        assert not metrics.unwritten
        metrics.rewind(5)
        assert metrics.curves.to_plain()["steps"]["step"] == [1, 2, 3, 4, 5]
        metrics.append({"step": 6})
    assert steps(metrics.path) == [1, 2, 3, 4, 5, 6]


def test_a_record_outlives_the_process_at_once(tmp_path: Path) -> None:
    """It is handed to the system line by line: a run can be watched, and killed."""
    with open_metrics(tmp_path, 0) as metrics:
        for step in (1, 2):
            metrics.append({"step": step})
            assert steps(metrics.path)[-1] == step


def test_the_seconds_trained_count_all_starts(tmp_path: Path) -> None:
    """A record has those of the run, not those of the process."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "elapsed": 1000.0}\n', encoding="utf-8")
    with open_metrics(tmp_path, 1) as metrics:
        metrics.append({"step": 2})
    assert [*read_records(metrics.path)][-1]["elapsed"] == pytest.approx(1000, abs=60)


def test_other_ranks_record_nothing(tmp_path: Path) -> None:
    """Rank 0's files would have each step twice."""
    with open_metrics(tmp_path / "run", 0, enabled=False, tensorboard=True) as metrics:
        record = {"step": 1}
        metrics.append(record)
        metrics.rewind(0)
        metrics.sync()
        metrics.state = "stopped"
    assert record == {"step": 1} and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- TensorBoard


def test_tensorboard_sees_every_step_once(tmp_path, monkeypatch):
    """Also where a run was killed after its last checkpoint, and made steps again."""
    pytest.importorskip("tensorboard")
    program = """
import sys
from pathlib import Path
from test_metrics import open_metrics
folder = Path(sys.argv[1])
for first, last in ((0, 7), (4, 9)):
    with open_metrics(folder, first, tensorboard=True) as metrics:
        for step in range(first + 1, last + 1):
            figures = {"loss": 5.0, "grad_norm": 1.5, "lr": 1e-3, "val_loss": first}
            metrics.append({"step": step, "sample": "One day", **figures})
        metrics.sync()
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(str(folder / "tensorboard"))
found.Reload()
print([(e.step, e.value) for e in found.Scalars("val/loss")])
print(sorted(found.Tags()["scalars"]), found.Tags()["tensors"])
"""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent))))
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    values, names = done.stdout.splitlines()
    assert eval(values) == [(step, 0.0) for step in range(1, 5)] + [
        (step, 4.0) for step in range(5, 10)
    ]
    for name in ("train/loss", "train/grad_norm", "val/loss", "lr", "sample/text_summary"):
        assert f"'{name}'" in names


def test_without_tensorboard_one_line_says_so(monkeypatch):
    """Before any work."""
    from config import parse_options

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="^--tensorboard .*pip install tensorboard$"):
        parse_options(["--option", "pretrain", "--tensorboard"])
