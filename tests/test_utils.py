"""The data sections of utils.py: token cache, hold-out, chunks, labelled sentences."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import utils as data
from config import UsageError
from tokenizer import Reading, Tokenizer, train_vocabulary
from utils import (
    IGNORE_INDEX,
    UNLABELLED,
    BadCache,
    Interrupted,
    LlamaDataset,
    PretrainDataset,
    TokenCache,
    TokenStream,
    batch_indices,
    bucketed_batches,
    build_or_load,
    count_batches,
    epoch_order,
    read_labelled,
    split_documents,
)

STORY = "the cat sat on the mat .\nit ran home with two dogs .\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "a.txt").write_text(STORY * 5, encoding="utf-8")
    train_vocabulary([folder / "a.txt"], folder / "a.model", vocab_size=300)
    return Tokenizer(tokenizer_model=folder / "a.model")


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Three files, one of them blank; old enough for their hashes to be remembered."""
    texts = {"a.txt": STORY * 3, "b.txt": "\n", "c.txt": "two dogs\n\nsat ﬁ\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        os.utime(tmp_path / name, (1e9, 1e9))
    return [tmp_path / name for name in texts]


def build(files: list[Path], tokenizer: Tokenizer, folder: Path, **options: object) -> TokenCache:
    reading = options.pop("reading", Reading(document_per_line=True))
    return build_or_load(files, tokenizer, reading, folder, progress=False, **options)


# ------------------------------------------------------------------------------- the token cache


def test_cache_holds_every_document(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """BOS ids EOS a document, in order, with the counts by file that are printed."""
    cache = build(corpus, tokenizer, tmp_path / "cache")
    lines = [line for path in corpus for line in path.read_text("utf-8").split("\n") if line]
    expected = [tokenizer.encode(line, True, True) for line in lines]
    assert cache.tokens.tolist() == sum(expected, [])
    assert cache.tokens.dtype == np.uint16 and len(cache) == sum(map(len, expected))
    assert cache.document_bytes.tolist() == [len(line.encode()) for line in lines]
    assert cache.document_starts.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
    assert cache.file_documents.tolist() == [6, 0, 2]
    by_file = [sum(map(len, expected[:6])), 0, sum(map(len, expected[6:]))]
    assert cache.file_tokens.tolist() == by_file
    assert cache.chunks_per_file(10) == [-(-(n - 1) // 10) if n else 0 for n in by_file]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_cache_is_used_again_and_remade_when_stale(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Content decides, not names and dates; what changed is said."""
    folder = tmp_path / "cache"
    first = build(corpus, tokenizer, folder)
    assert first.rebuilt_because == "there was none"
    assert build(corpus, tokenizer, folder).rebuilt_because is None
    os.utime(corpus[0])  # touched, same content
    assert build(corpus, tokenizer, folder).rebuilt_because is None
    corpus[0].write_text("two dogs .\n", encoding="utf-8")
    again = build(corpus, tokenizer, folder)
    assert "changed" in (again.rebuilt_because or "") and again.file_documents[0] == 1
    assert len(list(folder.glob("*.tokens"))) == 1  # the stale one made way
    other = build(corpus, tokenizer, folder, reading=Reading())
    assert other.rebuilt_because == "there was none" and len(other.document_starts) == 2
    assert build(corpus, tokenizer, folder).rebuilt_because is None


def test_the_memo_is_not_believed_too_soon(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A second write within the clock's grain leaves size and time alike: git's racy index."""
    path, folder = corpus[0], tmp_path / "cache"
    now = time.time_ns()
    path.write_text("two dogs\n", encoding="utf-8")
    os.utime(path, ns=(now, now))
    build([path], tokenizer, folder)
    path.write_text("two cats\n", encoding="utf-8")
    os.utime(path, ns=(now, now))
    assert tokenizer.decode(build([path], tokenizer, folder).tokens) == "two cats"


def test_an_old_file_is_not_hashed_again(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 10 GB corpus must not be read at each start."""
    build(corpus, tokenizer, tmp_path / "cache")
    monkeypatch.setattr(data, "_hash_file", None)
    assert build(corpus, tokenizer, tmp_path / "cache").rebuilt_because is None


def test_every_flipped_byte_and_every_truncation_is_found(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Damaged tokens would train a damaged model in silence."""
    (tmp_path / "a.txt").write_text("two dogs\nsat\n", encoding="utf-8")
    cache = build([tmp_path / "a.txt"], tokenizer, tmp_path / "cache")
    whole = cache.path.read_bytes()
    copy = tmp_path / "copy.tokens"
    copy.write_bytes(whole)
    assert TokenCache(copy).tokens.tolist() == cache.tokens.tolist()
    for at in range(len(whole)):
        for bits in (0x01, 0x80, 0xFF):
            copy.write_bytes(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
            with pytest.raises(BadCache):
                TokenCache(copy)
    for damaged in [whole[:size] for size in range(len(whole))] + [whole + b"\0"]:
        copy.write_bytes(damaged)
        with pytest.raises(BadCache):
            TokenCache(copy)
    cache.path.write_bytes(whole[:-1])
    assert "damaged" in build([tmp_path / "a.txt"], tokenizer, tmp_path / "cache").rebuilt_because


def test_a_large_cache_is_verified_when_touched(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above VERIFY_ALWAYS_BYTES a sound cache is summed once, not at each start."""
    monkeypatch.setattr(data, "VERIFY_ALWAYS_BYTES", 0)
    cache = build(corpus, tokenizer, tmp_path / "cache")
    os.utime(cache.path, (1e9, 1e9))
    sums = []
    real = data._payload_crc
    monkeypatch.setattr(data, "_payload_crc", lambda path: sums.append(1) or real(path))
    for expected in (1, 1):
        assert build(corpus, tokenizer, tmp_path / "cache").rebuilt_because is None
        assert len(sums) == expected
    raw = bytearray(cache.path.read_bytes())
    raw[100] ^= 1
    del cache
    path = next((tmp_path / "cache").glob("*.tokens"))
    path.write_bytes(raw)
    assert "checksum" in build(corpus, tokenizer, tmp_path / "cache").rebuilt_because


def test_interrupted_building_leaves_nothing(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Ctrl-C while tokenizing: no half cache under the real name, no temporary file."""
    calls = iter([False, False, False, True, True])  # three hashes, then the first batch
    with pytest.raises(Interrupted):
        build(corpus, tokenizer, tmp_path / "cache", should_stop=lambda: next(calls))
    assert list((tmp_path / "cache").glob("*tokens*")) == []
    assert build(corpus, tokenizer, tmp_path / "cache").rebuilt_because == "there was none"


def test_bad_inputs(corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Nothing but blank files, no such file, and a cache folder that is a file."""
    with pytest.raises(UsageError, match="b.txt: empty"):
        build(corpus[1:2], tokenizer, tmp_path / "cache")
    with pytest.raises(UsageError, match="absent.txt: cannot be read"):
        build([tmp_path / "absent.txt"], tokenizer, tmp_path / "cache")
    with pytest.raises(UsageError, match="--cache_dir .*a.txt"):
        build(corpus, tokenizer, corpus[0] / "cache")


def test_a_file_that_changes_between_hashing_and_reading(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens would stand under another content's key."""
    real = data._hash_file

    def hash_then_change(path: Path, *rest: object) -> str:
        digest = real(path, *rest)
        path.write_text("other\n", encoding="utf-8")
        return digest

    monkeypatch.setattr(data, "_hash_file", hash_then_change)
    with pytest.raises(UsageError, match="a.txt: changed while it was read"):
        build(corpus[:1], tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*tokens*")) == []


def test_two_processes_build_the_same_cache(
    corpus: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Each writes its own temporary file; whoever is last replaces a cache by its equal."""
    (tmp_path / "a.model").write_bytes(tokenizer.model_bytes)
    code = (
        "import sys; from pathlib import Path; from utils import *\n"
        "cache = build_or_load([Path(sys.argv[2])], Tokenizer(tokenizer_model=sys.argv[1]),"
        " Reading(), Path(sys.argv[3]), progress=False)\nprint(len(cache))"
    )
    arguments = [str(tmp_path / "a.model"), str(corpus[0]), str(tmp_path / "cache")]
    root = Path(data.__file__).parent
    processes = [
        subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=root, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    sizes = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(sizes) == 1
    cache = build(corpus[:1], tokenizer, tmp_path / "cache", reading=Reading())
    assert cache.rebuilt_because is None


# ------------------------------------------------------------------------------- holding out


def fake_cache(sizes: list[int]) -> TokenCache:
    """A cache of documents of given sizes, whose token i is i."""
    cache = TokenCache.__new__(TokenCache)
    cache.tokens = np.arange(sum(sizes), dtype=np.uint32)
    cache.document_starts = np.cumsum([0, *sizes])[:-1]
    cache.document_bytes = np.array(sizes) * 3
    cache.token_byte_lengths = np.full(sum(sizes), 3)
    return cache


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=30),
    fraction=st.floats(0.001, 0.9),
    seed=st.integers(0, 2**31),
)
def test_split_parts_whole_documents(sizes: list[int], fraction: float, seed: int) -> None:
    """Every token is in one of the two, whole documents only, none of them empty."""
    cache = fake_cache(sizes)
    train, val = split_documents(cache, fraction, seed, chunk_length=8)
    assert val is not None and len(train) > 0 and len(val) > 0
    trained, held_out = train.read(0, len(train)), val.read(0, len(val))
    assert sorted([*trained, *held_out]) == list(range(sum(sizes)))
    document = np.repeat(np.arange(len(sizes)), sizes)
    assert not set(document[trained]) & set(document[held_out])
    assert len(val) <= max(min(sizes), fraction * sum(sizes))
    assert train.utf8_bytes == 3 * len(train) and val.utf8_bytes == 3 * len(val)
    again = split_documents(cache, fraction, seed, chunk_length=8)[1]
    assert np.array_equal(again.read(0, len(val)), held_out)


def test_split_of_many_documents_is_near_the_fraction() -> None:
    """5 % of ten thousand documents are 5 % of the tokens, spread over the corpus."""
    cache = fake_cache([20] * 10_000)
    train, val = split_documents(cache, 0.05, chunk_length=8)
    assert len(val) == 10_000
    assert 80_000 < val.read(0, len(val)).mean() < 120_000
    other = split_documents(cache, 0.05, 1, chunk_length=8)[1]
    assert not np.array_equal(val.read(0, 100), other.read(0, 100))


def test_split_of_one_document() -> None:
    """Its last chunks, from a chunk's edge; too small a document holds nothing out."""
    train, val = split_documents(fake_cache([1000]), 0.1, chunk_length=64)
    assert (len(train), len(val), val.utf8_bytes) == (896, 104, 312)  # 2 of 16 chunks
    assert val.read(0, 1) == [896]
    for size in (2, 64, 65):
        train, val = split_documents(fake_cache([size]), 0.1, chunk_length=64)
        assert len(train) == size and val is None
    assert split_documents(fake_cache([1000, 2]), 0.0, chunk_length=64)[1] is None


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


# ------------------------------------------------------------------------------- chunks


def stream_of(size: int) -> TokenStream:
    return TokenStream(np.arange(size, dtype=np.uint16), np.array([0]), np.array([size]))


@pytest.mark.parametrize("size", [2, 9, 10, 11, 12, 100, 101, 102])
def test_chunks_cover_every_token_once(size: int) -> None:
    """chunk-1, chunk and chunk+1 tokens: the last chunk is short, never dropped, never empty."""
    dataset = PretrainDataset(stream_of(size), 10)
    assert len(dataset) == -(-(size - 1) // 10) >= 1
    tokens, targets = dataset.batch(range(len(dataset)))
    assert tokens.shape == targets.shape == (len(dataset), min(10, size - 1))
    assert tokens.dtype == targets.dtype == torch.int64
    real = targets != IGNORE_INDEX
    assert tokens[real].tolist() == list(range(size - 1))
    assert targets[real].tolist() == list(range(1, size))
    assert real.sum() == dataset.n_targets


def test_a_batch_is_padded_to_its_longest_only() -> None:
    """The short last chunk alone costs its own length."""
    dataset = PretrainDataset(stream_of(24), 10)
    assert dataset.batch([2])[0].tolist() == [[20, 21, 22]]
    with pytest.raises(IndexError):
        dataset.chunk(3)


def test_too_little_text() -> None:
    """One token has nothing to predict."""
    for size in (0, 1):
        with pytest.raises(UsageError, match="at least two"):
            PretrainDataset(stream_of(size), 10)


def test_sst_as_plain_text(real_data: Path, tmp_path: Path) -> None:
    """The old bug: the file was tokenized with max_len=1024, so any file gave "1 chunk"."""
    tokenizer = Tokenizer(tokenizer_model=real_data / "tokenizer.model")
    path = real_data / "sst-train.txt"
    cache = build([path], tokenizer, tmp_path, reading=Reading())
    assert len(cache) == 254_453 + 2  # BOS and EOS
    assert cache.chunks_per_file(1024) == [249]
    assert cache.tokens[1:-1].tolist() == tokenizer.sp_model.encode(path.read_text("utf-8"))
    dataset = PretrainDataset.from_files([path], tokenizer, 1024, cache_dir=tmp_path)
    assert len(dataset) == 249 and len(dataset.chunk(248)) == (254_455 - 248 * 1024)


# ------------------------------------------------------------------------------- orders


def test_epoch_order_is_for_ever() -> None:
    """A resumed run reads what the uninterrupted one would have: literal numbers, any version."""
    assert epoch_order(8, 1337, 0).tolist() == ORDER_1337_0
    assert epoch_order(8, 1337, 1).tolist() == ORDER_1337_1
    order = epoch_order(1000, 1, 2)
    assert sorted(order) == list(range(1000))
    with pytest.raises(ValueError):
        order[0] = 3  # shared by all callers


ORDER_1337_0 = [5, 1, 6, 7, 4, 0, 2, 3]
ORDER_1337_1 = [2, 6, 3, 7, 5, 4, 0, 1]


def test_batches_of_an_epoch() -> None:
    """Each chunk once; the last batch is short; no batch beyond it."""
    batches = [batch_indices(23, 5, 7, 3, index) for index in range(count_batches(23, 5))]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert np.array_equal(np.concatenate(batches), epoch_order(23, 7, 3))
    with pytest.raises(IndexError):
        batch_indices(23, 5, 7, 3, 5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=300),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 5),
)
def test_bucketed_batches(lengths: list[int], batch_size: int, epoch: int) -> None:
    """Each sentence once an epoch, one short batch at most a window, the same each time."""
    sizes = np.array(lengths)
    batches = bucketed_batches(sizes, batch_size, 5, epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert len(batches) == count_batches(len(lengths), batch_size)
    again = bucketed_batches(sizes, batch_size, 5, epoch)
    assert all(map(np.array_equal, batches, again))


def test_bucketing_saves_padding() -> None:
    """The point of it: padded tokens are few, and epochs still differ."""
    lengths = np.random.default_rng(0).integers(5, 60, 2000)
    batches = bucketed_batches(lengths, 16, 0, 0)
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.1 * lengths.sum()
    assert not np.array_equal(batches[0], bucketed_batches(lengths, 16, 0, 1)[0])


# ------------------------------------------------------------------------------- labelled files


def labelled(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_labelled_dataset(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Order kept, lengths told, padded with 0, cut where asked."""
    path = labelled(tmp_path / "a.txt", "1 ||| two dogs\n\n0 ||| sat ||| the mat .\n-1 ||| it\n")
    dataset = LlamaDataset(path, tokenizer, n_labels=2)
    assert dataset.labels == [1, 0, None]
    assert dataset.examples[1].sentence == "sat ||| the mat ."
    batch = dataset.collate([2, 0])
    assert batch.indices.tolist() == [2, 0] and batch.labels.tolist() == [UNLABELLED, 1]
    for row, index in enumerate((2, 0)):
        sentence = dataset.examples[index].sentence
        length = int(batch.lengths[row])
        assert batch.tokens[row, :length].tolist() == tokenizer.encode(sentence, True, False)
        assert not batch.tokens[row, length:].any()
    cut = LlamaDataset(path, tokenizer, max_sentence_len=2)
    assert cut.ids[1] == tokenizer.encode("sat ||| the mat .", True, False)[:3]


def test_length_sorted_batches(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every sentence once, longest first, by its place in the file."""
    lines = "".join(f"0 ||| {'two dogs ' * (1 + 7 * i % 5)}\n" for i in range(11))
    dataset = LlamaDataset(labelled(tmp_path / "a.txt", lines), tokenizer)
    batches = dataset.length_sorted_batches(4)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    order = np.concatenate(batches)
    assert sorted(order) == list(range(11))
    assert (np.diff(dataset.lengths[order]) <= 0).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("1 ||| a\n1 a\n", "a.txt:2: no ` ||| `"),
        ("1 ||| a\n1 ||| \n", "a.txt:2: no sentence"),
        ("good ||| a\n", "a.txt:1: label 'good' is not a whole number"),
        ("1.5 ||| a\n", "a.txt:1: label '1.5'"),
        ("1 ||| a\n\n2 ||| b\n", "a.txt:3: label 2 is not one of 0 to 1"),
        ("-2 ||| a\n", "a.txt:1: label -2"),
        ("9" * 5000 + " ||| a\n", "a.txt:1: label"),
    ],
)
def test_bad_labelled_files(tmp_path: Path, text: str, words: str) -> None:
    """Each is one line with the place."""
    with pytest.raises(UsageError, match=words):
        read_labelled(labelled(tmp_path / "a.txt", text), n_labels=2)


def test_unlabelled_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """-1, no label, and labels that are all alike tell no accuracy."""
    none = LlamaDataset(labelled(tmp_path / "a.txt", "-1 ||| a\n ||| b\n||| c\n"), tokenizer)
    assert none.is_unlabelled() and none.has_placeholder_labels() and len(none) == 3
    alike = LlamaDataset(labelled(tmp_path / "b.txt", "0 ||| a\n0 ||| b\n"), tokenizer)
    assert not alike.is_unlabelled() and alike.has_placeholder_labels()
    told = LlamaDataset(labelled(tmp_path / "c.txt", "0 ||| a\n1 ||| b\n"), tokenizer)
    assert not told.has_placeholder_labels()


def test_the_public_sets(real_data: Path) -> None:
    """Sizes of SST-5 and CFIMDB; CFIMDB's test labels are placeholders."""
    tokenizer = Tokenizer(tokenizer_model=real_data / "tokenizer.model")
    sst = LlamaDataset(real_data / "sst-dev.txt", tokenizer, n_labels=5)
    assert len(sst) == 1101 and not sst.has_placeholder_labels()
    cfimdb = LlamaDataset(real_data / "cfimdb-test.txt", tokenizer, n_labels=2)
    assert len(cfimdb) == 488 and cfimdb.has_placeholder_labels()
    assert not cfimdb.is_unlabelled()
