"""Training a vocabulary on text: SentencePiece's BPE with byte tokens, and byte-level BPE.

The same text and options give the same bytes, which hold no path and no date. Knows no files: who
calls it has read the text.
"""

from __future__ import annotations

import collections
import io
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from minllama.system.errors import UsageError
from minllama.system.packages import import_optional
from minllama.vocabulary.base import Vocabulary
from minllama.vocabulary.byte_bpe import BYTE_OF, ByteBPE, opening_processor, pack
from minllama.vocabulary.pre_tokenizers import GPT2, PRE_TOKENIZERS
from minllama.vocabulary.sentence_piece import SPACE, SentencePiece
from minllama.vocabulary.sentence_piece_file import BYTE_NAMES

KINDS = ("sentencepiece", "byte-bpe")
CHARS = "chars"  # in place of a size: a token for every character, and no merges
SENTENCE_CHARS = 4096  # SentencePiece drops longer sentences than its limit; these stay below
META_PIECES = 3 + 256  # unknown, BOS and EOS, and one for each byte
LARGEST_FITTING = 32000  # pieces, as Llama-2's
# Of an alphabet every character gets a piece, of a script of thousands only the usual ones: the
# rare ones would fill the vocabulary and hardly ever be trained.
ALPHABET, COVERAGE, COVERAGE_OF_THOUSANDS = 1000, 0.9995, 0.99
# Llama 3's way, which other programs know by these names.
PRE_TOKENIZER, BOS, EOS = "llama-bpe", "<|begin_of_text|>", "<|end_of_text|>"
SEEN_TWICE = 2  # a pair that comes once in the text is not worth a token


class Wanted(NamedTuple):
    """What a vocabulary is to be like."""

    kind: str = KINDS[0]
    vocab_size: int | str | None = None  # CHARS: a token a character; None: what suits the text
    character_coverage: float | None = None  # None: what suits the text
    symbols: Sequence[str] = ()  # see `symbols.read_symbols`

    def check(self) -> None:
        """Raise UsageError for what cannot be, whatever the text."""
        if self.kind == KINDS[0]:
            return
        if self.character_coverage is not None:
            raise UsageError("--character_coverage: --kind byte-bpe covers all, in bytes")
        if self.vocab_size == CHARS:
            raise UsageError("--vocab_size chars: --kind byte-bpe knows bytes; leave out --kind")
        letter = next((s for s in self.symbols if s in BYTE_OF and not s.isascii()), None)
        if letter is not None:
            raise UsageError(
                f"--symbols: {letter!r} is what byte-level BPE calls the byte {BYTE_OF[letter]}; "
                "--kind sentencepiece can have it"
            )
        least = self.least_of_bytes
        if self.vocab_size is not None and self.vocab_size < least:
            raise UsageError(f"--vocab_size {self.vocab_size}: too small: at least {least}")

    @property
    def least_of_bytes(self) -> int:
        """The tokens that byte-level BPE has without merges; an ASCII letter is its own byte's."""
        return 256 + len({BOS, EOS}) + sum(symbol not in BYTE_OF for symbol in self.symbols)


def reserved_names(kind: str) -> set[str]:
    """What a kind's own tokens are called, which no symbol can be."""
    return BYTE_NAMES if kind == KINDS[0] else set()


def train_on(
    sentences: Sequence[str],
    share: float,
    wanted: Wanted,
    check_stop: Callable[[], None] = lambda: None,
) -> bytes:
    """The bytes of a vocabulary's file, trained on `sentences`, the `share` of a text.

    Raises UsageError, naming the largest (or the smallest) size that works, where the size does not
    fit the text, and what `check_stop` raises, which is called several times a second.
    """
    wanted.check()
    fitting, coverage = fit_vocabulary(
        sentences, share, coverage=wanted.character_coverage, symbols=len(wanted.symbols)
    )
    where = "the trained vocabulary"
    if wanted.kind == KINDS[0]:
        content = _train_sentence_piece(sentences, fitting, coverage, wanted, check_stop)
        vocabulary: Vocabulary = SentencePiece(content, where)
    else:
        content = _train_byte_bpe(sentences, fitting, wanted, check_stop)
        vocabulary = ByteBPE(pack(json.loads(content), {}, where), where)
    for symbol in wanted.symbols:
        if vocabulary.encode(symbol) != [vocabulary.added_tokens.get(symbol)]:
            raise UsageError(f"--symbols: {symbol!r} cannot be made one token")
    return content


def fit_vocabulary(
    sentences: Sequence[str], share: float, *, coverage: float | None = None, symbols: int = 0
) -> tuple[int, float]:
    """The size of a vocabulary that suits a text, and the share of its characters to have pieces.

    `sentences` are the `share` of the text that was sampled. The size is that of bytes, `symbols`
    and the usual characters, which must be there, and of merges by the length of the text, whatever
    its script: each piece has to occur often enough to be learnt, and takes time where the next
    token is predicted (measured in `benchmarks/README.md`).
    """
    counts: collections.Counter[str] = collections.Counter()
    for sentence in sentences:
        counts.update(sentence)
    by_count = np.array(sorted(counts.values(), reverse=True))
    covered = np.cumsum(by_count) / by_count.sum()
    if coverage is None:
        many = np.searchsorted(covered, COVERAGE) > ALPHABET
        coverage = COVERAGE_OF_THOUSANDS if many else COVERAGE
    characters = int(np.searchsorted(covered, coverage)) + 1
    length = by_count.sum() / share  # in characters
    merges = min(4 * length ** (1 / 2), 40 * length ** (1 / 3))  # equal for a million of them
    least = META_PIECES + characters
    size = max(least, min(LARGEST_FITTING, least + round(merges))) + symbols
    return -(-size // 64) * 64, coverage  # of whole 64s, which matrices on a GPU are fastest in


# ---------------------------------------------------------------------------- SentencePiece


def _train_sentence_piece(
    sentences: Sequence[str],
    fitting: int,
    coverage: float,
    wanted: Wanted,
    check_stop: Callable[[], None],
) -> bytes:
    """A model with Llama-2's conventions.

    With symbols, or of characters alone, no space is put before a text: other programs put one
    behind every symbol instead, or none before the first, and a character would have two tokens.
    """
    one_a_character = wanted.vocab_size == CHARS
    prefix = not (wanted.symbols or one_a_character)
    if one_a_character and wanted.character_coverage is None:
        coverage = 1.0
    spaces = prefix * len(sentences) + sum(sentence.count(" ") for sentence in sentences)
    # Of a text with few spaces their sign is rare enough to be dropped, and would then be spelt.
    characters = prefix * len(sentences) + sum(map(len, sentences))
    is_rare = spaces == 0 or spaces < (1 - coverage) * characters

    symbols = [symbol.replace(" ", SPACE) for symbol in wanted.symbols]

    def train(size: int) -> bytes:
        model = io.BytesIO()
        _run_in_thread(
            sentencepiece.SentencePieceTrainer.train,
            check_stop,
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=wanted.vocab_size is not None,
            character_coverage=coverage,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * SENTENCE_CHARS,
            num_threads=16,  # part of the file: a fixed number keeps it the same on all machines
            minloglevel=2,
            **({"required_chars": SPACE} if is_rare else {}),
            **({"user_defined_symbols": symbols} if symbols else {}),
        )
        return model.getvalue()

    try:
        if one_a_character:
            return train(_least(train, len(symbols) + META_PIECES))
        return train(wanted.vocab_size or fitting)
    except RuntimeError as error:
        problem = f"SentencePiece could not train ({error})"
        if largest := re.search(r"value <= (\d+)", str(error)):
            problem = f"too large: this text gives at most {largest[1]}"
        elif least := _TOO_SMALL.search(str(error)):  # its symbols, characters and 256 bytes
            problem = f"too small: at least {least[1]}, or a lower --character_coverage"
        raise UsageError(f"--vocab_size {wanted.vocab_size}: {problem}") from None


_TOO_SMALL = re.compile(r"\d+ vs (\d+)")


def _least(train: Callable[[int], bytes], too_small: int) -> int:
    """The smallest size that SentencePiece trains: it says so of one that is too small."""
    try:
        train(too_small)
    except RuntimeError as error:
        least = _TOO_SMALL.search(str(error))
        if least is None:
            raise
        return int(least[1])
    return too_small  # of a text that is all symbols


# ---------------------------------------------------------------------------- byte-level BPE


def _train_byte_bpe(
    sentences: Sequence[str], fitting: int, wanted: Wanted, check_stop: Callable[[], None]
) -> bytes:
    """A tokenizer.json: 256 bytes and merges, then the symbols, then BOS and EOS."""
    package = import_optional("tokenizers", "--kind byte-bpe")
    engine = package.Tokenizer.from_str(json.dumps(_empty_file()))
    others = wanted.least_of_bytes - 256
    trainer = package.trainers.BpeTrainer(
        vocab_size=max(256, (wanted.vocab_size or fitting) - others),
        min_frequency=SEEN_TWICE,
        initial_alphabet=list(BYTE_OF),
        show_progress=False,
    )
    texts = _without(wanted.symbols, sentences) if wanted.symbols else iter(sentences)
    _run_in_thread(engine.train_from_iterator, check_stop, iterator=texts, trainer=trainer)
    learnt = engine.get_vocab()
    clash = next((s for s in wanted.symbols if s in learnt and s not in BYTE_OF), None)
    if clash is not None:
        raise UsageError(f"--symbols: {clash!r} is what byte-level BPE calls another token")
    if wanted.vocab_size is not None and len(learnt) + others < wanted.vocab_size:
        raise UsageError(
            f"--vocab_size {wanted.vocab_size}: too large: this text gives at most "
            f"{len(learnt) + others}"
        )
    engine.add_tokens([package.AddedToken(symbol, normalized=False) for symbol in wanted.symbols])
    engine.add_special_tokens([BOS, EOS])
    file = json.loads(engine.to_str())
    file["post_processor"] = opening_processor(BOS, engine.token_to_id(BOS))
    return (json.dumps(file, ensure_ascii=False, indent=2) + "\n").encode()


def _empty_file() -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[PRE_TOKENIZER],
        "post_processor": None,
        "decoder": GPT2 | {"add_prefix_space": True},
        # As llama.cpp does with this pre-tokenizer, a word that is itself a token is not merged.
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {}, "merges": []},
    }


def _without(symbols: Sequence[str], sentences: Sequence[str]) -> Iterator[str]:
    """What is between the symbols in sentences: no merge may join them to anything."""
    package = import_optional("tokenizers", "--kind byte-bpe")
    rest = 0  # what no symbol is, called by a name that no symbol has
    engine = package.Tokenizer(package.models.WordLevel({"\n": rest}, unk_token="\n"))
    engine.add_tokens([package.AddedToken(symbol, normalized=False) for symbol in symbols])
    for sentence in sentences:
        encoded = engine.encode(sentence)
        for (start, stop), token in zip(encoded.offsets, encoded.ids, strict=True):
            if token == rest:
                yield sentence[start:stop]


# ---------------------------------------------------------------------------- either


def _run_in_thread(
    work: Callable[..., None], check_stop: Callable[[], None], **settings: Any
) -> None:
    """Do work that hears no signal, and leave it to itself where `check_stop` raises."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            outcome.set_result(work(**settings))
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # which does not hold up the process's end
    while not wait([outcome], timeout=0.1).done:
        check_stop()
    outcome.result()
