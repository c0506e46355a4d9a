"""The commands as a user runs them, on small models and texts."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import check_model_precision
import run_llama
from config import TrainingPlan, parse_options
from llama import decode_step, load_pretrained
from tokenizer import Tokenizer
from utils import StopRequest, load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--dim 32 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 32 --pretrain_batch_size 4 "
    "--dtype float32 --save_dir run --cache_dir cache --pretrain_lr 0.01"
).split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, as a user would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run_llama.py"])


@pytest.fixture
def text_file(tmp_path) -> Path:
    """About 70 chunks of 32 tokens, in documents of different lengths."""
    stories = (ROOT / "data" / "stories-train.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(stories[:10]) + "\n", encoding="utf-8")
    return path


def run(line: str | list[str], *, small: bool = True, stop: StopRequest | None = None) -> int:
    """Run a command in this process; returns its exit status."""
    words = line.split() if isinstance(line, str) else line
    options = parse_options([*words, *(SMALL if small else [])])
    return run_llama.main(options, stop)


def stop_after(steps: int, monkeypatch) -> StopRequest:
    """A stop request that comes while optimizer step number `steps` is made."""
    stop, real = StopRequest(), run_llama.optimizer_step

    def step(run):
        record = real(run)
        if record["step"] == steps:
            stop.signal_number = signal.SIGINT
        return record

    monkeypatch.setattr(run_llama, "optimizer_step", step)
    return stop


def records(folder: str = "run", name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(s) for s in Path(folder, name).read_text(encoding="utf-8").splitlines()]


def assert_same(a, b, path=""):
    """Nested tensors and plain values are equal bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


# ---------------------------------------------------------------------------- pretrain


def test_pretraining_leaves_all_it_promises(text_file, capsys):
    """Checkpoints, models, records and a picture; each step once; the loss falls."""
    assert run(f"--option pretrain --pretrain_data {text_file} --epochs 3") == 0
    out = capsys.readouterr().out
    assert "chunks from" in out and "Loaded" in out and "a sample of what it writes" in out
    assert "--option generate" in out and "check_model_precision.py" in out
    names = {path.name for path in Path("run").iterdir()}
    assert names == {
        "pretrain-epoch-3.pt", "final-model.pt", "best-model.pt",
        "metrics.jsonl", "run.json", "loss-curve.svg",
    }  # fmt: skip
    lines = records()
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["val_loss"] < 8
    wanted = {"epoch", "tokens", "lr", "grad_norm", "tokens_per_second", "mfu", "memory"}
    assert wanted <= lines[0].keys()
    assert lines[-1]["val_perplexity"] == pytest.approx(math.exp(lines[-1]["val_loss"]))
    assert Path("run/loss-curve.svg").read_text(encoding="utf-8").startswith("<svg")
    started = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["starts"][0]
    assert started["options"]["epochs"] == 3 and started["environment"]["torch"]
    for name in ("final-model.pt", "best-model.pt", "pretrain-epoch-3.pt"):
        model = load_pretrained(Path("run") / name)
        assert model.vocabulary == Tokenizer().model_bytes


def test_learning_rate_follows_the_contract(text_file):
    """With lr 1e-4 and 10 warmup steps the first step runs at 1e-6 and the eleventh at the peak."""
    run(f"--option pretrain --pretrain_data {text_file} --warmup_steps 10".split() + [
        "--max_steps", "12", "--min_lr", "1e-7"
    ])  # fmt: skip
    rates = [line["lr"] for line in records()]
    assert rates[0] == pytest.approx(0.01 * 0.01) and rates[10] == pytest.approx(0.01)
    assert rates[11] < rates[10]


@pytest.mark.parametrize(
    ("dtype", "stops", "optimizer"),
    [
        ("float32", [3], "adamw"),
        ("float32", [1, 14, 20], "adamw"),
        ("float32", [14], "adamw"),
        ("bfloat16", [14, 20], "adamw"),
        ("float16", [3], "adamw"),
        ("float32", [3], "muon"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    text_file, monkeypatch, dtype, stops, optimizer
):
    """Bit for bit, with dropout, from the middle of an epoch, at its end, three times in a row."""
    command = f"--option pretrain --pretrain_data {text_file} --epochs 2 --dropout 0.1"
    command += " --max_steps 5" if dtype == "float16" else ""  # slow on a CPU
    command += f" --optimizer {optimizer}"
    command += f" --dtype {dtype}"  # float16 brings the gradient scaler's state along
    options = [*command.split(), *[w for w in SMALL if w not in ("--dtype", "float32")]]
    assert run_llama.main(parse_options([*options, "--save_dir", "whole"])) == 0
    for number, steps in enumerate(stops):
        with monkeypatch.context() as patch:
            resume = ["--resume", "auto"] if number else []
            status = run_llama.main(parse_options([*options, *resume]), stop_after(steps, patch))
        assert status == 130
        assert [line["step"] for line in records()] == list(range(1, len(records()) + 1))
    assert run_llama.main(parse_options([*options, "--resume", "auto"])) == 0
    last = "pretrain-step-5.pt" if dtype == "float16" else "pretrain-epoch-2.pt"
    whole, resumed = (load_checkpoint(Path(folder) / last) for folder in ("whole", "run"))
    for part in ("model", "optimizer", "scaler", "rng"):
        assert_same(whole[part], resumed[part], part)
    for part in ("step", "tokens", "best", "best_step"):
        assert whole["progress"][part] == resumed["progress"][part]
    timed = {"tokens_per_second", "mfu", "memory"}
    strip = [[{k: v for k, v in r.items() if k not in timed} for r in records(f)]
             for f in ("whole", "run")]  # fmt: skip
    assert strip[0] == strip[1]


def test_a_run_keeps_its_optimizer(text_file, capsys):
    """The states of the two do not fit each other: refused in one line, whichever came first."""
    for first, other in (("muon", "adamw"), ("adamw", "muon")):
        line = f"--option pretrain --pretrain_data {text_file} --max_steps 1 --overwrite"
        assert run(f"{line} --optimizer {first}") == 0
        resume = f"--option pretrain --pretrain_data {text_file} --resume auto --max_steps 2"
        capsys.readouterr()
        assert run(f"{resume} --optimizer {other}") == 2
        assert f"--optimizer {other} differs from the checkpoint's {first}" in (
            capsys.readouterr().err
        )
        assert run(resume) == 0


def test_accumulation_equals_one_big_batch(text_file):
    """Also where the last window and its last batch are short: weights agree to 1e-6.

    The original divided each micro-batch's mean by the window's length, which weights the tokens
    of a short batch more than the others'.
    """
    command = f"--option pretrain --pretrain_data {text_file} --epochs 1 --val_fraction 0"
    for folder, batch, windows in (("a", 9, 1), ("b", 3, 3)):
        line = f"{command} --gradient_accumulation_steps {windows}".split()
        options = parse_options([*line, *SMALL, "--pretrain_batch_size", str(batch)])
        assert run_llama.main(dataclasses.replace(options, save_dir=Path(folder))) == 0
    a, b = (load_pretrained(f"{folder}/final-model.pt").state_dict() for folder in "ab")
    assert len(records("a")) == len(records("b")) > 2
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)  # Adam magnifies rounding
    for one, other in zip(records("a"), records("b"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=2e-6)
        assert one["tokens"] == other["tokens"]


def test_batch_larger_than_the_data_trains(tmp_path, capsys):
    """`avg_loss = train_loss / num_batches` with no batches was a ZeroDivisionError."""
    (tmp_path / "short.txt").write_text("Once there was a fox.", encoding="utf-8")
    assert run("--option pretrain --pretrain_data short.txt --pretrain_batch_size 64") == 0
    out = capsys.readouterr().out
    assert "one short chunk" in out and "no validation" in out
    assert len(records()) == 5


def test_two_tokens_and_fewer(tmp_path, capsys):
    """The least that can be trained on is one token to read and one to predict."""
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    assert run("--option pretrain --pretrain_data empty.txt") == 2
    assert "empty.txt" in capsys.readouterr().err
    (tmp_path / "one.txt").write_text("a", encoding="utf-8")  # BOS, a, EOS
    assert run("--option pretrain --pretrain_data one.txt --epochs 1") == 0


def test_a_run_is_never_overwritten_silently(text_file, capsys):
    """The folder's run stays, and both ways on are named; other files are not ours to touch."""
    command = f"--option pretrain --pretrain_data {text_file} --max_steps 2"
    assert run(command) == 0
    Path("run/notes.txt").write_text("mine", encoding="utf-8")
    before = Path("run/final-model.pt").read_bytes()
    assert run(command) == 2
    error = capsys.readouterr().err
    assert "--resume auto" in error and "--overwrite" in error and error.count("\n") == 1
    assert Path("run/final-model.pt").read_bytes() == before
    assert run("--option pretrain --pretrain_data nothing.txt --overwrite") == 2
    assert Path("run/final-model.pt").read_bytes() == before, "a bad command removed a run"
    assert run(command + " --overwrite") == 0
    assert Path("run/notes.txt").read_text(encoding="utf-8") == "mine"


def test_resuming_with_other_settings_is_refused(text_file, capsys):
    """Position in the data means nothing under another batch, shape, seed or text.

    The micro-batches that a batch is made of may change.
    """
    command = f"--option pretrain --pretrain_data {text_file} --max_steps 3"
    assert run(command) == 0
    capsys.readouterr()
    words = [*command.split(), *SMALL, "--resume", "auto"]
    for change, name in (
        ("--global_batch_size 8", "--global_batch_size"),
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps"),
        ("--seed 1", "--seed"),
        ("--dim 64", "model shape"),
        ("--val_fraction 0.5", "--val_fraction"),
    ):
        assert run_llama.main(parse_options([*words, *change.split()])) == 2
        assert name in capsys.readouterr().err
    smaller = ["--pretrain_batch_size", "2", "--max_steps", "5"]
    assert run_llama.main(parse_options([*words, *smaller])) == 0
    assert records()[-1]["step"] == 5


def test_damaged_checkpoint_is_skipped_and_said(text_file, capsys):
    """--resume auto takes the newest that verifies."""
    command = f"--option pretrain --pretrain_data {text_file} --checkpoint_interval 2"
    assert run(f"{command} --max_steps 5") == 0
    newest = Path("run/pretrain-step-5.pt")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert run(f"{command} --max_steps 6 --resume auto") == 0
    out = capsys.readouterr().out
    assert "skipped" in out and "pretrain-step-5.pt" in out and "pretrain-step-4.pt" in out


def test_resume_takes_the_flags_of_the_run(text_file, monkeypatch):
    """`--resume auto` without --pretrain_lr and --dtype once went on at their defaults."""
    words = [*f"--option pretrain --pretrain_data {text_file} --epochs 2".split(), *SMALL]
    assert run_llama.main(parse_options([*words, "--save_dir", "whole"])) == 0
    with monkeypatch.context() as patch:
        assert run_llama.main(parse_options(words), stop_after(5, patch)) == 130
    line = "--option pretrain --save_dir run --resume auto --cache_dir cache"
    assert run_llama.main(parse_options(line.split())) == 0
    whole = load_pretrained("whole/final-model.pt").state_dict()
    assert_same(dict(whole), dict(load_pretrained("run/final-model.pt").state_dict()))


def test_the_command_that_is_printed_resumes(text_file, monkeypatch, capsys):
    """A run started with `--resume FILE` once printed that old file as the one to go on from."""
    words = [*f"--option pretrain --pretrain_data {text_file}".split(), *SMALL]
    assert run_llama.main(parse_options([*words, "--max_steps", "3"])) == 0
    words = "--option pretrain --resume run/pretrain-step-3.pt --cache_dir cache".split()
    with monkeypatch.context() as patch:
        assert run_llama.main(parse_options(words), stop_after(7, patch)) == 130
    printed = capsys.readouterr().out.rsplit("go on with:", 1)[1].split()
    assert printed[:2] == ["python", "run_llama.py"] and "auto" in printed
    options = parse_options([*printed[2:], "--max_steps", "9", "--cache_dir", "cache"])
    assert run_llama.main(options) == 0
    assert [line["step"] for line in records()] == list(range(1, 10))


def test_a_run_is_resumed_in_its_own_folder(text_file, capsys):
    """`--resume a/FILE --save_dir b` once cut b's records and replaced its models."""
    words = [*f"--option pretrain --pretrain_data {text_file} --max_steps 2".split(), *SMALL]
    for folder in ("a", "b"):
        assert run_llama.main(parse_options([*words, "--save_dir", folder])) == 0
    before = Path("b/metrics.jsonl").read_bytes()
    resume = ["--resume", "a/pretrain-step-2.pt"]
    assert run_llama.main(parse_options([*words, *resume, "--save_dir", "b"])) == 2
    assert "--save_dir" in capsys.readouterr().err
    assert Path("b/metrics.jsonl").read_bytes() == before


def test_weights_are_no_state_to_resume_from(text_file, capsys):
    """final-model.pt after --resume is a natural mistake; it was a KeyError."""
    words = [*f"--option pretrain --pretrain_data {text_file} --max_steps 2".split(), *SMALL]
    assert run_llama.main(parse_options(words)) == 0
    assert run_llama.main(parse_options([*words, "--resume", "run/final-model.pt"])) == 2
    assert "final-model.pt" in capsys.readouterr().err


def test_a_value_that_is_no_number_is_never_the_best():
    """NaN compares false with everything: it once became the best, and then anything did."""
    task = run_llama.Task(*[None] * 3, goal="val_loss", higher_is_better=False, weights=None,
                          state=None, locate=None)  # fmt: skip
    progress = run_llama.Progress(step=5)
    assert run_llama.is_new_best(task, progress, {"val_loss": 2.0})
    for value in (math.nan, math.inf, None, 9.0, 2.0):
        assert not run_llama.is_new_best(task, progress, {"val_loss": value})
    assert progress.best == 2.0


def test_several_processes_without_a_launcher_are_refused(text_file, monkeypatch, capsys):
    """Each process once trained apart, on its own part of the data."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(f"--option pretrain --pretrain_data {text_file}") == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE=2" in error and "torchrun" in error and error.count("\n") == 1


def test_plan_alone_leaves_nothing(text_file, capsys):
    """--plan prints sizes, steps and memory, and writes no run."""
    assert run(f"--option pretrain --pretrain_data {text_file} --plan") == 0
    out = capsys.readouterr().out
    for word in ("parameters", "chunks", "steps", "memory", "resumable checkpoint"):
        assert word in out
    assert not Path("run").exists()


def test_plan_for_other_machines(text_file, capsys):
    """--world_size plans for GPUs that are not here; nor need text and vocabulary be."""
    words = "--option pretrain --plan --world_size 64 --model_size 7B --parallel fsdp"
    sizes = " --vocab_size 32000 --plan_tokens 2e12 --tokenizer_model none --pretrain_data none"
    assert run(words + sizes, small=False) == 0
    out = capsys.readouterr().out
    for line in ("6,738,415,616 parameters", "64 GPUs in 8 nodes", "per process (fsdp)", "MFU"):
        assert line in out
    assert "warning" not in out
    assert run(words.replace("fsdp", "ddp") + sizes, small=False) == 0
    assert "80 GB are free: try" in capsys.readouterr().out
    assert run(f"--option pretrain --plan --world_size 8 --pretrain_data {text_file}") == 0
    out = capsys.readouterr().out
    assert f"Loaded 74 chunks from {text_file}" in out and "1 node," in out


def test_a_batch_larger_than_the_data_is_told(text_file, capsys):
    """--pretrain_batch_size 500 of 60 chunks once went by without a word."""
    run(f"--option pretrain --plan --pretrain_data {text_file} --gradient_accumulation_steps 50")
    assert "up to 200 sequences and there are" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--pretrain_data missing.txt", ["--pretrain_data", "missing.txt"]),
        ("--pretrain_data data/sst-train.txt", ["python data/download.py sst"]),
        ("--pretrain_data bad.jsonl", ["bad.jsonl:2"]),
        ("--pretrain_data field.jsonl", ["field.jsonl:1", "text"]),
        ("--pretrain_data latin.txt", ["latin.txt:2", "--encoding_errors"]),
        ("--tokenizer_model missing.model", ["--tokenizer_model", "missing.model"]),
        ("--save_dir file.txt", ["--save_dir", "file.txt"]),
        ("--resume nothing.pt", ["nothing.pt"]),
        ("--resume auto", ["--resume auto"]),
        ("--resume text.pt --save_dir .", ["text.pt", "is no checkpoint", "-epoch-N.pt"]),
        ("--resume .", ["--resume .", "is a folder", "--resume auto"]),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, line, words):
    """Exit status 2, the culprit named, no traceback, and no file of a run left behind."""
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n', encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"good\nb\xe4d\n")
    (tmp_path / "file.txt").write_text("a", encoding="utf-8")
    (tmp_path / "text.pt").write_text("not a checkpoint", encoding="utf-8")
    assert run_llama.main(parse_options(["--option", "pretrain", *SMALL, *line.split()])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("run_llama.py: error:")
    for word in words:
        assert word in error
    assert not list(Path("run").glob("*")) if Path("run").exists() else True


def test_chunks_are_counted_and_never_truncated(real_data, capsys):
    """sst-train.txt with the Llama-2 vocabulary is 249 chunks of 1,024.

    Read as one string and tokenized with max_len=1024 it gave "1 chunk".
    """
    path, vocabulary = real_data / "sst-train.txt", real_data / "tokenizer.model"
    command = f"--option pretrain --pretrain_data {path} --tokenizer_model {vocabulary} --plan"
    assert run_llama.main(parse_options(command.split())) == 0
    assert f"Loaded 249 chunks from {path}" in capsys.readouterr().out


def start_process(*words: str) -> subprocess.Popen:
    """The program as a process of its own."""
    flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_llama.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        **flags,
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_signal_saves_and_the_run_goes_on(text_file, number, status):
    """A signal in the middle of training saves within a step and names the command that resumes.

    A signal that comes during the evaluation after a step saves that step too, its record still to
    be completed: the test once took the last record for the last step, and failed now and then.
    """
    words = ["--option", "pretrain", "--pretrain_data", str(text_file), "--epochs", "500", *SMALL]
    process = start_process(*words)
    metrics = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    assert "--resume auto" in out and "Traceback" not in out
    last = max(int(path.stem.split("-")[-1]) for path in Path("run").glob("pretrain-step-*.pt"))
    assert last - records()[-1]["step"] in (0, 1)
    assert run(f"--option pretrain --pretrain_data {text_file} --epochs 500 --resume auto".split()
               + ["--max_steps", str(last + 2)]) == 0  # fmt: skip
    assert [line["step"] for line in records()] == list(range(1, last + 3))


def test_a_signal_while_compiling_saves_after_the_step(text_file, monkeypatch):
    """Compiling takes half a minute inside the first step; Ctrl-C then must not be lost."""

    def slow_compile(module, **_):
        def compiled(*inputs):
            if not Path("run/metrics.jsonl").read_text(encoding="utf-8"):  # the first step
                signal.raise_signal(signal.SIGINT)
            return module(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", slow_compile)
    monkeypatch.setattr(run_llama, "check_compiler", lambda device: None)
    assert run(f"--option pretrain --pretrain_data {text_file} --compile") == 130
    assert load_checkpoint(Path("run/pretrain-step-1.pt"))["progress"]["step"] == 1


def test_what_compile_auto_chose_is_said_and_kept(text_file, monkeypatch, capsys):
    """Compiled arithmetic rounds differently: a resumed run must not choose anew."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    monkeypatch.setattr(run_llama, "compiler_problem", lambda device: None)
    monkeypatch.setattr(run_llama, "check_compiler", lambda device: None)
    monkeypatch.setattr(TrainingPlan, "compiling_pays", lambda plan, threads: (True, "why"))
    line = f"--option pretrain --pretrain_data {text_file} --epochs 2"
    assert run(f"{line} --max_steps 3") == 0
    assert "compile      on: why" in capsys.readouterr().out and len(compiled) == 1
    monkeypatch.setattr(TrainingPlan, "compiling_pays", lambda plan, threads: (False, "short"))
    assert run("--option pretrain --resume auto --max_steps 5".split()
               + ["--pretrain_data", str(text_file)]) == 0  # fmt: skip
    assert len(compiled) == 2
    monkeypatch.setattr(run_llama, "compiler_problem", lambda device: "no compiler")
    assert run(f"{line} --max_steps 1 --overwrite") == 0
    assert "compile      off: short" in capsys.readouterr().out and len(compiled) == 2


def test_profile_shows_where_a_step_goes(text_file, capsys):
    """A trace for a viewer, a table, the share that waits for data; the run itself is unchanged."""
    line = f"--option pretrain --pretrain_data {text_file} --epochs 2"
    assert run(f"{line} --profile") == 0
    out = capsys.readouterr().out
    assert "aten::mm" in out and "waiting for data" in out
    with gzip.open("run/profile.json.gz", "rt", encoding="utf-8") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"data", "forward and backward", "optimizer"} <= names
    profiled = load_pretrained(Path("run/final-model.pt")).state_dict()
    assert run(f"{line} --overwrite") == 0
    assert not Path("run/profile.json.gz").exists()
    assert_same(profiled, load_pretrained(Path("run/final-model.pt")).state_dict())
    assert run(f"{line} --overwrite --profile --max_steps 2") == 0
    assert "--profile: nothing to show" in capsys.readouterr().out


# ---------------------------------------------------------------------------- the other options


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    """A model of the embedded vocabulary, trained for a moment."""
    folder = tmp_path_factory.mktemp("model")
    words = (
        "--option pretrain --dim 32 --n_layers 2 --n_heads 2 --max_seq_len 128 --max_steps 20 "
        f"--pretrain_batch_size 4 --dtype float32 --save_dir {folder} --cache_dir {folder}"
    )
    assert run_llama.main(parse_options(words.split())) == 0
    return folder / "final-model.pt"


@pytest.fixture
def labelled(tmp_path) -> str:
    """Flags that name small labelled files: two words decide between three labels."""
    words = ["awful", "average", "excellent"]
    for split, size in (("train", 60), ("dev", 21), ("test", 9)):
        lines = [f"{i % 3} ||| The film number {i} is {words[i % 3]} ." for i in range(size)]
        (tmp_path / f"toy-{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "toy-label-mapping.json").write_text(json.dumps(words), encoding="utf-8")
    return "--train toy-train.txt --dev toy-dev.txt --test toy-test.txt"


def finetune_words(small_model: Path, labelled: str, extra: str = "") -> list[str]:
    words = f"--option finetune --pretrained_model_path {small_model} {labelled} --save_dir run"
    return f"{words} --lr 0.01 --epochs 4 --dtype float32 {extra}".split()


@pytest.mark.parametrize("mode", ["", "--freeze_backbone", "--lora_rank 2"])
def test_finetune_learns_and_writes_predictions(small_model, labelled, capsys, mode):
    """Each mode ends with figures, prediction files in the file's order, and an ordinary model."""
    assert run_llama.main(parse_options(finetune_words(small_model, labelled, mode))) == 0
    out = capsys.readouterr().out
    assert "dev accuracy" in out and "macro-F1" in out and "label \\ predicted" in out
    assert records("run", "finetune-toy-metrics.jsonl")[-1]["dev_accuracy"] is not None
    lines = Path("toy-dev-finetuning-output.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ||| ")[1] for line in lines] == [
        line.split(" ||| ")[1] for line in Path("toy-dev.txt").read_text("utf-8").splitlines()
    ]
    tuned = load_pretrained("run/finetune-toy-best-model.pt")
    before = load_pretrained(small_model)
    assert tuned.state_dict().keys() == before.state_dict().keys()
    same = all(
        torch.equal(a, b)
        for a, b in zip(tuned.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert same == (mode == "--freeze_backbone")
    if not mode:
        hits = [line[0] == str(i % 3) for i, line in enumerate(lines)]
        assert sum(hits) > 15


def test_finetune_resumes_bit_equal(small_model, labelled, monkeypatch):
    """The same loop as pretraining: dropout, buckets and the best epoch survive a stop."""
    words = finetune_words(small_model, labelled, "--gradient_accumulation_steps 2")
    assert run_llama.main(parse_options([*words, "--save_dir", "whole"])) == 0
    expected = Path("toy-dev-finetuning-output.txt").read_bytes()
    with monkeypatch.context() as patch:
        assert run_llama.main(parse_options(words), stop_after(6, patch)) == 130
    assert run_llama.main(parse_options([*words, "--resume", "auto"])) == 0
    whole = load_checkpoint(Path("whole/finetune-toy-epoch-4.pt"))
    resumed = load_checkpoint(Path("run/finetune-toy-epoch-4.pt"))
    for part in ("model", "optimizer", "rng", "progress"):
        if part != "progress":
            assert_same(whole[part], resumed[part], part)
    assert Path("toy-dev-finetuning-output.txt").read_bytes() == expected


def test_early_stopping_and_unlabelled_test(small_model, labelled, capsys):
    """No better dev accuracy for a while ends the run; a test file of -1 gets predictions only."""
    text = Path("toy-test.txt").read_text(encoding="utf-8").splitlines()
    unlabelled = "\n".join("-1 ||| " + line.split(" ||| ")[1] for line in text)
    Path("toy-test.txt").write_text(unlabelled + "\n", encoding="utf-8")
    words = finetune_words(small_model, labelled, "--early_stopping 1 --lr 1e-9 --epochs 9")
    assert run_llama.main(parse_options(words)) == 0
    out = capsys.readouterr().out
    assert "test: unlabelled" in out and "test accuracy" not in out
    assert len(records("run", "finetune-toy-metrics.jsonl")) == 2 * 8
    assert len(Path("toy-test-finetuning-output.txt").read_text("utf-8").splitlines()) == 9


def test_a_run_that_stopped_early_stays_stopped(small_model, labelled, monkeypatch):
    """Interrupted in the step that ended its patience it once trained on when resumed."""
    words = finetune_words(small_model, labelled, "--early_stopping 1 --lr 1e-9 --epochs 9")
    with monkeypatch.context() as patch:
        assert run_llama.main(parse_options(words), stop_after(16, patch)) == 130
    for _ in range(2):
        assert run_llama.main(parse_options([*words, "--resume", "auto"])) == 0
        assert len(records("run", "finetune-toy-metrics.jsonl")) == 16


def test_a_finetuning_checkpoint_is_a_model_file(small_model, labelled):
    """Its tensors once had a prefix that --verify called damage and nothing could load."""
    assert run_llama.main(parse_options(finetune_words(small_model, labelled))) == 0
    path = "run/finetune-toy-epoch-4.pt"
    assert check_model_precision.main([path, "--verify"]) == 0
    assert load_pretrained(path).vocabulary == Tokenizer().model_bytes
    best = "run/finetune-toy-best-model.pt"
    assert check_model_precision.main([best, "--convert", "pt", "--output", "copy.pt"]) == 0
    assert load_checkpoint(Path("copy.pt"))["label_names"] == ["awful", "average", "excellent"]


def test_predictions_never_replace_an_input(small_model, labelled, capsys):
    """`--dev X --dev_out X` once overwrote the labels with predictions."""
    before = Path("toy-dev.txt").read_bytes()
    words = f"--option prompt --pretrained_model_path {small_model} {labelled}"
    assert run_llama.main(parse_options([*words.split(), "--dev_out", "toy-dev.txt"])) == 2
    assert "--dev_out toy-dev.txt" in capsys.readouterr().err
    assert Path("toy-dev.txt").read_bytes() == before


@pytest.mark.parametrize("norm", ["sum", "token", "byte", "pmi"])
def test_prompting_does_not_depend_on_the_batch_size(small_model, labelled, norm):
    """Right-padded batches once read a pad position, so a prediction depended on its neighbours."""
    outputs = set()
    for size in (1, 10, 80):
        words = f"--option prompt --pretrained_model_path {small_model} {labelled}"
        words += f" --batch_size {size} --label_norm {norm} --shots 1"
        assert run_llama.main(parse_options(words.split())) == 0
        outputs.add(Path("toy-dev-prompting-output.txt").read_bytes())
    assert len(outputs) == 1


def test_a_long_sentence_is_cut_and_the_question_kept(small_model, labelled):
    """`max_sentence_len` once cut the end of the prompt, where the question stands."""
    llama = load_pretrained(small_model)
    tokenizer = Tokenizer(tokenizer_model=llama.vocabulary)
    prompts = run_llama.Prompts(
        tokenizer, "{sentence} Is this {labels}? It is", ["bad", "good"], context=64
    )
    sequences, start = prompts.sequences("word " * 500)
    text = tokenizer.decode(sequences[1])
    assert text.endswith("Is this bad or good? It is good") and text.startswith("word word")
    assert max(map(len, sequences)) <= 64 and start < min(map(len, sequences))


def test_generate_without_flags_is_the_original(small_model, capsys):
    """Two files, the assignment's prefix, temperature 0 and 1."""
    words = f"--option generate --pretrained-model-path {small_model} --use_gpu"
    assert run_llama.main(parse_options(words.split())) == 0
    out = capsys.readouterr().out
    assert "Temperature is 0" in out and "Temperature is 1" in out
    for name in ("generated-sentence-temp-0.txt", "generated-sentence-temp-1.txt"):
        assert Path(name).read_text(encoding="utf-8").startswith(run_llama.PREFIX)


def test_interrupted_generation_leaves_the_files_as_they_were(small_model):
    """Ctrl-C once replaced both whole texts by what had been written of the new ones."""
    Path("generated-sentence-temp-0.txt").write_text("whole", encoding="utf-8")
    stop = StopRequest(signal_number=signal.SIGINT)
    words = f"--option generate --pretrained_model_path {small_model}"
    assert run_llama.main(parse_options(words.split()), stop) == 130
    assert Path("generated-sentence-temp-0.txt").read_text(encoding="utf-8") == "whole"


def test_batched_prompts_give_what_each_gives_alone(small_model, capsys):
    """Different lengths, sampled, several samples, with a stop text."""
    base = f"--option generate --pretrained_model_path {small_model} --max_new_tokens 12".split()
    base += ["--temperature", "1", "--num_samples", "2", "--stop", "zzz"]
    prompts = ["One day", "There was once a little fox who lived near the old mill. She"]
    together = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert run_llama.main(parse_options([*base, *together])) == 0
    texts = capsys.readouterr().out
    for prompt in prompts:
        assert run_llama.main(parse_options([*base, "--prompt", prompt])) == 0
        alone = capsys.readouterr().out
        for part in alone.split("--- ")[1:]:
            assert part.split("\n", 1)[1].strip() in texts


def test_packed_weights_and_a_compiled_step_are_what_is_generated_with(
    small_model, capsys, monkeypatch
):
    """Each changes what computes, and greedily, on a small model, not what is written."""
    packed, calls = [], []
    lay_out = run_llama.Llama.lay_out_for_decoding

    def compile_step():
        return lambda *args: calls.append(len(args[1])) or decode_step(*args)

    monkeypatch.setattr(run_llama, "compile_step", compile_step)
    monkeypatch.setattr(run_llama, "check_compiler", lambda device: None)
    monkeypatch.setattr(
        run_llama.Llama,
        "lay_out_for_decoding",
        lambda self, dtype: packed.append(dtype) or lay_out(self, dtype),
    )
    base = f"--option generate --pretrained_model_path {small_model} --temperature 0".split()
    base += ["--prompt", "One day", "--max_new_tokens", "9"]
    texts = []
    for words in ([], ["--compile", "on"], ["--weights", "bfloat16"], ["--weights", "int8"]):
        assert run_llama.main(parse_options([*base, *words])) == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert packed == [torch.float32, torch.float32, torch.bfloat16, torch.int8]
    assert calls == [1] * 9  # one to compile with, then 8: the first token came with the prompt
    assert texts[1] == texts[0] and texts[0].startswith("One day")


def test_stop_text_is_cut_off_and_never_shown(small_model):
    """Text is held back while it may still turn into the stop text or half a character."""
    tokenizer = Tokenizer(tokenizer_model=load_pretrained(small_model).vocabulary)
    prompt = tokenizer.encode("Once", bos=True, eos=False)
    ids = tokenizer.encode("Once upon é a time there was", bos=True, eos=False)[len(prompt) :]
    row = run_llama.Continuation(prompt, tokenizer, ["time there"])
    shown = "".join(row.add(token) for token in ids) + row.add(None)
    assert shown == row.text == " upon é a "


def test_vocabularies_are_never_mixed_up(small_model, labelled, real_data, capsys):
    """A model file carries its vocabulary; another is refused with both fingerprints named."""
    words = f"--option generate --pretrained_model_path {small_model} --tokenizer_model"
    assert run_llama.main(parse_options([*words.split(), str(real_data / "tokenizer.model")])) == 2
    error = capsys.readouterr().err
    assert Tokenizer().fingerprint in error
    assert Tokenizer(tokenizer_model=real_data / "tokenizer.model").fingerprint in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"toy-train.txt": "0 | a\n"}, ["toy-train.txt:1"]),
        ({"toy-dev.txt": "0 ||| a\n7 ||| b\n"}, ["toy-dev.txt:2", "7"]),
        ({"toy-train.txt": "0 ||| a\n1 ||| b\n"}, ["names 3", "has 2"]),
        ({"toy-label-mapping.json": "{"}, ["toy-label-mapping.json", "JSON"]),
        ({"toy-train.txt": "-1 ||| a\n0 ||| b\n"}, ["toy-train.txt", "without a label"]),
    ],
)
@pytest.mark.parametrize("option", ["finetune", "prompt"])
def test_bad_labelled_files_are_one_line(small_model, labelled, capsys, change, words, option):
    """Found before the model is trained or asked, with file and line."""
    for name, text in change.items():
        Path(name).write_text(text, encoding="utf-8")
    line = f"--option {option} --pretrained_model_path {small_model} {labelled} --save_dir run"
    assert run_llama.main(parse_options(line.split())) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_outputs_that_cannot_be_written_are_found_first(small_model, labelled, capsys):
    """The original checked its output names after training."""
    Path("folder").mkdir()
    line = f"--option finetune --pretrained_model_path {small_model} {labelled} --dev_out folder"
    assert run_llama.main(parse_options(line.split())) == 2
    assert "--dev_out folder" in capsys.readouterr().err
    assert not Path("checkpoints").exists()


# ---------------------------------------------------------------------------- what is told


def test_a_finished_run_says_that_nothing_is_left(text_file, capsys):
    """--resume auto of a run that had ended once went straight to its sample, without a word."""
    words = f"--option pretrain --pretrain_data {text_file} --epochs 1"
    assert run(f"{words} --max_steps 2") == 0
    capsys.readouterr()
    assert run(f"{words} --max_steps 2 --resume auto") == 0
    out = capsys.readouterr().out
    assert "nothing is left to train: the run ended after step 2; a larger --max_steps" in out
    assert run(f"{words} --max_steps 3 --resume auto") == 0
    assert "nothing is left" not in capsys.readouterr().out


def test_what_is_read_as_plain_text_is_told(tmp_path, capsys):
    """A .csv was once read with all its commas, and a .md with its marks, without a word."""
    for name in ("a.csv", "b.md", "c.txt"):
        (tmp_path / name).write_text("one, two\n" * 50, encoding="utf-8")
    assert run("--option pretrain --plan --pretrain_data a.csv b.md c.txt") == 0
    out = capsys.readouterr().out
    assert "from a.csv\n  a table, read as plain text" in out and "make a .jsonl" in out
    assert "from b.md\n  read as plain text" in out
    assert "from c.txt\n  " not in out


def test_a_vocabulary_for_another_language_is_told(tmp_path, text_file, capsys):
    """Chinese under the embedded English vocabulary is three byte tokens a character."""
    (tmp_path / "zh.txt").write_text("从前有一个小女孩，她住在森林里。" * 40, encoding="utf-8")
    assert run("--option pretrain --plan --pretrain_data zh.txt") == 0
    out = capsys.readouterr().out
    assert "100% of the text is spelt byte by byte" in out
    assert "python tokenizer.py train --input zh.txt --vocab_size" in out
    assert run(f"--option pretrain --plan --pretrain_data {text_file}") == 0
    assert "byte by byte" not in capsys.readouterr().out


def test_a_run_folder_stands_for_its_model(text_file, tmp_path, capsys):
    """`--pretrained_model_path checkpoints` once asked for a config.json of Hugging Face."""
    assert run(f"--option pretrain --pretrain_data {text_file} --max_steps 1") == 0
    generate = "--option generate --prompt a --max_new_tokens 1 --pretrained_model_path run"
    assert run(generate) == 0
    assert f"is a folder: using {Path('run/final-model.pt')}" in capsys.readouterr().out
    Path("run/final-model.pt").rename("run/finetune-a-best-model.pt")
    assert run(generate) == 2
    error = capsys.readouterr().err
    assert "name one of" in error and str(Path("run/finetune-a-best-model.pt")) in error
    Path("run/best-model.pt").unlink()
    assert run(generate) == 0
    assert "using" in capsys.readouterr().out


def test_a_prompt_beyond_the_context_is_told(capsys):
    """The beginning of a long prompt was once left unread without a word."""
    words = ["--option", "generate", "--max_new_tokens", "1", "--prompt"]
    assert run([*words, "word " * 600], small=False) == 0
    assert "goes on from the last ones that fit" in capsys.readouterr().out
    assert run([*words, "word"], small=False) == 0
    assert "that fit" not in capsys.readouterr().out


@pytest.fixture
def few_reviews(tmp_path) -> str:
    """Flags that name labelled files of a few lines."""
    for split in ("train", "dev"):
        lines = "0 ||| bad " + "very " * 40 + "bad\n1 ||| good\n1 ||| fine\n"
        (tmp_path / f"few-{split}.txt").write_text(lines, encoding="utf-8")
    return "--train few-train.txt --dev few-dev.txt"


def test_sentences_that_were_cut_are_counted(few_reviews, capsys):
    """CFIMDB's reviews, cut to a small model's context, once looked as if they had been read."""
    words = f"{few_reviews} --max_sentence_len 20"
    assert run(f"--option prompt {words}", small=False) == 0
    assert "dev: 1 of 3 sentences were cut" in capsys.readouterr().out
    assert run(f"--option finetune --plan {words}", small=False) == 0
    out = capsys.readouterr().out
    assert "Loaded 3 sentences from few-train.txt (train), 1 of them cut to 20 tokens" in out
    assert run(f"--option finetune --plan {few_reviews}", small=False) == 0
    assert "cut" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shots 4", "--shots 4: --train few-train.txt has 3 examples"),
        ("--label_names twice.json", "'good' stands there more than once"),
        ("--label_names folder", "--label_names folder: is a folder"),
    ],
)
def test_labels_and_examples_that_cannot_be(few_reviews, tmp_path, capsys, words, message):
    """More shots than lines were once as many as there are; a name given twice was scored twice."""
    (tmp_path / "twice.json").write_text('["good", "good"]', encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text('["a", "b"]', encoding="utf-8")
    assert run(f"--option prompt {few_reviews} {words}", small=False) == 2
    assert message in capsys.readouterr().err


def test_a_newline_can_be_typed_in_a_template(few_reviews, monkeypatch):
    """A shell hands over the two characters; the prompt once had a backslash in it."""
    seen, real = [], run_llama.Prompts.text
    monkeypatch.setattr(
        run_llama.Prompts, "text", lambda self, s: seen.append(real(self, s)) or seen[-1]
    )
    words = ["--option", "prompt", *few_reviews.split(), "--prompt_template", "{sentence}\\nIt is"]
    assert run(words, small=False) == 0
    assert "good\nIt is" in seen
