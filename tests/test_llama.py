"""The model against other people's, the fast paths against the plain ones, and the files."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import runpy
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llama as L
from config import DATA_DIR, SHIPPED_MODEL, LlamaConfig, UsageError
from tokenizer import Tokenizer

# Greedy from BOS, printed by llama2.c on stories260K.bin: run.c's forward() unchanged, called in
# a loop that takes the first largest logit, compiled with gcc -O2.
STORIES260K_GREEDY = """
1 461 461 401 401 401 461 378 455 473 456 435 299 362 409 283 264 283 452 288 13 431 431
431 431 431 431 431 431 431 431 431 431 431 293 430 417 363 416 315 342 418 424 400 442 402
303 266 299 374 466 396 303 271 362 390 469 306 469 423 314 347 305 356 333 333 333 333 425
377 354 304 304 304 304 304 330 341 382 468 473 473 402 402 299 299 483 456 473 456 473 465
465 465 341 317 436 363 454 315 377 360 408 472 453 327 316 266 417 277 299 369 283 266 417
264 277 277 277 439 456 407 407 309 341 436 330 466 377 422 436 472 465 466 407 407 407 407
407 465 466 473 330 330 386 431 304 304 472 453 380 299 299 483 475 452 477 295 412 302 330
275 377 271 341 438 452 287 302 341 438 303 303 303 283 266 417 277 277 277 409 281 303 303
462 402 402 402 402 299 299 277 333 333 333 333 333 299 299 299 292
"""
GREEDY = L.Sampling(temperature=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small gain nothing from threads, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_llama(config: LlamaConfig, seed: int = 0) -> L.Llama:
    """A model whose weights are large enough for every token to matter, norms included."""
    torch.manual_seed(seed)
    model = L.Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def model(tiny_config: LlamaConfig) -> L.Llama:
    return make_llama(tiny_config)


def naive_generate(model, tokens, count, sampling=GREEDY, generator=None):
    """The oracle: crop to the window, read everything again, draw; no cache, no batch."""
    tokens = list(tokens)
    with torch.inference_mode():
        for _ in range(count):
            window = tokens[-model.config.max_seq_len :]
            logits = model(torch.tensor([window]))[0][0, -1]
            tokens.append(L.sample_next(logits, sampling, generator=generator, history=tokens))
    return tokens


def collect(prompts, steps):
    """Prompts and what came after them, one list a row."""
    rows = [list(prompt) for prompt in prompts]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


# ---------------------------------------------------------------------------- parts


def test_rms_norm_is_float32_inside():
    """In bfloat16 the square of 300 and a sum over 4096 of them would be far off."""
    norm, x = L.RMSNorm(4096, eps=1e-5), torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    assert torch.equal(norm(x), torch.ones(1, 4096, dtype=torch.bfloat16))
    x = torch.randn(3, 4096)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), want.float(), rtol=1e-6, atol=1e-6)


def test_rotary_embeddings_of_the_assignment():
    """Shapes and values of the course's own test, worked out in complex numbers of numpy."""
    query, key = 2 * torch.ones(1, 2, 2, 4), 3 * torch.ones(1, 2, 2, 4)
    turned_query, turned_key = L.apply_rotary_emb(query, key, 4, 20)
    turns = np.exp(1j * np.outer(np.arange(2), 10000.0 ** (-np.arange(0, 4, 2) / 4)))
    want = (1 + 1j) * turns  # (T, D/2)
    want = torch.tensor(np.stack((want.real, want.imag), -1).reshape(1, 2, 1, 4)).float()
    torch.testing.assert_close(turned_query, 2 * want.expand(1, 2, 2, 4))
    torch.testing.assert_close(turned_key, 3 * want.expand(1, 2, 2, 4))


def test_rotary_scores_depend_on_distance_only():
    """q at 7 and k at 3 give the product of q at 14 and k at 10, here with another theta."""
    query, key = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 20, 1, 16).unbind(0)
    query, key = L.apply_rotary_emb(query, key, 16, 32, theta=500.0)
    scores = query[0, :, 0] @ key[0, :, 0].T
    torch.testing.assert_close(scores[7, 3], scores[14, 10], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[7, 3], scores[7, 4], rtol=1e-3)


def test_compiled_rotation_equals_the_complex_one(monkeypatch):
    """The compiler gets real arithmetic, eager mode a complex product: one function of two ways."""
    x, table = torch.randn(2, 9, 3, 8), L.rotary_table(8, 9)
    eager = L.rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(L.rotate(x, table), eager, rtol=1e-6, atol=1e-6)


def test_rotary_table_stays_float32_in_a_bfloat16_model(model: L.Llama):
    """model.to(bfloat16) must not round the angles: position 1000 would be off by whole turns."""
    table = model.rotary.clone()
    model.to(torch.bfloat16)
    assert model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(model.rotary, table)


def test_a_model_made_on_meta_is_whole_once_it_has_memory(tiny_config: LlamaConfig):
    """Sharded training makes it so: the table must hold angles and the head stay tied."""
    with torch.device("meta"):
        model = L.Llama(tiny_config)
    model.to_empty(device="cpu").init_weights()
    assert model.output.weight is model.tok_embeddings.weight
    assert torch.equal(model.rotary, L.rotary_table(8, 32))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_model_equals_transformers(n_kv_heads: int, tied: bool):
    """Logits and hidden states of `transformers`' LlamaForCausalLM, same weights, to 1e-5."""
    transformers = pytest.importorskip("transformers")
    config = LlamaConfig(
        **{"vocab_size": 96, "dim": 48, "n_layers": 3, "n_heads": 4, "n_kv_heads": n_kv_heads},
        **{"max_seq_len": 40, "layer_norm_eps": 1e-4, "rope_theta": 777.0},
        tie_word_embeddings=tied,
    )
    ours = make_llama(config)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=n_kv_heads,
            rms_norm_eps=config.layer_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=tied,
        )
    ).eval()
    theirs.load_state_dict(to_hugging_face(ours))
    tokens = torch.randint(config.vocab_size, (2, 40))
    with torch.no_grad():
        logits, hidden = ours(tokens, targets=tokens)
        want = theirs(tokens, output_hidden_states=True)
    torch.testing.assert_close(logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden, want.hidden_states[-1], rtol=1e-5, atol=1e-5)


def test_forward_gives_the_last_logits_only_unless_targets_are_given(model: L.Llama):
    tokens = torch.randint(64, (3, 7))
    last, hidden = model(tokens)
    every, _ = model(tokens, tokens)
    assert last.shape == (3, 1, 64) and every.shape == (3, 7, 64) and hidden.shape == (3, 7, 32)
    torch.testing.assert_close(last, every[:, -1:])
    with pytest.raises(UsageError, match="33 tokens do not fit max_seq_len 32"):
        model(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("width", [1, 9, L.QUERY_BLOCK, 2 * L.QUERY_BLOCK + 3])
def test_attention_by_blocks_equals_the_fused_one(width: int):
    """Its masks must fit whole and ragged blocks; values and gradients, in float64."""
    inputs = [torch.randn(2, 3, width, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    weights = torch.randn(2, 3, width, 4, dtype=torch.float64)
    got = L.causal_attention(*inputs)
    want = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, weights),
        torch.autograd.grad(want, inputs, weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_initialisation_scales_the_two_residual_projections():
    """The original scaled w3, which ends no residual branch, instead of w2."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, dim=128, n_layers=8, n_heads=4)
    for name, parameter in L.Llama(config).named_parameters():
        if parameter.dim() == 2:
            ends_branch = "compute_output" in name or "w2" in name
            want = 0.02 / math.sqrt(16) if ends_branch else 0.02
            assert abs(parameter.std().item() / want - 1) < 0.03, name


# ---------------------------------------------------------------------------- loss


def plain_loss(hidden, weight, targets):
    """The oracle: all logits at once."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=L.IGNORE_INDEX)


def loss_case(seed: int = 0, rows: int = 37):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 24, requires_grad=True)
    weight = (0.5 * torch.randn(61, 24)).requires_grad_()
    targets = torch.randint(61, (rows,))
    targets[::5] = L.IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_rows", [1, 10, 37, 1000])
def test_chunked_loss_equals_the_plain_one(chunk_rows: int):
    hidden, weight, targets = loss_case()
    loss, count = L.linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)
    want = plain_loss(hidden, weight, targets)
    assert count == (targets != L.IGNORE_INDEX).sum()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-5)
    # Divided as training does: the gradients come scaled by what backward brings.
    got = torch.autograd.grad(loss / count * 3, (hidden, weight))
    for mine, theirs in zip(
        got, torch.autograd.grad(want / count * 3, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_under_autocast_is_as_exact_as_the_plain_one(dtype: torch.dtype):
    """Neither is the float32 gradient; ours must not be further from it than rounding explains."""
    hidden, weight, targets = loss_case(rows=200)
    exact = torch.autograd.grad(plain_loss(hidden, weight, targets), (hidden, weight))
    with torch.autocast("cpu", dtype=dtype):
        plain = torch.autograd.grad(plain_loss(hidden, weight, targets), (hidden, weight))
        loss, _ = L.linear_cross_entropy(hidden, weight, targets, chunk_rows=64)
    assert loss.dtype == torch.float32
    for mine, theirs, want in zip(
        torch.autograd.grad(loss, (hidden, weight)), plain, exact, strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - want).norm() < 1.3 * (theirs - want).norm() + 1e-6 * want.norm()


def test_float16_gradients_survive_a_loss_scale():
    """GradScaler multiplies the loss by 65536: that must reach float32 numbers."""
    hidden, weight, targets = loss_case()
    with torch.autocast("cpu", dtype=torch.float16):
        loss, _ = L.linear_cross_entropy(hidden, weight, targets)
    plain = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss * 65536, (hidden, weight))
    for one, many in zip(plain, scaled, strict=True):
        assert many.isfinite().all()
        torch.testing.assert_close(many / 65536, one)


def test_a_hopeless_target_costs_a_finite_loss_and_keeps_its_gradient():
    """Its probability is 0 in float32, whose logarithm would be infinite."""
    hidden = torch.full((1, 8), 10.0, requires_grad=True)
    weight = torch.stack((torch.full((8,), 2.0), torch.full((8,), -2.0)))
    loss, _ = L.linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(87.3, abs=0.1)
    torch.testing.assert_close(hidden.grad, torch.full((1, 8), 4.0))


def test_loss_without_any_target_is_zero_with_zero_gradients():
    hidden, weight, targets = loss_case()
    loss, count = L.linear_cross_entropy(hidden, weight, targets.fill_(L.IGNORE_INDEX))
    assert loss == 0 and count == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


def test_loss_computes_only_the_gradients_that_are_asked_for():
    """A frozen head (LoRA) needs no weight gradient, evaluation none at all."""
    hidden, weight, targets = loss_case()
    weight.requires_grad_(False)
    loss, _ = L.linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.inference_mode():
        again, _ = L.linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(again, loss.detach()) and not again.requires_grad


def test_model_loss_trains_every_parameter_as_plain_cross_entropy(model: L.Llama):
    """The tied table gets the sum of what it does as embedding and as head."""
    tokens, targets = torch.randint(64, (3, 11)), torch.randint(64, (3, 11))
    targets[1, 4:] = L.IGNORE_INDEX
    loss, count = L.NextTokenLoss(model)(tokens, targets)
    logits, _ = model(tokens, targets)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert count == 26
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def ungrouped_config() -> LlamaConfig:
    """Every key/value head its own: the shape that attention by blocks is for."""
    return LlamaConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, max_seq_len=32)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)]
)
def test_fast_path_has_the_gradients_of_the_plain_formula(monkeypatch, dtype, rounding):
    """Chunked loss and blocked attention, against float32 logits and torch's fused attention."""
    model = make_llama(ungrouped_config())
    tokens, targets = torch.randint(64, (4, 32)), torch.randint(64, (4, 32))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, count = model.loss(tokens, targets)
    got = torch.autograd.grad(loss / count, list(model.parameters()))
    monkeypatch.setattr(L, "SCORES_KEPT", 0)
    logits, _ = model(tokens, targets)
    want = torch.autograd.grad(
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()), list(model.parameters())
    )
    for (name, _), mine, theirs in zip(model.named_parameters(), got, want, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < rounding * theirs.norm(), name


def test_fast_path_learns_as_float32_does(monkeypatch):
    """The loss curves of bfloat16 and of the plain formula lie on each other for 150 steps."""
    ways = {"fast": (L.SCORES_KEPT, True), "plain": (0, False)}
    curves: dict[str, list[float]] = {}
    for name, (kept, bfloat16) in ways.items():
        monkeypatch.setattr(L, "SCORES_KEPT", kept)
        model = make_llama(ungrouped_config()).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator, curve = torch.Generator().manual_seed(0), []
        for _ in range(150):
            start = torch.randint(64, (8, 1), generator=generator)
            tokens = (start + torch.arange(17) * (1 + start % 3)) % 64  # three steps to tell apart
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                if bfloat16:
                    loss = model.loss(tokens[:, :-1], tokens[:, 1:])[0] / 128
                else:
                    logits, _ = model(tokens[:, :-1], tokens)
                    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves[name] = curve
    assert curves["plain"][-1] < 0.3 * curves["plain"][0]
    gaps = [abs(a - b) for a, b in zip(*curves.values(), strict=True)]
    assert max(gaps) < 0.1 and sum(gaps) / len(gaps) < 0.02


class Counter:
    """A compiler that changes nothing and counts what it is given."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch about torch's own doing
def test_lengths_do_not_recompile_one_by_one():
    """Finetuning compiles for any length: attention's blocks must not pin each length they see."""
    model = L.LlamaEmbeddingClassifier(make_llama(ungrouped_config()), num_labels=2)
    counter = Counter()
    compiled = torch.compile(model, dynamic=True, backend=counter)
    for width in (5, 9, 14, 20):
        compiled(torch.randint(64, (2, width)), torch.tensor([width, 3]))
    assert counter.graphs == 1


def test_activation_checkpointing_changes_memory_only(tiny_config: LlamaConfig):
    """With dropout too: the recomputed layer must draw the same random numbers."""
    model = make_llama(LlamaConfig(**{**tiny_config.to_model_args(), "dropout": 0.2})).train()
    tokens, grads = torch.randint(64, (2, 9)), []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        loss, _ = model.loss(tokens, tokens)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch about torch's own doing
def test_loss_compiles_without_a_graph_break(model: L.Llama):
    """fullgraph=True raises at a break; the backend only traces, so no C++ compiler is needed."""
    compiled = torch.compile(L.NextTokenLoss(model), fullgraph=True, backend="aot_eager")
    tokens = torch.randint(64, (2, 9))
    grads = []
    for loss_fn in (compiled, L.NextTokenLoss(model)):
        loss, _ = loss_fn(tokens, tokens)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- generation


def test_cached_generation_equals_the_naive_loop_past_the_window(model: L.Llama):
    """20 tokens fit the window of 32 when reading starts, 60 do not when it ends."""
    prompt = torch.randint(64, (3, 20))
    got = model.generate(prompt, 40, temperature=0.0)
    assert got.tolist() == [naive_generate(model, row, 40) for row in prompt.tolist()]


@pytest.mark.parametrize("width", [6, 40, 50, 64])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int8_products_of_any_width(width: int, rows: int):
    """torch's kernel is wrong for, or crashes on, rows that are no multiple of 16 wide."""
    x, weight = torch.randn(rows, width), torch.randn(11, width)
    packed = L.PackedLinear(weight, torch.int8)
    want = x @ (packed.weight * packed.scale[:, None]).t()
    assert (packed(x) - want).norm() < 0.01 * want.norm()


def test_a_cache_is_read_also_where_gradients_are_on(tiny_config: LlamaConfig):
    """Attention for training knows no cache: extending one outside of inference mode took it."""
    model = make_llama(dataclasses.replace(tiny_config, n_kv_heads=tiny_config.n_heads))
    tokens = torch.randint(64, (1, 8)).tolist()
    cache = L.KVCache(tiny_config.n_layers, 1, 32)
    model.extend(cache, [tokens[0][:5]])
    last = model.extend(cache, [tokens[0][5:]])
    torch.testing.assert_close(last, model.hidden_states(torch.tensor(tokens))[:, 5:])


@pytest.mark.parametrize("private", [True, False], ids=["torch's own operators", "plain"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_packed_weights_compute_what_their_values_say(
    tiny_config: LlamaConfig, dtype: torch.dtype, tied: bool, private: bool, monkeypatch
):
    """The oracle is a plain model whose weights were rounded by the definition and put back.

    One row, a few, and many take ways of their own; bfloat16 also rounds what is multiplied.
    """
    if not private:
        monkeypatch.setattr(L, "_MKLDNN_LINEAR", None)
        monkeypatch.setattr(L, "_INT8_LINEAR", None)
    model = make_llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    packed = copy.deepcopy(model)
    packed.lay_out_for_decoding(dtype)
    with torch.inference_mode():
        for weight in model.parameters():
            if weight.dim() == 2 and dtype == torch.int8:
                scale = weight.abs().max(dim=1, keepdim=True).values / 127
                weight.copy_((weight / scale).round().clamp(-127, 127) * scale)
            elif weight.dim() == 2:
                weight.copy_(weight.to(dtype))
        assert torch.equal(packed.tok_embeddings(torch.arange(64)), model.tok_embeddings.weight)
        bound = 1e-4 if dtype == torch.float32 else 0.05
        for shape in ((1, 1), (2, 7), (5, 9)):
            tokens = torch.randint(64, shape)
            want = model.output(model.hidden_states(tokens))
            got = packed.output(packed.hidden_states(tokens))
            assert (got - want).norm() <= bound * want.norm()


def test_onednns_product_is_left_alone_where_torch_has_no_onednn(monkeypatch):
    """Such a torch may have the operator's name, and raises when it is called."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert runpy.run_path(L.__file__)["_MKLDNN_LINEAR"] is None


@pytest.mark.parametrize("dtype, percent", [(torch.bfloat16, 0.1), (torch.int8, 0.5)])
def test_packed_weights_cost_little_perplexity(dtype: torch.dtype, percent: float):
    """A trained model on stories it has not seen: what they cost is told, and stays small."""
    stories = (DATA_DIR / "stories-val.jsonl").read_text(encoding="utf-8").splitlines()
    model = L.load_pretrained(SHIPPED_MODEL)
    tokenizer = Tokenizer(tokenizer_model=None)
    rows = [tokenizer.encode(json.loads(line)["text"], True, False)[:257] for line in stories[:24]]
    losses = []
    for packed in (False, True):
        if packed:
            model.lay_out_for_decoding(dtype)
        with torch.inference_mode():
            hidden = [model.hidden_states(torch.tensor([row[:-1]]))[0] for row in rows]
            targets = torch.tensor([token for row in rows for token in row[1:]])
            losses.append(F.cross_entropy(model.output(torch.cat(hidden)), targets).item())
    assert abs(math.expm1(losses[1] - losses[0])) <= percent / 100


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch about torch's own doing
def test_compiled_generation_equals_eager(tiny_config: LlamaConfig):
    """Ragged prompts, rows that end early, and past the window, where the plain way goes on."""
    model = make_llama(dataclasses.replace(tiny_config, n_layers=1))
    prompts = [[5], [7, 8, 9, 10], [11] * 9]
    options = {"max_new_tokens": 34, "sampling": GREEDY, "stop_ids": {3, 4}}
    want = collect(prompts, L.generate_tokens(model, prompts, **options))
    compiled, calls = L.compile_step(), []

    def step(*args):
        calls.append(len(args[1]))
        return compiled(*args)

    assert collect(prompts, L.generate_tokens(model, prompts, step=step, **options)) == want
    assert set(calls) == {3} and len(calls) > 15  # till the longest row leaves the window
    packed = copy.deepcopy(model)
    packed.lay_out_for_decoding()
    for prompt, text in zip(prompts[:1], want, strict=False):
        steps = L.generate_tokens(packed, [prompt], step=step, **options)
        assert collect([prompt], steps) == [text]


def test_generate_draws_from_the_global_generator(model: L.Llama):
    prompt = torch.randint(64, (2, 5))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(prompt, 10, temperature=1.0))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(model.generate(prompt, 0), prompt)


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        L.Sampling(0.8, top_k=20, repetition_penalty=1.3),
        L.Sampling(2.0, top_p=0.5, min_p=0.01),  # rows that draw anew do it from their own numbers
    ],
)
def test_batched_prompts_give_what_each_gives_alone(model: L.Llama, sampling: L.Sampling):
    """Ragged lengths, one beyond the window, rows that end early, each row its own numbers."""
    lengths = [1, 30, 7, 45, 7]
    prompts = [torch.randint(64, (length,)).tolist() for length in lengths]
    options = {"max_new_tokens": 25, "sampling": sampling, "stop_ids": {3, 4, 5, 6}}
    seeds = [11, 12, 13, 14, 15]
    together = collect(prompts, L.generate_tokens(model, prompts, seeds=seeds, **options))
    for prompt, seed, got in zip(prompts, seeds, together, strict=True):
        assert (
            got == collect([prompt], L.generate_tokens(model, [prompt], seeds=[seed], **options))[0]
        )
        generator = torch.Generator().manual_seed(seed)
        want = naive_generate(model, prompt, 25, sampling, generator)[len(prompt) :]
        stops = [i for i, token in enumerate(want) if token in options["stop_ids"]]
        assert got[len(prompt) :] == want[: min(stops, default=25)]
    assert len({len(row) - len(prompt) for row, prompt in zip(together, prompts, strict=True)}) > 1


def test_generation_streams_and_stops_when_asked(model: L.Llama):
    asked = []
    steps = L.generate_tokens(
        model,
        [[1, 2]],
        max_new_tokens=10,
        sampling=GREEDY,
        should_stop=lambda: len(asked) == 3,
    )
    for step in steps:
        asked.append(step)
    assert [[1, 2] + [token for (token,) in asked]] == [naive_generate(model, [1, 2], 3)]
    with pytest.raises(UsageError, match="empty prompt"):
        next(L.generate_tokens(model, [[1], []], max_new_tokens=1, sampling=GREEDY))


def filtered(logits, sampling):
    """The ids that a filter leaves, by sorting, straight from the definitions."""
    probs = torch.softmax(logits / sampling.temperature, -1)
    order = probs.argsort(descending=True).tolist()[: sampling.top_k]
    kept, mass, total = [], 0.0, sum(float(probs[i]) for i in order)
    for i in order:
        if sampling.top_p is None or mass < sampling.top_p * total:
            kept.append(i)
        mass += float(probs[i])
    floor = (sampling.min_p or 0) * float(probs.max())
    return {i for i in kept if float(probs[i]) >= floor}


@pytest.mark.parametrize(
    "sampling",
    [
        L.Sampling(),
        L.Sampling(0.7, top_k=5),
        L.Sampling(1.5, top_p=0.9),
        L.Sampling(4.0, top_p=0.99),
        L.Sampling(1.0, min_p=0.05),
        L.Sampling(1.2, top_k=40, top_p=0.8, min_p=0.02),
        L.Sampling(1.0, top_k=1),
        L.Sampling(1.0, top_p=1e-9),
    ],
)
def test_filters_keep_what_they_are_defined_to_keep(sampling: L.Sampling):
    torch.manual_seed(3)
    logits = 2 * torch.randn(2000)
    probs = L.logits_to_probs(logits[None], sampling)[0]
    kept = filtered(logits, sampling)
    assert set(probs.nonzero()[:, 0].tolist()) == kept
    want = torch.softmax(logits / sampling.temperature, -1)[sorted(kept)]
    torch.testing.assert_close(probs[sorted(kept)], want / want.sum())


@pytest.mark.parametrize(
    "sampling",
    [
        L.Sampling(),
        L.Sampling(0.7, top_k=5),
        L.Sampling(1.5, top_p=0.9),
        L.Sampling(2.0, top_p=0.1),  # most rows are drawn several times
        L.Sampling(1.0, top_p=1e-9),
        L.Sampling(1.0, min_p=0.2),
        L.Sampling(2.0, top_k=20, top_p=0.7, min_p=0.3),
    ],
)
def test_sampling_follows_the_probabilities(sampling: L.Sampling):
    """A chi-square of 20,000 draws lies within five standard deviations; ties are among them."""
    torch.manual_seed(6)
    logits, generator = torch.randn(40).mul(4).round().div(2), torch.Generator().manual_seed(5)
    probs = L.logits_to_probs(logits[None], sampling)[0].double()
    count = 20000
    rows = {"generators": [generator] * count, "histories": [()] * count}
    draws = torch.tensor(L.sample_rows(logits.expand(count, -1), sampling, **rows))
    seen, kept = draws.bincount(minlength=40), probs > 0
    assert not seen[~kept].any()
    want = count * probs[kept]
    distance, freedom = ((seen[kept] - want) ** 2 / want).sum().item(), len(want) - 1
    assert distance <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


def test_repetition_penalty_lowers_what_was_said_whatever_its_sign():
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    assert L.penalize(logits, [0, 2, 2], 2.0).tolist() == pytest.approx([1.0, 1.9, -2.0, -1.1])
    assert L.sample_next(logits, L.Sampling(0, repetition_penalty=2.0), history=[0]) == 1


def test_tiny_temperature_is_greedy_and_not_a_number_never():
    logits = torch.tensor([100.0, 101.0, -1e30])
    assert L.logits_to_probs(logits[None], L.Sampling(1e-30)).tolist() == [[0, 1, 0]]


def test_a_diverged_model_says_so():
    """NaN logits drew token id V, which no embedding has: an IndexError one step later."""
    with pytest.raises(UsageError, match="diverged"):
        L.sample_next(torch.full((5,), float("nan")), L.Sampling())


# ---------------------------------------------------------------------------- classifiers


def padded(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return tokens, torch.tensor([len(row) for row in rows])


def test_classifier_reads_the_last_real_token_and_never_padding(model: L.Llama):
    """The original read position -1, a pad: a prediction depended on its batch mates."""
    torch.manual_seed(1)
    classifier = L.LlamaEmbeddingClassifier(model, num_labels=5, hidden_dropout_prob=0.5).eval()
    rows = [torch.randint(64, (length,)).tolist() for length in (1, 9, 32, 4)]
    tokens, lengths = padded(rows)
    got = classifier(tokens, lengths)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(4))
    for row, log_probs in zip(rows, got, strict=True):
        alone = classifier(torch.tensor([row]), torch.tensor([len(row)]))
        torch.testing.assert_close(log_probs, alone[0], rtol=1e-5, atol=1e-5)
        hidden = model(torch.tensor([row]))[1][0, -1]
        want = F.log_softmax(classifier.classifier_head(hidden), -1)
        torch.testing.assert_close(log_probs, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier(*padded(rows, pad=63)), got, rtol=0, atol=0)


def test_frozen_backbone_trains_the_head_only(model: L.Llama):
    classifier = L.LlamaEmbeddingClassifier(model, num_labels=2, freeze_backbone=True)
    trained = [name for name, p in classifier.named_parameters() if p.requires_grad]
    assert trained == ["classifier_head.weight", "classifier_head.bias"]


def chain_rule(model, text, start):
    """The oracle: one pass, all logits, the scored tokens' log-probabilities summed."""
    logits, _ = model(torch.tensor([text[:-1]]), targets=torch.zeros(1))
    log_probs = F.log_softmax(logits[0], -1)
    return sum(float(log_probs[i - 1, text[i]]) for i in range(start, len(text)))


def zero_shot_case():
    """Prompts that share their beginning; labels of 1 to 3 tokens that share theirs, or do not."""
    torch.manual_seed(2)
    shots = torch.randint(64, (6,)).tolist()
    labels = [[5], [7, 8], [7, 9, 10]]
    prompts = [shots + torch.randint(64, (length,)).tolist() for length in (1, 12, 4, 4)]
    return [[prompt + label for label in labels] for prompt in prompts], [len(p) for p in prompts]


def test_zero_shot_scores_chain_over_the_labels_tokens(model: L.Llama):
    """The original added up log-probabilities of all label tokens at one position."""
    sequences, starts = zero_shot_case()
    scores, counts = L.LlamaZeroShotClassifier(model).score(sequences, starts)
    assert counts.tolist() == [[1, 2, 3]] * 4
    for b, labels in enumerate(sequences):
        want = torch.tensor([chain_rule(model, text, starts[b]) for text in labels])
        torch.testing.assert_close(scores[b], want, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_zero_shot_scores_do_not_depend_on_the_batch(model: L.Llama):
    sequences, starts = zero_shot_case()
    classifier = L.LlamaZeroShotClassifier(model)
    together, _ = classifier.score(sequences, starts)
    alone = [classifier.score([s], [n])[0] for s, n in zip(sequences, starts, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_zero_shot_finds_where_the_labels_part(model: L.Llama):
    """Without starts, what all labels of a prompt begin with counts as prompt."""
    sequences = [[[1, 2, 3, 4], [1, 2, 3, 5, 6]], [[1, 9], [1, 8, 7]]]
    scores, counts = L.LlamaZeroShotClassifier(model).score(sequences)
    assert counts.tolist() == [[1, 2], [1, 2]]
    want = [
        [chain_rule(model, t, 3) for t in sequences[0]],
        [chain_rule(model, t, 1) for t in sequences[1]],
    ]
    torch.testing.assert_close(scores, torch.tensor(want), rtol=1e-5, atol=1e-5)


def test_zero_shot_refuses_what_it_cannot_score(model: L.Llama):
    classifier = L.LlamaZeroShotClassifier(model)
    classifier.score([[[1] * 32 + [2], [1] * 32 + [3]]])  # the last token is predicted, not read
    with pytest.raises(UsageError, match="34 tokens where max_seq_len 32 allows 33"):
        classifier.score([[[1] * 33 + [2], [1] * 33 + [3]]])
    with pytest.raises(UsageError, match="at least one token"):
        classifier.score([[[1, 2], [1, 2]]])


# ---------------------------------------------------------------------------- adapters


def test_lora_starts_at_the_model_trains_and_merges_into_ordinary_weights(tiny_config: LlamaConfig):
    """Merged, the file holds the ordinary tensors, and the model computes what the adapters did."""
    model, tokens = make_llama(tiny_config), torch.randint(64, (2, 9))
    plain, names = model(tokens, tokens)[0], list(model.state_dict())
    L.add_lora(model, rank=4, alpha=8.0, dropout=0.1)
    torch.testing.assert_close(model(tokens, tokens)[0], plain, rtol=0, atol=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * tiny_config.n_layers and all("lora_" in name for name in trained)
    model.train().loss(tokens, tokens)[0].backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name)
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted = model.eval()(tokens, tokens)[0]
    assert not torch.allclose(adapted, plain, atol=0.1)
    L.merge_lora(model)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(tokens, tokens)[0], adapted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="--lora_rank 0"):
        L.add_lora(model, rank=0, alpha=1)


# ---------------------------------------------------------------------------- model files


def to_hugging_face(model: L.Llama) -> dict[str, torch.Tensor]:
    """A state dict for `transformers`, written with loops instead of the reader's reshapes."""
    config, state = model.config, {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.clone()
        for part, heads in (("query", config.n_heads), ("key", config.n_kv_heads)):
            if f"compute_{part}" in name:
                size = config.head_dim
                order = [
                    head * size + pair * 2 + half
                    for head in range(heads)
                    for half in range(2)
                    for pair in range(size // 2)
                ]
                tensor = tensor[order]
        state[L.hugging_face_name(name)] = tensor
    return state


def save(path: Path, **payload) -> Path:
    torch.save(payload, path)
    return path


def assert_same_weights(got: L.Llama, want: L.Llama) -> None:
    assert got.config == want.config
    assert {*got.state_dict()} == {*want.state_dict()}
    for name, tensor in want.state_dict().items():
        assert got.state_dict()[name].dtype == torch.float32
        assert torch.equal(got.state_dict()[name], tensor), name
    assert (got.output.weight is got.tok_embeddings.weight) == want.config.tie_word_embeddings


def test_weights_file_round_trip_keeps_everything(model: L.Llama, tmp_path: Path):
    model.vocabulary = b"a vocabulary"
    torch.save(L.model_payload(model), tmp_path / "a.pt")
    state = torch.random.get_rng_state()
    got = L.load_pretrained(tmp_path / "a.pt")
    assert torch.equal(state, torch.random.get_rng_state())  # loading draws no random numbers
    assert_same_weights(got, model)
    assert got.vocabulary == b"a vocabulary" and not got.training
    assert torch.equal(got.rotary, model.rotary)
    tokens = torch.randint(64, (2, 9))
    assert torch.equal(got(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_file_holds_a_tied_table_once(model: L.Llama, tmp_path: Path, dtype: torch.dtype):
    """Cast name by name, the table was on the disk twice."""
    payload = L.model_payload(model, dtype)
    table, head = (payload["model"][f"{n}.weight"] for n in ("tok_embeddings", "output"))
    assert table.data_ptr() == head.data_ptr() and table.dtype == dtype
    torch.save(payload, tmp_path / "a.pt")
    parameters = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "a.pt").stat().st_size < 2 * parameters + 20_000
    got = L.load_pretrained(tmp_path / "a.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor.to(dtype).float())


def test_resumable_checkpoint_loads_as_a_model(model: L.Llama, tmp_path: Path):
    payload = L.model_payload(model) | {"optimizer": {"state": {0: torch.ones(3)}}, "progress": 7}
    assert_same_weights(L.load_pretrained(save(tmp_path / "a.pt", **payload)), model)


def test_torchs_old_file_format_loads(model: L.Llama, tmp_path: Path):
    payload = L.model_payload(model)
    torch.save(payload, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert_same_weights(L.load_pretrained(tmp_path / "a.pt"), model)


def test_files_of_the_original_and_of_llama2c_load(tiny_config: LlamaConfig, tmp_path: Path):
    """Other names, torch.compile's prefix, rotary tables in the file, no hidden_dim, norm_eps."""
    model = make_llama(tiny_config)
    short = {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}
    state = {"_orig_mod.freqs_cos": torch.ones(32, 4), "_orig_mod.freqs_sin": torch.ones(32, 4)}
    for name, tensor in model.state_dict().items():
        for long, renamed in short.items():
            name = name.replace(f"attention.compute_{long}.", f"attention.{renamed}.")
        state[f"_orig_mod.{name}"] = tensor
    args = {key: getattr(tiny_config, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    args |= {
        "vocab_size": 64,
        "max_seq_len": 32,
        "norm_eps": 1e-5,
        "multiple_of": 4,
        "dropout": 0.0,
    }
    got = L.load_pretrained(save(tmp_path / "model", model=state, model_args=args))
    assert got.config.multiple_of == 4 and got.config.hidden_dim == tiny_config.hidden_dim
    for name, tensor in model.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor)
    assert got.output.weight is got.tok_embeddings.weight


def test_an_untied_file_of_others_is_seen_to_be_untied(model: L.Llama, tmp_path: Path):
    payload = L.model_payload(model)
    payload["model"]["output.weight"] = torch.randn(64, 32)
    del payload["model_args"]["tie_word_embeddings"]
    got = L.load_pretrained(save(tmp_path / "a.pt", **payload))
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
        (lambda p: p["model_args"].update(dim="wide"), "none a Llama can have"),
        (lambda p: p["model_args"].update(n_layers=10**9), "cannot be 1000000000 layers"),
        (lambda p: p["model_args"].update(n_layers=3), "layers.2.attention_norm.weight and 8 more"),
        (lambda p: p["model_args"].update(max_seq_len=10**12), "none a Llama can have"),
        (lambda p: p.update(vocabulary_fingerprint="0" * 16), "says 0000000000000000"),
        (lambda p: p.update(vocabulary="text"), "'vocabulary' is not a tensor of bytes"),
    ],
)
def test_pt_files_are_read_strictly(model: L.Llama, tmp_path: Path, damage, message: str):
    """The original loaded with strict=False: a misnamed tensor stayed random, silently."""
    model.vocabulary = b"a vocabulary"
    payload = L.model_payload(model)
    damage(payload)
    path = save(tmp_path / "broken.pt", **payload)
    with pytest.raises(UsageError, match=message) as caught:
        L.load_pretrained(path)
    assert "broken.pt" in str(caught.value) and "\n" not in str(caught.value)


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
        L.load_pretrained(path)


def test_what_is_no_model_file_says_so(model: L.Llama, tmp_path: Path):
    torch.save(L.model_payload(model), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    cases = {
        "text.txt": (b"Once upon a time there was a girl who loved models.\n" * 9, "not a model"),
        "empty.pt": (b"", "not a model file"),
        "cut.pt": (whole[: len(whole) // 2], "cut off"),
        "zip.pt": (b"PK\x03\x04 and then nothing", "cut off"),
        "zeros.bin": (bytes(5000), "not a model file"),
        "huge.bin": (struct.pack("<7i", *[2**25] * 3, 8, 8, 2**25, 64) + bytes(99), "cut off"),
        "int8.bin": (struct.pack("<Ii7iBi", 0x616B3432, 9, *[8] * 7, 1, 64), "not a model file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name}: .*{message}"):
            L.load_pretrained(tmp_path / name)
    with pytest.raises(UsageError, match="none.pt: no such file"):
        L.load_pretrained(tmp_path / "none.pt")
    with pytest.raises(UsageError, match="no config.json in this folder"):
        L.load_pretrained(tmp_path)


def test_stories260k_gives_llama2cs_own_tokens(real_data: Path):
    """Through the cache, 200 tokens; the ids are those of llama2.c's program on the same file."""
    model = L.load_pretrained(real_data / "stories260K.bin")
    want = [int(token) for token in STORIES260K_GREEDY.split()]
    assert model.generate(torch.tensor([[1]]), 200, temperature=0.0)[0].tolist() == want


def write_llama2c(path: Path, model: L.Llama, version: int) -> Path:
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
    config = LlamaConfig(**{**tiny_config.to_model_args(), "tie_word_embeddings": tied})
    model = make_llama(config)
    path = write_llama2c(tmp_path / "model.anything", model, version)
    assert_same_weights(L.load_pretrained(path), model)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UsageError, match="cut off"):
        L.load_pretrained(path)


def hugging_face_config(model: L.Llama, **changes) -> dict:
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


def write_hugging_face(folder: Path, model: L.Llama, shards: int = 1, **changes) -> Path:
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
    config = LlamaConfig(**{**tiny_config.to_model_args(), "tie_word_embeddings": tied})
    model = make_llama(config)
    got = L.load_pretrained(write_hugging_face(tmp_path / "hf", model, shards))
    assert_same_weights(got, model)
    assert got.vocabulary == b"a vocabulary"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling 'llama3'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"head_dim": 16}, "head_dim 16 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"hidden_size": None}, "none a Llama can have"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight and 8 more missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.* not of a Llama"),
    ],
)
def test_hugging_face_folders_are_read_strictly(
    model: L.Llama, tmp_path: Path, changes: dict, message: str
):
    """What would silently compute something else is refused by its name."""
    with pytest.raises(UsageError, match=message):
        L.load_pretrained(write_hugging_face(tmp_path / "hf", model, **changes))


def test_hugging_face_folder_with_a_damaged_or_missing_file(model: L.Llama, tmp_path: Path):
    folder = write_hugging_face(tmp_path / "hf", model)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="model.safetensors: damaged"):
        L.load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no model.safetensors in this folder"):
        L.load_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match="config.json: cannot be read as JSON"):
        L.load_pretrained(folder)


def test_without_safetensors_the_remedy_is_named(model: L.Llama, tmp_path: Path, monkeypatch):
    folder = write_hugging_face(tmp_path / "hf", model)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match="pip install safetensors"):
        L.load_pretrained(folder)
