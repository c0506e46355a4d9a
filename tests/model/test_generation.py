"""Generation: fast paths against the plain loop, sampling against its definitions."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from oracles import make_llama

import minllama.model.generation as G
from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.model import packing
from minllama.system.errors import UsageError

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
GREEDY = G.Sampling(temperature=0)


@pytest.fixture
def model(tiny_config: LlamaConfig) -> Llama:
    return make_llama(tiny_config)


def sample_row(logits, sampling, *, generator=None, history=()):
    """One row's draw."""
    drawn = G.sample_rows(logits[None], sampling, generators=[generator], histories=[history])
    return drawn[0]


def naive_generate(model, tokens, count, sampling=GREEDY, generator=None):
    """The oracle: crop to the window, read everything again, draw; no cache, no batch."""
    tokens = list(tokens)
    with torch.inference_mode():
        for _ in range(count):
            window = tokens[-model.config.max_seq_len :]
            logits = model(torch.tensor([window]))[0][0, -1]
            tokens.append(sample_row(logits, sampling, generator=generator, history=tokens))
    return tokens


def collect(prompts, steps):
    """Prompts and what came after them, one list a row."""
    rows = [list(prompt) for prompt in prompts]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def test_cached_generation_equals_the_naive_loop_past_the_window(model: Llama):
    """20 tokens fit the window of 32 when reading starts, 60 do not when it ends."""
    prompt = torch.randint(64, (3, 20))
    got = collect(
        prompt.tolist(),
        G.generate_tokens(model, prompt.tolist(), max_new_tokens=40, sampling=GREEDY),
    )
    assert got == [naive_generate(model, row, 40) for row in prompt.tolist()]


def test_a_cache_is_read_also_where_gradients_are_on(tiny_config: LlamaConfig):
    """Attention for training knows no cache: extending one outside of inference mode took it."""
    model = make_llama(dataclasses.replace(tiny_config, n_kv_heads=tiny_config.n_heads))
    tokens = torch.randint(64, (1, 8)).tolist()
    cache = G.KVCache(tiny_config.n_layers, 1, 32)
    model.extend(cache, [tokens[0][:5]])
    last = model.extend(cache, [tokens[0][5:]])
    torch.testing.assert_close(last, model.hidden_states(torch.tensor(tokens))[:, 5:])


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        G.Sampling(0.8, top_k=20, repetition_penalty=1.3),
        G.Sampling(2.0, top_p=0.5, min_p=0.01),
    ],
)
def test_batched_prompts_give_what_each_gives_alone(model: Llama, sampling: G.Sampling):
    """Ragged lengths, one beyond the window, rows that end early, each row its own numbers."""
    lengths = [1, 30, 7, 45, 7]
    prompts = [torch.randint(64, (length,)).tolist() for length in lengths]
    options = {"max_new_tokens": 25, "sampling": sampling, "stop_ids": {3, 4, 5, 6}}
    seeds = [11, 12, 13, 14, 15]
    together = collect(prompts, G.generate_tokens(model, prompts, seeds=seeds, **options))
    for prompt, seed, got in zip(prompts, seeds, together, strict=True):
        alone = G.generate_tokens(model, [prompt], seeds=[seed], **options)
        assert [got] == collect([prompt], alone)
        generator = torch.Generator().manual_seed(seed)
        want = naive_generate(model, prompt, 25, sampling, generator)[len(prompt) :]
        stops = [i for i, token in enumerate(want) if token in options["stop_ids"]]
        assert got[len(prompt) :] == want[: min(stops, default=25)]
    assert len({len(row) - len(prompt) for row, prompt in zip(together, prompts, strict=True)}) > 1


def test_generation_streams_and_stops_when_asked(model: Llama):
    asked = []
    steps = G.generate_tokens(
        model, [[1, 2]], max_new_tokens=10, sampling=GREEDY, should_stop=lambda: len(asked) == 3
    )
    for step in steps:
        asked.append(step)
    assert [[1, 2] + [token for (token,) in asked]] == [naive_generate(model, [1, 2], 3)]
    with pytest.raises(UsageError, match="empty prompt"):
        next(G.generate_tokens(model, [[1], []], max_new_tokens=1, sampling=GREEDY))


# ---------------------------------------------------------------------------- steps


class Recorder:
    """A step that keeps the logits of each call."""

    def __init__(self, step) -> None:
        self.step, self.logits = step, []

    def __call__(self, *args, **options):
        self.logits.append(self.step(*args, **options))
        return self.logits[-1]


def test_steps_give_what_the_plain_loop_gives(model: Llama):
    """Ragged prompts, rows that end early, and past the window, where the plain loop takes over.

    The step is run as it is: compiling it is another test's.
    """
    prompts = [[5], [7, 8, 9, 10], [11] * 9]
    options = {"max_new_tokens": 34, "sampling": GREEDY}
    endless = collect(prompts, G.generate_tokens(model, prompts, **options))
    others = {*endless[0], *endless[2]}
    at = next(i for i, token in enumerate(endless[1]) if i > 3 and token not in others)
    at = endless[1].index(endless[1][at])
    options["stop_ids"] = {endless[1][at]}  # of the second row alone
    want = collect(prompts, G.generate_tokens(model, prompts, **options))
    step = Recorder(G.decode_step)
    assert collect(prompts, G.generate_tokens(model, prompts, step=step, **options)) == want
    assert {len(logits) for logits in step.logits} == {3}
    assert want == [endless[0], endless[1][:at], endless[2]]
    assert len(step.logits) > 15  # till the longest row leaves the window


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch about torch's own doing
def test_a_step_compiled_for_one_model_does_not_run_on_another(
    tiny_config: LlamaConfig, monkeypatch
):
    """No guard looks at modules: an int8 model once ran through the float32 model's program.

    Other weights of the same layout need no compilation: keyed by id(model), the ninth model was
    beyond torch's limit of recompilations, and one could have the id of a model that was freed.
    """
    compiler, compiled = torch.compile, []

    def only_trace(function, *, options, **others):
        def backend(graph, inputs):
            compiled.append(graph)
            return graph

        options = {"guard_filter_fn": options["guard_filter_fn"]}
        return compiler(function, backend=backend, options=options, **others)

    monkeypatch.setattr(torch, "compile", only_trace)
    # No width is: the kernel rounds to bfloat16, a compiled step does not.
    monkeypatch.setattr(packing, "INT8_WIDTH", 1 << 20)
    model = make_llama(dataclasses.replace(tiny_config, n_layers=1))
    models = [model, copy.deepcopy(model), make_llama(model.config, seed=1)]
    for other, dtype in zip(models, (torch.float32, torch.int8, torch.int8), strict=True):
        packing.pack_weights(other, dtype)
    options = {"max_new_tokens": 6, "sampling": GREEDY}
    step = G.compile_step()
    torch.compiler.reset()
    for other in models:
        eager, traced = Recorder(G.decode_step), Recorder(step)
        for recorder in (eager, traced):
            list(G.generate_tokens(other, [[5]], step=recorder, **options))
        torch.testing.assert_close(traced.logits, eager.logits, rtol=1e-4, atol=1e-4)
    assert len(compiled) == 2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch about torch's own doing
def test_compiled_generation_equals_eager(tiny_config: LlamaConfig, monkeypatch):
    """A plain layer, one in int8 and a reordered head in one model: to compile takes the time.

    It has all that a shape may have beyond Llama 2's.
    """
    import torch._inductor.config as inductor

    # No width is: the kernel rounds to bfloat16, a compiled step does not.
    monkeypatch.setattr(packing, "INT8_WIDTH", 1 << 20)
    beyond = {"head_dim": 16, "attention_bias": True, "qk_norm": True}
    scaling = {"rope_type": "linear", "factor": 2.0}
    model = make_llama(dataclasses.replace(tiny_config, rope_scaling=scaling, **beyond))
    in_int8 = copy.deepcopy(model)
    packing.pack_weights(model, torch.float32)
    packing.pack_weights(in_int8, torch.int8)
    model.layers[1] = in_int8.layers[1]
    model.output.reorder()
    options = {"max_new_tokens": 30, "sampling": GREEDY}
    eager, compiled = Recorder(G.decode_step), Recorder(G.compile_step())
    want = list(G.generate_tokens(model, [[5]], step=eager, **options))
    assert want == list(G.generate_tokens(model, [[5]], **options))
    torch.compiler.reset()
    quick = ("cpp_cache_precompile_headers", "cpp.vec_isa_ok", "pattern_matcher")  # to compile
    with inductor.patch(dict.fromkeys(quick, False)):
        got = list(G.generate_tokens(model, [[5]], step=compiled, **options))
    assert got == want and len(compiled.logits) == 29
    torch.testing.assert_close(compiled.logits, eager.logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- other programs


def test_stories260k_gives_llama2cs_own_tokens(real_data: Path):
    """Through the cache, 200 tokens; the ids are those of llama2.c's program on the same file."""
    model = load_pretrained(real_data / "stories260K.bin")
    want = [int(token) for token in STORIES260K_GREEDY.split()]
    steps = G.generate_tokens(model, [[1]], max_new_tokens=200, sampling=GREEDY)
    assert collect([[1]], steps) == [want]


# ---------------------------------------------------------------------------- sampling


SAMPLINGS = [
    G.Sampling(),
    G.Sampling(0.7, top_k=5),
    G.Sampling(1.5, top_p=0.9),
    G.Sampling(4.0, top_p=0.99),
    G.Sampling(2.0, top_p=0.1),
    G.Sampling(1.0, top_p=1e-9),
    G.Sampling(1.0, top_k=1),
    G.Sampling(1.0, min_p=0.05),
    G.Sampling(1.2, top_k=40, top_p=0.8, min_p=0.02),
]


def filtered(logits: torch.Tensor, sampling: G.Sampling) -> torch.Tensor:
    """The oracle: probabilities (V,) of the next token, from the filters' definitions."""
    probs = torch.softmax(logits.double() / sampling.temperature, -1)
    if sampling.top_k is not None:
        probs[probs < probs.sort(descending=True).values[sampling.top_k - 1]] = 0
    likelier = torch.stack([probs[probs > p].sum() for p in probs])
    kept = likelier < (sampling.top_p or 2) * probs.sum()
    kept &= probs >= (sampling.min_p or 0) * probs.max()
    return torch.where(kept, probs, 0) / probs[kept].sum()


@pytest.mark.parametrize(
    ("sampling", "size"),
    [*((s, 40) for s in SAMPLINGS), (SAMPLINGS[2], 3000), (SAMPLINGS[-1], 3000)],
)
def test_draws_follow_the_probabilities(sampling: G.Sampling, size: int):
    """A chi-square of 10,000 draws lies within five standard deviations; ties are among them."""
    torch.manual_seed(6)
    logits, generator = torch.randn(size).mul(4).round().div(2), torch.Generator().manual_seed(5)
    probs = filtered(logits, sampling)
    count, draws = 10_000, []
    for _ in range(10):
        rows = {"generators": [generator] * (count // 10), "histories": [()] * (count // 10)}
        draws += G.sample_rows(logits.expand(count // 10, -1), sampling, **rows)
    seen, kept = torch.tensor(draws).bincount(minlength=size), probs > 0
    assert not seen[~kept].any()
    want = count * probs[kept]
    distance, freedom = ((seen[kept] - want) ** 2 / want).sum().item(), len(want) - 1
    assert distance <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


def test_a_tiny_top_p_keeps_the_likeliest_token():
    """In float32 it is 0, and no token was left: "its training diverged"."""
    for top_p in (1e-300, 5e-324, 1e-40):
        for seed in range(20):
            logits = torch.randn(50, generator=torch.Generator().manual_seed(seed))
            for top_k in (None, 3):
                sampling = G.Sampling(1.0, top_k=top_k, top_p=top_p)
                assert sample_row(logits, sampling) == logits.argmax().item()


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_huge_repetition_penalty_makes_no_infinities(penalty: float):
    """Two of them have no difference, and the model was said to have diverged."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    drawn = sample_row(logits, G.Sampling(1.0, repetition_penalty=penalty), history=[0, 1, 2, 3])
    assert drawn in (0, 1) if penalty < 1 else drawn == 4


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_token_is_the_likeliest_of_nan(temperature: float):
    """Greedy decoding of a model of NaNs said token 0 for ever, and nothing of the NaNs."""
    logits = torch.zeros(3, 9)
    logits[1, 4] = math.nan
    rows = {"generators": [None] * 3, "histories": [()] * 3}
    with pytest.raises(UsageError, match="not numbers"):
        G.sample_rows(logits, G.Sampling(temperature), **rows)


@pytest.mark.parametrize("sampling", [*SAMPLINGS, G.Sampling(0.8, repetition_penalty=1.5)])
def test_a_row_draws_alone_what_it_draws_in_company(sampling: G.Sampling):
    """Whatever the others need: a flat row makes top_p sort the vocabulary of all."""
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(6, 3000, generator=generator)
    logits *= torch.tensor([6.0, 4.0, 2.0, 1.0, 0.1, 0.0])[:, None]
    histories = [list(range(row, 3000, 7)) for row in range(6)]
    for seed in range(0, 60, 6):
        generators = [torch.Generator().manual_seed(seed + row) for row in range(6)]
        together = G.sample_rows(logits, sampling, generators=generators, histories=histories)
        for row, got in enumerate(together):
            own = torch.Generator().manual_seed(seed + row)
            assert got == sample_row(logits[row], sampling, generator=own, history=histories[row])


def test_repetition_penalty_lowers_what_was_said_whatever_its_sign():
    logits = torch.tensor([2.0, 1.9, -1.0, -1.1])
    assert G.penalize(logits, [0, 2, 2], 2.0).tolist() == pytest.approx([1.0, 1.9, -2.0, -1.1])
    assert sample_row(logits, G.Sampling(0, repetition_penalty=2.0), history=[0]) == 1


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-46])
def test_tiny_temperature_is_greedy_and_not_a_number_never(temperature: float):
    """At 1e-46, which float32 does not have, it said that the training diverged."""
    logits = torch.tensor([100.0, 101.0, -1e30])
    assert sample_row(logits, G.Sampling(temperature)) == 1


def test_a_diverged_model_says_so():
    """NaN logits drew token id V, which no embedding has: an IndexError one step later."""
    for damaged in (torch.full((5,), math.nan), torch.tensor([0.0, math.nan, 1.0])):
        for sampling in (G.Sampling(), G.Sampling(top_p=0.5), G.Sampling(top_k=2, min_p=0.1)):
            with pytest.raises(UsageError, match="diverged"):
                sample_row(damaged, sampling)


def test_on_cuda_a_compiled_step_is_one_graph(model: Llama, monkeypatch):
    """Whose cache is where it was: a graph that may not write to its inputs is none."""
    monkeypatch.setattr(torch, "compile", lambda step, **settings: settings["options"])
    assert G.compile_step("cuda")["triton.cudagraphs"] is True
    assert G.compile_step("cpu")["triton.cudagraphs"] is False
    cache = G.KVCache(model.config.n_layers, 1, 8)
    model.extend(cache, [[1, 2]])
    cache.stay_in_place()
    assert all(hasattr(t, "_dynamo_static_input_type") for pair in cache.layers for t in pair)
