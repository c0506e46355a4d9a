"""Labelled data: `label ||| sentence` files, scores of predictions, and predictions written.

Knows nothing of vocabularies or models: predictions come as numbers.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minllama.system.errors import UsageError
from minllama.system.files import replace, write_text
from minllama.text.reading import Reading, read_lines, split_labelled

UNLABELLED = -1  # the label of a sentence without one, in files and in batches
NEARLY_ALL = 0.9  # of a split's predictions: so many alike say little of the model
MAX_LABELS = 1000  # without names; each gets a row of the classifier's head


# ---------------------------------------------------------------------------- files


@dataclass(frozen=True)
class LabelledExample:
    """A sentence as written, and its label; None where the file has none."""

    label: int | None
    sentence: str


def read_labelled(
    path: Path,
    *,
    n_labels: int | None = None,
    encoding: str = "utf-8",
    plain: bool = False,
) -> list[LabelledExample]:
    """The lines `label ||| sentence` of a file, in order; blank lines are left out.

    A label of -1, or none, means unlabelled. `plain` takes a file without any ` ||| `, too: each
    line is a sentence. Raises UsageError `file:line: ...` for anything else that is not a whole
    number from 0 (below `n_labels`, else MAX_LABELS), and for an empty file.
    """
    lines = [
        (number, line)
        for number, line in read_lines(path, Reading(encoding=encoding))
        if line.strip()
    ]
    if plain and not any("|||" in line for _, line in lines):
        examples = [LabelledExample(None, line.strip()) for _, line in lines]
    else:
        examples = [
            LabelledExample(_parse_label(label, f"{path}:{number}", n_labels), sentence)
            for number, line in lines
            for label, sentence in [split_labelled(path, number, line)]
        ]
    if not examples:
        raise UsageError(f"{path}: empty, there is no line `label ||| sentence`")
    return examples


def _parse_label(text: str, where: str, n_labels: int | None) -> int | None:
    if text in ("", str(UNLABELLED)):
        return None
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise UsageError(f"{where}: label {text!r} is not a whole number")
    label, last = int(text), (n_labels or MAX_LABELS) - 1
    if not 0 <= label <= last:
        raise UsageError(
            f"{where}: label {label} is not one of 0 to {last} (-1 for unlabelled); do the label "
            "names belong to this file?"
        )
    return label


def labels_of(examples: Sequence[LabelledExample]) -> list[int | None]:
    """The label of each example."""
    return [example.label for example in examples]


def is_unlabelled(examples: Sequence[LabelledExample]) -> bool:
    """Whether no sentence has a label."""
    return all(example.label is None for example in examples)


def has_placeholder_labels(examples: Sequence[LabelledExample]) -> bool:
    """Whether a test file's labels mean nothing: none, or one and the same on every line.

    CFIMDB's test file has 0 on all lines; an accuracy against it means nothing.
    """
    labels = labels_of(examples)
    return is_unlabelled(examples) or (len(labels) > 1 and len(set(labels)) == 1)


# ---------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scores:
    """How predictions compare with labels. `confusion[label][prediction]` counts sentences."""

    confusion: np.ndarray  # (n_labels, n_labels) int64

    @classmethod
    def of(cls, labels: Sequence[int | None], predictions: Sequence[int], n: int) -> Scores:
        """Count the pairs; sentences without a label are left out."""
        confusion = np.zeros((n, n), np.int64)
        for label, prediction in zip(labels, predictions, strict=True):
            if label is not None:
                confusion[label, prediction] += 1
        return cls(confusion)

    @property
    def accuracy(self) -> float:
        """Share of sentences whose label was predicted."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def majority(self) -> float:
        """Accuracy of always predicting the most frequent label."""
        return float(self.confusion.sum(axis=1).max() / max(1, self.confusion.sum()))

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the labels that occur, in truth or in predictions."""
        hits = np.diag(self.confusion)
        occurrences = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        occurs = occurrences > 0
        return float(np.mean(2 * hits[occurs] / occurrences[occurs])) if occurs.any() else 0.0

    def lines(self, names: Sequence[str]) -> list[str]:
        """The confusion matrix as a table: a row per label, a column per prediction."""
        width = max(7, *(len(name) + 2 for name in names))
        head = "label \\ predicted".ljust(18) + "".join(name.rjust(width) for name in names)
        rows = [
            name.ljust(18) + "".join(str(count).rjust(width) for count in row)
            for name, row in zip(names, self.confusion, strict=True)
        ]
        return [head, *rows]


def report_predictions(
    split: str,
    examples: Sequence[LabelledExample],
    predictions: Sequence[int],
    names: Sequence[str],
    out: Path,
    *,
    keep: bool = False,
) -> None:
    """Print a split's figures, or that it has none, and write `prediction ||| sentence` lines.

    Where nearly all predictions are one label it says what the figures mean. `keep` renames what
    another run wrote there, if it is not the same.
    """
    if is_unlabelled(examples):
        print(f"{split}: unlabelled ({len(examples)} sentences), so no accuracy")
        counts = Counter(names[prediction] for prediction in predictions)
        print(f"{split}: {', '.join(f'{counts[name]:,} {name}' for name in names)}")
    elif split == "test" and has_placeholder_labels(examples):
        print(f"{split}: unlabelled (one and the same label on every line), so no accuracy")
    else:
        scores = Scores.of(labels_of(examples), predictions, len(names))
        print(
            f"{split} accuracy {scores.accuracy:.3f}, macro-F1 {scores.macro_f1:.3f} "
            f"({scores.confusion.sum()} labelled; always the commonest label: "
            f"{scores.majority:.3f})"
        )
        print("\n".join("  " + line for line in scores.lines(names)))
    label, count = Counter(predictions).most_common(1)[0]
    if count >= NEARLY_ALL * len(predictions) and len(predictions) > 1:
        print(
            f"  {count} of {len(predictions)} predictions are {names[label]!r}: the figures say "
            "how common that label is, not what the model understands"
        )
    lines = [
        f"{prediction} ||| {example.sentence}\n"
        for prediction, example in zip(predictions, examples, strict=True)
    ]
    text = "".join(lines)
    if keep and out.exists() and out.read_bytes() != text.encode():
        numbered = (out.with_stem(f"{out.stem}.{number}") for number in itertools.count(1))
        kept = next(path for path in numbered if not path.exists())
        replace(out, kept)
        print(f"{out} had other predictions, of an earlier run: kept as {kept}")
    write_text(out, text)
    print(f"wrote {out}")
