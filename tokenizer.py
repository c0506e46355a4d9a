"""The tokenizer: text to token ids and back, and the training of a vocabulary.

Knows nothing of tensors, models or caches. As a command it trains and exports vocabularies:

    python tokenizer.py train --input story.txt more/ --vocab_size 4096 --output my.model
    python tokenizer.py export --tokenizer_model my.model --output tokenizer.bin
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main, Ctrl-C ends it without a traceback

import argparse
import collections
import io
import math
import random
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from config import DATA_DIR, add_reading_flags, fingerprint
from minllama.cli.command_line import (
    OneLineParser,
    number_reader,
    print_error,
    protect_output,
    read_path,
)
from minllama.system.encodings import check_encoding
from minllama.system.errors import UsageError
from minllama.system.files import atomic_write
from minllama.text.documents import Block, read_documents
from minllama.text.find_files import download_hint, find_text_files
from minllama.text.reading import READ_BYTES, Reading
from minllama.vocabulary.base import Vocabulary
from minllama.vocabulary.files import open_vocabulary, read_vocabulary_file
from minllama.vocabulary.sentence_piece import SPACE, SentencePiece, piece_text, sealed

EMBEDDED_VOCABULARY = DATA_DIR / "stories-vocabulary.model"

# ---------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """A vocabulary, from a file or a folder, from a model file's bytes, or the embedded one.

    `max_len` cuts what `encode` returns, before BOS and EOS; a vocabulary may stand in its place.
    Raises UsageError naming a file that is missing or holds no vocabulary.
    """

    def __init__(
        self,
        max_len: int | None = None,
        tokenizer_model: str | Path | bytes | None = None,
    ) -> None:
        if isinstance(max_len, str | Path | bytes):
            max_len, tokenizer_model = None, max_len
        given = EMBEDDED_VOCABULARY if tokenizer_model is None else tokenizer_model
        self.max_len = max_len
        self.model_bytes = given if isinstance(given, bytes) else _read_model(Path(given))
        name = "the vocabulary" if isinstance(given, bytes) else str(given)
        self.vocabulary: Vocabulary = open_vocabulary(self.model_bytes, name)
        self.fingerprint = fingerprint(self.model_bytes)
        self.n_words: int = self.vocabulary.size
        self.bos_id: int = self.vocabulary.bos_id
        self.eos_id: int = self.vocabulary.eos_id

    @property
    def sp_model(self) -> sentencepiece.SentencePieceProcessor:
        """SentencePiece's own object; UsageError for a vocabulary of another kind."""
        if not isinstance(self.vocabulary, SentencePiece):
            raise UsageError(f"vocabulary {self.fingerprint}: is {self.vocabulary.kind}")
        return self.vocabulary.processor

    @cached_property
    def pad_id(self) -> int:
        """The token of the byte 0, which the original pads with; 0 where there is none."""
        texts = self.vocabulary.token_texts
        return texts.index(b"\0") if b"\0" in texts else 0

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Token ids of `s`, cut to `max_len`, with BOS and EOS as asked.

        A vocabulary whose prompts have no BOS puts it before an empty text alone: something has to
        be there. Bytes of a command line that are no UTF-8, which Python reads as surrogates,
        become `?`.
        """
        ids = self.vocabulary.encode(s.encode("utf-8", "replace").decode())[: self.max_len]
        return self._opening(bos, ids) + ids + [self.eos_id] * eos

    def encode_many(self, texts: Sequence[str], bos: bool) -> list[list[int]]:
        """Token ids of each text, as those of `encode` without EOS."""
        arrays = self.vocabulary.encode_many(texts)
        encoded = (array[: self.max_len].tolist() for array in arrays)
        return [self._opening(bos, ids) + ids for ids in encoded]

    def _opening(self, bos: bool, ids: list[int]) -> list[int]:
        return [self.bos_id] * (bos and (self.vocabulary.adds_bos or not ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; BOS and EOS have none."""
        return self.vocabulary.decode([int(i) for i in ids])

    def token_byte_lengths(self, *, opening: bool = False) -> np.ndarray:
        """(n_words,) int64: bytes of UTF-8 that each token spells; 0 for BOS, EOS and unknown.

        `opening`: as a text's first token, without the space that is put before every text.
        """
        texts = self.vocabulary.token_texts
        if opening and self.vocabulary.opening_space:
            texts = [text.removeprefix(b" ") for text in texts]
        return np.array([len(text) for text in texts], np.int64)

    def byte_fallback_share(self, tokens: np.ndarray) -> float:
        """The share of the bytes of these tokens' text that are byte tokens, from 0 to 1.

        They stand for characters that the vocabulary has no piece for.
        """
        sizes = np.bincount(tokens, minlength=self.n_words) * self.token_byte_lengths()
        return float(sizes[list(self.vocabulary.byte_tokens)].sum() / max(1, sizes.sum()))


def vocabulary_remedy(size: int) -> str:
    """What to do about a model file without its vocabulary of `size` pieces."""
    remedy = f"name its SentencePiece file of {size:,} pieces with --tokenizer_model"
    if size == 32000:
        remedy += "; Llama-2's is fetched by: python data/download.py tokenizer"
    return remedy


def _read_model(path: Path) -> bytes:
    if not path.exists():
        raise UsageError(f"--tokenizer_model {path}: no such file{download_hint(path)}")
    try:
        return read_vocabulary_file(path)
    except UsageError as error:
        raise UsageError(f"--tokenizer_model {error}") from None


# ---------------------------------------------------------------------------- training one

TRAINING_BYTES = 64 << 20  # of text, sampled evenly from the inputs: bounds memory and time
SENTENCE_CHARS = 4096  # SentencePiece drops longer sentences than its limit; these stay below
META_PIECES = 3 + 256  # unknown, BOS and EOS, and one for each byte
LARGEST_FITTING = 32000  # pieces, as Llama-2's
# Of an alphabet every character gets a piece, of a script of thousands only the usual ones: the
# rare ones would fill the vocabulary and hardly ever be trained.
ALPHABET, COVERAGE, COVERAGE_OF_THOUSANDS = 1000, 0.9995, 0.99


def train_vocabulary(
    inputs: Sequence[Path],
    output: Path,
    *,
    vocab_size: int | None = None,
    character_coverage: float | None = None,
    reading: Reading | None = None,
    max_bytes: int = TRAINING_BYTES,
    seal: bool = True,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Train a byte-fallback BPE vocabulary with Llama-2's conventions and publish it at `output`.

    With a `seal` the file carries a checksum, which SentencePiece passes over. `vocab_size` and
    `character_coverage` are by default what suits the text (see `fit_vocabulary`). The same inputs
    and options give the same bytes: the file holds no path and no date. At most `max_bytes` of text
    are used, sampled evenly. Raises UsageError, naming the largest (or the smallest) size that
    works, when `vocab_size` does not fit the corpus, and what `check_stop` raises, which is called
    several times a second.
    """
    # A .gz unpacks to about four times its size.
    sizes = [path.stat().st_size * (4 if path.suffix.lower() == ".gz" else 1) for path in inputs]
    share = min(1.0, max_bytes / max(1, sum(sizes)))
    sentences = _sample_sentences(inputs, reading or Reading(), share, max_bytes)
    if not sentences:
        raise UsageError(f"{', '.join(map(str, inputs))}: no text to train a vocabulary on")
    fitting, coverage = fit_vocabulary(sentences, share, coverage=character_coverage)
    spaces = len(sentences) + sum(sentence.count(" ") for sentence in sentences)
    # Of a text with few spaces their sign is rare enough to be dropped, and would then be spelt.
    is_rare = spaces < (1 - coverage) * (len(sentences) + sum(map(len, sentences)))
    model = io.BytesIO()
    try:
        _run_in_thread(
            sentencepiece.SentencePieceTrainer.train,
            check_stop,
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size or fitting,
            hard_vocab_limit=vocab_size is not None,
            character_coverage=coverage,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * SENTENCE_CHARS,
            num_threads=16,  # part of the file: a fixed number keeps it the same on all machines
            minloglevel=2,
            **({"required_chars": SPACE} if is_rare else {}),
        )
    except RuntimeError as error:
        problem = f"SentencePiece could not train ({error})"
        if largest := re.search(r"value <= (\d+)", str(error)):
            problem = f"too large: this text gives at most {largest[1]}"
        elif least := re.search(r"\d+ vs (\d+)", str(error)):  # its characters and 256 bytes
            problem = f"too small: at least {least[1]}, or a lower --character_coverage"
        raise UsageError(f"--vocab_size {vocab_size}: {problem}") from None
    _write(output, sealed(model.getvalue()) if seal else model.getvalue())


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


def fit_vocabulary(
    sentences: Sequence[str], share: float, *, coverage: float | None = None
) -> tuple[int, float]:
    """The size of a vocabulary that suits a text, and the share of its characters to have pieces.

    `sentences` are the `share` of the text that was sampled. The size is that of bytes and
    characters, which must be there, and of merges, twice the square root of the text's bytes: each
    piece has to occur often enough to be learnt (measured in `benchmarks/README.md`).
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
    text_bytes = sum(len(sentence.encode()) for sentence in sentences) / share
    least = META_PIECES + characters
    size = max(least, min(LARGEST_FITTING, least + round(2 * math.sqrt(text_bytes))))
    return -(-size // 64) * 64, coverage  # of whole 64s, which matrices on a GPU are fastest in


def _sample_sentences(
    inputs: Sequence[Path], reading: Reading, share: float, max_bytes: int
) -> list[str]:
    """Lines of the inputs, each kept with the probability `share`, of about `max_bytes` in all."""
    rng, kept = random.Random(0), []
    room = max_bytes * 5 // 4  # ends the sampling where a .gz unpacks to more than was estimated
    for path in inputs:
        for sentence in _sentences(read_documents(path, reading)):
            if share < 1 and rng.random() >= share:
                continue
            room -= len(sentence.encode())
            if room < 0:
                return kept
            kept.append(sentence)
    return kept


def _sentences(blocks: Iterable[Block]) -> Iterator[str]:
    """The lines of documents, long ones cut, at a space where there is one."""
    held = ""
    for block in blocks:
        *lines, held = (held + block.text).split("\n")
        if block.ends or len(held) > READ_BYTES:  # a line without end is cut here
            lines, held = [*lines, held], ""
        for line in lines:
            while len(line) > SENTENCE_CHARS:
                cut = line.rfind(" ", 1, SENTENCE_CHARS)
                cut = cut if cut > 0 else SENTENCE_CHARS
                yield line[:cut]
                line = line[cut:].removeprefix(" ")
            if line and not line.isspace():
                yield line


# ---------------------------------------------------------------------------- llama2.c's format


def tokenizer_bin(tokenizer: Tokenizer) -> bytes:
    """The vocabulary as llama2.c's `tokenizer.bin` holds it.

    Little-endian: uint32 longest token in bytes; per token float32 score, int32 length, bytes.
    Byte tokens keep their name `<0x0A>`, which llama2.c parses; BOS and EOS are set in newlines.
    Raises UsageError for a vocabulary that run.c, in which Llama's ids are built in, reads wrongly.
    """
    vocabulary = tokenizer.vocabulary
    if not isinstance(vocabulary, SentencePiece) or not vocabulary.is_plain_bpe:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: llama2.c knows only SentencePiece's BPE over "
            "unchanged text with a space before it, as tokenizer.py trains it"
        )
    sp = vocabulary.processor
    ids = (tokenizer.bos_id, tokenizer.eos_id, sp.piece_to_id("<0x00>"))
    if ids != (1, 2, 3):
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: BOS, EOS and <0x00> are the tokens "
            f"{', '.join(map(str, ids))}; llama2.c knows them only as 1, 2 and 3"
        )
    named = {tokenizer.bos_id: "\n<s>\n", tokenizer.eos_id: "\n</s>\n"}
    names = [named.get(i, sp.id_to_piece(i)) for i in range(tokenizer.n_words)]
    tokens = [piece_text(name) for name in names]
    data = bytearray(struct.pack("<I", max(map(len, tokens))))
    for i, token in enumerate(tokens):
        data += struct.pack("<fi", sp.get_score(i), len(token)) + token
    return bytes(data)


def export_tokenizer_bin(tokenizer: Tokenizer, path: Path) -> None:
    """Write the vocabulary as llama2.c's `tokenizer.bin`; raises UsageError."""
    _write(path, tokenizer_bin(tokenizer))


def _write(path: Path, data: bytes | bytearray) -> None:
    try:
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None


# ---------------------------------------------------------------------------- command line


def _build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="tokenizer.py", description="Train or export a vocabulary.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    train = commands.add_parser("train", help="train a SentencePiece vocabulary on text")
    train.add_argument("--input", nargs="+", required=True, help="text files, folders, globs")
    train.add_argument("--output", type=read_path, required=True, help="the model file to write")
    size, share = number_reader(int, at_least=1), number_reader(float, at_least=0.98, at_most=1)
    train.add_argument("--vocab_size", type=size, help="tokens; unset: what suits the text")
    train.add_argument(  # within SentencePiece's own limits
        "--character_coverage",
        type=share,
        help="share of characters that get tokens, the rest fall back to bytes; unset: 0.9995, and "
        "0.99 of a script of thousands",
    )
    add_reading_flags(train)
    export = commands.add_parser("export", help="write llama2.c's tokenizer.bin")
    export.add_argument(
        "--tokenizer_model", type=read_path, help="default: the embedded vocabulary"
    )
    export.add_argument("--output", type=read_path, required=True, help="the file to write")
    for command in (train, export):
        command.add_argument("--overwrite", action="store_true", help="replace the output file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line about bad input."""
    try:
        args = _build_parser().parse_args(argv)
        if args.output.exists() and not args.overwrite:
            raise UsageError(f"--output {args.output}: is there already; --overwrite replaces it")
        if args.command == "train":
            check_encoding(args.encoding)
            train_vocabulary(
                find_text_files(args.input, flag="--input"),
                args.output,
                vocab_size=args.vocab_size,
                character_coverage=args.character_coverage,
                reading=Reading.from_flags(args),
            )
            tokenizer = Tokenizer(tokenizer_model=args.output)
        else:
            tokenizer = Tokenizer(tokenizer_model=args.tokenizer_model)
            export_tokenizer_bin(tokenizer, args.output)
        size = args.output.stat().st_size
    except UsageError as error:
        print_error("tokenizer.py", error)
        return 2
    except OSError as error:
        print_error("tokenizer.py", f"{error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{args.output}: {tokenizer.n_words:,} tokens, {size:,} bytes, {tokenizer.fingerprint}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    protect_output()
    sys.exit(main())
