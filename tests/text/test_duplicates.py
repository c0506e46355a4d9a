"""minllama/text/duplicates.py: documents that come twice, counted and dropped."""

from __future__ import annotations

import json
import random
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import RESUME, assert_same_run, command, pretrain, stop_after
from test_corpus import load

from minllama.system.errors import UsageError
from minllama.text.duplicates import STRETCH, _stretches, first_occurrences
from minllama.text.stream import documents_in
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("empty_folder")
LINES = [
    f"The {who} ran {where} ."
    for who in ("cat", "dog", "fox", "bear", "bird", "boy", "girl", "mother")
    for where in ("home", "away", "up the hill", "in the garden", "out of the house")
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_first_occurrences(pairs):
    """Alike are those with both halves alike, one half is not enough."""
    found = first_occurrences(np.array(pairs, np.uint64))
    assert found.tolist() == [pairs.index(pair) for pair in pairs]


def write(name: str, lines: list[str]) -> None:
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def documents(stream) -> list[str]:
    """The documents of a stream of lines."""
    tokenizer, ids = Tokenizer(), stream.read(0, len(stream)).tolist()
    edges = [i for i, token in enumerate(ids) if token == tokenizer.bos_id] + [len(ids)]
    return [tokenizer.decode(ids[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def test_text_without_duplicates_has_no_line(capsys):
    """And --dedup trains on the same, under the same key."""
    write("a.txt", LINES)
    plain = load("--pretrain_data a.txt --document_per_line")
    out = capsys.readouterr().out
    assert "duplicates" not in out and "shared" not in out and "byte pieces" not in out
    dedup = load("--pretrain_data a.txt --document_per_line --dedup")
    assert (
        "duplicates   0 of 40 documents (0.0% of the tokens) dropped\n" in capsys.readouterr().out
    )
    assert dedup.key == plain.key and documents(dedup.val.stream) == documents(plain.val.stream)


def test_duplicates_in_the_text_are_counted_and_dropped(capsys):
    """The first stays, also where the copies are in another file; none is on both sides."""
    write("a.txt", LINES)
    write("b.txt", [LINES[7], "One day .", LINES[7], *LINES[20:]])
    words = "--pretrain_data a.txt b.txt --document_per_line --val_fraction"
    plain = load(f"{words} 0.3")
    out = capsys.readouterr().out
    assert (
        "duplicates   22 of 63 documents (3" in out
        and "are copies of others; --dedup drops them" in out
    )
    held_out, trained = documents(plain.val.stream), documents(plain.train.stream)
    assert not {*held_out} & {*trained} and "shared" not in out
    dedup = load(f"{words} 0.3 --dedup")
    out = capsys.readouterr().out
    assert "duplicates   22 of 63 documents (3" in out and "shared" not in out
    held_out, trained = documents(dedup.val.stream), documents(dedup.train.stream)
    assert sorted([*held_out, *trained]) == sorted([*LINES, "One day ."]) and held_out
    assert len(dedup.val.stream) <= 0.6 * (len(dedup.val.stream) + len(dedup.train.stream))
    assert dedup.val.utf8_bytes == sum(map(len, held_out))
    assert documents(load(f"{words} 0 --dedup").train.stream) == [*LINES, "One day ."]
    assert len({plain.key, dedup.key, load(f"{words} 0.3").key}) == 2


def test_what_is_held_out_by_name_is_not_trained_on(capsys):
    """--val_data stays as it is, with copies of its own."""
    write("a.txt", [*LINES, LINES[0]])
    write("val.txt", [LINES[3], "One day .", LINES[3], LINES[9]])
    words = "--pretrain_data a.txt --val_data val.txt --document_per_line"
    load(words)
    out = capsys.readouterr().out
    assert "duplicates   1 of 41 documents" in out
    assert "shared       3 of 4 held-out documents are trained on, too" in out
    texts = load(f"{words} --dedup")
    out = capsys.readouterr().out
    assert "duplicates   3 of 41 documents (" in out and "2 of them held out by --val_data" in out
    assert documents(texts.train.stream) == [x for i, x in enumerate(LINES) if i not in (3, 9)]
    assert documents(texts.val.stream) == [LINES[3], "One day .", LINES[3], LINES[9]]
    write("b.txt", LINES)
    with pytest.raises(UsageError, match="--dedup leaves nothing to train on"):
        load("--pretrain_data a.txt --val_data b.txt --document_per_line --dedup")


def test_the_end_of_a_file_that_is_there_twice(capsys):
    """Two long documents: chunks of both are held out, and each is in the other one, too."""
    for name in ("a.txt", "b.txt"):
        write(name, LINES)
    load("--pretrain_data a.txt b.txt")
    out = capsys.readouterr().out
    assert "duplicates   1 of 2 documents (50.0% of the tokens) are copies of others" in out
    assert "shared       2 of 2 held-out documents" in out
    texts, one = load("--pretrain_data a.txt b.txt --dedup"), load("--pretrain_data a.txt")
    for of_two, of_one in ((texts.train, one.train), (texts.val, one.val)):
        whole = (0, len(of_one.stream))
        assert of_two.stream.read(*whole).tolist() == of_one.stream.read(*whole).tolist()
        assert len(of_two.stream) == whole[1]
    assert texts.val.utf8_bytes == one.val.utf8_bytes


def test_near_copies_are_counted(capsys):
    """Copies with other white space or a header of their own, as of notebooks' checkpoints, made
    validation perplexity 36 where it is 215, unsaid: no two had the same tokens."""
    chance = random.Random(0)
    names = "fox dog cat bear bird mouse owl hen".split()
    stories = [
        " ".join(f"{chance.choice(names)} {chance.randrange(100)}" for _ in range(60))
        for _ in range(40)
    ]
    copies = ["Copied.\n" + textwrap.fill(story, 30) for story in stories[:6]]
    other = [" ".join(chance.choice(names) for _ in range(9)) for _ in range(30)]  # too short
    write("a.jsonl", [json.dumps({"text": text}) for text in stories + other])
    write("val.jsonl", [json.dumps({"text": text}) for text in copies + other])
    words = "--pretrain_data a.jsonl --val_data"
    load(f"{words} val.jsonl --dedup")
    assert "near copies  6 of 6 held-out documents, exact ones" in capsys.readouterr().out
    fresh = [" ".join(chance.sample(story.split(), 120)) for story in stories]
    write("fresh.jsonl", [json.dumps({"text": text}) for text in fresh + copies[:2]])
    load(f"{words} fresh.jsonl")
    assert "near copies  2 of 42 held-out documents, exact ones" in capsys.readouterr().out
    write("fresh.jsonl", [json.dumps({"text": text}) for text in fresh])
    load(f"{words} fresh.jsonl")
    assert "near copies" not in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minllama.text.duplicates.TRAIN_TOKENS", 1000)
        load(f"{words} fresh.jsonl")
        assert "near copies  none of 40 " in capsys.readouterr().out


def test_near_copies_beside_a_part_of_a_document(capsys):
    """What is held out of a huge document was counted as the end of the one before it."""
    chance = random.Random(0)
    texts = [
        " ".join(str(chance.randrange(1000)) for _ in range(size)) for size in [50] * 60 + [9000]
    ]
    copies = [f"Copied. {text}" for text in texts[:60]]
    write("a.jsonl", [json.dumps({"text": text}) for text in copies + texts])
    loaded = load("--pretrain_data a.jsonl --max_seq_len 128")
    trained, held_out = (
        documents_in(loaded.cache, data.stream) for data in (loaded.train, loaded.val)
    )
    partners = np.r_[60:120, 0:60]
    near = int((held_out[:120] & trained[partners]).sum())
    assert near > 1 and trained[120] and held_out[120]
    out = capsys.readouterr().out
    assert f"near copies  {near} of {held_out.sum()} held-out documents" in out


def test_stretches_are_those_of_the_letters(monkeypatch):
    """Alike where the bytes are, whatever is before them."""
    monkeypatch.setattr("minllama.text.duplicates.ONE_IN", 1)
    text = "".join(random.Random(1).choices("ab", k=300)).encode()
    hashes, places = _stretches(np.frombuffer(text, np.uint8))
    stretches = [text[i : i + STRETCH] for i in range(len(text) - STRETCH + 1)]
    assert places.tolist() == [*range(len(stretches))]
    assert len({*hashes.tolist()}) == len({*stretches})
    again = _stretches(np.frombuffer(b"xyz" + text[50:], np.uint8))[0]
    assert again[3:].tolist() == hashes[50:].tolist()


def test_byte_pieces_are_told_where_they_matter(capsys):
    """Between none and most of the text, where it is a warning."""
    write("a.txt", [*LINES, "从前有一座山，山里有庙。"])
    load("--pretrain_data a.txt --document_per_line")
    assert "byte pieces  3.4% of the text" in capsys.readouterr().out


def test_a_run_without_duplicates_is_resumed_so(monkeypatch):
    """--dedup is the run's: untyped it is kept, and it cannot be taken up halfway."""
    lines = [json.dumps({"text": line}) for line in LINES]
    write("text.jsonl", lines + lines[:5])
    assert pretrain("--dedup --epochs 1 --save_dir whole").status == 0
    with monkeypatch.context() as patch:
        stop = stop_after(3, patch)
        assert pretrain("--dedup --epochs 1 --save_dir parts", stop=stop).status == 130
    done = command(RESUME.replace("save_dir run", "save_dir parts"))
    assert done.status == 0 and "5 of 45 documents" in done.out
    assert_same_run("whole", "parts", "pretrain-epoch-1.pt")
    assert pretrain("--epochs 1 --max_steps 2").status == 0
    done = command(f"{RESUME} --dedup")
    assert done.status == 2 and "the text has changed" in done.error
    assert "--dedup True now, False then" in done.error
