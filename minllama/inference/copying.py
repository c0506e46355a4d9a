"""What of a model's text stands in another word for word: after a pretraining, and of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from config import Options
from llama import Llama
from minllama.inference.streaming import PROMPT_TEMPERATURE
from minllama.model.generation import Sampling, generate_tokens
from minllama.system.signals import StopRequest
from minllama.text.copies import (
    LENGTHS,
    SAMPLED_TOKENS,
    Copies,
    CopySearch,
    Words,
    describe_place,
    has_spaces,
    parts_of,
)
from minllama.text.reading import Reading
from minllama.text.spelling import Spelling
from minllama.text.stream import TokenStream, whole_stream
from minllama.text.token_cache import TokenCache, build_or_load
from tokenizer import Tokenizer

SAMPLES, OPENING, WRITTEN = 20, 16, 64  # texts; tokens of their openings, and written after each
HELD_OUT_PARTS, HELD_OUT_TOKENS = 32, 1 << 17  # of the text that gives the base rate
# Measured on two CPU cores: tokens looked at in a second, and seconds to write, for each parameter.
LOOKED_AT_PER_SECOND, SECONDS_PER_PARAMETER, SECONDS = 4e6, 1.2e-7, 0.5
WRITINGS = 3  # of so many texts after a run, at most: `repeating` has two more


def copying_seconds(parameters: int, tokens: int) -> float:
    """About how long `measure_copies` takes, and `measure_repeats` after it."""
    return SECONDS + WRITINGS * SECONDS_PER_PARAMETER * parameters + tokens / LOOKED_AT_PER_SECOND


def most_looked_at(minutes: float | None) -> int | None:
    """How many tokens to look at after a run of so many minutes, to take 1 %; None: all."""
    return minutes and int(max(1.0, 0.01 * 60 * minutes) * LOOKED_AT_PER_SECOND)


class Original:
    """The text that copies are looked for in: those tokens of a cache that are in a stream."""

    def __init__(
        self,
        cache: TokenCache,
        files: Sequence[Path],
        stream: TokenStream,
        tokenizer: Tokenizer,
        *,
        most: int | None = None,
    ) -> None:
        """Look at the first `most` tokens at most; None: at all."""
        self.cache, self.files, self.stream = cache, files, stream
        self.spelling = Spelling(tokenizer, spaces=True)
        self.looked_at = None if most is None or most >= len(stream) else most
        text, _ = self.spelling.spell(stream.read(0, min(SAMPLED_TOKENS, len(stream))))
        self.spaced = has_spaces(text.tobytes())

    @property
    def unit(self) -> str:
        """What stretches are counted in."""
        return "words" if self.spaced else "characters"

    def words(self, text: bytes) -> Words:
        """The words of a text, or where this one has no spaces its characters."""
        return Words.of(np.frombuffer(text, np.uint8), [], spaced=self.spaced)

    def search(
        self,
        written: Sequence[Words],
        held_out: Sequence[Words] = (),
        check_stop: Callable[[], None] = lambda: None,
    ) -> tuple[CopySearch, Copies]:
        """Look for texts in this one; raises what `check_stop`, called now and then, raises."""
        search = CopySearch(written, held_out)
        for part in parts_of(self.stream, self.spelling, spaced=self.spaced, most=self.looked_at):
            search.look_in(part)
            check_stop()
        is_long = search.longest >= LENGTHS[0]
        where = (search.position, self.stream, self.cache, self.files, self.spelling)
        return search, Copies(
            unit=self.unit,
            written={length: search.count(written, length) for length in LENGTHS},
            held_out={length: search.count(held_out, length) for length in LENGTHS if held_out},
            longest=search.longest if is_long else 0,
            quote=search.quote,
            place=describe_place(*where) if is_long else "",
            looked_at=self.looked_at,
        )


def measure_copies(
    model: Llama,
    tokenizer: Tokenizer,
    original: Original,
    held_out: TokenStream | None,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[Copies, list[Words]]:
    """How much the model copies after openings of held-out text, beside that text itself.

    And the texts that it wrote. Raises what `check_stop` raises.
    """
    sampling = Sampling(PROMPT_TEMPERATURE)
    texts = write_texts(model, tokenizer, original, held_out, sampling, check_stop)
    base = held_out_words(held_out, original)
    return original.search(texts, base, check_stop)[1], texts


def write_texts(
    model: Llama,
    tokenizer: Tokenizer,
    original: Original,
    held_out: TokenStream | None,
    sampling: Sampling,
    check_stop: Callable[[], None],
) -> list[Words]:
    """What the model writes after openings of held-out text, else from a document's beginning."""
    openings = [[tokenizer.bos_id]] * SAMPLES
    if held_out is not None:
        openings = find_openings(held_out, tokenizer, model.config.max_seq_len)
    end_ids = tokenizer.vocabulary.end_ids
    texts = write_after(openings, model, original, sampling, end_ids, check_stop)
    return [original.words(text) for text in texts]


def held_out_words(held_out: TokenStream | None, original: Original) -> list[Words]:
    """The words of a held-out text, or of a long one's parts from all over it."""
    if held_out is None:
        return []
    parts = parts_of(spread_out(held_out), original.spelling, spaced=original.spaced)
    return [part.words for part in parts]


def find_openings(held_out: TokenStream, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """SAMPLES beginnings of documents from all over a stream; of long ones, of parts."""
    openings, share = [], max(1, len(held_out) // SAMPLES)
    length = min(OPENING, max(1, context // 4))
    for number in range(SAMPLES):
        start = min(number * share, max(0, len(held_out) - length))
        near = held_out.read(start, min(start + share, start + 4096, len(held_out)))
        begins = np.flatnonzero(near == tokenizer.bos_id)
        start += int(begins[0]) if len(begins) else 0
        ids = held_out.read(start, min(start + length, len(held_out))).tolist()
        is_end = [token == tokenizer.eos_id and place > 0 for place, token in enumerate(ids)]
        openings.append(ids[: is_end.index(True)] if any(is_end) else ids)
    return openings


def spread_out(stream: TokenStream) -> TokenStream:
    """The stream, or of a long one parts from all over it."""
    if len(stream) <= HELD_OUT_TOKENS:
        return stream
    size = HELD_OUT_TOKENS // HELD_OUT_PARTS
    starts = np.linspace(0, len(stream) - size, HELD_OUT_PARTS).astype(int).tolist()
    return stream.select([(start, start + size) for start in starts])


def write_after(
    openings: list[list[int]],
    model: Llama,
    original: Original,
    sampling: Sampling,
    end_ids: list[int],
    check_stop: Callable[[], None],
) -> list[bytes]:
    """What the model writes after each opening, always with the same seeds, in whole words."""
    longest = max(map(len, openings))
    written: list[list[int]] = [[] for _ in openings]
    ended = [False] * len(openings)
    for step in generate_tokens(
        model,
        openings,
        max_new_tokens=min(WRITTEN, max(1, model.config.max_seq_len - longest)),
        sampling=sampling,
        seeds=list(range(len(openings))),
        stop_ids=end_ids,
    ):
        check_stop()
        for row, token in enumerate(step):
            ended[row] |= token is None
            written[row] += [] if token is None else [token]
    texts = []
    for ids, has_ended in zip(written, ended, strict=True):
        text = original.spelling.spell(np.array(ids, np.int64))[0].tobytes()
        texts.append(whole_words(text, spaced=original.spaced, ended=has_ended))
    return texts


def whole_words(text: bytes, *, spaced: bool, ended: bool) -> bytes:
    """A text without the rest of a word before it, and without what was begun at its end."""
    if not spaced:
        return text.decode("utf-8", errors="ignore").encode()
    parts = text.split()
    if parts and text[:1].strip():
        del parts[0]
    if parts and text[-1:].strip() and not ended:
        del parts[-1]
    return b" ".join(parts)


def report_copies(
    written: Sequence[tuple[str, str]],
    files: Sequence[Path],
    tokenizer: Tokenizer,
    options: Options,
    stop: StopRequest,
) -> list[str]:
    """What of texts, behind the prompts that they begin with, stands in files: counted and marked.

    Raises Interrupted when asked to stop.
    """
    reading = Reading(encoding=options.encoding)
    cache = build_or_load(files, tokenizer, reading, options.cache_dir, check_stop=stop.check)
    original = Original(cache, files, whole_stream(cache), tokenizer)
    texts = [text.removeprefix(prompt) for prompt, text in written]
    search, copies = original.search([original.words(t.encode()) for t in texts], (), stop.check)
    pairs = zip(written, texts, strict=True)
    return [
        *copies.lines(f"{len(texts):,} {'text' if len(texts) == 1 else 'texts'}"),
        f"             marked in [[ ]]: {LENGTHS[0]} {original.unit} in a row or more",
        *(prompt + marked(text, original, search) for (prompt, _), text in pairs),
    ]


def marked(text: str, original: Original, search: CopySearch) -> str:
    """A text that was looked for, with [[ ]] around what is in stretches that were copied."""
    data = text.encode()
    words = original.words(data)
    is_copied, first = search.is_copied(words, LENGTHS[0])
    inside = np.zeros(len(words) + 1, int)
    np.add.at(inside, first[is_copied], 1)
    np.add.at(inside, first[is_copied] + LENGTHS[0], -1)
    edges = np.flatnonzero(np.diff(np.cumsum(inside) > 0, prepend=False))
    pieces, end = [], 0
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        begin, close = words.starts[start], words.stops[stop - 1]
        pieces += [data[end:begin], b"[[", data[begin:close], b"]]"]
        end = close
    return b"".join([*pieces, data[end:]]).decode("utf-8", errors="replace")
