"""Model files of this and other programs: what loads, and what is refused, in which words."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from oracles import assert_same_weights, make_llama, to_hugging_face

from config import LlamaConfig
from llama import Llama, load_pretrained, model_payload
from minllama.formats.formats import hugging_face_name, parameter_shapes, read_model
from minllama.system.errors import UsageError


@pytest.fixture
def model(tiny_config: LlamaConfig) -> Llama:
    return make_llama(tiny_config)


def test_shapes_are_those_of_the_model(model: Llama):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert parameter_shapes(model.config) == shapes


# ---------------------------------------------------------------------------- .pt files


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
            "layers.2.attention_norm.weight and 8081 ",
        ),
        (lambda p: p["model_args"].update(n_layers=3), "layers.2.attention_norm.weight and 8 more"),
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b"Once upon a time there was a girl who loved models.\n" * 9, "not a model"),
        ("empty.pt", b"", "not a model file"),
        ("zip.pt", b"PK\x03\x04 and then nothing", "cut off"),
        ("zeros.bin", bytes(5000), "not a model file"),
        ("huge.bin", struct.pack("<7i", 2**17, 2**19, 1000, 8, 8, 2**24, 64) + bytes(9), "cut off"),
        ("int9.bin", struct.pack("<Ii7iBi", 0x616B3432, 9, *[8] * 7, 1, 64), "not a model file"),
    ],
)
def test_what_is_no_model_file_says_so(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name}: .*{message}"):
        read_model(tmp_path / name)


def test_half_a_file_is_said_to_be_cut_off(model: Llama, tmp_path: Path):
    path = save(tmp_path / "cut.pt", **model_payload(model))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UsageError, match="cut.pt: .*cut off"):
        read_model(path)


def test_a_path_without_a_model_says_so(tmp_path: Path):
    with pytest.raises(UsageError, match="none.pt: no such file"):
        read_model(tmp_path / "none.pt")
    with pytest.raises(UsageError, match="config.json: no such file"):
        read_model(tmp_path)


# ---------------------------------------------------------------------------- llama2.c's .bin files


def write_llama2c(path: Path, model: Llama, version: int) -> Path:
    """llama2.c's versions 0 and 1, written field by field as its export.py lays them out."""
    config, layers = model.config, model.layers
    attention = [layer.attention for layer in layers]
    blocks = {
        "norm1": [layer.attention_norm.weight for layer in layers],
        "q": [a.compute_query.weight for a in attention],
        "k": [a.compute_key.weight for a in attention],
        "v": [a.compute_value.weight for a in attention],
        "o": [a.compute_output.weight for a in attention],
        "norm2": [layer.ffn_norm.weight for layer in layers],
        "w1": [layer.feed_forward.w1.weight for layer in layers],
        "w2": [layer.feed_forward.w2.weight for layer in layers],
        "w3": [layer.feed_forward.w3.weight for layer in layers],
        "norm": [model.norm.weight],
        "table": [model.tok_embeddings.weight],
        "rotary": [torch.zeros(config.max_seq_len * config.head_dim)],
        "head": [] if config.tie_word_embeddings else [model.output.weight],
    }
    order = {
        0: "table norm1 q k v o norm2 w1 w2 w3 norm rotary head",
        1: "norm1 norm2 norm table q k v o w1 w2 w3 head",
    }[version]
    sign = -1 if version == 0 and not config.tie_word_embeddings else 1
    header = struct.pack(
        "<7i",
        *(config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads),
        *(sign * config.vocab_size, config.max_seq_len),
    )
    if version:
        tied = config.tie_word_embeddings
        header = (struct.pack("<Ii", 0x616B3432, 1) + header + bytes([tied])).ljust(256, b"\0")
    tensors = [tensor for block in order.split() for tensor in blocks[block]]
    path.write_bytes(header + b"".join(t.detach().numpy().tobytes() for t in tensors))
    return path


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_files_load(tiny_config: LlamaConfig, tmp_path: Path, version: int, tied: bool):
    model = make_llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    path = write_llama2c(tmp_path / "model.anything", model, version)
    assert_same_weights(load_pretrained(path), model)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UsageError, match="cut off"):
        load_pretrained(path)


# ---------------------------------------------------------------------------- Hugging Face folders


def hugging_face_config(model: Llama, **changes) -> dict:
    config = model.config
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        **changes,
    }


def write_hugging_face(folder: Path, model: Llama, shards: int = 1, **changes) -> Path:
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(model, **changes)))
    state = to_hugging_face(model)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{i}.safetensors" for i in range(shards)]
        weight_map = {key: names[i % shards] for i, key in enumerate(state)}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    for i, name in enumerate(names):
        save_file({key: state[key] for key in list(state)[i::shards]}, folder / name)
    (folder / "tokenizer.model").write_bytes(b"a vocabulary")
    return folder


@pytest.mark.parametrize("tied, shards", [(True, 1), (False, 3)])
def test_hugging_face_folders_load(
    tiny_config: LlamaConfig, tmp_path: Path, tied: bool, shards: int
):
    model = make_llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    folder = write_hugging_face(tmp_path / "hf", model, shards)
    inside = "model.safetensors" + ".index.json" * (shards > 1)
    for named in (folder, folder / inside):  # its weights name the folder, too
        got = load_pretrained(named)
        assert_same_weights(got, model)
        assert got.vocabulary == b"a vocabulary"


THETA = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"head_dim": 16}, "head_dim 16 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"hidden_size": None}, "--dim None"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight and 8 more missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.* not of a Llama"),
        ({"num_hidden_layers": 900}, "layers.2.input_layernorm.weight and 8081 more"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling 'linear'"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        ({"rope_parameters": {**THETA, "rope_type": "llama3"}}, "rope_scaling 'llama3'"),
        ({"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_hugging_face_folders_are_read_strictly(
    model: Llama, tmp_path: Path, changes: dict, message: str
):
    """What would compute something else, unnoticed, is refused by its name."""
    with pytest.raises(UsageError, match=message):
        read_model(write_hugging_face(tmp_path / "hf", model, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": THETA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 500.0, "rope_parameters": THETA},
        {"rope_theta": 10000.0, "rope_parameters": {**THETA, "rope_theta": 500.0}},
        {"rope_parameters": THETA, "rope_scaling": {**THETA, "rope_theta": 500.0}},
    ],
)
def test_rotary_settings_that_contradict_each_other_are_refused(
    model: Llama, tmp_path: Path, changes: dict
):
    """All but rope_parameters used to be ignored, unnoticed: logits were off by as much as 15.9."""
    with pytest.raises(UsageError, match="config.json: (rope_|type).* (twice|not supported)"):
        read_model(write_hugging_face(tmp_path / "hf", model, **changes))


@pytest.mark.parametrize(
    "changes, theta",
    [
        ({"rope_theta": 500.0}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": None}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": {"type": "default"}}, 500.0),
        ({"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}}, 500.0),
        ({"rope_theta": 500.0, "rope_parameters": {**THETA, "rope_theta": 500.0}}, 500.0),
        ({"rope_theta": None, "rope_parameters": {**THETA, "rope_theta": 500.0}}, 500.0),
        ({"rope_theta": None}, 10000.0),
    ],
)
def test_theta_is_found_where_either_version_of_transformers_puts_it(
    model: Llama, tmp_path: Path, changes: dict, theta: float
):
    folder = write_hugging_face(tmp_path / "hf", model, **changes)
    assert read_model(folder).config.rope_theta == theta


def test_hugging_face_folder_with_a_damaged_or_missing_file(model: Llama, tmp_path: Path):
    folder = write_hugging_face(tmp_path / "hf", model)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="model.safetensors: damaged"):
        read_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no model.safetensors in this folder"):
        read_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UsageError, match="holds pytorch_model.bin, a pickle"):
        read_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="config.json: not JSON"):
        read_model(folder)


def test_shards_outside_of_the_folder_are_not_read(model: Llama, tmp_path: Path):
    """An index names files of its own folder, whatever path it gives."""
    folder = write_hugging_face(tmp_path / "hf", model)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = dict.fromkeys(map(hugging_face_name, model.state_dict()), "../elsewhere.safetensors")
    index = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UsageError, match="no elsewhere.safetensors in this folder"):
        read_model(folder)


def test_without_safetensors_the_remedy_is_named(model: Llama, tmp_path: Path, monkeypatch):
    folder = write_hugging_face(tmp_path / "hf", model)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match="pip install safetensors"):
        read_model(folder)
