"""The data sets: text cut into chunks, dialogues, labelled sentences, and the order of batches.

Every order is a pure function of (seed, epoch, index), so the state of a run's data is integers.
Tokens come from `minllama.text.token_cache`, labelled lines from `minllama.text.labelled`. It knows
nothing of models, nor of how many processes train.
"""

from __future__ import annotations

import copy
import functools
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from config import IGNORE_INDEX
from minllama.system.errors import UsageError
from minllama.text.chat import ChatTemplate, Cuts, Dialogue, encode_dialogue
from minllama.text.labelled import UNLABELLED, read_labelled
from minllama.text.reading import Reading, find_text_files
from minllama.text.token_cache import READ_BYTES, StoredTokens, TokenCache, build_or_load
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------- holding out

MOST_BLOCKS = 16  # of a long document held out
LEAST_SHARE = 0.1  # of what was asked for, that whole documents have to come to


@dataclass(eq=False)
class TokenStream:
    """Stretches of a token array, from `starts` to `stops`, read as one without a copy of all."""

    tokens: np.ndarray | StoredTokens
    starts: np.ndarray
    stops: np.ndarray
    utf8_bytes: int | None = None  # of the text, for bits per byte; None: not known
    document_starts: np.ndarray | None = None  # in the token array, rising; None: not known

    def __post_init__(self) -> None:
        self.offsets = np.concatenate([[0], np.cumsum(self.stops - self.starts)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the stream, (stop - start,)."""
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        found = []
        while start < stop:
            at = int(self.starts[first]) + start - int(self.offsets[first])
            count = min(stop, int(self.offsets[first + 1])) - start
            found.append(self.tokens[at : at + count])
            start, first = start + count, first + 1
        return found[0] if len(found) == 1 else np.concatenate([self.tokens[:0], *found])

    def part(self, start: int, stop: int, byte_lengths: np.ndarray | None = None) -> TokenStream:
        """Tokens start..stop-1 of the stream; `byte_lengths` are the bytes of each id's text."""
        sizes, size = self.stops - self.starts, None
        low = (start - self.offsets[:-1]).clip(0, sizes)
        high = (stop - self.offsets[:-1]).clip(0, sizes)
        some = high > low
        if byte_lengths is not None:
            places = range(start, stop, READ_BYTES)
            parts = (self.read(at, min(at + READ_BYTES, stop)) for at in places)
            size = sum(int(byte_lengths[part].sum()) for part in parts)
        starts, stops = (self.starts + low)[some], (self.starts + high)[some]
        return TokenStream(self.tokens, starts, stops, size, self.document_starts)

    @classmethod
    def joined(cls, parts: Sequence[TokenStream]) -> TokenStream:
        """Parts of one token array, in order, as one stream."""
        sizes = [part.utf8_bytes for part in parts]
        return cls(
            parts[0].tokens,
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.stops for part in parts]),
            None if None in sizes else sum(sizes),
            parts[0].document_starts,
        )

    def first(self, tokens: int, byte_lengths: np.ndarray) -> TokenStream:
        """The first `tokens` of the stream, all if it has no more."""
        return self if tokens >= len(self) else self.part(0, tokens, byte_lengths)

    def locate(self, position: int) -> int:
        """The place in the token array of token `position` of the stream."""
        index = int(np.searchsorted(self.offsets, position, side="right")) - 1
        return int(self.starts[index]) + position - int(self.offsets[index])

    @functools.cached_property
    def _documents_before(self) -> np.ndarray:
        """How many documents begin in the stretches before each."""
        begun = np.searchsorted(self.document_starts, (self.starts, self.stops))
        return np.concatenate([[0], np.cumsum(begun[1] - begun[0])])

    def count_documents(self, starts: np.ndarray, stops: np.ndarray) -> int:
        """How many documents begin at tokens starts..stops-1 of the stream, all of them together.

        From `document_starts` alone: nothing is read.
        """
        found = []
        for positions in (starts, stops):
            index = np.searchsorted(self.offsets, positions, side="right") - 1
            index = index.clip(0, len(self.starts) - 1)
            places = self.starts[index] + positions - self.offsets[index]
            begun = np.searchsorted(self.document_starts, (self.starts[index], places))
            found.append(int((self._documents_before[index] + begun[1] - begun[0]).sum()))
        return found[1] - found[0]


def documents_in(cache: TokenCache, stream: TokenStream) -> np.ndarray:
    """(documents,) bool: those of the cache of which the stream has at least a part."""
    at = np.searchsorted(stream.stops, cache.document_starts, side="right")
    starts = np.append(stream.starts, len(cache))
    return starts[at] < cache.document_stops()


def whole_stream(cache: TokenCache, chosen: np.ndarray | None = None) -> TokenStream:
    """The chosen documents of a cache, by default all, as validation files are read.

    `chosen` is (documents,) bool; neighbours make one stretch.
    """
    if chosen is None:
        chosen = np.ones(len(cache.document_starts), bool)
    edges = np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))
    first, last = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1) - 1
    starts, stops = cache.document_starts[first], cache.document_stops()[last]
    size = int(cache.document_bytes[chosen].sum())
    return TokenStream(cache.tokens, starts, stops, size, cache.document_starts)


def split_documents(
    cache: TokenCache,
    val_fraction: float,
    seed: int = 0,
    *,
    chunk_length: int,
    chosen: np.ndarray | None = None,
) -> tuple[TokenStream, TokenStream | None]:
    """(train, val): whole documents are held out, those whose content's hash is low.

    So text that is added later moves hardly a document from one side to the other, and copies are
    on the same one. Of the `chosen` documents, (documents,) bool, by default all, about
    `val_fraction` of the tokens is held out: where the hashes give less than half or more than
    twice of that, as of few documents, the lowest of them up to it. Where no document is so small,
    or they come to next to nothing, blocks of chunks all over the text are held out, at least one.
    val is None for a fraction of 0 and for a corpus too small to spare anything.
    """
    whole = whole_stream(cache, chosen)
    if val_fraction <= 0:
        return whole, None
    sizes = cache.document_stops() - cache.document_starts
    target = val_fraction * len(whole)
    small = sizes <= target  # one huge document must not be the whole hold-out
    if chosen is not None:
        small &= chosen
    hashes = _mixed(cache.fingerprints[:, 0] + np.uint64(seed))
    held_out = small & (hashes < np.uint64(val_fraction * 2.0**64))
    most = min(2 * target, (target + len(whole)) / 2)  # something is left to train on
    if not target / 2 <= sizes[held_out].sum() <= most:
        order = np.flatnonzero(small)[np.argsort(hashes[small], kind="stable")]
        end = np.searchsorted(np.cumsum(sizes[order]), target, side="right")
        if end < len(order):  # not between copies
            end = np.searchsorted(hashes[order], hashes[order[end]])
        held_out = np.zeros(len(sizes), bool)
        held_out[order[:end]] = True
    if sizes[held_out].sum() < LEAST_SHARE * target:  # a scrap beside documents that are too large
        return _split_blocks(whole, val_fraction, chunk_length, cache.token_byte_lengths)
    trained = ~held_out if chosen is None else chosen & ~held_out
    return whole_stream(cache, trained), whole_stream(cache, held_out)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64 of each number of x, uint64 (Steele, Lea and Flood 2014)."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _split_blocks(
    whole: TokenStream, val_fraction: float, chunk_length: int, byte_lengths: np.ndarray | None
) -> tuple[TokenStream, TokenStream | None]:
    """Hold out blocks of whole chunks, each at the end of an equal share of the stream.

    One block at the very end would be of another chapter than all that is trained on.
    """
    chunks = -(-len(whole) // chunk_length)
    held_out = min(chunks - 1, max(1, round(chunks * val_fraction)))
    blocks = min(held_out, MOST_BLOCKS)
    kept, out, at = [], [], 0
    for share in range(1, blocks + 1):
        end = round(chunks * share / blocks)
        size = held_out * share // blocks - held_out * (share - 1) // blocks
        start, stop = (end - size) * chunk_length, min(end * chunk_length, len(whole))
        kept.append(whole.part(at, start))
        out.append(whole.part(start, stop, byte_lengths))
        at = stop
    # No chunk to spare, or a single token: nothing to predict.
    if sum(map(len, out)) < 2:
        return whole, None
    return TokenStream.joined(kept), TokenStream.joined(out)


# ---------------------------------------------------------------------------- pretraining chunks


def count_chunks(n_tokens: int, chunk_length: int) -> int:
    """Chunks of a stream: every token but the last is an input, so ceil((n - 1) / chunk_length)."""
    return -(-max(0, n_tokens - 1) // chunk_length)


class PretrainDataset:
    """A token stream cut into chunks of `chunk_length` inputs; the last one may be short.

    Chunk i predicts tokens i*T+1 .. (i+1)*T from tokens i*T .. (i+1)*T-1: the length cuts the
    stream and never truncates the text. A document's BOS, of id `bos_id`, is no target: it always
    follows EOS, and to predict it would only make the loss look lower. Raises UsageError for fewer
    than two tokens.
    """

    def __init__(
        self, stream: TokenStream, chunk_length: int, *, bos_id: int | None = None
    ) -> None:
        if chunk_length < 1:
            raise UsageError(f"--max_seq_len {chunk_length}: must be at least 1")
        if len(stream) < 2:
            raise UsageError(
                f"the training text is {len(stream)} token: at least two are needed, one to read "
                "and one to predict"
            )
        self.stream, self.chunk_length, self.bos_id = stream, chunk_length, bos_id

    @classmethod
    def from_files(
        cls,
        patterns: Sequence[str | Path],
        tokenizer: Tokenizer,
        chunk_length: int,
        *,
        cache_dir: Path,
    ) -> PretrainDataset:
        """The chunks of text files, for those who import this class directly."""
        files = find_text_files(patterns)
        cache = build_or_load(files, tokenizer, Reading(), cache_dir)
        return cls(whole_stream(cache), chunk_length, bos_id=tokenizer.bos_id)

    def __len__(self) -> int:
        return count_chunks(len(self.stream), self.chunk_length)

    @property
    def utf8_bytes(self) -> int | None:
        """Bytes of the text, None where it is not known."""
        return self.stream.utf8_bytes

    def chunk(self, index: int) -> np.ndarray:
        """Inputs and the target after the last, (up to chunk_length + 1,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        start = index * self.chunk_length
        return self.stream.read(start, min(start + self.chunk_length + 1, len(self.stream)))

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, targets), both (B, T) int64, T the longest chunk's; IGNORE_INDEX pads targets.

        Tokens are padded with 0; causal attention lets no real position see them.
        """
        chunks = [torch.from_numpy(self.chunk(int(i)).astype(np.int64)) for i in indices]
        tokens = pad_sequence([chunk[:-1] for chunk in chunks], True)
        targets = pad_sequence([chunk[1:] for chunk in chunks], True, IGNORE_INDEX)
        if self.bos_id is not None:
            targets[targets == self.bos_id] = IGNORE_INDEX
        return tokens, targets

    def count_targets(self, indices: Sequence[int]) -> int:
        """The targets of `batch(indices)`, without reading these chunks where that can be."""
        if self.bos_id is not None and self.stream.document_starts is None:
            return int((self.batch(indices)[1] != IGNORE_INDEX).sum())
        starts = np.asarray(indices) * self.chunk_length
        stops = np.minimum(starts + self.chunk_length + 1, len(self.stream))
        begun = 0 if self.bos_id is None else self.stream.count_documents(starts + 1, stops)
        return int((stops - starts - 1).sum()) - begun


ORDER_VERSION = 2  # of `shuffled`, in a run's identity: 1 was a sorted table
ROUNDS = 6  # of its Feistel network


def shuffled(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """What is at these positions of an epoch's permutation of 0..n-1, int64; nothing is kept.

    A Feistel network permutes the numbers of an even count of bits; what comes out at n or above
    goes through it again, which makes it a permutation of 0..n-1 (Black and Rogaway 2002). The
    same for ever for the same numbers: a run may be resumed after an upgrade.
    """
    half = np.uint64((max(1, n - 1).bit_length() + 1) // 2)
    low = (np.uint64(1) << half) - np.uint64(1)
    key = _mixed(np.array([seed], np.uint64)) + np.array([epoch], np.uint64)
    keys = _mixed(key + np.arange(ROUNDS, dtype=np.uint64) * np.uint64(1 << 32))
    x = np.array(positions, np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & low
        for of_round in keys:
            left, right = right, left ^ (_mixed(right + of_round) & low)
        x[outside] = left << half | right
        outside = x >= n
    return x.astype(np.int64)


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1 as a table, (n,) int64, read-only; for labelled data and dialogues.

    It sorts the raw output of PCG64, a stream that NumPy promises to keep (NEP 19); it promises no
    such thing for `Generator.permutation`, and a run may be resumed after an upgrade.
    """
    raw = np.random.PCG64([seed, epoch]).random_raw(n)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False
    return order


def batch_indices(n: int, batch_size: int, seed: int, epoch: int, index: int) -> np.ndarray:
    """Chunk numbers of batch `index` of an epoch, (up to batch_size,) int64; the last is short."""
    first = index * batch_size
    if not 0 <= first < n:
        raise IndexError(f"batch {index} of {-(-n // batch_size)}")
    return shuffled(np.arange(first, min(first + batch_size, n)), n, seed, epoch)


# ---------------------------------------------------------------------------- dialogues


class ChatDataset:
    """Dialogues, encoded as sequences of up to `context` inputs; the answers in them are targets.

    A dialogue is one sequence, or several where it is longer: `cuts` counts what did not fit.
    """

    utf8_bytes = None  # of the answers, which are no text of their own

    def __init__(
        self,
        dialogues: Iterable[Dialogue],
        tokenizer: Tokenizer,
        template: ChatTemplate,
        context: int,
    ) -> None:
        tokens, is_answer, stops, lines = array("i"), bytearray(), array("q"), array("q")
        self.cuts = Cuts(context)
        for dialogue in dialogues:
            for part in encode_dialogue(dialogue, tokenizer, template, self.cuts):
                tokens.extend(part.ids)
                is_answer.extend(part.is_answer)
                stops.append(len(tokens))
                lines.append(dialogue.line)
        self.tokens = np.array(tokens, np.int32)
        self.is_answer = np.array(is_answer, bool)
        self.stops = np.array(stops, np.int64)  # of each sequence
        self.starts = np.concatenate([[0], self.stops])[:-1]
        self.lines = np.array(lines, np.int64)  # of each sequence's dialogue in its file

    def __len__(self) -> int:
        return len(self.stops)

    @property
    def lengths(self) -> np.ndarray:
        """Inputs of each sequence, (len(self),): its last token is but a target."""
        return self.stops - self.starts - 1

    def first_question(self, index: int) -> list[int]:
        """The ids of a sequence up to its first answer."""
        start = int(self.starts[index])
        count = int(self.is_answer[start : self.stops[index]].argmax())
        return self.tokens[start : start + count].tolist()

    def split(self, fraction: float) -> tuple[ChatDataset, ChatDataset | None]:
        """(train, held out): about this fraction of the dialogues, chosen by their places alone.

        At least one, unless the fraction is 0 or there is but one.
        """
        lines = np.unique(self.lines)
        count = min(len(lines) - 1, max(1, round(fraction * len(lines))))
        if not fraction or not count:
            return self, None
        scrambled = _mixed(np.arange(len(lines), dtype=np.uint64) + np.uint64(0x6D696E69))
        chosen = lines[np.argsort(scrambled, kind="stable")[:count]]
        held_out = np.isin(self.lines, chosen)
        return self._where(~held_out), self._where(held_out)

    def _where(self, chosen: np.ndarray) -> ChatDataset:
        part = copy.copy(self)
        part.starts, part.stops = self.starts[chosen], self.stops[chosen]
        part.lines = self.lines[chosen]
        return part

    def count_targets(self, indices: Sequence[int]) -> int:
        """The targets of `batch(indices)`."""
        ends = zip(self.starts[indices], self.stops[indices], strict=True)
        return sum(int(self.is_answer[start + 1 : stop].sum()) for start, stop in ends)

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, targets), both (B, T) int64, T the longest's; targets that are no answer's are
        IGNORE_INDEX. Tokens are padded with 0, which no real position sees.
        """
        tokens, targets = [], []
        for start, stop in zip(self.starts[indices], self.stops[indices], strict=True):
            ids = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
            is_answer = torch.from_numpy(self.is_answer[start + 1 : stop])
            tokens.append(ids[:-1])
            targets.append(ids[1:].where(is_answer, IGNORE_INDEX))
        return pad_sequence(tokens, True), pad_sequence(targets, True, IGNORE_INDEX)


# ---------------------------------------------------------------------------- labelled sentences

BUCKET_BATCHES = 50  # training batches are sorted by length within windows of this many


class LabelledBatch(NamedTuple):
    """Sentences as tensors, padded on the right with 0: `lengths` says what is real."""

    tokens: torch.Tensor  # (B, T) int64
    lengths: torch.Tensor  # (B,) int64
    labels: torch.Tensor  # (B,) int64, UNLABELLED where there is none


class LlamaDataset:
    """A labelled file, encoded: `ids[i]` are BOS and the tokens of `examples[i]`'s sentence, of
    which at most `max_sentence_len` are kept; `cut` is how many sentences had more. `plain` takes
    a file of sentences alone, too."""

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        *,
        n_labels: int | None = None,
        max_sentence_len: int | None = None,
        encoding: str = "utf-8",
        plain: bool = False,
    ) -> None:
        self.path = path
        self.examples = read_labelled(path, n_labels=n_labels, encoding=encoding, plain=plain)
        sentences = tokenizer.sp_model.encode([example.sentence for example in self.examples])
        self.ids = [[tokenizer.bos_id, *ids[:max_sentence_len]] for ids in sentences]
        self.cut = sum(len(ids) > (max_sentence_len or len(ids)) for ids in sentences)
        self.lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def length_sorted_batches(self, batch_size: int) -> list[np.ndarray]:
        """Every index once, longest sentences first, so that little is padded; for prediction."""
        order = np.argsort(-self.lengths, kind="stable")
        return np.split(order, range(batch_size, len(order), batch_size))

    def collate(self, indices: Sequence[int] | np.ndarray) -> LabelledBatch:
        """The examples at `indices` as one batch, padded to its longest."""
        lengths = torch.from_numpy(self.lengths[np.asarray(indices)])
        tokens = pad_sequence([torch.tensor(self.ids[index]) for index in indices], True)
        labels = [self.examples[index].label for index in indices]
        labels = [UNLABELLED if label is None else label for label in labels]
        return LabelledBatch(tokens, lengths, torch.tensor(labels))


def bucketed_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Batches of an epoch, alike in length: a pure function of (lengths, batch_size, seed, epoch).

    Indices are shuffled, sorted by length within windows of BUCKET_BATCHES batches, cut into
    batches, and the batches shuffled. Each index comes once; one batch may be short.
    """
    order = epoch_order(len(lengths), seed, epoch)
    window = BUCKET_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    # Another stream than the indices' own: the epoch's number alone would give the same one twice.
    return [batches[i] for i in epoch_order(len(batches), seed + (1 << 32), epoch)]


def batches_by_length(
    lengths: np.ndarray, batch_size: int, seed: int
) -> Callable[[int, int], np.ndarray]:
    """A function of (epoch, index): that one of `bucketed_batches`, an epoch's made once."""
    of_epoch = functools.lru_cache(maxsize=1)(
        functools.partial(bucketed_batches, lengths, batch_size, seed)
    )
    return lambda epoch, index: of_epoch(epoch)[index]
