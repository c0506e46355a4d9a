"""The embedded data: the same from the same seed, varied, well formed, and what is on disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
sys.path.insert(0, str(DATA))

import make_data  # noqa: E402  (this and what it imports are in data/, found by the line above)
from grammar import Dice, expand, polish, read_grammar  # noqa: E402
from stories import ANIMAL_BOYS, ANIMAL_GIRLS, BOYS, GIRLS, Cast, make_stories  # noqa: E402

from minllama.text.dialogues import read_dialogues  # noqa: E402


@pytest.fixture(scope="module")
def remade(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("remade")
    make_data.make_files(folder)
    return folder


def read_stories(name: str) -> list[str]:
    lines = (DATA / f"stories-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def read_reviews(name: str) -> list[tuple[int, str]]:
    lines = (DATA / f"reviews-{name}.txt").read_text(encoding="utf-8").splitlines()
    return [(int(label), text) for label, text in (line.split(" ||| ") for line in lines)]


def sentences_of(story: str) -> list[str]:
    story = story.replace("Mr. ", "Mr ").replace("Mrs. ", "Mrs ")
    return re.split(r'(?<=[.!?])"?\s', story)


STORIES = read_stories("train") + read_stories("val")

# ---------------------------------------------------------------------------- from the seed


def test_files_on_disk_are_those_of_the_seed(remade):
    """Somebody edits the grammar and forgets to remake the files."""
    for path in remade.iterdir():
        if path.suffix != ".model":
            assert (DATA / path.name).read_bytes() == path.read_bytes(), path.name


def test_vocabulary_on_disk_is_that_of_the_seed(remade):
    """Compared by its pieces: another version of SentencePiece may write other bytes."""
    pieces = []
    for folder in (DATA, remade):
        path = folder / "stories-vocabulary.model"
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        pieces.append([(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))])
    assert pieces[0] == pieces[1]
    assert len(pieces[0]) == make_data.VOCAB_SIZE


@pytest.mark.parametrize("hash_seed", ["12345"])
def test_no_dependence_on_hashes_or_the_folder(tmp_path, hash_seed):
    """Python orders a set of strings anew in every process: no such order may show here."""
    ours, theirs = tmp_path / "a", tmp_path / "other" / "place"
    make_data.make_files(ours, stories=60)
    command = [sys.executable, str(DATA / "make_data.py"), "--size", "60", "--output", str(theirs)]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    for path in ours.iterdir():
        assert (theirs / path.name).read_bytes() == path.read_bytes(), path.name


def test_another_seed_makes_other_stories():
    assert not set(make_stories(1, 80)) & set(make_stories(2, 80))


def test_check_names_what_differs(tmp_path, capsys):
    options = ["--output", str(tmp_path), "--size", "60"]
    assert make_data.main(options) == 0
    assert make_data.main(["--check", *options]) == 0
    (tmp_path / "stories-val.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "reviews-dev.txt").unlink()
    capsys.readouterr()
    assert make_data.main(["--check", *options]) == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "stories-val.jsonl: not what seed 1337 makes" in said[0]
    assert "reviews-dev.txt: missing" in said[1]


def test_model_is_the_bare_command_and_published_whole(tmp_path, monkeypatch):
    """`--model` pretrains with the defaults in the repository's root, into a folder of its own."""
    asked = {}

    def run(command, *, cwd, check):
        asked.update(command=command, cwd=cwd)
        save_dir = Path(command[command.index("--save_dir") + 1])
        (save_dir / "final-model.pt").write_bytes(b"weights")

    monkeypatch.setattr(make_data.subprocess, "run", run)
    path = make_data.make_model(tmp_path)
    assert path.read_bytes() == b"weights"
    assert [p.name for p in tmp_path.iterdir()] == [make_data.MODEL_NAME]
    assert asked["cwd"] == ROOT
    assert asked["command"][1:4] == ["run_llama.py", "--option", "pretrain"]
    assert "bfloat16" in asked["command"]


# ---------------------------------------------------------------------------- the notation


def test_expand_nests_choices_and_slots():
    look_up = {"x": "[{y}|{y}]", "y": "end"}.__getitem__
    assert expand("[[a|a]|a] {x}", look_up, Dice(0)) == "a end"


@pytest.mark.parametrize(
    "rough, polished",
    [
        ("a old hat and an red one", "An old hat and a red one"),
        ("an one-eyed bear waited a hour", "A one-eyed bear waited an hour"),
        ("he ran.  she slept.", "He ran. She slept."),
        ('"look!" said mia. "here." he went.', '"Look!" said mia. "Here." He went.'),
    ],
)
def test_polish(rough, polished):
    assert polish(rough) == polished


def test_dice_draw_every_option_and_lose_none():
    dice = Dice(3)
    assert {dice.pick("abc") for _ in range(100)} == set("abc")
    assert sorted(dice.shuffled(range(50))) == list(range(50))


def test_every_plot_of_the_grammar_is_told_in_every_way():
    """A macro or a table row that is missing shows only when its line is drawn."""
    grammar = read_grammar(DATA / "stories.grammar")
    plots = [plot for plot in grammar.sections.values() if plot.ways]
    assert len(plots) >= 20
    for seed, plot in enumerate(plots):
        assert len(plot.ways) >= 1
        for line in (line for way in plot.ways for step in way.steps for line in step.lines):
            cast = Cast(grammar, plot, Dice(seed))
            assert not re.search(r"[{}\[\]|]", cast.say(line)), line


# ---------------------------------------------------------------------------- the stories


def test_size_and_variety():
    """Not one template with swapped nouns: tens of thousands of sentences, most told once."""
    text_bytes = sum(path.stat().st_size for path in DATA.glob("stories-*.jsonl"))
    assert 1_500_000 < text_bytes < 2_500_000
    sentences = Counter(sentence for story in STORIES for sentence in sentences_of(story))
    assert len(sentences) > 20_000
    assert sum(count == 1 for count in sentences.values()) > 15_000
    words = {word for story in STORIES for word in re.findall(r"[\w']+", story.lower())}
    assert len(words) > 2_000
    assert all(60 <= len(story.split()) <= 250 for story in STORIES)


def test_templates_with_names_and_things_taken_out_are_many():
    """Counted without names and capitals, so that swapped names make no new sentence."""
    names = {*GIRLS, *BOYS, *ANIMAL_GIRLS, *ANIMAL_BOYS}
    frames = {
        " ".join("NAME" if word.strip("\"'.,!?s") in names else word for word in sentence.split())
        for story in STORIES
        for sentence in sentences_of(story)
    }
    assert len(frames) > 10_000


def test_held_out_stories_are_not_in_train():
    train, val = read_stories("train"), read_stories("val")
    assert len(set(train) | set(val)) == len(train) + len(val)
    assert 0.04 < len(val) / len(STORIES) < 0.06


def test_articles_are_right():
    wrong = re.compile(
        r"\b(?:[Aa] (?!one)[aeiouAEIOU]\w*|[Aa] hour|[Aa]n (?!hour|honest)[^aeiouAEIOU\W]\w*)"
    )
    assert [match[0] for story in STORIES for match in wrong.finditer(story)] == []


def test_nothing_of_the_notation_is_left():
    for story in STORIES:
        assert not re.search(r"[{}\[\]|*=_]|  | [,.!?]|\.\.(?!\.)(?<!\.\.\.)", story), story
        assert story.count('"') % 2 == 0, story
        assert story[0] in '"' or story[0].isupper()
        assert not re.search(r"(?<![.])\. [a-z]", story), story
        assert story.isascii()


def test_pronouns_agree_with_the_hero():
    """Whoever tells of Tom and nobody else says he."""
    grammar = read_grammar(DATA / "stories.grammar")
    for seed in range(200):
        cast = Cast(grammar, grammar.sections["lost"], Dice(seed))
        she = cast.words["h"] in {*GIRLS, *ANIMAL_GIRLS}
        told = cast.say("{He} saw {himself}. {f.Intro} saw {f.himself}.")
        assert told.startswith("She saw herself." if she else "He saw himself.")
        assert told.endswith("saw himself." if she else "saw herself.")
        assert re.search(r"\. (Her|His) ", told)[1] == ("Her" if she else "His")


def test_friend_is_introduced_once_and_not_in_speech():
    grammar = read_grammar(DATA / "stories.grammar")
    cast = Cast(grammar, grammar.sections["lost"], Dice(5))
    name = cast.words["f"]
    told = cast.say('"Was it {f}?" It was {f}. And {f} knew it.')
    assert told.startswith(f'"Was it {name}?" It was h')
    assert cast.say("It was {f}.") == f"It was {name}."


def test_the_thing_of_the_opening_comes_back_at_the_end():
    grammar, dice = read_grammar(DATA / "stories.grammar"), Dice(0)
    for plot in grammar.sections.values():
        for way in plot.ways:
            last = way.steps[-1].lines
            naming = sum("{o}" in line or "{o.n}" in line for line in last)
            assert naming >= 1, (plot.name, last)
    assert dice.chance(1.0)


# ---------------------------------------------------------------------------- the reviews


def test_reviews_are_labelled_balanced_and_disjoint():
    assert json.loads((DATA / "reviews-label-mapping.json").read_text("utf-8")) == make_data.LABELS
    seen: set[str] = set()
    for name, size in make_data.REVIEWS.items():
        reviews = read_reviews(name)
        assert len(reviews) == size
        counts = Counter(label for label, _ in reviews)
        assert sorted(counts) == list(range(len(make_data.LABELS)))
        assert 0.15 < min(counts.values()) / size and max(counts.values()) / size < 0.27
        texts = {text for _, text in reviews}
        assert len(texts) == size and not texts & seen
        seen |= texts
        assert not any(re.search(r"[{}\[\]|]|  | [,.;]", text) for text in texts)


def test_no_single_word_decides_a_review():
    """Words of praise stand in bad reviews: the best label for each word alone is often wrong."""
    reviews = read_reviews("train")
    for word in ("superb", "brilliant", "decent", "weak", "dull", "terrible", "dreadful"):
        labels = Counter(label for label, text in reviews if word in text.lower().split())
        assert max(labels.values()) / sum(labels.values()) < 0.6, word


def test_reviews_to_pretrain_on_hold_no_labelled_sentence():
    """A figure on dev or test would else be that of what was read before."""
    lines = (DATA / "reviews-unlabelled.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(set(texts)) == len(texts) == make_data.REVIEW_TEXTS
    labelled = {text for name in make_data.REVIEWS for _, text in read_reviews(name)}
    assert not [text for text in texts if any(sentence in text for sentence in labelled)]
    assert not [text for text in texts if re.search(r"[{}\[\]|]|  | [,.;]|\ba [aeio]", text)]
    ends = Counter(text.split()[-1] for text in texts)
    assert all(ends[f"{label}."] > 50 for label in make_data.LABELS)


# ---------------------------------------------------------------------------- the dialogues


def read_chat(name: str) -> list[list[tuple[str, str]]]:
    return [each.exchanges for each in read_dialogues(DATA / f"chat-{name}.jsonl")]


def test_dialogues_are_small_and_well_formed():
    """A few minutes of training, and nothing of the notation left in them."""
    train, test = read_chat("train"), read_chat("test")
    assert sum(path.stat().st_size for path in DATA.glob("chat-*.jsonl")) < 300_000
    assert len(train) > 1000 and len(test) > 200
    texts = [text for dialogue in train + test for exchange in dialogue for text in exchange]
    assert not [text for text in texts if re.search(r"[{}\[\]|;]|  | [,.;?]|\ba [aeio]", text)]
    assert {len(dialogue) for dialogue in train} == {1, 2, 3, 4, 5, 6}
    assert all(answer[0].isupper() and answer[-1] in '."?!' for d in train for _, answer in d)


def test_the_test_asks_for_what_was_taught_in_other_words():
    """Its figure would else be that of learning by heart, or of facts that nobody told."""

    def plain(question: str) -> str:
        return question.lower().rstrip("?.!")

    taught = {(plain(q), answer) for dialogue in read_chat("train") for q, answer in dialogue}
    asked = {(plain(q), answer) for dialogue in read_chat("test") for q, answer in dialogue}
    assert not {question for question, _ in asked} & {question for question, _ in taught}
    assert {answer for _, answer in asked} <= {answer for _, answer in taught}
    behind = [q for d in read_chat("train") if len(d) == 2 for q, _ in d[1:] if len(q) < 15]
    assert len(behind) > 50  # "And a bear?", which only the question before makes clear


def test_a_fact_has_one_answer():
    """Else the share of right answers would have a limit that is the data's."""
    answers: dict[str, set[str]] = {}
    for dialogue in read_chat("train") + read_chat("test"):
        answers.setdefault(dialogue[0][0].lower().rstrip("?.!"), set()).add(dialogue[0][1])
    assert [question for question, found in answers.items() if len(found) > 1] == []


# ---------------------------------------------------------------------------- the vocabulary

VOCABULARY = sentencepiece.SentencePieceProcessor(
    model_proto=(DATA / "stories-vocabulary.model").read_bytes()
)


def test_vocabulary_has_the_conventions_of_llama():
    assert [VOCABULARY.unk_id(), VOCABULARY.bos_id(), VOCABULARY.eos_id()] == [0, 1, 2]
    assert VOCABULARY.pad_id() == -1
    assert VOCABULARY.id_to_piece(3) == "<0x00>"
    assert all(len(VOCABULARY.encode(digits, out_type=str)) == 4 for digits in ("123", "907"))


@given(st.text())
def test_vocabulary_encodes_any_text_exactly(text):
    """U+2581 is SentencePiece's own sign for a space: it alone comes back as one."""
    assert VOCABULARY.decode(VOCABULARY.encode(text)) == text.replace("\u2581", " ")


def test_vocabulary_fits_the_stories():
    ids = VOCABULARY.encode(read_stories("val"))
    characters = sum(len(story) for story in read_stories("val"))
    assert characters / sum(len(row) for row in ids) > 3.5


def test_vocabulary_holds_no_path():
    data = (DATA / "stories-vocabulary.model").read_bytes()
    assert not re.search(rb"jsonl|reviews|/tmp|/home|\\Users", data)
