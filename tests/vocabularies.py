"""Small SentencePiece vocabularies of many kinds, and text to train and try them on."""

from __future__ import annotations

import functools
import io
import random
import tempfile
from pathlib import Path

import pytest
import sentencepiece

from minllama.vocabulary.sentence_piece import SPACE
from tokenizer import EMBEDDED_VOCABULARY, Tokenizer

LLAMA = Path(__file__).resolve().parents[2] / "shared" / "data" / "tokenizer.model"
WORDS = (
    "the cat sat on a mat and then it ran home with two dogs, 1934 was late.\tHello! "
    "fi ﬁ é e\u0301 你好 世界。 今天，天气 很好。 😀 naïve\u3000x == <s> <sep> <0x0A>"
).split(" ")
SPACES = [" ", "  ", "    ", "     ", "\n", "\n\n", "\r\n", "\t", SPACE, f" {SPACE}", f"{SPACE} "]
ODD = ["\x00", "\x07", "\u0301", "\u0338", "\u3099", "\u200b", "\ufeff", "\u00a0", "\u3000", "。"]
FRAGMENTS = [*WORDS, *SPACES, *ODD]


@functools.cache
def corpus_lines() -> list[str]:
    """Lines of made-up words with single, double and wider gaps."""
    pick = random.Random(3)
    gap = [" "] * 8 + ["  ", "\t", "    "]
    syllables = "ba be lo mi nu rak ton vel sha dri".split()
    words = WORDS + ["".join(pick.choices(syllables, k=pick.randint(1, 3))) for _ in range(150)]
    return ["".join(w + pick.choice(gap) for w in pick.choices(words, k=12)) for _ in range(400)]


def train(*, rules: str = "", **options: object) -> bytes:
    """The file of a vocabulary like those that tokenizer.py trains, but for the options given.

    `rules` are those of a normaliser, in SentencePiece's table of code points.
    """
    if rules:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rules.tsv"
            path.write_text(rules, encoding="utf-8")
            return train(normalization_rule_tsv=str(path), **options)
    model = io.BytesIO()
    defaults = dict(
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        num_threads=1,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus_lines()), model_writer=model, **{**defaults, **options}
    )
    return model.getvalue()


PLAIN: dict[str, dict[str, object]] = {  # documents may be cut
    "ours": {},
    "own-symbols": {"user_defined_symbols": ["\n", "<sep>", SPACE * 4]},
}
_NO_BYTES = {"byte_fallback": False, "vocab_size": 150, "character_coverage": 0.98}
OTHERS: dict[str, dict[str, object]] = {  # documents are encoded whole
    "no-byte-fallback": _NO_BYTES,
    "spaces-inside-pieces": {"split_by_whitespace": False, "vocab_size": 700},
    "space-last": {"treat_whitespace_as_suffix": True},
    "no-dummy-prefix": {"add_dummy_prefix": False},
    "newlines-in-a-piece": {"user_defined_symbols": ["\n\n"]},
    "space-in-a-symbol": {"user_defined_symbols": [f"t{SPACE}s"]},
    "own-rules": {"rules": "74 20 73\t78\n"},  # "t s" becomes "x"
    "trims": {"remove_extra_whitespaces": True},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "nmt-nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "nfkc-cf": {"normalization_rule_name": "nfkc_cf", **_NO_BYTES},
    "unigram": {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,
        "vocab_size": 130,
    },
    "unigram-identity": {"model_type": "unigram", "vocab_size": 390},
    "characters": {"model_type": "char", "vocab_size": 330},
}


@functools.cache
def _vocabulary(name: str) -> Tokenizer | None:
    path = {"embedded": EMBEDDED_VOCABULARY, "llama-2": LLAMA}.get(name)
    if path is None:
        return Tokenizer(tokenizer_model=train(**(PLAIN | OTHERS)[name]))
    return Tokenizer(tokenizer_model=path) if path.is_file() else None


def vocabulary(name: str) -> Tokenizer:
    """One of PLAIN or OTHERS, "embedded" or "llama-2"; skips the test where that is not there."""
    found = _vocabulary(name)
    if found is None:
        pytest.skip("optional real data: ../shared/data/tokenizer.model is not there")
    return found
