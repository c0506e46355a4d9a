"""minllama/text/splits.py: the files train, dev and test, labels' names, and where outputs go."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from config import Options, parse_options
from minllama.system.errors import UsageError
from minllama.text.labelled import read_labelled
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
    assert (files.name, files.label_names) == ("toy", NAMES)
    assert files.paths == {s: Path(f"toy-{s}.txt") for s in ("train", "dev", "test")}
    assert files.outs == {s: Path(f"toy-{s}-finetuning-output.txt") for s in ("dev", "test")}
    given = find_labelled_files(options_of(f"{toy} --dev_out a/b.txt"), "finetuning")
    assert given.outs["dev"] == Path("a/b.txt")
    Path("toy-label-mapping.json").unlink()
    assert find_labelled_files(options_of(toy), "prompting").label_names == ["0", "1", "2"]
    assert not list(Path().glob("*output*"))


def test_the_embedded_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any flag there is something to train on, to be measured on and to predict."""
    monkeypatch.chdir(tmp_path)
    files = find_labelled_files(options_of("--option finetune"), "finetuning")
    assert files.name == "reviews" and len(files.label_names) >= 2
    assert [*files.paths] == ["train", "dev", "test"]
    for path in files.paths.values():
        assert read_labelled(path, n_labels=len(files.label_names))


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


def test_a_set_to_be_measured_on_is_asked_for(toy: str) -> None:
    """Of one's own training file the embedded reviews are no measure."""
    with pytest.raises(UsageError, match="--dev is not given"):
        find_labelled_files(options_of("--option finetune --train toy-train.txt"), "finetuning")


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
    assert (files.name, files.label_names) == (name, NAMES)
    assert files.outs["dev"] == Path(f"{name}-dev-finetuning-output.txt")


def test_label_names_given_and_beside(tmp_path: Path) -> None:
    """What is given counts; no file beside the text is no error."""
    given = written(tmp_path / "given.json", '["bad", "good"]')
    beside = written(tmp_path / "beside.json", '["no", "yes"]')
    assert read_label_names(given, beside) == ["bad", "good"]
    assert read_label_names(None, beside) == ["no", "yes"]
    assert read_label_names(None, tmp_path / "absent.json") == []


def test_files_to_classify(toy: str) -> None:
    """With a model that knows its labels' names, any of the files is enough."""
    options = options_of("--option prompt --test toy-test.txt --dev toy-dev.txt")
    files = find_sentences(options, NAMES)
    assert files.outs["dev"] == Path("toy-dev-prompting-output.txt")
    assert list(find_sentences(options_of("--option prompt --test toy-test.txt"), NAMES).paths) == [
        "test"
    ]
    for line, words in (
        ("", "--test is not given: .* classify as awful or average or excellent"),
        ("--test absent.txt", "--test absent.txt: no such file"),
        ("--test toy-dev.txt --dev toy-dev.txt", "--test_out .*: is another of the files named"),
        ("--test toy-dev.txt --label_names two.json", "the model's own are awful, average"),
    ):
        written(Path("two.json"), '["a", "b"]')
        with pytest.raises(UsageError, match=words):
            find_sentences(options_of(f"--option prompt {line}"), NAMES)
    with pytest.raises(UsageError, match="--dev and --test need --train, .* fine-tuned model"):
        find_labelled_files(options, "prompting")
