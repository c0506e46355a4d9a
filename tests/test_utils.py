"""utils.py: holding documents out, chunks, labelled sentences as batches, and their orders."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vocabularies import vocabulary

from minllama.system.errors import UsageError
from minllama.text.labelled import UNLABELLED
from minllama.text.token_cache import TokenCache
from utils import (
    IGNORE_INDEX,
    LlamaDataset,
    PretrainDataset,
    TokenStream,
    batch_indices,
    bucketed_batches,
    count_chunks,
    documents_in,
    epoch_order,
    shuffled,
    split_documents,
    whole_stream,
)

# ---------------------------------------------------------------------------- holding out


def fake_cache(sizes: list[int]) -> TokenCache:
    """A cache of documents of given sizes, whose token i is i."""
    cache = TokenCache.__new__(TokenCache)
    cache.tokens = np.arange(sum(sizes), dtype=np.uint32)
    cache.document_starts = np.cumsum([0, *sizes])[:-1]
    cache.document_bytes = np.array(sizes) * 3
    cache.token_byte_lengths = np.full(sum(sizes), 3)
    contents = [(start, size) for start, size in zip(cache.document_starts, sizes, strict=True)]
    digests = [hashlib.blake2b(repr(c).encode(), digest_size=16).digest() for c in contents]
    cache.fingerprints = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    return cache


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=30),
    fraction=st.floats(0.001, 0.9),
    seed=st.integers(0, 2**31),
)
def test_split_parts_whole_documents(sizes: list[int], fraction: float, seed: int) -> None:
    """Every token is in one of the two, whole documents only, none of them empty."""
    assume(min(sizes) <= min(fraction, 0.5) * sum(sizes))
    cache = fake_cache(sizes)
    train, val = split_documents(cache, fraction, seed, chunk_length=8)
    assert val is not None and len(train) > 0 and len(val) > 0
    trained, held_out = train.read(0, len(train)), val.read(0, len(val))
    assert sorted([*trained, *held_out]) == list(range(sum(sizes)))
    document = np.repeat(np.arange(len(sizes)), sizes)
    assert not set(document[trained]) & set(document[held_out])
    assert len(val) <= 2 * fraction * sum(sizes)
    assert train.utf8_bytes == 3 * len(train) and val.utf8_bytes == 3 * len(val)
    again = split_documents(cache, fraction, seed, chunk_length=8)[1]
    assert np.array_equal(again.read(0, len(val)), held_out)


@pytest.mark.parametrize("files", [2, 3])
def test_split_of_a_few_large_documents(files: int) -> None:
    """The end of the last one: a whole one of two was 50 % of the text, held out for 5 %."""
    train, val = split_documents(fake_cache([1000] * files), 0.05, chunk_length=8)
    assert len(train) + len(val) == 1000 * files
    assert len(val) == pytest.approx(0.05 * 1000 * files, abs=8)
    assert val.read(0, len(val))[-1] == 1000 * files - 1


def test_split_of_many_documents_is_near_the_fraction() -> None:
    """5 % of ten thousand documents are about 5 % of the tokens, spread over the corpus."""
    cache = fake_cache([20] * 10_000)
    _, val = split_documents(cache, 0.05, chunk_length=8)
    assert 9_000 < len(val) < 11_000
    assert 80_000 < val.read(0, len(val)).mean() < 120_000
    other = split_documents(cache, 0.05, 1, chunk_length=8)[1]
    assert not np.array_equal(val.read(0, 100), other.read(0, 100))


def test_text_that_is_added_moves_no_document() -> None:
    """Once a document's fate followed from its number and the share that the others left."""
    few, more = fake_cache([20] * 1000), fake_cache([20] * 1500)
    held_out = [split_documents(cache, 0.1, chunk_length=8)[1] for cache in (few, more)]
    of_few, of_more = ({*stream.read(0, len(stream)).tolist()} for stream in held_out)
    assert of_few == {token for token in of_more if token < 20_000} and len(of_few) > 1500
    assert len(of_more) > len(of_few)


@pytest.mark.parametrize("count", [8, 20, 50, 1000])
def test_copies_are_on_the_same_side(count: int) -> None:
    """Held out and trained on as well they flatter the validation loss; also where few are."""
    cache = fake_cache([20] * count)
    cache.fingerprints = np.repeat(cache.fingerprints[::2], 2, axis=0)
    _, val = split_documents(cache, 0.15 if count < 1000 else 0.1, chunk_length=8)
    assert (np.flatnonzero(documents_in(cache, val)).reshape(-1, 2) % 2 == [0, 1]).all()


def test_a_scrap_is_no_validation() -> None:
    """One document of five tokens beside large ones was all that was held out of 80,005."""
    train, val = split_documents(fake_cache([5] + [10_000] * 8), 0.1, chunk_length=64)
    assert 7_900 < len(val) < 8_100 and len(train) + len(val) == 80_005


@pytest.mark.parametrize(
    ("seed", "documents"),
    [(0, [16, 19, 20, 28]), (1337, [0, 2, 5, 7, 10, 11, 23, 29, 34, 35, 38])],
)
def test_the_documents_held_out_are_for_ever(seed: int, documents: list[int]) -> None:
    """A resumed run must not train on what it was measured on: literal numbers, any version."""
    _, val = split_documents(fake_cache([2] * 40), 0.2, seed, chunk_length=8)
    assert (val.read(0, len(val))[::2] // 2).tolist() == documents


def test_split_of_one_document() -> None:
    """Blocks of chunks from all over it; too small a document holds nothing out.

    Once its end alone: of Shakespeare the model was measured on a play that it had read nothing of,
    and of a user's text its last chapter was never trained on.
    """
    train, val = split_documents(fake_cache([1000]), 0.1, chunk_length=64)
    assert (len(train), len(val), val.utf8_bytes) == (896, 104, 312)  # 2 of 16 chunks
    assert val.read(0, 104).tolist() == [*range(448, 512), *range(960, 1000)]
    for size in (2, 64, 65):
        train, val = split_documents(fake_cache([size]), 0.1, chunk_length=64)
        assert len(train) == size and val is None
    assert split_documents(fake_cache([1000, 2]), 0.0, chunk_length=64)[1] is None


@given(size=st.integers(1, 3000), fraction=st.floats(0.01, 0.5), chunk=st.integers(1, 70))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_split_of_one_document_loses_nothing(size: int, fraction: float, chunk: int) -> None:
    """Each token is on one side, and about the share that was asked for is held out."""
    train, val = split_documents(fake_cache([size]), fraction, chunk_length=chunk)
    held_out = [] if val is None else val.read(0, len(val)).tolist()
    assert sorted([*train.read(0, len(train)).tolist(), *held_out]) == [*range(size)]
    assert len(train) and len(held_out) <= fraction * size + chunk


@pytest.mark.parametrize("sizes", [[5, 9, 4, 7, 2, 6] * 5, [400, 500, 300, 600]])
def test_split_of_chosen_documents(sizes: list[int]) -> None:
    """As of a text that has no others, whether whole documents or the last chunks are held out."""
    cache, chosen = fake_cache(sizes), np.arange(len(sizes)) % 3 != 1
    train, val = split_documents(cache, 0.1, chunk_length=8, chosen=chosen)
    parts = [stream.read(0, len(stream)).tolist() for stream in (train, val)]
    assert sorted(sum(parts, [])) == np.flatnonzero(np.repeat(chosen, sizes)).tolist()
    assert len(val) <= 0.1 * (len(train) + len(val)) + 8 and val.utf8_bytes == 3 * len(val)
    document = np.repeat(np.arange(len(sizes)), sizes)
    for stream, tokens in zip((train, val), parts, strict=True):
        assert np.flatnonzero(documents_in(cache, stream)).tolist() == sorted({*document[tokens]})


def test_a_whole_cache_as_a_stream() -> None:
    """Validation files are read whole, with the bytes that bits per byte divide by."""
    stream = whole_stream(fake_cache([3, 2, 7]))
    assert stream.read(0, len(stream)).tolist() == list(range(12)) and stream.utf8_bytes == 36


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    stretches=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=9),
    ends=st.tuples(st.integers(0, 200), st.integers(0, 200)),
)
def test_stream_reads_across_stretches(
    stretches: list[tuple[int, int]], ends: tuple[int, int]
) -> None:
    """Like slicing the stretches laid one after the other."""
    tokens = np.arange(100)
    starts, stops = zip(*[(start, start + size) for start, size in stretches], strict=True)
    flat = np.concatenate([tokens[a:b] for a, b in zip(starts, stops, strict=True)])
    stream = TokenStream(tokens, np.array(starts), np.array(stops))
    start, stop = sorted(min(end, len(flat)) for end in ends)
    assert np.array_equal(stream.read(start, stop), flat[start:stop])
    assert [stream.locate(i) for i in range(len(flat))] == flat.tolist()
    part = stream.part(start, stop, np.arange(100) + 1)
    assert np.array_equal(part.read(0, len(part)), flat[start:stop])
    assert part.utf8_bytes == flat[start:stop].sum() + len(part)


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
    cache.token_byte_lengths = np.full(bos + 1, 3)
    stream, _ = split_documents(cache, held_out, seed, chunk_length=length)
    for part in (stream, stream.part(0, min(cut, len(stream))), stream.part(1, len(stream))):
        if len(part) < 2:
            continue
        for bos_id in (bos, None):
            dataset = PretrainDataset(part, length, bos_id=bos_id)
            chosen = epoch_order(len(dataset), seed, 0)[: 1 + seed]
            counted = int((dataset.batch(chosen)[1] != IGNORE_INDEX).sum())
            assert part.document_starts is not None
            assert dataset.count_targets(chosen) == counted
            part.document_starts, known = None, part.document_starts
            assert dataset.count_targets(chosen) == counted
            part.document_starts = known


def test_a_batch_is_padded_to_its_longest_only() -> None:
    """The short last chunk alone costs its own length."""
    dataset = PretrainDataset(stream_of(24), 10)
    assert dataset.batch([2])[0].tolist() == [[20, 21, 22]]
    with pytest.raises(IndexError):
        dataset.chunk(3)


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
    dataset = PretrainDataset.from_files([tmp_path], tokenizer, 16, cache_dir=tmp_path / "cache")
    ids = tokenizer.encode(lines, True, True)
    assert len(dataset) == -(-(len(ids) - 1) // 16) > 50
    chunks = [dataset.chunk(index).tolist() for index in range(len(dataset))]
    assert sum((chunk[:-1] for chunk in chunks), []) == ids[:-1]
    assert sum((chunk[1:] for chunk in chunks), []) == ids[1:]
    with pytest.raises(UsageError, match="--pretrain_data .*absent.txt: no such file"):
        PretrainDataset.from_files([tmp_path / "absent.txt"], tokenizer, 16, cache_dir=tmp_path)


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
    assert np.array_equal(np.concatenate(batches), shuffled(np.arange(23), 23, 7, 3))
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


# ---------------------------------------------------------------------------- labelled sentences


def test_labelled_batches(tmp_path: Path) -> None:
    """Order kept, lengths told, padded with 0, cut where asked."""
    path, tokenizer = tmp_path / "a.txt", vocabulary("ours")
    path.write_text("1 ||| two dogs\n\n0 ||| sat ||| the mat .\n-1 ||| it\n", encoding="utf-8")
    dataset = LlamaDataset(path, tokenizer, n_labels=2)
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
