"""The embedded reviews, whose words are in `reviews.grammar`: labelled sentences, and plain text.

The text is for pretraining. It holds none of the labelled sentences, and relates how films are
spoken of to what they are said to be, as reviews do.
"""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

from grammar import Dice, Grammar, expand, polish, read_grammar

LABELS = ["awful", "bad", "average", "good", "excellent"]
FRAMED = 0.75  # this share of the reviews uses sentences that are the same in all classes
SENTENCE_END = re.compile(r"(?<=[.?!]) ")
REVIEWS_GRAMMAR = Path(__file__).with_name("reviews.grammar")


def make_reviews(seed: int, count: int) -> list[tuple[int, str]]:
    """`count` different (label, sentence) pairs; the classes are drawn, so nearly balanced."""
    grammar, dice = read_grammar(REVIEWS_GRAMMAR), Dice(seed)
    reviews: dict[str, int] = {}
    while len(reviews) < count:
        label = dice.pick(range(len(LABELS)))
        sentence = make_review(grammar, LABELS[label], dice)
        reviews.setdefault(sentence, label)
    return [(label, sentence) for sentence, label in reviews.items()]


def make_review_texts(seed: int, count: int, without: Set[str]) -> list[str]:
    """`count` different reviews: one or two sentences of a class, and what the film is then called.

    None of the sentences, nor a part of one that is a sentence itself, is in `without`.
    """
    grammar, dice = read_grammar(REVIEWS_GRAMMAR), Dice(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        name = dice.pick(LABELS)
        sections = [dice.pick(["plain", "plain", name]) for _ in range(dice.pick([1, 2]))]
        sentences = [make_review(grammar, name, dice, section=section) for section in sections]
        if not any(without & {drawn, *SENTENCE_END.split(drawn)} for drawn in sentences):
            line = dice.pick(grammar.sections["conclusions"].lines)
            end = polish(expand(line, {"label": name}.__getitem__, dice))
            texts[" ".join([*sentences, end])] = None
    return list(texts)


def make_review(grammar: Grammar, name: str, dice: Dice, *, section: str | None = None) -> str:
    """One sentence of the class `name`, of any `section`; a word is used only once in it."""
    used: set[str] = set()

    def look_up(slot: str) -> str:
        key = slot.removesuffix(".Cap")
        if key in ("verdict", "other"):  # "other": what is said of something else, or by others
            of = name if key == "verdict" else dice.pick(LABELS)
            words = grammar.sections[f"verdict-{of}"].lines
        else:
            words = grammar.macros[key][1:-1].split("|")
        word = expand(dice.pick([w for w in words if w not in used] or words), look_up, dice)
        used.add(word)
        return word[:1].upper() + word[1:] if slot.endswith(".Cap") else word

    section = section or ("frames" if dice.chance(FRAMED) else name)
    line = dice.pick(grammar.sections[section].lines)
    return polish(expand(line, look_up, dice)).replace(" ,", ",")
