"""The Llama: its layers, its loss, the whole model, and the classifiers on top of it.

Knows tensors and token ids, never text: a vocabulary is for it a string of bytes that travels with
the weights. Knows nothing of optimizers, data sets or command lines, picks no device and prints
nothing. How a formula is computed fast on a CPU or a GPU is in `minllama.model`.

The architecture is Llama 2's (arXiv:2307.09288): a decoder-only transformer (arXiv:1706.03762) with
RMSNorm before each branch, rotary positions, SwiGLU, and grouped-query attention. Its relatives
have slower positions (Llama 3), biases (Qwen2) or two more norms (Qwen3), as `LlamaConfig` says.

Shapes, here and in `minllama.model`: B rows (batch), T tokens, D numbers per head, H query heads,
H_kv key/value heads, V vocabulary, S places in the cache; `dim`, mostly H x D, is the width of the
residual stream.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import LlamaConfig, fingerprint
from minllama.formats.model_file import read_model
from minllama.formats.stored_model import StoredModel
from minllama.model.generation import Cache, KVCache, Sampling, generate_tokens
from minllama.model.kernels import (
    Dropout,
    attend,
    compute_dtype,
    document_masks,
    document_starts,
    linear_cross_entropy,
    rms_norm,
    rotate,
    to_residual_dtype,
)
from minllama.model.shape import RopeScaling
from minllama.system.errors import UsageError
from minllama.text.chat import Template

# ---------------------------------------------------------------------------- parts


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467).

    Unlike LayerNorm it subtracts no mean and has no bias.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # In float32 whatever x is: squares overflow float16, and bfloat16's 8 bits lose their sum.
        return rms_norm(x, self.weight, self.eps)


def rotary_table(
    head_dim: int, max_seq_len: int, theta: float = 10000.0, scaling: RopeScaling | None = None
) -> Tensor:
    """Cosine and sine of every position's angles, (max_seq_len, 1, D / 2, 2) in float32.

    Position t turns pair i by t / theta^(2i / D): the first pairs fast, which tells neighbours
    apart, the last ones so slowly that distant positions still differ. `scaling` slows them down,
    so that no angle is new to a model that reads more tokens than it was first trained on.
    """
    # Always on the CPU: the same numbers on every device.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    positions = torch.arange(max_seq_len, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta**exponents  # (D / 2)
    if scaling is not None:
        divisors = [scaling.divisor(frequency) for frequency in frequencies.tolist()]
        frequencies = frequencies / torch.tensor(divisors, device="cpu")
    angles = torch.outer(positions, frequencies)  # (max_seq_len, D / 2)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)[:, None]


def apply_rotary_emb(
    query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Rotary position embeddings (arXiv:2104.09864) of query and key, each (B, T, H, D).

    Row t of T is taken as position t, which is at most max_seq_len - 1.
    """
    # Adjacent numbers are a pair, as in the paper and in Meta's weights. Hugging Face pairs number
    # i with i + D/2: its checkpoints have the rows of these projections in another order.
    table = rotary_table(head_dim, max_seq_len, theta)[: query.shape[1]].to(query.device)
    return rotate(query, table), rotate(key, table)


class Attention(nn.Module):
    """Causal self-attention: softmax(q k^T / sqrt(D)) v over the tokens up to each one's own.

    Each of the H_kv key/value heads serves H / H_kv query heads (arXiv:2305.13245), which makes
    the cache of generation smaller by that factor.
    """

    def __init__(self, layer_id: int, config: LlamaConfig) -> None:
        super().__init__()
        self.layer_id = layer_id  # the cache's entry for this layer
        self.head_dim = config.head_dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        bias = config.attention_bias
        self.compute_query = nn.Linear(config.dim, config.query_dim, bias=bias)
        self.compute_key = nn.Linear(config.dim, config.kv_dim, bias=bias)
        self.compute_value = nn.Linear(config.dim, config.kv_dim, bias=bias)
        self.compute_output = nn.Linear(config.query_dim, config.dim, bias=False)
        # Of normalised queries and keys no product can grow large (arXiv:2302.05442).
        self.query_norm, self.key_norm = (
            RMSNorm(config.head_dim, config.layer_norm_eps) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.dropout = Dropout(config.dropout)

    def heads(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, T, H, D) and key, both rotated, and value (B, T, H_kv, D) of x (B, T, dim)."""
        split = (-1, self.head_dim)
        query = self.compute_query(x).unflatten(-1, split)  # (B, T, H, D)
        key = self.compute_key(x).unflatten(-1, split)  # (B, T, H_kv, D)
        value = self.compute_value(x).unflatten(-1, split)  # (B, T, H_kv, D)
        query, key = self.query_norm(query), self.key_norm(key)
        # Rotated by their positions, so q k^T depends on their distance alone. Values are what is
        # summed up, not compared: they stay as they are.
        return rotate(query, table), rotate(key, table), value

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        cache: Cache | None = None,
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        query, key, value = self.heads(x, table)
        if cache is not None:  # generation: also the keys and values of earlier tokens
            key, value = cache.update(self.layer_id, key, value)  # (B, S, H_kv, D)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        if cache is None:
            attended = attend(query, key, value, masks)  # (B, H, T, D)
        else:
            attended = cache.attend(query, key, value)  # (B, H, T, D)
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, H x D): the heads side by side
        return self.dropout(self.compute_output(attended))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # Three matrices where a plain MLP has two: hidden_dim is 2/3 of 4 x dim to make up for it.
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # gate
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)  # down
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)  # up
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w3(x)  # (B, T, hidden_dim)
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
        cache: Cache | None = None,
        masks: Sequence[Tensor] | None = None,
    ) -> Tensor:
        # Pre-norm: nothing but sums stands on the way from the last layer to the first, so that
        # gradients arrive undiminished and deep models train stably (arXiv:2002.04745).
        x = x + self.attention(self.attention_norm(x), table, cache, masks)
        return x + self.feed_forward(self.ffn_norm(x))


# ---------------------------------------------------------------------------- the whole


class Llama(nn.Module):
    """Token ids in, logits out.

    `vocabulary` are the bytes of the vocabulary of the ids, if known, and `chat_template` how
    dialogues were written that it was trained on, if any: they travel with the weights.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary: bytes | None = None
        self.chat_template: Template | None = None
        self.activation_checkpointing = False  # recompute each layer in backward: memory for time
        device = torch.get_default_device()
        with torch.device("meta"):  # neither memory nor random numbers for what torch would draw
            # nn.Embedding alone would draw weights, for which torch imports its compiler.
            no_weights = torch.empty(config.vocab_size, config.dim)
            self.tok_embeddings = nn.Embedding.from_pretrained(no_weights, freeze=False)
            self.dropout = Dropout(config.dropout)
            self.layers = nn.ModuleList(LlamaLayer(i, config) for i in range(config.n_layers))
            self.norm = RMSNorm(config.dim, config.layer_norm_eps)
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        # Computed from the config, so it is in no weights file.
        self.register_buffer("rotary", torch.empty(0), persistent=False)
        self.tie_weights()
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(self)

    def init_weights(self, part: nn.Module) -> None:
        """Draw a part's weights as GPT-2: normal 0.02, less where 2 n_layers branches add up."""
        for name, parameter in part.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:  # the gains of norms
                nn.init.ones_(parameter)
            else:
                # These two matrices end the branches that each layer adds to the residual stream.
                # The variances of 2 n_layers terms add up: divided by the root of their number,
                # the stream is as large after many layers as after few.
                ends_branch = name.endswith(("compute_output.weight", "w2.weight"))
                scale = math.sqrt(2 * self.config.n_layers) if ends_branch else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def materialized_layers(self) -> Iterator[LlamaLayer]:
        """The layers. Those of a model on meta get memory and weights as they are reached, and what
        is around them before and after: where each is sharded at once, no rank has the whole.

        The weights are those that the same generator draws for a model that is whole.
        """
        parts = [self.tok_embeddings, *self.layers, self.norm]
        if not self.config.tie_word_embeddings:
            parts.append(self.output)
        for part in parts:
            if next(part.parameters()).is_meta:
                self.init_weights(part.to_empty(device="cpu"))
            if isinstance(part, LlamaLayer):
                yield part
        self.tie_weights()

    def tie_weights(self) -> None:
        """Tie the head to the embedding, and make the rotary table on their device."""
        config = self.config
        if config.tie_word_embeddings:
            # A token's vector as input and as output mean the same, and the table is most of a
            # small model: sharing it saves V x dim parameters and learns better (arXiv:1608.05859).
            self.output.weight = self.tok_embeddings.weight
        shape = (config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)
        table = rotary_table(*shape)
        self.rotary = table.to(self.tok_embeddings.weight.device)  # (max_seq_len, 1, D/2, 2)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Llama:
        """Give the weights memory on a device, with nothing in it. torch's own imports sympy."""
        return self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), recurse)

    def _apply(self, fn: Any, recurse: bool = True) -> Llama:
        # torch calls this for .to(), .cuda(), .to_empty() and their like. The table must stay
        # float32 in a bfloat16 model, whose 8 bits do not tell neighbouring positions apart.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def hidden_states(
        self, tokens: Tensor, cache: Cache | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """The normalised states (B, T, dim) after each of tokens (B, T).

        With `starts` of `document_starts` each document is read as if it stood alone. Raises
        UsageError for more tokens than max_seq_len.
        """
        width, masks = tokens.shape[1], None
        if width > self.config.max_seq_len:
            raise UsageError(f"{width} tokens do not fit max_seq_len {self.config.max_seq_len}")
        if starts is not None:  # several documents in a row: positions count from each one's start
            positions = torch.arange(width, device=tokens.device) - starts  # (B, T)
            masks = document_masks(starts, compute_dtype(self.tok_embeddings.weight))
        elif cache is not None:
            positions = cache.place(width, tokens.device)
            if isinstance(positions, Tensor):  # what is past the last one is padding, never read
                positions = positions.clamp(max=self.config.max_seq_len - 1)
        else:
            positions = slice(width)
        table = self.rotary[positions]  # (T or B, T; 1, D/2, 2)
        x = to_residual_dtype(self.dropout(self.tok_embeddings(tokens)))  # (B, T, dim)
        for layer in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, table, None, masks, use_reentrant=False)
            else:
                x = layer(x, table, cache, masks)
        return self.norm(x)  # the stream has grown layer by layer: the head reads it normalised

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and hidden states (B, T, dim) of tokens (B, T).

        Logits are (B, 1, V), of the last position, or with targets given (B, T, V).
        """
        hidden = self.hidden_states(tokens)
        return self.output(hidden if targets is not None else hidden[:, -1:]), hidden

    def loss(
        self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of cross entropies in nats over the real targets, and their count.

        tokens, targets and `starts`, if documents are to be apart, are (B, T); targets of
        IGNORE_INDEX do not count.
        """
        # Sum and count, not their mean: the caller divides by the targets of all micro-batches and
        # ranks, so that each token weighs the same wherever it falls.
        hidden = self.hidden_states(tokens, starts=starts).flatten(0, 1)  # (B T, dim)
        return linear_cross_entropy(hidden, self.output.weight, targets.flatten())

    def extend(self, cache: KVCache, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read the next tokens of each row into the cache; rows may differ in how many they are.

        Returns the hidden states (B, T, dim) after them, T the longest row's; what is beyond a
        row's own tokens is meaningless.
        """
        width = max(map(len, rows))
        padded = [[*row, *[0] * (width - len(row))] for row in rows]
        hidden = self.hidden_states(torch.tensor(padded, device=self.rotary.device), cache)
        # Padding went into the cache, too. Lengths count real tokens alone, so no mask shows it,
        # and the row's next tokens overwrite it.
        cache.lengths = [n + len(row) for n, row in zip(cache.lengths, rows, strict=True)]
        return hidden

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


class NextTokenLoss(nn.Module):
    """Llama.loss as a module's forward, which DDP, FSDP2 and torch.compile can wrap.

    With a `bos_id`, the token that starts each document, attention stays inside the documents.
    """

    def __init__(self, model: Llama, bos_id: int | None = None) -> None:
        super().__init__()
        self.model, self.bos_id = model, bos_id

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        starts = None if self.bos_id is None else document_starts(tokens, self.bos_id)
        return self.model.loss(tokens, targets, starts)


# ---------------------------------------------------------------------------- classifiers


class LlamaEmbeddingClassifier(nn.Module):
    """A linear head over a sentence's hidden states.

    `pooling` is "last", the state after the last real token, or "mean", the mean of those after
    all real tokens.
    """

    def __init__(
        self,
        llama: Llama,
        *,
        num_labels: int,
        hidden_dropout_prob: float = 0.3,
        freeze_backbone: bool = False,
        pooling: str = "last",
    ) -> None:
        super().__init__()
        self.llama, self.pooling = llama, pooling
        self.dropout = Dropout(hidden_dropout_prob)
        self.classifier_head = nn.Linear(llama.config.dim, num_labels)
        if freeze_backbone:
            llama.requires_grad_(False)
        elif not llama.config.tie_word_embeddings:
            llama.output.requires_grad_(False)  # it predicts tokens and takes no part here

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Log-probabilities (B, num_labels) of right-padded tokens (B, T) with lengths (B,).

        Padding is never read: a row's result does not depend on the others of its batch.
        """
        pooled = self._pool(self.llama.hidden_states(tokens), lengths)
        return F.log_softmax(self.classifier_head(self.dropout(pooled)).float(), dim=-1)

    def _pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """One state (B, dim) a row from hidden (B, T, dim)."""
        # Padding is on the right, and attention causal: no state of a real token has seen it. What
        # is real follows from the lengths, never from ids: every id is some text's real token.
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        padding = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]  # (B, T)
        summed = hidden.masked_fill(padding[:, :, None], 0).sum(dim=1, dtype=torch.float32)
        return (summed / lengths[:, None]).to(hidden.dtype)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens at their start all sequences share."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


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
        # Of each prompt the cache keeps what its labels share, but for the last of these tokens:
        # that is read with each label, since its state predicts the label's first token.
        kept = [min(pair) - 1 for pair in zip(common, starts, strict=True)]
        ends = [max(map(len, labels)) - 1 for labels in sequences]
        room = max(end - n for end, n in zip(ends, kept, strict=True))
        prompts = [labels[0][:n] for labels, n in zip(sequences, kept, strict=True)]
        cache = self._read_prompts(prompts, room)
        scores = []
        for texts in zip(*sequences, strict=True):  # label by label
            cache.lengths = list(kept)  # forget the label before
            tails = [text[n:-1] for text, n in zip(texts, kept, strict=True)]
            hidden = self.llama.extend(cache, tails)
            scores.append(self._sum_log_probs(hidden, texts, starts, kept))
        counts = torch.tensor([[len(text) for text in labels] for labels in sequences])
        return torch.stack(scores, dim=1), counts - torch.tensor(starts)[:, None]

    def _read_prompts(self, prompts: list[Sequence[int]], room: int) -> KVCache:
        """A cache of the prompts, with room for `room` more tokens each."""
        shared, capacity = common_prefix(prompts), max(map(len, prompts)) + room
        cache = KVCache(self.llama.config.n_layers, 1, capacity)
        if shared:  # instructions and examples: one row reads them for all
            self.llama.extend(cache, [prompts[0][:shared]])
        cache = cache.select([0] * len(prompts))
        if capacity > shared + room:
            self.llama.extend(cache, [prompt[shared:] for prompt in prompts])
        return cache

    def _sum_log_probs(
        self,
        hidden: Tensor,
        texts: Sequence[Sequence[int]],
        starts: Sequence[int],
        kept: Sequence[int],
    ) -> Tensor:
        """Log-probabilities (B,) of text[start:], from hidden states after text[kept:-1]."""
        scored = [(b, i) for b, text in enumerate(texts) for i in range(starts[b], len(text))]
        rows = torch.tensor([b for b, _ in scored], device=hidden.device)
        # The chain rule: token i is predicted by the state after token i - 1, whatever comes later.
        states = hidden[rows, [i - 1 - kept[b] for b, i in scored]]  # (tokens scored, dim)
        targets = torch.tensor([texts[b][i] for b, i in scored], device=hidden.device)[:, None]
        log_probs = [  # of 256 tokens at a time: logits are V wide
            F.log_softmax(self.llama.output(part).float(), dim=-1).gather(1, target)[:, 0]
            for part, target in zip(states.split(256), targets.split(256), strict=True)
        ]
        return log_probs[0].new_zeros(len(texts)).index_add(0, rows, torch.cat(log_probs))


# ---------------------------------------------------------------------------- model files


def load_pretrained(path: str | Path) -> Llama:
    """Read a model, in float32 on the CPU and in eval mode, whatever program wrote it.

    Runs no code from the file. Raises UsageError, naming file and tensor, for anything that is not
    a Llama of one of the formats that `minllama.formats.model_file` lists.
    """
    return build_model(read_model(Path(path)))


def build_model(stored: StoredModel) -> Llama:
    """A stored model in float32 on the CPU and in eval mode; a copy, whatever becomes of the file.

    Its config may have another `max_seq_len` or `dropout` than it was stored with.
    """
    with torch.device("meta"):  # no time and no random numbers for weights that are replaced
        model = Llama(stored.config)
    weights = stored.weights
    state = {name: weights[name].to(torch.float32, copy=True) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()  # assigned one by one, head and embedding are two tensors now
    model.vocabulary, model.chat_template = stored.vocabulary, stored.chat_template
    return model.eval()


def model_payload(
    model: Llama, dtype: torch.dtype = torch.float32, *, state: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """What a weights file holds, for pt_file.save_pt: plain types, and tensors on the CPU.

    `state` replaces model.state_dict() where that is sharded. A tied embedding is one storage
    under two names, so the disk holds it once.
    """
    state = model.state_dict() if state is None else state
    cast: dict[tuple, Tensor] = {}  # by address: what is tied stays tied
    weights = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)  # empty shards all have the address 0
        if place not in cast:
            cast[place] = tensor.detach().to("cpu", dtype).contiguous()
        weights[name] = cast[place]
    payload = {"model": weights, "model_args": model.config.to_model_args()}
    if model.vocabulary is not None:
        payload["vocabulary"] = torch.frombuffer(bytearray(model.vocabulary), dtype=torch.uint8)
        payload["vocabulary_fingerprint"] = fingerprint(model.vocabulary)
    if model.chat_template is not None:
        payload["chat_template"] = model.chat_template.to_stored()
    return payload
