"""minllama/inference/repeating.py: stretches of four words again, counted by brute force."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from running import write_model, write_stories

from llama import load_pretrained
from minllama.inference import copying, repeating
from minllama.inference.copying import Original
from minllama.text.reading import Reading
from minllama.text.stream import whole_stream
from minllama.text.token_cache import build_or_load
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("empty_folder")


def original_text(texts: Path) -> tuple[Original, object]:
    cache = build_or_load([texts], Tokenizer(), Reading(), Path("cache"))
    return Original(cache, [texts], whole_stream(cache), Tokenizer()), whole_stream(cache)


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_are_those_of_brute_force(seed):
    """A stretch counts where it was in the same text before, not where it is in another."""
    draw, (original, _) = random.Random(seed), original_text(write_stories(Path.cwd()))
    texts = [" ".join(draw.choice("abc") for _ in range(draw.randrange(40))) for _ in range(9)]
    repeated = total = 0
    for text in texts:
        words, seen = text.split(), set()
        for first in range(len(words) - 3):
            stretch = tuple(words[first : first + 4])
            repeated, total = repeated + (stretch in seen), total + 1
            seen.add(stretch)
    words = [original.words(text.encode()) for text in texts]
    assert repeating.count_repeats(words) == (repeated, total)
    assert repeated
    whole = original.words(" ".join(texts).encode())
    pieces = repeating.cut_alike([whole], 10)
    assert {len(piece) for piece in pieces} == {10}
    assert [p.quote(0, 10) for p in pieces][1] == " ".join(" ".join(texts).split()[10:20])


def measured(model: object, temperature: str) -> list[list[str]]:
    original, stream = original_text(write_stories(Path.cwd()))
    what = (model, Tokenizer(), original, stream)
    return repeating.measure_repeats(*what, copying.measure_copies(*what)[1])


def test_what_loops_is_told_from_what_does_not():
    """A user who saw a text go round and round was told of temperatures, whatever the model did.

    An untrained model's likeliest words loop, and what it draws at 0.8 does not; one whose every
    next token is certain loops at any temperature.
    """
    model = load_pretrained(write_model(Path.cwd(), dim=16, n_layers=1))
    rows = dict(measured(model, "usual"))
    assert rows["in short"].startswith("it does where always the likeliest word is taken, and not")
    assert "--temperature 0 --repetition_penalty 1.1" in rows
    line = repeating.repeat_line([*map(list, rows.items())], "words")
    assert line.startswith("repeats      4 words again in the same text: 0.0% --temperature 0.8, ")
    assert " held-out text" in line and rows["in short"] in line
    with torch.no_grad():
        model.norm.weight.mul_(10_000)
    assert dict(measured(model, "certain"))["in short"].startswith("it does, even at --temperature")


def test_held_out_text_says_what_is_usual():
    """A text of refrains repeats itself, and so may its model."""
    assert repeating.loops((30, 100), (5, 100))
    assert not repeating.loops((30, 100), (12, 100))
    assert not repeating.loops((9, 100), (0, 100))
    assert repeating.loops((98, 100), (57, 100)) and not repeating.loops((60, 100), (57, 100))
    assert not repeating.loops((0, 0), (0, 0))
