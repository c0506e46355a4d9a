"""Hugging Face folders: read strictly, and loaded by `transformers` with equal logits."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_same_weights, make_llama, make_model, to_hugging_face, write
from survivor import Malicious

import check_model_precision
import minllama.formats.hugging_face_vocabulary as V
from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.formats.hugging_face import tensor_name
from minllama.formats.model_file import read_contents, read_model
from minllama.formats.vocabularies import SAMPLES
from minllama.system.errors import UsageError
from minllama.vocabulary.base import MODEL_BYTES
from tokenizer import Tokenizer


@pytest.fixture
def model(tiny_config: LlamaConfig) -> Llama:
    return make_llama(tiny_config)


# ---------------------------------------------------------------------------- reading


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


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}
THETA = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is another architecture"),
        ({"model_type": ["llama"]}, "model_type .'llama'. is another architecture"),
        ({"layer_types": 5}, "layer_types 5 are not supported"),
        ({"rope_parameters": {"full_attention": THETA}}, "positions of 'full_attention' alone"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types .*chunked_attention.* not supp"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"head_dim": 16}, r"q_proj.weight has the shape \(32, 32\) where .* \(64, 32\)"),
        ({"head_dim": "8"}, "--head_dim '8'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"hidden_size": None}, "--dim None"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight and 8 more missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.* not of a Llama"),
        ({"num_hidden_layers": 900}, "layers.2.self_attn.q_proj.weight and 8081 more"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling 'yarn' is not supp"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling's factor '2'"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not an object"),
        ({"rope_parameters": {**THETA, "rope_type": "llama3"}}, "rope_scaling's factor None"),
        ({"rope_parameters": {**LLAMA_3, "low_freq_factor": 4.0}}, "not below high_freq_factor"),
        ({"rope_parameters": {**THETA, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),  # transformers 4's place
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
    with pytest.raises(UsageError, match="pytorch_model.bin: no .pt file"):
        read_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="config.json: not JSON"):
        read_model(folder)


def test_a_single_file_counts_more_than_an_index_that_is_left_over(model: Llama, tmp_path: Path):
    """Of a folder that was saved again in one file, the index named shards that were gone."""
    folder = write_hugging_face(tmp_path / "hf", model)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert_same_weights(load_pretrained(folder), model)


@pytest.mark.parametrize("shards", [1, 2])
def test_older_folders_hold_pickles(model: Llama, tmp_path: Path, shards: int):
    """pytorch_model.bin, or its shards: read as .pt files are, whose code is not run."""
    folder = write_hugging_face(tmp_path / "hf", model)
    (folder / "model.safetensors").unlink()
    state = to_hugging_face(model)
    names = ["pytorch_model.bin"]
    if shards > 1:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        weight_map = {key: names[i % shards] for i, key in enumerate(state)}
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    for i, name in enumerate(names):
        torch.save({key: state[key] for key in list(state)[i::shards]}, folder / name)
    for path in (folder, folder / names[-1]):
        assert_same_weights(load_pretrained(path), model)
    assert check_model_precision.inspect(folder, verify=True).sound


def test_code_in_an_older_folder_is_not_run(model: Llama, tmp_path: Path):
    folder = write_hugging_face(tmp_path / "hf", model)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pytorch_model.bin: (carries code|is damaged)"):
        read_model(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_a_head_has_its_embedding_as_one(
    tiny_config: LlamaConfig, tmp_path: Path, capsys, tied: bool
):
    """A LlamaModel has neither lm_head nor the prefix `model.`; of an untied one it is said."""
    transformers = pytest.importorskip("transformers")
    model = make_llama(tiny_config)
    write(model, "hf", tmp_path / "hf")
    body = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    body.config.tie_word_embeddings = tied
    body.save_pretrained(tmp_path / "body")
    assert_same_weights(load_pretrained(tmp_path / "body"), model)
    assert ("a LlamaModel has no output head" in capsys.readouterr().err) == (not tied)


def test_the_body_of_their_classifier_is_read(tiny_config: LlamaConfig, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = make_llama(tiny_config)
    write(model, "hf", tmp_path / "hf")
    kind = transformers.AutoModelForSequenceClassification
    kind.from_pretrained(tmp_path / "hf", num_labels=3).save_pretrained(tmp_path / "classifier")
    assert_same_weights(load_pretrained(tmp_path / "classifier"), model)


def test_a_head_that_is_missing_is_missed(tiny_config: LlamaConfig, tmp_path: Path):
    """Of a model that predicts tokens it was lost, and no embedding stands in for it."""
    model = make_llama(dataclasses.replace(tiny_config, tie_word_embeddings=False))
    folder = write_hugging_face(tmp_path / "hf", model, architectures=["LlamaForCausalLM"])
    safetensors = pytest.importorskip("safetensors.torch")
    state = safetensors.load_file(folder / "model.safetensors")
    del state["lm_head.weight"]
    safetensors.save_file(state, folder / "model.safetensors")
    with pytest.raises(UsageError, match="tensor lm_head.weight missing"):
        read_model(folder)


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.model", "tokenizer_config.json"]
)
def test_a_pipe_in_the_folder_is_refused(model: Llama, tmp_path: Path, name: str):
    """Opening one waits for ever for somebody who writes into it."""
    folder = write_hugging_face(tmp_path / "hf", model)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UsageError, match=f"{name}: not a regular file"):
        read_model(folder)


def test_a_vocabulary_of_gigabytes_is_not_read(model: Llama, tmp_path: Path):
    """A sparse tokenizer.model, which takes nothing on the disk, was read into memory whole."""
    folder = write_hugging_face(tmp_path / "hf", model)
    with (folder / "tokenizer.model").open("wb") as file:
        file.truncate(MODEL_BYTES + 1)
    with pytest.raises(UsageError, match="tokenizer.model: larger than 67,108,864 bytes"):
        read_model(folder)


def test_a_folder_without_a_model_is_told_what_it_lacks(tmp_path: Path, monkeypatch):
    """It was advised to install safetensors, which would not have helped."""
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for read in (read_model, read_contents):
        with pytest.raises(UsageError) as raised:
            read(tmp_path)
        for said in ("no model", ".pt file", "config.json with model.safetensors", "params.json"):
            assert said in str(raised.value)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="no model.safetensors in this folder"):
        read_contents(tmp_path)


def test_numbers_of_eight_bits_are_refused(model: Llama, tmp_path: Path, capsys):
    """torch has no `equal` for float8 and no `isinf`: a traceback. Their scales are not read."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder = write_hugging_face(tmp_path / "hf", model)
    state = safetensors.load_file(folder / "model.safetensors")
    state |= {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}
    safetensors.save_file(state, folder / "model.safetensors")
    with pytest.raises(UsageError, match="embed_tokens.weight holds torch.float8_e4m3fn"):
        read_model(folder)
    assert check_model_precision.main([str(folder), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "tied, but stored twice" in out and "BAD" in out and "float8_e4m3fn" in out


def test_the_weights_alone_are_told_to_be_a_hugging_face_models(model: Llama, tmp_path, capsys):
    """Named by their file; of shards the index is named, and the folder is what is counted."""
    folder = write_hugging_face(tmp_path / "one", model)
    assert check_model_precision.main([str(folder / "model.safetensors")]) == 0
    assert "model.safetensors: Hugging Face folder" in capsys.readouterr().out
    folder = write_hugging_face(tmp_path / "many", model, shards=3)
    report = check_model_precision.inspect(folder / "model.safetensors.index.json")
    assert report.format == "Hugging Face folder" and min(report.parts.values()) >= 0
    assert report.size == sum(path.stat().st_size for path in folder.iterdir())


def test_shards_outside_of_the_folder_are_not_read(model: Llama, tmp_path: Path):
    """An index names files of its own folder, whatever path it gives."""
    folder = write_hugging_face(tmp_path / "hf", model)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    names = dict.fromkeys(map(tensor_name, model.state_dict()), "../elsewhere.safetensors")
    index = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UsageError, match="no elsewhere.safetensors in this folder"):
        read_model(folder)


def test_without_safetensors_the_remedy_is_named(model: Llama, tmp_path: Path, monkeypatch):
    folder = write_hugging_face(tmp_path / "hf", model)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match="pip install safetensors"):
        read_model(folder)


# ---------------------------------------------------------------------------- writing


def test_transformers_loads_the_folder_with_equal_logits(tmp_path: Path, tokenizer: Tokenizer):
    transformers = pytest.importorskip("transformers")
    model = make_model(tokenizer, rope_theta=777.0)
    write(model, "hf", tmp_path / "hf", tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(model.config.vocab_size, (2, 40))
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(model(tokens, tokens)[0], logits, rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in SAMPLES:
        assert same(text)["input_ids"] == tokenizer.encode(text, bos=True, eos=False), text
        plain = tokenizer.encode(text, bos=False, eos=False)
        assert same(text, add_special_tokens=False)["input_ids"] == plain
        assert same.decode(plain) == tokenizer.decode(plain)
    assert (same.bos_token_id, same.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


ALPHABET = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t▁aetho<s>/0x.,!'🙂世é")
)


def exported(ours: Tokenizer):
    """Our vocabulary in the `tokenizers` library, which takes special names in a text as text."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(V.tokenizer_json(ours)))
    theirs.encode_special_tokens = True
    return theirs


@pytest.fixture(scope="module")
def exported_tokenizer(tokenizer: Tokenizer):
    return exported(tokenizer)


@given(text=st.text(ALPHABET, max_size=60))
@settings(max_examples=300, deadline=None)
def test_exported_tokenizer_gives_our_ids_for_any_text(tokenizer, exported_tokenizer, text: str):
    """Leading spaces, newlines, emoji, special names in the text: the ids SentencePiece gives."""
    ids = tokenizer.encode(text, bos=True, eos=False)
    assert exported_tokenizer.encode(text).ids == ids


def test_exported_llama2_vocabulary_gives_our_ids_on_reviews(real_data: Path):
    ours = Tokenizer(tokenizer_model=real_data / "tokenizer.model")
    theirs = exported(ours)
    lines = (real_data / "sst-dev.txt").read_text(encoding="utf-8").splitlines()[:100]
    for text in (*SAMPLES, *lines, "\n".join(lines)):
        assert theirs.encode(text).ids == ours.encode(text, bos=True, eos=False)


def test_another_tokenizer_json_than_ours_is_found_before_it_is_published(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch
):
    pytest.importorskip("tokenizers")
    content = V.tokenizer_json(tokenizer)
    content["model"]["merges"] = content["model"]["merges"][:100]
    monkeypatch.setattr(V, "tokenizer_json", lambda tokenizer: content)
    with pytest.raises(UsageError, match="self-check: tokenizer.json gives other ids for 'Once"):
        write(make_model(tokenizer), "hf", tmp_path / "hf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
