"""Folders of litgpt: lit_model.pth, and model_config.yaml with the shape. Read alone.

litgpt's own converter writes Hugging Face's names: `litgpt convert_from_litgpt`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import Tensor

from config import LlamaConfig
from minllama.formats.hugging_face_vocabulary import read_template, read_vocabulary
from minllama.formats.pt_file import load_pt
from minllama.formats.stored_model import (
    Contents,
    StoredModel,
    read_shape,
    reorder_heads,
    same_bits,
    to_adjacent_pairs,
    translate,
)
from minllama.system.errors import UsageError
from minllama.system.files import read_whole

WEIGHTS, SHAPE = "lit_model.pth", "model_config.yaml"
SHAPE_BYTES = 100_000
NAMES = {
    "tok_embeddings": "transformer.wte",
    "norm": "transformer.ln_f",
    "output": "lm_head",
    "attention_norm": "norm_1",
    "attention.compute_query": "attn.query",  # these three are one matrix in the file
    "attention.compute_key": "attn.key",
    "attention.compute_value": "attn.value",
    "attention.compute_output": "attn.proj",
    "attention.query_norm": "attn.norm_q",
    "attention.key_norm": "attn.norm_k",
    "ffn_norm": "norm_2",
    "feed_forward.w1": "mlp.fc_1",
    "feed_forward.w2": "mlp.proj",
    "feed_forward.w3": "mlp.fc_2",
}
CONFIG = {
    "padded_vocab_size": "vocab_size",
    "n_embd": "dim",
    "intermediate_size": "hidden_dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_query_groups": "n_kv_heads",
    "head_size": "head_dim",
    "block_size": "max_seq_len",
    "norm_eps": "layer_norm_eps",
    "rope_base": "rope_theta",
    "attn_bias": "attention_bias",
    "norm_qk": "qk_norm",
}
# What would compute something else than the Llama here, unless it is this. All else is off.
ONLY = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,
    "norm_1": True,
    "norm_2": True,
    "norm_qk_type": "default",
}
HARMLESS = {"name", "hf_config", "vocab_size", "padding_multiple", "gelu_approximate"}
HARMLESS |= {"rope_condense_ratio", "rope_adjustments"}  # looked at by themselves
HARMLESS |= {"n_expert_per_token", "routed_scaling_factor"}  # of n_expert, which must be 0


def tensor_name(name: str) -> str:
    """What litgpt calls our tensor of this name."""
    return translate(name, NAMES, "transformer.h")


def recognizes(path: Path, head: bytes) -> bool:
    """Whether it is such a folder, or the file in it."""
    return path.name == WEIGHTS or (path / WEIGHTS).exists()


def contents(path: Path) -> Contents:
    """The tensors as they are stored, by their names in the file."""
    return Contents("litgpt", load_pt(_file(path), verify=False))


def _file(path: Path) -> Path:
    return path if path.name == WEIGHTS else path / WEIGHTS


def read(path: Path) -> StoredModel:
    """Read a Llama of litgpt's; UsageError for what it computes otherwise."""
    path = _file(path)
    shape = path.with_name(SHAPE)
    if not shape.exists():
        raise UsageError(f"{path}: no {SHAPE} beside it, which gives the shape of the model")
    config = _read_config(shape)
    weights = _split_heads(path, dict(load_pt(path)["model"]), config)
    table, head = tensor_name("tok_embeddings.weight"), tensor_name("output.weight")
    if table in weights:
        weights.setdefault(head, weights[table])
        tied = same_bits(weights[table], weights[head])
        config = read_shape(shape, config.to_model_args() | {"tie_word_embeddings": tied})
    vocabulary, template = read_vocabulary(path.parent), read_template(path.parent)
    model = StoredModel(config, weights, vocabulary, template).checked(path, tensor_name)
    return model._replace(weights=reorder_heads(model.weights, config, to_adjacent_pairs))


def _split_heads(path: Path, weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The tensors with query, key and value apart; UsageError where their rows are other ones."""
    kv_heads, size = config.n_kv_heads, config.head_dim
    rows = config.query_dim + 2 * config.kv_dim
    for name in list(weights):
        joined = next((part for part in (".attn.qkv.", ".attn.attn.") if part in name), None)
        if joined is None:
            continue
        tensor = weights.pop(name)
        if tensor.dim() == 0 or tensor.shape[0] != rows:
            got = f"{tuple(tensor.shape)} where its config asks for {rows:,} rows"
            raise UsageError(f"{path}: tensor {name} has the shape {got}")
        if joined == ".attn.qkv.":
            parts = tensor.split((config.query_dim, config.kv_dim, config.kv_dim))
        else:  # before 2025: of each key/value head its queries, its key and its value
            groups = tensor.unflatten(0, (kv_heads, -1, size))  # (H_kv, H / H_kv + 2, D, ...)
            sizes = (groups.shape[1] - 2, 1, 1)
            parts = tuple(part.flatten(0, 2) for part in groups.split(sizes, dim=1))
        for kind, part in zip(("query", "key", "value"), parts, strict=True):
            weights[name.replace(joined, f".attn.{kind}.")] = part
    return weights


def _read_config(path: Path) -> LlamaConfig:
    theirs = read_plain_yaml(path)
    for key, only in ONLY.items():
        if theirs.get(key, only if key.startswith("norm_") else None) != only:
            got = str(theirs.get(key))[:40]
            raise UsageError(f"{path}: {key} {got!r} is not supported, only {only!r}")
    for key in theirs.keys() - CONFIG.keys() - ONLY.keys() - HARMLESS:
        if theirs[key]:
            value = str(theirs[key])[:40]
            raise UsageError(f"{path}: {key[:40]} {value!r} is another architecture, not supported")
    args = {ours: theirs.get(key) for key, ours in CONFIG.items()}
    args = {name: value for name, value in args.items() if value is not None}
    condensed, adjusted = theirs.get("rope_condense_ratio", 1), theirs.get("rope_adjustments")
    if condensed != 1:
        args["rope_scaling"] = {"rope_type": "linear", "factor": condensed}
    if adjusted:
        names = {"original_max_seq_len": "original_max_position_embeddings"}
        if not isinstance(adjusted, dict) or condensed != 1:
            raise UsageError(f"{path}: rope_adjustments {str(adjusted)[:40]!r} are not supported")
        kind = "llama3" if "original_max_seq_len" in adjusted else "linear"
        numbers = {names.get(key, key): value for key, value in adjusted.items()}
        args["rope_scaling"] = {"rope_type": kind, **numbers}
    return read_shape(path, args)


# ---------------------------------------------------------------------------- YAML

WORDS = {"null": None, "~": None, "": None, "true": True, "false": False, "{}": {}, "[]": []}


def read_plain_yaml(path: Path) -> dict[str, Any]:
    """What a file that PyYAML wrote holds of `key: value`, and below a key one level more.

    Raises UsageError for other lines. Strings stay as they are spelt.
    """
    settings: dict[str, Any] = {}
    key = ""
    text = read_whole(path, SHAPE_BYTES).decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), start=1):
        name, colon, value = line.partition(":")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line.lstrip().startswith("- ") and key:
            items = settings[key] if isinstance(settings[key], list) else []
            settings[key] = [*items, _scalar(line.lstrip()[2:])]
        elif not colon:
            raise UsageError(f"{path}: line {number}: {line[:40]!r} is no `key: value`")
        elif line[0] == " " and key:
            below = settings[key] if isinstance(settings[key], dict) else {}
            settings[key] = below | {name.strip(): _scalar(value)}
        else:
            key = name
            settings[key] = _scalar(value)
    return settings


def _scalar(text: str) -> Any:
    text = text.strip()
    if text in WORDS:
        return WORDS[text]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text.strip("'\"")
