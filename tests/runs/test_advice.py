"""What is said of a finished run: true of its figures."""

from __future__ import annotations

import dataclasses

import pytest

from minllama.runs.advice import Outcome, advise

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
