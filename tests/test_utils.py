"""utils.py: chunks, labelled sentences as batches, and their orders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from caches import fake_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import vocabulary

from minllama.system.errors import UsageError
from minllama.text.labelled import UNLABELLED
from minllama.text.reading import Reading
from minllama.text.stream import TokenStream, split_documents, whole_stream
from minllama.text.token_cache import build_or_load
from tokenizer import Tokenizer
from utils import (
    IGNORE_INDEX,
    LlamaDataset,
    Mixture,
    PretrainDataset,
    batch_indices,
    bucketed_batches,
    count_chunks,
    epoch_order,
    shuffled,
)

# ---------------------------------------------------------------------------- chunks


def stream_of(size: int) -> TokenStream:
    return TokenStream(np.arange(size, dtype=np.uint16), np.array([0]), np.array([size]))


@pytest.mark.parametrize("size", [2, 9, 10, 11, 12, 100, 101, 102])
def test_chunks_cover_every_token_once(size: int) -> None:
    """chunk-1, chunk and chunk+1 tokens: the last chunk is short, never dropped, never empty."""
    dataset = PretrainDataset(stream_of(size), 10)
    assert len(dataset) == count_chunks(size, 10) == -(-(size - 1) // 10) >= 1
    tokens, targets = dataset.batch(range(len(dataset)))
    assert tokens.shape == targets.shape == (len(dataset), min(10, size - 1))
    assert tokens.dtype == targets.dtype == torch.int64
    real = targets != IGNORE_INDEX
    assert tokens[real].tolist() == list(range(size - 1))
    assert targets[real].tolist() == list(range(1, size))
    assert real.sum() == size - 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=3),
    length=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
)
def test_each_epoch_reads_all_of_every_source_from_another_token(
    sizes: list[int], length: int, seed: int
) -> None:
    """As many chunks in each epoch, none of them longer; of each source round from some token to it
    again, every pair of neighbours once but the one at which it was cut."""
    whole = sum(sizes)
    sources = {str(i): size for i, size in enumerate(sizes)}
    dataset = PretrainDataset(stream_of(whole), length, sources=sources, seed=seed)
    firsts = set()
    for epoch in range(6):
        read: list[list[int]] = [[] for _ in sizes]
        for index in range(len(dataset)):
            chunk = dataset.chunk(epoch * len(dataset) + index).tolist()
            assert 2 <= len(chunk) <= length + 1
            source = int(np.searchsorted(np.cumsum(sizes), chunk[0], side="right"))
            assert not read[source] or read[source].pop() == chunk[0]  # the target before it
            read[source] += chunk
        for source, (size, tokens) in enumerate(zip(sizes, read, strict=True)):
            first = sum(sizes[:source])
            turned = [first + (tokens[0] - first + i) % size for i in range(size)]
            assert tokens == turned and tokens[0] - first < length
            assert epoch or tokens[0] == first
        firsts.add(tuple(tokens[0] for tokens in read))
    assert len(firsts) > 1 or max(min(size, length) for size in sizes) < 12


def test_where_epochs_are_cut_is_for_ever() -> None:
    """A resumed run reads what the uninterrupted one would have: literal numbers, any version."""
    dataset = PretrainDataset(stream_of(1000), 256, seed=1337)
    starts = [int(dataset.bounds([epoch * len(dataset)])[0][0]) for epoch in range(6)]
    assert starts == [0, 244, 9, 162, 35, 210]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=12),
    held_out=st.floats(0, 0.5),
    cut=st.integers(2, 60),
    length=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_targets_are_counted_without_reading(
    sizes: list[int], held_out: float, cut: int, length: int, seed: int
) -> None:
    """Ranks know each other's targets without exchanging them: whichever chunks, also of a stream
    with holes, which ends within a document, and whose first tokens belong to an earlier one."""
    cache, bos = fake_cache(sizes), sum(sizes)
    cache.tokens[cache.document_starts] = bos
    stream, _ = split_documents(cache, held_out, chunk_length=length)
    cuts = [(0, min(cut, len(stream)))], [(1, len(stream))]
    for part in (stream, *map(stream.select, cuts)):
        if len(part) < 2:
            continue
        for tokenizer in (SimpleNamespace(bos_id=bos, eos_id=bos + 1), None):
            dataset = PretrainDataset(part, length, tokenizer=tokenizer)
            chosen = epoch_order(3 * len(dataset), seed, 0)[: 1 + seed]  # of three epochs
            counted = int((dataset.batch(chosen)[1] != IGNORE_INDEX).sum())
            assert part.document_starts is not None
            assert dataset.count_targets(chosen) == counted
            part.document_starts, known = None, part.document_starts
            assert dataset.count_targets(chosen) == counted
            part.document_starts = known


@pytest.mark.parametrize("name", ["embedded", "no-dummy-prefix"])
@pytest.mark.parametrize("cut", [7, 20, 33, None])
def test_bytes_are_those_that_the_targets_spell(name: str, cut: int | None) -> None:
    """Of a stream that was cut they counted the space put before each document, and of one that
    begins within a document its first token, which is none to predict: bits per byte were too low,
    by a tenth where documents are short."""
    tokenizer, texts = vocabulary(name), ["It ran.", " naïve 你好", "One day\na fox", "x"] * 3
    documents = [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    ids = sum(documents, [])[:cut]
    stream = TokenStream(np.array(ids), np.array([0]), np.array([len(ids)]))
    dataset = PretrainDataset(stream, 5, tokenizer=tokenizer)
    spelt = 0
    for text, document in zip(texts, documents, strict=True):
        if len(document) <= len(ids):
            spelt += len(text.encode())
        else:  # the part of it that the cut has left
            spelt += spelt_bytes(tokenizer, ids)
        ids = ids[len(document) :]
    assert dataset.utf8_bytes == spelt
    later = stream.select([(3, len(stream))])  # begins within the first document
    opening = spelt_bytes(tokenizer, documents[0][:4])
    assert PretrainDataset(later, 5, tokenizer=tokenizer).utf8_bytes == spelt - opening
    assert PretrainDataset(stream, 5).utf8_bytes is None


def spelt_bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Bytes of the beginning of a document, byte tokens taken one by one."""
    spelt = b""
    for i in ids:
        piece = tokenizer.sp_model.id_to_piece(i)
        if tokenizer.sp_model.is_byte(i):
            spelt += bytes([int(piece[1:-1], 16)])
        elif i not in (tokenizer.bos_id, tokenizer.eos_id):
            spelt += piece.replace("▁", " ").encode()
    dummy = tokenizer.sp_model.normalize("x") != "x"
    return len(spelt) - (dummy and len(spelt) > 0)


def test_a_batch_is_padded_to_its_longest_only() -> None:
    """The short last chunk alone costs its own length."""
    dataset = PretrainDataset(stream_of(24), 10)
    assert dataset.batch([2])[0].tolist() == [[20, 21, 22]]
    with pytest.raises(IndexError):
        dataset.chunk(-1)


def test_too_little_text() -> None:
    """One token has nothing to predict."""
    assert count_chunks(0, 10) == count_chunks(1, 10) == 0
    for size in (0, 1):
        with pytest.raises(UsageError, match="at least two"):
            PretrainDataset(stream_of(size), 10)
    with pytest.raises(UsageError, match="--max_seq_len 0"):
        PretrainDataset(stream_of(5), 0)


def test_chunks_of_files(tmp_path: Path) -> None:
    """The length cuts the stream and never the text: any file once gave "1 chunk"."""
    lines = "".join(f"the cat sat on mat {number}\n" for number in range(100))
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    tokenizer = vocabulary("ours")
    cache = build_or_load([tmp_path / "a.txt"], tokenizer, Reading(), tmp_path / "cache")
    dataset = PretrainDataset(whole_stream(cache), 16, tokenizer=tokenizer)
    ids = tokenizer.encode(lines, True, True)
    assert len(dataset) == -(-(len(ids) - 1) // 16) > 50
    chunks = [dataset.chunk(index).tolist() for index in range(len(dataset))]
    assert sum((chunk[:-1] for chunk in chunks), []) == ids[:-1]
    assert sum((chunk[1:] for chunk in chunks), []) == ids[1:]


# ---------------------------------------------------------------------------- orders


def test_the_order_of_chunks_is_for_ever() -> None:
    """A resumed run reads what the uninterrupted one would have: literal numbers, any version."""
    numbers = [shuffled(np.arange(8), 8, 1337, epoch).tolist() for epoch in (0, 1)]
    assert numbers == [[3, 1, 7, 2, 6, 4, 0, 5], [6, 7, 2, 3, 0, 1, 4, 5]]


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_order_of_chunks_has_each_once(n: int, seed: int, epoch: int) -> None:
    """Asked for in one piece or in several."""
    order = shuffled(np.arange(n), n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert shuffled(np.arange(n)[n // 2 :], n, seed, epoch).tolist() == order[n // 2 :].tolist()


@pytest.mark.parametrize("n", [1000, 1 << 14, (1 << 40) + 1])
def test_the_order_of_chunks_is_shuffled(n: int) -> None:
    """As far from their places as of a random order, neighbours apart, no table of a trillion."""
    places = np.arange(1000) * (n // 1000)
    orders = [shuffled(places, n, *key) / n for key in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        assert 0.29 < np.abs(order - places / n).mean() < 0.38  # 1/3
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.12
        assert abs(np.corrcoef(order, places)[0, 1]) < 0.12
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 0.12


def test_epoch_order_is_for_ever() -> None:
    """A resumed run reads what the uninterrupted one would have: literal numbers, any version."""
    assert epoch_order(8, 1337, 0).tolist() == [5, 1, 6, 7, 4, 0, 2, 3]
    assert epoch_order(8, 1337, 1).tolist() == [2, 6, 3, 7, 5, 4, 0, 1]
    order = epoch_order(1000, 1, 2)
    assert sorted(order) == list(range(1000))
    with pytest.raises(ValueError):
        order[0] = 3  # shared by all callers


def test_batches_of_an_epoch() -> None:
    """Each chunk once; the last batch is short; no batch beyond it."""
    batches = [batch_indices(23, 5, 7, 3, index) for index in range(5)]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate(batches) - 3 * 23, shuffled(np.arange(23), 23, 7, 3))
    with pytest.raises(IndexError):
        batch_indices(23, 5, 7, 3, 5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 5),
)
def test_bucketed_batches(lengths: list[int], batch_size: int, epoch: int) -> None:
    """Each sentence once an epoch, in as many batches as there must be, the same each time."""
    sizes = np.array(lengths)
    batches = bucketed_batches(sizes, batch_size, 5, epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    again = bucketed_batches(sizes, batch_size, 5, epoch)
    assert all(map(np.array_equal, batches, again))


def test_bucketing_saves_padding() -> None:
    """The point of it: padded tokens are few, and epochs still differ."""
    lengths = np.random.default_rng(0).integers(5, 60, 2000)
    batches = bucketed_batches(lengths, 16, 0, 0)
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.1 * lengths.sum()
    assert not np.array_equal(batches[0], bucketed_batches(lengths, 16, 0, 1)[0])


# ---------------------------------------------------------------------------- weighted sources


def mixture_of(sizes: list[int], weights: list[float], length: int) -> Mixture:
    """The order of sources of so many tokens each."""
    sources = {str(number): size for number, size in enumerate(sizes)}
    return Mixture(PretrainDataset(stream_of(sum(sizes)), length, sources=sources), weights)


def sources_of(numbers: np.ndarray, sizes: list[int], length: int) -> np.ndarray:
    """Which source each chunk is of, whatever its epoch."""
    chunks = [count_chunks(size, length) for size in sizes]
    return np.searchsorted(np.cumsum(chunks), numbers % sum(chunks), side="right")


some_sources = st.lists(
    st.tuples(st.integers(2, 90), st.floats(0.05, 20)), min_size=1, max_size=5
)  # tokens and weight


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_sources, st.integers(1, 12), st.integers(0, 2**63 - 1), st.integers(0, 5000))
def test_any_positions_hold_of_each_source_its_share(sources, length, seed, first) -> None:
    """By counting in every window of 200 positions; shares by hand, of tokens: a source whose last
    chunk is short has more of the chunks than of the tokens."""
    sizes, weights = map(list, zip(*sources, strict=True))
    per_chunk = [(size - 1) / count_chunks(size, length) for size in sizes]
    shares = np.array(weights) / per_chunk
    shares /= shares.sum()
    mixture = mixture_of(sizes, weights, length)
    found = sources_of(mixture.chunks_at(range(first, first + 200), seed), sizes, length)
    counts = np.cumsum(found[:, None] == range(len(sizes)), axis=0)
    excess = np.concatenate([[0 * shares], counts]) - np.arange(201)[:, None] * shares
    # The farthest that any window is off: from the lowest to the highest before it or after it.
    assert (excess.max(axis=0) - excess.min(axis=0)).max() <= len(sizes) - 1 + 1e-6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_sources, st.integers(1, 12), st.integers(0, 2**63 - 1))
def test_each_pass_over_a_source_has_every_chunk_once(sources, length, seed) -> None:
    """And positions asked for one by one, in any pieces, hold the same."""
    sizes, weights = map(list, zip(*sources, strict=True))
    mixture = mixture_of(sizes, weights, length)
    numbers = mixture.chunks_at(range(300), seed)
    found = sources_of(numbers, sizes, length)
    first, whole = 0, sum(count_chunks(size, length) for size in sizes)
    for source, size in enumerate(sizes):
        count, own = count_chunks(size, length), numbers[found == source]
        for start in range(0, len(own) - count + 1, count):
            begin = start // count * whole + first  # of this pass, which is cut in its own way
            assert sorted(own[start : start + count] - begin) == list(range(count))
        first += count
    pieces = [mixture.chunks_at(range(at, min(300, at + 71)), seed) for at in range(0, 300, 71)]
    assert np.concatenate(pieces).tolist() == numbers.tolist()
    assert mixture.chunks_at([299], seed).tolist() == numbers[-1:].tolist()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_sources, st.integers(1, 12))
def test_weights_are_shares_of_the_tokens(sources, length) -> None:
    """By adding up the tokens of ten epochs, each of which has as many as all sources have."""
    sizes, weights = map(list, zip(*sources, strict=True))
    mixture = mixture_of(sizes, weights, length)
    sources = {str(number): size for number, size in enumerate(sizes)}
    dataset = PretrainDataset(stream_of(sum(sizes)), length, sources=sources)
    numbers = mixture.chunks_at(range(10 * mixture.epoch_chunks), 1)
    tokens = np.array([len(dataset.chunk(number)) - 1 for number in numbers])
    read = np.bincount(sources_of(numbers, sizes, length), tokens, len(sizes))
    expected = 10 * (sum(sizes) - len(sizes)) * np.array(weights) / sum(weights)
    # Of ten chunks that end an epoch, k - 1 more or fewer, and one that is short.
    assert np.abs(read - expected).max() <= (10 + len(sizes)) * length


def test_one_weighted_source_is_read_as_without_weights() -> None:
    """Whatever the weight: the order of its chunks is that of every run."""
    mixture = mixture_of([233], [0.3], 10)
    assert mixture.epoch_chunks == count_chunks(233, 10) == 24
    expected = [epoch * 24 + shuffled(np.arange(24), 24, 1337, epoch) for epoch in range(3)]
    assert mixture.chunks_at(range(72), 1337).tolist() == np.concatenate(expected).tolist()


def test_the_order_of_weighted_chunks_is_for_ever() -> None:
    """A resumed run reads what the uninterrupted one would have: literal numbers, any version."""
    mixture = mixture_of([41, 25, 30], [3, 1, 0.1], 8)
    epochs, order = np.divmod(mixture.chunks_at(range(24), 1337), 5 + 3 + 4)
    order = order.tolist()
    assert order == [3, 7, 1, 4, 2, 6, 0, 4, 1, 5, 2, 3, 5, 0, 3, 2, 7, 4, 1, 0, 9, 2, 0, 3]
    of_the_first = [epoch for epoch, chunk in zip(epochs.tolist(), order, strict=True) if chunk < 5]
    assert of_the_first == [i // 5 for i in range(len(of_the_first))]
    assert (mixture.chunks_at(range(10**12, 10**12 + 4), 1337) % 12).tolist() == [2, 4, 6, 0]


# ---------------------------------------------------------------------------- labelled sentences


def test_labelled_batches(tmp_path: Path) -> None:
    """Order kept, lengths told, padded with 0, cut where asked."""
    path, tokenizer = tmp_path / "a.txt", vocabulary("ours")
    path.write_text("1 ||| two dogs\n\n0 ||| sat ||| the mat .\n-1 ||| it\n", encoding="utf-8")
    dataset = LlamaDataset(path, tokenizer, labels=["0", "1"])
    assert len(dataset) == 3 and dataset.cut == 0
    assert dataset.examples[1].sentence == "sat ||| the mat ."
    batch = dataset.collate([2, 0])
    assert batch.labels.tolist() == [UNLABELLED, 1]
    for row, index in enumerate((2, 0)):
        sentence = dataset.examples[index].sentence
        length = int(batch.lengths[row])
        assert batch.tokens[row, :length].tolist() == tokenizer.encode(sentence, True, False)
        assert not batch.tokens[row, length:].any()
    assert batch.tokens.shape[1] == batch.lengths.max()
    short = LlamaDataset(path, tokenizer, max_sentence_len=2)
    assert short.ids[1] == tokenizer.encode("sat ||| the mat .", True, False)[:3]
    lengths = [len(tokenizer.encode(e.sentence, False, False)) for e in dataset.examples]
    assert short.cut == sum(length > 2 for length in lengths) > 0
    assert LlamaDataset(path, tokenizer, max_sentence_len=max(lengths)).cut == 0


def test_length_sorted_batches(tmp_path: Path) -> None:
    """Every sentence once, longest first, by its place in the file."""
    lines = "".join(f"0 ||| {'two dogs ' * (1 + 7 * i % 5)}\n" for i in range(11))
    (tmp_path / "a.txt").write_text(lines, encoding="utf-8")
    dataset = LlamaDataset(tmp_path / "a.txt", vocabulary("ours"))
    batches = dataset.length_sorted_batches(4)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    order = np.concatenate(batches)
    assert sorted(order) == list(range(11))
    assert (np.diff(dataset.lengths[order]) <= 0).all()


def test_labelled_sentences_are_held_out_by_their_text(tmp_path):
    """Doubles fall together, or what was trained on would be measured; order changes nothing."""
    lines = [f"{i % 2} ||| sentence {i // 2}\n" for i in range(200)]
    parts = []
    for order in (lines, lines[::-1]):
        (tmp_path / "a.txt").write_text("".join(order), encoding="utf-8")
        train, dev = LlamaDataset(tmp_path / "a.txt", vocabulary("ours")).split(0.1)
        sentences = [[example.sentence for example in part.examples] for part in (train, dev)]
        assert [*map(len, sentences)] == [len(train), len(dev)] == [180, 20]
        assert not {*sentences[0]} & {*sentences[1]}
        assert [len(ids) for ids in dev.ids] == dev.lengths.tolist()
        assert vocabulary("ours").decode(dev.ids[3]) == sentences[1][3]
        parts.append([*map(set, sentences)])
    assert parts[0] == parts[1]
    (tmp_path / "a.txt").write_text("0 ||| a\n1 ||| a\n", encoding="utf-8")
    with pytest.raises(UsageError, match="too few sentences"):
        LlamaDataset(tmp_path / "a.txt", vocabulary("ours")).split(0.5)
