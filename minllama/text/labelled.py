"""Labelled data: `label ||| sentence` files, the names of the labels, scores, written predictions.

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

from config import DATA_DIR, Options
from minllama.system.errors import UsageError
from minllama.system.files import check_writable_file, read_json, real_path, replace, write_text
from minllama.text.reading import Reading, find_text_files, read_lines, split_labelled

UNLABELLED = -1  # the label of a sentence without one, in files and in batches
NEARLY_ALL = 0.9  # of a split's predictions
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
    return all(label is None for label in labels_of(examples))


def has_placeholder_labels(examples: Sequence[LabelledExample]) -> bool:
    """Whether a test file's labels tell nothing: none, or one and the same on every line.

    CFIMDB's test file has 0 on all lines; an accuracy against it means nothing.
    """
    labels = labels_of(examples)
    return is_unlabelled(examples) or (len(labels) > 1 and len(set(labels)) == 1)


@dataclass(frozen=True)
class LabelledFiles:
    """The files of a labelled data set, its name, its labels' names and where predictions go."""

    name: str
    label_names: list[str]
    paths: dict[str, Path]  # of train, dev and, where there is one, test
    outs: dict[str, Path]  # for the predictions on dev and, likewise, test


def find_labelled_files(options: Options, suffix: str) -> LabelledFiles:
    """The files that the flags name, else the embedded reviews; checked before any long work.

    `suffix` ends the default names of the prediction files, as the assignment has them: its
    `sst-dev-finetuning-output.txt`. Raises UsageError.
    """
    train = options.train or DATA_DIR / "reviews-train.txt"
    name = data_set_name(train)
    if options.train is None and (options.dev or options.test):
        raise UsageError(
            "--dev and --test need --train, from which the labels are learnt, or a fine-tuned "
            "model (--pretrained_model_path), which knows them"
        )
    dev = options.dev if options.train else DATA_DIR / "reviews-dev.txt"
    test = options.test if options.train else DATA_DIR / "reviews-test.txt"
    if dev is None:
        raise UsageError(f"--dev is not given: --train {train} needs a file to be measured on")
    paths = {"train": train, "dev": dev} | ({"test": test} if test else {})
    for split, path in paths.items():
        find_text_files([path], flag=f"--{split}")
    outs = {
        "dev": options.dev_out or Path(f"{name}-dev-{suffix}-output.txt"),
        "test": options.test_out or Path(f"{name}-test-{suffix}-output.txt"),
    }
    outs = {split: path for split, path in outs.items() if split in paths}
    _check_outs(paths, outs)
    names = read_label_names(options.label_names, train.parent / f"{name}-label-mapping.json")
    examples = read_labelled(train, n_labels=len(names) or None, encoding=options.encoding)
    labels = {example.label for example in examples}
    if None in labels:
        raise UsageError(f"--train {train}: has lines without a label, which cannot be learnt from")
    if len(labels) < 2:
        raise UsageError(f"--train {train}: has one label on all lines: there is nothing to learn")
    if names and len(labels) != len(names):
        raise UsageError(
            f"--label_names names {len(names)} labels and --train {train} has {len(labels)} "
            f"({', '.join(map(str, sorted(labels)))}): give names and lines for the same labels"
        )
    names = names or [str(label) for label in range(max(labels) + 1)]
    return LabelledFiles(name, names, paths, outs)


def find_sentences(options: Options, names: list[str]) -> LabelledFiles:
    """The files to classify with a model that knows its labels' `names`: --dev, --test, or both.

    Without any they are the embedded reviews, if these are what the labels are of. Raises
    UsageError.
    """
    paths = {split: getattr(options, split) for split in ("dev", "test") if getattr(options, split)}
    if not paths:
        if read_label_names(None, DATA_DIR / "reviews-label-mapping.json") != names:
            raise UsageError(
                "--test is not given: name a file of sentences, one a line, to classify as "
                f"{' or '.join(names)}"
            )
        paths = {split: DATA_DIR / f"reviews-{split}.txt" for split in ("dev", "test")}
    if options.label_names and read_label_names(options.label_names, Path()) != names:
        raise UsageError(
            f"--label_names {options.label_names}: the model's own are {', '.join(names)}: leave "
            "the flag out"
        )
    for split, path in paths.items():
        find_text_files([path], flag=f"--{split}")
    outs = {
        split: getattr(options, f"{split}_out")
        or Path(f"{Path(path.name.removesuffix('.gz')).stem}-prompting-output.txt")
        for split, path in paths.items()
    }
    _check_outs(paths, outs)
    return LabelledFiles("", names, paths, outs)


def _check_outs(paths: dict[str, Path], outs: dict[str, Path]) -> None:
    """Raise UsageError for predictions that could not be written, or not beside each other."""
    taken = {real_path(path) for path in paths.values()}
    for split, path in outs.items():
        if real_path(path) in taken:
            raise UsageError(f"--{split}_out {path}: is another of the files named; give a new one")
        taken.add(real_path(path))
        check_writable_file(path, f"--{split}_out")


def data_set_name(train: Path) -> str:
    """The name in `NAME-train.txt`, which the run's files are called by."""
    stem = Path(train.name.removesuffix(".gz")).stem
    return re.sub(r"[-_.]?train$", "", stem) or stem


def read_label_names(given: Path | None, beside: Path) -> list[str]:
    """The JSON list of label names, as given or beside the training file; else an empty list."""
    if given is None and not beside.is_file():
        return []
    path = given or beside
    try:
        names = read_json(path)
    except UsageError as error:
        raise UsageError(f"--label_names {error}") from None
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(n, str) for n in names):
        raise UsageError(f'--label_names {path}: must be a JSON list of names, ["bad", "good"]')
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise UsageError(f"--label_names {path}: {twice[0]!r} is there more than once")
    return names


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
        seen = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.mean(2 * hits[seen > 0] / seen[seen > 0])) if seen.any() else 0.0

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
