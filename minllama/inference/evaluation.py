"""How likely a model finds texts: bits per byte, and minimal pairs, of which one is right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama import Llama, LlamaZeroShotClassifier, common_prefix
from minllama.cli.console import progress_bar
from minllama.system.errors import UsageError
from minllama.system.peek import first_object, is_json_name
from minllama.system.signals import StopRequest
from minllama.text.documents import read_documents
from minllama.text.encoder import DocumentEncoder
from minllama.text.reading import Reading, read_lines
from minllama.text.records import places, read_records
from minllama.text.stream import TokenStream
from tokenizer import Tokenizer
from utils import PretrainDataset

# ---------------------------------------------------------------------------- bits per byte

BATCH_TOKENS = 1 << 13


def perplexity(loss: float) -> float:
    """That of a loss in nats per token."""
    return math.exp(min(loss, 700.0))  # there is no float beyond e**709


@dataclass(frozen=True)
class TextScore:
    """How well a model predicted a text."""

    loss_sum: float  # in nats, over the tokens that it had to predict
    tokens: int
    utf8_bytes: int  # of the text that these tokens spell; 0: not known

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models of different vocabularies, unlike the loss per token."""
        return self.loss_sum / math.log(2) / max(1, self.utf8_bytes)

    def line(self) -> str:
        """All of it, for the terminal."""
        return (
            f"{self.utf8_bytes:,} bytes in {self.tokens:,} tokens: {self.loss:.4f} nats per token, "
            f"perplexity {perplexity(self.loss):.4f}, {self.bits_per_byte:.4f} bits per byte"
        )

    def metrics(self) -> dict[str, float]:
        """Those of a validation, by the names that a run's metrics have."""
        metrics = {"val_loss": self.loss, "val_perplexity": perplexity(self.loss)}
        return metrics | ({"bits_per_byte": self.bits_per_byte} if self.utf8_bytes else {})


@torch.inference_mode()
def score_text(
    model: Llama, tokenizer: Tokenizer, files: Sequence[Path], reading: Reading
) -> TextScore:
    """Score all documents of the files, as the validation of a pretraining does.

    Each is put between BOS and EOS, and the stream of them cut into chunks of the model's context.
    Raises UsageError for text that cannot be read, or none.
    """
    blocks = (block for path in files for block in read_documents(path, reading))
    arrays = []
    for part in itertools.chain.from_iterable(DocumentEncoder(tokenizer).encode(blocks)):
        arrays += tokenizer.vocabulary.document(part.ids, starts=part.starts, ends=part.ends)
    if not arrays:
        raise UsageError(f"{files[0]}: empty, there is no text to score")
    tokens = np.concatenate(arrays, dtype=np.int32)
    stream = TokenStream(tokens, np.array([0]), np.array([len(tokens)]))
    dataset = PretrainDataset(stream, model.config.max_seq_len, tokenizer=tokenizer)
    batch_size = max(1, BATCH_TOKENS // model.config.max_seq_len)
    loss_sum, targets = 0.0, 0
    starts = range(0, len(dataset), batch_size)
    for first in progress_bar(starts, desc="scoring", leave=False, disable=None):
        batch = dataset.batch(range(first, min(first + batch_size, len(dataset))))
        batch_loss, batch_targets = model.loss(*batch)
        loss_sum, targets = loss_sum + batch_loss.item(), targets + int(batch_targets)
    return TextScore(loss_sum, targets, dataset.utf8_bytes)


# ---------------------------------------------------------------------------- minimal pairs

CATEGORY_FIELDS = ("category", "linguistics_term", "field", "UID")  # the last three are BLiMP's


@dataclass(frozen=True)
class Pair:
    """Two sentences, of which the good one should be the likelier; `where` is file:line."""

    good: str
    bad: str
    category: str
    where: str


def read_pairs(files: Sequence[Path], reading: Reading) -> list[Pair]:
    """The pairs of files: lines `good<TAB>bad`, perhaps `<TAB>category`, or BLiMP's .jsonl.

    Without a category of its own a pair has its file's name. Raises UsageError `file:line: ...`.
    """
    pairs = []
    for path in files:
        if is_json_name(path) or "sentence_good" in first_object(path):
            records, parse = read_records(path, reading), _pair_of_record
        else:
            lines = read_lines(path, reading)
            records, parse = (line for line in lines if line[1].strip()), _tabbed_pair
        place = places(path)
        for number, record in records:
            where = place(number)
            good, bad, category = parse(record, where)
            pairs.append(Pair(good, bad, category or path.name, where))
    if not pairs:
        raise UsageError(f"{files[0]}: empty, there is no pair of sentences")
    return pairs


def _tabbed_pair(line: str, where: str) -> tuple[str, str, str]:
    good, bad, category = ([part.strip() for part in line.split("\t")] + ["", "", ""])[:3]
    if not (good and bad) or line.count("\t") > 2:
        raise UsageError(f"{where}: a line reads `good<TAB>bad` or `good<TAB>bad<TAB>category`")
    return good, bad, category


def _pair_of_record(record: dict[str, Any], where: str) -> tuple[str, str, str]:
    texts = {key: text for key, text in record.items() if isinstance(text, str) and text.strip()}
    if not {"sentence_good", "sentence_bad"} <= texts.keys():
        raise UsageError(f"{where}: lacks a text in sentence_good or sentence_bad, BLiMP's fields")
    category = next((texts[key] for key in CATEGORY_FIELDS if key in texts), "")
    return texts["sentence_good"], texts["sentence_bad"], category


def compare_pairs(
    model: LlamaZeroShotClassifier,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    batch_size: int,
    stop: StopRequest,
) -> np.ndarray:
    """(n,) float64: log P(good) - log P(bad) after BOS, 0 where float32 cannot tell them apart.

    Raises UsageError for a sentence longer than the context, Interrupted when asked to stop.
    """
    context, encoded = model.llama.config.max_seq_len, []
    for pair in pairs:
        both = [tokenizer.encode_opening(text) for text in (pair.good, pair.bad)]
        if max(map(len, both)) > context + 1:
            raise UsageError(
                f"{pair.where}: {max(map(len, both)) - 1:,} tokens, and the model reads {context}"
            )
        encoded.append(both)
    differences = np.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: max(map(len, encoded[i])))
    for first in progress_bar(range(0, len(pairs), batch_size), desc="comparing", disable=None):
        stop.check()
        chosen = order[first : first + batch_size]
        rows = [encoded[i] for i in chosen]
        # The beginning that both sentences of a pair share adds the same to both: not scored.
        starts = [min(common_prefix(row), min(map(len, row)) - 1) for row in rows]
        good, bad = model.score(rows, starts)[0].double().cpu().unbind(dim=1)
        tied = torch.isclose(good, bad, rtol=1e-6, atol=0)
        differences[chosen] = (good - bad).masked_fill(tied, 0)
    return differences


def pair_rows(pairs: Sequence[Pair], differences: np.ndarray) -> Iterator[dict[str, Any]]:
    """A record for each pair; `log_ratio` is log P(good) - log P(bad)."""
    for pair, difference in zip(pairs, differences.tolist(), strict=True):
        yield {
            "good": pair.good,
            "bad": pair.bad,
            "category": pair.category,
            "log_ratio": round(difference, 6),
            "likelier": "good" if difference > 0 else "bad" if difference < 0 else "neither",
            "where": pair.where,
        }


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, from `successes` in n tries (Wilson 1927)."""
    z, share = 1.959964, successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def pair_report(pairs: Sequence[Pair], differences: np.ndarray) -> list[str]:
    """A line for each category, and one for all: the share of pairs whose good one is likelier."""
    categories = np.array([pair.category for pair in pairs])
    names = sorted(set(categories.tolist()))
    rows = [(name, differences[categories == name]) for name in names] if len(names) > 1 else []
    width = max(8, *map(len, names))
    lines = [f"{'category':<{width}}    pairs   ties  good is likelier (95 % interval)"]
    for name, values in [*rows, ("all", differences)]:
        n, ties = len(values), int((values == 0).sum())
        right = (values > 0).sum() + ties / 2  # a tie is half right
        low, high = wilson_interval(right, n)
        share = f"{right / n:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"{name:<{width}} {n:>8,} {ties:>6,}  {share}")
    return lines
