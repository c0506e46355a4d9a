"""Before and after the loop: which run is resumed, with what, and what the user is told."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import several
import torch
from running import (
    RESUME,
    ROOT,
    assert_same,
    command,
    pretrain,
    progress,
    records,
    steps,
    stop_after,
    write_dialogues,
    write_labelled,
    write_model,
    write_stories,
)

import run_llama
from config import SHIPPED_MODEL, LlamaConfig, parse_options
from minllama.formats.pt_file import load_pt, save_pt, tensors_in
from minllama.machine.ranks import Ranks
from minllama.runs.checkpoints import load_checkpoint
from minllama.runs.plan import TrainingPlan
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError
from minllama.system.signals import StopRequest
from minllama.training import setup as sessions
from minllama.training.fitting import Speed
from minllama.training.identity import (
    CHUNK_ORDER,
    EARLIER_DEFAULTS,
    GLOBAL_BATCH,
    TEXT_TOKENS,
    check_identity,
)
from minllama.training.results import print_results
from minllama.training.run import Run
from minllama.training.setup import decide_compile, describe_determinism, make_plan


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder that has nothing but text."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path)


# ---------------------------------------------------------------------------- whose folder it is


def test_a_run_is_never_overwritten_silently():
    """The folder's run stays, and both remedies are named; other files are not ours to touch."""
    assert pretrain("--max_steps 2").status == 0
    Path("run/notes.txt").write_text("mine", encoding="utf-8")
    before = Path("run/final-model.pt").read_bytes()
    done = pretrain("--max_steps 2")
    assert done.status == 2 and done.error.count("\n") == 1
    assert "--resume auto" in done.error and "--overwrite" in done.error
    assert Path("run/final-model.pt").read_bytes() == before
    assert pretrain("--max_steps 2 --pretrain_data nothing.txt --overwrite").status == 2
    assert Path("run/final-model.pt").read_bytes() == before, "a bad command removed a run"
    assert pretrain("--max_steps 1 --overwrite").status == 0
    assert Path("run/notes.txt").read_text(encoding="utf-8") == "mine" and steps() == [1]
    assert Path("run/pretrain-step-1.pt").exists() and not Path("run/pretrain-step-2.pt").exists()


def test_a_run_is_resumed_in_its_own_folder():
    """`--resume a/FILE --save_dir b` once cut b's records and replaced its models."""
    for folder in ("a", "b"):
        assert pretrain(f"--max_steps 2 --save_dir {folder}").status == 0
    before = Path("b/metrics.jsonl").read_bytes()
    done = pretrain("--max_steps 2 --resume a/pretrain-step-2.pt --save_dir b")
    assert done.status == 2 and "outside --save_dir b" in done.error
    assert Path("b/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("resume", ["--save_dir run --resume", "--resume run"])
def test_resume_needs_no_more_than_a_folder(resume):
    """Bare --resume was "expected one argument", and a folder an error that named another flag."""
    assert pretrain("--max_steps 2").status == 0
    done = command(f"--option pretrain --cache_dir cache {resume} --max_steps 3")
    assert done.status == 0 and steps() == [1, 2, 3]


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        ("run/final-model.pt", ["final-model.pt", "is a weights file", "-step-N.pt"]),
        ("run/nothing.pt", ["--resume run/nothing.pt", "no such file"]),
        ("cache", ["--resume cache", "the folder holds no pretrain checkpoint"]),
    ],
)
def test_what_is_no_checkpoint_is_not_resumed(resume, words):
    """final-model.pt after --resume is a natural mistake; it was a KeyError."""
    assert pretrain("--max_steps 2").status == 0
    done = command(f"--option pretrain --cache_dir cache --resume {resume}")
    assert done.status == 2 and done.error.count("\n") == 1
    for word in words:
        assert word in done.error


# ---------------------------------------------------------------------------- which checkpoint


def test_without_a_checkpoint_auto_starts_from_the_beginning():
    """--resume auto said to start without it, and the start said to add --resume auto.

    So a job that is queued again has one command, whether it got to its first checkpoint or not.
    """
    assert pretrain("--max_steps 3").status == 0
    for path in Path("run").glob("*.pt"):
        path.unlink()
    done = pretrain("--max_steps 2 --resume auto")
    assert done.status == 0 and "no checkpoint in run yet: starting from the beginning" in done.out
    assert steps() == [1, 2]


def test_a_finetuning_is_resumed_by_the_name_of_its_data():
    """Without --train the embedded reviews were trained on, anew, beside the run that was meant."""
    Path("run").mkdir()
    Path("run/finetune-mine-run.json").write_text("{}", encoding="utf-8")
    done = command("--option finetune --save_dir run --resume auto")
    assert done.status == 2 and "but that of finetune-mine: name its --train" in done.error
    assert not list(Path("run").glob("finetune-reviews-run.json"))


def test_a_named_checkpoint_without_a_step_is_refused():
    """It was a KeyError; auto skipped it."""
    assert pretrain("--max_steps 1").status == 0
    payload = load_pt(Path("run/pretrain-step-1.pt"))
    save_pt(Path("run/pretrain-step-2.pt"), payload | {"progress": {}})
    done = command("--option pretrain --cache_dir cache --resume run/pretrain-step-2.pt")
    assert done.status == 2 and "is damaged: its step is 'None'" in done.error


def test_epochs_do_not_change_a_run_of_steps():
    """They were said to, twice, and changed nothing."""
    assert pretrain("--schedule_steps 2").status == 0
    done = command(f"{RESUME} --epochs 9")
    assert done.status == 2 and "as long as its --schedule_steps 2 says" in done.error
    assert "a larger --schedule_steps lets it continue" in command(RESUME).out
    assert command(f"{RESUME} --schedule_steps 3").status == 0 and steps() == [1, 2, 3]


def test_a_damaged_checkpoint_is_skipped_and_said():
    """--resume auto takes the newest that verifies; only where there is none it is an error."""

    def damage(name: str) -> None:
        data = bytearray(Path(name).read_bytes())
        data[len(data) // 2] ^= 1
        Path(name).write_bytes(data)

    assert pretrain("--checkpoint_interval 2 --max_steps 5").status == 0
    damage("run/pretrain-step-5.pt")
    done = command(f"{RESUME} --max_steps 5")
    assert done.status == 0 and "skipped" in done.out and "pretrain-step-5.pt" in done.out
    assert f"resuming     {Path('run/pretrain-step-4.pt')}" in done.out
    for path in Path("run").glob("pretrain-*.pt"):
        damage(str(path))
    done = command(f"{RESUME} --max_steps 6")
    assert done.status == 2 and "no whole pretrain checkpoint" in done.error
    assert "--overwrite" in done.error


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("--global_batch_size 8", "--global_batch_size"),
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps"),
        ("--seed 1", "--seed 1 differs from the checkpoint's 1337"),
        ("--dim 32", "model shape dim 32, hidden_dim 96 differs from the checkpoint's 16, 64"),
        ("--val_fraction 0.5", "--val_fraction"),
        ("--optimizer muon", "--optimizer muon differs from the checkpoint's adamw"),
        ("--max_seq_len 8", "--max_seq_len"),
    ],
)
def test_resuming_with_other_settings_is_refused(change, name):
    """Position in the data means nothing under another batch, shape, seed, optimizer or text."""
    assert pretrain("--max_steps 1").status == 0
    done = command(f"{RESUME} {change}")
    assert done.status == 2 and name in done.error and "Traceback" not in done.error
    assert progress("run/pretrain-step-1.pt")["step"] == 1


def test_the_micro_batches_of_a_batch_may_change():
    """And the dropout, the schedule and the like; each change is said."""
    assert pretrain("--max_steps 1").status == 0
    done = command(f"{RESUME} --pretrain_batch_size 2 --max_steps 3 --dropout 0.1")
    assert done.status == 0 and steps() == [1, 2, 3]
    assert "changed      --dropout from 0.0 to 0.1" in done.out
    assert "changed      --pretrain_batch_size from 4 to 2" in done.out
    assert "--max_steps from" not in done.out


@pytest.mark.parametrize(("name", "before"), [(CHUNK_ORDER, 1), (TEXT_TOKENS, 7)])
def test_a_run_of_a_version_that_read_the_text_otherwise_is_refused(name, before):
    """It would read some of the text twice and some of it not at all; it was not said what else."""
    assert pretrain("--max_steps 1").status == 0
    path = Path("run/pretrain-step-1.pt")
    state = load_pt(path)
    now = state["identity"].pop(name)
    if before != EARLIER_DEFAULTS.get(name):
        state["identity"][name] = before
    save_pt(path, state)
    done = command(f"{RESUME} --max_steps 2")
    assert done.status == 2 and done.error.count("\n") == 1
    assert f"{name} {now} differs from the checkpoint's {before}: " in done.error
    printed = shlex.split(done.error.rpartition("on: ")[2])
    assert command([*printed[2:], "--max_steps", "1"]).status == 0


def test_a_text_that_has_grown_is_told_how_to_be_trained_on():
    """It ended in two fingerprints, and what to do with tomorrow's text was not said."""
    assert pretrain("--max_steps 1").status == 0
    with Path("text.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "One more day came."}) + "\n")
    done = command(f"{RESUME} --max_steps 2")
    assert done.status == 2 and done.error.count("\n") == 1
    assert "the text has changed since the run was started (" in done.error
    counts = re.search(r"\(([\d,]+) tokens to train on now, ([\d,]+) then\)", done.error).groups()
    new, old = (int(count.replace(",", "")) for count in counts)
    assert new > old == load_checkpoint(Path("run/pretrain-step-1.pt"))["identity"][TEXT_TOKENS]
    printed = shlex.split(done.error.rpartition("now: ")[2])
    model = str(Path("run/final-model.pt"))  # the run's result
    assert printed[printed.index("--pretrained_model_path") + 1] == model
    assert printed[printed.index("--save_dir") + 1] == "run-2"
    done = command([*printed[2:], "--max_steps", "1"])
    assert done.status == 0 and f"initialised from {model}" in done.out
    assert Path("run-2/final-model.pt").is_file()


def test_what_is_read_otherwise_is_named():
    """Whether files or flags changed was left to the user to find out."""
    assert pretrain("--max_steps 1").status == 0
    Path("more.jsonl").write_text('{"text": "One more day came."}\n', encoding="utf-8")
    files = "--pretrain_data text.jsonl more.jsonl --dedup"
    error = command(f"{RESUME} {files} --max_steps 2").error
    assert "--pretrain_data text.jsonl more.jsonl now, text.jsonl then; --dedup True now," in error
    printed = shlex.split(error.rpartition("now: ")[2])
    assert "--dedup" in printed and "more.jsonl" in printed
    assert command([*printed[2:], "--max_steps", "1"]).status == 0


def test_labelled_data_and_dialogues_that_have_grown_are_told_likewise():
    """They ended in two fingerprints, too."""
    model, labelled = write_model(Path.cwd(), dim=16, n_layers=1), write_labelled(Path.cwd())
    write_dialogues(Path.cwd())
    runs = ((labelled, "toy-train.txt"), ("--train chat.jsonl", "chat.jsonl"))
    for number, (flags, file) in enumerate(runs, start=2):
        words = f"--option finetune {flags} --max_steps 1 --save_dir tuned"
        assert command(f"{words} --pretrained_model_path {model}").status == 0
        data = Path(file).read_bytes()
        Path(file).write_bytes(data + data)
        done = command(f"{words} --pretrained_model_path {model} --resume auto")
        assert done.status == 2 and done.error.count("\n") == 1
        assert f"--train {file} has changed since the run was started" in done.error
        printed = shlex.split(done.error.rpartition("now: ")[2])
        assert f"tuned-{number}" in printed and printed[5].endswith("-best-model.pt")
        assert command([*printed[2:], "--max_steps", "1"]).status == 0


def test_a_checkpoint_of_another_name_alone_in_its_folder_is_refused_in_one_line():
    """There is no best model then, and no file named as a checkpoint, that could be trained on."""
    assert pretrain("--max_steps 1").status == 0
    Path("kept").mkdir()
    Path("run/pretrain-step-1.pt").rename("kept/mine.pt")
    with Path("text.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "One more day came."}) + "\n")
    done = command("--option pretrain --cache_dir cache --resume kept/mine.pt --max_steps 2")
    assert done.status == 2 and "has changed since" in done.error and done.error.count("\n") == 1


def test_identity_shows_only_what_differs():
    """Of a shape the entries that are not the same; every line ends with the remedy."""
    now = {"--seed": 1, "model shape": {"dim": 16, "n_layers": 2}, GLOBAL_BATCH: 8}
    before = {"--seed": 1, "model shape": {"dim": 32, "n_layers": 2}, GLOBAL_BATCH: 8}
    folder = RunFolder(Path("run"), "pretrain")

    def check(earlier: dict[str, Any]) -> None:
        check_identity(
            {"identity": earlier}, now, options=parse_options([]), folder=folder, ranks=Ranks()
        )

    check(now)
    with pytest.raises(UsageError) as raised:
        check(before)
    assert str(raised.value).startswith("model shape dim 16 differs from the checkpoint's 32:")
    with pytest.raises(UsageError, match="--seed 1 differs from the checkpoint's None"):
        check({**now, "--seed": None})


@pytest.mark.parametrize("words", ["", "--optimizer adamw"])
def test_a_resumed_run_lets_go_of_the_checkpoint(words, monkeypatch):
    """It is as large as three models, and was once held in memory to the end."""
    assert pretrain(f"--max_steps 1 {words}").status == 0
    held, seen, read, train = [], [], sessions.read_on_main, run_llama.train

    def watched(*arguments):
        path, state = read(*arguments)
        found = tensors_in({key: state[key] for key in ("model", "optimizer")})
        held.extend(weakref.ref(tensor) for _, tensor in found)
        return path, state

    monkeypatch.setattr(sessions, "read_on_main", watched)
    monkeypatch.setattr(
        run_llama, "train", lambda *rest: seen.extend(ref() for ref in held) or train(*rest)
    )
    assert command(f"{RESUME} --max_steps 2 {words}").status == 0
    assert len(seen) > 10 and not any(tensor is not None for tensor in seen)


# ---------------------------------------------------------------------------- the plan


def test_the_plan_alone_leaves_nothing():
    """--plan prints sizes, steps and memory, and writes no run."""
    done = pretrain("--plan")
    assert done.status == 0 and not Path("run").exists()
    for word in ("parameters", "chunks", "steps", "memory", "resumable checkpoint"):
        assert word in done.out


def test_files_are_as_large_as_the_plan_says():
    """The vocabulary in each of them was left out: of so small a model a quarter of the file."""
    done = pretrain("--max_steps 1")
    sizes = [
        1000 * float(size)
        for size in re.findall(r"^files.*?(\d+) kB.*?(\d+) kB", done.out, re.M)[0]
    ]
    files = ("final-model.pt", "pretrain-step-1.pt")
    assert sizes == pytest.approx([Path("run", name).stat().st_size for name in files], rel=0.1)


def test_the_plan_of_a_run_that_is_there():
    """It may be asked for again, and a resumed one planned, without touching it."""
    assert pretrain("--max_steps 1").status == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert pretrain("--plan").status == 0 and command(f"{RESUME} --plan").status == 0
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_disk_that_is_too_small_is_found_before_the_run(monkeypatch):
    """What the folder holds already is not needed twice."""
    monkeypatch.setattr(sessions, "free_disk", lambda folder: 10**5)
    done = pretrain("--max_steps 2")
    assert done.status == 2 and "100 kB are free on that disk" in done.error
    assert "--save_dir run" in done.error and not list(Path("run").glob("*.pt"))
    assert "epoch checkpoint" not in done.error and "1 step checkpoint " in done.error
    assert "--save_dtype bfloat16 or a folder on a larger disk" in done.error
    planned = pretrain("--max_steps 2 --plan")
    assert planned.status == 0 and "warning: --save_dir run: 100 kB are free" in planned.out
    monkeypatch.setattr(sessions, "free_disk", lambda folder: 10**7)
    assert pretrain("--max_steps 2").status == 0
    monkeypatch.setattr(sessions, "free_disk", lambda folder: 10**6)
    assert command(f"{RESUME} --max_steps 3").status == 0


@pytest.mark.parametrize(
    ("words", "pays", "problem", "settled", "said"),
    [
        ("--compile on", False, None, "on", "half a minute or more"),
        ("--compile off", True, None, "off", ""),
        ("", True, None, "on", "compile      on: why"),
        ("", False, None, "off", "compile      off: why"),
        ("", True, "no g++", "off", "why, but torch cannot compile here (no g++)"),
    ],
)
def test_compile_is_settled_by_the_plan(words, pays, problem, settled, said, monkeypatch, capsys):
    """The compiler is only looked for where the plan says that compiling pays."""
    looked = []
    monkeypatch.setattr(
        sessions, "compiler_problem", lambda device: looked.append(device) or problem
    )
    plan = SimpleNamespace(compiling_pays=lambda flops: (pays, "why"), dtype="float32")
    options = parse_options(f"--option pretrain {words}".split())
    assert decide_compile(options, plan, torch.device("cpu")).compile == settled
    assert said in capsys.readouterr().out
    assert bool(looked) == (pays and not words)


@pytest.mark.parametrize(
    ("words", "pays", "shards", "problem", "settled", "said"),
    [
        ("", True, 1, None, "on", "compile      on: why"),
        ("", False, 1, None, "off", "compile      off: why"),
        ("", True, 1, "no Triton", "off", "why, but torch cannot compile here (no Triton)"),
        ("", True, 2, None, "off", "compile      off: with --parallel fsdp"),
        ("--compile off", True, 1, None, "off", ""),
    ],
)
def test_on_a_gpu_compile_is_on_for_long_runs_where_triton_works(
    words, pays, shards, problem, settled, said, monkeypatch, capsys
):
    """It was on there only where somebody typed it; on Apple's GPUs that is still so."""
    monkeypatch.setattr(sessions, "compiler_problem", lambda device: problem)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    speeds = []
    plan = SimpleNamespace(
        shards=shards,
        dtype="bfloat16",
        compiling_pays=lambda flops: speeds.append(flops) or (pays, "why"),
    )
    options = parse_options(f"--option pretrain {words}".split())
    assert decide_compile(options, plan, torch.device("cuda")).compile == settled
    assert said in capsys.readouterr().out
    assert speeds == [0.28 * 989e12] * (not words and shards == 1)
    if not words:
        assert decide_compile(options, plan, torch.device("mps")).compile == "auto"


def test_deterministic_says_what_it_does_here_and_is_kept(monkeypatch):
    """On a CPU nothing changes, and that is said; a resumed run has what the run began with."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    done = pretrain("--max_steps 1 --deterministic")
    assert "repeatable   --deterministic has no effect here" in done.out
    resumed = command(f"{RESUME} --max_steps 2")
    assert resumed.status == 0 and "repeatable   --deterministic has no effect" in resumed.out
    assert "take longer" in describe_determinism(torch.device("cuda"))
    assert pretrain("--max_steps 2 --save_dir plain").status == 0
    models = [
        load_checkpoint(Path(f"{name}/pretrain-step-2.pt"))["model"] for name in ("plain", "run")
    ]
    assert_same(*models)


def test_what_compile_auto_chose_is_kept(monkeypatch):
    """Compiled arithmetic rounds differently: a resumed run must not choose for itself."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    monkeypatch.setattr(sessions, "compiler_problem", lambda device: None)
    monkeypatch.setattr(sessions, "check_compiler", lambda device: None)
    monkeypatch.setattr(TrainingPlan, "compiling_pays", lambda plan, flops: (True, "why"))
    done = pretrain("--max_steps 1")
    assert "compile      on: why" in done.out and len(compiled) == 1
    monkeypatch.setattr(TrainingPlan, "compiling_pays", lambda plan, flops: (False, "short"))
    assert command(f"{RESUME} --max_steps 2").status == 0 and len(compiled) == 2
    done = pretrain("--max_steps 1 --overwrite")
    assert "compile      off: short" in done.out and len(compiled) == 2


def test_what_dtype_auto_chose_is_kept(monkeypatch):
    """Begun on a CPU without bfloat16 and resumed on one that has it, a run changed its dtype."""
    for fast, words in ((False, "--dtype auto --max_steps 1"), (True, f"{RESUME} --max_steps 2")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        done = command(words) if fast else pretrain(words)
        assert done.status == 0, done.error
    starts = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["starts"]
    assert [start["dtype"] for start in starts] == ["float32", "float32"]
    stored = load_checkpoint(Path("run/pretrain-step-1.pt"))["options"]
    assert stored["dtype"] == "float32"


# ---------------------------------------------------------------------------- ranks


def plan_on(ranks: Ranks, *, texts: list[str], dtypes: list[torch.dtype]) -> str:
    """What --compile is on this rank once its run, with its own text and dtype, is planned."""
    options = parse_options("--option pretrain --save_dir run".split())
    run = Run(
        options.with_global_batch(ranks.world_size),
        RunFolder(Path("run"), "pretrain"),
        ranks,
        StopRequest(),
        torch.device("cpu"),
        dtypes[ranks.rank],
    )
    shape = LlamaConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, max_seq_len=16)
    sizes = {"trainable_parameters": 1, "muon_parameters": 0, "sequences": 9, "tokens": 144}
    sizes |= {"config": shape, "sequence_length": 16, "logits_width": 64}
    make_plan(run, SimpleNamespace(identity={"--pretrain_data": texts[ranks.rank]}, sizes=sizes))
    return run.options.compile


@pytest.mark.parametrize(
    ("texts", "dtypes", "said"),
    [
        (["a", "a", "b"], [torch.float32] * 3, "--pretrain_data is b on rank 2 and a on rank 0"),
        (
            ["a"] * 3,
            [torch.bfloat16, torch.float32, torch.bfloat16],
            "--dtype is float32 on rank 1 and bfloat16 on rank 0",
        ),
    ],
)
def test_ranks_that_differ_are_refused(texts, dtypes, said):
    """Machines with another file, or another CPU under --dtype auto, trained apart in silence."""
    errors = several.on_threads(
        3, lambda ranks: plan_on(ranks, texts=texts, dtypes=dtypes), nodes=3
    )
    for error in errors:  # the same on all, so that it is said once
        assert isinstance(error, UsageError), error
        assert str(error) == f"{said}: give all machines the same files and flags"


def test_compile_is_settled_on_rank_0_for_all(monkeypatch):
    """Each machine decided for itself, by its own processor: some compiled and others did not."""
    decisions = iter(["on", "off"])

    def settle(options, plan, device):
        return dataclasses.replace(options, compile=next(decisions))

    monkeypatch.setattr(sessions, "decide_compile", settle)
    alike = {"texts": ["a", "a"], "dtypes": [torch.float32] * 2}
    found = several.on_threads(2, lambda ranks: plan_on(ranks, **alike), nodes=2)
    assert found == ["on", "on"]


# ---------------------------------------------------------------------------- the end


def test_the_command_that_is_printed_resumes(monkeypatch):
    """A run started with `--resume FILE` once printed that old file as the one to continue from."""
    assert pretrain("--max_steps 3").status == 0
    words = "--option pretrain --resume run/pretrain-step-3.pt --cache_dir cache --max_steps 9"
    with monkeypatch.context() as patch:
        done = command(words, stop=stop_after(5, patch))
    assert done.status == 130 and "stopped after step 5, and saved; continue with:" in done.out
    printed = shlex.split(done.out.rsplit("continue with:", 1)[1])
    assert printed[:2] == ["python", "run_llama.py"] and "auto" in printed
    assert ["--max_steps", "9"] == printed[printed.index("--max_steps") :][:2]
    assert "run/pretrain-step-3.pt" not in printed
    assert command(printed[2:]).status == 0
    assert steps() == list(range(1, 10)) and records()[-1]["lr"] > 0


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_the_command_that_is_printed_resumes_on_a_table(monkeypatch, form):
    """Its columns' names were not in it, so it ended in `no column 'label' or 'text'`."""
    model = write_model(Path.cwd(), dim=16, n_layers=1)
    rows = [("Der Film ist schön .", "gut"), ("So ein Ärger .", "übel")] * 8
    lines = ["satz,urteil", *map(",".join, rows)]
    if form == "jsonl":
        lines = [json.dumps({"satz": s, "urteil": u}, ensure_ascii=False) for s, u in rows]
    Path(f"films.{form}").write_text("\n".join(lines), encoding="cp1252")
    words = f"--option finetune --train films.{form} --text_field satz --label_field urteil"
    words += f" --encoding cp1252 --epochs 3 --save_dir run --pretrained_model_path {model}"
    with monkeypatch.context() as patch:
        done = command(words, stop=stop_after(2, patch))
    assert done.status == 130, done.error
    done = command(shlex.split(done.out.rsplit("continue with:", 1)[1])[2:])
    assert done.status == 0 and "dev accuracy" in done.out, done.error
    stored = {"satz", "urteil"} & set(RunFolder(Path("run"), "finetune-films").repeating_words())
    assert stored == {"satz", "urteil"}


def test_the_printed_command_has_a_folder_with_a_space(monkeypatch):
    """Pasted as it is, it has to name the same folder."""
    with monkeypatch.context() as patch:
        stop = stop_after(2, patch)
        words = ["--option", "pretrain", "--pretrain_data", "text.jsonl", "--save_dir", "my run"]
        words += "--cache_dir cache --dim 16 --n_layers 1 --n_heads 2 --max_seq_len 16".split()
        done = command([*words, "--dtype", "float32"], stop=stop)
    assert done.status == 130
    printed = shlex.split(done.out.rsplit("continue with:", 1)[1])
    assert printed[printed.index("--save_dir") + 1] == "my run"


def test_what_to_do_next_is_printed_as_commands(capsys):
    """With the model's path, which may need quotes."""
    model = Path("my run/final-model.pt")
    model.parent.mkdir()
    model.write_bytes(b"12345")
    folder = RunFolder(model.parent, "pretrain")
    folder.add_start({"files": [model.name]})
    print_results(folder, model, "generate", "finetune", prompt="One day")
    files, name, *lines = capsys.readouterr().out.splitlines()
    assert (files, name.split(maxsplit=2)) == ("files:", ["5", "B", str(model)])
    assert lines[0] == "next:" and len(lines) == 4
    words = [shlex.split(line) for line in lines[1:]]
    assert words[0][-2:] == ["--prompt", "One day"]
    assert all(str(model) in line for line in words)
    assert Path(words[2][1]).name == "check_model_precision.py"


# ---------------------------------------------------------------------------- time and memory


def plan_and_task(option: str, **changes) -> TrainingPlan:
    """300 sequences of 6,000 tokens in steps of ten, ten epochs; a small model."""
    config = LlamaConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, max_seq_len=32)
    flags = "--epochs 10 --batch_size 10 --pretrain_batch_size 10"
    options = parse_options(["--option", option, *flags.split()])
    sizes = {"sequences": 300, "tokens": 6000, "sequence_length": 32, "logits_width": 64}
    sizes |= {"trainable_parameters": 9, "muon_parameters": 0, "config": config} | changes
    return TrainingPlan(options.with_global_batch(1), 1, "cpu", "float32", **sizes)


@pytest.mark.parametrize("option", ["pretrain", "finetune"])
def test_how_long_it_takes_is_in_the_plan(option, monkeypatch):
    """By hand: steps of 200 tokens at 1 ms each, and 0.3 s for the update."""
    plan, timed = plan_and_task(option), []

    def measure(options, config, *_, rows, context, **__):
        timed.append((context, rows, config.vocab_size))
        return Speed(1e-3, 0.3)

    monkeypatch.setattr(sessions, "measure", measure)
    line = sessions.time_line(plan, torch.device("cpu"), 300)
    assert line.split(maxsplit=1)[1] == (
        "about 2 min 30 s of training, at 400 tokens/s (by steps timed here)"
    )
    assert timed == [(20, 10, 64)]
    assert "about 50 s of" in sessions.time_line(plan, torch.device("cpu"), 100)  # of a resumed run
    large = plan_and_task(option, config=LlamaConfig(vocab_size=32000))
    monkeypatch.setattr(sessions, "eager_flops", lambda *_: 200 * large.flops_per_token())
    line = sessions.time_line(large, torch.device("cpu"), 300)
    assert "about 5 min" in line and line.endswith("(not measured: expected)")
    assert len(timed) == 2


def test_timing_steps_changes_no_random_number():
    """The first weights of a run are those that its seed gives."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert "timed here" in sessions.time_line(plan_and_task("finetune"), torch.device("cpu"), 9)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak of memory to read")
@pytest.mark.parametrize("train", ["", "--train chat-train.jsonl"])
def test_memory_of_finetuning_is_what_the_plan_says(train, tmp_path):
    """453 MB were planned and 848 measured: the kernels of a thousand shapes were kept.

    Measured by the system, in the process itself: what it reports of a child that has ended is no
    less than what its parent had.
    """
    words = ["--option", "finetune", "--max_steps", "20", "--dtype", "bfloat16", *train.split()]
    words += ["--pretrained_model_path", str(SHIPPED_MODEL), "--save_dir", str(tmp_path / "run")]
    code = (
        "import sys; from pathlib import Path; import run_llama; from config import parse_options\n"
        "assert run_llama.main(parse_options(sys.argv[1:])) == 0\n"
        "print(Path('/proc/self/status').read_text())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT / "data",
        env=environment,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    planned = 1e6 * float(re.search(r"^memory +(\d+) MB", done.stdout, flags=re.M)[1])
    measured = 1024 * int(re.search(r"^VmHWM:\s+(\d+) kB", done.stdout, flags=re.M)[1])
    assert done.returncode == 0 and planned == pytest.approx(measured, rel=0.2)
