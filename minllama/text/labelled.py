"""Labelled data: sentences with labels as files have them, scores, and predictions written.

Knows nothing of vocabularies or models: what they predict comes as scores.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minllama.system.errors import UsageError
from minllama.system.files import is_text, replace, write_text
from minllama.system.peek import has_records, is_csv_name, is_table
from minllama.system.tables import open_table
from minllama.text.reading import UTF8, Reading, read_blocks, read_lines
from minllama.text.records import field_of, places, read_records

UNLABELLED = -1  # the label of a sentence without one, in files and in batches
NEARLY_ALL = 0.9  # of a split's predictions: so many alike say little of the model
MAX_LABELS = 1000  # each gets a row of the classifier's head
LONGEST_LABEL = 100
SHOWN_LABELS = 30  # of a confusion matrix; of more labels the commonest confusions are shown
SHOWN_CONFUSIONS = 10
WHOLE = re.compile(r"(-?[0-9]{1,9})(\.0+)?")  # pandas writes 1.0 where a label is missing
TEXT_FIELDS = ("text", "sentence")  # of records, where no other is named
LABELLED_LINE = re.compile(r"[^|\n]{0,100}\|\|\|\s")  # a number, a word or nothing first


# ---------------------------------------------------------------------------- files


@dataclass(frozen=True)
class LabelledExample:
    """A sentence as written, and its label; None where the file has none."""

    label: int | None
    sentence: str


@dataclass(frozen=True)
class Labels:
    """The classes: what they are called, and how files write them, in the same order."""

    names: list[str]
    texts: list[str]

    @classmethod
    def counted(cls, names: Sequence[str]) -> Labels:
        """Labels that files count from 0."""
        return cls([*names], [str(number) for number in range(len(names))])

    @property
    def is_counted(self) -> bool:
        """Whether files count them from 0."""
        return self.texts == [str(number) for number in range(len(self.names))]


class Row(NamedTuple):
    """A sentence of a file with its label as written, "" for none, and its place `file:line`."""

    where: str
    label: str
    sentence: str


def is_labelled(path: Path, reading: Reading = UTF8) -> bool:
    """Whether the first lines all read `label ||| sentence`, the format of labelled files."""
    if is_table(path):
        return False
    start = next(iter(read_blocks(path, reading)), "")  # a line may be as long as the file
    lines = start.split("\n")
    lines = [line for line in lines[:-1] or lines if line.strip()][:20]  # the last may be cut
    return bool(lines) and all(map(LABELLED_LINE.match, lines))


def split_labelled(path: Path, number: int, line: str) -> tuple[str, str]:
    """(label, sentence) of a line `label ||| sentence`, both as written, stripped.

    Raises UsageError `file:line: ...` where there is no ` ||| ` or no sentence.
    """
    label, bar, sentence = f" {line}".partition(" ||| ")
    if not bar:
        raise UsageError(f"{path}:{number}: no ` ||| `; a line reads `label ||| sentence`")
    if not sentence.strip():
        raise UsageError(f"{path}:{number}: no sentence after ` ||| `")
    return label.strip(), sentence.strip()


def read_rows(path: Path, reading: Reading = UTF8, *, plain: bool = False) -> list[Row]:
    """The sentences of a file, in order: `label ||| sentence` lines, or records.

    Of records, which are JSON objects or rows of CSV, parquet and Arrow, the reading says which
    fields are meant; `sentence` is as good as `text`. `plain` takes a file without any ` ||| `,
    too: each line is a sentence. Raises UsageError `file:line: ...` for anything else, and for an
    empty file.
    """
    if has_records(path) and not (is_csv_name(path) and is_labelled(path, reading)):
        rows = list(_rows_of_records(path, reading))
    else:
        lines = read_lines(path, reading)
        filled = [(number, line) for number, line in lines if line.strip()]
        if plain and not any("|||" in line for _, line in filled):
            rows = [Row(f"{path}:{number}", "", line.strip()) for number, line in filled]
        else:
            rows = [Row(f"{path}:{n}", *split_labelled(path, n, line)) for n, line in filled]
    if not rows:
        raise UsageError(f"{path}: empty, there is no line `label ||| sentence`")
    return [row._replace(label=_plain_label(row.label, row.where)) for row in rows]


def _rows_of_records(path: Path, reading: Reading) -> Iterator[Row]:
    is_usual = reading.text_field == TEXT_FIELDS[0]
    names = TEXT_FIELDS if is_usual else (reading.text_field,)
    fields = {*names, reading.label_field}
    columns = fields | {name.split(".")[0] for name in fields}
    place = places(path)
    for number, record in read_records(path, reading, columns=columns):
        yield _row_of(record, names, reading.label_field, place(number))


def _row_of(record: dict[str, Any], names: Sequence[str], label_field: str, where: str) -> Row:
    values = (field_of(record, name) for name in names)
    sentence = next((value for value in values if value is not None), None)
    label = field_of(record, label_field)
    has = ", ".join(sorted(record)[:8]) or "nothing"
    if not isinstance(sentence, str) or not sentence.strip():
        remedy = "--text_field names another"
        raise UsageError(f'{where}: no sentence in "{names[0]}" (has: {has}); {remedy}')
    if not is_text(sentence):  # JSON can escape what UTF-8 cannot encode
        raise UsageError(f"{where}: half a surrogate pair in its sentence; repair it")
    if label_field not in record and label is None and label_field != Reading.label_field:
        raise UsageError(f"{where}: no --label_field {label_field} (has: {has})")
    if not isinstance(label, str | int | float | None):
        raise UsageError(f"{where}: label {str(label)[:40]!r} is not a number or a word")
    # Predictions are written a line each.
    text = "" if label is None or label != label else str(label)  # NaN is none
    return Row(where, text.strip(), re.sub(r"\s*[\r\n]+\s*", " ", sentence.strip()))


def class_names(path: Path, reading: Reading) -> list[str] | None:
    """The names of the labels that a table has as numbers from 0; None where it has none."""
    names = open_table(path).class_names.get(reading.label_field, []) if is_table(path) else []
    fit = 2 <= len({*names}) == len(names) <= MAX_LABELS and all(map(is_fit_label, names))
    return names if fit else None


def _plain_label(text: str, where: str) -> str:
    """The label, a whole number as Python writes it: `01` and `1.0` are `1`."""
    match = WHOLE.fullmatch(text)
    if not match and not is_fit_label(text):
        raise UsageError(f"{where}: label {text[:40]!r} is too long, or not in printed characters")
    return str(int(match[1])) if match else text


def is_fit_label(text: str) -> bool:
    """Whether a label can be printed, and written before ` ||| `."""
    return len(text) <= LONGEST_LABEL and text.isprintable() and "|||" not in text


def read_labelled(
    path: Path, labels: Sequence[str] | None = None, *, reading: Reading = UTF8, plain: bool = False
) -> list[LabelledExample]:
    """The sentences of a file with the numbers of their labels; see `read_rows`.

    `labels` are how the file writes them, by default 0 to MAX_LABELS - 1; -1, or none, means
    unlabelled. Raises UsageError `file:line: ...` for another one.
    """
    rows = read_rows(path, reading, plain=plain)
    return label_rows(rows, labels or [str(number) for number in range(MAX_LABELS)])


def label_rows(
    rows: Iterable[Row], labels: Sequence[str], names: Path | None = None
) -> list[LabelledExample]:
    """The rows with the places of their labels in `labels`, which the file `names` may have.

    Raises UsageError.
    """
    numbers: dict[str, int | None] = {"": None, str(UNLABELLED): None}
    numbers |= {text: number for number, text in enumerate(labels)}
    for row in rows:
        if row.label not in numbers:
            raise UsageError(_wrong_label(row, labels, names))
    return [LabelledExample(numbers[row.label], row.sentence) for row in rows]


def _wrong_label(row: Row, labels: Sequence[str], names: Path | None) -> str:
    if WHOLE.fullmatch(labels[0]) and not WHOLE.fullmatch(row.label):
        return f"{row.where}: label {row.label[:40]!r} is not a whole number"
    among = ", ".join(labels[:SHOWN_LABELS]) + (", ..." if len(labels) > SHOWN_LABELS else "")
    if Labels([*labels], [*labels]).is_counted:
        among = f"0 to {labels[-1]}"
    return (
        f"{row.where}: label {row.label[:40]} is not one of {among} (-1 for unlabelled); do the "
        f"label names {f'in {names} ' if names else ''}belong to this file?"
    )


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
        """The confusion matrix as a table: a row per label, a column per prediction.

        Of many labels the commonest confusions instead.
        """
        if len(names) > SHOWN_LABELS:
            return self._confusions(names)
        width = max(7, *(len(name) + 2 for name in names))
        head = "label \\ predicted".ljust(18) + "".join(name.rjust(width) for name in names)
        rows = [
            name.ljust(18) + "".join(str(count).rjust(width) for count in row)
            for name, row in zip(names, self.confusion, strict=True)
        ]
        return [head, *rows]

    def rows(self, names: Sequence[str]) -> list[list[str]]:
        """The figures and the same matrix as rows of a name and a text, for a run's page."""
        figures = f"accuracy {self.accuracy:.3f}, macro-F1 {self.macro_f1:.3f}"
        matrix = [line.split(": ", 1) for line in self._confusions(names)]
        if len(names) <= SHOWN_LABELS:
            counts = [
                ", ".join(f"{name} {count:,}" for name, count in zip(names, row, strict=True))
                for row in self.confusion
            ]
            matrix = [
                [f"{name}, predicted as", text] for name, text in zip(names, counts, strict=True)
            ]
        return [[f"{self.confusion.sum():,} labelled", figures], *matrix]

    def _confusions(self, names: Sequence[str]) -> list[str]:
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        largest = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
        pairs = zip(*np.unravel_index(largest, wrong.shape), strict=True)
        return [
            f"{names[label]} was taken for {names[prediction]}: {wrong[label, prediction]:,} times"
            for label, prediction in pairs
            if wrong[label, prediction]
        ]


def report_predictions(
    split: str,
    examples: Sequence[LabelledExample],
    scores: np.ndarray,
    labels: Labels,
    out: Path,
    *,
    keep: bool = False,
) -> list[list[str]]:
    """Print a split's figures, or that it has none, and write what was predicted.

    `scores` (n, n_labels) are logarithms; of a row the largest is the prediction, and their softmax
    the probabilities. `out` gets `prediction ||| sentence` lines with labels as the files write
    them; where it is called .csv or .jsonl, a table of these with the probabilities. Where nearly
    all are one label it says what the figures mean. `keep` renames what another run wrote there, if
    it is not the same. Returns the figures in rows for a page, if there are any.
    """
    names, predictions = labels.names, scores.argmax(axis=1).tolist()
    rows: list[list[str]] = []
    if is_unlabelled(examples):
        print(f"{split}: unlabelled ({len(examples)} sentences), so no accuracy")
        counts = Counter(names[prediction] for prediction in predictions)
        print(f"{split}: {', '.join(f'{counts[name]:,} {name}' for name in names if counts[name])}")
    elif split == "test" and has_placeholder_labels(examples):
        print(f"{split}: unlabelled (one and the same label on every line), so no accuracy")
    else:
        figures = Scores.of(labels_of(examples), predictions, len(names))
        print(
            f"{split} accuracy {figures.accuracy:.3f}, macro-F1 {figures.macro_f1:.3f} "
            f"({figures.confusion.sum()} labelled; always the commonest label: "
            f"{figures.majority:.3f})"
        )
        print("\n".join("  " + line for line in figures.lines(names)))
        rows = figures.rows(names)
    label, count = Counter(predictions).most_common(1)[0]
    if count >= NEARLY_ALL * len(predictions) and len(predictions) > 1:
        print(
            f"  {count} of {len(predictions)} predictions are {names[label]!r}: the figures say "
            "how common that label is, not what the model understands"
        )
    if is_table_of_results(out):
        text = table_text(_prediction_rows(examples, scores, labels), out)
    else:
        lines = zip(predictions, examples, strict=True)
        text = "".join(f"{labels.texts[number]} ||| {line.sentence}\n" for number, line in lines)
    write_result(out, text, "predictions", keep=keep)
    return rows


def _prediction_rows(
    examples: Sequence[LabelledExample], scores: np.ndarray, labels: Labels
) -> Iterator[dict[str, Any]]:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    for example, row in zip(examples, weights / weights.sum(axis=1, keepdims=True), strict=True):
        prediction = row.argmax()
        yield {
            "sentence": example.sentence,
            "gold": None if example.label is None else labels.texts[example.label],
            "prediction": labels.texts[prediction],
            "class": labels.names[prediction],
        } | {f"p_{name}": round(float(p), 6) for name, p in zip(labels.names, row, strict=True)}


def is_table_of_results(out: Path) -> bool:
    """Whether the name of an output asks for a table."""
    return out.suffix.lower() in (".csv", ".jsonl")


def table_text(rows: Iterable[dict[str, Any]], out: Path) -> str:
    """Rows of the same fields as CSV with a header, or as JSON objects, by the name of the file."""
    if out.suffix.lower() == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    rows, text = [*rows], io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_result(out: Path, text: str, what: str, *, keep: bool) -> None:
    """Write a file and say so; `keep` renames what another run wrote there, if it differs."""
    if keep and out.exists() and out.read_bytes() != text.encode():
        numbered = (out.with_stem(f"{out.stem}.{number}") for number in itertools.count(1))
        kept = next(path for path in numbered if not path.exists())
        replace(out, kept)
        print(f"{out} had other {what}, of an earlier run: kept as {kept}")
    write_text(out, text)
    print(f"wrote {out}")
