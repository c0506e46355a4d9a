"""Several processes under torchrun, on the CPU: one run however many they are, and whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import survivor
import torch
import torch.distributed as dist

import check_model_precision
import run_llama
from config import UsageError, parse_options
from llama import content_digest
from utils import RESUMABLE, Ranks, RunFolder, ShardedSave, check_metadata, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 32 --dtype float32 "
    "--pretrain_lr 0.01 --cache_dir cache --pretrain_batch_size 2 --global_batch_size 8"
).split()
TIMED = {"tokens_per_second", "mfu", "memory"}
SECONDS = 100  # after which a test's processes count as hanging

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun's signals are those of POSIX")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder with a text of about 70 chunks of 32 tokens."""
    stories = (ROOT / "data" / "stories-train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.jsonl").write_text("\n".join(stories[:10]) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["run_llama.py"])


def torchrun(processes: int, *words: str, launcher: str, script: str) -> subprocess.Popen:
    """A launcher in the background."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher.split()]
    command += [f"--nproc_per_node={processes}", str(ROOT / script), *words]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, **pipe, text=True, encoding="utf-8")


@contextlib.contextmanager
def started(
    processes: int, *words: str, launcher: str = "--standalone", script: str = "run_llama.py"
) -> Iterator[subprocess.Popen]:
    """A run under torchrun in the background, which is not left running after the block."""
    with torchrun(processes, *words, launcher=launcher, script=script) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for pid in workers(process):
                    os.kill(pid, signal.SIGKILL)
                process.kill()


def launch(processes: int, *words: str, **settings: str) -> tuple[int, str]:
    """Run to the end; returns the launcher's exit status and all that was printed."""
    with started(processes, *words, **settings) as process:
        output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def pretraining(folder: str, *words: str) -> list[str]:
    """The words of a small pretraining run."""
    data = ["--option", "pretrain", "--pretrain_data", "text.jsonl", "--save_dir", folder]
    return [*data, *SMALL, *words]


def records(folder: str) -> list[dict]:
    """What a run put on record, less what the clock decides."""
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(s).items() if k not in TIMED} for s in lines]


def outcome(folder: str, name: str) -> dict:
    """What two runs that are the same bit for bit share."""
    state = load_checkpoint(Path(folder, name))
    parts = ("model", "optimizer", "rng_of_ranks", "progress", "identity", "files")
    found = {p: content_digest(state[p]) for p in parts if p in state}
    found["final"] = content_digest(load_checkpoint(Path(folder, "final-model.pt")))
    return found | {"log": records(folder)}


def assert_same_losses(folder: str, other: str) -> None:
    """Two runs agree to float32 rounding, and in what they count exactly."""
    runs = [records(folder), records(other)]
    assert len(runs[0]) == len(runs[1]) > 0
    for a, b in zip(*runs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-4)
        assert [a[k] for k in ("step", "tokens", "lr")] == [b[k] for k in ("step", "tokens", "lr")]
        if a["val_loss"] is not None and b["val_loss"] is not None:
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


def workers(launcher: subprocess.Popen) -> list[int]:
    """The processes that a launcher has started, by rank."""
    path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in path.read_text(encoding="utf-8").split()]


def wait_for(path: str, process: subprocess.Popen) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + SECONDS
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < deadline, path
        time.sleep(0.02)


def run_alone(words: list[str]) -> int:
    """Run a command in this process."""
    return run_llama.main(parse_options(words))


def test_a_killed_rank_and_the_run_ends_bit_equal():
    """The launcher starts it again, and it goes on by itself, with the dropout of each rank.

    Restarted ranks once found the addresses of the dead in torchrun's store, and waited for them.
    """
    words = ["--epochs", "4", "--checkpoint_interval", "5", "--dropout", "0.1", "--overwrite"]
    status, output = launch(2, *pretraining("whole", *words))
    assert status == 0, output
    assert output.count("2 x 2 accumulated x 2 processes") == 1, "rank 0 alone prints"
    again = "--standalone --max_restarts=1"
    with started(2, *pretraining("killed", *words), launcher=again) as run:
        wait_for("killed/pretrain-step-10.pt", run)
        os.kill(workers(run)[1], signal.SIGKILL)
        output, _ = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, output
    assert "rank 1 of 2 ended" in output and "resuming     killed/pretrain-step-" in output
    assert outcome("killed", "pretrain-epoch-4.pt") == outcome("whole", "pretrain-epoch-4.pt")
    assert not Path("killed/run.lock").exists()


def test_any_number_of_ranks_goes_on_with_what_others_saved(capsys):
    """Four ranks with shards are stopped mid-epoch; two with DDP, and one, end as one alone does.

    A share that is damaged is found, and said, before it is believed.
    """
    words = ["--epochs", "4", "--checkpoint_interval", "3"]
    assert run_alone(pretraining("alone", *words)) == 0
    with started(4, *pretraining("four", *words, "--parallel", "fsdp")) as run:
        wait_for("four/pretrain-step-6-sharded", run)
        run.send_signal(signal.SIGTERM)
        output, _ = run.communicate(timeout=SECONDS)
    assert output.count("stopped after step") == 1 and "torchrun --standalone" in output, output
    saved = sorted(path.name for path in Path("four").glob("*-sharded"))
    assert len(saved) <= 3 and not list(Path("four").glob(".*")), saved
    for copy in ("one", "kept"):
        shutil.copytree("four", copy)
    capsys.readouterr()
    assert run_alone(pretraining("one", *words, "--resume", "auto")) == 0
    assert_same_losses("one", "alone")
    status, output = launch(
        2, *pretraining("four", *words, "--resume", "auto", "--parallel", "ddp")
    )
    assert status == 0 and "four/pretrain-epoch-4.pt" in output, output
    assert_same_losses("four", "alone")
    newest = Path("kept", max(saved, key=lambda name: int(name.split("-")[2])))
    for name in ("__1_0.distcp", ".metadata"):
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} is damaged"):
            load_checkpoint(newest)
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
    assert load_checkpoint(newest)["restore_from"] == newest


def test_finetuning_goes_on_sharded_on_more_ranks(capsys):
    """Its batches depended on the micro-batch, and in bfloat16 a sharded model could not predict.

    Adapters, which a checkpoint may bring, are refused with shards in a line.
    """
    reviews = (ROOT / "data" / "reviews-train.txt").read_text(encoding="utf-8").splitlines()
    for split, lines in {"train": reviews[:48], "dev": reviews[48:60]}.items():
        Path(f"few-{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ROOT / "data" / "reviews-label-mapping.json"
    words = ["--option", "finetune", "--train", "few-train.txt", "--dev", "few-dev.txt"]
    words += ["--label_names", str(names), "--save_dir", "tuned", "--lr", "1e-3"]
    words += ["--pretrained_model_path", str(ROOT / "data" / "stories-tiny.pt")]
    assert run_alone([*words, "--epochs", "2", "--dtype", "bfloat16", "--max_steps", "3"]) == 0
    more = ["--resume", "auto", "--batch_size", "4", "--parallel", "fsdp"]
    status, output = launch(2, *words, *more)
    assert status == 0 and "best model" in output, output
    log = Path("tuned", "finetune-few-metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 13))
    assert run_alone([*words, "--overwrite", "--lora_rank", "2", "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert run_alone([*words, "--resume", "auto", "--parallel", "fsdp"]) == 2
    assert "--lora_rank exclude each other" in capsys.readouterr().err


def test_a_rank_alone_is_not_several(monkeypatch, capsys):
    """RANK=1 without WORLD_SIZE, as some shells inherit it, once trained in silence."""
    monkeypatch.setenv("RANK", "1")
    assert run_alone(pretraining("alone", "--max_steps", "1")) == 0
    assert "alone/final-model.pt" in capsys.readouterr().out
    assert load_checkpoint(Path("alone/final-model.pt"))["model"]


@pytest.fixture
def sharded_save(tmp_path) -> Iterator[Callable[[], None]]:
    """What writes a sharded checkpoint of one process: run/pretrain-step-1-sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    save = ShardedSave(Ranks(), 60)
    payload = {name: {} for name in RESUMABLE} | {"run_id": "x", "progress": {"step": 1}}

    def write() -> None:
        save.begin(Path("run/pretrain-step-1-sharded"), {"model/a": torch.randn(50)}, payload)
        save.publish()

    yield write
    dist.destroy_process_group()


@pytest.mark.parametrize("fault", ["short write", "I/O error", "permission denied"])
def test_a_failing_disk_leaves_a_sharded_checkpoint_as_it_was(sharded_save, fault):
    """What a rank wrote is read back before it gets its name; nothing half-made is left."""
    folder = RunFolder(Path("run"), "pretrain")
    sharded_save()
    before = [path.read_bytes() for path in sorted(folder.checkpoints()[0].iterdir())]
    with survivor.FAULTS[fault](), pytest.raises(OSError):
        sharded_save()
    after = [path.read_bytes() for path in sorted(folder.checkpoints()[0].iterdir())]
    assert after == before and [path.name for path in folder.path.iterdir()] == [
        "pretrain-step-1-sharded"
    ]
    sharded_save()
    folder.prune(1, run_id="x", step=1)
    assert folder.find_checkpoint("auto")[0] == folder.checkpoints()[0]
    folder.clear()
    assert not list(folder.path.iterdir())


def test_code_in_the_index_of_a_sharded_checkpoint_is_never_run(tmp_path):
    """torch unpickles it, so it is looked through first."""

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UsageError, match="code that was not run"):
        check_metadata(tmp_path / ".metadata")
    assert not (tmp_path / "harmed").exists()


def test_ten_bad_steps_of_one_rank_roll_back_all():
    """What is not finite on one rank is left out on all, located, and gone back from together.

    Also in an epoch's last step, where rank 1 has nothing to train on.
    """
    words = ["--epochs", "3", "--checkpoint_interval", "4", "--parallel", "fsdp"]
    words += ["--pretrain_batch_size", "4"]
    words += ["--activation_checkpointing", "--dtype", "bfloat16"]
    faulty = {"script": "tests/faulty_rank.py"}
    status, output = launch(2, "nan", *pretraining("run", *words), **faulty)
    assert status == 0, output
    assert "step 6 skipped: its loss is not finite (1 in a row); from text.jsonl" in output
    assert "back to step 4, with 0.5 of the learning rate" in output
    assert [record["step"] for record in records("run")] == list(range(1, 28))


def test_a_rank_without_memory_or_answer_ends_all():
    """One line says which and what to do; the others neither hang nor go on."""
    faulty = {"script": "tests/faulty_rank.py"}
    status, output = launch(2, "memory", *pretraining("run"), **faulty)
    errors = [line for line in output.splitlines() if "run_llama.py: error:" in line]
    assert status == 1 and len(errors) == 1 and "rank 1 ran out of memory" in errors[0], output
    words = ["--epochs", "99", "--checkpoint_interval", "4", "--dist_timeout", "3", "--overwrite"]
    with started(2, *pretraining("run", *words)) as run:
        wait_for("run/pretrain-step-4.pt", run)
        silent = workers(run)[1]
        os.kill(silent, signal.SIGSTOP)
        output = ""
        while "error:" not in output:  # the launcher waits for it half a minute
            output += run.stdout.readline()
        os.kill(silent, signal.SIGCONT)
        run.communicate(timeout=SECONDS)
    assert run.returncode == 1
    assert "rank 1 of 2 ended, or did not answer for --dist_timeout 3 seconds" in output


def test_two_machines(tmp_path):
    """Two launchers, each with a token cache of its own, train what one process trains."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--epochs", "2", "--checkpoint_interval", "0"]
    assert run_alone(pretraining("alone", *words)) == 0
    meeting = f"--nnodes=2 --rdzv-backend=c10d --rdzv-id=7 --rdzv-endpoint=127.0.0.1:{port}"
    both = [
        torchrun(
            1,
            *pretraining("run", *words, "--cache_dir", f"cache{node}"),
            launcher=meeting,
            script="run_llama.py",
        )
        for node in range(2)
    ]
    outputs = [process.communicate(timeout=SECONDS)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "2 processes on 2 machines" in "".join(outputs)
    assert all(list(Path(f"cache{node}").glob("*.tokens")) for node in range(2))
    assert_same_losses("run", "alone")


@pytest.mark.parametrize("option", ["prompt", "generate"])
def test_what_does_not_train_runs_in_one_process(option, monkeypatch, capsys):
    """It would be done as often as there are processes."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert run_alone(["--option", option]) == 2
    assert "runs in one process" in capsys.readouterr().err
    assert check_model_precision.main([]) == 2
    assert "runs in one process" in capsys.readouterr().err


def test_a_launch_that_is_queued_again_goes_on(monkeypatch, capsys):
    """By its run id, also on another machine; the lock it left there once stopped it.

    Each machine's launcher counts its own restarts: the count of the one with rank 0 once was 0.
    """
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    words = pretraining("run", "--overwrite", "--checkpoint_interval", "0", "--max_steps")
    assert run_alone([*words, "3"]) == 0
    lock = json.dumps({"pid": 1, "host": "elsewhere", "launch": "job 7"})
    Path("run/run.lock").write_text(lock, encoding="utf-8")
    assert run_alone([*words, "6"]) == 0
    assert "made after step 3" in capsys.readouterr().out and len(records("run")) == 6
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 8")
    Path("run/run.lock").write_text(lock, encoding="utf-8")
    assert run_alone([*words, "9"]) == 2
    assert "elsewhere is running in it" in capsys.readouterr().err
