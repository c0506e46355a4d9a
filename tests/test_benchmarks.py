"""The benchmarks that no machine of the tests can run as they are meant: that they run at all."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch
from hurried import hurried

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import decoding  # noqa: E402
import gpu  # noqa: E402

from llama import load_pretrained  # noqa: E402


@pytest.mark.parametrize("part", ["loss", "attention", "optimizer"])
@pytest.mark.filterwarnings("ignore")  # the profiler's
def test_the_parts_of_gpu_run_on_a_cpu(part: str, monkeypatch):
    """On a GPU a row that fails costs the others' minutes; each row of a table has its columns."""
    monkeypatch.setattr(gpu, "seconds_of", lambda work, device: work() or 1.0)
    args = argparse.Namespace(device="cpu", small=True, shapes=["T"])
    lines = list(gpu.PARTS[part](args))
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) > 3 and len({row.count("|") for row in rows}) == 1
    assert not [line for line in lines if "failed" in line]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_waits_are_counted_in_the_loop_of_today(monkeypatch):
    """It took a module's place that was gone, and only a GPU would have told."""
    modes, words = [], gpu.shape_words("T")
    smaller = "--dim 16 --hidden_dim 16 --n_layers 1 --n_heads 2 --n_kv_heads 2 --max_seq_len 256"
    monkeypatch.setattr(gpu, "shape_words", lambda shape: [*words, *smaller.split()])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with hurried():
        (line,) = gpu.waits(argparse.Namespace(device="cuda"))
    assert line.endswith(str([0] * 8)) and modes == ["warn", "default"] * 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    """And how to try it out; nothing is measured."""
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="gpu.py: torch finds no CUDA GPU here; --device cpu"):
        gpu.main()


def test_the_model_for_run_c_does_not_end_at_once(tmp_path: Path, monkeypatch):
    """A random model that begins with BOS found BOS the likeliest next, which ends run.c without a
    rate: a TypeError. 20 tokens, chosen here, and none of them is it."""
    monkeypatch.setattr(decoding.subprocess, "run", lambda *_, **__: argparse.Namespace(stderr=b""))
    decoding.prepare_c_programs(tmp_path, tmp_path, ["T"])
    model, ids = load_pretrained(tmp_path / "T.bin"), [1]
    for _ in range(20):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    assert 1 not in ids[1:]
    with pytest.raises(SystemExit, match="run wrote no token of T"):
        decoding.c_program_tokens_per_second({"folder": tmp_path, "who": "run.c", "shape": "T"})
