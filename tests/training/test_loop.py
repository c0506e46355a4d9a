"""The train loop: steps, stops and resumes, numbers that go wrong, memory that runs out."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import (
    RESUME,
    assert_same,
    assert_same_run,
    command,
    evaluate_as,
    pretrain,
    progress,
    read_ahead,
    records,
    steps,
    stop_after,
    write_labelled,
    write_model,
    write_stories,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optimizer
from config import IGNORE_INDEX
from llama import load_pretrained
from minllama.formats.pt_file import load_pt, save_pt
from minllama.machine.device import is_out_of_memory
from minllama.machine.ranks import Ranks
from minllama.runs.checkpoints import load_checkpoint
from minllama.system.errors import RunFailed
from minllama.system.signals import StopRequest
from minllama.training import loop, setup, task
from minllama.training.loop import halve_micro_batch
from minllama.training.run import Progress
from utils import PretrainDataset


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder that has nothing but text: 47 chunks of 16 tokens to train on."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path)


@pytest.fixture
def finetune() -> str:
    """A finetuning of 8 steps per epoch."""
    labelled = write_labelled(Path.cwd())
    model = write_model(Path.cwd())
    words = f"--option finetune --pretrained_model_path {model} {labelled} --save_dir run"
    return f"{words} --lr 0.01 --epochs 2 --dtype float32"


def raising(error: Exception) -> Callable[..., Any]:
    """A function that takes anything and raises."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


# ---------------------------------------------------------------------------- steps


def test_learning_rate_follows_the_contract():
    """With 10 warmup steps the first step runs at 0.01 of the peak and the eleventh at the peak."""
    pretrain("--epochs 1 --warmup_steps 10 --max_steps 12 --min_lr 1e-7")
    rates = [record["lr"] for record in records()]
    assert rates[0] == pytest.approx(0.01 * 0.01) and rates[10] == pytest.approx(0.01)
    assert rates[11] < rates[10]


def test_accumulation_equals_one_big_batch():
    """Also where the last window and its last batch are short: 47 chunks in windows of 9.

    The original divided each micro-batch's mean by the window's length, which weights the tokens
    of a short batch more than the others'.
    """
    for folder, batch, accumulated in (("a", 9, 1), ("b", 3, 3)):
        pretrain(
            f"--epochs 1 --val_fraction 0 --pretrain_batch_size {batch} --save_dir {folder} "
            f"--gradient_accumulation_steps {accumulated}"
        )
    a, b = (load_pretrained(f"{folder}/final-model.pt").state_dict() for folder in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)  # Adam magnifies rounding
    pairs = list(zip(records("a/metrics.jsonl"), records("b/metrics.jsonl"), strict=True))
    assert len(pairs) == 7
    for one, other in pairs:
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=2e-6)
        assert one["tokens"] == other["tokens"]


def test_gradients_are_clipped_before_the_update_and_recorded_unclipped():
    """A norm of 0 never clips; the record has the norm before clipping either way."""
    seen = []

    def watch(folder: str, clip: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            real = loop.update

            def update(run, *rest):
                parameters = run.optimizer.param_groups
                norms = [p.grad.norm() for group in parameters for p in group["params"]]
                seen.append(torch.stack(norms).norm().item())
                real(run, *rest)

            patch.setattr(loop, "update", update)
            pretrain(f"--max_steps 1 --save_dir {folder} --grad_clip {clip}")

    watch("clipped", "0.5")
    watch("whole", "0")
    norm = records("clipped/metrics.jsonl")[0]["grad_norm"]
    assert seen[0] == pytest.approx(0.5, rel=1e-4) and seen[1] == pytest.approx(norm)
    assert norm > 0.6


def test_activation_checkpointing_changes_nothing_but_memory():
    """The same weights, with dropout drawn a second time in the backward pass."""
    for folder, flag in (("whole", ""), ("run", "--activation_checkpointing")):
        pretrain(f"--max_steps 3 --dropout 0.1 --save_dir {folder} {flag}")
    assert_same_run("whole", "run", "pretrain-step-3.pt")


def test_a_batch_without_targets_is_not_a_nan(monkeypatch):
    """Nothing to predict is a loss of 0 and no gradient, not 0 / 0."""
    real = PretrainDataset.batch

    def empty(dataset, indices):
        tokens, targets = real(dataset, indices)
        return tokens, torch.full_like(targets, IGNORE_INDEX)

    monkeypatch.setattr(PretrainDataset, "batch", empty)
    monkeypatch.setattr(PretrainDataset, "count_targets", lambda *_: 0)
    done = pretrain("--max_steps 2 --val_fraction 0")
    assert done.status == 0 and "not finite" not in done.out and records()[0]["loss"] == 0


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a tensor's value, or a shape that depends on
    values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "is_nonzero")
        self.count += any(word in name for word in waits)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", ["", "--optimizer adamw", "--dropout 0.1 --document_mask"])
def test_a_step_waits_once_for_the_device(words, monkeypatch):
    """Loss, norm and all; with micro-batches accumulated, too. Twice a step a GPU stood idle."""
    real, lists, waits = loop.optimizer_step, [], []
    monkeypatch.setattr(Ranks, "gather_numbers", watch_numbers(lists))

    def optimizer_step(run, batches):
        with Waits() as mode:
            record = real(run, batches)
        waits.append(mode.count)
        return record

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    assert pretrain(f"--max_steps 3 --gradient_accumulation_steps 2 {words}").status == 0
    assert waits == [0, 0, 0] and lists == [2, 2, 2]


def watch_numbers(lists: list[int]) -> Callable[..., Any]:
    """`gather_numbers`, noting how many numbers the device is asked for."""
    real = Ranks.gather_numbers

    def gather_numbers(ranks, computed, *known):
        lists.append(len(computed))
        return real(ranks, computed, *known)

    return gather_numbers


def test_without_dropout_no_random_state_is_taken(monkeypatch):
    """Nothing would be drawn again; of a GPU it takes as long as a small model's step."""
    monkeypatch.setattr(loop, "random_state", raising(ZeroDivisionError()))
    assert pretrain("--max_steps 2").status == 0
    with pytest.raises(ZeroDivisionError):
        pretrain("--max_steps 2 --dropout 0.1 --overwrite")


@pytest.mark.parametrize("words", [12, 13, 14, 15])
def test_texts_of_about_a_chunk_train(words):
    """chunk - 1, chunk, chunk + 1 and chunk + 2 tokens, BOS and EOS among them."""
    Path("text.jsonl").write_text('{"text": "' + "a " * words + 'a"}', encoding="utf-8")
    done = pretrain("--epochs 1 --val_fraction 0")
    assert done.status == 0 and f"{words + 3:,} tokens in {1 + (words > 14)} chunks" in done.out
    assert steps() == [1]


def test_the_best_model_is_looked_for_when_it_is_due():
    """After every `best_model_interval` epochs, at the end, and with --eval_interval."""
    pretrain("--epochs 3 --max_steps 45 --best_model_interval 2 --eval_interval 10")
    evaluated = [record["step"] for record in records() if record["val_loss"] is not None]
    assert evaluated == [10, 15, 20, 30, 40, 45]
    losses = {record["step"]: record["val_loss"] for record in records()}
    best = progress("run/pretrain-epoch-3.pt")
    looked = [10, 20, 30, 40, 45]
    assert best["best"] == min(losses[step] for step in looked)
    assert losses[best["best_step"]] == best["best"]


@pytest.mark.parametrize("value", [math.nan, math.inf, None, 9.0, 2.0])
def test_only_a_lower_number_is_a_new_best(value):
    """NaN compares false with everything: it once became the best, and then anything did."""

    class Stub(loop.Run):
        def __init__(self) -> None:
            self.task = type("Task", (), {"goal": "val_loss", "higher_is_better": False})
            self.progress = Progress(step=5)

    run = Stub()
    assert run.note_best({"val_loss": 2.0})
    assert not run.note_best({"val_loss": value}) and run.progress.best == 2.0


# ---------------------------------------------------------------------------- stop and resume


@pytest.mark.parametrize(
    ("stops", "words"),
    [
        ([3], "--gradient_accumulation_steps 2"),
        ([1, 15, 20], ""),  # 15 steps are an epoch: the stop comes before its evaluation
        ([5], "--gradient_accumulation_steps 2 --optimizer muon"),
        ([5], "--eval_interval 5 --checkpoint_interval 2 --max_steps 8"),
        ([2, 6], "--gradient_accumulation_steps 2 --max_steps 7 --dtype bfloat16"),
        ([2, 6], "--gradient_accumulation_steps 2 --max_steps 7 --dtype float16"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(stops, words, monkeypatch):
    """Bit for bit, with dropout, from the middle of an epoch, at its end, three times in a row.

    float16 brings the gradient scaler's state along.
    """
    words = f"--epochs 2 --dropout 0.1 {words}"
    assert pretrain(f"{words} --save_dir whole").status == 0
    for number, step in enumerate(stops):
        with monkeypatch.context() as patch:
            resume = "--resume auto" if number else ""
            assert pretrain(f"{words} {resume}", stop=stop_after(step, patch)).status == 130
        assert steps() == list(range(1, len(steps()) + 1)) and step - len(steps()) in (0, 1)
    assert pretrain(f"{words} --resume auto").status == 0
    last = next((f"step-{n}" for n in (7, 8) if f"--max_steps {n}" in words), "epoch-2")
    assert_same_run("whole", "run", f"pretrain-{last}.pt")
    for name in ("final-model.pt", "best-model.pt"):
        whole, resumed = (load_pretrained(f"{folder}/{name}") for folder in ("whole", "run"))
        assert_same(dict(whole.state_dict()), dict(resumed.state_dict()))


@pytest.mark.parametrize("words", ["--gradient_accumulation_steps 2", "--lora_rank 2"])
def test_finetuning_resumes_bit_equal(finetune, words, monkeypatch):
    """The same loop as pretraining: dropout, buckets and the best epoch survive a stop."""
    assert command(f"{finetune} {words} --save_dir whole").status == 0
    expected = Path("whole/toy-dev-finetuning-output.txt").read_bytes()
    stop = stop_after(6, monkeypatch)
    assert command(f"{finetune} {words}", stop=stop).status == 130
    assert command(f"{finetune} {words} --resume auto").status == 0
    assert_same_run("whole", "run", "finetune-toy-epoch-2.pt", "finetune-toy-metrics.jsonl")
    assert Path("run/toy-dev-finetuning-output.txt").read_bytes() == expected


def test_a_compiled_finetuning_says_that_it_does_not_resume_bit_for_bit(finetune, monkeypatch):
    """Its losses differed in the last digits from some step on, and nothing said so."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(setup, "check_compiler", lambda device: None)
    assert command(f"{finetune} --max_steps 2 --compile on").status == 0
    done = command(f"{finetune} --max_steps 3 --resume auto")
    assert done.status == 0 and "may differ in the last digits" in done.out


def test_ranks_stop_by_what_they_agreed_on_in_the_step(monkeypatch):
    """With loss and norm, without an exchange of its own; before the first step and at the end they
    ask each other, and so one that was told since then does not leave the others waiting."""

    class Stub(loop.Run):
        def __init__(self) -> None:
            self.ranks, self.stop, self.stop_agreed = Ranks(world_size=2), StopRequest(), None
            self.folder = SimpleNamespace(missing_folder_error=lambda *, now: None)

    asked, run = [], Stub()
    monkeypatch.setattr(Ranks, "agree_to_stop", lambda ranks, stop: asked.append(1) or True)
    assert run.should_stop() and len(asked) == 1
    run.agree_to_stop([0, 0])
    run.stop.signal_number = signal.SIGINT  # this rank alone, after the step
    assert not run.should_stop() and len(asked) == 1
    run.stop.signal_number = None
    run.agree_to_stop([0, signal.SIGTERM])
    assert run.stop.signal_number == signal.SIGTERM
    assert run.should_stop() and len(asked) == 1
    assert run.should_stop(at_end=True) and len(asked) == 2


def test_a_signal_in_the_first_step_saves_after_it(monkeypatch):
    """Compiling takes half a minute inside the first step; Ctrl-C then must not be lost."""

    def slow_compile(module, **_):
        def compiled(*inputs):
            if not Path("run/metrics.jsonl").read_text(encoding="utf-8"):  # the first step
                signal.raise_signal(signal.SIGTERM)
            return module(*inputs)

        return compiled

    monkeypatch.setattr(torch, "compile", slow_compile)
    monkeypatch.setattr("minllama.training.setup.check_compiler", lambda device: None)
    assert pretrain("--compile").status == 128 + signal.SIGTERM
    assert progress("run/pretrain-step-1.pt")["step"] == 1


def test_batches_read_ahead_are_the_same_batches(monkeypatch):
    """As for a GPU: over the ends of epochs, evaluations beside it, a stop and the run's end; and
    the thread ends with the loop, however that ends."""
    words = "--epochs 2 --dropout 0.1 --eval_interval 4 --optimizer adamw"
    assert pretrain(f"{words} --save_dir whole").status == 0
    read_ahead(monkeypatch)
    with monkeypatch.context() as patch:
        assert pretrain(words, stop=stop_after(13, patch)).status == 130
        assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]
    assert command(RESUME).status == 0
    assert_same_run("whole", "run", "pretrain-epoch-2.pt")
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_a_resumed_run_takes_the_flags_of_the_run(monkeypatch):
    """`--resume auto` without --pretrain_lr and --dtype once continued at their defaults."""
    assert pretrain("--epochs 1 --save_dir whole").status == 0
    with monkeypatch.context() as patch:
        assert pretrain("--epochs 1", stop=stop_after(5, patch)).status == 130
    assert command(RESUME).status == 0
    assert_same_run("whole", "run", "pretrain-epoch-1.pt")


def test_a_resumed_run_decays_as_typed():
    """Its optimizer took the decay of the checkpoint, whatever --weight_decay said."""

    def decays() -> set[float]:
        groups = load_checkpoint(newest())["optimizer"]["param_groups"]
        return {group["weight_decay"] for group in groups}

    def newest() -> Path:
        return max(Path("run").glob("pretrain-step-*.pt"), key=lambda p: int(p.stem[14:]))

    assert pretrain("--weight_decay 0.2 --max_steps 2 --keep_last 0").status == 0
    assert decays() == {0.2, 0.0}
    done = command(f"{RESUME} --max_steps 4 --weight_decay 0.7")
    assert "changed      --weight_decay from 0.2 to 0.7" in done.out and decays() == {0.7, 0.0}
    typed = load_checkpoint(Path("run/pretrain-step-4.pt"))["model"]
    assert command(f"{RESUME} --max_steps 5").status == 0
    assert decays() == {0.7, 0.0}, "the decay of the last start is the run's"
    words = "--option pretrain --cache_dir cache --resume run/pretrain-step-2.pt --max_steps 4"
    assert command(words).status == 0
    assert decays() == {0.2, 0.0}
    other = load_checkpoint(Path("run/pretrain-step-4.pt"))["model"]
    assert not torch.equal(typed["layers.0.attention.compute_query.weight"],
                           other["layers.0.attention.compute_query.weight"])  # fmt: skip


def test_what_came_after_an_older_checkpoint_is_set_aside():
    """`--resume auto` once returned to the steps that resuming an older checkpoint had given up."""
    assert pretrain("--checkpoint_interval 3 --keep_last 0 --max_steps 9").status == 0
    words = "--option pretrain --cache_dir cache --resume run/pretrain-step-3.pt"
    done = command(f"{words} --max_steps 5")
    assert done.status == 0 and "set aside    pretrain-step-9.pt, pretrain-step-6.pt" in done.out
    assert steps() == [1, 2, 3, 4, 5]
    names = {path.name for path in Path("run").glob("pretrain-step-*")}
    assert names == {
        "pretrain-step-3.pt", "pretrain-step-5.pt",
        "pretrain-step-6.pt.abandoned", "pretrain-step-9.pt.abandoned",
    }  # fmt: skip
    done = command(f"{RESUME} --max_steps 7")
    assert f"resuming     {Path('run/pretrain-step-5.pt')}" in done.out
    assert steps() == [1, 2, 3, 4, 5, 6, 7]


def test_the_same_steps_may_be_given_up_twice():
    """What the first time set aside makes way for what the second does."""
    assert pretrain("--checkpoint_interval 2 --keep_last 0 --max_steps 4").status == 0
    for _ in range(2):
        words = "--option pretrain --cache_dir cache --resume run/pretrain-step-2.pt"
        assert command(f"{words} --max_steps 4").status == 0
    assert len(list(Path("run").glob("pretrain-step-*"))) == 3 and steps() == [1, 2, 3, 4]


def test_a_finished_run_says_that_nothing_is_left():
    """--resume auto of a run that had ended once went straight to its sample, without a word."""
    assert pretrain("--max_steps 2").status == 0
    done = command(f"{RESUME} --max_steps 2")
    told = "again: the run ended after step 2; a larger --max_steps lets it continue"
    assert done.status == 0 and told in done.out
    assert "nothing is left" not in command(f"{RESUME} --max_steps 3").out


def test_a_run_may_go_on_in_another_dtype():
    """A float32 run resumed in float16 was refused: its gradient scaler had left no state."""
    assert pretrain("--max_steps 2").status == 0
    for number, dtype in enumerate(("float16", "float32"), start=3):
        done = command(f"{RESUME} --dtype {dtype} --max_steps {number}")
        assert done.status == 0 and f"to {dtype}" in done.out, done.error
        scaler = load_checkpoint(Path(f"run/pretrain-step-{number}.pt"))["scaler"]
        assert bool(scaler) == (dtype == "float16")
    assert steps() == [1, 2, 3, 4]


def test_progress_takes_only_what_it_wrote():
    """A checkpoint's values have other types only where it is damaged."""
    kept = Progress()
    kept.load({"step": 3, "best": 2.5, "pending": None, "unknown": 1})
    assert (kept.step, kept.best, kept.tokens) == (3, 2.5, 0)
    for wrong in ({"step": "3"}, {"step": 1.5}, {"tokens": None}, {"pending": 3}):
        with pytest.raises(ValueError, match=f"its {next(iter(wrong))}"):
            Progress().load(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": 0},
        {"step": -5},
        {"step": True},
        {"tokens": 10**400},
        {"best": float("nan")},
        {"best": "1"},
        {"held_out": 3},
        {"spent": -1.0},
        {"pending": {}},
        {"pending": {"step": 1}},
        {"pace": {"step": -1, "place": 0.0, "end": 0}},
        {"pace": {"step": 1, "place": float("inf"), "end": 0}},
        {"pace": {}},
    ],
    ids=str,
)
def test_progress_takes_only_what_counts(wrong):
    """Of the right types and the wrong sizes: a division by zero later, or a negative index."""
    with pytest.raises(ValueError, match="its "):
        Progress().load(wrong)


# ---------------------------------------------------------------------------- a lost best model


def test_a_missing_best_model_is_written_again_at_the_end(finetune):
    """Finetuning ended with "no such file", whenever it was resumed, for ever."""
    assert command(finetune).status == 0
    best = Path("run/finetune-toy-best-model.pt")
    best.unlink()
    done = command(f"{finetune} --resume auto")
    assert done.status == 0 and "best-model.pt is missing" in done.out
    state = load_checkpoint(Path("run/finetune-toy-epoch-2.pt"))["model"]
    written = load_pretrained(best).state_dict()
    assert torch.equal(written["norm.weight"], state["llama.norm.weight"])
    assert "after step 16" in done.out and "dev accuracy" in done.out


def test_a_best_value_of_other_data_is_forgotten(finetune):
    """Resumed with another --dev, a run compared the accuracies on two files."""
    assert command(f"{finetune} --max_steps 8").status == 0
    lines = Path("toy-dev.txt").read_text(encoding="utf-8").splitlines()
    Path("toy-dev.txt").write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    done = command(f"{finetune} --resume auto")
    assert done.status == 0 and "the held-out data is not that of the run so far" in done.out
    assert progress("run/finetune-toy-epoch-2.pt")["best_step"] > 8
    done = command(f"{finetune} --resume auto --epochs 3")
    assert done.status == 0 and "held-out data" not in done.out


def test_a_best_model_that_is_lost_on_the_way_is_chosen_again(monkeypatch):
    """The best of the steps from there on; before, it was never written unless it got better."""
    with monkeypatch.context() as patch:
        words = "--epochs 2 --eval_interval 4"
        assert pretrain(words, stop=stop_after(9, patch)).status == 130
    Path("run/best-model.pt").unlink()
    done = command(RESUME)
    assert done.status == 0 and "best-model.pt is missing" in done.out
    assert load_pretrained("run/best-model.pt") and progress("run/pretrain-epoch-2.pt")["best"]


def test_a_disk_that_was_full_for_the_best_model(finetune, monkeypatch):
    """The run ends with exit status 1 and says so; the same command with --resume auto ends it."""
    from minllama.runs import checkpoints as saving

    def full(path, payload):
        if "best-model" in path.name:
            raise OSError(28, "No space left on device", str(path))
        return save_pt(path, payload)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_pt", full)
        done = command(finetune)
    assert done.status == 1 and "finetune-toy-best-model.pt was not written" in done.error
    assert "--resume auto" in done.error and "Traceback" not in done.error
    done = command(f"{finetune} --resume auto")
    assert done.status == 0 and "dev accuracy" in done.out


def test_a_missing_best_model_of_a_run_without_labels_to_measure_on(finetune):
    """Its best is by the training loss, which is not at hand then: the last model has to do."""
    lines = Path("toy-dev.txt").read_text(encoding="utf-8").splitlines()
    unlabelled = [f"-1 ||| {line.split(' ||| ')[1]}" for line in lines]
    Path("toy-dev.txt").write_text("\n".join(unlabelled) + "\n", encoding="utf-8")
    assert command(finetune).status == 0
    Path("run/finetune-toy-best-model.pt").unlink()
    assert command(f"{finetune} --resume auto").status == 0
    assert Path("run/finetune-toy-best-model.pt").is_file()


def test_a_best_model_of_the_future_is_not_that_of_an_older_checkpoint(monkeypatch):
    """Resumed at step 3, a run reported its best value of step 3 for the weights of step 9."""
    evaluate_as(monkeypatch, 9.0, 2.0, 1.0, 0.5)
    words = "--checkpoint_interval 3 --eval_interval 3 --keep_last 0 --max_steps 9"
    assert pretrain(words).status == 0 and load_pt("run/best-model.pt")["step"] == 9
    evaluate_as(monkeypatch, 3.0)
    words = "--option pretrain --cache_dir cache --resume run/pretrain-step-3.pt --max_steps 5"
    done = command(words)
    assert done.status == 0 and "of other steps: a new best is chosen" in done.out
    state, best = load_checkpoint(Path("run/pretrain-step-5.pt")), load_pt("run/best-model.pt")
    assert (state["progress"]["best"], state["progress"]["best_step"]) == (3.0, 5)
    assert best["step"] == 5
    assert_same(best["model"]["norm.weight"], state["model"]["norm.weight"])


def test_a_best_model_of_the_past_is_kept(monkeypatch):
    """The file's step tells one of steps that were given up from one that is still the best."""
    evaluate_as(monkeypatch, 9.0, 1.0, 2.0, 3.0)
    words = "--checkpoint_interval 3 --eval_interval 3 --keep_last 0 --max_steps 9"
    assert pretrain(words).status == 0
    before = Path("run/best-model.pt").read_bytes()
    evaluate_as(monkeypatch, 4.0)
    words = "--option pretrain --cache_dir cache --resume run/pretrain-step-6.pt --max_steps 7"
    done = command(words)
    assert done.status == 0 and "a new best is chosen" not in done.out
    assert Path("run/best-model.pt").read_bytes() == before
    assert progress("run/pretrain-step-7.pt")["best_step"] == load_pt("run/best-model.pt")["step"]


# ---------------------------------------------------------------------------- early stopping


def test_early_stopping_ends_the_run_and_keeps_it_ended(finetune, monkeypatch):
    """Interrupted in the step that ended its patience, or killed after it, it trained on."""
    words = f"{finetune} --early_stopping 1 --lr 1e-9 --epochs 9"
    metrics = "run/finetune-toy-metrics.jsonl"
    with monkeypatch.context() as patch:
        assert command(words, stop=stop_after(16, patch)).status == 130
    for _ in range(2):
        assert command(f"{words} --resume auto").status == 0 and len(steps(metrics)) == 16
    done = command(f"{words} --overwrite")
    assert (
        "stopped: no better dev_accuracy in 1 evaluations in a row" in done.out
        and len(steps(metrics)) == 16
    )
    done = command(f"{words} --resume auto")
    assert "nothing is left to train" in done.out and "a larger --early_stopping" in done.out
    assert len(steps(metrics)) == 16


# ---------------------------------------------------------------------------- numbers going wrong


def poison(patch: pytest.MonkeyPatch, bad: range, *, gradients: bool = False, cured: bool = True):
    """Make the loss, or the gradients alone, of steps infinite or NaN.

    `cured` by a lower learning rate.
    """
    real = loop.backward

    def backward(run, *rest):
        loss = real(run, *rest)
        if run.progress.step + 1 not in bad or (cured and run.progress.lr_scale < 1):
            return loss
        if not gradients:
            return loss * math.inf
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.fill_(math.nan)
        return loss

    patch.setattr(loop, "backward", backward)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_step_that_is_not_finite_is_left_out_and_located(gradients, monkeypatch):
    """Before the update; the message names file and place of the chunks."""
    poison(monkeypatch, range(4, 5), gradients=gradients)
    done = pretrain("--max_steps 5 --checkpoint_interval 1 --keep_last 0 --pretrain_batch_size 6")
    assert done.status == 0
    (line,) = [line for line in done.out.splitlines() if "skipped" in line]
    what = "gradient" if gradients else "loss"
    assert f"step 4 skipped: its {what} is not finite (1 in a row)" in line
    assert "text.jsonl, token " in line and "and 2 more" in line
    assert records()[3]["grad_norm" if gradients else "loss"] is None
    assert records()[4]["loss"] > 0
    before, after, next_one = (
        load_checkpoint(Path(f"run/pretrain-step-{step}.pt"))["model"] for step in (3, 4, 5)
    )
    assert_same(before, after)
    assert all(tensor.isfinite().all() for tensor in next_one.values())


def test_ten_bad_steps_roll_back_with_half_the_learning_rate(monkeypatch):
    """To the last checkpoint before them, not to one among them; each step recorded once."""
    poison(monkeypatch, range(7, 40))
    done = pretrain(
        "--max_steps 20 --epochs 3 --lr_scheduler constant --warmup_steps 0 --checkpoint_interval 3"
    )
    assert done.status == 0 and "back to step 6, with 0.5 of the learning rate" in done.out
    assert steps() == list(range(1, 21))
    rates = [record["lr"] for record in records()]
    assert rates == [0.01] * 6 + [0.005] * 14
    state = progress("run/pretrain-step-20.pt")
    assert state["lr_scale"] == 0.5 and state["skipped"] == 0


def test_a_run_that_rolled_back_does_not_resume_in_the_future_it_left(monkeypatch):
    """Back at step 6 and stopped at 8, --resume auto took the checkpoint of the abandoned step 15.

    What is resumed has to end as the run that was never stopped.
    """
    poison(monkeypatch, range(7, 40))
    words = "--max_steps 18 --epochs 3 --checkpoint_interval 3 --val_fraction 0"
    assert pretrain(f"{words} --save_dir whole").status == 0
    stop, real = StopRequest(), loop.optimizer_step

    def optimizer_step(run: loop.Run, batches: loop.Prefetch) -> dict[str, Any]:
        record = real(run, batches)
        if run.progress.lr_scale < 1 and record["step"] == 8:
            stop.signal_number = signal.SIGINT
        return record

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", optimizer_step)
        done = pretrain(words, stop=stop)
    assert done.status == 130 and "back to step 6" in done.out
    later = [f"pretrain-step-{step}.pt" for step in (15, 12, 9)]
    assert f"set aside    {', '.join(later)}, made after step 6" in done.out
    assert {f"{name}.abandoned" for name in later} == {p.name for p in Path("run").glob("*.ab*")}
    done = command(f"{RESUME} --max_steps 18")
    assert done.status == 0 and f"resuming     {Path('run/pretrain-step-8.pt')}" in done.out
    assert steps() == list(range(1, 19))
    assert_same_run("whole", "run", "pretrain-step-18.pt")


def test_a_rollback_forgets_the_best_model_of_the_steps_it_gives_up(monkeypatch):
    """best-model.pt kept the weights of an abandoned step 8, reported as the best, of step 4.

    Those of step 4 were overwritten: from the rollback on, a new best is chosen.
    """
    poison(monkeypatch, range(9, 40))
    # Before training; at steps 4, 8, 12 and 16; after the rollback at 8, 12, 16 and 18.
    evaluate_as(monkeypatch, 9.0, 5.0, 3.0, 3.0, 3.0, 7.0, 6.0, 6.5, 8.0)
    words = "--pretrain_batch_size 1 --checkpoint_interval 6 --eval_interval 4 --max_steps 18"
    done = pretrain(words)
    assert done.status == 0 and "back to step 6" in done.out
    assert "of other steps: a new best is chosen" in done.out
    state = progress("run/pretrain-step-18.pt")
    assert (state["best"], state["best_step"]) == (6.0, 12)
    assert load_pt("run/best-model.pt")["step"] == 12


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_is_null(value, monkeypatch):
    """The records had NaN and Infinity, which are Python's own: other readers of JSON refuse them.

    Such a model is not the best one either.
    """
    found = {"val_loss": value, "val_perplexity": value, "bits_per_byte": value}
    monkeypatch.setattr(task, "evaluate_tokens", lambda *_: dict(found))
    assert pretrain("--max_steps 2 --eval_interval 1").status == 0
    lines = Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        record = json.loads(line, parse_constant=raising(ValueError("no JSON")))
        assert [record[name] for name in found] == [None] * 3
    assert len(lines) == 2 and not Path("run/best-model.pt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--on_nonfinite stop", "the last checkpoint is as it was"),
        ("--checkpoint_interval 0", "no earlier checkpoint"),
    ],
)
def test_where_going_back_is_not_wanted_or_not_possible(words, message, monkeypatch):
    """One line, exit status 1, and what is on the disk stays."""
    poison(monkeypatch, range(5, 40))
    done = pretrain(f"--epochs 3 --max_steps 30 --checkpoint_interval 3 {words}")
    assert done.status == 1 and message in done.error and done.error.count("\n") == 1
    if "stop" in words:
        assert Path("run/pretrain-step-12.pt").is_file()


def test_going_back_ends_some_time(monkeypatch):
    """A text that is bad at any learning rate must not be tried for ever."""
    poison(monkeypatch, range(7, 100), cured=False)
    done = pretrain("--epochs 3 --max_steps 30 --checkpoint_interval 6 --val_fraction 0")
    assert done.status == 1 and done.out.count("back to step 6") == 4 and "1/16" in done.error


@pytest.mark.parametrize("words", ["--on_nonfinite stop", "--checkpoint_interval 5"])
def test_gradients_that_stay_nan_end_a_float16_run(words, monkeypatch):
    """The scale fell to 1e-39, nothing was ever learnt, and the exit status was 0.

    A scale above 1 is halved, as for gradients that overflow; from there on updates are skipped and
    counted.
    """
    poison(monkeypatch, range(2, 200), gradients=True, cured=False)
    done = pretrain(f"--epochs 9 --max_steps 100 --dtype float16 --val_fraction 0 {words}")
    assert done.status == 1 and "10 steps in a row" in done.error, done.error
    skipped = [line for line in done.out.splitlines() if "skipped: its gradient" in line]
    assert len(skipped) >= 10 and skipped[0].startswith("step 18 skipped")  # 2^16 is halved first


def test_gradients_that_overflow_float16_are_no_fault(monkeypatch):
    """Its first scale is too large for some models: halved, and nothing is said."""
    poison(monkeypatch, range(1, 4), gradients=True)
    done = pretrain("--max_steps 5 --dtype float16 --val_fraction 0")
    assert done.status == 0 and "skipped" not in done.out
    assert load_checkpoint(Path("run/pretrain-step-5.pt"))["scaler"]["scale"] == 2.0**13


# ---------------------------------------------------------------------------- out of memory


def little_memory(patch: pytest.MonkeyPatch, rows: int, error: Exception) -> None:
    """A device on which more than `rows` sequences at once do not fit."""
    real = nn.Embedding.forward

    def forward(module, tokens):
        if module.training and len(tokens) > rows:
            raise error
        return real(module, tokens)

    patch.setattr(nn.Embedding, "forward", forward)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_micro_batch(error, monkeypatch):
    """Same global batch, same order: without dropout the losses are those of enough memory."""
    assert pretrain("--max_steps 6 --save_dir enough").status == 0
    little_memory(monkeypatch, 1, error)
    done = pretrain("--max_steps 6")
    assert done.status == 0
    lines = [line for line in done.out.splitlines() if line.startswith("out of memory")]
    assert len(lines) == 2 and "each micro-batch of 4 is trained on in 4 parts" in lines[1]
    for one, other in zip(records(), records("enough/metrics.jsonl"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert (one["tokens"], one["lr"]) == (other["tokens"], other["lr"])


def test_the_split_is_remembered_and_resumes_bit_equal(monkeypatch):
    """A resumed run does not run out of memory again, and draws the same dropout."""
    little_memory(monkeypatch, 2, torch.OutOfMemoryError("CUDA out of memory"))
    assert pretrain("--max_steps 6 --dropout 0.1 --save_dir whole").status == 0
    assert pretrain("--max_steps 3 --dropout 0.1").status == 0
    done = command(f"{RESUME} --max_steps 6")
    assert done.status == 0 and "out of memory" not in done.out
    for part in ("model", "optimizer", "rng"):
        one, two = (load_checkpoint(Path(name, "pretrain-step-6.pt")) for name in ("whole", "run"))
        assert_same(one[part], two[part])


def test_a_split_micro_batch_stays_compiled(monkeypatch):
    """Memory that was short once switched --compile off to the run's end, and in every resumed one.

    Only whole micro-batches were compiled, and from then on there were none.
    """
    rows = []

    def compile_nothing(module, dynamic):
        return lambda *inputs: rows.append(len(inputs[0])) or module(*inputs)

    monkeypatch.setattr(torch, "compile", compile_nothing)
    monkeypatch.setattr(setup, "check_compiler", lambda device: None)
    with monkeypatch.context() as patch:
        little_memory(patch, 2, torch.OutOfMemoryError("CUDA out of memory"))
        assert pretrain("--max_steps 2 --compile").status == 0
    assert rows == [4, 2, 2, 2, 2]
    assert command(f"{RESUME} --max_steps 3").status == 0
    assert rows[5:] == [2, 2]


def test_one_sequence_that_does_not_fit(monkeypatch):
    """There is nothing left to halve: one line with what helps."""
    little_memory(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    done = pretrain("--max_steps 6")
    assert done.status == 1 and done.error.count("\n") == 1
    assert "one sequence at a time" in done.error and "--max_seq_len" in done.error


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (task, "evaluate_tokens", torch.OutOfMemoryError("CUDA out of memory. Tried to")),
        (optimizer.AdamW, "step", RuntimeError("DefaultCPUAllocator: not enough memory: you")),
        (optimizer.AdamW, "step", MemoryError()),
    ],
)
def test_out_of_memory_outside_the_backward_pass(owner, name, error, monkeypatch):
    """In the first evaluation, or in the optimizer's first step, it ended in a traceback."""
    monkeypatch.setattr(owner, name, raising(error))
    done = pretrain("--max_steps 2")
    assert done.status == 1 and done.error.count("\n") == 1
    assert done.error.startswith("run_llama.py: error: out of memory: give a smaller batch")


def test_other_errors_are_not_taken_for_it():
    """A bug must show."""
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RunFailed):
        halve_micro_batch(Progress(split=4), 4)


def test_a_run_that_is_asked_to_stop_before_its_first_step_says_so():
    """Nothing was trained: the folder holds nothing that claims otherwise."""
    done = pretrain("--max_steps 3", stop=StopRequest(signal_number=signal.SIGINT))
    assert done.status == 130 and "Traceback" not in done.error
