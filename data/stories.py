"""The embedded stories: who may be in one, what makes their words agree, and the telling.

The sentences and most words are in `stories.grammar`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from grammar import CHOICE, Dice, Grammar, Plot, Step, expand, polish, read_grammar

STORIES_GRAMMAR = Path(__file__).with_name("stories.grammar")
QUOTED = re.compile(r'"[^"]*"')
OUTSIDE_QUOTES = re.compile(r'(?:^|")[^"]*(?:"|$)')

# ---------------------------------------------------------------------------- who may be in it

GIRLS = (
    "Mia Lily Anna Rosa Nina Clara Ella Ruby Sofia Maya Ida Tess Hazel Emma Zoe Amina Freya "
    "Leila Greta Olive June Priya Molly Wanda"
).split()
BOYS = (
    "Tom Ben Leo Max Sam Oscar Finn Noah Jonas Emil Omar Hugo Theo Felix Jack Milo Ravi Peter "
    "Anton Luke Karim Otto Will Henry"
).split()
ANIMAL_GIRLS = "Poppy Willow Bella Dot Fern Luna Pearl Tilly Nutmeg Daisy Minka Misty".split()
ANIMAL_BOYS = "Pip Rusty Bramble Teddy Moss Chester Flint Barley Timo Biscuit Patch Acorn".split()
ANIMALS = {  # kind: where it lives
    "rabbit": "burrow",
    "fox": "den",
    "mouse": "hole",
    "bear": "cave",
    "squirrel": "tree house",
    "hedgehog": "hut",
    "badger": "burrow",
    "otter": "lodge",
    "mole": "burrow",
    "raccoon": "hollow tree",
    "beaver": "lodge",
    "kitten": "cottage",
    "puppy": "cottage",
}
HUMAN_ELDERS = ("Grandma", "Grandpa", "Aunt Rose", "Uncle Ben", "Mrs. Bell", "Mr. Green")
ANIMAL_ELDERS = (
    "Old Owl",
    "Grandmother Goose",
    "Mr. Toad",
    "Mrs. Heron",
    "Uncle Crow",
    "Aunt Tortoise",
)
PARENT_NAMES = {"mother": "Mom", "father": "Dad"}
PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
}
NOT_IN_WINTER = "the beach"

# ---------------------------------------------------------------------------- a story


class Cast:
    """The people, the place and the thing of one story, and the words for them."""

    def __init__(self, grammar: Grammar, plot: Plot, dice: Dice) -> None:
        self.grammar, self.dice = grammar, dice
        self.friend_is_known = False
        self.talkative = dice.pick([0.2, 0.5, 0.9])  # how often what may be left out is told
        sections = grammar.sections
        animal, she = dice.chance(0.4), dice.chance(0.5)
        girls, boys = (ANIMAL_GIRLS, ANIMAL_BOYS) if animal else (GIRLS, BOYS)
        # Hero and friend differ in their pronouns, so that "she" is never in doubt.
        heroes, friends = (girls, boys) if she else (boys, girls)
        kinds = ["girl", "boy"] if she else ["boy", "girl"]
        if animal:
            kinds = dice.shuffled(list(ANIMALS))
        hero, friend = dice.pick(heroes), dice.pick(friends)
        his = PRONOUNS["she" if she else "he"]["his"]
        parent = dice.pick(["mother", "father"])
        by_name = not animal and dice.chance(0.6)
        elder = dice.pick(ANIMAL_ELDERS if animal else HUMAN_ELDERS)

        self.trait = dice.pick(plot.needs["traits"])
        self.season = dice.pick(plot.needs.get("seasons", ["spring", "summer", "autumn"]))
        places = [row.split("; ") for row in sections["where"].lines]
        if self.season == "winter":
            places = [row for row in places if row[0] != NOT_IN_WINTER]
        place, in_it, to_it, spots = dice.pick(places)
        self.spots = dice.shuffled(spots.split(", "))

        self.category = dice.pick(plot.needs["objects"])
        objects = dict(row.split(": ") for row in sections["objects"].lines)
        noun, adjectives = dice.pick(objects[self.category].split("; ")).split(" = ")
        skill, oops, part = dice.pick(sections["skills"].lines).split("; ")

        self.words = {
            "h": hero,
            "kind": kinds[0],
            "trait": self.trait,
            "home": ANIMALS[kinds[0]] if animal else dice.pick(["house", "cottage"]),
            "hand": "paw" if animal else "hand",
            "f": friend,
            "f.kind": kinds[1],
            "f.home": ANIMALS[kinds[1]] if animal else "house",
            "f.new": f"a [young|little|quiet] {kinds[1]} named {friend}",
            "f.intro": f"{his} friend {friend} the {kinds[1]}"
            if animal
            else f"{his} [friend|best friend|cousin] {friend}",
            "par": PARENT_NAMES[parent] if by_name else f"{his} {parent}",
            "e": elder,
            "o": f"{dice.pick(adjectives.split(', '))} {noun}",
            "o.n": noun,
            "p": place,
            "p.in": in_it,
            "p.to": to_it,
            "season": self.season,
            "day": dice.pick(["morning", "afternoon", "day"]),
            "skill": skill,
            "skill.oops": f"[{{He}} tried, and|Oh dear:|At once] {oops}.",
            "skill.part": f"{part}.",
            **PRONOUNS["she" if she else "he"],
            **{f"f.{word}": other for word, other in PRONOUNS["he" if she else "she"].items()},
        }

    def tell(self, steps: list[Step]) -> list[str]:
        """One sentence group for every step that is told."""
        told = [s for s in steps if not s.optional or self.dice.chance(self.talkative)]
        return [self.say(self.dice.pick(step.lines)) for step in told]

    def say(self, line: str) -> str:
        if not self.friend_is_known:  # whoever is told of for the first time is introduced
            line = OUTSIDE_QUOTES.sub(lambda m: m[0].replace("{f}", "{f.intro}"), line)
        return polish(expand(line, self.look_up, self.dice))

    def look_up(self, slot: str) -> str:
        """The words for a slot; a capital in its name, or `.Cap`, asks for a capital letter."""
        key = slot.removesuffix(".Cap").lower()
        words = self._words_for(key)
        if slot.endswith(".Cap") or slot != slot.lower():
            words = CHOICE.sub(lambda match: self.dice.pick(match[1].split("|")), words)
            return words[:1].upper() + words[1:]
        return words

    def _words_for(self, key: str) -> str:
        if key == "p.spot":
            self.spots.append(self.spots.pop(0))
            return self.spots[-1]
        if key == "f.met":
            self.friend_is_known = True
            return self.words["f"]
        if key in ("f.intro", "f.new"):
            was_known, self.friend_is_known = self.friend_is_known, True
            return self.words["f" if was_known else key]
        if key in ("traitline", "seasonline", "seasonsound", "placeline"):
            section, word = {
                "placeline": ("places", self.words["p"]),
                "traitline": ("traits", self.trait),
                "seasonline": ("seasons", self.season),
                "seasonsound": ("sounds", self.season),
            }[key]
            rows = (row.split(": ", 1) for row in self.grammar.sections[section].lines)
            return self.dice.pick([t for keys, t in rows if word == keys or word in keys.split()])
        return self.words[key] if key in self.words else self.grammar.macros[key]


def make_story(grammar: Grammar, plot: Plot, dice: Dice) -> str:
    """Tell `plot` once, 60-250 words, in one paragraph or in three."""
    cast = Cast(grammar, plot, dice)
    opening = cast.tell(grammar.sections["opening"].steps)
    if "intro" not in plot.needs:  # "intro: no": the plot brings the object in itself
        opening += cast.tell(grammar.sections["object"].steps)
    middle = []
    for step in plot.steps:
        knew_friend = cast.friend_is_known
        middle += cast.tell([step])
        # Where a friend comes in at the beginning, there is time to say who that is.
        if (
            cast.friend_is_known
            and not knew_friend
            and step in plot.steps[:2]
            and dice.chance(cast.talkative)
        ):
            middle.append(cast.say(dice.pick(grammar.sections["friends"].lines)))
    ways = [way for way in plot.ways if not way.objects or cast.category in way.objects]
    ending = cast.tell(dice.pick(ways).steps)
    if dice.chance(cast.talkative):
        ending += cast.tell(grammar.sections["closer"].steps)
    parts = [" ".join(part) for part in (opening, middle, ending)]
    story = ("\n" if dice.chance(0.5) else " ").join(parts)
    return reword(story, grammar, cast, dice)


def reword(story: str, grammar: Grammar, cast: Cast, dice: Dice) -> str:
    """Say it a little differently: other words, contractions in speech, `Mia said` / `said Mia`."""
    swaps = [row.split(" = ") for row in grammar.sections["synonyms"].lines]
    for words, others in swaps:
        options = others.split(" | ")
        story = swap_words(story, words, lambda options=options: dice.pick(options), dice, 0.5)
    if dice.chance(0.7):  # in the others everybody speaks like a book
        for words, short in (row.split(" = ") for row in grammar.sections["contractions"].lines):
            inside = words + "(?= [a-z])"  # never at the end: "what it is", not "what it's"
            story = QUOTED.sub(
                lambda m, words=inside, short=short: swap_words(
                    m[0], words, lambda: short, dice, 1
                ),
                story,
            )
    speakers = "|".join(re.escape(cast.words[who]) for who in ("h", "f", "e", "par"))
    story = re.sub(
        rf'([,!?]") said ({speakers})([.,])',
        lambda m: f"{m[1]} {m[2]} said{m[3]}" if dice.chance(0.4) else m[0],
        story,
    )
    return "\n".join(polish(part) for part in story.split("\n"))


def swap_words(
    text: str, words: str, draw: Callable[[], str], dice: Dice, probability: float
) -> str:
    """Put `draw()` for some of the places where `words` (a pattern) stand, capitals kept."""

    def swap(match: re.Match[str]) -> str:
        if not dice.chance(probability):
            return match[0]
        other = match.expand(expand(draw(), str, dice))
        return other[:1].upper() + other[1:] if match[0][0].isupper() else other

    return re.sub(rf"\b{words}\b(?!['-])", swap, text, flags=re.IGNORECASE)


def make_stories(seed: int, count: int) -> list[str]:
    """`count` different stories, the plots in turn, in a shuffled order."""
    grammar, dice = read_grammar(STORIES_GRAMMAR), Dice(seed)
    plots = [plot for plot in grammar.sections.values() if plot.ways]
    stories: dict[str, None] = {}  # a dict keeps its order, a set does not
    while len(stories) < count:
        stories[make_story(grammar, plots[len(stories) % len(plots)], dice)] = None
    return dice.shuffled(list(stories))
