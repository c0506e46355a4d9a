"""How much of a text stands word for word in another: stretches of 8, 16 and 32 words.

White space counts as one space, and no stretch crosses a document's end. Of a script without spaces
words are characters. The long text is read in parts, by the hashes of its stretches, which are 64
bits: of a thousand million stretches none is likely to be taken for another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minllama.text.spelling import SpanHashes, Spelling
from minllama.text.stream import TokenStream
from minllama.text.token_cache import TokenCache

LENGTHS = (8, 16, 32)  # of stretches, in words
LONG_WORDS = 12  # characters a word, from which on a text counts as one without spaces
READ_TOKENS = 1 << 18  # at a time
OVERLAP = 1 << 12  # of two reads, so that each stretch is whole in one of them
SAMPLED_TOKENS = 1 << 16  # looked at to see whether there are spaces
TABLE_BITS = 22  # of a hash that are looked up first
SHOWN_CHARACTERS = 300  # of the longest copy
SPACE = np.isin(np.arange(256), list(b" \t\n\r\x0b\x0c"))  # as bytes.split has it

# ---------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Words:
    """The words of a text, or its characters, in order."""

    text: np.ndarray  # (bytes,) uint8
    starts: np.ndarray  # (words,) in the text
    stops: np.ndarray
    groups: np.ndarray  # (words,) rising: no stretch has words of two groups

    @classmethod
    def of(cls, text: np.ndarray, breaks: np.ndarray | Sequence[int], *, spaced: bool) -> Words:
        """The words of a text, or where it is not `spaced` its characters; `breaks` end them."""
        solid = ~SPACE[text]
        is_edge = np.zeros(len(text) + 1, bool)
        is_edge[breaks] = True
        begins = np.append(True, ~solid)[:-1] | is_edge[:-1]
        if not spaced:
            begins |= (text & 0xC0) != 0x80  # the first byte of a character
        begins &= solid
        ends = solid & np.append(~solid | begins, True)[1:]
        starts = np.flatnonzero(begins)
        groups = np.searchsorted(np.unique(breaks), starts, side="right")
        return cls(text, starts, np.flatnonzero(ends) + 1, groups)

    def __len__(self) -> int:
        return len(self.starts)

    def without(self, *, first: bool, last: bool) -> Words:
        """These words but for the first or last one, which may be half ones."""
        kept = slice(int(first), len(self) - int(last))
        return Words(self.text, self.starts[kept], self.stops[kept], self.groups[kept])

    @functools.cached_property
    def _hashes(self) -> SpanHashes:
        in_bytes = SpanHashes(self.text.astype(np.uint64) + np.uint64(1))
        return SpanHashes(in_bytes.of(self.starts, self.stops))

    def stretches(self, length: int, among: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """(hashes, first words) of the stretches of so many words, of those that begin `among`."""
        first = np.arange(len(self)) if among is None else among
        first = first[first + length <= len(self)]
        first = first[self.groups[first] == self.groups[first + length - 1]]
        return self._hashes.of(first, first + length), first

    def quote(self, first: int, length: int) -> str:
        """The text of a stretch, its white space single spaces."""
        data = self.text[self.starts[first] : self.stops[first + length - 1]].tobytes()
        return " ".join(data.decode("utf-8", errors="replace").split())


def has_spaces(text: bytes) -> bool:
    """Whether a text's words are apart, which those of Chinese are not."""
    characters = len("".join(text.decode("utf-8", errors="ignore").split()))
    return characters <= LONG_WORDS * len(text.split())


# ---------------------------------------------------------------------------- looking them up


class HashSet:
    """Which of many numbers are in a set."""

    def __init__(self, hashes: np.ndarray) -> None:
        self.members = np.unique(hashes)
        self.is_near = np.zeros(1 << TABLE_BITS, bool)  # most numbers are in none of these places
        self.is_near[self._place(self.members)] = True

    def _place(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - TABLE_BITS)).astype(np.int64)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places in hashes, places in members) of what is in the set."""
        near = np.flatnonzero(self.is_near[self._place(hashes)])
        at = np.searchsorted(self.members, hashes[near]).clip(max=len(self.members) - 1)
        same = self.members[at] == hashes[near]
        return near[same], at[same]


@dataclass(frozen=True)
class Part:
    """A part of a stream of tokens as words."""

    words: Words
    offsets: np.ndarray  # (tokens,) in the words' text
    start: int  # its first token in the stream

    def position(self, word: int) -> int:
        """The token of the stream in which a word begins."""
        at = np.searchsorted(self.offsets, self.words.starts[word], side="right") - 1
        return self.start + int(at)


def parts_of(
    stream: TokenStream, spelling: Spelling, *, spaced: bool, most: int | None = None
) -> Iterator[Part]:
    """The words of a stream, or of its first `most` tokens, in parts that overlap."""
    end = min(len(stream), most or len(stream))
    for start in range(0, end, READ_TOKENS):
        begin, stop = max(0, start - OVERLAP), min(start + READ_TOKENS, end)
        ids = stream.read(begin, stop)
        text, offsets = spelling.spell(ids)
        edges = stream.offsets[(stream.offsets >= begin) & (stream.offsets < stop)] - begin
        breaks = offsets[np.concatenate([np.flatnonzero(ids == spelling.bos_id), edges])]
        words = Words.of(text, breaks, spaced=spaced)
        if len(words):
            cut_before = begin > 0 and words.starts[0] == 0 and 0 not in breaks
            cut_after = stop < len(stream) and words.stops[-1] == len(text)
            words = words.without(first=cut_before, last=cut_after and len(words) > cut_before)
        yield Part(words, offsets, begin)


class CopySearch:
    """Looks for the stretches of texts in a long one, part by part.

    Of the `written` texts the longest copy is kept, too; the `others` are only counted.
    """

    def __init__(self, written: Sequence[Words], others: Sequence[Words] = ()) -> None:
        self.written = written
        self.wanted = {n: _stretches_of([*written, *others], n) for n in LENGTHS}
        self.seen = {n: np.zeros(len(wanted.members), bool) for n, wanted in self.wanted.items()}
        self.longest = LENGTHS[0] - 1  # words; shorter ones do not count
        self.quote, self.position = "", 0  # of the longest
        self._longer = _stretches_of(written, self.longest + 1)

    def look_in(self, part: Part) -> None:
        """Take note of what is in a part of the long text."""
        for length, wanted in self.wanted.items():
            _, at = wanted.find(part.words.stretches(length)[0])
            self.seen[length][at] = True
        hashes, first = part.words.stretches(self.longest + 1)
        while len(first := first[self._longer.find(hashes)[0]]):
            self.longest += 1
            self.quote = part.words.quote(first[0], self.longest)
            self.position = part.position(first[0])
            self._longer = _stretches_of(self.written, self.longest + 1)
            hashes, first = part.words.stretches(self.longest + 1, first)

    def is_copied(self, words: Words, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(whether it was seen, its first word) of each stretch of a text that was looked for."""
        hashes, first = words.stretches(length)
        wanted, seen = self.wanted[length], self.seen[length]
        return seen[np.searchsorted(wanted.members, hashes)], first

    def count(self, texts: Iterable[Words], length: int) -> tuple[int, int]:
        """(copied, all) stretches of so many words in texts that were looked for."""
        copied = [self.is_copied(words, length)[0] for words in texts]
        return sum(int(seen.sum()) for seen in copied), sum(map(len, copied))


def _stretches_of(texts: Sequence[Words], length: int) -> HashSet:
    hashes = [words.stretches(length)[0] for words in texts]
    return HashSet(np.concatenate([np.zeros(0, np.uint64), *hashes]))


# ---------------------------------------------------------------------------- what is said of it


@dataclass(frozen=True)
class Copies:
    """How much of what a model wrote stands in a text word for word."""

    unit: str  # "words" or "characters"
    written: dict[int, tuple[int, int]]  # copied and all stretches, by their length
    held_out: dict[int, tuple[int, int]]  # the same of held-out text; empty: there was none
    longest: int = 0  # in units; 0: none of as many as the shortest stretches
    quote: str = ""  # of it
    place: str = ""
    looked_at: int | None = None  # tokens of the text; None: all

    def share(self, length: int, *, held_out: bool = False) -> float | None:
        """The copied share of the stretches of a length; None where there are none."""
        copied, total = (self.held_out if held_out else self.written).get(length, (0, 0))
        return copied / total if total else None

    @classmethod
    def from_plain(cls, plain: Any) -> Copies | None:
        """What `to_plain` made; None for anything else, such as a damaged record."""
        try:
            counts = {name: _counts(plain, name) for name in ("written", "held_out")}
            copies = cls(**counts, **{name: plain[name] for name in PLAIN_FIELDS})
        except (KeyError, TypeError, ValueError):
            return None
        numbers = (copies.longest, copies.looked_at or 0)
        texts = (copies.unit, copies.quote, copies.place)
        sound = all(type(n) is int for n in numbers) and all(isinstance(t, str) for t in texts)
        return copies if sound and copies.written else None

    @property
    def is_recited(self) -> bool:
        """Whether it writes its text by heart: far more of it than other text has in common."""
        share, base = self.share(RECITED), self.share(RECITED, held_out=True) or 0.0
        return share is not None and share >= max(MUCH, MANY_TIMES * base)

    def rows(self) -> list[tuple[str, str]]:
        """What was counted, each with its name."""
        rows = []
        for length in LENGTHS:
            copied, total = self.written[length]
            text = f"{_percent(self.share(length))} ({copied:,} of {total:,})"
            if self.held_out:
                copied, total = self.held_out[length]
                base = _percent(self.share(length, held_out=True))
                text += f"; of the held-out text {base} ({copied:,} of {total:,})"
            rows.append((f"{length} {self.unit} in a row", text))
        if self.longest:
            quote = self.quote[:SHOWN_CHARACTERS]
            quote += " ..." * (len(quote) < len(self.quote))
            text = f'{self.longest} {self.unit}: "{quote}" ({self.place})'
            rows.append(("longest", text))
        if self.looked_at is not None:
            rows.append(("looked at", f"the first {self.looked_at:,} tokens of the text"))
        return rows

    def lines(self, of_what: str) -> list[str]:
        """The same, for the terminal."""
        name = "word" if self.unit == "words" else "character"
        script = " (its script has no spaces)" if self.unit == "characters" else ""
        head = f"copies       of {of_what}, what stands in the text {name} for {name}{script}:"
        return [head, *(f"             {name}: {text}" for name, text in self.rows())]

    def to_plain(self) -> dict[str, Any]:
        """As JSON."""
        counts = {
            f"{name}_{length}": list(counts[length])
            for name, counts in (("written", self.written), ("held_out", self.held_out))
            for length in counts
        }
        return counts | {name: getattr(self, name) for name in PLAIN_FIELDS}


def _counts(plain: dict[str, Any], name: str) -> dict[int, tuple[int, int]]:
    """Pairs of copied and all stretches; none where the first are not there."""
    counts = {n: plain[f"{name}_{n}"] for n in LENGTHS if f"{name}_{n}" in plain}
    for copied, total in counts.values():
        if not (type(copied) is type(total) is int and 0 <= copied <= total):
            raise ValueError(name)
    if counts and len(counts) < len(LENGTHS):
        raise ValueError(name)
    return {n: (copied, total) for n, (copied, total) in counts.items()}


PLAIN_FIELDS = ("unit", "longest", "quote", "place", "looked_at")
RECITED, MUCH, MANY_TIMES = 16, 0.2, 2  # words; a share; times that of the held-out text


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def describe_place(
    position: int, stream: TokenStream, cache: TokenCache, files: Sequence[Path], spelling: Spelling
) -> str:
    """Where a token of a cache's stream is: file, document of the file, byte of the document."""
    at = stream.locate(position)
    file = cache.place(at)[0]
    document = int(np.searchsorted(cache.document_starts, at, side="right")) - 1
    start, before = int(cache.document_starts[document]), 0
    for begin in range(start, at, READ_TOKENS):
        before += int(spelling.sizes[cache.tokens[begin : min(begin + READ_TOKENS, at)]].sum())
    number = document - int(cache.file_documents[:file].sum()) + 1
    return f"{files[file]}, document {number:,}, near byte {before:,}"
