"""What is said of a finished run: true of its figures."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from config import LlamaConfig, Options, parse_options
from minllama.runs.advice import MORE_TEXT, Outcome, advise, remedied
from minllama.runs.plan import TrainingPlan
from minllama.runs.run_folder import RunFolder

USUAL = Outcome(
    parameters=10**6,
    tokens=20 * 10**6,
    distinct=10**7,
    train_loss=3.0,
    val_loss=3.1,
)


@pytest.mark.parametrize(
    "change, rose, most",
    [
        ({}, False, "more text and more training together"),
        ({"tokens": 10**6}, False, "more training (--epochs or --minutes)"),
        ({"distinct": 10**6, "train_loss": 2.0}, False, "more text: the model is overfitted"),
        ({"tokens": 12 * 10**5, "distinct": 10**5}, False, "more text: it has read its own 12"),
        ({"tokens": 200 * 10**6, "distinct": 10**8}, False, "a larger model"),
        ({"distinct": 10**6, "train_loss": 1.0, "val_loss": 4.0}, True, "more text; else fewer"),
        ({"val_loss": None}, False, "more text and more training together"),
        ({"tokens": 10**6, "is_rate_typed": True}, False, "Muon, which learns more in as many"),
    ],
)
def test_what_would_help_most_follows_from_the_figures(change, rose, most):
    """50 reviews over 25 epochs ended at perplexity 628, and nothing said why."""
    outcome = dataclasses.replace(USUAL, **change)
    figures, help_, _ = advise(outcome, rose=rose)
    assert help_.startswith(f"what would help most: {most}")
    assert f"{outcome.epochs:.3g} times" in figures
    assert ("validation loss" in figures) == (outcome.val_loss is not None)


OVERFITTED = {"distinct": 10**6, "train_loss": 1.0, "val_loss": 4.0}


@pytest.mark.parametrize(
    "change, rose, words",
    [
        (OVERFITTED, True, ["fewer epochs or a smaller model, or --dropout 0.2"]),
        (OVERFITTED | {"dropout": 0.2}, True, ["fewer epochs or a smaller model"]),
        (OVERFITTED | {"is_timed": True}, True, ["else a smaller model, or --dropout 0.2"]),
        (OVERFITTED, False, ["overfitted to its own; then --dropout 0.2"]),
        (OVERFITTED | {"dropout": 0.3}, False, ["overfitted to its own"]),
        ({"tokens": 10**6, "is_timed": True}, False, ["more --minutes: it has seen little"]),
    ],
)
def test_what_the_run_had_is_not_proposed(change, rose, words):
    """`then --dropout 0.2` was said after a run with it, and --minutes where that was typed."""
    help_ = advise(dataclasses.replace(USUAL, **change), rose=rose)[1]
    assert all(word in help_ for word in words)
    assert ("--dropout" in help_) == (not change.get("dropout") and "train_loss" in change)
    assert not (change.get("is_timed") and "epochs" in help_)


def plan_of(options: Options) -> TrainingPlan:
    """Of a run with 20 steps an epoch."""
    sizes = {name: 1 for name in ("trainable_parameters", "muon_parameters", "sequence_length")}
    sizes |= {"sequences": 20 * options.global_batch_size, "tokens": 1000, "logits_width": 64}
    config = LlamaConfig(dim=96, n_layers=5, n_heads=6, n_kv_heads=3)
    return TrainingPlan(options, 1, "cpu", "float32", config, **sizes)


@pytest.mark.parametrize(
    "typed, remedy, more",
    [
        ("--epochs 3", "training", {"epochs": 6}),
        ("--max_steps 7", "training", {"max_steps": 14}),  # of 100: a longer schedule changes none
        ("--max_steps 70", "training", {"epochs": 10, "max_steps": 140}),
        ("--max_steps 150", "training", {"epochs": 10, "max_steps": 200}),
        ("--max_steps 250", "training", {"epochs": 10}),
        ("--schedule_steps 9 --max_steps 7", "training", {"schedule_steps": 18, "max_steps": 14}),
        ("--schedule_steps 9 --max_steps 3", "training", {"max_steps": 6}),
        ("--minutes 4", "training", {"minutes": 8.0}),
        ("--minutes 4 --dropout 0.1", "text", {"pretrain_data": ("a b.txt", MORE_TEXT)}),
        ("--gradient_accumulation_steps 4 --epochs 3", "training", {"epochs": 6}),
        (
            "--pretrain_data a c --data_weights 3 1 --epochs 2",
            "both",
            {"pretrain_data": ("a", "c", MORE_TEXT), "data_weights": (3.0, 1.0, 1.0), "epochs": 4},
        ),
        ("--pretrain_lr 0.01", "muon", {"optimizer": "muon", "pretrain_lr": None}),
        ("--minutes 4", "model", {"dim": 96, "n_layers": 10, "n_heads": 6, "n_kv_heads": 3}),
        ("--model_size tiny", "model", {"dim": 96, "n_layers": 10, "n_heads": 6, "n_kv_heads": 3}),
    ],
)
def test_the_command_with_the_remedy_is_the_one_typed_but_for_that(typed, remedy, more, tmp_path):
    """What the program chose is not in it, since it chooses again; read back, only that differs.

    The accumulation that was typed was missing in it, so the batch was a quarter.
    """
    if "pretrain_data" not in typed:
        typed = f"--pretrain_data 'a b.txt' {typed}"
    options = parse_options(["--option", "pretrain", *shlex.split(typed)])
    # As the program replaces what was not typed.
    chosen = dataclasses.replace(options.with_global_batch(1), pretrain_lr=0.5, eval_interval=77)
    folder = RunFolder(tmp_path / "run", "pretrain")
    folder.path.mkdir()
    folder.add_start({"options": chosen.to_plain(), "typed": sorted(options.given)})
    words = folder.repeating_words(remedied(remedy, plan_of(chosen)))
    again = parse_options(words)
    assert again.save_dir.name == "run-again"
    differs = {
        name: value
        for name in options.to_plain()
        if (value := getattr(again, name)) != getattr(options, name) and name != "save_dir"
    }
    assert differs == more


def test_a_model_that_was_continued_keeps_its_shape(tmp_path):
    """A command with another one would be refused."""
    (tmp_path / "a.pt").write_bytes(b"")
    words = ["--option", "pretrain", "--pretrained_model_path", str(tmp_path / "a.pt")]
    assert not remedied("model", plan_of(parse_options(words).with_global_batch(1)))
