"""The embedded reviews: labelled sentences, whose words are in `reviews.grammar`."""

from __future__ import annotations

from pathlib import Path

from grammar import Dice, Grammar, expand, polish, read_grammar

LABELS = ["awful", "bad", "average", "good", "excellent"]
FRAMED = 0.75  # this share of the reviews uses sentences that are the same in all classes
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


def make_review(grammar: Grammar, name: str, dice: Dice) -> str:
    """One sentence of the class `name`; a word is used only once in it."""
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

    section = "frames" if dice.chance(FRAMED) else name
    line = dice.pick(grammar.sections[section].lines)
    return polish(expand(line, look_up, dice)).replace(" ,", ",")
