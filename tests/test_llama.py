"""The model against other people's, its fast paths against the plain ones, and its classifiers."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same_weights, make_llama, to_hugging_face

import llama as L
from config import IGNORE_INDEX, LlamaConfig
from minllama import ROOT
from minllama.model import kernels
from minllama.system.errors import UsageError


@pytest.fixture
def model(tiny_config: LlamaConfig) -> L.Llama:
    return make_llama(tiny_config)


# ---------------------------------------------------------------------------- parts


def test_rms_norm_is_float32_inside():
    """In bfloat16 the square of 300 and a sum over 4096 of them would be far off."""
    norm, x = L.RMSNorm(4096, eps=1e-5), torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    assert torch.equal(norm(x), torch.ones(1, 4096, dtype=torch.bfloat16))
    x = torch.randn(3, 4096)
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), want.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_torchs_but_for_the_draw(dtype: torch.dtype):
    """The share of zeros, what is left, its gradient; nothing in eval mode, and the same again."""
    x = torch.randn(400, 500, dtype=dtype, requires_grad=True)
    dropout = kernels.Dropout(0.2)
    torch.manual_seed(1)
    y = dropout(x)
    y.sum().backward()
    zeros = y == 0
    assert zeros.float().mean().item() == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / x.numel()))
    torch.testing.assert_close(y, torch.where(zeros, 0, x / 0.8))
    torch.testing.assert_close(x.grad, torch.where(zeros, 0, torch.full_like(x, 1 / 0.8)))
    torch.manual_seed(1)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x and kernels.Dropout(0.0)(x) is x


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
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 1, 1, 1, 16, generator=generator)
    query, key = drawn.expand(2, 1, 20, 1, 16).unbind(0)
    query, key = L.apply_rotary_emb(query, key, 16, 32, theta=500.0)
    scores = query[0, :, 0] @ key[0, :, 0].T
    torch.testing.assert_close(scores[7, 3], scores[14, 10], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[7, 3], scores[7, 4], rtol=1e-3)


def test_compiled_rotation_equals_the_complex_one(monkeypatch):
    """The compiler gets real arithmetic, a CPU's and a GPU's, eager mode a complex product."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    x, table = torch.randn(2, 9, 3, 8), L.rotary_table(8, 9)
    eager = L.rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for placed in (x, x.as_subclass(OnGPU)):
        turned = L.rotate(placed, table).as_subclass(torch.Tensor)
        torch.testing.assert_close(turned, eager, rtol=1e-6, atol=1e-6)


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
    model.to_empty(device="cpu").init_weights(model)
    assert model.output.weight is model.tok_embeddings.weight
    assert torch.equal(model.rotary, L.rotary_table(8, 32))


def test_a_model_is_made_without_the_compiler():
    """Every command waited for two seconds while torch imported its compiler and sympy."""
    program = (
        "import sys; from llama import Llama; from config import LlamaConfig; "
        "Llama(LlamaConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1)); "
        "assert not {'sympy', 'torch._dynamo'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(("n_kv_heads", "tied"), [(4, True), (2, False), (1, True)])
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


@pytest.mark.parametrize("width", [1, 9, kernels.QUERY_BLOCK, 2 * kernels.QUERY_BLOCK + 3])
def test_attention_by_blocks_equals_the_fused_one(width: int):
    """Its masks must fit whole and ragged blocks; values and gradients, in float64."""
    inputs = [torch.randn(2, 3, width, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    weights = torch.randn(2, 3, width, 4, dtype=torch.float64)
    got = kernels.materialized_attention(*inputs)
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
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)


def loss_case(seed: int = 0, rows: int = 37):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, 24, requires_grad=True)
    weight = (0.5 * torch.randn(61, 24)).requires_grad_()
    targets = torch.randint(61, (rows,))
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_rows", [1, 10, 37, 1000])
def test_chunked_loss_equals_the_plain_one(chunk_rows: int, monkeypatch):
    monkeypatch.setattr(kernels, "chunk_rows_for", lambda *_: chunk_rows)
    hidden, weight, targets = loss_case()
    loss, count = kernels.linear_cross_entropy(hidden, weight, targets)
    want = plain_loss(hidden, weight, targets)
    assert count == (targets != IGNORE_INDEX).sum()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-5)
    # Divided as training does: the gradients come scaled by what backward brings.
    got = torch.autograd.grad(loss / count * 3, (hidden, weight))
    for mine, theirs in zip(
        got, torch.autograd.grad(want / count * 3, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunked_loss_under_autocast_is_as_exact_as_the_plain_one(dtype: torch.dtype, monkeypatch):
    """Neither is the float32 gradient; ours must not be further from it than rounding explains."""
    monkeypatch.setattr(kernels, "chunk_rows_for", lambda *_: 64)
    hidden, weight, targets = loss_case(rows=200)
    exact = torch.autograd.grad(plain_loss(hidden, weight, targets), (hidden, weight))
    with torch.autocast("cpu", dtype=dtype):
        plain = torch.autograd.grad(plain_loss(hidden, weight, targets), (hidden, weight))
        loss, _ = kernels.linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    for mine, theirs, want in zip(
        torch.autograd.grad(loss, (hidden, weight)), plain, exact, strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - want).norm() < 1.3 * (theirs - want).norm() + 1e-6 * want.norm()


def test_float16_gradients_survive_a_loss_scale():
    """GradScaler multiplies the loss by 65536: that must reach float32 numbers."""
    hidden, weight, targets = loss_case()
    grads = []
    for scale in (1, 65536):
        with torch.autocast("cpu", dtype=torch.float16):
            loss, _ = kernels.linear_cross_entropy(hidden, weight, targets)
        grads.append(torch.autograd.grad(loss * scale, (hidden, weight), retain_graph=True))
    with pytest.raises(TypeError):  # made on the way forward, and scaled in place: there is no more
        loss.backward()
    plain, scaled = grads
    for one, many in zip(plain, scaled, strict=True):
        assert many.isfinite().all()
        torch.testing.assert_close(many / 65536, one)


def test_a_hopeless_target_costs_a_finite_loss_and_keeps_its_gradient():
    """Its probability is 0 in float32, whose logarithm would be infinite."""
    hidden = torch.full((1, 8), 10.0, requires_grad=True)
    weight = torch.stack((torch.full((8,), 2.0), torch.full((8,), -2.0)))
    loss, _ = kernels.linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(87.3, abs=0.1)
    torch.testing.assert_close(hidden.grad, torch.full((1, 8), 4.0))


def test_loss_without_any_target_is_zero_with_zero_gradients():
    hidden, weight, targets = loss_case()
    loss, count = kernels.linear_cross_entropy(hidden, weight, targets.fill_(IGNORE_INDEX))
    assert loss == 0 and count == 0
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert not grad.any()


def test_loss_computes_only_the_gradients_that_are_asked_for():
    """A frozen head (LoRA) needs no weight gradient, evaluation none at all."""
    hidden, weight, targets = loss_case()
    weight.requires_grad_(False)
    loss, _ = kernels.linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.inference_mode():
        again, _ = kernels.linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(again, loss.detach()) and not again.requires_grad


def test_model_loss_trains_every_parameter_as_plain_cross_entropy(model: L.Llama):
    """The tied table gets the sum of what it does as embedding and as head."""
    tokens, targets = torch.randint(64, (3, 11)), torch.randint(64, (3, 11))
    targets[1, 4:] = IGNORE_INDEX
    loss, count = L.NextTokenLoss(model)(tokens, targets)
    logits, _ = model(tokens, targets)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert count == 26
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def ungrouped_config(n_layers: int) -> LlamaConfig:
    """Every key/value head its own: the shape that attention by blocks is for."""
    return LlamaConfig(vocab_size=64, dim=32, n_layers=n_layers, n_heads=4, max_seq_len=32)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)]
)
def test_fast_path_has_the_gradients_of_the_plain_formula(monkeypatch, dtype, rounding):
    """Chunked loss and blocked attention, against float32 logits and torch's fused attention."""
    model = make_llama(ungrouped_config(n_layers=2))
    tokens, targets = torch.randint(64, (4, 32)), torch.randint(64, (4, 32))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, count = model.loss(tokens, targets)
    got = torch.autograd.grad(loss / count, list(model.parameters()))
    monkeypatch.setattr(kernels, "max_materialized_len", lambda dtype: 0)
    logits, _ = model(tokens, targets)
    want = torch.autograd.grad(
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()), list(model.parameters())
    )
    for (name, _), mine, theirs in zip(model.named_parameters(), got, want, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < rounding * theirs.norm(), name


@pytest.mark.parametrize("bos_id", [None, 1])
def test_the_paths_of_a_gpu_have_the_gradients_of_a_cpus(tiny_config, monkeypatch, bos_id):
    """A stream in bfloat16, keys repeated where a kernel shares none: run here as if on a GPU."""
    model, tokens = make_llama(tiny_config).train(), torch.randint(64, (4, 32))
    wanted = torch.autograd.grad(
        L.NextTokenLoss(model, bos_id)(tokens, tokens)[0], [*model.parameters()]
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False, raising=False)
    streams = []
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, x, out: streams.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = L.NextTokenLoss(model, bos_id)(tokens, tokens)[0]
    assert {*streams} == {torch.bfloat16}
    for (name, _), mine, theirs in zip(
        model.named_parameters(),
        torch.autograd.grad(loss, [*model.parameters()]),
        wanted,
        strict=True,
    ):
        assert (mine - theirs).norm() < 0.05 * theirs.norm(), name


def test_fast_path_learns_as_float32_does(monkeypatch):
    """The loss curves of bfloat16 and of the plain formula lie on each other for 60 steps."""
    curves = []
    for fast in (True, False):
        monkeypatch.setattr(kernels, "max_materialized_len", lambda dtype, kept=1024 * fast: kept)
        model = make_llama(ungrouped_config(n_layers=1)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        generator, curve = torch.Generator().manual_seed(0), []
        for _ in range(60):
            start = torch.randint(64, (8, 1), generator=generator)
            tokens = (start + torch.arange(17) * (1 + start % 3)) % 64  # three steps to tell apart
            if fast:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model.loss(tokens[:, :-1], tokens[:, 1:])[0] / 128
            else:
                logits, _ = model(tokens[:, :-1], tokens)
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    fast, plain = curves
    assert plain[-1] < 0.3 * plain[0]
    gaps = [abs(a - b) for a, b in zip(fast, plain, strict=True)]
    assert max(gaps) < 0.1 and sum(gaps) / len(gaps) < 0.02


class Counter:
    """A compiler that changes nothing and counts what it is given."""

    graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch about torch's own doing
@pytest.mark.parametrize("scores_kept", [0, 1024])
def test_lengths_do_not_recompile_one_by_one(monkeypatch, scores_kept: int):
    """Finetuning compiles for any length: attention's blocks must not pin each length they see.

    Nor may torch's own attention be asked whether to be causal by a length: that broke the graph.
    """
    monkeypatch.setattr(kernels, "max_materialized_len", lambda dtype: scores_kept)
    model = L.LlamaEmbeddingClassifier(make_llama(ungrouped_config(n_layers=1)), num_labels=2)
    counter = Counter()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    for width in (5, 9):
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
@pytest.mark.parametrize("bos_id", [None, 1])
def test_loss_compiles_without_a_graph_break(tiny_config: LlamaConfig, bos_id: int | None):
    """fullgraph=True raises at a break; the backend only traces, so no C++ compiler is needed."""
    model = make_llama(dataclasses.replace(tiny_config, n_layers=1))
    loss_of = L.NextTokenLoss(model, bos_id)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(64, (2, 9))
    grads = []
    for loss_fn in (compiled, loss_of):
        loss, _ = loss_fn(tokens, tokens)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def document_losses(model: L.Llama, documents: list[torch.Tensor], length: int, *, packed: bool):
    """Loss and gradients of documents, in two chunks of `length`, or each piece by itself."""
    stream = torch.cat(documents)
    chunks = [stream[:-1].view(2, length), stream[1:].view(2, length).clone()]
    chunks[1][chunks[1] == 1] = IGNORE_INDEX
    if packed:
        loss = L.NextTokenLoss(model, bos_id=1)(*chunks)[0]
    else:
        loss = 0
        for tokens, targets in zip(*chunks, strict=True):
            starts = {0, *torch.nonzero(tokens == 1)[:, 0].tolist()}
            for a, b in zip(sorted(starts), [*sorted(starts)[1:], length], strict=True):
                loss = loss + model.loss(tokens[None, a:b], targets[None, a:b])[0]
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize(("query_block", "scores_kept"), [(256, 1024), (5, 1024), (5, 4)])
def test_documents_of_a_chunk_are_apart(
    tiny_config, monkeypatch, n_kv_heads, query_block, scores_kept, checkpointing
):
    """Packed is the same as each document alone, also one that goes on from the chunk before."""
    monkeypatch.setattr(kernels, "QUERY_BLOCK", query_block)
    monkeypatch.setattr(kernels, "max_materialized_len", lambda dtype: scores_kept)
    model = make_llama(dataclasses.replace(tiny_config, n_kv_heads=n_kv_heads)).train()
    model.activation_checkpointing = checkpointing
    sizes = (3, 9, 1, 2, 14, 8)  # 37: two chunks of 18, and the last target
    documents = [torch.cat((torch.tensor([1]), torch.randint(2, 64, (n - 1,)))) for n in sizes]
    loss, grads = document_losses(model, documents, 18, packed=True)
    want, want_grads = document_losses(model, documents, 18, packed=False)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    stream = torch.cat(documents)
    tokens, targets = stream[:-1].view(2, 18), stream[1:].view(2, 18)
    with torch.inference_mode():  # evaluation has another path
        evaluated = L.NextTokenLoss(model, bos_id=1)(tokens, targets)[0]
        assert (evaluated - L.NextTokenLoss(model)(tokens, targets)[0]).abs() > 0.1
    packed = L.NextTokenLoss(model, bos_id=1)(tokens, targets)[0]
    torch.testing.assert_close(packed, evaluated, rtol=1e-5, atol=1e-5)


def test_generate_draws_from_the_global_generator(model: L.Llama):
    prompt = torch.randint(64, (2, 5))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(prompt, 10, temperature=1.0))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(model.generate(prompt, 0), prompt)


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


def test_mean_pooling_equals_a_loop_over_the_real_tokens(model: L.Llama):
    """Whatever the padding holds, and whichever rows are beside it."""
    torch.manual_seed(1)
    classifier = L.LlamaEmbeddingClassifier(model, num_labels=5, pooling="mean").eval()
    rows = [torch.randint(64, (length,)).tolist() for length in (1, 9, 32, 4)]
    got = classifier(*padded(rows))
    for row, log_probs in zip(rows, got, strict=True):
        states = model(torch.tensor([row]))[1][0]
        mean = sum(states[i] for i in range(len(row))) / len(row)
        want = F.log_softmax(classifier.classifier_head(mean), -1)
        torch.testing.assert_close(log_probs, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier(*padded(rows, pad=63)), got, rtol=0, atol=0)
    gradients = []
    for pad in (0, 63):
        model.zero_grad()
        classifier(*padded(rows, pad=pad))[:, 0].sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


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


# ---------------------------------------------------------------------------- weights files


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
