"""The notation of the .grammar files, and draws from it that are the same on every machine.

A grammar has sections of lines and macros; in a line [a|b] is one of the two and {name} a slot,
filled by what the caller knows or by a macro.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Way:
    """One way a plot goes on and ends; `objects` empty: whatever the object is."""

    objects: list[str]
    steps: list[Step] = field(default_factory=list)


@dataclass
class Step:
    """Lines of which one is told; an optional step is sometimes left out."""

    optional: bool
    lines: list[str] = field(default_factory=list)


@dataclass
class Plot:
    """A plot: what it needs, its steps, and the ways it can go on."""

    name: str
    needs: dict[str, list[str]]
    steps: list[Step] = field(default_factory=list)
    ways: list[Way] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # of sections that are tables, not plots


@dataclass
class Grammar:
    """A grammar file, read: its sections by name and its macros."""

    sections: dict[str, Plot]
    macros: dict[str, str]


def read_grammar(path: Path) -> Grammar:
    """Read a grammar file; its notation is described at its top."""
    sections: dict[str, Plot] = {}
    macros: dict[str, str] = {}
    steps: list[Step] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith(":: "):
            name, _, words = line[3:].partition(" = ")
            macros[name] = "[" + words.replace(" | ", "|") + "]"
        elif line.startswith("== "):
            name, *needs = line[3:].split(" | ")
            plot = Plot(name, {k: v.split() for k, v in (need.split(": ") for need in needs)})
            sections[name] = plot
            steps = plot.steps
        elif line.startswith("=> "):
            _, _, objects = line[3:].partition(" | ")
            plot.ways.append(Way(objects.split()))
            steps = plot.ways[-1].steps
        elif line.startswith("--"):
            steps.append(Step(line.endswith("?")))
        elif steps:
            steps[-1].lines.append(line)
        else:
            plot.lines.append(line)
    return Grammar(sections, macros)


class Dice:
    """Draws that are the same on every platform and version: only `Random.random` is promised."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, options: Sequence):
        return options[int(self._random.random() * len(options))]

    def shuffled(self, options: Sequence) -> list:
        left, drawn = list(options), []
        while left:
            drawn.append(left.pop(int(self._random.random() * len(left))))
        return drawn


CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{([^{}]*)\}")


def expand(template: str, look_up: Callable[[str], str], dice: Dice) -> str:
    """Choose in every `[a|b]`, then fill every `{slot}`, left to right, until none is left."""
    while True:
        template = CHOICE.sub(lambda match: dice.pick(match[1].split("|")), template)
        template, slots = SLOT.subn(lambda match: look_up(match[1]), template)
        if not slots:
            return template


VOWEL_SOUND = re.compile(r"(?!one\b|once\b|uni|use|eu)[aeiou]|hour|honest|honor", re.IGNORECASE)
ARTICLE = re.compile(r"\b([Aa])n? (?=(\w+))")


def polish(text: str) -> str:
    """Make articles right (a/an), spaces single, and the first letter of sentences a capital."""
    text = re.sub(" +", " ", text).strip()
    text = ARTICLE.sub(lambda m: m[1] + ("n " if VOWEL_SOUND.match(m[2]) else " "), text)
    # After `!"` or `?"` the sentence may go on ("Look!" said Mia), so only a plain end counts.
    return re.sub(r'(^"?|[.!?] "?|\.\.\. |\." "?)([a-z])', lambda m: m[1] + m[2].upper(), text)
