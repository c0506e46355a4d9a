"""minllama/text/sources.py: the files, the documents and the hold-out of several sources."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import parse_options
from minllama.machine.ranks import Ranks
from minllama.system.errors import UsageError
from minllama.system.signals import StopRequest
from minllama.text.corpus import Texts, find_texts, load_texts
from minllama.text.stream import TokenStream
from tokenizer import Tokenizer
from utils import PretrainDataset

pytestmark = pytest.mark.usefixtures("empty_folder")


def write(path: str, documents: list[str]) -> list[str]:
    """A .jsonl of these documents, which are returned."""
    Path(path).parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    Path(path).write_text(lines, encoding="utf-8")
    return documents


def load(line: str) -> Texts:
    """The texts that flags mean, in chunks of 16 tokens unless the flags say otherwise."""
    words = ["--max_seq_len", "16"] * ("--max_seq_len" not in line)
    options = parse_options([*f"--option pretrain --cache_dir cache {line}".split(), *words])
    files = find_texts(options)
    return load_texts(options, files, Tokenizer(), stop=StopRequest(), ranks=Ranks())


def documents_of(dataset: PretrainDataset) -> list[list[int]]:
    """The documents of a data set's stream, as ids between BOS and EOS."""
    ids = dataset.stream.read(0, len(dataset.stream))
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == Tokenizer().bos_id))[1:]]


@pytest.fixture
def two_sources() -> dict[str, list[list[int]]]:
    """A folder of two files of 60 documents and a file of 30; the ids of each, by argument."""
    foxes = write("wiki/a.jsonl", [f"Fox number {n} ran home over the hill." for n in range(40)])
    foxes += write("wiki/b.jsonl", [f"Then fox {n} slept." for n in range(40, 60)])
    bears = write("code.jsonl", [f"Bear {n} ate all of the {n} cakes." for n in range(30)])
    encode = Tokenizer().encode
    texts = {"wiki": foxes, "code.jsonl": bears}
    return {name: [encode(text, True, True) for text in of] for name, of in texts.items()}


@pytest.mark.parametrize("fraction", [0, 0.1, 0.3])
def test_each_source_is_held_out_and_cut_by_itself(two_sources, fraction):
    """By the files: no document is on the side of the other source, no chunk is of both, and of
    each about the fraction is held out, in whole documents."""
    words = f"--pretrain_data wiki code.jsonl --data_weights 3 1 --val_fraction {fraction}"
    texts = load(words)
    assert [*texts.train.sources] == ["wiki", "code.jsonl"]
    for name, given_ids in two_sources.items():
        trained = documents_of(texts.train.by_source[name])
        held_out = [] if texts.val is None else documents_of(texts.val.by_source[name])
        assert sorted(trained + held_out) == sorted(given_ids)
        size = sum(map(len, given_ids))
        assert fraction * 0.5 * size <= sum(map(len, held_out)) <= 2 * fraction * size
        assert texts.train.sources[name] == sum(map(len, trained))
    whole = np.concatenate(
        [chunk[:-1] for chunk in map(texts.train.chunk, range(len(texts.train)))]
    )
    expected = [np.concatenate(documents_of(part))[:-1] for part in texts.train.by_source.values()]
    assert whole.tolist() == np.concatenate(expected).tolist()  # of each source all but its last
    for index in range(len(texts.train)):
        of_foxes = index < texts.train.source_chunks[0]
        assert texts.locate(index).startswith("wiki" if of_foxes else "code.jsonl")
    tokens, targets = texts.train.batch(range(len(texts.train)))
    assert texts.train.count_targets(range(len(texts.train))) == int((targets >= 0).sum())


def test_the_token_cache_is_that_of_the_same_files_without_weights(two_sources):
    """Weights change which chunk is read when, and no token: nothing is tokenized again."""
    load("--pretrain_data wiki code.jsonl")
    before = {path: path.stat().st_mtime_ns for path in Path("cache").glob("*.tokens")}
    load("--pretrain_data wiki code.jsonl --data_weights 3 1")
    load("--pretrain_data wiki code.jsonl --data_weights 1 3")
    assert {p: p.stat().st_mtime_ns for p in Path("cache").glob("*.tokens")} == before
    assert len(before) == 1


def test_held_out_files_are_measured_by_argument(two_sources):
    """Each --val_data argument is a source of its own; what is named there is not trained on."""
    words = "--pretrain_data wiki code.jsonl --data_weights 3 1 --val_data wiki/b.jsonl more.jsonl"
    more = write("more.jsonl", ["Not seen before.", "Nor this."])
    texts = load(words)
    assert documents_of(texts.train.by_source["wiki"]) == two_sources["wiki"][:40]
    assert documents_of(texts.train.by_source["code.jsonl"]) == two_sources["code.jsonl"]
    assert documents_of(texts.val.by_source["wiki/b.jsonl"]) == two_sources["wiki"][40:]
    seen = documents_of(texts.val.by_source["more.jsonl"])
    assert seen == [Tokenizer().encode(text, True, True) for text in more]


def test_at_most_so_many_held_out_tokens_of_each_source(two_sources):
    """--val_tokens cut off the end of the held-out text, and with it whole sources."""
    words = "--pretrain_data wiki code.jsonl --data_weights 3 1 --val_fraction 0.4"
    texts = load(words)
    cut = texts.cut(8, 50)
    assert [*cut.val.sources] == ["wiki", "code.jsonl"] and len(cut.val.stream) <= 50
    for name, part in cut.val.by_source.items():
        size = cut.val.sources[name]
        assert abs(size - 50 * texts.val.sources[name] / len(texts.val.stream)) < 1
        whole = texts.val.by_source[name].stream
        assert part.stream.read(0, size).tolist() == whole.read(0, size).tolist()
    assert [*texts.cut(16, 10**9).val.sources.values()] == [*texts.val.sources.values()]


def test_dropped_duplicates_leave_the_sources_what_is_theirs(two_sources):
    """A document that both have is the first one's."""
    write("copies.jsonl", [f"Then fox {n} slept." for n in range(40, 60)] + ["A new one."] * 9)
    words = "--pretrain_data wiki copies.jsonl --data_weights 1 1 --max_seq_len 4 --val_fraction 0"
    both = load(words)
    assert len(documents_of(both.train.by_source["copies.jsonl"])) == 29
    texts = load(f"{words} --dedup")
    assert documents_of(texts.train.by_source["wiki"]) == two_sources["wiki"]
    assert len(documents_of(texts.train.by_source["copies.jsonl"])) == 1


def test_the_context_fits_the_smallest_source():
    """Where none is named; the text as a whole would have had a longer one."""
    write("a.jsonl", [f"Fox number {n} ran home over the hill and far away." for n in range(900)])
    write("b.jsonl", [f"Bear {n} ate all of the {n} cakes." for n in range(40)])
    words = "--option pretrain --cache_dir cache --pretrain_data a.jsonl b.jsonl --epochs 999"
    contexts = []
    for weights in ("", "--data_weights 1 1"):
        options = parse_options(f"{words} {weights}".split())
        files = find_texts(options)
        texts = load_texts(options, files, Tokenizer(), stop=StopRequest(), ranks=Ranks())
        contexts.append(texts.context)
    assert contexts[0] == 1024 and contexts[1] in (256, 512)
    assert min(texts.train.sources.values()) >= texts.context


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.jsonl b.jsonl --data_weights 1", r"--data_weights 1: .* is 1 and .* names 2 sources"),
        ("a.jsonl --data_weights 1 2.5", r"--data_weights 1 2.5: .* is 2 and .* names 1 sources"),
        ("a.jsonl b.jsonl --data_weights 1 0", "--data_weights: 0 must be above 0"),
        ("a.jsonl b.jsonl --data_weights -1 1", "--data_weights: -1 must be above 0"),
        ("a.jsonl b.jsonl --data_weights nan 1", "--data_weights: 'nan' is not a number"),
        ("a.jsonl b.jsonl --data_weights 1 inf", "--data_weights: 'inf' is not a number"),
        ("a.jsonl ?.jsonl --data_weights 1 1", r"a.jsonl is in a.jsonl and again in \?.jsonl"),
        ("a.jsonl ./a.jsonl --data_weights 1 1", "in a.jsonl and again in ./a.jsonl"),
        ("a.jsonl a.jsonl --data_weights 1 1", "in a.jsonl and again in a.jsonl"),
        ("a.jsonl t.jsonl --data_weights 1 1", "t.jsonl: has 4 tokens .* a chunk of 16: give"),
        ("a.jsonl e.jsonl --data_weights 1 1", "e.jsonl: has 0 tokens to train on, fewer than"),
        ("a.jsonl s.jsonl --data_weights 1 1", "s.jsonl: its 16 tokens are too few to hold some"),
        ("a.jsonl b.jsonl --data_weights 1 1 --val_data b.jsonl", "b.jsonl: --val_data names all"),
        ("a.jsonl --data_weights 1 --val_data b.jsonl e.jsonl", "--val_data e.jsonl: empty"),
        ("a.jsonl --data_weights 1 --val_data b.jsonl ?.jsonl", "b.jsonl is in b.jsonl and again"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_met_are_refused(words, message):
    """One line, that names flag, value and remedy."""
    for name in ("a", "b"):
        write(f"{name}.jsonl", [f"The {name} number {n} ran home." for n in range(30)])
    write("t.jsonl", ["Run"])
    write("e.jsonl", [])
    text = "one" + " one" * 40
    while len(Tokenizer().encode(text, True, True)) > 16:
        text = text[:-4]
    write("s.jsonl", [text])
    with pytest.raises(UsageError, match=message) as caught:
        load(f"--pretrain_data {words}")
    assert "\n" not in str(caught.value)


def test_weights_need_sources():
    """The embedded texts, which nobody named, have none."""
    with pytest.raises(UsageError, match="names no sources: give each"):
        parse_options("--option pretrain --data_weights 1 1".split())
    options = parse_options("--option pretrain --resume auto --data_weights 1 1".split())
    with pytest.raises(UsageError, match="--pretrain_data names: name them"):
        find_texts(options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(2, 60), min_size=1, max_size=4), length=st.integers(1, 12))
def test_chunks_of_sources_are_those_of_each_alone(sizes, length):
    """By data sets of each source alone; bytes and targets add up, too."""
    tokens = np.arange(sum(sizes), dtype=np.uint16) % 200
    names = [f"source {number}" for number in range(len(sizes))]
    whole = TokenStream(tokens, np.array([0]), np.array([len(tokens)]))
    dataset = PretrainDataset(whole, length, sources=dict(zip(names, sizes, strict=True)))
    ends = np.cumsum(sizes)
    alone = [
        PretrainDataset(TokenStream(tokens, np.array([end - size]), np.array([end])), length)
        for size, end in zip(sizes, ends, strict=True)
    ]
    expected = [part.chunk(i).tolist() for part in alone for i in range(len(part))]
    assert [dataset.chunk(i).tolist() for i in range(len(dataset))] == expected
    assert dataset.count_targets(range(len(dataset))) == sum(sizes) - len(sizes)
    for part, name in zip(alone, names, strict=True):
        found = dataset.by_source[name]
        assert [found.chunk(i).tolist() for i in range(len(found))] == [
            part.chunk(i).tolist() for i in range(len(part))
        ]


def test_bytes_of_sources_are_those_of_each_alone():
    """The first token of a source is no target, also where it is within a document."""
    tokenizer = Tokenizer()
    ids = [i for text in ("Fox ran.", "Bear") for i in tokenizer.encode(text, True, True)]
    for first in range(2, len(ids) - 1):

        def cut(start: int, stop: int, **sources: int) -> PretrainDataset:
            stream = TokenStream(np.array(ids), np.array([start]), np.array([stop]))
            return PretrainDataset(stream, 4, tokenizer=tokenizer, sources=sources)

        both = cut(0, len(ids), a=first, b=len(ids) - first)
        assert both.utf8_bytes == cut(0, first).utf8_bytes + cut(first, len(ids)).utf8_bytes
