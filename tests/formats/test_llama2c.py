"""llama2.c's .bin files: read as it writes them, and written as it reads them."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import pytest
import torch
from oracles import assert_same_weights, make_llama, make_model, write

import minllama.formats.llama2c as L
from check_model_precision import inspect
from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.system.errors import UsageError
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------- reading


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


# ---------------------------------------------------------------------------- writing


def test_llama2cs_own_file_is_written_byte_for_byte(real_data: Path, tmp_path: Path):
    source = real_data / "stories260K.bin"
    model = load_pretrained(source)
    write(model, "pt", tmp_path / "a.pt")
    write(load_pretrained(tmp_path / "a.pt"), "bin", tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == source.read_bytes()


def test_tokenizer_bin_is_beside_the_bin(tmp_path: Path, tokenizer: Tokenizer):
    """run.c reads it: uint32 longest token, then for each float32 score, int32 length, bytes."""
    paths = write(make_model(tokenizer), "bin", tmp_path / "model.bin", tokenizer=tokenizer)
    assert paths == [tmp_path / "model.bin", tmp_path / "tokenizer.bin"]
    assert len(paths[1].read_bytes()) > 9 * tokenizer.n_words


@pytest.mark.parametrize("hidden_dim, group", [(192, 16), (172, 4), (128, 16)])
def test_int8_groups_divide_every_row(tmp_path: Path, hidden_dim: int, group: int):
    """runq reads w2 in rows of hidden_dim; groups that divide only dim gave it garbage."""
    model = make_model(hidden_dim=hidden_dim)
    with torch.no_grad():
        model.layers[0].feed_forward.w2.weight[3] = 0  # a scale of zero must not make NaN
    write(model, "bin-int8", tmp_path / "a.bin")
    assert L.group_size(model.config) == group
    assert inspect(tmp_path / "a.bin", verify=True).dtypes == {"int8": 16, "float32": 5}
    got = load_pretrained(tmp_path / "a.bin").state_dict()
    for name, tensor in model.state_dict().items():
        error = (got[name] - tensor).abs()
        if tensor.dim() == 1:
            assert not error.any()
        else:
            largest = tensor.reshape(-1, group).abs().amax(1, keepdim=True)
            assert (error.reshape(-1, group) <= largest / 254 * 1.001).all(), name


@pytest.mark.parametrize("target", ["bin", "bin-int8"])
def test_llama2c_cannot_hold_another_theta(tmp_path: Path, target: str):
    with pytest.raises(UsageError, match="rope_theta 10000, not 500"):
        write(make_model(rope_theta=500.0), target, tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []
