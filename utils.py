"""The data sets: text cut into chunks, dialogues, labelled sentences, and the order of batches.

Every order is a pure function of (seed, epoch, index), so the state of a run's data is integers.
Tokens come from `minllama.text.stream`, labelled lines from `minllama.text.labelled`. It knows
nothing of models, nor of how many processes train.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from config import IGNORE_INDEX, fingerprint
from minllama.system.errors import UsageError
from minllama.text.chat import Cuts, Template, encode_dialogue
from minllama.text.dialogues import Dialogue
from minllama.text.labelled import UNLABELLED, read_labelled
from minllama.text.reading import UTF8, Reading
from minllama.text.stream import TokenStream, splitmix64
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------- pretraining chunks

READ_TOKENS = 1 << 18  # at a time, to count the bytes that they spell


def count_chunks(n_tokens: int, chunk_length: int) -> int:
    """Chunks of a stream: every token but the last is an input, so ceil((n - 1) / chunk_length)."""
    return -(-max(0, n_tokens - 1) // chunk_length)


class PretrainDataset:
    """A token stream cut into chunks of `chunk_length` inputs; the last one may be short.

    Chunk i predicts tokens i*T+1 .. (i+1)*T from tokens i*T .. (i+1)*T-1: the length cuts the
    stream and never truncates the text. Where it is of several `sources`, each by its name and
    tokens, these are cut one by one, and numbered on. A document's BOS, which only `tokenizer`
    knows, is no target. Raises UsageError for fewer than two tokens.

    Numbers from len(self) on are the chunks of later epochs, n + epoch x len(self), which are cut
    elsewhere: from a token that (seed, epoch) chooses, round to that token again.
    """

    def __init__(
        self,
        stream: TokenStream,
        chunk_length: int,
        *,
        tokenizer: Tokenizer | None = None,
        sources: dict[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        if chunk_length < 1:
            raise UsageError(f"--max_seq_len {chunk_length}: must be at least 1")
        if len(stream) < 2:
            raise UsageError(
                f"the training text is {len(stream)} token: at least two are needed, one to read "
                "and one to predict"
            )
        self.stream, self.chunk_length, self.tokenizer = stream, chunk_length, tokenizer
        self.bos_id, self.seed = tokenizer and tokenizer.bos_id, seed
        # BOS always follows EOS: nothing to learn, and the loss would only look lower. A vocabulary
        # with one token for both has no EOS before it, and learns where a document ends by it.
        self.ignored_id = None if tokenizer and self.bos_id == tokenizer.eos_id else self.bos_id
        self.sources = sources or {"": len(stream)}
        sizes = np.array([*self.sources.values()])
        self.source_stops = np.cumsum(sizes)  # in the stream
        self.source_starts = self.source_stops - sizes
        self.source_chunks = [count_chunks(size, chunk_length) for size in sizes.tolist()]
        self.first_chunks = np.concatenate([[0], np.cumsum(self.source_chunks)])  # of each source

    def __len__(self) -> int:
        return int(self.first_chunks[-1])

    def cut(self, chunk_length: int, most: int | None = None) -> PretrainDataset:
        """This text in other chunks; of each source its beginning, `most` tokens of all."""
        whole = len(self.stream)
        most = min(whole, most or whole)
        sizes = {n: max(min(2, size), size * most // whole) for n, size in self.sources.items()}
        starts = self.source_starts.tolist()
        kept = [(start, start + n) for start, n in zip(starts, sizes.values(), strict=True)]
        stream = self.stream if most == whole else self.stream.select(kept)
        kept_as = {"tokenizer": self.tokenizer, "sources": sizes, "seed": self.seed}
        return PretrainDataset(stream, chunk_length, **kept_as)

    @functools.cached_property
    def by_source(self) -> dict[str, PretrainDataset]:
        """Each source's chunks as a data set of their own, by its name."""
        if len(self.sources) == 1:
            return {name: self for name in self.sources}
        spans = zip(self.source_starts.tolist(), self.source_stops.tolist(), strict=True)
        streams = [self.stream.select([span]) for span in spans]
        alone = functools.partial(PretrainDataset, chunk_length=self.chunk_length)
        return {
            name: alone(stream, tokenizer=self.tokenizer, sources={name: len(stream)})
            for name, stream in zip(self.sources, streams, strict=True)
        }

    @functools.cached_property
    def utf8_bytes(self) -> int | None:
        """Bytes of the text that the targets spell, for bits per byte; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        if len(self.sources) > 1:
            return sum(part.utf8_bytes for part in self.by_source.values())
        inside, opening = (self.tokenizer.token_byte_lengths(opening=o) for o in (False, True))
        total, last = 0, len(self.stream) - 1
        for start in range(0, last, READ_TOKENS):  # a stream may be larger than memory
            ids = self.stream.read(start, min(start + READ_TOKENS, last) + 1)
            lengths = np.where(ids[:-1] == self.bos_id, opening[ids[1:]], inside[ids[1:]])
            total += int(lengths.sum())
        return total

    def bounds(
        self, indices: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(starts, stops, begins, ends) of these chunks, each with the target after its last.

        A chunk is tokens starts..stops-1 of the stream, and after them begins..ends-1, where it
        goes on at its source's beginning: mostly none.
        """
        # Chunks overlap by one token: the last target of one is the first input of the next, so
        # that every token is predicted once in an epoch but the first of its first chunk.
        epochs, indices = np.divmod(np.asarray(indices, np.int64), len(self))
        source = np.searchsorted(self.first_chunks, indices, side="right") - 1
        begin, end = self.source_starts[source], self.source_stops[source]
        first = begin + first_token(epochs, source, self.seed) % np.minimum(
            self.chunk_length, end - begin
        )
        starts = first + (indices - self.first_chunks[source]) * self.chunk_length
        stops = np.minimum(starts + self.chunk_length + 1, first + end - begin)
        over = starts >= end  # all of it is beyond the end
        starts, stops = starts - over * (end - begin), stops - over * (end - begin)
        return starts, np.minimum(stops, end), begin, begin + np.maximum(stops - end, 0)

    def chunk(self, index: int) -> np.ndarray:
        """Inputs and the target after the last, (up to chunk_length + 1,)."""
        if index < 0:
            raise IndexError(f"chunk {index}")
        start, stop, begin, end = (int(bound[0]) for bound in self.bounds([index]))
        tokens = self.stream.read(start, stop)
        return np.concatenate([tokens, self.stream.read(begin, end)]) if begin < end else tokens

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, targets), both (B, T) int64, T the longest's; IGNORE_INDEX pads targets."""
        chunks = [torch.from_numpy(self.chunk(int(i)).astype(np.int64)) for i in indices]
        # Padding is on the right, and attention causal: no real position sees it, and a position
        # that is padding has no target. So any id will do, also one that is a real token.
        tokens = pad_sequence([chunk[:-1] for chunk in chunks], True)  # (B, T)
        targets = pad_sequence([chunk[1:] for chunk in chunks], True, IGNORE_INDEX)  # (B, T)
        if self.ignored_id is not None:
            targets[targets == self.ignored_id] = IGNORE_INDEX
        return tokens, targets

    def count_targets(self, indices: Sequence[int]) -> int:
        """The targets of `batch(indices)`, without reading these chunks where that can be."""
        # So each rank knows the others' counts, by which the loss is divided, without asking them.
        if self.ignored_id is not None and self.stream.document_starts is None:
            return int((self.batch(indices)[1] != IGNORE_INDEX).sum())
        starts, stops, begins, ends = self.bounds(indices)
        count = int((stops - starts - 1 + ends - begins).sum())
        if self.ignored_id is None:
            return count
        count -= self.stream.count_documents(starts + 1, stops)
        return count - self.stream.count_documents(begins, ends)


# In a run's identity: 1 was a sorted table instead of `shuffled`, 2 cut every epoch at token 0.
ORDER_VERSION = 3
ROUNDS = 6  # of the Feistel network of `shuffled`


def first_token(epochs: np.ndarray, sources: np.ndarray, seed: int) -> np.ndarray:
    """Of each epoch of a source, from where it is cut: any number, int64, and 0 in the first."""
    # Never to change, as `shuffled`. A model that reads a text often reads it in other contexts.
    key = splitmix64(np.array([seed], np.uint64)) + epochs.astype(np.uint64)
    drawn = splitmix64(splitmix64(key) + sources.astype(np.uint64)) >> np.uint64(1)
    return np.where(epochs == 0, 0, drawn.astype(np.int64))


def shuffled(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """What is at these positions of an epoch's permutation of 0..n-1, int64, without a table of it.

    A Feistel network permutes the numbers of an even count of bits; what comes out at n or above
    goes through it again, which makes it a permutation of 0..n-1 (Black and Rogaway 2002).
    """
    # Never to change: a run that is resumed after an upgrade must read what it has not read yet.
    half = np.uint64((max(1, n - 1).bit_length() + 1) // 2)  # bits of the left and right half
    low = (np.uint64(1) << half) - np.uint64(1)
    key = splitmix64(np.array([seed], np.uint64)) + np.array([epoch], np.uint64)
    keys = splitmix64(key + np.arange(ROUNDS, dtype=np.uint64) * np.uint64(1 << 32))
    x = np.array(positions, np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():  # under four times on average: the network permutes less than 4 n numbers
        left, right = x[outside] >> half, x[outside] & low
        for round_key in keys:  # whatever f is, (l, r) -> (r, l ^ f(r)) is one to one
            left, right = right, left ^ (splitmix64(right + round_key) & low)
        x[outside] = left << half | right
        outside = x >= n
    return x.astype(np.int64)


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1, (n,) int64, read-only; for labelled data and dialogues."""
    # NumPy promises to keep PCG64's raw output (NEP 19), but not `Generator.permutation`'s, and a
    # run may be resumed after an upgrade.
    raw = np.random.PCG64([seed, epoch]).random_raw(n)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False
    return order


def batch_indices(n: int, batch_size: int, seed: int, epoch: int, index: int) -> np.ndarray:
    """Numbers of the n chunks of an epoch in its batch `index`, (up to batch_size,) int64.

    From epoch x n on, as `PretrainDataset` numbers them; the last batch is short.
    """
    return epoch * n + shuffled(batch_positions(n, batch_size, index), n, seed, epoch)


def batch_positions(n: int, batch_size: int, index: int) -> np.ndarray:
    """Which of an epoch's n positions batch `index` has, (up to batch_size,) int64."""
    first = index * batch_size
    if not 0 <= first < n:
        raise IndexError(f"batch {index} of {-(-n // batch_size)}")
    return np.arange(first, min(first + batch_size, n))


class Mixture:
    """Which chunk is where in a run that reads several sources, each its share of the tokens.

    An epoch is `epoch_chunks` positions, which read as many tokens as all sources have together.
    Any positions in a row hold of each source its share, to within k - 1 chunks where there are k
    sources. Each of a source's chunks comes once before any comes again.
    """

    def __init__(self, dataset: PretrainDataset, weights: Sequence[float]) -> None:
        """`weights`, one for each source of the data set, are in proportion to the tokens read."""
        self.chunks, self.first_chunks = dataset.source_chunks, dataset.first_chunks.tolist()
        # Exact: a rounding that another machine does not share would be another order.
        given = [Fraction(weight) for weight in weights]
        self.weights = [weight / sum(given) for weight in given]
        inputs = [size - 1 for size in dataset.sources.values()]
        # A source whose last chunk is short needs more chunks for as many tokens.
        per_token = [
            weight * count / size
            for weight, count, size in zip(self.weights, self.chunks, inputs, strict=True)
        ]
        self.shares = [count / sum(per_token) for count in per_token]  # of the positions
        self.epoch_chunks = math.ceil(sum(inputs) * sum(per_token))
        # The heaviest first: what is left for the others is then the least uneven.
        rest, self.splits = Fraction(1), []
        for source in sorted(range(len(weights)), key=lambda i: -self.shares[i]):
            ratio = self.shares[source] / rest  # of the last one 1
            self.splits.append((source, ratio.numerator, ratio.denominator))
            rest -= self.shares[source]

    def draw(self, position: int) -> tuple[int, int]:
        """(source, how many chunks of it come before) at a position of the run, counted from 0."""
        for source, share, whole in self.splits:
            # Of the first n positions that are left it has n times its share, rounded.
            before = (2 * position * share + whole) // (2 * whole)
            if (2 * (position + 1) * share + whole) // (2 * whole) > before:
                return source, before
            position -= before
        raise AssertionError("the last source takes what is left")

    def chunks_at(self, positions: Sequence[int], seed: int) -> np.ndarray:
        """The numbers of the chunks at these positions, int64: a function of these and the seed."""
        # Never to change, as `shuffled`, which orders each pass over a source.
        places: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for at, position in enumerate(positions):
            source, number = self.draw(int(position))
            epoch, index = divmod(number, self.chunks[source])
            places.setdefault((source, epoch), []).append((at, index))
        numbers = np.empty(len(positions), np.int64)
        for (source, epoch), chosen in places.items():
            at, index = np.array(chosen).T
            order = shuffled(index, self.chunks[source], seed + (source << 32), epoch)
            numbers[at] = epoch * sum(self.chunks) + self.first_chunks[source] + order
        return numbers


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
        template: Template,
        context: int,
        place: Callable[[int], str] = "line {}".format,
    ) -> None:
        """`place` names a line in a message. Raises UsageError for what a template refuses."""
        tokens, is_answer, stops = array("i"), bytearray(), array("q")
        numbers, lines = array("q"), array("q")
        self.cuts = Cuts(context)
        for number, dialogue in enumerate(dialogues, start=1):
            try:
                parts = encode_dialogue(dialogue, tokenizer, template, self.cuts)
            except UsageError as error:
                raise UsageError(f"{place(dialogue.line)}: {error}") from None
            for part in parts:
                tokens.extend(part.ids)
                is_answer.extend(part.is_answer)
                stops.append(len(tokens))
                numbers.append(number)
                lines.append(dialogue.line)
        self.tokens = np.array(tokens, np.int32)
        self.is_answer = np.array(is_answer, bool)
        self.stops = np.array(stops, np.int64)  # of each sequence
        self.starts = np.concatenate([[0], self.stops])[:-1]
        # A line of the file is for messages alone: a list may have all its dialogues in one.
        self.numbers = np.array(numbers, np.int64)  # of each sequence's dialogue, from 1
        self.lines = np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self.stops)

    @property
    def lengths(self) -> np.ndarray:
        """Inputs of each sequence, (len(self),): its last token is but a target."""
        return self.stops - self.starts - 1

    @property
    def dialogues(self) -> int:
        """How many dialogues there are, some of them of several sequences."""
        return len(np.unique(self.numbers))

    def first_question(self, index: int) -> list[int]:
        """The ids of a sequence up to its first answer."""
        start = int(self.starts[index])
        count = int(self.is_answer[start : self.stops[index]].argmax())
        return self.tokens[start : start + count].tolist()

    def split(self, fraction: float) -> tuple[ChatDataset, ChatDataset | None]:
        """(train, held out): about this fraction of the dialogues, chosen by their places alone.

        At least one, unless the fraction is 0 or there is but one.
        """
        # By dialogue, not by sequence: with parts of one on both sides the loss would flatter.
        numbers = np.unique(self.numbers)
        count = min(len(numbers) - 1, max(1, round(fraction * len(numbers))))
        if not fraction or not count:
            return self, None
        hashes = splitmix64(np.arange(len(numbers), dtype=np.uint64) + np.uint64(0x6D696E69))
        chosen = numbers[np.argsort(hashes, kind="stable")[:count]]
        held_out = np.isin(self.numbers, chosen)
        return self._select(~held_out), self._select(held_out)

    def _select(self, chosen: np.ndarray) -> ChatDataset:
        part = copy.copy(self)  # of the same tokens
        part.starts, part.stops = self.starts[chosen], self.stops[chosen]
        part.numbers, part.lines = self.numbers[chosen], self.lines[chosen]
        return part

    def count_targets(self, indices: Sequence[int]) -> int:
        """The targets of `batch(indices)`."""
        bounds = zip(self.starts[indices], self.stops[indices], strict=True)
        return sum(int(self.is_answer[start + 1 : stop].sum()) for start, stop in bounds)

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, targets), both (B, T) int64, T the longest's; other targets than an answer's
        are IGNORE_INDEX."""
        # The model learns to answer, not to ask: questions are read and not predicted.
        tokens, targets = [], []
        for start, stop in zip(self.starts[indices], self.stops[indices], strict=True):
            ids = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
            is_answer = torch.from_numpy(self.is_answer[start + 1 : stop])  # of each target
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
    """A labelled file, encoded: `ids[i]` are the tokens of `examples[i]`'s sentence behind BOS.

    At most `max_sentence_len` tokens are kept; `cut` is how many sentences had more. `plain` takes
    a file of sentences alone, too; `labels` are how the file writes them.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer,
        *,
        labels: Sequence[str] | None = None,
        max_sentence_len: int | None = None,
        reading: Reading = UTF8,
        plain: bool = False,
    ) -> None:
        self.path = path
        self.examples = read_labelled(path, labels, reading=reading, plain=plain)
        sentences = [example.sentence for example in self.examples]
        encoded = tokenizer.encode_many(sentences, bos=True)
        longest = max_sentence_len and max_sentence_len + tokenizer.vocabulary.adds_bos
        self.ids = [ids[:longest] for ids in encoded]
        self.cut = sum(len(ids) > (longest or len(ids)) for ids in encoded)
        self.lengths = np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    def split(self, fraction: float) -> tuple[LlamaDataset, LlamaDataset]:
        """(train, held out): about this fraction of the sentences, chosen by their text alone.

        A sentence that comes twice is on one side. Raises UsageError where either would be empty.
        """
        texts = {example.sentence for example in self.examples}
        count = min(len(texts) - 1, max(1, round(fraction * len(texts))))
        if not fraction or not count:
            raise UsageError(f"{self.path}: too few sentences to hold some out: name --dev")
        by_hash = sorted(texts, key=lambda text: fingerprint(text.encode("utf-8", "replace")))
        chosen = {*by_hash[:count]}
        held_out = [example.sentence in chosen for example in self.examples]
        return self._select(~np.array(held_out)), self._select(np.array(held_out))

    def _select(self, chosen: np.ndarray) -> LlamaDataset:
        part = copy.copy(self)
        part.examples = [*itertools.compress(self.examples, chosen)]
        part.ids = [*itertools.compress(self.ids, chosen)]
        part.lengths = self.lengths[chosen]
        return part

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

    Each index comes once; one batch may be short.
    """
    # A batch costs what its longest sentence does. Sorted within windows of a shuffled epoch it has
    # little padding, and still other neighbours in every epoch.
    order = epoch_order(len(lengths), seed, epoch)
    window = BUCKET_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    # Else short sentences would come first. By another seed: the indices' permutation is used up.
    return [batches[i] for i in epoch_order(len(batches), seed + (1 << 32), epoch)]


def batches_by_length(
    lengths: np.ndarray, batch_size: int, seed: int
) -> Callable[[int, int], np.ndarray]:
    """A function of (epoch, index): that one of `bucketed_batches`, an epoch's made once."""
    batches = functools.partial(bucketed_batches, lengths, batch_size, seed)
    batches = functools.lru_cache(maxsize=1)(batches)
    return lambda epoch, index: batches(epoch)[index]
