"""Llama's relatives: what `transformers` and llama.cpp compute of the same weights.

Shapes of public models, scaled down, with random weights: TinyLlama, SmolLM2, Llama 3.2, Qwen2,
Qwen3 and Mistral, at positions before and beyond the context that they were first trained on.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp_server import llama_cpp, their_tokens
from oracles import assert_same_weights, make_llama, write
from torch import Tensor

from config import LlamaConfig
from llama import Llama, load_pretrained, model_payload
from minllama.formats.model_file import read_contents, read_model
from minllama.formats.pt_file import load_pt, save_pt
from minllama.formats.stored_model import EXTRAS, HOLDS, extras, parameter_shapes
from minllama.model.generation import KVCache, Sampling, decode_step, generate_tokens
from minllama.model.lora import add_lora, merge_lora
from minllama.model.packing import pack_weights
from minllama.system.errors import UsageError

GREEDY = Sampling(temperature=0)
CONTEXT, ORIGINAL = 160, 48
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": ORIGINAL}
LINEAR = {"rope_type": "linear", "factor": 4.0}
SMALL = {"vocab_size": 96, "n_layers": 2, "hidden_dim": 96, "max_seq_len": CONTEXT}
QUARTER = {"dim": 64, "n_heads": 8, "n_kv_heads": 2}
UNTIED = {"tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "TinyLlama": {"dim": 64, "n_heads": 8, "n_kv_heads": 1, **UNTIED},
    "SmolLM2": {"dim": 72, "n_heads": 9, "n_kv_heads": 3, "rope_theta": 100000.0},
    "Llama-3.2": QUARTER | {"rope_theta": 5000.0, "rope_scaling": LLAMA_3},
    "Llama-3.2, wide heads": QUARTER | {"head_dim": 16, "rope_scaling": LLAMA_3, **UNTIED},
    "linear": QUARTER | {"rope_scaling": LINEAR},
    "Qwen2": QUARTER | {"attention_bias": True, "layer_norm_eps": 1e-6, "rope_theta": 1e6},
    "Qwen2, linear": QUARTER | {"attention_bias": True, "rope_scaling": LINEAR, **UNTIED},
    "Qwen3": QUARTER | {"qk_norm": True, "head_dim": 16, "layer_norm_eps": 1e-6},
    "Qwen3, llama3": QUARTER | {"qk_norm": True, "rope_scaling": LLAMA_3},
}


def relative(name: str, **changes: Any) -> Llama:
    """A model of one of the shapes, whose biases and norms of heads are far from none."""
    return make_llama(LlamaConfig(**(SMALL | SHAPES[name] | changes)))


def random_tokens(width: int = CONTEXT, rows: int = 2) -> Tensor:
    return torch.randint(96, (rows, width), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def every_logit(model: Llama, tokens: Tensor) -> Tensor:
    return model(tokens, targets=tokens)[0]


@torch.inference_mode()
def cached_logits(model: Llama, tokens: Tensor) -> Tensor:
    """The same by the cache: a beginning at once, and from there token by token."""
    cache = KVCache(model.config.n_layers, len(tokens), tokens.shape[1])
    parts = [tokens[:, :ORIGINAL], *tokens[:, ORIGINAL:].split(1, dim=1)]
    return model.output(torch.cat([model.extend(cache, part.tolist()) for part in parts], dim=1))


def largest(got: Tensor, want: Tensor) -> float:
    return (got - want).abs().max().item()


# ---------------------------------------------------------------------------- transformers


def their_model(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def their_logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_our_logits_of_what_we_wrote(name: str, tmp_path: Path):
    """Below 1e-4 at every position, by the full pass and by the cache; read back, it is equal."""
    pytest.importorskip("safetensors")
    model, tokens = relative(name), random_tokens()
    write(model, "hf", tmp_path / "hf")
    assert_same_weights_but_for_dropout(load_pretrained(tmp_path / "hf"), model)
    theirs = their_model(tmp_path / "hf")
    kinds = {"Qwen2": "Qwen2ForCausalLM", "Qwen3": "Qwen3ForCausalLM"}
    assert type(theirs).__name__ == kinds.get(name.partition(",")[0], "LlamaForCausalLM")
    want = their_logits(theirs, tokens)
    assert largest(every_logit(model, tokens), want) < 1e-4
    assert largest(cached_logits(model, tokens), want) < 1e-4
    # A bias, norm or scaling that is left out is seen by this: the logits are far apart then.
    for extra in extras(model.config):
        if extra in ("linear", "llama3"):
            plain = dataclasses.replace(model.config, rope_scaling=None)
            without = Llama(plain).eval()
            without.load_state_dict(model.state_dict())
            assert largest(every_logit(without, tokens)[:, ORIGINAL:], want[:, ORIGINAL:]) > 0.1


def assert_same_weights_but_for_dropout(got: Llama, want: Llama) -> None:
    assert_same_weights(got, want)
    assert got.config.rope_scaling == want.config.rope_scaling


THEIRS = {  # configurations of `transformers`, with names of its own classes
    "Llama": {"rope_parameters": LLAMA_3 | {"rope_theta": 5000.0}},
    "Qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "Qwen3": {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "Mistral": {"sliding_window": 40, "head_dim": 16},
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_wrote_gives_its_logits_here(name: str, tied: bool, tmp_path: Path):
    """Mistral's up to its window: beyond it tokens are no longer seen, so the context ends."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    shape |= {"max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**shape, **THEIRS[name])
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.15)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs")
    width = 40 if name == "Mistral" else CONTEXT
    assert model.config.max_seq_len == width
    tokens = random_tokens(width)
    want = their_logits(theirs, tokens)
    assert largest(every_logit(model, tokens), want) < 1e-4
    if name != "Mistral":
        assert largest(cached_logits(model, tokens), want) < 1e-4


# ---------------------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "Qwen3, llama3"])
def test_llama_cpp_writes_our_tokens_of_what_we_wrote(name: str, tmp_path: Path, tokenizer):
    """The likeliest ones, from float32, beyond the original context: rope_freqs, biases, norms, the
    order of rows. Read back here the weights are equal."""
    pytest.importorskip("gguf")
    model = relative(name, vocab_size=tokenizer.n_words, max_seq_len=256)
    model.vocabulary = tokenizer.model_bytes
    path = write(model, "gguf", tmp_path / "model.gguf", tokenizer=tokenizer)[0]
    assert_same_weights_but_for_dropout(load_pretrained(path), model)
    text = "One day a fox and a bear went to the river, and " * 4
    ids = tokenizer.encode(text, bos=True, eos=False)
    assert len(ids) > ORIGINAL
    with llama_cpp(path) as ask:
        theirs = their_tokens(ask, text, 24)
    logits = every_logit(model, torch.tensor([ids + theirs]))[0, len(ids) - 1 : -1]
    behind = logits.amax(dim=-1) - logits.gather(1, torch.tensor(theirs)[:, None])[:, 0]
    assert behind.max() < 0.01 and logits.std() > 1  # where two are as likely it may take the other


@pytest.mark.parametrize("original", [8192, 4096])
def test_llama_3s_positions_are_known_by_their_tensor(original: int, tmp_path: Path, tokenizer):
    """llama.cpp's own converter leaves the numbers behind rope_freqs out: Meta's are known, and of
    others it is not believed that they are those."""
    pytest.importorskip("gguf")
    scaling = LLAMA_3 | {"factor": 32.0, "original_max_position_embeddings": original}
    shape = {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": scaling}
    model = relative("Llama-3.2", vocab_size=tokenizer.n_words, **shape)
    path = write(model, "gguf", tmp_path / "model.gguf", tokenizer=tokenizer)[0]
    frequencies = 1.0 / 500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    factors = []
    for frequency in frequencies:  # as llama.cpp's converter writes it
        wavelen = 2 * math.pi / frequency
        if wavelen < original / 4.0:
            factors.append(1.0)
        elif wavelen > original / 1.0:
            factors.append(32.0)
        else:
            smooth = (original / wavelen - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / 32.0 + smooth))
    held = read_contents(path).values
    torch.testing.assert_close(held["model"]["rope_freqs.weight"], torch.tensor(factors))
    known = json.dumps(model.config.rope_scaling.to_plain()).encode()
    content = path.read_bytes()
    assert content.count(known) == 1
    for forged in (b"{}" + b" " * (len(known) - 2), known.replace(b"32.0", b"16.0")):
        path.write_bytes(content.replace(known, forged))
        if original == 8192:
            assert load_pretrained(path).config == model.config
        else:
            with pytest.raises(UsageError, match="rope_freqs.weight are not those of Llama 3"):
                load_pretrained(path)


def test_smollm2_writes_what_llama_cpp_writes(smollm2: Path):
    """A real model in Q4_1: llama.cpp's tokens are the likeliest here, but for its rounding of what
    it multiplies the weights by."""
    path = smollm2
    model = load_pretrained(path)
    assert sum(model.config.parameter_counts().values()) == 134_515_008
    with llama_cpp(path) as ask:
        question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        prompt = f"{question}<|im_start|>assistant\n"
        ids = ask("tokenize", content=prompt, parse_special=True)["tokens"]
        options = {"temperature": 0, "return_tokens": True, "n_predict": 30}
        answer = ask("completion", prompt=ids, **options)
    assert "Paris" in answer["content"]
    theirs = answer["tokens"]
    logits = every_logit(model, torch.tensor([ids + theirs]))[0, len(ids) - 1 : -1]
    behind = logits.amax(dim=-1) - logits.gather(1, torch.tensor(theirs)[:, None])[:, 0]
    assert behind.max() < 0.5 and (behind == 0).float().mean() > 0.8, behind


# ---------------------------------------------------------------------------- every way to compute


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.int8, 0.2)])
def test_packed_weights_have_the_biases_and_norms(name: str, dtype: torch.dtype, bound: float):
    """The product of query, key and value at once skips neither."""
    model, tokens = relative(name), random_tokens(24)
    want = every_logit(model, tokens)
    pack_weights(model, dtype)
    assert (every_logit(model, tokens) - want).norm() < bound * want.norm()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_of_fixed_shape_writes_the_plain_ones_tokens(name: str, packed: bool):
    """What is compiled; here op by op, compiled in test_generation.py."""
    model = relative(name)
    prompts = [row[:7].tolist() for row in random_tokens()]
    want = list(generate_tokens(model, prompts, max_new_tokens=20, sampling=GREEDY))
    if packed:
        pack_weights(model, compiled=True)
    options = {"max_new_tokens": 20, "sampling": GREEDY, "step": decode_step}
    assert list(generate_tokens(model, prompts, **options)) == want


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama-3.2, wide heads"])
def test_adapters_leave_a_bias_as_it_is_and_merge_into_the_same_model(name: str):
    """LoRA dropped the bias of the layers that it wraps, without a word."""
    model, tokens = relative(name), random_tokens(24)
    want = every_logit(model, tokens)
    add_lora(model, rank=2, alpha=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert largest(every_logit(model, tokens), want) < 1e-5  # B is zero at first
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted = every_logit(model, tokens)
    assert largest(adapted, want) > 0.1
    merge_lora(model)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == parameter_shapes(
        model.config
    )
    assert largest(every_logit(model, tokens), adapted) < 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_counts_and_shapes_are_those_of_the_model(name: str):
    model = relative(name)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == parameter_shapes(
        model.config
    )
    counts = model.config.parameter_counts()
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "layers." in n]
    assert counts["attention"] + counts["feed_forward"] == sum(p.numel() for p in matrices)
    blocks = sum(p.numel() for p in model.layers.parameters())
    assert model.config.block_parameters()[0] == blocks


@pytest.mark.parametrize("name", SHAPES)
def test_documents_apart_are_read_as_if_each_stood_alone(name: str):
    model, tokens = relative(name), random_tokens(40)
    starts = torch.zeros_like(tokens)
    starts[:, 25:] = 25
    got = model.hidden_states(tokens, starts=starts)
    want = torch.cat([model.hidden_states(tokens[:, :25]), model.hidden_states(tokens[:, 25:])], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_fresh_biases_are_zero_and_gains_one():
    model = Llama(LlamaConfig(**(SMALL | SHAPES["Qwen2"] | {"qk_norm": True})))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0 if name.endswith("bias") else 1)), name


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", SHAPES)
def test_a_weights_file_holds_every_shape(name: str, tmp_path: Path):
    model = relative(name)
    save_pt(tmp_path / "a.pt", model_payload(model))
    assert_same_weights(load_pretrained(tmp_path / "a.pt"), model)
    args = load_pt(tmp_path / "a.pt")["model_args"]
    added = {"head_dim", "rope_scaling", "attention_bias", "qk_norm"}
    scaling = {"linear": "rope_scaling", "llama3": "rope_scaling"}
    assert args.keys() & added == {scaling.get(extra, extra) for extra in extras(model.config)}


@pytest.mark.parametrize("target", HOLDS)
@pytest.mark.parametrize("name", [*SHAPES, "all"])
def test_a_format_refuses_what_it_cannot_hold(target: str, name: str, tmp_path: Path, tokenizer):
    """Left out without a word it would be another model that is read back."""
    pytest.importorskip({"hf": "safetensors", "gguf": "gguf"}.get(target, "torch"))
    shape = {"qk_norm": True, "attention_bias": True} if name == "all" else SHAPES[name]
    shape = SMALL | QUARTER | shape | {"vocab_size": tokenizer.n_words}
    model = make_llama(LlamaConfig(**shape))
    model.vocabulary = tokenizer.model_bytes
    needed = extras(model.config)
    path = tmp_path / "model.gguf"
    if any(held.issuperset(needed) for held in HOLDS[target].values()):
        if target != "bin" or (model.config.rope_theta, model.config.layer_norm_eps) == (1e4, 1e-5):
            write(model, target, path, tokenizer=tokenizer)
            assert torch.equal(
                every_logit(load_pretrained(path), random_tokens()),
                every_logit(model, random_tokens()),
            )
        return
    with pytest.raises(UsageError, match=f"--convert {target}: the model has") as raised:
        write(model, target, path, tokenizer=tokenizer)
    assert all(EXTRAS[extra] in str(raised.value) for extra in needed)
    assert not path.exists()


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn' is not supported"),
        ({"rope_type": "linear", "factor": 0.5}, "factor 0.5: must be"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor nan: must be"),
        ({"rope_type": "linear", "factor": 2.0, "low_freq_factor": 1.0}, "has no low_freq_factor"),
        ({"rope_type": "linear"}, "not a type with its factors"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "not a type with its factors"),
        (LLAMA_3 | {"high_freq_factor": 1.0}, "not below high_freq_factor"),
        (LLAMA_3 | {"original_max_position_embeddings": 2.5}, "must be a whole number"),
        ("llama3", "not a type with its factors"),
        ([], "not a type with its factors"),
    ],
)
def test_a_scaling_that_is_none_is_refused(scaling: Any, message: str, tmp_path: Path):
    """Files claim it, too: it is checked before anything is computed of it."""
    with pytest.raises(UsageError, match=message):
        LlamaConfig(rope_scaling=scaling)
    payload = model_payload(relative("linear"))
    payload["model_args"]["rope_scaling"] = scaling
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(UsageError, match=f"a.pt: invalid Llama shape: .*{message}"):
        read_model(tmp_path / "a.pt")
