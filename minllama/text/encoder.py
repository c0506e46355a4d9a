"""Documents to token ids: streamed in parts, and exactly those of encoding each document whole.

So a document may be far larger than memory. Knows nothing of tensors, chunks or models.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from minllama.text.documents import Block
from minllama.vocabulary.sentence_piece import SPACE
from tokenizer import Tokenizer

WORD_CACHE_SPEED = 2.5  # characters per second, relative to one thread of SentencePiece
WORD_CACHE_ENTRIES = 1 << 19
WORD_CACHE_CHARS = 64  # a longer word is hardly ever repeated


class EncodedPart(NamedTuple):
    """Ids of a stretch of one document, without BOS and EOS."""

    ids: np.ndarray  # (n,) in the encoder's dtype
    utf8_bytes: int  # of the text
    starts: bool  # the document's first part
    ends: bool  # and its last


class _Part(NamedTuple):
    text: str
    dropped: str  # the space before it at which the document was cut, else ""
    starts: bool  # the document's first part
    ends: bool  # and its last


class DocumentEncoder:
    """Streams documents into ids, exactly those of encoding each document whole.

    Where it is known that a text can be cut without changing its ids (`Vocabulary.cut`), long
    documents are; with SentencePiece's of Llama 2's kind one thread then looks up what each word
    encodes to, and the others run it, which releases the GIL, on the rest of each batch. With any
    other vocabulary a document is encoded whole.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        threads: int | None = None,
        part_chars: int = 1 << 16,  # longer documents are cut into parts of about this many
        batch_chars: int = 1 << 21,  # encoded at a time: work for the threads, little memory
    ) -> None:
        vocabulary = self.vocabulary = tokenizer.vocabulary
        self.threads = threads or os.cpu_count() or 1
        self.part_chars, self.batch_chars = part_chars, batch_chars
        self.dtype = np.dtype("<u2" if tokenizer.n_words <= 1 << 16 else "<u4")
        self.looks_up = vocabulary.cut is not None and vocabulary.opening_space  # SentencePiece's
        self.newline_id = (vocabulary.encode("\n") or [0])[-1]
        # Ids of the space put before every text, which no part but the first has.
        self.prefix_length = len(vocabulary.encode("\n")) - 1 if self.looks_up else 0
        self.words: dict[str, bytes] = {}  # to their ids' bytes, so that a text's can be joined

    def encode(self, blocks: Iterable[Block]) -> Iterator[list[EncodedPart]]:
        """Batches of encoded parts, in order."""
        batch, size = [], 0
        with ThreadPoolExecutor(max_workers=1) as helper:
            for part in self._parts(blocks):
                batch.append(part)
                size += len(part.text) + 16  # an empty part costs something too
                if size >= self.batch_chars:
                    yield self._encode_batch(batch, helper)
                    batch, size = [], 0
            if batch:
                yield self._encode_batch(batch, helper)

    def _parts(self, blocks: Iterable[Block]) -> Iterator[_Part]:
        pending, size, enough = [], 0, self.part_chars
        dropped, starts, cut_at = "", True, self.vocabulary.cut
        for block in blocks:
            pending.append(block.text)
            size += len(block.text)
            if size < enough and not block.ends:
                continue
            text, start = "".join(pending), 0
            while cut_at is not None and len(text) - start > self.part_chars:
                cut = cut_at.search(text, start + self.part_chars)
                if cut is None:
                    break
                yield _Part(text[start : cut.start()], dropped, starts, ends=False)
                dropped, starts, start = cut[0], False, cut.end()
            text = text[start:]
            if block.ends:
                yield _Part(text, dropped, starts, ends=True)
                text, dropped, starts = "", "", True
            pending, size = [text], len(text)
            enough = 2 * max(self.part_chars, size)  # doubling: a text without cuts stays linear

    def _encode_batch(self, parts: list[_Part], helper: ThreadPoolExecutor) -> list[EncodedPart]:
        looked_up = 0
        if self.looks_up:  # both take equally long if each gets as much as it is fast
            share = WORD_CACHE_SPEED / (WORD_CACHE_SPEED + self.threads - 1)
            ends = np.cumsum([len(part.text) + 1 for part in parts])
            looked_up = int(np.searchsorted(ends, share * ends[-1], side="right"))
        rest = helper.submit(self._encode_parts, parts[looked_up:])
        arrays = self._look_up(parts[:looked_up]) + rest.result()
        encoded = []
        for part, ids in zip(parts, arrays, strict=True):
            size = len((part.dropped + part.text).encode())
            encoded.append(EncodedPart(ids, size, part.starts, part.ends))
        return encoded

    def _encode_parts(self, parts: list[_Part]) -> list[np.ndarray]:
        threads = max(1, self.threads - self.looks_up)
        encoded = self.vocabulary.encode_many([part.text for part in parts], threads)
        return [
            ids[0 if part.starts or part.dropped else self.prefix_length :].astype(self.dtype)
            for part, ids in zip(parts, encoded, strict=True)
        ]

    def _look_up(self, parts: list[_Part]) -> list[np.ndarray]:
        if not parts:
            return []
        texts = [f" {part.text}" if part.starts or part.dropped else part.text for part in parts]
        words = _split_words("\n".join(texts))  # as one text: of documents there may be many
        missing = list(set(words).difference(self.words))
        self._learn(missing)
        ids = np.frombuffer(b"".join(map(self.words.__getitem__, words)), self.dtype)[1:]
        if len(self.words) > WORD_CACHE_ENTRIES:
            self.words.clear()
        for word in missing:
            if len(word) > WORD_CACHE_CHARS:
                self.words.pop(word, None)
        # The newline that joins a text to the next comes after its own and those of all before.
        joints = np.cumsum([text.count("\n") + 1 for text in texts])[:-1] - 1
        return _split_at(ids, np.flatnonzero(ids == self.newline_id)[joints])

    def _learn(self, words: list[str]) -> None:
        # As the lines of a few texts: one call per word would cost as much as the encoding.
        newline = np.array(self.newline_id, self.dtype).tobytes()
        groups = [words[i :: 4 * self.threads] for i in range(min(len(words), 4 * self.threads))]
        texts = ["".join(w if w[:1] == "\n" else f"\n {w}" for w in group) for group in groups]
        encoded = self.vocabulary.encode_many(texts, self.threads)
        for group, ids in zip(groups, encoded, strict=True):
            lines = _split_at(ids.astype(self.dtype), np.flatnonzero(ids == self.newline_id))[1:]
            for word, line in zip(group, lines, strict=True):
                self.words[word] = newline * (word[:1] == "\n") + line.tobytes()


def _split_words(text: str) -> list[str]:
    """The words of `text` after a newline put in front of it.

    "a b\\nc" gives ["\\na", "b", "\\nc"]: a word without a newline had a space before it. Of
    several spaces in a row, which a vocabulary may join, all but the first become SPACE and
    belong to the word. By str.split, three times as fast as a regular expression.
    """
    text = text.replace("  ", f" {SPACE}").replace(f"{SPACE} ", 2 * SPACE)
    return f"\n{text}".replace("\n", " \n").split(" ")[1:]


def _split_at(ids: np.ndarray, places: np.ndarray) -> list[np.ndarray]:
    """What is between the ids at these places, which belong to no part."""
    edges = [-1, *places.tolist(), len(ids)]
    return [ids[start + 1 : stop] for start, stop in pairwise(edges)]
