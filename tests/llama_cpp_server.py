"""llama.cpp itself, by the package xllamacpp, as an oracle."""

from __future__ import annotations

import ctypes
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llama import Llama
from tokenizer import Tokenizer


@contextmanager
def llama_cpp(path: Path) -> Iterator[Callable[..., dict]]:
    """A function that asks llama.cpp's server, which has loaded the file, on the CPU in float32."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp: pip install xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 256, 1, 0
    settings.cpuparams.n_threads, settings.verbosity = 1, 0
    settings.warmup = settings.fit_params = False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)
    # Its end may wait for its threads for ever: it lasts as long as the process.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(server))

    def ask(what: str, **body) -> dict:
        request = urllib.request.Request(
            f"{server.listening_address}/{what}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    yield ask


def their_ids(ask: Callable[..., dict], text: str) -> list[int]:
    return ask("tokenize", content=text, add_special=True, parse_special=False)["tokens"]


def their_tokens(ask: Callable[..., dict], text: str, count: int) -> list[int]:
    options = {"temperature": 0, "return_tokens": True, "ignore_eos": True}
    return ask("completion", prompt=text, n_predict=count, **options)["tokens"]


def our_tokens(model: Llama, tokenizer: Tokenizer, text: str, count: int) -> list[int]:
    ids = tokenizer.encode(text, bos=True, eos=False)
    return model.generate(torch.tensor([ids]), count, 0.0)[0].tolist()[len(ids) :]
