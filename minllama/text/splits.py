"""Which files train, dev and test are, and where what a model makes of dev and test is written.

All of it is checked before any long work. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import DATA_DIR, Options
from minllama.cli.console import say
from minllama.system.errors import UsageError
from minllama.system.files import check_writable_file, read_json, real_path
from minllama.system.peek import has_records
from minllama.system.unpacking import uncompressed_name
from minllama.text.find_files import find_text_files
from minllama.text.labelled import (
    MAX_LABELS,
    SHOWN_LABELS,
    UNLABELLED,
    WHOLE,
    Labels,
    Row,
    class_names,
    is_fit_label,
    label_rows,
    read_rows,
)
from minllama.text.reading import Reading, encoding_line

SHOWN_PAIRS = 10  # of the labels in a message


@dataclass(frozen=True)
class SplitFiles:
    """The files of a data set by split, its name, and its labels, if it has any."""

    name: str
    paths: dict[str, Path]  # of train, dev and test, those that there are
    outs: dict[str, Path]  # for the predictions or answers, of the same splits but train
    labels: Labels
    mapping: Path | None = None  # where to write labels that were made of the words in the file

    def is_train(self, split: str) -> bool:
        """Whether a split's file is the one to train on."""
        return {split, "train"} <= self.paths.keys() and (
            real_path(self.paths[split]) == real_path(self.paths["train"])
        )


def find_labelled_files(options: Options, suffix: str) -> SplitFiles:
    """The labelled files that the flags name, else the embedded reviews.

    `suffix` ends the default names of the prediction files, as the assignment has them: its
    `sst-dev-finetuning-output.txt`. To train, there is a train, of which some is held out where
    there is no dev; to prompt, what the labels are may be seen from any. Raises UsageError.
    """
    paths = _given(options) or _embedded("train", "dev", "test")
    source, trains = paths.get("train") or [*paths.values()][0], suffix == "finetuning"
    if trains and "dev" not in paths and not options.val_fraction:
        raise UsageError("--val_fraction 0 holds nothing out of --train: name a --dev")
    if not trains and paths.keys() == {"train"}:
        raise UsageError(f"--test is not given: --train {source} needs a file to be measured on")
    name = data_set_name(source)
    if "train" not in paths:
        name = re.sub(r"[-_.]?(dev|test)$", "", name) or name
    outs = {split: Path(f"{name}-{split}-{suffix}-output.txt") for split in ("dev", "test")}
    held_out = ("dev",) if trains else ()
    files = _checked(options, SplitFiles(name, paths, outs, Labels([], [])), held_out)
    mapping = source.parent / f"{name}-label-mapping.json"
    given = read_label_names(options.label_names, mapping)
    reading = Reading.of_records(options)
    if given is None and (names := class_names(source, reading)):
        given = Labels.counted(names)
    named = options.label_names or mapping
    if "train" not in paths:
        rows = read_rows(source, reading, plain=True)
        return replace(files, labels=_labels_to_prompt(source, rows, given, named))
    labels = find_labels(source, read_rows(source, reading), given, named)
    if not trains or given is not None or labels.is_counted:
        return replace(files, labels=labels)
    return replace(files, labels=labels, mapping=options.save_dir / mapping.name)


def _labels_to_prompt(path: Path, rows: list[Row], given: Labels | None, mapping: Path) -> Labels:
    """The labels as `given`, of which the rows of a file may have any; else those of the rows."""
    rows = [row for row in rows if row.label not in ("", str(UNLABELLED))]
    texts = {row.label for row in rows}
    if given is None:
        if len(texts) < 2:
            raise UsageError(
                f"--label_names is not given, and {path} has no two labels: name those to choose "
                'from, a JSON list: ["bad", "good"]'
            )
        return find_labels(path, rows, None, mapping, flag="")
    if given.is_counted and texts and _are_words(texts):  # a list of the words themselves
        given = Labels(given.names, given.names)
    label_rows(rows, given.texts, mapping)
    return given


def find_labels(
    train: Path, rows: list[Row], given: Labels | None, mapping: Path, flag: str = "--train "
) -> Labels:
    """The labels of a training file, as `given`, else whole numbers from 0 or words.

    Raises UsageError, which shows the `mapping` to write where numbers begin or jump otherwise.
    """
    counts = Counter(row.label for row in rows)
    unlabelled = {"", str(UNLABELLED)} - {*(given.texts if given else ())}
    if unlabelled & counts.keys():
        hint = "" if "" in counts else f"; if it is one, name it in {mapping}"
        if "" in counts and has_records(train):
            hint = "; --label_field names the field or column of the label"
        raise UsageError(
            f"{flag}{train}: has lines without a label, which cannot be learnt from{hint}"
        )
    if len(counts) < 2:
        raise UsageError(f"{flag}{train}: has one label on all lines: there is nothing to learn")
    if len(counts) > MAX_LABELS:
        raise UsageError(
            f"{flag}{train}: has {len(counts):,} different labels, more than the {MAX_LABELS:,} "
            "that can be learnt: is what stands before ` ||| ` a label?"
        )
    numbers = sorted(int(text) for text in counts if WHOLE.fullmatch(text))
    labels = given or Labels.counted([str(number) for number in range(len(counts))])
    if _are_words(counts):
        if given is None:
            words = sorted(counts)
            labels = Labels(words, words)
        elif given.is_counted:  # a list of the words themselves
            labels = Labels(given.names, given.names)
    elif labels.is_counted and len(labels.names) == len(numbers) == len(counts):
        _check_numbers(f"{flag}{train}", numbers, labels, mapping)
    label_rows(rows, labels.texts, mapping if mapping.is_file() else None)
    if len(counts) != len(labels.names):
        shown = ", ".join(sorted(counts)[:SHOWN_LABELS])
        raise UsageError(
            f"--label_names {mapping}: names {len(labels.names)} labels and {flag}{train} has "
            f"{len(counts)} "
            f"({shown}): give names and lines for the same labels"
        )
    return labels


def _are_words(texts: Iterable[str]) -> bool:
    return all(any(map(str.isalpha, text)) for text in texts)


def _check_numbers(where: str, numbers: list[int], labels: Labels, mapping: Path) -> None:
    if numbers == [*range(len(numbers))]:
        return
    first, last = numbers[0], numbers[-1]
    whole = len(numbers) == last - first + 1
    how = f"count from {first} to {last}" if whole else f"are {_listed(numbers)}, with gaps"
    unnamed = labels.names == labels.texts
    names = [*map(str, numbers)] if unnamed else labels.names
    pairs = dict(zip(map(str, numbers), names, strict=True))
    example = json.dumps(dict([*pairs.items()][:SHOWN_PAIRS]), ensure_ascii=False)
    if len(pairs) > SHOWN_PAIRS:
        example = f"{example[:-1]}, ...}}"
    raise UsageError(
        f"{where}: its labels {how}, and labels count from 0: to read these, write "
        f"{example} into {mapping}"
    )


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN_PAIRS]))
    return shown if len(numbers) <= SHOWN_PAIRS else f"{shown}, ... {numbers[-1]}"


def find_sentences(options: Options, labels: Labels) -> SplitFiles:
    """The files to classify with a model that knows its `labels`: --dev, --test, or both.

    Without any they are the embedded reviews, if these are what the labels are of. Raises
    UsageError.
    """
    names = labels.names
    paths = {split: path for split, path in _given(options).items() if split != "train"}
    if not paths:
        if read_label_names(None, DATA_DIR / "reviews-label-mapping.json").names != names:
            raise UsageError(
                "--test is not given: name a file of sentences, one a line, to classify as "
                f"{' or '.join(names)}"
            )
        paths = _embedded("dev", "test")
    if options.label_names and read_label_names(options.label_names, Path()).names != names:
        raise UsageError(
            f"--label_names {options.label_names}: the model's own are {', '.join(names)}: leave "
            "the flag out"
        )
    outs = {split: Path(f"{_stem(path)}-prompting-output.txt") for split, path in paths.items()}
    return _checked(options, SplitFiles("", paths, outs, labels))


def find_dialogue_files(options: Options) -> SplitFiles:
    """The files of dialogues that the flags name; raises UsageError.

    What the model answers to the questions of test is written.
    """
    name = data_set_name(options.train)
    outs = {"test": Path(f"{name}-test-finetuning-output.jsonl")}
    return _checked(options, SplitFiles(name, _given(options), outs, Labels([], [])))


def _given(options: Options) -> dict[str, Path]:
    files = {"train": options.train, "dev": options.dev, "test": options.test}
    return {split: path for split, path in files.items() if path is not None}


def _embedded(*splits: str) -> dict[str, Path]:
    return {split: DATA_DIR / f"reviews-{split}.txt" for split in splits}


def _checked(options: Options, files: SplitFiles, held_out: tuple[str, ...] = ()) -> SplitFiles:
    """The files with the outputs where the flags want them, else in --save_dir; none of a split
    without a file, unless it is `held_out` of another.

    Raises UsageError for a file that is not there, and for an output that could not be written, or
    is another of the files.
    """
    outs = {
        split: getattr(options, f"{split}_out") or options.save_dir / path
        for split, path in files.outs.items()
        if split in files.paths or split in held_out
    }
    for split, path in files.paths.items():
        find_text_files([path], flag=f"--{split}")
    if line := encoding_line([*files.paths.values()], Reading.of_records(options)):
        say(line)
    for split in ("dev", "test"):
        if options.option == "finetune" and files.is_train(split):
            say(
                f"warning: --{split} {files.paths[split]} is --train, too: what is measured on it "
                "says nothing of other text"
            )
    taken = {real_path(path) for path in files.paths.values()}
    for split, path in outs.items():
        if real_path(path) in taken:
            raise UsageError(f"--{split}_out {path}: is another of the files named; give a new one")
        taken.add(real_path(path))
        if options.option != "finetune" or not options.plan:  # which leaves no folder
            check_writable_file(path, f"--{split}_out")
    return replace(files, outs=outs)


def data_set_name(train: Path | None) -> str:
    """The name in `NAME-train.txt`, which the run's files are called by; None: the reviews."""
    if train is None:
        return "reviews"
    return re.sub(r"[-_.]?train$", "", _stem(train)) or _stem(train)


def _stem(path: Path) -> str:
    return Path(uncompressed_name(path)).stem


def read_label_names(given: Path | None, beside: Path) -> Labels | None:
    """The JSON list of label names, as given or beside the training file; None without one.

    An object says how files write each label: `{"1": "bad", "2": "good"}`.
    """
    if given is None and not beside.is_file():
        return None
    path = given or beside
    try:
        content: Any = read_json(path)
    except UsageError as error:
        raise UsageError(f"--label_names {error}") from None
    names = [*content.values()] if isinstance(content, dict) else content
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(n, str) for n in names):
        raise UsageError(f'--label_names {path}: must be a JSON list of names, ["bad", "good"]')
    texts = [*content]
    if not all(map(is_fit_label, [*names, *texts])):
        raise UsageError(f"--label_names {path}: a name is too long, or not in printed characters")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise UsageError(f"--label_names {path}: {repeated[0]!r} is there more than once")
    return Labels(names, texts) if isinstance(content, dict) else Labels.counted(names)
