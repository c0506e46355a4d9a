"""Streams of tokens against slices of them, and documents held out."""

from __future__ import annotations

import numpy as np
import pytest
from caches import fake_cache
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minllama.text.stream import TokenStream, documents_in, split_documents, whole_stream

# ---------------------------------------------------------------------------- holding out


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=30),
    fraction=st.floats(0.001, 0.9),
)
def test_split_parts_whole_documents(sizes: list[int], fraction: float) -> None:
    """Every token is in one of the two, none of them empty; whole documents, but large ones."""
    large = [size > fraction * sum(sizes) for size in sizes]
    assume(min(sizes) <= min(fraction, 0.5) * sum(sizes))
    assume(min(sizes) >= 0.1 * fraction * sum(sizes))  # none is a scrap
    cache = fake_cache(sizes)
    train, val = split_documents(cache, fraction, chunk_length=8)
    assert val is not None and len(train) > 0 and len(val) > 0
    trained, held_out = train.read(0, len(train)), val.read(0, len(val))
    assert sorted([*trained, *held_out]) == list(range(sum(sizes)))
    document = np.repeat(np.arange(len(sizes)), sizes)
    parted = set(document[trained]) & set(document[held_out])
    most_is_large = 2 * sum(np.array(sizes)[large]) > sum(sizes)
    assert not parted or most_is_large and all(large[number] for number in parted)
    assert len(val) <= 2 * fraction * sum(sizes) + 8 * most_is_large
    again = split_documents(cache, fraction, chunk_length=8)[1]
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


@pytest.mark.parametrize("place", [0, 700, 1000])
def test_a_huge_document_beside_small_ones(place: int) -> None:
    """Of both a twentieth: once nearly all of 1,000 small ones were held out for the huge one."""
    sizes = [20] * place + [380_000] + [20] * (1000 - place)
    cache = fake_cache(sizes)
    train, val = split_documents(cache, 0.05, chunk_length=64)
    trained, held_out = train.read(0, len(train)), val.read(0, len(val))
    assert np.array_equal(np.sort(np.concatenate([trained, held_out])), np.arange(400_000))
    assert (np.diff(trained) > 0).all() and (np.diff(held_out) > 0).all()
    huge = (held_out >= 20 * place) & (held_out < 20 * place + 380_000)
    assert huge.sum() == pytest.approx(19_000, abs=64)
    assert 500 < (~huge).sum() < 1500
    document = np.repeat(np.arange(1001), sizes)
    assert {*document[trained]} & {*document[held_out]} == {place}


@pytest.mark.parametrize("sizes", [[14_338], [10_242, *[50] * 20], [2000, *[20] * 90]])
def test_what_is_held_out_is_neither_crumbs_nor_far_more(sizes: list[int]) -> None:
    """The last chunk was, where it was the only one: of two tokens; or a whole one of 1,024 of
    3,800, beside small documents which had enough.
    """
    train, val = split_documents(fake_cache(sizes), 0.05, chunk_length=1024)
    assert len(train) + len(val) == sum(sizes)
    assert len(val) == pytest.approx(0.05 * sum(sizes), rel=0.5)


def test_the_documents_held_out_are_for_ever() -> None:
    """A resumed run must not train on what it was measured on: literal numbers, any version."""
    _, val = split_documents(fake_cache([2] * 40), 0.2, chunk_length=8)
    assert (val.read(0, len(val))[::2] // 2).tolist() == [16, 19, 20, 28]


def test_split_of_one_document() -> None:
    """Blocks of chunks from all over it; too small a document holds nothing out.

    Once its end alone: of Shakespeare the model was measured on a play that it had read nothing of,
    and of a user's text its last chapter was never trained on.
    """
    train, val = split_documents(fake_cache([1000]), 0.1, chunk_length=64)
    assert (len(train), len(val)) == (896, 104)  # 2 of 16 chunks
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
    assert len(val) <= 0.1 * (len(train) + len(val)) + 8
    document = np.repeat(np.arange(len(sizes)), sizes)
    for stream, tokens in zip((train, val), parts, strict=True):
        assert np.flatnonzero(documents_in(cache, stream)).tolist() == sorted({*document[tokens]})


def test_a_whole_cache_as_a_stream() -> None:
    """Validation files are read whole."""
    stream = whole_stream(fake_cache([3, 2, 7]))
    assert stream.read(0, len(stream)).tolist() == list(range(12))


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
    part = stream.select([(start, stop)])
    assert np.array_equal(part.read(0, len(part)), flat[start:stop])
