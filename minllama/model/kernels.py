"""The formulas of `llama.py`, each as is fastest on the device at hand.

What a function computes is a line of its docstring; the rest is speed and memory. The letters of
shapes are those of `llama.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE_INDEX


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products of x run in: autocast's where that is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def to_residual_dtype(x: Tensor) -> Tensor:
    """x in the dtype of the residual stream: float32 on a CPU, that of matrix products on a GPU.

    A GPU waits for its memory: this halves the bytes of everything between two products.
    """
    return x.to(compute_dtype(x)) if x.is_cuda else x


class Dropout(nn.Dropout):
    """x / (1 - p), zero at a share p of places, while training.

    torch draws one place after the other on a CPU, which took an eighth of a training step.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape to the same."""
        quick = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (self.training and self.p and quick):
            return super().forward(x)
        kept = torch.rand(x.shape).ge_(self.p)  # 0 or 1
        return x * kept.div_(1 - self.p).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 inside.

    The result is in the dtype of the products that read it, so that it is cast once for them all.
    """
    if x.is_cuda and x.dtype != torch.float32:  # one kernel, which is float32 inside by itself
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(compute_dtype(x))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of x (B, T, H, D) by the angles of table (T or B, T; 1, D/2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, T, H, D/2, 2)
    if not torch.compiler.is_compiling():
        # One complex product: 5-8 times faster than the lines below run op by op on a CPU.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    elif x.is_cuda:  # two thirds of the time of interleaving, which a CPU does three times faster
        cos, sin = table.unbind(-1)
        turned = pairs * cos[..., None] + pairs.flip(-1) * torch.stack((-sin, sin), dim=-1)
    else:  # inductor fuses real arithmetic and has no complex kernels
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


# ---------------------------------------------------------------------------- attention

QUERY_BLOCK = 256  # rows of scores at once: measured best of 64 to 1,024
HAS_AMX = torch.cpu._is_amx_tile_supported()


def max_materialized_len(dtype: torch.dtype) -> int:
    """Tokens of a row up to which training on this CPU keeps attention's scores for backward.

    In bfloat16 that takes a fourth (T 128) to half (T 1,024) of the time of torch's fused kernel,
    which computes them again; for longer rows their memory is worth more. With AMX that kernel is
    the faster one at 1,024. In float32 both take the same time, and the fused one less memory.
    """
    if dtype != torch.bfloat16:
        return 0
    return 512 if HAS_AMX else 1024


def attend(
    query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor] | None = None
) -> Tensor:
    """softmax(query @ key.T / sqrt(D)) @ value over what each token may see, (B, H, T, D).

    query is (B, H, T, D), key and value are (B, H_kv, T, D); `masks` are those of
    `document_masks`, without which each token sees all up to itself.
    """
    trains = query.requires_grad and query.is_cpu
    if trains and query.shape[2] <= max_materialized_len(query.dtype):
        return materialized_attention(query, *repeat_heads(query, key, value), masks)
    if masks is not None:
        return masked_attention(query, key, value, masks)
    return fused_attention(query, key, value, causal=True)


def repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H_kv, T, D) with each head repeated for the queries that it serves."""
    repeats = query.shape[1] // key.shape[1]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """torch's scaled_dot_product_attention, in a kernel that never has all scores in memory.

    `causal`: query t sees keys 0 to t. Of a GPU's kernels only flash shares keys between heads,
    in half precision without a mask; for the others they are repeated, which costs less than the
    plain formula.
    """
    if query.is_cuda and (mask is not None or query.dtype == torch.float32):
        key, value = repeat_heads(query, key, value)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def materialized_attention(
    query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor] | None = None
) -> Tensor:
    """`attend` op by op in blocks of queries: autograd keeps the scores for the backward pass."""
    out: list[Tensor] = []
    for block in (query * query.shape[-1] ** -0.5).split(QUERY_BLOCK, dim=2):
        start = len(out) * QUERY_BLOCK
        end = start + block.shape[2]
        scores = block @ key[:, :, :end].transpose(2, 3)  # (B, H, queries, keys)
        if masks is None:  # above the diagonal, which starts at this block's first query
            mask = scores.new_full(scores.shape[2:], -math.inf).triu(start + 1)
        else:
            mask = masks[len(out)]
        scores += mask
        out.append(torch.softmax(scores, dim=-1) @ value[:, :, :end])
    return torch.cat(out, dim=2)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """`attend` in blocks of queries, so that no block reads what comes after its last query."""
    out = []
    for block, mask in zip(query.split(masks[0].shape[2], dim=2), masks, strict=True):
        end = mask.shape[3]
        out.append(fused_attention(block, key[:, :, :end], value[:, :, :end], mask))
    return torch.cat(out, dim=2)


def document_starts(tokens: Tensor, bos_id: int) -> Tensor:
    """Where in its row the document of each of tokens (B, T) starts, (B, T): at its BOS, or at 0
    for what is left of one that started in an earlier chunk."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(tokens == bos_id, positions, 0).cummax(dim=1).values


def document_masks(starts: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What is added to scores so that each token sees its document up to itself, and no other.

    Of QUERY_BLOCK queries each on a CPU, else of all: (B, 1, queries, keys up to the last one's).
    """
    width, masks = starts.shape[1], []
    positions = torch.arange(width, device=starts.device)
    rows = QUERY_BLOCK if starts.is_cpu else width
    for first in range(0, width, rows):
        query, key = positions[first : first + rows, None], positions[: first + rows]
        seen = (key <= query) & (key >= starts[:, first : first + rows, None])  # (B, queries, keys)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        masks.append(mask.masked_fill(~seen, -math.inf)[:, None])
    return masks


# ---------------------------------------------------------------------------- loss

# Bytes of float32 logits in memory at once, by device. On a CPU chunks near the size of its cache
# are fastest; on a GPU the weight's gradient is read and written once a chunk, so fewer are faster.
LOGITS_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29, "mps": 2**28}
SMALLEST_PROBABILITY = torch.finfo(torch.float32).tiny  # what is below counts as this: 87 nats


def chunk_rows_for(device: str, vocabulary: int) -> int:
    """Rows whose logits are in memory at once."""
    rows = LOGITS_CHUNK_BYTES[device] // (4 * vocabulary)
    return max(16, min(512, rows)) if device == "cpu" else max(256, rows)


@functools.cache
def sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of `dtype` can be added to a float32 matrix as it is computed."""
    try:
        total, part = torch.zeros(16, 16, device=device), torch.ones(16, 16, device=device)
        torch.addmm(total, part.to(dtype), part.to(dtype), out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):  # no such kernel: on a CPU, or of an older torch
        return False
    return bool((total == 16).all())


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for a float32 total of any size, in place."""
    compiling = torch.compiler.is_compiling()
    if not compiling and total.is_cuda and sums_in_float32(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of hidden @ weight.T, with gradients computed in the forward pass.

    A chunk of rows at a time: its logits serve loss and gradients and are overwritten, so the
    (N, V) tensor that dominates a small model's memory never exists. Logits and matrix products are
    in `dtype`, softmax and the weight gradient's sum over chunks in float32. Float16 needs no scale
    in here: softmax minus one-hot lies in [-1, 1] (what is below 6e-8 is lost, together less than a
    thousandth of a row), the products stay far from 65504, and a GradScaler's factor comes later,
    as grad_output, onto float32.
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
            real = (target != IGNORE_INDEX).float()  # (n, 1): 0 where a row has no target
            target = target.clamp(min=0)
            chunk_logits, chunk_probs = logits[: rows.shape[0]], probs[: rows.shape[0]]
            torch.mm(rows, weight_cast.t(), out=chunk_logits)
            chunk_probs.copy_(chunk_logits)
            torch.softmax(chunk_probs, -1, out=chunk_probs)
            target_probs = chunk_probs.gather(1, target).clamp_(min=SMALLEST_PROBABILITY)
            loss_sum = loss_sum - (target_probs.log_() * real).sum()
            if not any(wanted):
                continue
            # The gradient of cross entropy with respect to logits: softmax minus one-hot.
            chunk_probs.scatter_add_(1, target, -torch.ones_like(real))
            grad_logits = chunk_logits.copy_(chunk_probs)  # (n, V)
            if wanted[0]:
                grad_hidden[start : start + chunk_rows] = (grad_logits @ weight_cast).float() * real
            if wanted[1]:  # rows without a target are zeroed here, where they are narrow
                add_product(grad_weight, grad_logits.t(), rows * real.to(dtype))
        ctx.grads = grad_hidden, grad_weight
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return loss_sum

    @staticmethod
    def backward(ctx, grad_output):
        stored, ctx.grads = ctx.grads, None  # for one pass: they are scaled in place
        grads = (
            None if grad is None else grad.mul_(grad_output).to(dtype)
            for grad, dtype in zip(stored, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the logits hidden @ weight.T, which are never whole in memory.

    hidden (N, dim), weight (V, dim), targets (N,). Returns the sum in nats over the targets that
    are not IGNORE_INDEX, and their count. Computed in autocast's dtype where that is on, else in
    hidden's.
    """
    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad)
    chunk_rows = chunk_rows_for(hidden.device.type, weight.shape[0])
    loss_sum = _LinearCrossEntropy.apply(
        hidden, weight, targets, compute_dtype(hidden), chunk_rows, wanted
    )
    return loss_sum, (targets != IGNORE_INDEX).sum()
