"""Weights packed for generation: fewer and longer matrix products, over fewer bytes.

A packed model computes what the plain one does, up to the rounding of the dtype that its weights
are stored in; it can be neither trained nor saved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Attention, FeedForward, Llama
from minllama.model.kernels import rotate

# Private operators of torch, which read a CPU's memory faster than the public ones. Those of oneDNN
# may be just names, as on Apple's computers; they want the matrix in an order of their own.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
REORDERED_FOR = 16  # rows; measured from 1 to 64, the order for 16 was as good as any
INT8_WIDTH = 16  # a row's length must be a multiple of it: else the kernel reads out of bounds
FEW_ROWS = range(2, 9)  # on a CPU, in float32, weight @ x.T is fastest for these

# ---------------------------------------------------------------------------- products


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by oneDNN, of a weight in any order."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# For the compiler, which knows no order but the plain one; called eagerly it takes 5 us longer.
onednn_operator = torch.library.custom_op("minllama::linear", onednn_product, mutates_args=())


@onednn_operator.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class PackedLinear(nn.Module):
    """A linear layer for generation, its weight (out, in) stored as float32, bfloat16 or int8.

    int8 has a scale for each output, its largest weight / 127. The bias, if there is one, and
    results are float32.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        super().__init__()
        weight, scale, ones = weight.detach(), None, None
        if dtype == torch.int8:
            scale = weight.abs().amax(1).clamp(min=1e-12) / 127
            ones = scale.new_ones(len(scale), dtype=torch.bfloat16)  # what the kernel scales by
            weight = (weight / scale[:, None]).round()
        self.register_buffer("weight", weight.to(dtype).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("ones", ones)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.reordered = False

    def reorder(self) -> None:
        """Put the weight, on a CPU, in oneDNN's order, which oneDNN alone reads."""
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, REORDERED_FOR)
        self.reordered = True

    def forward(self, x: Tensor) -> Tensor:
        rows, weight, on_cpu = x.flatten(0, -2), self.weight, x.device.type == "cpu"
        in_int8, compiling = self.scale is not None, torch.compiler.is_compiling()
        in_float32 = on_cpu and weight.dtype == torch.float32
        if self.reordered:
            multiply = onednn_operator if compiling else onednn_product
            product = multiply(rows.to(weight.dtype), weight)
        elif compiling and len(rows) == 1:
            # One loop, which reads the weight as it is stored at memory's full speed.
            product = (weight.float() * rows).sum(-1)
        elif in_int8 and (not on_cpu or weight.shape[1] % INT8_WIDTH):
            product = F.linear(rows, weight.to(x.dtype))
        elif in_int8:
            # Fast with bfloat16 alone.
            product = torch._weight_int8pack_mm(rows.bfloat16(), weight, self.ones)
        elif in_float32 and len(rows) in FEW_ROWS:
            product = (weight @ rows.t()).t().contiguous()
        elif in_float32 and ONEDNN and not compiling:
            product = onednn_product(rows, weight)
        else:
            product = F.linear(rows.to(weight.dtype), weight)
        product = product.float().view(*x.shape[:-1], -1)
        product = product * self.scale if in_int8 else product
        return product if self.bias is None else product + self.bias


# ---------------------------------------------------------------------------- parts of the Llama


class PackedEmbedding(nn.Module):
    """The rows of a packed matrix, which the output head may share."""

    def __init__(self, table: PackedLinear) -> None:
        super().__init__()
        self.weight, self.scale = table.weight, table.scale

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.weight[tokens].float()
        return rows if self.scale is None else rows * self.scale[tokens, None]


class PackedAttention(Attention):
    """Attention whose query, key and value come from one product."""

    def __init__(self, plain: Attention, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # not Attention's, which makes the matrices that are packed here
        self.layer_id, self.head_dim = plain.layer_id, plain.head_dim
        self.n_heads, self.n_kv_heads = plain.n_heads, plain.n_kv_heads
        self.compute_heads = pack(
            dtype, plain.compute_query, plain.compute_key, plain.compute_value
        )
        self.compute_output = pack(dtype, plain.compute_output)
        self.query_norm, self.key_norm = plain.query_norm, plain.key_norm
        self.dropout = plain.dropout

    def heads(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.compute_heads(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 H_kv, D)
        turned, value = heads.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), 2)
        if not isinstance(self.query_norm, nn.Identity):
            query, key = turned.split((self.n_heads, self.n_kv_heads), 2)
            turned = torch.cat((self.query_norm(query), self.key_norm(key)), 2)
        query, key = rotate(turned, table).split((self.n_heads, self.n_kv_heads), 2)
        return query, key, value


class PackedFeedForward(FeedForward):
    """A feed-forward layer whose gate and up come from one product."""

    def __init__(self, plain: FeedForward, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.w1_w3, self.w2 = pack(dtype, plain.w1, plain.w3), pack(dtype, plain.w2)
        self.dropout = plain.dropout

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1_w3(x).chunk(2, -1)  # (B, T, hidden_dim)
        return self.dropout(self.w2(F.silu(gate) * up))


# ---------------------------------------------------------------------------- the whole


def pack(dtype: torch.dtype, *linears: nn.Linear | nn.Embedding) -> PackedLinear:
    """The matrices of layers that read the same input as one, (sum of outputs, in)."""
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears if getattr(linear, "bias", None) is not None]
    bias = torch.cat(biases) if biases else None  # of all of them, or of none
    return PackedLinear(torch.cat(weights) if len(weights) > 1 else weights[0], dtype, bias)


def pack_weights(
    model: Llama, dtype: torch.dtype = torch.float32, *, rows: int = 1, compiled: bool = False
) -> None:
    """Store every matrix of a Llama for generation, in float32, bfloat16 or int8; irreversible.

    Decoding multiplies matrices by few rows, which memory's bandwidth bounds: fewer bytes are
    faster. Matrices that multiply the same input become one, for fewer and longer products. Where
    `rows` texts at once, in a compiled step or not, are faster with oneDNN's own order of a matrix,
    it has that, and a tied embedding is stored beside the head.
    """
    for layer in model.layers:
        layer.attention = PackedAttention(layer.attention, dtype)
        layer.feed_forward = PackedFeedForward(layer.feed_forward, dtype)
    model.output = pack(dtype, model.output)
    tied = model.config.tie_word_embeddings
    table = model.output if tied else pack(dtype, model.tok_embeddings)
    model.tok_embeddings = PackedEmbedding(table)
    if model.rotary.is_cpu and reordering_pays(dtype, rows, compiled):
        for part in model.modules():
            if isinstance(part, PackedLinear):
                part.reorder()


def reordering_pays(dtype: torch.dtype, rows: int, compiled: bool) -> bool:
    """Whether a CPU decodes so many rows faster from matrices in oneDNN's order."""
    if not ONEDNN or dtype == torch.int8:
        return False
    if dtype == torch.float32:
        return rows > FEW_ROWS[-1]
    # A compiled step of one row reads a plain matrix at memory's full speed.
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not (compiled and rows == 1)
