"""Models in .pt files: what loads, and what is refused, in which words."""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
from oracles import (
    assert_same_weights,
    make_llama,
)

from config import LlamaConfig
from llama import Llama, load_pretrained, model_payload
from minllama.formats.model_file import read_model
from minllama.system.errors import UsageError


@pytest.fixture
def model(tiny_config: LlamaConfig) -> Llama:
    return make_llama(tiny_config)


def save(path: Path, **payload) -> Path:
    torch.save(payload, path)
    return path


def test_resumable_checkpoint_loads_as_a_model(model: Llama, tmp_path: Path):
    payload = model_payload(model) | {"optimizer": {"state": {0: torch.ones(3)}}, "progress": 7}
    assert_same_weights(load_pretrained(save(tmp_path / "a.pt", **payload)), model)


def test_torchs_old_file_format_loads(model: Llama, tmp_path: Path):
    payload = model_payload(model)
    torch.save(payload, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_same_weights(load_pretrained(tmp_path / "a.pt"), model)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "llama."])
def test_files_of_the_original_and_of_llama2c_load(
    tiny_config: LlamaConfig, tmp_path: Path, prefix: str
):
    """Other names, wrappers' prefixes, rotary tables, a classifier's head, no hidden_dim."""
    model = make_llama(tiny_config)
    short = {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}
    state = {f"{prefix}freqs_cos": torch.ones(32, 4), f"{prefix}freqs_sin": torch.ones(32, 4)}
    if prefix == "llama.":
        state |= {
            "classifier_head.weight": torch.ones(5, 32),
            "classifier_head.bias": torch.ones(5),
        }
    for name, tensor in model.state_dict().items():
        for long, renamed in short.items():
            name = name.replace(f"attention.compute_{long}.", f"attention.{renamed}.")
        state[prefix + name] = tensor
    args = {key: getattr(tiny_config, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    args |= {"vocab_size": 64, "max_seq_len": 32, "norm_eps": 1e-5, "multiple_of": 4}
    got = load_pretrained(save(tmp_path / "model", model=state, model_args=args | {"dropout": 0.0}))
    assert got.config.multiple_of == 4 and got.config.hidden_dim == tiny_config.hidden_dim
    for name, tensor in model.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor)
    assert got.output.weight is got.tok_embeddings.weight


def test_an_untied_file_of_others_is_seen_to_be_untied(model: Llama, tmp_path: Path):
    payload = model_payload(model)
    payload["model"]["output.weight"] = torch.randn(64, 32)
    del payload["model_args"]["tie_word_embeddings"]
    got = load_pretrained(save(tmp_path / "a.pt", **payload))
    assert not got.config.tie_word_embeddings
    assert torch.equal(got.output.weight, payload["model"]["output.weight"])


def drop(name):
    return lambda payload: payload["model"].pop(name)


def put(name, tensor):
    return lambda payload: payload["model"].update({name: tensor})


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop("norm.weight"), "tensor norm.weight missing"),
        (drop("output.weight"), "tensor output.weight missing"),
        (put("extra.weight", torch.ones(1)), "tensor extra.weight not of a Llama"),
        (put("norm.weight", torch.ones(31)), r"norm.weight has the shape \(31,\) .* \(32,\)"),
        (put("norm.weight", torch.ones(32, dtype=torch.int64)), "norm.weight holds torch.int64"),
        (put("norm.weight", torch.ones(1).expand(32)), "norm.weight is larger than what the file"),
        (put("output.weight", torch.ones(64, 32)), "tied, but they differ"),
        (lambda p: p.pop("model_args"), "no dict 'model_args'"),
        (lambda p: p.pop("model"), "no tensors under the key 'model'"),
        (lambda p: p["model"].update(a=1), "no tensors under the key 'model'"),
        (lambda p: p["model_args"].update(n_heads=5), "not divisible by --n_heads"),
        (lambda p: p["model_args"].update(dim="wide"), "invalid Llama shape: --dim 'wide'"),
        (
            lambda p: p["model_args"].update(n_layers=900),
            "layers.2.attention.compute_query.weight and 8081 ",
        ),
        (
            lambda p: p["model_args"].update(n_layers=3),
            "2.attention.compute_query.weight and 8 more",
        ),
        (lambda p: p.update(vocabulary_fingerprint="0" * 16), "says 0000000000000000"),
        (lambda p: p.update(vocabulary="text"), "'vocabulary' is not a tensor of bytes"),
    ],
)
def test_pt_files_are_read_strictly(model: Llama, tmp_path: Path, damage, message: str):
    """The original loaded with strict=False: a misnamed tensor stayed random, and nobody knew."""
    model.vocabulary = b"a vocabulary"
    payload = model_payload(model)
    damage(payload)
    path = save(tmp_path / "broken.pt", **payload)
    with pytest.raises(UsageError, match=message) as caught:
        read_model(path)
    assert "broken.pt" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "claim",
    [{"max_seq_len": 2**26}, {"max_seq_len": 2**24}, {"n_layers": 2**31}, {"vocab_size": 2**40}],
)
def test_what_a_file_claims_costs_nothing(model: Llama, tmp_path: Path, claim: dict):
    """A few thousand bytes once asked for a rotary table of gigabytes, or for endless layers."""
    resource = pytest.importorskip("resource")
    payload = model_payload(model)
    payload["model_args"] |= claim
    path = save(tmp_path / "a.pt", **payload)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(UsageError, match=f"a.pt: invalid Llama shape: --{next(iter(claim))}"):
        load_pretrained(path)
    assert time.process_time() - start < 1
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 50e6


class Malicious:
    """What a pickle can do to who loads it."""

    def __reduce__(self):
        return (sys.exit, ("code from the file was run",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_never_run(tmp_path: Path, zipped: bool):
    path = tmp_path / "a.pt"
    if zipped:
        torch.save({"model": Malicious()}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UsageError, match="a.pt: (carries code|is damaged)"):
        read_model(path)


def test_half_a_file_is_said_to_be_cut_off(model: Llama, tmp_path: Path):
    path = save(tmp_path / "cut.pt", **model_payload(model))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match="cut.pt: .*cut off"):
        read_model(path)
