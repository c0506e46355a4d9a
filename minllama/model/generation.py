"""Generation: the key/value cache, sampling, and the loop that continues texts.

Works on token ids with a Llama that is given to it; knows nothing of text. The letters of shapes
are those of `llama.py`.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minllama.model.kernels import fused_attention
from minllama.system.errors import UsageError

if TYPE_CHECKING:
    from llama import Llama

NOT_NUMBERS = "the model's logits are not numbers: its training diverged"
LOWEST_TEMPERATURE = 1e-6  # below it the likeliest token is as good as certain

# ---------------------------------------------------------------------------- the cache


class KVCache:
    """The keys and values of every token read so far, (B, S, H_kv, D) per layer.

    Rows may hold different numbers of tokens (`lengths`). Beyond a row's length there is padding:
    never attended to, and overwritten by the row's next tokens.
    """

    def __init__(self, n_layers: int, batch_size: int, capacity: int) -> None:
        self.lengths = [0] * batch_size
        self.capacity = capacity
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self.in_place = False

    def stay_in_place(self) -> None:
        """Promise a CUDA graph, which writes to these tensors, that they stay where they are."""
        if not self.in_place:
            for tensor in itertools.chain.from_iterable(self.layers):
                torch._dynamo.mark_static_address(tensor, guard=False)
            self.in_place = True

    def place(self, width: int, device: torch.device) -> slice | Tensor:
        """Where the next `width` tokens of each row go: a slice, or positions (B, T).

        Called once before all layers' `update` and `attend`, for which it sets `index` and `mask`,
        (B or 1, 1, T, S): what the tokens may see. None: causal attention needs none.
        """
        start, self.end = min(self.lengths), max(self.lengths) + width
        self.mask = None
        if start == max(self.lengths):  # rows of one length
            positions = slice(start, self.end)
            self.index: tuple[Any, ...] = (slice(None), positions)
            if start == 0 or width == 1:
                return positions
            places = torch.arange(start, self.end, device=device)[None]  # (1, T)
        else:
            lengths = torch.tensor(self.lengths, device=device)
            positions = places = lengths[:, None] + torch.arange(width, device=device)  # (B, T)
            self.index = (torch.arange(len(lengths), device=device)[:, None], places)
        self.mask = (torch.arange(self.end, device=device) <= places[..., None])[:, None]
        return positions

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new (B, T, H_kv, D) at the decided place; return all of the layer's so far."""
        if self.layers[layer] is None:  # zeros: padding takes part in sums with weight zero
            shape = (key.shape[0], self.capacity, *key.shape[2:])
            self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.layers[layer]
        keys[self.index], values[self.index] = key, value
        return keys[:, : self.end], values[:, : self.end]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention (B, H, T, D) of new queries to all keys and values (B, H_kv, S, D) so far."""
        causal = self.mask is None and query.shape[2] > 1  # a single token sees all there is
        return fused_attention(query, key, value, self.mask, causal=causal)

    def select(self, rows: list[int]) -> KVCache:
        """A cache of these rows, in this order; a row may be named more than once."""
        chosen = KVCache(len(self.layers), len(rows), self.capacity)
        chosen.lengths = [self.lengths[row] for row in rows]
        chosen.layers = [pair and (pair[0][rows], pair[1][rows]) for pair in self.layers]
        return chosen


class StepCache:
    """The view of a KVCache that a compiled step has: each row's next token, at positions (B,).

    All shapes are fixed and no Python number changes, so one compiled program serves every step.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], positions: Tensor) -> None:
        self.layers, self.positions = layers, positions

    def place(self, width: int, device: torch.device) -> Tensor:
        """The tokens' positions (B, 1); `mask` (B, 1, 1, S) is then what they may see."""
        self.index = (torch.arange(len(self.positions), device=device), self.positions)
        places = torch.arange(self.layers[0][0].shape[1], device=device)
        self.mask = (places <= self.positions[:, None])[:, None, None]
        return self.positions[:, None]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new (B, 1, H_kv, D) at their positions; return all places of the layer."""
        keys, values = self.layers[layer]
        keys[self.index], values[self.index] = key[:, 0], value[:, 0]
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one token's query (B, H, 1, D) to the places (B, H_kv, S, D) it may see.

        In plain operations: Inductor fuses them with their neighbours, which beats torch's kernel.
        """
        grouped = query.unflatten(1, (key.shape[1], -1))  # (B, H_kv, H / H_kv, 1, D)
        scores = (grouped * key[:, :, None]).sum(-1) * query.shape[-1] ** -0.5  # (B, H_kv, ..., S)
        weights = scores.masked_fill(~self.mask, -math.inf).softmax(-1)
        return (weights[..., None] * value[:, :, None]).sum(-2).flatten(1, 2)[:, :, None]


Cache = KVCache | StepCache

# ---------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. None and a penalty of 1 switch a filter off."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest that together reach this probability
    min_p: float | None = None  # only those at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that are in the text are less likely


def penalize(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Logits (V,) with those of the tokens in history made smaller (arXiv:1909.05858)."""
    seen = torch.tensor(sorted(set(history)), dtype=torch.long, device=logits.device)
    scores, limits = logits[seen], torch.finfo(logits.dtype)
    penalty = min(max(penalty, 1e-30), 1e30)  # and no infinities, whose difference is no number
    scores = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits.index_copy(0, seen, scores.clamp(limits.min, limits.max))


def sample_rows(
    logits: Tensor,
    sampling: Sampling,
    *,
    generators: Sequence[torch.Generator | None],
    histories: Sequence[Sequence[int]],
) -> list[int]:
    """Draw the next token of each row from its logits (B, V); `histories` are the texts so far.

    Filters apply in the order of Sampling's fields, but top_p without its sorting: a token is
    drawn before top_p and min_p apply, and where they would not keep it, again from those likelier
    than it. All that they keep are among these, so each keeps its share.

    Uses a row's CPU generator (None: torch's global one) on every device: one number, and one more
    for each time that it draws again. Raises UsageError where the logits are NaN.
    """
    penalty = sampling.repetition_penalty
    if penalty != 1:
        pairs = zip(logits, histories, strict=True)
        logits = torch.stack([penalize(row, history, penalty) for row, history in pairs])
    if sampling.temperature < LOWEST_TEMPERATURE:
        largest, tokens = logits.max(-1)
        if largest.isnan().any():  # the first NaN counts as the largest
            raise UsageError(NOT_NUMBERS)
        return tokens.tolist()
    # Apple's GPU has no float64, which keeps the sum of many small numbers exact.
    logits = logits.float() if logits.is_cuda else logits.float().cpu()
    # Less the largest before the division: a tiny temperature makes no infinity minus infinity.
    probs = torch.softmax((logits - logits.amax(-1, True)) / sampling.temperature, dim=-1)
    if sampling.top_k is not None and sampling.top_k < probs.shape[-1]:
        probs = torch.where(probs >= probs.topk(sampling.top_k).values[:, -1:], probs, 0)
    mass = (1.0 if sampling.top_p is None else sampling.top_p) * probs.sum(-1, True)
    least = (sampling.min_p or 0) * probs.amax(-1, True)
    tokens, rows = [0] * len(probs), list(range(len(probs)))  # rows: those still to be drawn
    while rows:
        cumulated = probs.cumsum(-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        if not (total > 0).all():
            raise UsageError(NOT_NUMBERS)
        draws = [torch.rand(1, generator=generators[row], dtype=torch.float64) for row in rows]
        places = torch.stack(draws).to(total.device) * total  # inverse of the cumulated sum
        drawn = torch.searchsorted(cumulated, places, right=True)
        for row, token in zip(rows, drawn[:, 0].tolist(), strict=True):
            tokens[row] = token
        chosen = probs.gather(-1, drawn)
        # probs where they are above chosen, else 0; torch.where takes four times as long
        likelier = torch.gt(probs, chosen, out=torch.empty_like(probs)).mul_(probs)
        again = chosen < least
        if sampling.top_p is not None:
            above = likelier.sum(-1, True, dtype=torch.float64)
            again |= (above >= mass) & (above > 0)  # a tiny top_p is a mass of 0
        left = again[:, 0].nonzero()[:, 0]
        probs, mass, least = likelier[left], mass[left], least[left]
        rows = [rows[i] for i in left.tolist()]
    return tokens


def decode_step(
    model: Llama, tokens: Tensor, positions: Tensor, layers: list[tuple[Tensor, Tensor]], key: str
) -> Tensor:
    """Logits (B, V) after one more token of each row, tokens (B,) at positions (B,).

    `layers` are a KVCache's tensors, which take it in. Everything has a fixed shape: this is what
    compile_step compiles. `key` is the model's `layout`: since no guard looks at modules, this one
    keeps a step that was compiled for one kind of model from running on another.
    """
    assert key  # read, so that it is guarded
    return model.output(model.hidden_states(tokens[:, None], StepCache(layers, positions))[:, 0])


def layout(model: Llama) -> str:
    """Equal for models that one compiled step serves: their shape, how a tensor is stored."""
    stored = [(name, t.dtype, t.layout) for name, t in model.state_dict().items()]
    return f"{model.config} {stored}"


def compile_step(device: str = "cpu") -> Callable[..., Tensor]:
    """decode_step under torch.compile, once for each layout, number of rows and capacity.

    On CUDA its kernels are one graph, which the host starts once a token.
    """
    options: dict[str, Any] = {
        "triton.cudagraphs": device == "cuda",
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,  # none changes
        "cpp.enable_floating_point_contract_flag": "fast",  # x * y + z in one: a tenth faster
        "size_asserts": False,  # a reordered weight has no strides
    }
    # What is asked for in float32 is computed in float32.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    return torch.compile(decode_step, fullgraph=True, dynamic=False, options=options)


@torch.inference_mode()
def generate_tokens(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    should_stop: Callable[[], bool] | None = None,
    step: Callable[..., Tensor] | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths; yields the next token of each row as it comes.

    A row gives what it gives alone: its random numbers come from its own seed of `seeds` (None:
    torch's global generator). It ends before a token of stop_ids and is None from then on; all ends
    when no row is left or should_stop() is true. Past max_seq_len a row sees its last max_seq_len
    tokens, recomputed for every token, since their states depend on where the window begins. `step`
    is what compile_step returned. Raises UsageError for an empty prompt.
    """
    if not all(prompts):
        raise UsageError("an empty prompt: generation needs at least one token to continue")
    texts, window = [list(prompt) for prompt in prompts], model.config.max_seq_len
    generators = [seeds and torch.Generator().manual_seed(seeds[row]) for row in range(len(texts))]
    needed = max(map(len, texts), default=0) + max_new_tokens
    if step is not None:  # powers of two, since each capacity is compiled for
        needed = 1 << max(64, needed - 1).bit_length()
        step = functools.partial(step, model, key=layout(model))
    cache = KVCache(model.config.n_layers, len(texts), min(window, needed))
    alive = cached = list(range(len(texts)))
    for _ in range(max_new_tokens):
        if should_stop is not None and should_stop():
            return
        if any(len(texts[row]) > window for row in alive):
            step = None  # one row has left the window: its states have to be computed again
        if step is None:  # a compiled step keeps its rows: those that have ended run along
            fit = [i for i, r in enumerate(cached) if r in alive and len(texts[r]) <= window]
            if len(fit) < len(cached):
                cache, cached = cache.select(fit), [cached[i] for i in fit]
        rows = cached + [row for row in alive if row not in cached]  # the order of the logits
        logits = _next_logits(model, cache, [texts[row] for row in rows], step)
        if len(alive) < len(rows):
            logits = logits[[i for i, row in enumerate(rows) if row in alive]]
            rows = [row for row in rows if row in alive]
        tokens = sample_rows(
            logits,
            sampling,
            generators=[generators[row] for row in rows],
            histories=[texts[row] for row in rows],
        )
        new = {r: t for r, t in zip(rows, tokens, strict=True) if t not in stop_ids}
        for row, token in new.items():
            texts[row].append(token)
        alive = list(new)
        if not alive:
            return
        yield [new.get(row) for row in range(len(texts))]


def _next_logits(
    model: Llama, cache: KVCache, texts: list[list[int]], step: Callable[..., Tensor] | None
) -> Tensor:
    """Logits (B, V) after each text; the first of them have their beginnings in the cache."""
    in_cache, states, device = len(cache.lengths), [], model.rotary.device
    if step is not None and all(cache.lengths):  # all are read but for the last token of each
        cache.lengths = [len(text) for text in texts]
        tokens = torch.tensor([text[-1] for text in texts], device=device)
        positions = torch.tensor(cache.lengths, device=device) - 1
        if device.type == "cuda":
            cache.stay_in_place()
            torch.compiler.cudagraph_mark_step_begin()  # the last step's logits are read
        return step(tokens, positions, cache.layers)
    if in_cache:
        new = [text[length:] for text, length in zip(texts, cache.lengths, strict=False)]
        hidden = model.extend(cache, new)
        states.append(hidden[range(in_cache), [len(tokens) - 1 for tokens in new]])
    if len(texts) > in_cache:
        windows = [text[-model.config.max_seq_len :] for text in texts[in_cache:]]
        states.append(model.hidden_states(torch.tensor(windows, device=device))[:, -1])
    return model.output(torch.cat(states))
