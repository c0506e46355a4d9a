"""Makes the embedded data from a seed: stories, a vocabulary, labelled reviews, the small model.

The sentences and most words are in `stories.grammar` and `reviews.grammar`; who may be in a
story, and what makes their words agree, is here. The same seed gives the same bytes on every
machine. It knows nothing of models: `--model` runs the program's own pretraining command.

    python data/make_data.py            # corpus, vocabulary, reviews
    python data/make_data.py --model    # also stories-tiny.pt
    python data/make_data.py --check    # are the files here those that the seed makes?
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(__file__).resolve().parent
ROOT = DATA.parent
sys.path.insert(0, str(ROOT))  # tokenizer.py is in the root of the repository

SEED = 1337
STORIES = 2500  # about 2 MB
VAL_EVERY = 20  # one story in twenty is held out
VOCAB_SIZE = 2048
REVIEWS = {"train": 3000, "dev": 400, "test": 400}
FRAMED = 0.75  # this share of the reviews uses sentences that are the same in all classes
FORMS = 4  # ways in which the training asks for a fact
MIXED = 150  # dialogues of two to six questions about anything
TALE_PLOTS = ("lost", "stranger", "treasure", "woods", "fishing")  # who and what is in tales
SLOPPY = 0.25  # this share of the questions is typed without care
LABELS = ["awful", "bad", "average", "good", "excellent"]
MODEL_NAME = "stories-tiny.pt"

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

# ---------------------------------------------------------------------------- the notation


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
OUTSIDE_QUOTES = re.compile(r'(?:^|")[^"]*(?:"|$)')
QUOTED = re.compile(r'"[^"]*"')
ARTICLE = re.compile(r"\b([Aa])n? (?=(\w+))")


def polish(text: str) -> str:
    """Make articles right (a/an), spaces single, and the first letter of sentences a capital."""
    text = re.sub(" +", " ", text).strip()
    text = ARTICLE.sub(lambda m: m[1] + ("n " if VOWEL_SOUND.match(m[2]) else " "), text)
    # After `!"` or `?"` the sentence may go on ("Look!" said Mia), so only a plain end counts.
    return re.sub(r'(^"?|[.!?] "?|\.\.\. |\." "?)([a-z])', lambda m: m[1] + m[2].upper(), text)


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
    grammar, dice = read_grammar(DATA / "stories.grammar"), Dice(seed)
    plots = [plot for plot in grammar.sections.values() if plot.ways]
    stories: dict[str, None] = {}  # a dict keeps its order, a set does not
    while len(stories) < count:
        stories[make_story(grammar, plots[len(stories) % len(plots)], dice)] = None
    return dice.shuffled(list(stories))


# ---------------------------------------------------------------------------- the reviews


def make_reviews(seed: int, count: int) -> list[tuple[int, str]]:
    """`count` different (label, sentence) pairs; the classes are drawn, so nearly balanced."""
    grammar, dice = read_grammar(DATA / "reviews.grammar"), Dice(seed)
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


# ---------------------------------------------------------------------------- the dialogues

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
    stories = read_grammar(DATA / "stories.grammar")
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
    grammar, dice = read_grammar(DATA / "chat.grammar"), Dice(seed)
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


# ---------------------------------------------------------------------------- the files


def make_files(output: Path, *, seed: int = SEED, stories: int = STORIES) -> list[Path]:
    """Write corpus, vocabulary and reviews into `output`; returns the files' paths."""
    output.mkdir(parents=True, exist_ok=True)
    told = make_stories(seed, stories)
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for index, story in enumerate(told):
        splits["val" if index % VAL_EVERY == 0 else "train"].append(story)
    made = []
    for name, part in splits.items():
        lines = (json.dumps({"text": story}, ensure_ascii=False) for story in part)
        made.append(write_lines(output / f"stories-{name}.jsonl", lines))

    reviews = make_reviews(seed, sum(REVIEWS.values()))
    for name, size in REVIEWS.items():
        part, reviews = reviews[:size], reviews[size:]
        lines = (f"{label} ||| {sentence}" for label, sentence in part)
        made.append(write_lines(output / f"reviews-{name}.txt", lines))
    made.append(write_lines(output / "reviews-label-mapping.json", [json.dumps(LABELS)]))
    for name, dialogues in zip(("train", "test"), make_dialogues(seed), strict=True):
        made.append(write_lines(output / f"chat-{name}.jsonl", map(dialogue_line, dialogues)))
    made.append(make_vocabulary(output))
    return made


def make_vocabulary(output: Path) -> Path:
    """Train the vocabulary on the training parts of the stories and the reviews in `output`."""
    from minllama.text import Reading  # here, so that `--help` needs no packages
    from tokenizer import train_vocabulary

    path = output / "stories-vocabulary.model"
    texts = [output / "stories-train.jsonl", output / "reviews-train.txt"]
    reading = Reading(sentences_only=True)
    train_vocabulary(
        texts, path, vocab_size=VOCAB_SIZE, character_coverage=1.0, reading=reading, seal=False
    )
    return path


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """Publish a UTF-8 text file with newlines as on Unix, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes("".join(line + "\n" for line in lines).encode())
    os.replace(temporary, path)
    return path


def make_model(output: Path) -> Path:
    """Pretrain the shipped model with the bare command, in bfloat16, and publish it in `output`."""
    with tempfile.TemporaryDirectory() as save_dir:
        command = [sys.executable, "run_llama.py", "--option", "pretrain", "--save_dir", save_dir]
        command += ["--save_dtype", "bfloat16", "--overwrite"]
        subprocess.run(command, cwd=ROOT, check=True)
        temporary = output / (MODEL_NAME + ".tmp")
        shutil.copyfile(Path(save_dir) / "final-model.pt", temporary)
    os.replace(temporary, output / MODEL_NAME)
    return output / MODEL_NAME


def find_differences(output: Path, *, seed: int = SEED, stories: int = STORIES) -> list[str]:
    """One line for every file that is missing from `output` or is not what the seed makes."""
    with tempfile.TemporaryDirectory() as folder:
        differences = []
        for made in make_files(Path(folder), seed=seed, stories=stories):
            there = output / made.name
            if not there.is_file():
                differences.append(f"{there}: missing")
            elif there.read_bytes() != made.read_bytes():
                differences.append(f"{there}: not what seed {seed} makes")
    return differences


# ---------------------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DATA, help="folder to write to (data/)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of all draws ({SEED})")
    parser.add_argument("--size", type=int, default=STORIES, help=f"stories to make ({STORIES})")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the text and vocabulary files, write nothing; exit 1 if any differs",
    )
    parser.add_argument("--model", action="store_true", help="also pretrain the shipped model")
    args = parser.parse_args(argv)
    if args.check:
        differences = find_differences(args.output, seed=args.seed, stories=args.size)
        print("\n".join(differences) or f"{args.output}: all files are what seed {args.seed} makes")
        return 1 if differences else 0
    for path in make_files(args.output, seed=args.seed, stories=args.size):
        print(f"{path}  {path.stat().st_size:,} bytes")
    if args.model:
        path = make_model(args.output)
        print(f"{path}  {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
