"""The three commands of the top as programs on the PATH, as pip installs them."""

from __future__ import annotations

import runpy
import sys

from minllama import ROOT


def run_llama() -> None:
    """`minllama`: python run_llama.py."""
    _run("run_llama.py")


def check_model_precision() -> None:
    """`minllama-models`: python check_model_precision.py."""
    _run("check_model_precision.py")


def tokenizer() -> None:
    """`minllama-tokenizer`: python tokenizer.py."""
    _run("tokenizer.py")


def _run(script: str) -> None:
    # As Python does: the script's folder comes first, so `config` is not another package's.
    sys.path.insert(0, str(ROOT))
    # Also in sys.argv[0]: what a run prints to be typed next begins with it.
    sys.argv[0] = str(ROOT / script)
    runpy.run_path(sys.argv[0], run_name="__main__")
