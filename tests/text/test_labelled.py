"""minllama/text/labelled.py: labelled files, the names of labels, scores, written predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minllama.system.errors import UsageError
from minllama.text.labelled import (
    MAX_LABELS,
    LabelledExample,
    Labels,
    Scores,
    has_placeholder_labels,
    is_unlabelled,
    labels_of,
    read_labelled,
    report_predictions,
)

NAMES = ["awful", "average", "excellent"]
TWO = Labels.counted(["bad", "good"])


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------------------- files


def test_reading_labelled_lines(tmp_path: Path) -> None:
    """In order, blank lines left out; -1 and none are no label; the sentence may have a bar."""
    text = "1 ||| two dogs\r\n\n0 ||| sat ||| the mat .\n-1 ||| it \n ||| b\n||| c"
    examples = read_labelled(written(tmp_path / "a.txt", text), ["0", "1"])
    assert labels_of(examples) == [1, 0, None, None, None]
    assert [example.sentence for example in examples] == [
        "two dogs", "sat ||| the mat .", "it", "b", "c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("1 ||| a\n1 a\n", "a.txt:2: no ` ||| `"),
        ("1 ||| a\n1 ||| \n", "a.txt:2: no sentence"),
        ("good ||| a\n", "a.txt:1: label 'good' is not a whole number"),
        ("1.5 ||| a\n", "a.txt:1: label '1.5'"),
        ("\u0661 ||| a\n", "a.txt:1: label '\u0661' is not"),  # a digit of another script
        ("1 ||| a\n\n2 ||| b\n", "a.txt:3: label 2 is not one of 0 to 1"),
        ("-2 ||| a\n", "a.txt:1: label -2"),
        ("9" * 5000 + " ||| a\n", "a.txt:1: label"),
    ],
)
def test_bad_labelled_files(tmp_path: Path, text: str, words: str) -> None:
    """Each is one line with the place."""
    with pytest.raises(UsageError, match=words):
        read_labelled(written(tmp_path / "a.txt", text), ["0", "1"])


def test_labels_without_names_are_bounded(tmp_path: Path) -> None:
    """Each gets a row of the classifier's head: a mistyped one must not fill the memory."""
    assert read_labelled(written(tmp_path / "a.txt", f"{MAX_LABELS - 1} ||| a\n"))
    with pytest.raises(UsageError, match="is not one of 0 to 999"):
        read_labelled(written(tmp_path / "a.txt", f"{MAX_LABELS} ||| a\n"))


def scores_of(*predictions: int) -> np.ndarray:
    """Log-probabilities by which these are the likelier ones of two labels."""
    return np.log([[0.25, 0.75] if prediction else [0.75, 0.25] for prediction in predictions])


def examples_of(*labels: int | None) -> list[LabelledExample]:
    return [LabelledExample(label, f"sentence {i}") for i, label in enumerate(labels)]


def test_labels_that_tell_nothing() -> None:
    """-1, no label, and labels that are all alike give no accuracy."""
    assert is_unlabelled(examples_of(None, None))
    assert has_placeholder_labels(examples_of(None, None))
    assert not is_unlabelled(examples_of(0, 0)) and has_placeholder_labels(examples_of(0, 0))
    for told in (examples_of(0, 1), examples_of(0, None), examples_of(1)):
        assert not is_unlabelled(told) and not has_placeholder_labels(told)


def test_the_public_sets(real_data: Path) -> None:
    """Sizes of SST-5 and CFIMDB; CFIMDB's test labels are placeholders."""
    sst = read_labelled(real_data / "sst-dev.txt", labels=[*"01234"])
    assert len(sst) == 1101 and not has_placeholder_labels(sst)
    cfimdb = read_labelled(real_data / "cfimdb-test.txt", labels=["0", "1"])
    assert len(cfimdb) == 488 and has_placeholder_labels(cfimdb) and not is_unlabelled(cfimdb)


def test_sentences_may_have_no_labels(tmp_path: Path) -> None:
    """But a file with bars is one of labels, and a line without is a mistake there."""
    path = written(tmp_path / "a.txt", "One film .\n\n-1 means nothing here\n")
    with pytest.raises(UsageError, match="a.txt:1: no ` ||| `"):
        read_labelled(path)
    assert read_labelled(path, plain=True) == [
        LabelledExample(None, "One film ."), LabelledExample(None, "-1 means nothing here"),
    ]  # fmt: skip
    written(path, "One film .\n1 ||| Another\n")
    with pytest.raises(UsageError, match="a.txt:1: no ` ||| `"):
        read_labelled(path, plain=True)


# ---------------------------------------------------------------------------- scores


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.none() | st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)
)
def test_scores_against_their_definitions(pairs: list[tuple[int | None, int]]) -> None:
    """Accuracy, the majority's accuracy and macro-F1, from precision and recall."""
    labels, predictions = zip(*pairs, strict=True)
    scores = Scores.of(labels, predictions, 4)
    known = [(label, prediction) for label, prediction in pairs if label is not None]
    assert scores.confusion.sum() == len(known)
    if not known:
        assert scores.accuracy == scores.majority == scores.macro_f1 == 0
        return
    truth, predicted = map(np.array, zip(*known, strict=True))
    assert scores.accuracy == pytest.approx(np.mean(truth == predicted))
    assert scores.majority == pytest.approx(np.bincount(truth).max() / len(truth))
    f1 = []
    for label in {*truth, *predicted}:
        hits = np.sum((truth == label) & (predicted == label))
        precision = hits / max(1, np.sum(predicted == label))
        recall = hits / max(1, np.sum(truth == label))
        f1.append(0 if not hits else 2 * precision * recall / (precision + recall))
    assert scores.macro_f1 == pytest.approx(np.mean(f1))


def test_the_table_of_scores() -> None:
    """A row for each label, a column for each prediction."""
    table = Scores.of([0, 0, 1, 2], [0, 1, 1, 0], 3).lines(NAMES)
    assert [row.split() for row in table] == [
        ["label", "\\", "predicted", *NAMES],
        ["awful", "1", "1", "0"],
        ["average", "0", "1", "0"],
        ["excellent", "1", "0", "0"],
    ]
    assert len({len(row) for row in table}) == 1


def test_of_many_labels_the_commonest_confusions_are_shown() -> None:
    """A matrix of 1,000 labels was 7 MB of the terminal."""
    names = [f"label-{number}" for number in range(1000)]
    labels = [7] * 5 + [999] * 9 + [3] * 4
    predictions = [8] * 3 + [7] * 2 + [0] * 9 + [3] * 4
    assert Scores.of(labels, predictions, 1000).lines(names) == [
        "label-999 was taken for label-0: 9 times",
        "label-7 was taken for label-8: 3 times",
    ]


# ---------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("split", "labels", "said"),
    [
        ("dev", [0, 1, 1, None], "dev accuracy 0.667, macro-F1 0.667 (3 labelled; always the "),
        ("dev", [1, 1, 1, 1], "dev accuracy 0.500"),
        ("test", [1, 1, 1, 1], "test: unlabelled (one and the same label on every line)"),
        ("test", [None] * 4, "test: unlabelled (4 sentences), so no accuracy"),
    ],
)
def test_predictions_are_written_in_the_order_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, split: str, labels: list[int | None], said: str
) -> None:
    """Whatever the labels tell, each sentence gets its line; figures only where they mean a thing.

    CFIMDB's test file has 0 on all lines: an accuracy against it was once printed.
    """
    out, examples = tmp_path / "a" / "out.txt", examples_of(*labels)
    report_predictions(split, examples, scores_of(0, 1, 0, 1), TWO, out)
    printed = capsys.readouterr().out
    assert printed.startswith(said) and f"wrote {out}" in printed
    assert ("label \\ predicted" in printed) == ("accuracy 0." in printed)
    assert out.read_bytes().decode() == "".join(
        f"{prediction} ||| sentence {i}\n" for i, prediction in enumerate([0, 1, 0, 1])
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_predictions_as_a_table(tmp_path: Path, suffix: str) -> None:
    """Each sentence as it is, its label and prediction as files write them, and how sure it is."""
    sentences = ['said "a, b" ||| ,', "电影很好。", "=1+1"]
    examples = [LabelledExample(n, s) for n, s in zip([1, None, 0], sentences, strict=True)]
    scores = np.log(np.array([[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])) - 700  # beyond what exp holds
    out = tmp_path / f"out{suffix}"
    report_predictions("dev", examples, scores, Labels(["bad", "好, good"], ["1", "2"]), out)
    text = out.read_text(encoding="utf-8")
    if suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines(keepends=True)))
    else:
        rows = [json.loads(line) for line in text.splitlines()]
    assert [*rows[0]] == ["sentence", "gold", "prediction", "class", "p_bad", "p_好, good"]
    assert [row["sentence"] for row in rows] == sentences
    assert [row["gold"] or None for row in rows] == ["2", None, "1"]
    assert [row["prediction"] for row in rows] == ["2", "1", "1"]
    assert [row["class"] for row in rows] == ["好, good", "bad", "bad"]
    assert [[float(row["p_bad"]), float(row["p_好, good"])] for row in rows] == [
        [0.2, 0.8], [0.6, 0.4], [0.5, 0.5],
    ]  # fmt: skip


@pytest.mark.parametrize(("ones", "said"), [(9, True), (8, False)])
def test_what_figures_mean_where_one_label_is_nearly_always_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture, ones: int, said: bool
) -> None:
    """Prompting once printed an accuracy, and no word of its being that of one label."""
    predictions = scores_of(*[1] * ones, *[0] * (10 - ones))
    examples = examples_of(*[0, 1] * 5)
    report_predictions("dev", examples, predictions, TWO, tmp_path / "out.txt")
    printed = capsys.readouterr().out
    assert (f"{ones} of 10 predictions are 'good': the figures say how common" in printed) == said


def test_what_another_run_predicted_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Two runs, into folders of their own, wrote their predictions into the same file."""
    out, examples = tmp_path / "out.txt", examples_of(0, 1)
    for predictions in ([0, 1], [0, 1], [1, 1], [0, 0]):
        report_predictions("dev", examples, scores_of(*predictions), TWO, out, keep=True)
    texts = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert {name: text[0] + text[17] for name, text in texts.items()} == {
        "out.txt": "00", "out.1.txt": "01", "out.2.txt": "11",
    }  # fmt: skip
    assert f"kept as {tmp_path / 'out.1.txt'}" in capsys.readouterr().out
    report_predictions("dev", examples, scores_of(1, 0), TWO, out)
    assert len([*tmp_path.iterdir()]) == 3


def test_half_a_character_in_json_is_one_line(tmp_path: Path) -> None:
    """It was trained on, and ended the run when the predictions were written."""
    path = tmp_path / "l.json"
    path.write_text('{"text": "good", "label": 1}\n{"text": "a \\ud800 b", "label": 0}\n', "utf-8")
    with pytest.raises(UsageError, match="l.json:2: half a surrogate pair in its sentence; repair"):
        read_labelled(path)
