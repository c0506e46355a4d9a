"""Small models with telling weights, and what other programs call their tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.formats.export import export
from minllama.formats.hugging_face import tensor_name
from tokenizer import Tokenizer


def make_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """A model whose weights are large enough for every token to matter, norms included."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.15)
    return model.eval()


def make_model(tokenizer: Tokenizer | None = None, **changes) -> Llama:
    """Small, with grouped-query attention, and float32 numbers that no other dtype holds."""
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.n_words if tokenizer else 300, "max_seq_len": 40, "dim": 48}
    shape |= {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    model = Llama(LlamaConfig(**(shape | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.01 * torch.randn_like(parameter))
    model.vocabulary = tokenizer.model_bytes if tokenizer else None
    return model.eval()


def to_hugging_face(model: Llama) -> dict[str, torch.Tensor]:
    """A state dict for `transformers`, written with loops instead of the program's reshapes."""
    config, state = model.config, {}
    size = config.head_dim
    for name, tensor in model.state_dict().items():
        tensor = tensor.clone()
        parts = {"compute_query": config.n_heads, "compute_key": config.n_kv_heads}
        for part, heads in (parts | {"query_norm": 1, "key_norm": 1}).items():
            if part in name:
                order = [
                    head * size + pair * 2 + half
                    for head in range(heads)
                    for half in range(2)
                    for pair in range(size // 2)
                ]
                tensor = tensor[order]
        state[tensor_name(name)] = tensor
    return state


def assert_same_weights(got: Llama, want: Llama) -> None:
    """Same shape, same names, same float32 numbers, tied alike."""
    assert got.config == want.config
    assert {*got.state_dict()} == {*want.state_dict()}
    for name, tensor in want.state_dict().items():
        assert got.state_dict()[name].dtype == torch.float32
        assert torch.equal(got.state_dict()[name], tensor), name
    assert (got.output.weight is got.tok_embeddings.weight) == want.config.tie_word_embeddings


def write(model: Llama, target: str, output: Path, *, dtype: str = "float32", tokenizer=None):
    """Export a model; the paths written."""
    return export(model, target, output, dtype=dtype, tokenizer=tokenizer, extra={})


def assert_holds(path: Path, want: dict[str, torch.Tensor]) -> None:
    """The model in a file has exactly these tensors."""
    got = load_pretrained(path).state_dict()
    assert {*got} == {*want}
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


# --------------------------------------------------------------------- folders of other programs

LITGPT_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.o_proj": "attn.proj",
    "self_attn.q_norm": "attn.norm_q",
    "self_attn.k_norm": "attn.norm_k",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}


def write_litgpt(folder: Path, model: Llama, *, older: bool = False, **changes: Any) -> Path:
    """As litgpt writes it; `older`: as before 2025, each group's queries before its key and value.

    By loops, where the program splits and reshapes.
    """
    config, size = model.config, model.config.head_dim
    state, theirs = {}, to_hugging_face(model)
    for name, tensor in theirs.items():
        for ours, renamed in LITGPT_NAMES.items():
            name = name.replace(ours, renamed)
        if "_proj" not in name:
            state[name] = tensor
    for layer in range(config.n_layers):
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            q, k, v = (
                theirs[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"].split(size)
                for part in "qkv"
            )
            rows = [*q, *k, *v]
            if older:
                served = config.n_heads // config.n_kv_heads
                rows = []
                for group in range(config.n_kv_heads):
                    rows += [*q[group * served : (group + 1) * served], k[group], v[group]]
            joined = "attn" if older else "qkv"
            state[f"transformer.h.{layer}.attn.{joined}.{kind}"] = torch.cat(rows)
    scaling = config.rope_scaling
    adjusted = "null"
    if scaling is not None and scaling.rope_type == "llama3":
        adjusted = (
            f"\n  factor: {scaling.factor}\n  low_freq_factor: {scaling.low_freq_factor}"
            f"\n  high_freq_factor: {scaling.high_freq_factor}"
            f"\n  original_max_seq_len: {scaling.original_max_position_embeddings}"
        )
    settings = {
        **{"name": "Llama-3.2-1B", "hf_config": "\n  name: Llama-3.2-1B\n  org: meta-llama"},
        **{"block_size": config.max_seq_len, "n_layer": config.n_layers, "n_embd": config.dim},
        **{"vocab_size": 60, "padding_multiple": 64, "padded_vocab_size": config.vocab_size},
        **{"norm_class_name": "RMSNorm", "norm_eps": "1.0e-05", "parallel_residual": "false"},
        **{"norm_qk": str(config.qk_norm).lower(), "norm_qk_type": "default"},
        **{"n_head": config.n_heads, "head_size": size, "n_query_groups": config.n_kv_heads},
        **{"attn_bias": str(config.attention_bias).lower(), "bias": "false"},
        **{"attention_scores_scalar": "null", "sliding_window_size": "null"},
        **{"rope_base": int(config.rope_theta), "rotary_percentage": 1.0},
        "rope_condense_ratio": 1 if scaling is None or adjusted != "null" else int(scaling.factor),
        "rope_adjustments": adjusted,
        **{"intermediate_size": config.hidden_dim, "mlp_class_name": "LLaMAMLP"},
        **{
            "gelu_approximate": "none",
            "n_expert": 0,
            "routed_scaling_factor": 1.0,
            "scale_embeddings": "false",
        },
        **{"norm_1": "true", "norm_2": "true", "rope_indices": "null"},
    } | changes
    folder.mkdir()
    lines = [f"{key}: {value}" for key, value in settings.items() if value is not None]
    (folder / "model_config.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    torch.save({"model": state} if older else state, folder / "lit_model.pth")
    return folder


def write_adapter(
    folder: Path, base: str, *, rank: int = 3, dim: int = 32, hidden_dim: int = 96, **changes: Any
) -> dict[str, torch.Tensor]:
    """As PEFT writes adapters of a query and a down matrix; what these add to their matrices."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "bias": "none"}
    settings |= {"lora_alpha": 12, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
    settings |= {"modules_to_save": None, "use_dora": False, "rank_pattern": {}, "revision": None}
    settings |= {"task_type": "CAUSAL_LM", "init_lora_weights": True, "inference_mode": True}
    settings |= changes
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shapes = {"self_attn.q_proj": (dim, dim), "mlp.down_proj": (dim, hidden_dim)}
    tensors, added = {}, {}
    for name, (rows, columns) in shapes.items():
        name = f"model.layers.0.{name}"
        a, b = torch.randn(rank, columns), torch.randn(rows, rank)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        added[f"{name}.weight"] = b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    return added
