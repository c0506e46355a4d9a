"""Models in .pt files: what loads, and what is refused, in which words."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from oracles import assert_same_weights, make_llama

from config import LlamaConfig
from llama import Llama, load_pretrained, model_payload
from minllama.formats import pt_model
from minllama.formats.find_model import model_in
from minllama.formats.model_file import read_contents, read_model
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


PREFIXES = ["module._orig_mod.", "_orig_mod.module.", "model.", "module.model._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_within_wrappers(model: Llama, tmp_path: Path, prefix: str):
    """DDP around a compiled model, or the other way: only one order of their prefixes was known."""
    payload = model_payload(model)
    payload["model"] = {prefix + name: tensor for name, tensor in payload["model"].items()}
    assert_same_weights(load_pretrained(save(tmp_path / "a.pt", **payload)), model)


@pytest.mark.parametrize(
    "name", ["rope.freqs", "freqs_cis", "layers.1.attention.rotary_emb.inv_freq", "freqs_cos"]
)
def test_rotary_tables_are_passed_over(model: Llama, tmp_path: Path, name: str):
    """They are computed here; of other programs' files some names were called surplus tensors."""
    payload = model_payload(model)
    payload["model"][name] = torch.ones(4, dtype=torch.complex64)
    assert_same_weights(load_pretrained(save(tmp_path / "a.pt", **payload)), model)


def test_a_tied_head_need_not_be_there(model: Llama, tmp_path: Path):
    """A file that says so of itself was refused for its "missing" output.weight."""
    payload = model_payload(model)
    del payload["model"]["output.weight"]
    payload["model_args"]["tie_word_embeddings"] = True
    path = save(tmp_path / "a.pt", **payload)
    assert_same_weights(load_pretrained(path), model)
    assert read_contents(path).values["model"].keys() == payload["model"].keys()


def meta_folder(folder: Path, model: Llama, **params) -> Path:
    """As Meta gives its weights away: bfloat16, wq and wk, a table of frequencies, its params."""
    short = {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}
    state = {"rope.freqs": torch.ones(4)}
    for name, tensor in model.state_dict().items():
        for long, renamed in short.items():
            name = name.replace(f"attention.compute_{long}.", f"attention.{renamed}.")
        state[name] = tensor.bfloat16()
    folder.mkdir()
    torch.save(state, folder / "consolidated.00.pth")
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
    shape |= {"multiple_of": 256, "vocab_size": -1, **params}
    (folder / "params.json").write_text(json.dumps(shape), encoding="utf-8")
    return folder


def test_a_folder_of_metas(tiny_config: LlamaConfig, tmp_path: Path):
    """consolidated.00.pth is a raw state dict, and the shape is beside it, but for the vocabulary's
    size and the width of the feed-forward, which the tensors show."""
    model = make_llama(dataclasses.replace(tiny_config, tie_word_embeddings=False))
    folder = meta_folder(tmp_path / "meta", model)
    (folder / "tokenizer.model").write_bytes(b"a vocabulary")
    assert model_in(folder, "FILE") == folder
    for path in (folder, folder / "consolidated.00.pth"):
        got = load_pretrained(path)
        assert got.config.hidden_dim == tiny_config.hidden_dim and got.config.vocab_size == 64
        assert not got.config.tie_word_embeddings and got.vocabulary == b"a vocabulary"
        for name, tensor in model.state_dict().items():
            assert torch.equal(got.state_dict()[name], tensor.bfloat16().float())
    (folder / "consolidated.01.pth").touch()
    with pytest.raises(UsageError, match="several parts"):
        read_model(folder)


@pytest.mark.parametrize("dim, factor", [(32, 8.0), (2048, 32.0)])
def test_a_folder_of_metas_with_slower_positions(dim: int, factor: float):
    """Llama 3.1's params.json says that positions are scaled, and not how."""
    scaling = pt_model.meta_rope_scaling({"dim": dim, "use_scaled_rope": True})
    numbers = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    numbers |= {"original_max_position_embeddings": 8192}
    assert scaling == {"rope_type": "llama3", "factor": factor, **numbers}


def test_a_folder_of_metas_has_the_positions_that_it_names(tiny_config, tmp_path: Path):
    model = make_llama(dataclasses.replace(tiny_config, tie_word_embeddings=False))
    got = read_model(meta_folder(tmp_path / "meta", model, use_scaled_rope=True)).config
    assert got.max_seq_len == 131_072 and got.rope_scaling.factor == 8


@pytest.mark.parametrize("key, value", [("activation", "gelu"), ("n_experts", 8), ("moe_args", {})])
def test_a_field_that_may_change_what_is_computed_is_refused(model, tmp_path, key, value):
    """A file with another activation loaded as SiLU, and was exported as "read back and equal"."""
    payload = model_payload(model)
    payload["model_args"][key] = value
    with pytest.raises(UsageError, match=f"a.pt: invalid Llama shape: {key} .* is not known to"):
        read_model(save(tmp_path / "a.pt", **payload))


def test_fields_that_are_off_or_change_nothing_are_passed_over(model: Llama, tmp_path: Path):
    payload = model_payload(model)
    payload["model_args"] |= {"n_experts": 0, "window": None, "use_cache": True, "moe": False}
    assert_same_weights(load_pretrained(save(tmp_path / "a.pt", **payload)), model)


@pytest.mark.parametrize("key", [None, "model_args"])
def test_a_checkpoint_of_lightning(model: Llama, tmp_path: Path, key: str | None):
    """The tensors under 'state_dict', the shape among the hyper-parameters."""
    args = model.config.to_model_args()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    parameters = {"lr": 1e-3, key: args} if key else {"lr": 1e-3, **args}
    payload = {"state_dict": state, "hyper_parameters": parameters, "epoch": 3}
    path = save(tmp_path / "a.ckpt", **payload)
    assert_same_weights(load_pretrained(path), model)


def test_a_raw_state_dict_is_told_what_it_lacks(model: Llama, tmp_path: Path):
    """Its tensors do not say how many heads there are; that of another network is none at all."""
    torch.save(model.state_dict(), tmp_path / "raw.pt")
    with pytest.raises(UsageError, match="raw.pt: no dict 'model_args'.* no params.json beside"):
        read_model(tmp_path / "raw.pt")
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match="other.pt: its tensors, such as 'conv1.weight', are no"):
        read_model(tmp_path / "other.pt")


def test_an_untied_file_of_others_is_seen_to_be_untied(model: Llama, tmp_path: Path):
    payload = model_payload(model)
    payload["model"]["output.weight"] = torch.randn(64, 32)
    del payload["model_args"]["tie_word_embeddings"]
    got = load_pretrained(save(tmp_path / "a.pt", **payload))
    assert not got.config.tie_word_embeddings
    assert torch.equal(got.output.weight, payload["model"]["output.weight"])


def drop(name):
    return lambda payload: payload["model"].pop(name)


def untied_without_head(payload):
    payload["model_args"]["tie_word_embeddings"] = False
    del payload["model"]["output.weight"]


def put(name, tensor):
    return lambda payload: payload["model"].update({name: tensor})


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop("norm.weight"), "tensor norm.weight missing"),
        (untied_without_head, "tensor output.weight missing"),
        (put("extra.weight", torch.ones(1)), "tensor extra.weight not of a Llama"),
        (put("norm.weight", torch.ones(31)), r"norm.weight has the shape \(31,\) .* \(32,\)"),
        (put("norm.weight", torch.ones(32, dtype=torch.int64)), "norm.weight holds torch.int64"),
        (put("norm.weight", torch.ones(1).expand(32)), "norm.weight is larger than what the file"),
        (put("output.weight", torch.ones(64, 32)), "tied, but they differ"),
        (put("model.norm.weight", torch.ones(32)), "model.norm.weight is another one than its"),
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
    """The original loaded with strict=False: a misnamed tensor stayed random, and nobody knew.

    Of two models in a file, one with a wrapper's prefix, the last was read.
    """
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
