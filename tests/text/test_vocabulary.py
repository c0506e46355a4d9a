"""Which vocabulary a pretraining has, and one that is trained on the text."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from running import RESUME, command, write_stories

from config import parse_options
from llama import load_pretrained
from minllama.machine.ranks import Ranks
from minllama.text import vocabulary
from minllama.text.corpus import find_texts, fit_context
from minllama.text.vocabulary import choose_vocabulary
from minllama.vocabulary.training import META_PIECES, fit_vocabulary
from tokenizer import Tokenizer
from tokenizer import main as train_command

pytestmark = pytest.mark.usefixtures("empty_folder")
RUN = (
    "--option pretrain --dim 16 --n_layers 1 --n_heads 2 --max_seq_len 16 --save_dir run "
    "--cache_dir cache --epochs 1 --dtype float32 --pretrain_data text.jsonl"
)


def choose(line: str = "--pretrain_data text.jsonl", stored=None) -> Tokenizer:
    """The vocabulary that flags mean."""
    options = parse_options(f"--option pretrain --cache_dir cache {line}".split())
    return choose_vocabulary(options, find_texts(options), stored=stored, ranks=Ranks())


def test_an_own_text_has_a_vocabulary_of_its_own():
    """The embedded English one spelt every other language in bytes, and wrote gibberish."""
    rng = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(60)]
    text = "\n".join("".join(rng.choices(characters, k=30)) + "。" for _ in range(300))
    Path("text.txt").write_text(text, encoding="utf-8")
    own, embedded = choose("--pretrain_data text.txt"), Tokenizer()
    assert own.byte_fallback_share(own.encode(text, False, False)) < 0.02
    assert embedded.byte_fallback_share(embedded.encode(text, False, False)) > 0.95
    assert choose("").fingerprint == embedded.fingerprint  # of the stories


def test_a_vocabulary_of_the_other_kind_is_named_like_any(capsys):
    """One of `tokenizer.py train --kind byte-bpe`, with symbols; the run's files carry it."""
    pytest.importorskip("tokenizers")
    write_stories(Path.cwd(), 4)
    Path("symbols.txt").write_text("Once upon a time\n", encoding="utf-8")
    words = "train --input text.jsonl --kind byte-bpe --symbols symbols.txt --output my.json"
    assert train_command(words.split()) == 0
    done = command(f"{RUN} --max_steps 2 --tokenizer_model my.json")
    assert done.status == 0, done.error
    tokenizer = Tokenizer(tokenizer_model=load_pretrained(Path("run/final-model.pt")).vocabulary)
    assert f"{tokenizer.n_words:,} pieces: my.json" in done.out
    assert tokenizer.vocabulary.kind == "byte-level BPE"
    assert tokenizer.encode("Once upon a time", False, False) == [tokenizer.n_words - 3]
    assert command(f"{RESUME} --max_steps 3").status == 0


def test_it_is_trained_once_for_a_text(monkeypatch, capsys):
    """Kept beside the token cache, and trained again for a changed text or a damaged file."""
    write_stories(Path.cwd(), 4)
    first = choose()
    assert "trained on the text, in cache" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "train_vocabulary", lambda *_, **__: 1 / 0)
        assert choose().fingerprint == first.fingerprint
        with pytest.raises(ZeroDivisionError):
            choose("--pretrain_data text.jsonl --document_per_line")  # other text
    (file,) = Path("cache").glob("*.model")
    file.write_bytes(b"damaged")
    assert choose().fingerprint == first.fingerprint
    write_stories(Path.cwd(), 40)
    assert choose().fingerprint != first.fingerprint
    assert len([*Path("cache").glob("*.model")]) == 1


def test_what_a_killed_training_left_is_removed_later():
    """It stayed in the cache folder for ever; what another process may be writing is left alone."""
    write_stories(Path.cwd(), 4)
    old, new = (Path("cache", f".text-{n}.model.{n * 8}.tmp") for n in "ab")
    Path("cache").mkdir()
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    choose()
    assert new.exists() and not old.exists()


def test_a_file_lying_by_is_named(capsys):
    """`tokenizer.model` was meant, or forgotten: the flag that takes it is said."""
    write_stories(Path.cwd(), 4)
    Path("tokenizer.model").write_bytes(Tokenizer().model_bytes)
    choose()
    assert "--tokenizer_model tokenizer.model takes it" in capsys.readouterr().out
    assert choose("--tokenizer_model tokenizer.model").fingerprint == Tokenizer().fingerprint
    assert "takes it" not in capsys.readouterr().out


def test_a_run_keeps_its_vocabulary():
    """It is in every file of the run, so a resumed one does not need the cache."""
    write_stories(Path.cwd(), 4)
    assert command(f"{RUN} --max_steps 2").status == 0
    model = load_pretrained(Path("run/final-model.pt"))
    assert model.vocabulary == choose().model_bytes
    shutil.rmtree("cache")
    done = command(f"{RESUME} --max_steps 3")
    assert done.status == 0, done.error
    assert "pieces: the checkpoint's" in done.out


@pytest.mark.parametrize("distinct, coverage", [(200, 0.9995), (3000, 0.99)])
def test_the_size_follows_from_the_text(distinct: int, coverage: float):
    """Bytes, characters, of thousands the usual ones, and merges by the root of the length."""
    rng = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(distinct)]
    characters = [chr(0x4E00 + i) for i in range(distinct)]
    sentences = ["".join(rng.choices(characters, weights, k=100)) for _ in range(1000)]
    size, covered = fit_vocabulary(sentences, share=0.5)
    present = len(set("".join(sentences)))
    assert covered == coverage and size % 64 == 0
    merges = 4 * (2 * 100_000) ** 0.5  # half of the text
    least = META_PIECES + (present if distinct == 200 else 0) + merges - 5
    assert least <= size <= META_PIECES + present + merges + 64


def test_a_long_text_has_fewer_merges_for_its_size():
    """Above a million characters the cube root's, where the root's would take most of a step."""
    sentences = ["abcdefghij" * 10] * 100
    size, _ = fit_vocabulary(sentences, share=10_000 / 8e6)
    assert size == -(-(META_PIECES + 10 + 8000) // 64) * 64


@pytest.mark.parametrize(
    "tokens, line, context",
    [
        (524_961, "", 256),  # the stories
        (255_000, "--epochs 100", 1024),  # the course's
        (255_000, "--pretrain_batch_size 32", 128),
        (10**9, "", 1024),
        (100, "", 128),
    ],
)
def test_the_context_leaves_steps_enough(tokens: int, line: str, context: int, capsys):
    """1,024 for everything left a small text a few dozen steps, after which it wrote gibberish."""
    options = parse_options(f"--option pretrain {line}".split()).with_global_batch(1)
    assert fit_context(options, tokens, 1024) == context
    assert f"context      {context:,} tokens" in capsys.readouterr().out
