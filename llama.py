"""The Llama: its parts, its loss, how it reads text and writes it on, and the files it comes from.

Knows tensors and token ids, never text: it does not import the tokenizer, and a vocabulary is for
it a string of bytes that travels with the weights. It does not know optimizers, data sets, command
lines or the network, picks no device and prints nothing.

Shapes: B rows (batch), T tokens, D numbers per head, H heads (H_kv key/value heads), V vocabulary,
S places in the cache; `dim` is the width of the residual stream.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import (
    IGNORE_INDEX,
    LOGITS_CHUNK_BYTES,
    SCORES_KEPT,
    LlamaConfig,
    UsageError,
    fingerprint,
)

# ---------------------------------------------------------------------------- parts


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x run in: autocast's where that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 inside (arXiv:1910.07467).

    The result is in the dtype of the products that read it, so that it is cast once for them all.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(compute_dtype(x))


def rotary_table(head_dim: int, max_seq_len: int, theta: float = 10000.0) -> Tensor:
    """Cosine and sine of every position's angles, (max_seq_len, 1, head_dim / 2, 2) in float32.

    Made on the CPU, wherever it is used: the same numbers on every device.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    positions = torch.arange(max_seq_len, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, 1.0 / theta**steps)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)[:, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent pairs of x (B, T, H, D) by the angles of table (T or B, T; 1, D/2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses real arithmetic and has no complex kernels
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:  # one complex product: 5-8 times faster than the line above run op by op on a CPU
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).type_as(x)


def apply_rotary_emb(
    query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Rotary position embeddings (arXiv:2104.09864) of query and key, each (B, T, H, D).

    Row t of T is taken as position t, which is at most max_seq_len - 1.
    """
    table = rotary_table(head_dim, max_seq_len, theta)[: query.shape[1]].to(query.device)
    return rotate(query, table), rotate(key, table)


class KVCache:
    """The keys and values of every token read so far, (B, S, H_kv, D) a layer, row by row.

    Rows may hold different numbers of tokens (`lengths`). What a shorter row keeps beyond its
    length is padding: never attended to, and overwritten by the row's next tokens.
    """

    def __init__(self, n_layers: int, batch_size: int, capacity: int) -> None:
        self.lengths = [0] * batch_size
        self.capacity = capacity
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def place(self, width: int, device: torch.device) -> tuple[slice | Tensor, Tensor | None]:
        """Settle where the next `width` tokens of each row go.

        Returns their positions (a slice, or (B, T) where rows differ) and the mask of what each
        of them may see ((B or 1, 1, T, S); None: causal attention needs none).
        """
        start, self.end = min(self.lengths), max(self.lengths) + width
        if start == max(self.lengths):
            positions = slice(start, self.end)
            self.index: tuple[Any, ...] = (slice(None), positions)
            if start == 0 or width == 1:
                return positions, None
            rows = torch.arange(start, self.end, device=device)[None]
        else:
            held = torch.tensor(self.lengths, device=device)
            rows = held[:, None] + torch.arange(width, device=device)
            self.index = (torch.arange(len(held), device=device)[:, None], rows)
            positions = rows
        seen = torch.arange(self.end, device=device) <= rows[..., None]
        return positions, seen[:, None]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new (B, T, H_kv, D) at the settled place; return all of the layer's so far."""
        if self.layers[layer] is None:  # zeros: padding takes part in sums with weight zero
            shape = (key.shape[0], self.capacity, *key.shape[2:])
            self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.layers[layer]
        keys[self.index], values[self.index] = key, value
        return keys[:, : self.end], values[:, : self.end]

    def select(self, rows: list[int]) -> KVCache:
        """A cache of these rows, in this order; a row may be named more than once."""
        chosen = KVCache(len(self.layers), len(rows), self.capacity)
        chosen.lengths = [self.lengths[row] for row in rows]
        chosen.layers = [pair and (pair[0][rows], pair[1][rows]) for pair in self.layers]
        return chosen


class StepCache:
    """What a KVCache is to one compiled step: each row's next token, at positions (B,).

    All shapes are fixed and no Python number changes, so one compiled program serves every step.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], positions: Tensor) -> None:
        self.layers, self.positions = layers, positions

    def place(self, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tokens' positions (B, 1) and the mask of what they may see (B, 1, 1, S)."""
        self.index = (torch.arange(len(self.positions), device=device), self.positions)
        places = torch.arange(self.layers[0][0].shape[1], device=device)
        seen = places <= self.positions[:, None]
        return self.positions[:, None], seen[:, None, None]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new (B, 1, H_kv, D) at their positions; return all places of the layer."""
        keys, values = self.layers[layer]
        keys[self.index], values[self.index] = key[:, 0], value[:, 0]
        return keys, values


QUERY_BLOCK = 256  # rows of scores at once: measured best of 64 to 1,024


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query @ key.T / sqrt(D)) @ value over what each token may see, all (B, H, T, D).

    For training on a CPU: in bfloat16 it takes half (T 256) to four fifths (T 1,024) of the time
    of torch's fused kernel, whose backward pass computes the scores anew where this keeps them.
    """
    out = []
    for block in (query * query.shape[-1] ** -0.5).split(QUERY_BLOCK, dim=2):
        start = len(out) * QUERY_BLOCK
        end = start + block.shape[2]
        scores = block @ key[:, :, :end].transpose(2, 3)
        unseen = scores.new_full(scores.shape[2:], -math.inf).triu(start + 1)
        scores += unseen
        out.append(torch.softmax(scores, dim=-1) @ value[:, :, :end])
    return torch.cat(out, dim=2)


def single_token_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token's query (B, H, 1, D) to the places (B, H_kv, S, D) that mask shows.

    For compiled steps: it melts into the loops around it, and so outruns torch's fused kernel.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # (B, H_kv, H / H_kv, 1, D)
    scores = (grouped * key[:, :, None]).sum(-1) * query.shape[-1] ** -0.5  # (B, H_kv, ..., S)
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (weights[..., None] * value[:, :, None]).sum(-2).flatten(1, 2)[:, :, None]


class Attention(nn.Module):
    """Causal self-attention with rotary positions; each key/value head serves H / H_kv heads."""

    def __init__(self, layer_id: int, config: LlamaConfig) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.head_dim = config.head_dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        kv_dim = config.n_kv_heads * config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        self.compute_query = nn.Linear(config.dim, config.dim, bias=False)
        self.compute_key = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_value = nn.Linear(config.dim, kv_dim, bias=False)
        self.compute_output = nn.Linear(config.dim, config.dim, bias=False)
        self.compute_heads: PackedLinear | None = None  # the first three, for generation
        self.dropout = nn.Dropout(config.dropout)

    def heads(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, T, H, D) and key, both turned, and value (B, T, H_kv, D) of x (B, T, dim)."""
        split = (-1, self.head_dim)
        if self.compute_heads is not None:
            counts = (self.n_heads + self.n_kv_heads, self.n_kv_heads)
            turned, value = self.compute_heads(x).unflatten(-1, split).split(counts, 2)
            return *rotate(turned, table).split((self.n_heads, self.n_kv_heads), 2), value
        query = rotate(self.compute_query(x).unflatten(-1, split), table)
        key = rotate(self.compute_key(x).unflatten(-1, split), table)
        return query, key, self.compute_value(x).unflatten(-1, split)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        cache: KVCache | StepCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = self.heads(x, table)
        if cache is not None:
            key, value = cache.update(self.layer_id, key, value)  # (B, S, H_kv, D)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        trains = cache is None and query.requires_grad
        if trains and query.is_cpu and not self.grouped and x.shape[1] <= SCORES_KEPT:
            attended = causal_attention(query, key, value)
        elif isinstance(cache, StepCache):
            attended = single_token_attention(query, key, value, mask)
        else:
            attended = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None and x.shape[1] > 1,  # a single token sees all there is
                enable_gqa=self.grouped,
            )
        return self.dropout(self.compute_output(attended.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up
        self.w1_w3: PackedLinear | None = None  # the two, for generation
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.w1_w3 is not None:
            gate, up = self.w1_w3(x).chunk(2, -1)
        else:
            gate, up = self.w1(x), self.w3(x)
        return self.dropout(self.w2(F.silu(gate) * up))


class LlamaLayer(nn.Module):
    """Attention, then feed-forward, each normalised before and added to what came in."""

    def __init__(self, layer_id: int, config: LlamaConfig) -> None:
        super().__init__()
        self.attention = Attention(layer_id, config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.layer_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.layer_norm_eps)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        cache: KVCache | StepCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, cache, mask)
        return x + self.feed_forward(self.ffn_norm(x))


# ---------------------------------------------------------------------------- loss

SMALLEST_PROBABILITY = torch.finfo(torch.float32).tiny  # what is below counts as this: 87 nats


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of hidden @ weight.T, its gradients made on the way forward.

    A chunk of rows at a time: its logits are made, used for loss and gradients, and written over,
    so the (N, V) tensor that dominates a small model's memory never exists. Logits and matrix
    products are in `dtype`, softmax and the weight gradient's sum over chunks in float32. Float16
    needs no scale in here: softmax minus one-hot lies in [-1, 1] (what is below 6e-8 is lost,
    together less than a thousandth of a row), the products stay far from 65504, and a GradScaler's
    factor comes later, as grad_output, onto float32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, chunk_rows, wanted):
        loss_sum = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        hidden_cast, weight_cast = hidden.to(dtype), weight.to(dtype)
        # One pair for all chunks: to get fresh memory takes a CPU as long as to work on it.
        shape = (min(chunk_rows, hidden.shape[0]), weight.shape[0])
        logits, probs = hidden_cast.new_empty(shape), weight.new_empty(shape, dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = hidden_cast[start : start + chunk_rows]  # (n, dim)
            target = targets[start : start + chunk_rows, None]  # (n, 1)
            real = (target != IGNORE_INDEX).float()
            target = target.clamp(min=0)
            chunk_logits, chunk_probs = logits[: rows.shape[0]], probs[: rows.shape[0]]
            torch.mm(rows, weight_cast.t(), out=chunk_logits)
            chunk_probs.copy_(chunk_logits)
            torch.softmax(chunk_probs, -1, out=chunk_probs)
            right = chunk_probs.gather(1, target).clamp_(min=SMALLEST_PROBABILITY)
            loss_sum = loss_sum - (right.log_() * real).sum()
            if not any(wanted):
                continue
            chunk_probs.scatter_add_(1, target, -torch.ones_like(real))
            grad_logits = chunk_logits.copy_(chunk_probs)  # (n, V)
            if wanted[0]:
                grad_hidden[start : start + chunk_rows] = (grad_logits @ weight_cast).float() * real
            if wanted[1]:  # rows without a target are zeroed here, where they are narrow
                grad_weight += grad_logits.t() @ (rows * real.to(dtype))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return loss_sum

    @staticmethod
    def backward(ctx, grad_output):
        grads = (
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None


def _chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows of logits to hold at once: measured best where a chunk stays near the CPU's cache."""
    rows = LOGITS_CHUNK_BYTES.get(device.type, LOGITS_CHUNK_BYTES["cpu"]) // (4 * vocab_size)
    return max(16, min(512, rows)) if device.type == "cpu" else max(256, rows)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the logits hidden @ weight.T, which are never whole in memory.

    hidden (N, dim), weight (V, dim), targets (N,). Returns the sum in nats over the targets that
    are not IGNORE_INDEX, and their count. Computed in autocast's dtype where that is on, else in
    hidden's.
    """
    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad)
    chunk_rows = chunk_rows or _chunk_rows(weight.shape[0], hidden.device)
    loss_sum = _LinearCrossEntropy.apply(
        hidden, weight, targets, compute_dtype(hidden), chunk_rows, wanted
    )
    return loss_sum, (targets != IGNORE_INDEX).sum()


# ---------------------------------------------------------------------------- the whole


class Llama(nn.Module):
    """Token ids in, logits out. `vocabulary` is the SentencePiece model of the ids, if known."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary: bytes | None = None
        self.activation_checkpointing = False  # recompute each layer in backward: memory for time
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(i, config) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.layer_norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("rotary", torch.empty(0), persistent=False)
        self._settle()
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights as GPT-2 does: normal 0.02, less where 2 n_layers branches add up."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                ends_branch = name.endswith(("compute_output.weight", "w2.weight"))
                scale = math.sqrt(2 * self.config.n_layers) if ends_branch else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def _settle(self) -> None:
        """Tie head and embedding, and make the rotary table on the weights' device."""
        config = self.config
        if config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight
        table = rotary_table(config.head_dim, config.max_seq_len, config.rope_theta)
        self.rotary = table.to(self.tok_embeddings.weight.device)  # (max_seq_len, 1, D/2, 2)

    def _apply(self, fn: Any, recurse: bool = True) -> Llama:
        super()._apply(fn, recurse)
        self._settle()  # the table stays float32 in a bfloat16 model, and nothing stays on meta
        return self

    def hidden_states(self, tokens: Tensor, cache: KVCache | StepCache | None = None) -> Tensor:
        """The normalised states (B, T, dim) after each of tokens (B, T).

        Raises UsageError for more tokens than max_seq_len.
        """
        width = tokens.shape[1]
        if width > self.config.max_seq_len:
            raise UsageError(f"{width} tokens do not fit max_seq_len {self.config.max_seq_len}")
        positions, mask = slice(width), None
        if cache is not None:
            positions, mask = cache.place(width, tokens.device)
            if isinstance(positions, Tensor):  # padding may stand beyond the last position
                positions = positions.clamp(max=self.config.max_seq_len - 1)
        table = self.rotary[positions]  # (T or B, T; 1, D/2, 2)
        x = self.dropout(self.tok_embeddings(tokens))
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, table, use_reentrant=False)
            else:
                x = layer(x, table, cache, mask)
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and hidden states (B, T, dim) of tokens (B, T).

        Logits are (B, 1, V), of the last position, or with targets given (B, T, V).
        """
        hidden = self.hidden_states(tokens)
        return self.output(hidden if targets is not None else hidden[:, -1:]), hidden

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of cross entropies in nats over the real targets, and their count.

        tokens and targets are (B, T); targets of IGNORE_INDEX do not count.
        """
        hidden = self.hidden_states(tokens).flatten(0, 1)
        return linear_cross_entropy(hidden, self.output.weight, targets.flatten())

    def extend(self, cache: KVCache, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read the next tokens of each row into the cache; rows may differ in how many they are.

        Returns the hidden states (B, T, dim) after them, T the longest row's; what stands beyond
        a row's own tokens means nothing.
        """
        width = max(map(len, rows))
        padded = [[*row, *[0] * (width - len(row))] for row in rows]
        hidden = self.hidden_states(torch.tensor(padded, device=self.rotary.device), cache)
        cache.lengths = [held + len(row) for held, row in zip(cache.lengths, rows, strict=True)]
        return hidden

    def lay_out_for_decoding(self, dtype: torch.dtype = torch.float32) -> None:
        """Store every matrix for generation, as float32, bfloat16 or int8; there is no way back.

        The product with a single row, of which decoding consists, waits for memory: fewer bytes
        are the faster ones, and PackedLinear reads them at more of its speed than nn.Linear.
        Matrices that are multiplied by the same become one, for fewer and longer products.
        """

        def pack(*linears: nn.Linear) -> PackedLinear:
            weights = [linear.weight for linear in linears]
            return PackedLinear(torch.cat(weights) if len(weights) > 1 else weights[0], dtype)

        for layer in self.layers:
            part = layer.attention
            part.compute_heads = pack(part.compute_query, part.compute_key, part.compute_value)
            part.compute_output = pack(part.compute_output)
            del part.compute_query, part.compute_key, part.compute_value
            part = layer.feed_forward
            part.w1_w3, part.w2 = pack(part.w1, part.w3), pack(part.w2)
            del part.w1, part.w3
        self.output = pack(self.output)
        if self.config.tie_word_embeddings:
            self.tok_embeddings = PackedEmbedding(self.output)
        else:
            self.tok_embeddings = PackedEmbedding(PackedLinear(self.tok_embeddings.weight, dtype))

    @torch.inference_mode()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        """Append max_new_tokens to each row of idx (B, T): the likeliest at temperature 0.

        Draws from torch's global generator and stops at no token. Put the model in eval mode.
        """
        rows = idx.tolist()
        sampling = Sampling(temperature=temperature)
        for step in generate_tokens(self, rows, max_new_tokens=max_new_tokens, sampling=sampling):
            for row, token in zip(rows, step, strict=True):
                row.append(token)
        return torch.tensor(rows, device=idx.device)


class PackedLinear(nn.Module):
    """A linear layer for generation, its weight (out, in) stored as float32, bfloat16 or int8.

    int8 has a scale for each output, its largest weight / 127. Results are float32.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        weight, scale, ones = weight.detach(), None, None
        if dtype == torch.int8:
            scale = weight.abs().amax(1).clamp(min=1e-12) / 127
            ones = scale.new_ones(len(scale), dtype=torch.bfloat16)  # what the kernel scales by
            weight = (weight / scale[:, None]).round()
        self.register_buffer("weight", weight.to(dtype).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("ones", ones)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.numel() == x.shape[-1]:
            # A single row: one loop, which reads the weight as it is stored at memory's full speed.
            product = (self.weight.float() * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
        elif self.scale is not None:
            product = _int8_product(x, self.weight, self.ones).float()
        else:
            product = _product(x.to(self.weight.dtype), self.weight).float()
        return product if self.scale is None else product * self.scale


# Private operators of torch, which read a CPU's memory faster than the public ones.
_MKLDNN_LINEAR = None  # torch without oneDNN, as on Apple's computers, may have just its name
if torch.backends.mkldnn.is_available():
    _MKLDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_INT8_LINEAR = getattr(torch, "_weight_int8pack_mm", None)
INT8_WIDTH = 16  # of whose multiples a row must be: else that reads what lies behind, or crashes
FEW_ROWS = 32  # up to which weight @ x.T is faster than x @ weight.T on a CPU: twice at 16


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) @ weight (out, in).T, of one dtype."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or rows > FEW_ROWS:
        return F.linear(x, weight)
    if rows == 1 and weight.dtype == torch.float32 and _MKLDNN_LINEAR is not None:
        return _MKLDNN_LINEAR(x, weight, None, "none", [], "")
    return (weight @ x.flatten(0, -2).t()).t().contiguous().view(*x.shape[:-1], -1)


def _int8_product(x: Tensor, weight: Tensor, ones: Tensor) -> Tensor:
    """x (..., in) @ weight (out, in).T without the weight's scales."""
    if x.device.type != "cpu" or _INT8_LINEAR is None or weight.shape[1] % INT8_WIDTH:
        return F.linear(x, weight.to(x.dtype))
    rows = x.flatten(0, -2).bfloat16()  # fast with bfloat16 alone
    return _INT8_LINEAR(rows, weight, ones).view(*x.shape[:-1], -1)


class PackedEmbedding(nn.Module):
    """The rows of a packed matrix, which the output head may share."""

    def __init__(self, table: PackedLinear) -> None:
        super().__init__()
        self.weight, self.scale = table.weight, table.scale

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight[tokens].float()
        return rows if self.scale is None else rows * self.scale[tokens, None]


class NextTokenLoss(nn.Module):
    """Llama.loss as a module's forward, which DDP, FSDP2 and torch.compile can wrap."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.loss(tokens, targets)


# ---------------------------------------------------------------------------- generation


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. None and a penalty of 1 switch a filter off."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # only the k likeliest
    top_p: float | None = None  # only the likeliest that together reach this probability
    min_p: float | None = None  # only those at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1: what stands in the text already is less likely


def penalize(logits: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Logits (V,) with those of the tokens in history made smaller (arXiv:1909.05858)."""
    seen = torch.tensor(sorted(set(history)), dtype=torch.long, device=logits.device)
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def logits_to_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) of the next token from its logits, filters applied in field order."""

    def keep(floor: Tensor) -> Tensor:
        return torch.where(probs >= floor, probs, 0)

    logits = logits.float()
    probs = torch.softmax((logits - logits.amax(-1, True)) / sampling.temperature, dim=-1)
    if sampling.top_k is not None and sampling.top_k < probs.shape[-1]:
        probs = keep(probs.topk(sampling.top_k).values[:, -1:])
    if sampling.top_p is not None and sampling.top_p < 1:
        likeliest = probs.sort(-1, descending=True).values
        mass = sampling.top_p * probs.sum(-1, True)
        short = (likeliest.cumsum(-1) < mass).sum(-1, True)  # prefixes that fall short of it
        probs = keep(likeliest.gather(-1, short.clamp(max=probs.shape[-1] - 1)))
    if sampling.min_p is not None:
        probs = keep(sampling.min_p * probs.amax(-1, True))
    return probs / probs.sum(-1, True)


def sample_next(
    logits: Tensor,
    sampling: Sampling,
    *,
    generator: torch.Generator | None = None,
    history: Sequence[int] = (),
) -> int:
    """Draw the next token from its logits (V,); `history` is the text so far."""
    return sample_rows(logits[None], sampling, generators=[generator], histories=[history])[0]


def sample_rows(
    logits: Tensor,
    sampling: Sampling,
    *,
    generators: Sequence[torch.Generator | None],
    histories: Sequence[Sequence[int]],
) -> list[int]:
    """Draw the next token of each row from its logits (B, V); `histories` are the texts so far.

    They come with the probabilities of logits_to_probs, but without its sorting for top_p: a token
    is drawn before top_p and min_p apply, and where they would not keep it, anew from those
    likelier than it. All that they keep are among these, so each of them has its share still.

    Uses a row's CPU generator (None: torch's global one) on every device: mostly one number, and
    one more for each time that it draws anew. Raises UsageError where the logits are NaN.
    """
    penalty = sampling.repetition_penalty
    if penalty != 1:
        pairs = zip(logits, histories, strict=True)
        logits = torch.stack([penalize(row, history, penalty) for row, history in pairs])
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    # On the CPU: Apple's GPU has no float64, which keeps the sum of many small numbers true.
    probs = logits_to_probs(logits, replace(sampling, top_p=None, min_p=None)).cpu()
    mass = 1.0 if sampling.top_p is None else sampling.top_p
    least = (sampling.min_p or 0) * probs.amax(-1, True)
    tokens, rows = [0] * len(probs), list(range(len(probs)))  # rows: those still to be drawn
    while rows:
        cumulated = probs.cumsum(-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        if not (total > 0).all():
            raise UsageError("the model's logits are not numbers: its training diverged")
        draws = [torch.rand(1, generator=generators[row], dtype=torch.float64) for row in rows]
        drawn = torch.searchsorted(cumulated, torch.stack(draws) * total, right=True)
        for row, token in zip(rows, drawn[:, 0].tolist(), strict=True):
            tokens[row] = token
        chosen = probs.gather(-1, drawn)
        # probs where they are above chosen, else 0; torch.where takes four times as long
        likelier = torch.gt(probs, chosen, out=torch.empty_like(probs)).mul_(probs)
        again = chosen < least
        if mass < 1:
            again |= likelier.sum(-1, True, dtype=torch.float64) >= mass
        left = again[:, 0].nonzero()[:, 0]
        probs, least, rows = likelier[left], least[left], [rows[i] for i in left.tolist()]
    return tokens


def decode_step(
    model: Llama, tokens: Tensor, positions: Tensor, layers: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Logits (B, V) after one more token of each row, tokens (B,) at positions (B,).

    `layers` are a KVCache's tensors, which take it in. Everything has a fixed shape: this is what
    compile_step compiles.
    """
    return model.output(model.hidden_states(tokens[:, None], StepCache(layers, positions))[:, 0])


def compile_step() -> Callable[..., Tensor]:
    """decode_step under torch.compile, once for each number of rows and capacity of the cache."""
    options = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,  # none changes
        "cpp.enable_floating_point_contract_flag": "fast",  # x * y + z in one: a tenth faster
    }
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

    A row gives what it gives alone: it has its own positions and, where `seeds` has a number for
    each row, its own random numbers (None: torch's global ones). A row ends before a token of
    stop_ids and is None from then on; all ends when no row is left, after max_new_tokens, or when
    should_stop() is true. Past max_seq_len a row sees its last max_seq_len tokens, read anew for
    every token, since all their states depend on where the window begins. `step` is what
    compile_step returned, to read single tokens with while all rows fit the window. Raises
    UsageError for an empty prompt.
    """
    if not all(prompts):
        raise UsageError("an empty prompt: generation needs at least one token to go on from")
    texts, window = [list(prompt) for prompt in prompts], model.config.max_seq_len
    generators = [seeds and torch.Generator().manual_seed(seeds[row]) for row in range(len(texts))]
    needed = max(map(len, texts), default=0) + max_new_tokens
    if step is not None:  # powers of two, since each capacity is compiled for
        needed = 1 << max(64, needed - 1).bit_length()
    cache = KVCache(model.config.n_layers, len(texts), min(window, needed))
    alive = cached = list(range(len(texts)))
    for _ in range(max_new_tokens):
        if should_stop is not None and should_stop():
            return
        if step is not None and any(len(texts[row]) > window for row in alive):
            step = None
        if step is None:  # a compiled step keeps its rows: those that have ended go on idly
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
        new: list[int | None] = [None] * len(texts)
        for row, token in zip(rows, tokens, strict=True):
            if token not in stop_ids:
                new[row] = token
                texts[row].append(token)
        alive = [row for row in rows if new[row] is not None]
        if not alive:
            return
        yield new


def _next_logits(
    model: Llama, cache: KVCache, texts: list[list[int]], step: Callable[..., Tensor] | None
) -> Tensor:
    """Logits (B, V) after each text; the first of them have their beginnings in the cache."""
    in_cache, states = len(cache.lengths), []
    if step is not None and all(cache.lengths):  # all are read but for the last token of each
        cache.lengths = [len(text) for text in texts]
        device = model.rotary.device
        tokens = torch.tensor([text[-1] for text in texts], device=device)
        return step(model, tokens, torch.tensor(cache.lengths, device=device) - 1, cache.layers)
    if in_cache:
        new = [text[held:] for text, held in zip(texts, cache.lengths, strict=False)]
        hidden = model.extend(cache, new)
        states.append(hidden[range(in_cache), [len(tokens) - 1 for tokens in new]])
    if len(texts) > in_cache:
        windows = [text[-model.config.max_seq_len :] for text in texts[in_cache:]]
        tokens = torch.tensor(windows, device=model.rotary.device)
        states.append(model.hidden_states(tokens)[:, -1])
    return model.output(torch.cat(states))


# ---------------------------------------------------------------------------- classifiers


class LlamaEmbeddingClassifier(nn.Module):
    """A linear head over the hidden state after the last real token."""

    def __init__(
        self,
        llama: Llama,
        *,
        num_labels: int,
        hidden_dropout_prob: float = 0.3,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__()
        self.llama = llama
        self.dropout = nn.Dropout(hidden_dropout_prob)
        self.classifier_head = nn.Linear(llama.config.dim, num_labels)
        if freeze_backbone:
            llama.requires_grad_(False)
        elif not llama.config.tie_word_embeddings:
            llama.output.requires_grad_(False)  # it predicts tokens and takes no part here

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Log-probabilities (B, num_labels) of right-padded tokens (B, T) with lengths (B,).

        Padding is never read: a row's result does not depend on the others of its batch.
        """
        hidden = self.llama.hidden_states(tokens)
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]  # (B, dim)
        return F.log_softmax(self.classifier_head(self.dropout(last)).float(), dim=-1)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens at their start all sequences share."""
    columns = zip(*sequences, strict=False)
    return next(
        (length for length, column in enumerate(columns) if len(set(column)) > 1),
        min(map(len, sequences)),
    )


class LlamaZeroShotClassifier(nn.Module):
    """Scores each label as the continuation of a prompt, by the chain rule over its tokens."""

    def __init__(self, llama: Llama) -> None:
        super().__init__()
        self.llama = llama.requires_grad_(False)

    @torch.inference_mode()
    def score(
        self, sequences: Sequence[Sequence[Sequence[int]]], starts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, L) of the labels' tokens, and how many tokens those are (B, L).

        sequences[b][l] is prompt b with label l, tokenized as one text; its tokens from starts[b]
        on are scored (None: from the first in which the labels of b differ). What all sequences
        begin with is read once for the batch, and what those of one prompt begin with once for
        its labels. Raises UsageError for a sequence longer than the context.
        """
        common = [common_prefix(labels) for labels in sequences]
        starts = common if starts is None else list(starts)
        self._check(sequences, starts)
        # The last token that a prompt's labels share is read with each: it predicts the next.
        held = [min(pair) - 1 for pair in zip(common, starts, strict=True)]
        ends = [max(map(len, labels)) - 1 for labels in sequences]
        room = max(end - h for end, h in zip(ends, held, strict=True))
        prompts = [labels[0][:h] for labels, h in zip(sequences, held, strict=True)]
        cache = self._read(prompts, room)
        scores = []
        for texts in zip(*sequences, strict=True):  # label by label
            cache.lengths = list(held)  # forget the label before
            tails = [text[h:-1] for text, h in zip(texts, held, strict=True)]
            scores.append(self._sum(self.llama.extend(cache, tails), texts, starts, held))
        counts = torch.tensor([[len(text) for text in labels] for labels in sequences])
        return torch.stack(scores, dim=1), counts - torch.tensor(starts)[:, None]

    def _check(self, sequences: Any, starts: list[int]) -> None:
        context = self.llama.config.max_seq_len
        for labels, start in zip(sequences, starts, strict=True):
            lengths = [len(text) for text in labels]
            if max(lengths) > context + 1:
                raise UsageError(
                    f"prompt and label have {max(lengths)} tokens where max_seq_len {context} "
                    f"allows {context + 1}: shorten the text"
                )
            if not 0 < start < min(lengths):
                raise UsageError("a prompt and a label need at least one token each")

    def _read(self, prefixes: list[Sequence[int]], room: int) -> KVCache:
        """A cache that holds the prefixes, and has room for so many more tokens each."""
        shared, capacity = common_prefix(prefixes), max(map(len, prefixes)) + room
        cache = KVCache(self.llama.config.n_layers, 1, capacity)
        if shared:
            self.llama.extend(cache, [prefixes[0][:shared]])
        cache = cache.select([0] * len(prefixes))
        if capacity > shared + room:
            self.llama.extend(cache, [prefix[shared:] for prefix in prefixes])
        return cache

    def _sum(self, hidden: Tensor, texts: Any, starts: list[int], held: list[int]) -> Tensor:
        """Summed log-probabilities (B,) of text[start:] from hidden states after text[held:-1]."""
        scored = [(b, i) for b, text in enumerate(texts) for i in range(starts[b], len(text))]
        rows = torch.tensor([b for b, _ in scored], device=hidden.device)
        states = hidden[rows, [i - 1 - held[b] for b, i in scored]]  # (tokens scored, dim)
        targets = torch.tensor([texts[b][i] for b, i in scored], device=hidden.device)[:, None]
        log_probs = [
            F.log_softmax(self.llama.output(part).float(), dim=-1).gather(1, target)[:, 0]
            for part, target in zip(states.split(256), targets.split(256), strict=True)
        ]
        return log_probs[0].new_zeros(len(texts)).index_add(0, rows, torch.cat(log_probs))


# ---------------------------------------------------------------------------- adapters


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained product of two thin matrices (arXiv:2106.09685).

    y = W x + alpha / rank * B A dropout(x); B starts at zero, so training starts at W.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: the weight is there already
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, None
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(self.dropout(x), self.lora_a) * self.scaling
        return F.linear(x, self.weight) + F.linear(thin, self.lora_b)

    def merged(self) -> nn.Linear:
        """The ordinary layer that computes the same."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with torch.no_grad():
            self.weight += self.scaling * (self.lora_b @ self.lora_a)
        linear.weight = self.weight
        return linear


def add_lora(model: Llama, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze the model and give every linear layer, the head apart, an adapter to train.

    Raises UsageError for a rank below 1.
    """
    if rank < 1:
        raise UsageError(f"--lora_rank {rank}: must be at least 1")
    model.requires_grad_(False)
    for parent in [module for layer in model.layers for module in layer.children()]:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                adapter = LoRALinear(linear, rank=rank, alpha=alpha, dropout=dropout)
                setattr(parent, name, adapter)


def merge_lora(model: Llama) -> None:
    """Fold the adapters into the weights: the model's tensors are the ordinary ones again."""
    for parent in [module for layer in model.layers for module in layer.children()]:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, LoRALinear):
                setattr(parent, name, linear.merged())
    model.requires_grad_(True)


# ---------------------------------------------------------------------------- model files

FORMAT_VERSION = 2  # of .pt files; 1: 'digest' among the keys, where there is one; 2: sealed
SEAL = b"minllama sha256 "  # begins the comment that ends a sealed file; 64 hex digits follow
LLAMA2C_MAGIC = 0x616B3432  # "ak42": llama2.c's versions 1 and 2; version 0 has no magic
_OTHER_NAMES = {  # llama2.c's and Meta's names of what the original renamed
    "attention.wq": "attention.compute_query",
    "attention.wk": "attention.compute_key",
    "attention.wv": "attention.compute_value",
    "attention.wo": "attention.compute_output",
}
HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.compute_query": "self_attn.q_proj",
    "attention.compute_key": "self_attn.k_proj",
    "attention.compute_value": "self_attn.v_proj",
    "attention.compute_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def layer_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of one layer's tensors, by its name inside the layer."""
    dim, hidden, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    return {
        "attention_norm": (dim,),
        "attention.compute_query": (dim, dim),
        "attention.compute_key": (kv_dim, dim),
        "attention.compute_value": (kv_dim, dim),
        "attention.compute_output": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a weights file, a tied head under both names."""
    table = (config.vocab_size, config.dim)
    shapes = {"tok_embeddings.weight": table}
    for layer in range(config.n_layers):
        for name, shape in layer_shapes(config).items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    return {**shapes, "norm.weight": (config.dim,), "output.weight": table}


def model_payload(
    model: Llama, dtype: torch.dtype = torch.float32, *, state: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """What a weights file holds, for torch.save: plain types, and tensors on the CPU.

    `state` stands in for model.state_dict() where that is sharded. A tied embedding is one storage
    under two names, so the disk holds it once.
    """
    state = model.state_dict() if state is None else state
    cast: dict[int, Tensor] = {}  # by address: what is tied stays tied
    weights = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in cast:
            cast[tensor.data_ptr()] = tensor.detach().to("cpu", dtype).contiguous()
        weights[name] = cast[tensor.data_ptr()]
    payload = {"model": weights, "model_args": model.config.to_model_args(), "format_version": 1}
    if model.vocabulary is not None:
        payload["vocabulary"] = torch.frombuffer(bytearray(model.vocabulary), dtype=torch.uint8)
        payload["vocabulary_fingerprint"] = fingerprint(model.vocabulary)
    return payload


class SealingFile:
    """Passes on to `file` what torch.save writes; `seal` ends it with the SHA-256 of every byte.

    The checksum is the comment of the zip archive that torch.save makes, so any other program
    reads a sealed file as an unsealed one. What was meant to be written is summed, not what was.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()
        self.held = b""  # the last two bytes: they tell the size of the archive's comment

    def write(self, data: bytes | memoryview) -> int:
        """Write all but the last two bytes so far."""
        view = memoryview(data).cast("B")
        if len(view) < 2:
            view = memoryview(self.held + bytes(view))
        else:
            self._pass_on(self.held)
        self._pass_on(view[:-2])
        self.held = bytes(view[-2:])
        return len(data)

    def flush(self) -> None:
        """For torch.save; the file is flushed by who opened it."""

    def seal(self) -> None:
        """Write the rest and the checksum."""
        assert self.held == b"\0\0", "torch.save ended its archive with a comment of its own"
        self._pass_on(struct.pack("<H", len(SEAL) + 64))
        self.file.write(SEAL + self.sum.hexdigest().encode())

    def _pass_on(self, data: bytes | memoryview) -> None:
        self.sum.update(data)
        self.file.write(data)


def verify_seal(path: Path) -> bool:
    """Read every byte of a sealed file; False for one without a seal.

    Raises UsageError where a byte is not what was written, OSError where it cannot be read.
    """
    with path.open("rb") as file:
        left = file.seek(0, 2) - len(SEAL) - 64
        file.seek(max(0, left))
        seal = file.read()
        if not seal.startswith(SEAL):
            return False
        file.seek(0)
        found = hashlib.sha256()
        while left > 0 and (data := file.read(min(left, 1 << 20))):
            found.update(data)
            left -= len(data)
    if seal[len(SEAL) :] != found.hexdigest().encode():
        raise UsageError(f"{path} is damaged: its bytes do not match its SHA-256")
    return True


def content_digest(payload: Any) -> str:
    """SHA-256 over every key, plain value and tensor byte, in order: 'digest' of format 1."""
    digest = hashlib.sha256()

    def add(node: Any) -> None:
        if isinstance(node, Tensor):
            digest.update(f"{node.dtype}{tuple(node.shape)}".encode())
            flat = node.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy())
        elif isinstance(node, dict):
            digest.update(f"dict{len(node)}".encode())
            for key, value in node.items():
                digest.update(repr(key).encode())
                add(value)
        elif isinstance(node, list | tuple):
            digest.update(f"{type(node).__name__}{len(node)}".encode())
            for value in node:
                add(value)
        else:
            digest.update(repr(node).encode())

    add(payload)
    return digest.hexdigest()


def load_pretrained(path: str | Path) -> Llama:
    """Read a model, in float32 on the CPU and in eval mode, whatever program wrote it.

    Goes by the content: .pt files of this program, the original and llama2.c; llama2.c's .bin
    (versions 0 and 1, and 2, whose int8 is widened); Hugging Face folders with safetensors. Runs
    no code from the file. Raises UsageError, naming file and tensor, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        return _read_hugging_face(path)
    if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
        raise UsageError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    return (_read_pt if head[:2] in (b"PK", b"\x80\x02") else _read_llama2c)(path)


def load_payload(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Everything a .pt file holds, its tensors mapped from the disk, with no code run.

    `verify` reads every byte of a file that carries a checksum. Raises UsageError for one that is
    damaged or of a newer format, and unless it holds a dict with a dict of tensors under 'model'.
    """
    path = Path(path)
    try:
        sealed = verify and verify_seal(path)
        whole = zipfile.is_zipfile(path)  # else torch's format before 2020, or cut off
        if whole:
            _check_archive(path, checksums=verify and not sealed)
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        reason = "carries code or objects beyond tensors and plain values, and none of it was run"
        if "unsupported" not in str(error).lower():
            reason = "is damaged or no model file"
        raise UsageError(f"{path}: {reason}; get a file of plain weights") from None
    except Exception as error:  # torch.load raises what the damage happens to hit
        remedy = "it is damaged or cut off; copy it again"
        raise UsageError(f"{path}: {remedy} ({type(error).__name__})") from None
    weights = payload.get("model") if isinstance(payload, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise UsageError(f"{path}: no tensors under the key 'model': not a weights file of a Llama")
    _check_version(path, payload.get("format_version", 1), sealed=sealed or not verify)
    if verify and "digest" in payload:
        rest = {key: value for key, value in payload.items() if key != "digest"}
        if content_digest(rest) != payload["digest"]:
            raise UsageError(f"{path} is damaged: its content does not match its SHA-256")
    return payload


def _check_archive(path: Path, *, checksums: bool) -> None:
    """Refuse an archive that would unpack to more than the file holds, before it does.

    `checksums` reads every byte of its parts and compares their CRC-32, all that other programs'
    files have.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        size = sum(part.file_size for part in parts)
        if size > path.stat().st_size or any(part.compress_type for part in parts):
            raise UsageError(f"{path}: claims {size:,} bytes of content, more than the file holds")
        broken = archive.testzip() if checksums else None
    if broken is not None:
        raise UsageError(f"{path} is damaged: the checksum of {broken} is wrong; copy it again")


def _check_version(path: Path, version: Any, *, sealed: bool) -> None:
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UsageError(
            f"{path}: has the format version {version}, and this program reads up to "
            f"{FORMAT_VERSION}: update it"
        )
    if version > 1 and not sealed:
        raise UsageError(
            f"{path} is damaged: its checksum is gone; it was cut off, or saved by another program"
        )


def _read_pt(path: Path) -> Llama:
    payload = load_payload(path)
    args = payload.get("model_args")
    if not isinstance(args, dict):
        raise UsageError(f"{path}: no dict 'model_args', which gives the shape of the model")
    weights = {}
    for name, tensor in payload["model"].items():
        name = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("llama.")
        for other, ours in _OTHER_NAMES.items():
            name = name.replace(f".{other}.", f".{ours}.")
        # llama2.c's rotary tables are made anew here; a classifier's head is not the Llama's.
        if name not in ("freqs_cos", "freqs_sin") and not name.startswith("classifier_head."):
            weights[name] = tensor
    args = dict(args)
    if args.get("hidden_dim") is None and "layers.0.feed_forward.w1.weight" in weights:
        args["hidden_dim"] = weights["layers.0.feed_forward.w1.weight"].shape[0]
    if "tie_word_embeddings" not in args and {"tok_embeddings.weight", "output.weight"} <= {
        *weights
    }:
        args["tie_word_embeddings"] = torch.equal(
            weights["tok_embeddings.weight"], weights["output.weight"]
        )
    vocabulary = payload.get("vocabulary")
    if isinstance(vocabulary, Tensor) and vocabulary.dtype == torch.uint8:
        vocabulary = vocabulary.numpy().tobytes()
        found, said = fingerprint(vocabulary), payload.get("vocabulary_fingerprint")
        if found != said:
            raise UsageError(
                f"{path}: its vocabulary has the fingerprint {found} where it says {said}: "
                "the file is damaged; copy it again"
            )
    elif vocabulary is not None:
        raise UsageError(f"{path}: 'vocabulary' is not a tensor of bytes")
    return _build(path, _config(path, args), weights, vocabulary)


def llama2c_order(n_layers: int, *, version: int, tied: bool) -> list[str]:
    """The tensors of a llama2.c .bin file in the order they stand in it."""

    def each(*names: str) -> list[str]:
        return [f"layers.{i}.{name}.weight" for name in names for i in range(n_layers)]

    attention = each(*_OTHER_NAMES.values())
    feed_forward = each("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    embedding, norm, head = (
        "tok_embeddings.weight",
        "norm.weight",
        [] if tied else ["output.weight"],
    )
    if version == 0:
        layers = [*each("attention_norm"), *attention, *each("ffn_norm"), *feed_forward]
        return [embedding, *layers, norm, "freqs_cos", "freqs_sin", *head]
    norms = [*each("attention_norm", "ffn_norm"), norm]
    return [*norms, embedding, *attention, *feed_forward, *head]


def _read_llama2c(path: Path) -> Llama:
    with path.open("rb") as file:
        header = file.read(256).ljust(256, b"\0")
        magic, version = struct.unpack_from("<Ii", header)
        start, version = (256, version) if magic == LLAMA2C_MAGIC else (28, 0)
        numbers = struct.unpack_from("<7i", header, 8 if version else 0)
        tied = header[36] == 1 if version else numbers[5] > 0  # version 0: the vocabulary's sign
        group = struct.unpack_from("<i", header, 37)[0] if version == 2 else 0
        known = version in (0, 1) or (version == 2 and group > 0)
        if not known or 0 in numbers or max(map(abs, numbers)) >= 2**26:  # text looks like that
            raise UsageError(f"{path}: not a model file: neither a .pt file nor llama2.c's .bin")
        names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size")
        args = dict(zip(names, (*numbers[:5], abs(numbers[5])), strict=True))
        args |= {"max_seq_len": numbers[6], "tie_word_embeddings": tied}
        config = _config(path, args)
        _check_llama2c_size(path, config, start=start, group=group)
        shapes = parameter_shapes(config)
        shapes["freqs_cos"] = shapes["freqs_sin"] = (config.max_seq_len, config.head_dim // 2)
        file.seek(start)
        weights = {
            name: _read_tensor(file, shapes[name], group)
            for name in llama2c_order(config.n_layers, version=version, tied=tied)
        }
    weights.pop("freqs_cos", None), weights.pop("freqs_sin", None)  # made anew here
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    return _build(path, config, weights, None)


def _check_llama2c_size(path: Path, config: LlamaConfig, *, start: int, group: int) -> None:
    """Refuse a .bin file that is not exactly as long as its header asks, before reading on."""

    def size(*shape: int) -> int:
        count = math.prod(shape)
        return count + 4 * (count // group) if group and len(shape) == 2 else 4 * count

    layer = sum(size(*shape) for shape in layer_shapes(config).values())
    tables = size(config.vocab_size, config.dim) * (1 if config.tie_word_embeddings else 2)
    rotary = size(config.max_seq_len, config.head_dim) if start == 28 else 0  # version 0 only
    want = start + config.n_layers * layer + tables + size(config.dim) + rotary
    if path.stat().st_size != want:
        raise UsageError(
            f"{path}: {path.stat().st_size:,} bytes where a llama2.c file with this header has "
            f"{want:,}: it is cut off or no model file"
        )


def _read_tensor(file: BinaryIO, shape: tuple[int, ...], group: int) -> Tensor:
    count = math.prod(shape)
    if not group or len(shape) == 1:
        return torch.from_numpy(np.fromfile(file, "<f4", count)).view(shape)
    quantized = torch.from_numpy(np.fromfile(file, "i1", count)).view(-1, group)
    scales = torch.from_numpy(np.fromfile(file, "<f4", count // group))
    return (quantized * scales[:, None]).view(shape)


def hugging_face_name(name: str) -> str:
    """What `transformers` calls our tensor of this name."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{HUGGING_FACE_NAMES[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{HUGGING_FACE_NAMES[part]}.weight"


def to_half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key matrix as `transformers` turns them: number i with i + D/2."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_adjacent_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of to_half_split: number 2i is turned with 2i + 1."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: no {path.name} in this folder") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a JSON object was expected")
    return content


def _hugging_face_config(path: Path) -> LlamaConfig:
    file, theirs = path / "config.json", _read_json(path / "config.json")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    theta = rope.get("rope_theta", theirs.get("rope_theta", 10000.0))
    heads = theirs.get("num_attention_heads")
    asked = {  # what would compute something else than Llama here does, and what it must be
        "model_type": (theirs.get("model_type"), "llama"),
        "hidden_act": (theirs.get("hidden_act", "silu"), "silu"),
        "attention_bias": (theirs.get("attention_bias", False), False),
        "mlp_bias": (theirs.get("mlp_bias", False), False),
        "quantization_config": (theirs.get("quantization_config"), None),
        "rope_scaling": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    for key, (value, must_be) in asked.items():
        if value != must_be:
            raise UsageError(f"{file}: {key} {value!r} is not supported, only {must_be!r}")
    args = {
        "vocab_size": theirs.get("vocab_size"),
        "dim": theirs.get("hidden_size"),
        "n_layers": theirs.get("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": theirs.get("num_key_value_heads"),
        "hidden_dim": theirs.get("intermediate_size"),
        "max_seq_len": theirs.get("max_position_embeddings", 2048),
        "layer_norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "tie_word_embeddings": theirs.get("tie_word_embeddings", False),
    }
    config = _config(file, args)
    if theirs.get("head_dim") not in (None, config.head_dim):
        raise UsageError(
            f"{file}: head_dim {theirs['head_dim']} is not supported, only hidden_size / "
            f"num_attention_heads = {config.head_dim}"
        )
    return config


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder as they are stored, from one file or from shards.

    Raises UsageError for a missing or damaged file, and where `safetensors` is not installed.
    """
    if (folder / "state.pt").is_file():
        raise UsageError(
            f"{folder}: is a sharded checkpoint, which a resumed run reads, of one process too: "
            f"--resume {folder} goes on to an ordinary final-model.pt"
        )
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UsageError(f"{folder}: reading it needs `pip install safetensors`") from None
    files = ["model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file():
        shards = _read_json(folder / "model.safetensors.index.json").get("weight_map", {})
        files = sorted({Path(str(name)).name for name in shards.values()})
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise UsageError(f"{folder}: no {name} in this folder") from None
        except Exception as error:  # safetensors' own class, or what the damage happens to hit
            raise UsageError(f"{folder / name}: damaged: {error}") from None
    return tensors


def _read_hugging_face(path: Path) -> Llama:
    config = _hugging_face_config(path)
    ours = {hugging_face_name(name): name for name in parameter_shapes(config)}
    weights = {ours.get(name, name): tensor for name, tensor in read_safetensors(path).items()}
    weights = {key: w for key, w in weights.items() if not key.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "tok_embeddings.weight" in weights:
        weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    vocabulary = path / "tokenizer.model"
    vocabulary = vocabulary.read_bytes() if vocabulary.is_file() else None
    model = _build(path, config, weights, vocabulary, spell=hugging_face_name)
    with torch.no_grad():
        for layer in model.layers:
            query, key = layer.attention.compute_query, layer.attention.compute_key
            query.weight.copy_(to_adjacent_pairs(query.weight, config.n_heads))
            key.weight.copy_(to_adjacent_pairs(key.weight, config.n_kv_heads))
    return model


def _config(path: Path, args: dict[str, Any]) -> LlamaConfig:
    """The shape a file asks for; UsageError, naming the file, for one no Llama can have."""
    try:
        config = LlamaConfig.from_model_args(args)
        numbers = (config.hidden_dim, config.dropout, config.layer_norm_eps, config.rope_theta)
        sound = (
            all(isinstance(n, int | float) and n >= 0 for n in numbers) and config.hidden_dim > 0
        )
    except (TypeError, ValueError) as error:  # UsageError is a ValueError
        raise UsageError(f"{path}: its shape is none a Llama can have: {error}") from None
    if not sound or config.max_seq_len * config.head_dim > 2**32:
        raise UsageError(f"{path}: its shape is none a Llama can have: {args}")
    return config


def _build(
    path: Path,
    config: LlamaConfig,
    weights: dict[str, Tensor],
    vocabulary: bytes | None,
    *,
    spell: Callable[[str], str] = str,
) -> Llama:
    """A Llama of exactly these tensors; UsageError, naming file and tensor, if they do not fit."""
    if config.n_layers > len(weights):
        raise UsageError(f"{path}: {len(weights)} tensors cannot be {config.n_layers} layers")
    shapes = parameter_shapes(config)
    missing = [spell(name) for name in shapes if name not in weights]
    surplus = [name for name in weights if name not in shapes]
    for what, names in (("missing", missing), ("not of a Llama of this shape", surplus)):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(f"{path}: tensor {names[0]}{others} {what}")
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            got = f"{tuple(tensor.shape)} where its config asks for {shape}"
            raise UsageError(f"{path}: tensor {spell(name)} has the shape {got}")
        if not tensor.is_floating_point():
            raise UsageError(f"{path}: tensor {spell(name)} holds {tensor.dtype}, not real numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UsageError(f"{path}: tensor {spell(name)} is larger than what the file holds")
    embedding, head = weights["tok_embeddings.weight"], weights["output.weight"]
    if config.tie_word_embeddings and not torch.equal(embedding, head):
        raise UsageError(f"{path}: says that embedding and output are tied, but they differ")
    with torch.device("meta"):  # no time and no random numbers for weights that are replaced
        model = Llama(config)
    state = {name: weights[name].to(torch.float32, copy=True) for name in shapes}
    model.load_state_dict(state, assign=True)
    model._settle()
    model.vocabulary = vocabulary
    return model.eval()
