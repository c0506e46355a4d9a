"""The tokenizer: text to token ids and back, and the training of a vocabulary.

Knows nothing of tensors or caches. As a command it trains and exports vocabularies:

    python tokenizer.py train --input story.txt more/ --vocab_size 4096 --output my.model
    python tokenizer.py train --input story.txt --kind byte-bpe --output my-tokenizer.json
    python tokenizer.py export --tokenizer_model my.model --output tokenizer.bin
"""

from __future__ import annotations

import signal

import minllama  # noqa: F401 - says in a line which packages are not here

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main, Ctrl-C ends it without a traceback

import argparse
import itertools
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece

from config import DATA_DIR, add_reading_flags, fingerprint
from minllama.cli.command_line import exit_status, number_reader, protect_output, read_path
from minllama.cli.suggestions import WholeLineParser
from minllama.system.encodings import as_utf8, check_encoding
from minllama.system.errors import UsageError
from minllama.system.files import atomic_write
from minllama.system.unpacking import COMPRESSED_SUFFIXES
from minllama.text.dialogues import holds_dialogues, read_dialogues
from minllama.text.documents import Block, read_documents
from minllama.text.find_files import download_hint, find_text_files
from minllama.text.reading import READ_BYTES, Reading
from minllama.vocabulary.base import Vocabulary
from minllama.vocabulary.files import open_vocabulary, read_vocabulary_file
from minllama.vocabulary.sentence_piece import SentencePiece, piece_text, sealed
from minllama.vocabulary.symbols import read_symbols
from minllama.vocabulary.training import (
    CHARS,
    KINDS,
    SENTENCE_CHARS,
    Wanted,
    reserved_names,
    train_on,
)

if TYPE_CHECKING:
    from llama import Llama
    from minllama.formats.stored_model import StoredModel

EMBEDDED_VOCABULARY = DATA_DIR / "stories-vocabulary.model"

# ---------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """A vocabulary, from a file or a folder, from a model file's bytes, or the embedded one.

    `max_len` cuts what `encode` returns, before BOS and EOS; a vocabulary may stand in its place.
    Raises UsageError naming a file that is missing or holds no vocabulary.
    """

    def __init__(
        self, max_len: int | None = None, tokenizer_model: str | Path | bytes | None = None
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
        ids = self.vocabulary.encode(as_utf8(s))[: self.max_len]
        return self._opening(bos, ids) + ids + [self.eos_id] * eos

    def encode_opening(self, s: str) -> list[int]:
        """Token ids of `s` as of a document's beginning, behind BOS whatever prompts have.

        So its first token, too, is one that a model can be asked to predict.
        """
        return [self.bos_id, *self.encode(s, bos=False, eos=False)]

    def encode_many(self, texts: Sequence[str], bos: bool) -> list[list[int]]:
        """Token ids of each text, as those of `encode` without EOS."""
        arrays = self.vocabulary.encode_many([as_utf8(text) for text in texts])
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
        return float(sizes[self.vocabulary.byte_tokens].sum() / max(1, sizes.sum()))


def tokenizer_of(model: Llama | StoredModel, where: str | Path = "the model") -> Tokenizer:
    """The vocabulary that a model carries; `where` is what an error calls the model.

    Raises UsageError where it carries none, or one of another size.
    """
    size = model.config.vocab_size
    if model.vocabulary is None:
        raise UsageError(f"{where} carries no vocabulary: {vocabulary_remedy(size)}")
    try:
        tokenizer = Tokenizer(model.vocabulary)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if tokenizer.n_words != size:
        raise UsageError(
            f"{where}: the vocabulary in it has {tokenizer.n_words:,} pieces and the model "
            f"{size:,}: they do not belong together: the file is damaged"
        )
    return tokenizer


def vocabulary_remedy(size: int) -> str:
    """What to do about a model file without its vocabulary of `size` pieces."""
    remedy = f"name its vocabulary of {size:,} pieces with --tokenizer_model"
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


def train_vocabulary(
    inputs: Sequence[Path],
    output: Path,
    *,
    kind: str = "sentencepiece",
    vocab_size: int | str | None = None,
    character_coverage: float | None = None,
    symbols: Sequence[str] = (),
    reading: Reading | None = None,
    max_bytes: int = TRAINING_BYTES,
    seal: bool = True,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Train a vocabulary and publish it at `output`; `minllama/vocabulary/training.py` tells how.

    Of kind "sentencepiece" it is BPE with byte tokens and Llama 2's conventions; with a `seal` the
    file carries a checksum, which SentencePiece passes over. Of kind "byte-bpe" it is Llama 3's, in
    a tokenizer.json. `vocab_size` and `character_coverage` are by default what suits the text (see
    `fit_vocabulary`); "chars" is one token for every character. `symbols` are one token wherever
    they stand. The same inputs and options give the same bytes: the file holds no path and no date.
    Of dialogues it is all that is said. At most `max_bytes` of text are used, sampled evenly.
    Raises UsageError, naming the largest (or the smallest) size that works, when `vocab_size` does
    not fit the corpus, and what `check_stop` raises, which is called several times a second.
    """
    wanted = Wanted(kind, vocab_size, character_coverage, symbols)
    wanted.check()
    packed = {*COMPRESSED_SUFFIXES, ".parquet"}  # unpack to about four times their size
    sizes = [p.stat().st_size * (4 if p.suffix.lower() in packed else 1) for p in inputs]
    share = min(1.0, max_bytes / max(1, sum(sizes)))
    cut = _lines if kind == "sentencepiece" else _stretches
    sentences = _sample(inputs, reading or Reading(), cut, share, max_bytes)
    if not any(map(str.strip, sentences)):
        raise UsageError(f"{', '.join(map(str, inputs))}: no text to train a vocabulary on")
    content = train_on(sentences, share, wanted, check_stop)
    _write(output, sealed(content) if seal and kind == "sentencepiece" else content)


def _sample(
    inputs: Sequence[Path],
    reading: Reading,
    cut: Callable[[Iterable[Block]], Iterator[str]],
    share: float,
    max_bytes: int,
) -> list[str]:
    """What is cut from the inputs, kept with the probability `share`, about `max_bytes` in all."""
    rng, kept = random.Random(0), []
    room = max_bytes * 5 // 4  # ends the sampling where a .gz unpacks to more than was estimated
    for path in inputs:
        for sentence in cut(_documents(path, reading)):
            if share < 1 and rng.random() >= share:
                continue
            room -= len(sentence.encode())
            if room < 0:
                return kept
            kept.append(sentence)
    return kept


def _documents(path: Path, reading: Reading) -> Iterator[Block]:
    """The documents of a file; where it holds dialogues, each as one."""
    if not holds_dialogues(path, reading):
        yield from read_documents(path, reading)
        return
    for dialogue in read_dialogues(path, reading):
        said = [dialogue.system, *itertools.chain.from_iterable(dialogue.exchanges)]
        yield Block("\n".join(filter(None, said)), True)


def _lines(blocks: Iterable[Block]) -> Iterator[str]:
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


def _stretches(blocks: Iterable[Block]) -> Iterator[str]:
    """The text of documents with its line ends, cut at a space where there is one."""
    for block in blocks:
        text, start = block.text, 0
        while len(text) - start > SENTENCE_CHARS:
            cut = text.rfind(" ", start + 1, start + SENTENCE_CHARS)
            cut = cut if cut > 0 else start + SENTENCE_CHARS
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:]


# ---------------------------------------------------------------------------- llama2.c's format


def tokenizer_bin(tokenizer: Tokenizer) -> bytes:
    """The vocabulary as llama2.c's `tokenizer.bin` holds it.

    Little-endian: uint32 longest token in bytes; per token float32 score, int32 length, bytes.
    Byte tokens keep their name `<0x0A>`, which llama2.c parses; BOS and EOS are set in newlines.
    Raises UsageError for a vocabulary that run.c, in which Llama's ids are built in, reads wrongly.
    """
    vocabulary = tokenizer.vocabulary
    if vocabulary.added_tokens:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: has symbols of its own "
            f"({next(iter(vocabulary.added_tokens))!r}), which llama2.c does not look for in a text"
        )
    if not isinstance(vocabulary, SentencePiece) or not vocabulary.is_plain_bpe:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: llama2.c knows only SentencePiece's BPE over "
            "unchanged text with a space before it, as tokenizer.py trains it by default"
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
    parser = WholeLineParser(prog="tokenizer.py", description="Train or export a vocabulary.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a vocabulary on text")
    train.add_argument(
        "--input", nargs="+", required=True, help="texts or dialogues: files, folders, globs"
    )
    train.add_argument("--output", type=read_path, required=True, help="the model file to write")
    train.add_argument(
        "--kind",
        choices=KINDS,
        default=KINDS[0],
        help="sentencepiece: BPE with byte tokens, as Llama 2's; byte-bpe: byte-level BPE, as "
        "Llama 3's, in a tokenizer.json (default: %(default)s)",
    )
    train.add_argument(
        "--vocab_size",
        type=_read_size,
        help=f"tokens; {CHARS}: one for every character; unset: what suits the text",
    )
    train.add_argument(
        "--symbols",
        type=read_path,
        help="file of own symbols, one a line, each one token wherever it stands in a text",
    )
    share = number_reader(float, at_least=0.98, at_most=1)
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


def _read_size(text: str) -> int | str:
    """A `type` for argparse: a number of tokens, or CHARS."""
    return text if text == CHARS else number_reader(int, at_least=1)(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line about bad input."""
    return exit_status("tokenizer.py", lambda: _run(_build_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    if args.output.exists() and not args.overwrite:
        raise UsageError(f"--output {args.output}: is there already; --overwrite replaces it")
    if args.command == "train":
        check_encoding(args.encoding)
        names = reserved_names(args.kind)
        train_vocabulary(
            find_text_files(args.input, flag="--input"),
            args.output,
            kind=args.kind,
            symbols=read_symbols(args.symbols, names) if args.symbols else (),
            vocab_size=args.vocab_size,
            character_coverage=args.character_coverage,
            reading=Reading.from_flags(args),
        )
        tokenizer = Tokenizer(tokenizer_model=args.output)
    else:
        tokenizer = Tokenizer(tokenizer_model=args.tokenizer_model)
        export_tokenizer_bin(tokenizer, args.output)
    size = args.output.stat().st_size
    print(f"{args.output}: {tokenizer.n_words:,} tokens, {size:,} bytes, {tokenizer.fingerprint}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    protect_output()
    sys.exit(main())
