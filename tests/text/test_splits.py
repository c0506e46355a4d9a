"""minllama/text/splits.py: the files train, dev and test, labels' names, and where outputs go."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from config import Options, parse_options
from minllama.system.errors import UsageError
from minllama.text.labelled import Labels, read_labelled
from minllama.text.splits import find_labelled_files, find_sentences, read_label_names

NAMES = ["awful", "average", "excellent"]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Flags that name small labelled files with three labels, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for split, size in (("train", 9), ("dev", 6), ("test", 3)):
        lines = [f"{i % 3} ||| The film is {NAMES[i % 3]} ." for i in range(size)]
        written(tmp_path / f"toy-{split}.txt", "\n".join(lines) + "\n")
    written(tmp_path / "toy-label-mapping.json", json.dumps(NAMES))
    return "--option finetune --train toy-train.txt --dev toy-dev.txt --test toy-test.txt"


def options_of(line: str) -> Options:
    return parse_options(line.split())


def test_the_files_that_flags_name(toy: str) -> None:
    """Names of labels beside the training file; predictions named as the assignment has them."""
    files = find_labelled_files(options_of(toy), "finetuning")
    assert (files.name, files.labels) == ("toy", Labels.counted(NAMES))
    assert files.paths == {s: Path(f"toy-{s}.txt") for s in ("train", "dev", "test")}
    folder = Path("checkpoints")  # --save_dir
    assert files.outs == {s: folder / f"toy-{s}-finetuning-output.txt" for s in ("dev", "test")}
    given = find_labelled_files(options_of(f"{toy} --dev_out a/b.txt"), "finetuning")
    assert given.outs["dev"] == Path("a/b.txt")
    Path("toy-label-mapping.json").unlink()
    assert find_labelled_files(options_of(toy), "prompting").labels.names == ["0", "1", "2"]
    assert not list(Path().glob("*output*"))


def test_the_embedded_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any flag there is something to train on, to be measured on and to predict."""
    monkeypatch.chdir(tmp_path)
    files = find_labelled_files(options_of("--option finetune"), "finetuning")
    assert files.name == "reviews" and len(files.labels.names) >= 2
    assert [*files.paths] == ["train", "dev", "test"]
    for path in files.paths.values():
        assert read_labelled(path, labels=files.labels.texts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"toy-train.txt": "0 | a\n"}, "toy-train.txt:1"),
        ({"toy-train.txt": "0 ||| a\n3 ||| b\n"}, "toy-train.txt:2: label 3"),
        ({"toy-train.txt": "0 ||| a\n1 ||| b\n"}, "names 3 labels and --train .*has 2 .0, 1.: "),
        ({"toy-train.txt": "-1 ||| a\n0 ||| b\n"}, "toy-train.txt: .*without a label"),
        ({"toy-label-mapping.json": "{"}, "--label_names toy-label-mapping.json: not JSON"),
        ({"toy-label-mapping.json": '{"a": 0}'}, "must be a JSON list"),
        ({"toy-label-mapping.json": '["a"]'}, "must be a JSON list"),
        ({"toy-label-mapping.json": '["a", "\\ud800", "b"]'}, "a name is too long, or not in"),
        ({"toy-label-mapping.json": '["a", "\\u001b[2J", "b"]'}, "a name is too long, or not in"),
        ({"toy-label-mapping.json": '["good", "good"]'}, "'good' is there more than once"),
    ],
)
def test_bad_sets(toy: str, change: dict[str, str], words: str) -> None:
    """Found before a model is loaded; a name given twice was once scored twice."""
    for name, text in change.items():
        written(Path(name), text)
    with pytest.raises(UsageError, match=words):
        find_labelled_files(options_of(toy), "finetuning")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dev_out toy-dev.txt", "--dev_out toy-dev.txt: is another of the files"),
        ("--dev_out ./toy-train.txt", "--dev_out toy-train.txt: is another of the files"),
        ("--test_out toy-test.txt", "--test_out toy-test.txt: is another of the files"),
        ("--dev_out a.txt --test_out a.txt", "--test_out a.txt: is another of the files"),
        ("--dev_out folder", "--dev_out folder: is a folder"),
        ("--dev_out toy-dev.txt/a.txt", "--dev_out toy-dev.txt: cannot write there"),
        ("--label_names folder", "--label_names folder: is a folder"),
        ("--label_names absent.json", "--label_names absent.json: no such file"),
        ("--test absent.txt", "--test absent.txt: no such file"),
    ],
)
def test_files_that_cannot_be(toy: str, flags: str, words: str) -> None:
    """`--dev X --dev_out X` once overwrote the labels; outputs were once checked after training."""
    Path("folder").mkdir()
    before = Path("toy-dev.txt").read_bytes()
    with pytest.raises(UsageError, match=words):
        find_labelled_files(options_of(f"{toy} {flags}"), "finetuning")
    assert Path("toy-dev.txt").read_bytes() == before


def test_a_single_file_is_split_to_train_and_asks_for_another_to_prompt(toy: str) -> None:
    """Of one's own training file the embedded reviews are no measure: a part of it is."""
    alone = "--train toy-train.txt"
    files = find_labelled_files(options_of(f"--option finetune {alone}"), "finetuning")
    assert files.paths == {"train": Path("toy-train.txt")}
    assert files.outs == {"dev": Path("checkpoints/toy-dev-finetuning-output.txt")}
    with pytest.raises(UsageError, match="--val_fraction 0 holds nothing out .* name a --dev"):
        options = options_of(f"--option finetune {alone} --val_fraction 0")
        find_labelled_files(options, "finetuning")
    with pytest.raises(UsageError, match="--test is not given"):
        find_labelled_files(options_of(f"--option prompt {alone}"), "prompting")


def test_to_prompt_any_labelled_file_is_enough(toy: str) -> None:
    """Zero-shot asked for --train and --dev, of which it read the labels' names alone."""

    def labels_of(line: str) -> Labels:
        files = find_labelled_files(options_of(f"--option prompt {line}"), "prompting")
        assert "train" in files.paths or files.mapping is None
        return files.labels

    assert labels_of("--test toy-test.txt") == Labels.counted(NAMES)  # the mapping beside it
    written(Path("two.txt"), "1 ||| a\n-1 ||| b\n")  # fewer labels than there are
    written(Path("names.json"), json.dumps(NAMES))
    assert labels_of("--test two.txt --label_names names.json") == Labels.counted(NAMES)
    written(Path("words.txt"), "awful ||| a\nexcellent ||| b\n")
    assert labels_of("--dev words.txt").names == ["awful", "excellent"]
    assert labels_of("--test words.txt --label_names names.json") == Labels(NAMES, NAMES)
    written(Path("plain.txt"), "A sentence.\nAnother one.\n")
    assert labels_of("--test plain.txt --label_names names.json") == Labels.counted(NAMES)
    for line, words in (
        ("--test plain.txt", "--label_names is not given, and plain.txt has no two labels"),
        ("--test two.txt", "--label_names is not given, and two.txt has no two labels"),
        ("--test words.txt --label_names two.json", "words.txt:1: label awful is not one of"),
        ("--train toy-train.txt --test absent.txt", "--test absent.txt: no such file"),
    ):
        written(Path("two.json"), '["a", "b"]')
        with pytest.raises(UsageError, match=words):
            labels_of(line)


def test_one_label_alone_is_nothing_to_learn(toy: str) -> None:
    """A classifier with a single class was trained without a word, and could not be wrong."""
    Path("toy-label-mapping.json").unlink()
    written(Path("toy-train.txt"), "0 ||| a\n0 ||| b\n")
    with pytest.raises(UsageError, match="--train toy-train.txt: has one label on all lines"):
        find_labelled_files(options_of(toy), "finetuning")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("x-train.txt.gz", "x"),
        ("x-train.gz", "x"),
        ("x-train.txt", "x"),
        ("x.y_train.tsv.gz", "x.y"),
        ("train.txt", "train"),
        ("x-train", "x"),
    ],
)
def test_the_name_of_a_set(toy: str, file: str, name: str) -> None:
    """`x-train.txt.gz` was the set `x-train.txt`, and the names of its labels were not found."""
    data = Path("toy-train.txt").read_bytes()
    Path(file).write_bytes(gzip.compress(data) if file.endswith(".gz") else data)
    written(Path(f"{name}-label-mapping.json"), json.dumps(NAMES))
    options = options_of(f"--option finetune --train {file} --dev toy-dev.txt")
    files = find_labelled_files(options, "finetuning")
    assert (files.name, files.labels) == (name, Labels.counted(NAMES))
    assert files.outs["dev"] == Path(f"checkpoints/{name}-dev-finetuning-output.txt")


LABELLED = [(text, f"a film , {number}") for number, text in enumerate("35152")]


def write_sets(labels: dict[str, str], form: str) -> Options:
    """The sentences with these labels as a file of a form, and the flags that name it."""
    rows = [(labels[text], sentence) for text, sentence in LABELLED]
    as_csv = [f'"{sentence}";{text}\n' for text, sentence in rows]
    texts = {
        "txt": "".join(f"{text} ||| {sentence}\n" for text, sentence in rows),
        "jsonl": "".join(json.dumps({"text": s, "label": t}) + "\n" for t, s in rows),
        "json": json.dumps([{"sentence": s, "label": t, "id": 5} for t, s in rows]),
        "csv": "".join(["text;label\n", *as_csv]),
        "tsv": "".join(["label\tsentence\n", *(f"{t}\t{s}\n" for t, s in rows)]),
    }
    path = written(Path(f"set-train.{form}"), texts[form])
    return options_of(f"--option finetune --train {path} --dev {path}")


COUNTED = {"1": "0", "2": "1", "3": "2", "5": "3"}
WORDS = {"1": "neg", "2": "neutral", "3": "pos", "5": "很好"}


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("labels", [COUNTED, WORDS])
def test_labels_may_be_words_and_stand_in_json_or_csv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, labels: dict[str, str]
) -> None:
    """`neg ||| ...` was no whole number, and a JSON object a dialogue without turns."""
    monkeypatch.chdir(tmp_path)
    options = write_sets(labels, form)
    assert not options.is_chat
    files = find_labelled_files(options, "finetuning")
    assert files.labels.names == files.labels.texts == [labels[text] for text in "1235"]
    made = labels is WORDS
    assert files.mapping == (Path("checkpoints/set-label-mapping.json") if made else None)
    read = read_labelled(files.paths["dev"], files.labels.texts)
    assert [(each.label, each.sentence) for each in read] == [
        ("1235".index(text), sentence) for text, sentence in LABELLED
    ]
    # A list of the words gives their order, and an object other names, too.
    beside, order = Path("set-label-mapping.json"), [labels[text] for text in "5321"]
    if made:
        written(beside, json.dumps(order))
        assert find_labelled_files(options, "finetuning").labels == Labels(order, order)
    written(beside, json.dumps({text: f"name of {text}" for text in order}))
    named = find_labelled_files(options, "finetuning").labels
    assert named == Labels([f"name of {text}" for text in order], order)


def test_labels_of_an_earlier_run_are_not_written_where_the_next_one_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --dev_out beside --train a class added later was refused, by a file nobody had named."""
    monkeypatch.chdir(tmp_path)
    options = write_sets(WORDS, "txt")
    typed = ["--option", "finetune", "--train", str(options.train), "--dev", str(options.dev)]
    beside = parse_options([*typed, "--dev_out", "dev.csv", "--save_dir", "run"])
    assert find_labelled_files(beside, "finetuning").mapping == Path("run/set-label-mapping.json")
    written(Path("set-label-mapping.json"), json.dumps(["neg", "neutral", "pos"]))
    with pytest.raises(UsageError, match="label names in set-label-mapping.json belong to this"):
        find_labelled_files(options, "finetuning")


@pytest.mark.parametrize(
    ("texts", "names", "words", "example"),
    [
        ("12345", None, "count from 1 to 5", {text: text for text in "12345"}),
        ("123", NAMES, "count from 1 to 3", dict(zip("123", NAMES, strict=True))),
        (["0", "999"], None, "are 0, 999, with gaps", {"0": "0", "999": "999"}),
        (["2.0", "04"], None, "are 2, 4, with gaps", {"2": "2", "4": "4"}),
    ],
)
def test_labels_that_do_not_count_from_0(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: Sequence[str],
    names: list[str] | None,
    words: str,
    example: dict[str, str],
) -> None:
    """`1 ||| bad` to `5 ||| good` made a sixth class that no sentence had, and 0 and 999 998.

    The message shows what to write, which reads them so.
    """
    monkeypatch.chdir(tmp_path)
    path = written(Path("x-train.txt"), "".join(f"{text} ||| a\n" for text in texts))
    mapping = Path("x-label-mapping.json")
    if names:
        written(mapping, json.dumps(names))
    options = options_of(f"--option finetune --train {path} --dev {path}")
    with pytest.raises(UsageError, match=words) as error:
        find_labelled_files(options, "finetuning")
    remedy = re.search(r"write (\{.*\}) into (.*)", str(error.value))
    assert json.loads(remedy[1]) == example and remedy[2] == str(mapping)
    written(mapping, remedy[1])
    labels = find_labelled_files(options, "finetuning").labels
    assert labels == Labels([*example.values()], [*example])
    read = read_labelled(path, labels.texts)
    assert [each.label for each in read] == [*range(len(texts))]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.csv",
            "film,stars\nx,1\n",
            "a.csv:1: no column .* or 'text' .has: film, stars.*--label_field",
        ),
        ("a.csv", "text,label\nx,1\n ,2\n", 'a.csv:3: no sentence in "text"'),
        ("a.jsonl", '{"label": 1}', 'a.jsonl:1: no sentence in "text" .has: label'),
        ("a.jsonl", '{"text": "x", "label": [1]}', "a.jsonl:1: label '.1.' is not a number"),
        (
            "a.jsonl",
            '{"text": "x", "label": "a\\nb"}',
            "a.jsonl:1: label 'a.*' is too long, or not",
        ),
        ("a.jsonl", '{"text": "x", "label": "a ||| b"}', "a.jsonl:1: label 'a ... b' is too long"),
        ("a.txt", "neg ||| x\n1 ||| y\n", "a.txt:1: label 'neg' is not a whole number"),
        ("a.txt", "".join(f"w{i} ||| x\n" for i in range(1001)), "has 1,001 different labels"),
        ("a.txt", "-1 ||| x\n1 ||| y\n", "without a label.*; if it is one, name it in"),
    ],
)
def test_labels_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, words: str
) -> None:
    """Each is said with its place."""
    monkeypatch.chdir(tmp_path)
    options = options_of(f"--option finetune --train {written(Path(name), text)} --dev {name}")
    with pytest.raises(UsageError, match=words):
        find_labelled_files(options, "finetuning")


def test_label_names_given_and_beside(tmp_path: Path) -> None:
    """What is given counts; no file beside the text is no error."""
    given = written(tmp_path / "given.json", '["bad", "good"]')
    beside = written(tmp_path / "beside.json", '["no", "yes"]')
    assert read_label_names(given, beside).names == ["bad", "good"]
    assert read_label_names(None, beside).names == ["no", "yes"]
    assert read_label_names(None, tmp_path / "absent.json") is None


def test_files_to_classify(toy: str) -> None:
    """With a model that knows its labels' names, any of the files is enough."""
    options = options_of("--option prompt --test toy-test.txt --dev toy-dev.txt")
    files = find_sentences(options, Labels.counted(NAMES))
    assert files.outs["dev"] == Path("checkpoints/toy-dev-prompting-output.txt")
    assert list(
        find_sentences(
            options_of("--option prompt --test toy-test.txt"), Labels.counted(NAMES)
        ).paths
    ) == ["test"]
    for line, words in (
        ("", "--test is not given: .* classify as awful or average or excellent"),
        ("--test absent.txt", "--test absent.txt: no such file"),
        ("--test toy-dev.txt --dev toy-dev.txt", "--test_out .*: is another of the files named"),
        ("--test toy-dev.txt --label_names two.json", "the model's own are awful, average"),
    ):
        written(Path("two.json"), '["a", "b"]')
        with pytest.raises(UsageError, match=words):
            find_sentences(options_of(f"--option prompt {line}"), Labels.counted(NAMES))
