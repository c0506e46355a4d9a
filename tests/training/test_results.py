"""What a run leaves at its end, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import RESUME, command, evaluate_as, pretrain, write_stories

from minllama.formats.pt_file import load_pt


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder that has nothing but text: 47 chunks of 16 tokens to train on."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path)


def named_result() -> str:
    """The model that the record of the run names."""
    return json.loads(Path("run/run.json").read_text(encoding="utf-8"))["result"]


def test_the_result_of_an_overfitted_run_is_its_best_model(monkeypatch):
    """Every later command takes it, also after the run was resumed and ended again."""
    with monkeypatch.context() as patch:
        evaluate_as(patch, 9.0, 3.0, 4.0)
        done = pretrain("--epochs 2 --best_model_interval 1")
    best = Path("run/best-model.pt")
    assert named_result() == best.name and f"{best} is the model of that step" in done.out
    assert load_pt(best)["step"] == 15
    used = command("--option generate --save_dir run --prompt One --max_new_tokens 2")
    assert f"using --save_dir's {best}" in used.error
    with monkeypatch.context() as patch:
        evaluate_as(patch, 2.0)
        assert command(f"{RESUME} --epochs 3").status == 0
    assert named_result() == "final-model.pt"
