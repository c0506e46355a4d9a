"""Whole runs of several ranks on the CPU: one run however many they are, and whoever dies."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import several
from running import TIMED, assert_same, command, records, write_labelled, write_model, write_stories

import check_model_precision
from minllama.formats.pt_file import load_pt
from minllama.machine.ranks import Ranks
from minllama.runs import run_folder
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError

SMALL = (
    "--option pretrain --pretrain_data text.jsonl --cache_dir cache --dim 16 --n_layers 2 "
    "--n_heads 2 --n_kv_heads 1 --max_seq_len 16 --dtype float32 --pretrain_lr 0.01 "
    "--pretrain_batch_size 2 --global_batch_size 8"
)
needs_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder with a text of about sixty chunks: eight steps an epoch."""
    write_stories(tmp_path)
    monkeypatch.chdir(tmp_path)


def pretraining(folder: str, line: str = "") -> list[str]:
    """The words of a small pretraining."""
    return [*SMALL.split(), "--save_dir", folder, *line.split()]


def log(folder: str) -> list[dict]:
    """What a run put on record, less what the clock decides."""
    return [
        {key: value for key, value in record.items() if key not in TIMED}
        for record in records(f"{folder}/metrics.jsonl")
    ]


def assert_same_losses(folder: str, other: str) -> None:
    """Two runs agree to float32 rounding, and in what they count exactly."""
    runs = [log(folder), log(other)]
    assert len(runs[0]) == len(runs[1]) > 0
    for a, b in zip(*runs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-4)
        assert [a[k] for k in ("step", "tokens", "lr")] == [b[k] for k in ("step", "tokens", "lr")]
        if a["val_loss"] is not None and b["val_loss"] is not None:
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


# ---------------------------------------------------------------------------- as many as one


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [
        (2, 2),
        pytest.param(4, 2, marks=pytest.mark.soak),
        pytest.param(2, 4, marks=pytest.mark.soak),
    ],
)
def test_any_number_of_ranks_resumes_what_others_saved(saved_by, resumed_by):
    """Ranks with shards are stopped mid-epoch; others with DDP, and one, end as one alone does.

    One of them is told to stop, and all do, after the same step.
    """
    line = "--epochs 2 --checkpoint_interval 2"
    assert command(pretraining("alone", line)).status == 0
    words = pretraining("run", f"{line} --parallel fsdp")
    output = several.run(saved_by, words, fault="told-to-stop", status=143)
    assert output.count("stopped after step 6, and saved") == 1
    assert f"torchrun --standalone --nproc_per_node={saved_by}" in output
    names = sorted(path.name for path in Path("run").iterdir() if path.is_dir())
    assert names == ["pretrain-step-4-sharded", "pretrain-step-6-sharded"]
    assert len(list(Path("run", names[1]).iterdir())) == saved_by + 1
    shutil.copytree("run", "one")
    resumed = command(pretraining("one", f"{line} --resume auto"))
    assert resumed.status == 0 and f"one/{names[1]}, made after step 6" in resumed.out
    assert_same_losses("one", "alone")
    output = several.run(resumed_by, pretraining("run", f"{line} --resume auto --parallel ddp"))
    assert "pretrain-epoch-2.pt" in output
    assert_same_losses("run", "alone")


@pytest.mark.parametrize(
    "count", [2, pytest.param(4, marks=pytest.mark.soak), pytest.param(3, marks=pytest.mark.soak)]
)
def test_machines_with_caches_of_their_own_train_what_one_process_trains(count):
    line = "--epochs 2 --checkpoint_interval 0 --global_batch_size 24"
    assert command(pretraining("alone", line)).status == 0
    output = several.run(count, pretraining("run", f"{line} --cache_dir cacheRANK"), nodes=count)
    assert f"{count} processes on {count} machines, ddp" in output
    assert output.count("Loaded") == 1, "rank 0 alone prints"
    assert all(list(Path(f"cache{rank}").glob("*.tokens")) for rank in range(count))
    assert_same_losses("run", "alone")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_rank_0_alone_reads_the_model_to_go_on_from(parallel):
    """Each rank had the whole of it in memory, as many times as the machine has GPUs.

    The model has all that a shape may have beyond Llama 2's.
    """
    scaling = {"rope_type": "linear", "factor": 2.0}
    shape = {"head_dim": 10, "attention_bias": True, "qk_norm": True, "rope_scaling": scaling}
    model = write_model(Path(), dim=16, n_kv_heads=1, **shape)
    line = f"--epochs 1 --checkpoint_interval 0 --pretrained_model_path {model}"
    alone = command(pretraining("alone", line))
    assert alone.status == 0, alone.error
    words = pretraining("run", f"{line} --parallel {parallel}")
    output = several.run(2, words, fault="without-the-model")
    assert_same_losses("run", "alone")
    before = re.search("before the first step: val loss .*", alone.out)[0]
    assert before in output


def test_a_folder_that_machines_do_not_share_is_refused(monkeypatch):
    """Each would have written a run of its own."""
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: None)

    def lock(ranks: Ranks) -> None:
        with RunFolder(Path(f"run{ranks.node}"), "pretrain").locked(ranks):
            raise AssertionError("locked")

    for name in ("run0", "run1"):
        Path(name).mkdir()
    for error in several.on_threads(2, lock, nodes=2):
        assert isinstance(error, UsageError)
        assert "machine 1" in str(error) and "does not see what rank 0 wrote" in str(error)


def test_finetuning_continues_sharded_on_more_ranks():
    """Its batches depended on the micro-batch, and in bfloat16 a sharded model could not predict.

    Adapters, which a checkpoint may bring, are refused with shards in a line.
    """
    line = f"--option finetune {write_labelled(Path())} --save_dir tuned --batch_size 8"
    line += f" --global_batch_size 8 --pretrained_model_path {write_model(Path(), dim=16)}"
    line += " --label_names toy-label-mapping.json"
    first = command(f"{line} --epochs 2 --dtype bfloat16 --max_steps 3")
    assert first.status == 0, first.error
    more = "--resume auto --epochs 2 --max_steps 12 --batch_size 2 --parallel fsdp"
    output = several.run(2, f"{line} {more}".split())
    assert "best model" in output and output.count("dev accuracy") >= 1
    steps = [record["step"] for record in records("tuned/finetune-toy-metrics.jsonl")]
    assert steps == list(range(1, 13))
    assert load_pt("tuned/finetune-toy-best-model.pt")["classifier_head"]["weight"].shape == (3, 16)
    assert command(f"{line} --overwrite --lora_rank 2 --max_steps 1").status == 0
    refused = command(f"{line} --resume auto --parallel fsdp")
    assert refused.status == 2 and "--lora_rank" in refused.error and "fsdp" in refused.error


# ---------------------------------------------------------------------------- whoever dies


@needs_posix
def test_a_killed_rank_and_the_run_ends_bit_equal():
    """torchrun starts it again, and it continues by itself, with the dropout of each rank.

    Restarted ranks once found the addresses of the dead in torchrun's store, and waited for them.
    """
    line = "--max_steps 8 --checkpoint_interval 3 --dropout 0.1 --overwrite"
    several.run(2, pretraining("whole", line))
    output = several.run_restarted(2, pretraining("killed", line), fault="killed-once")
    assert "rank 1 of 2 ended" in output
    assert "resuming     killed/pretrain-step-6.pt" in output
    found = [
        RunFolder(Path(run), "pretrain").find_checkpoint("auto") for run in ("killed", "whole")
    ]
    states = [state for _, state in found]
    assert states[0]["progress"]["step"] == 8
    for part in ("model", "optimizer", "rng_of_ranks", "progress", "identity"):
        assert_same(states[0][part], states[1][part], part)
    assert_same(load_pt("killed/final-model.pt"), load_pt("whole/final-model.pt"))
    assert log("killed") == log("whole")


def test_bad_steps_of_one_rank_in_a_row_roll_back_all():
    """What is not finite on one rank is skipped on all, located, and gone back from together.

    Also in an epoch's last step, where rank 1 has nothing to train on.
    """
    line = "--epochs 2 --checkpoint_interval 4 --parallel fsdp --pretrain_batch_size 4"
    line += " --activation_checkpointing --dtype bfloat16"
    output = several.run(2, pretraining("run", line), fault="not-finite")
    assert "step 5 skipped: its loss is not finite (1 in a row); it trained on text.jsonl" in output
    assert "back to step 4, with 0.5 of the learning rate" in output
    found = log("run")
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    assert found[-1]["epoch"] == 2 and all(record["loss"] for record in found)


def test_a_rank_without_memory_ends_all():
    """One line says which and what to do; the others neither hang nor continue."""
    output = several.run(2, pretraining("run"), fault="without-memory", status=1)
    errors = [line for line in output.splitlines() if "run_llama.py: error:" in line]
    assert len(errors) == 1 and "rank 1 ran out of memory" in errors[0], output


@needs_posix
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_rank_without_answer_ends_all(parallel):
    """A line names it, and when it wakes up it ends too; what was saved before is whole."""
    line = f"--epochs 9 --checkpoint_interval 4 --dist_timeout 2 --parallel {parallel}"
    work = functools.partial(several.command, pretraining("run", line), "silent")
    with several.Launch(2, work) as launch:
        launch.processes[0].join(several.SECONDS)
        output = launch.output()
        os.kill(launch.processes[1].pid, signal.SIGCONT)
        assert launch.wait() == [1, 1], launch.output()
    assert output.count("error:") == 1, output
    assert "rank 1 of 2 ended, or did not answer for --dist_timeout 2 seconds" in output
    assert "Traceback" not in launch.output()
    resumed = command(pretraining("run", "--max_steps 5 --resume auto"))
    assert resumed.status == 0 and "made after step 4" in resumed.out


# ---------------------------------------------------------------------------- launches


def test_a_launch_that_is_queued_again_continues(monkeypatch):
    """By its run id, also on another machine; the lock it left there once stopped it.

    Each machine's launcher counts its own restarts: the count of the one with rank 0 once was 0.
    """
    line = "--overwrite --checkpoint_interval 0 --max_steps"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert command(pretraining("run", f"{line} 3")).status == 0
    Path("run/run.lock").write_text("1 elsewhere 0", encoding="utf-8")
    again = command(pretraining("run", f"{line} 6"))
    assert again.status == 0 and "made after step 3" in again.out
    assert "--overwrite is ignored" in again.out and len(log("run")) == 6
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 8")
    assert command(pretraining("run", f"{line} 2")).status == 0
    assert len(log("run")) == 2, "another launch does as it is told"


def test_a_rank_alone_is_not_several(monkeypatch):
    """RANK=1 without WORLD_SIZE, as some shells inherit it, once trained in silence."""
    monkeypatch.setenv("RANK", "1")
    done = command(pretraining("alone", "--max_steps 1"))
    assert done.status == 0 and "alone/final-model.pt" in done.out
    assert load_pt("alone/final-model.pt")["model"]


@pytest.mark.parametrize("option", ["prompt", "generate"])
def test_what_does_not_train_runs_in_one_process(option, monkeypatch, capsys):
    """It would be done as often as there are processes."""
    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}
    for name, value in (ranks | {"MASTER_ADDR": "x", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    done = command(f"--option {option}")
    assert done.status == 2 and "runs in one process" in done.error
    assert check_model_precision.main([]) == 2
    assert "runs in one process" in capsys.readouterr().err
