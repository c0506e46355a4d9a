"""Folders of litgpt: both orders of its joined matrix, and what it computes otherwise refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_same_weights, make_llama, write_litgpt

from check_model_precision import inspect
from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.formats.find_model import model_in
from minllama.formats.litgpt import SHAPE_BYTES, read_plain_yaml
from minllama.formats.model_file import read_model
from minllama.system.errors import UsageError

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 16}


def small(**changes: Any) -> Llama:
    shape = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    return make_llama(LlamaConfig(**(shape | {"max_seq_len": 32} | changes)))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"rope_scaling": LLAMA_3},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"attention_bias": True},
        {"qk_norm": True, "head_dim": 12},
    ],
)
def test_a_folder_of_litgpts(changes: dict, older: bool, tmp_path: Path):
    model = small(**changes)
    folder = write_litgpt(tmp_path / "lit", model, older=older)
    (folder / "tokenizer.model").write_bytes(b"a vocabulary")
    assert model_in(folder, "FILE") == folder
    for path in (folder, folder / "lit_model.pth"):
        got = load_pretrained(path)
        assert_same_weights(got, model)
        assert got.vocabulary == b"a vocabulary"
        assert inspect(path).format == "litgpt" and "tied" in inspect(path).embedding


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"attn_bias": True, "rope_adjustments": {"factor": 4.0}},
        {"norm_qk": True, "head_size": 16, "rope_condense_ratio": 4},
        {
            "rope_adjustments": {
                **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_seq_len": 32,
            }
        },
    ],
)
@pytest.mark.filterwarnings("ignore")  # of theirs, about theirs
def test_litgpts_own_logits(changes: dict, older: bool, tmp_path: Path):
    """Of weights that it made, or that it read by their older name."""
    model, config = pytest.importorskip("litgpt.model"), pytest.importorskip("litgpt.config")
    yaml = pytest.importorskip("yaml")
    shape = {"block_size": 96, "n_layer": 2, "n_embd": 64, "n_head": 8, "n_query_groups": 2}
    shape |= {"name": "x", "padded_vocab_size": 96, "bias": False, "parallel_residual": False}
    shape |= {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 96}
    shape = config.Config(**(shape | {"rotary_percentage": 1.0} | changes))
    torch.manual_seed(0)
    theirs = model.GPT(shape).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.15)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if older:
        state = {name.replace("attn.qkv", "attn.attn"): tensor for name, tensor in state.items()}
        theirs.load_state_dict(dict(state))
    torch.save(state, tmp_path / "lit_model.pth")
    with (tmp_path / "model_config.yaml").open("w", encoding="utf-8") as file:
        names = {field.name for field in dataclasses.fields(config.Config)}
        yaml.dump({name: value for name, value in vars(shape).items() if name in names}, file)
    tokens = torch.randint(96, (2, 96))
    with torch.no_grad():
        got = load_pretrained(tmp_path)(tokens, tokens)[0]
        assert (got - theirs(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"norm_class_name": "LayerNorm"}, "norm_class_name 'LayerNorm' is not supported, only"),
        ({"mlp_class_name": "GemmaMLP"}, "mlp_class_name 'GemmaMLP'"),
        ({"rotary_percentage": 0.25}, "rotary_percentage '0.25'"),
        ({"rotary_percentage": None}, "rotary_percentage 'None'"),
        ({"norm_qk_type": "olmo2"}, "norm_qk_type 'olmo2'"),
        ({"parallel_residual": "true"}, "parallel_residual 'True' is another architecture"),
        ({"n_expert": 8}, "n_expert '8' is another architecture"),
        ({"sliding_window_size": 4096}, "sliding_window_size '4096'"),
        ({"sliding_window_indices": "\n- 1\n- 0"}, r"sliding_window_indices '\[1, 0\]'"),
        ({"rope_adjustments": "\n  factor: 8.0\n  beta_fast: 32"}, "not a type with its factors"),
        ({"rope_adjustments": "\n- 3"}, r"rope_adjustments '\[3\]' are not supported"),
        ({"n_head": 3}, "n_kv_heads 2: must be a divisor"),
        ({"n_embd": "wide"}, "--dim 'wide'"),
        ({"head_size": 6}, "attn.qkv.weight has the shape .* 48 rows"),
        ({"n_layer": 3}, "transformer.h.2.attn.query.weight and 8 more missing"),
        ({"hf_config": "\nnothing"}, "line 3: 'nothing' is no `key: value`"),
    ],
)
def test_what_litgpt_computes_otherwise_is_refused(changes: dict, message: str, tmp_path: Path):
    folder = write_litgpt(tmp_path / "lit", small(), **changes)
    with pytest.raises(UsageError, match=message) as raised:
        read_model(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_of_litgpts_without_its_shape(tmp_path: Path):
    folder = write_litgpt(tmp_path / "lit", small())
    (folder / "model_config.yaml").unlink()
    with pytest.raises(UsageError, match="lit_model.pth: no model_config.yaml beside it"):
        read_model(folder)


def test_yaml_costs_nothing_and_makes_no_objects(tmp_path: Path):
    path = tmp_path / "model_config.yaml"
    text = (
        "a: !!python/object/apply:os.system ['true']\nb: &x 1\n\n# note\nc:\n- 1.5\n- true\nd: ''\n"
    )
    path.write_text(text, encoding="utf-8")
    tag = "!!python/object/apply:os.system ['true']"
    assert read_plain_yaml(path) == {"a": tag, "b": "&x 1", "c": [1.5, True], "d": ""}
    path.write_bytes(b"a: 1\n" * SHAPE_BYTES)
    with pytest.raises(UsageError, match="larger than"):
        read_plain_yaml(path)
