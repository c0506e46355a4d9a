"""Makes the embedded data from a seed: stories, a vocabulary, labelled reviews, dialogues, a model.

What is written is drawn in `stories.py`, `reviews.py` and `dialogues.py`. The same seed gives the
same bytes on every machine. It knows nothing of models: `--model` runs the program's own
pretraining command.

    python data/make_data.py            # corpus, vocabulary, reviews, dialogues
    python data/make_data.py --model    # also stories-tiny.pt
    python data/make_data.py --check    # are the files here those that the seed makes?
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from dialogues import dialogue_line, make_dialogues
from reviews import LABELS, make_review_texts, make_reviews
from stories import make_stories

DATA = Path(__file__).resolve().parent
ROOT = DATA.parent
sys.path.insert(0, str(ROOT))  # tokenizer.py is in the root of the repository

SEED = 1337
STORIES = 2500  # about 2 MB
VAL_EVERY = 20  # one story in twenty is held out
VOCAB_SIZE = 2048
REVIEWS = {"train": 3000, "dev": 400, "test": 400}
REVIEW_TEXTS = 4000  # to pretrain on: a fifth of the text
MODEL_NAME = "stories-tiny.pt"

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
        made.append(write_lines(output / f"stories-{name}.jsonl", map(text_line, part)))

    reviews = make_reviews(seed, sum(REVIEWS.values()))
    texts = make_review_texts(seed + 1, REVIEW_TEXTS, {sentence for _, sentence in reviews})
    made.append(write_lines(output / "reviews-unlabelled.jsonl", map(text_line, texts)))
    for name, size in REVIEWS.items():
        part, reviews = reviews[:size], reviews[size:]
        lines = (f"{label} ||| {sentence}" for label, sentence in part)
        made.append(write_lines(output / f"reviews-{name}.txt", lines))
    made.append(write_lines(output / "reviews-label-mapping.json", [json.dumps(LABELS)]))
    for name, dialogues in zip(("train", "test"), make_dialogues(seed), strict=True):
        made.append(write_lines(output / f"chat-{name}.jsonl", map(dialogue_line, dialogues)))
    made.append(make_vocabulary(output))
    return made


def text_line(text: str) -> str:
    """A line of .jsonl that holds a document."""
    return json.dumps({"text": text}, ensure_ascii=False)


def make_vocabulary(output: Path) -> Path:
    """Train the vocabulary on the training parts of the stories and the reviews in `output`."""
    from minllama.text.reading import Reading  # here, so that `--help` needs no packages
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
