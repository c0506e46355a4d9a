"""Whether a model repeats itself: how often stretches of four words come again within one text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from llama import Llama
from minllama.inference.copying import Original, held_out_words, write_texts
from minllama.inference.streaming import PROMPT_TEMPERATURE
from minllama.model.generation import Sampling
from minllama.text.copies import Words
from minllama.text.stream import TokenStream
from tokenizer import Tokenizer

STRETCH = 4  # words
LOOPS, MANY_TIMES = 0.1, 3  # from which share on; and times that of held-out texts
PENALTY = 1.1
Counts = tuple[int, int]  # stretches that came before in their text, of all


def count_repeats(texts: Iterable[Words]) -> Counts:
    """The stretches of four words that came before in the same text, and all."""
    hashes = [words.stretches(STRETCH)[0] for words in texts]
    return sum(len(h) - len(np.unique(h)) for h in hashes), sum(map(len, hashes))


def cut_alike(texts: Iterable[Words], length: int) -> list[Words]:
    """Pieces of so many words: longer texts repeat themselves more."""
    pieces = []
    for words in texts:
        for start in range(0, len(words) - length + 1, length):
            kept = slice(start, start + length)
            parts = (words.starts[kept], words.stops[kept], words.groups[kept])
            pieces.append(Words(words.text, *parts))
    return pieces


def measure_repeats(
    model: Llama,
    tokenizer: Tokenizer,
    original: Original,
    held_out: TokenStream | None,
    texts: Sequence[Words],
    check_stop: Callable[[], None] = lambda: None,
) -> list[list[str]]:
    """How much the model repeats itself, why, and what helps: rows of a name and a text.

    `texts` are those of `measure_copies`; others are written at temperature 0, and where these
    loop with a repetition penalty. None of too short texts. Raises what `check_stop` raises.
    """
    usual = f"--temperature {PROMPT_TEMPERATURE:g}"
    counts = {usual: count_repeats(texts)}
    likeliest, penalized = "--temperature 0", f"--temperature 0 --repetition_penalty {PENALTY:g}"

    def write(sampling: Sampling) -> Counts:
        how = (model, tokenizer, original, held_out, sampling, check_stop)
        return count_repeats(write_texts(*how))

    counts[likeliest] = write(Sampling(0))
    length = max(STRETCH, round(np.mean([len(words) for words in texts] or [0])))
    base = count_repeats(cut_alike(held_out_words(held_out, original), length))
    if loops(counts[likeliest], base):
        counts[penalized] = write(Sampling(0, repetition_penalty=PENALTY))
    if not counts[usual][1] or not counts[likeliest][1]:
        return []
    rows = [[name, _as_text(count)] for name, count in counts.items()]
    if base[1]:
        rows.append(["held-out text", f"{_as_text(base)} in pieces of {length} {original.unit}"])
    if loops(counts[usual], base):
        why = f"it does, even at {usual}: a higher temperature is not what it lacks"
    elif loops(counts[likeliest], base):
        why = f"it does where always the likeliest word is taken, and not at {usual}"
        if not loops(counts[penalized], base):
            why += f", nor with --repetition_penalty {PENALTY:g}"
    else:
        why = "it does not"
    return [["in short", why], *rows]


def loops(counts: Counts, base: Counts) -> bool:
    """Whether these are far more repeats than held-out texts have."""
    usual = base[0] / max(1, base[1])
    most = min(MANY_TIMES * usual, (1 + usual) / 2)  # of a text of refrains the first is all
    return counts[0] > max(LOOPS, most) * counts[1]


def _as_text(counts: Counts) -> str:
    repeated, total = counts
    return f"{repeated / max(1, total):.1%} ({repeated:,} of {total:,})"


def repeat_line(rows: Sequence[Sequence[str]], unit: str) -> str:
    """The same rows in a line for the terminal."""
    (_, why), *shares = rows
    figures = ", ".join(f"{text.split()[0]} {name}" for name, text in shares)
    return f"repeats      {STRETCH} {unit} again in the same text: {figures}: {why}"
