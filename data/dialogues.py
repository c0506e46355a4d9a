"""The embedded dialogues: questions about the stories' world, from `chat.grammar`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from grammar import Dice, Grammar, expand, polish, read_grammar
from stories import ANIMALS, STORIES_GRAMMAR, Cast

FORMS = 4  # ways in which the training asks for a fact
MIXED = 150  # dialogues of two to six questions about anything
TALE_PLOTS = ("lost", "stranger", "treasure", "woods", "fishing")  # who and what is in tales
SLOPPY = 0.25  # this share of the questions is typed without care
CHAT_GRAMMAR = Path(__file__).with_name("chat.grammar")

Dialogue = list[tuple[str, str]]  # questions and their answers


@dataclass
class Topic:
    """Facts, the ways to ask for them, and the answer's form."""

    asked: list[str]
    asked_in_test: list[str]  # words that no training question has
    asked_behind: list[str]  # another question of the topic
    answer: str
    facts: list[dict[str, str]]


def read_topics(grammar: Grammar, dice: Dice) -> list[Topic]:
    """The topics of chat.grammar, with the animals' homes and one tale of each animal."""
    homes = {
        home: [k for k, in_it in ANIMALS.items() if in_it == home] for home in ANIMALS.values()
    }
    lodgers = {home: listed([f"a {kind}" for kind in kinds]) for home, kinds in homes.items()}
    tales = make_tales(grammar.sections.pop("told").lines, dice)
    known = {"home": ANIMALS, "lodgers": lodgers, "tales": tales}
    topics = []
    for name, section in grammar.sections.items():
        marked: dict[str, list[str]] = {mark: [] for mark in ("?", "??", "+", "!", "")}
        for line in section.lines:
            mark, _, words = line.partition(" ")
            marked[mark if mark in marked else ""].append(words if mark in marked else line)
        rows = known[name].items() if name in known else [row.split("; ") for row in marked[""]]
        facts = [dict(zip("abc", row, strict=False)) for row in rows]
        topics.append(Topic(marked["?"], marked["??"], marked["+"], marked["!"][0], facts))
    return topics


def listed(names: list[str]) -> str:
    """The names as one speaks them: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def make_tales(told: list[str], dice: Dice) -> dict[str, str]:
    """A tale in a few sentences for each kind of animal, of heroes with different names."""
    stories = read_grammar(STORIES_GRAMMAR)
    tales: dict[str, str] = {}
    heroes: set[str] = set()
    while len(tales) < len(ANIMALS):
        cast = Cast(stories, stories.sections[dice.pick(TALE_PLOTS)], dice)
        kind, hero = cast.words["kind"], cast.words["h"]
        if kind in ANIMALS and kind not in tales and hero not in heroes:
            tales[kind] = cast.say(told[len(tales) % len(told)])
            heroes.add(hero)
    return tales


def make_dialogues(seed: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """(train, test): dialogues of one to six questions, those of the test of one.

    The test asks for each fact in words that this fact is not asked for in the training; about half
    of them are words that nothing is asked for in there.
    """
    grammar, dice = read_grammar(CHAT_GRAMMAR), Dice(seed)
    train: list[Dialogue] = []
    test: list[Dialogue] = []

    def say(form: str, fact: dict[str, str]) -> str:
        def look_up(slot: str) -> str:
            words = {**grammar.macros, **fact}[slot.removesuffix(".Cap")]
            return words[:1].upper() + words[1:] if slot.endswith(".Cap") else words

        return polish(expand(form, look_up, dice))

    for topic in read_topics(grammar, dice):
        taught: list[list[tuple[str, str]]] = []  # of each fact
        for fact in topic.facts:
            answer, forms = say(topic.answer, fact), dice.shuffled(topic.asked)
            if topic.asked_in_test:
                form = dice.pick([forms.pop(), topic.asked_in_test[0]])
                test.append([(say(form, fact), answer)])
            taught.append([(say(form, fact), answer) for form in forms[:FORMS]])
            train += [[exchange] for exchange in taught[-1]]
        for fact, of_fact in zip(topic.facts, taught, strict=True):
            if topic.asked_behind:
                before = dice.pick([other for other in taught if other is not of_fact])
                asked = say(dice.pick(topic.asked_behind), fact)
                train.append([dice.pick(before), (asked, of_fact[0][1])])
    alone = [dialogue[0] for dialogue in train if len(dialogue) == 1]
    for _ in range(MIXED):  # what was said of other things before must not matter
        train.append([dice.pick(alone) for _ in range(dice.pick(range(2, 7)))])
    return [sloppy(dialogue, dice) for dialogue in dice.shuffled(train)], test


def sloppy(dialogue: Dialogue, dice: Dice) -> Dialogue:
    """The dialogue with some questions as people type them: small letters, no mark at the end."""
    return [
        ((asked[:1].lower() + asked[1:]).rstrip("?.!") if dice.chance(SLOPPY) else asked, answer)
        for asked, answer in dialogue
    ]


def dialogue_line(dialogue: Dialogue) -> str:
    """A line of .jsonl in one of the two forms that are read."""
    if len(dialogue) == 1:
        ((prompt, response),) = dialogue
        return json.dumps({"prompt": prompt, "response": response})
    turns = [
        {"role": role, "content": words}
        for exchange in dialogue
        for role, words in zip(("user", "assistant"), exchange, strict=True)
    ]
    return json.dumps({"conversations": turns})
