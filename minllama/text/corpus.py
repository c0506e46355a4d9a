"""The text of a pretraining: found, tokenized, partly held out, cut into chunks, and described."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import DATA_DIR, MAX_CONTEXT, Options, fingerprint
from minllama.cli.command_line import launch_command, own_script, quoted
from minllama.cli.console import say
from minllama.machine.ranks import Ranks
from minllama.system.errors import UsageError
from minllama.system.files import real_path
from minllama.system.kinds import HEAD_BYTES, is_html
from minllama.system.peek import has_records
from minllama.system.signals import StopRequest
from minllama.text.documents import (
    REST_OF_MARK,
    first_words,
    from_a_beginning,
    sample_texts,
    seen_separator,
)
from minllama.text.duplicates import (
    drop_duplicates,
    first_occurrences,
    report_duplicates,
    report_near_copies,
)
from minllama.text.find_files import SHOWN_FILES, find_text_files, is_text_name
from minllama.text.labelled import is_labelled
from minllama.text.reading import BLANK_LINE, Reading, encoding_line, read_blocks
from minllama.text.sources import (
    documents_by_source,
    files_by_argument,
    split_sources,
    tokens_by_source,
)
from minllama.text.stream import TokenStream, split_documents, whole_stream
from minllama.text.token_cache import TokenCache, build_or_load
from minllama.vocabulary.lost import count_lost
from tokenizer import Tokenizer
from utils import PretrainDataset, count_chunks

EMBEDDED_TEXTS = ("stories-train.jsonl", "reviews-unlabelled.jsonl")
FEW_FILES = 3  # have a line each
MIN_CONTEXT, WANTED_STEPS = 128, 1000
SAMPLED_TOKENS = 1 << 20  # looked at to see whether the vocabulary fits the text
OPENING_TOKENS = 64  # of a document, looked at for its first words
# Of a text's bytes, encoded one by one. English under an English vocabulary has next to none.
MOSTLY, SOME = 0.5, 0.02


class TextFiles(NamedTuple):
    """The files to train on, those held out, and how both are read."""

    train: Sequence[Path]
    val: Sequence[Path]  # none: a share of the text is held out
    reading: Reading
    # With --data_weights: the number of its files, in order, by the argument that names them.
    sources: dict[str, int] = {}
    val_sources: dict[str, int] = {}  # of --val_data


@dataclass(frozen=True)
class Texts:
    """The text to train on and the held-out text, cut into chunks."""

    train: PretrainDataset
    val: PretrainDataset | None
    tokenizer: Tokenizer
    context: int  # tokens of a chunk
    key: str  # of the training text, its vocabulary, how it was read and what --dedup dropped
    cache: TokenCache  # of the training text
    files: Sequence[Path]  # in the order of the cache

    def locate(self, chunk: int) -> str:
        """Where a training chunk is in the files, and how it begins."""
        stream, start = self.train.stream, int(self.train.bounds([chunk])[0][0])
        file, token = self.cache.place(stream.locate(start))
        text = self.tokenizer.decode(stream.read(start, min(start + 8, len(stream))).tolist())
        return f"{self.files[file]}, token {token:,} ({text!r})"

    def cut(self, context: int, val_tokens: int) -> Texts:
        """These texts in chunks of `context`, with at most `val_tokens` of the held-out one."""
        val = self.val and self.val.cut(context, val_tokens)
        return dataclasses.replace(self, train=self.train.cut(context), val=val, context=context)

    def opening(self) -> str:
        """The first words of the held-out text, or of all where none is held out."""
        tokenizer, stream = self.tokenizer, (self.val or self.train).stream
        marks = (tokenizer.bos_id, tokenizer.eos_id)
        together = int(stream.offsets[:2][-1])  # what follows is from elsewhere in the text
        ids = stream.read(0, min(together, OPENING_TOKENS)).tolist()
        start = int(ids[:1] == [tokenizer.bos_id])
        document = itertools.takewhile(lambda token: token not in marks, ids[start:])
        text = tokenizer.decode(document).rstrip("\ufffd")
        if not start:  # within a document, and perhaps within a marker in it
            text = from_a_beginning(REST_OF_MARK.sub("", text))
        return first_words(text, [*tokenizer.vocabulary.added_tokens])


def find_texts(options: Options) -> TextFiles:
    """The files that the flags name, else the embedded stories and reviews; raises UsageError."""
    patterns, val_data = options.pretrain_data, options.val_data
    if not patterns:
        patterns = tuple(str(DATA_DIR / name) for name in EMBEDDED_TEXTS)
        if not val_data and options.val_fraction:
            val_data = (str(DATA_DIR / "stories-val.jsonl"),)
    reading = Reading.from_flags(options)
    if options.data_weights:
        return find_sources(options, reading)
    files = find_text_files(patterns, flag="--pretrain_data")
    val_files = find_text_files(val_data, flag="--val_data") if val_data else []
    files = without_validation(files, val_files)
    return TextFiles(files, val_files, reading)


def find_sources(options: Options, reading: Reading) -> TextFiles:
    """The files where each argument of --pretrain_data is a source by itself.

    Raises UsageError for a file in two of them, and for a source that has none of its own.
    """
    if not options.pretrain_data:
        raise UsageError("--data_weights weighs the sources that --pretrain_data names: name them")
    sources = files_by_argument(options.pretrain_data, "--pretrain_data")
    val_sources = files_by_argument(options.val_data, "--val_data")
    val_files = [*itertools.chain(*val_sources.values())]
    files = without_validation([*itertools.chain(*sources.values())], val_files)
    trained = {*files}
    counts = {name: len(trained.intersection(paths)) for name, paths in sources.items()}
    for name, count in counts.items():
        if not count:
            raise UsageError(
                f"--pretrain_data {name}: --val_data names all of it: nothing is left to train on"
            )
    val_counts = {name: len(paths) for name, paths in val_sources.items()}
    return TextFiles(files, val_files, reading, counts, val_counts)


def load_texts(
    options: Options,
    files: TextFiles,
    tokenizer: Tokenizer,
    *,
    longest: int = MAX_CONTEXT,
    stop: StopRequest,
    ranks: Ranks,
) -> Texts:
    """The text, tokenized now or earlier, some of it held out. Every rank must call this.

    Its chunks are of --max_seq_len, else of up to `longest` tokens. Raises UsageError.
    """

    def load(paths: Sequence[Path]) -> TokenCache:
        build = functools.partial(
            build_or_load, paths, tokenizer, files.reading, options.cache_dir, check_stop=stop.check
        )
        # A machine's other processes need not compare the checksum again.
        cache = ranks.first_on_node(build, then=functools.partial(build, is_verified=True))
        if cache.rebuilt_because not in (None, "there was none"):
            print(f"tokenized again: the cache in {options.cache_dir}: {cache.rebuilt_because}")
        return cache

    cache, val_cache = load(files.train), load(files.val) if files.val else None
    chosen = drop_duplicates(cache, val_cache) if options.dedup else None
    documents = documents_by_source(cache, files.sources, chosen)
    whole = whole_stream(cache, chosen)
    val_fraction = 0.0 if files.val else options.val_fraction
    if documents:
        smallest = min(len(whole_stream(cache, of)) for of in documents.values())
        least = smallest * max(0.25, 1 - 2 * val_fraction)  # twice that may be held out of it
        while longest > max(MIN_CONTEXT, least):
            longest //= 2
    length = options.max_seq_len or longest
    if options.max_seq_len is None and options.minutes is None:
        length = fit_context(options, round(len(whole) * (1 - val_fraction)), longest)
    print_loaded(files.train, cache, files.reading, length)
    if val_cache is not None:
        print_loaded(files.val, val_cache, files.reading, length)
    text_bytes = cache.document_bytes if chosen is None else cache.document_bytes[chosen]
    per_token = int(text_bytes.sum()) / len(whole)
    say(f"text         {len(whole):,} tokens, {per_token:.2f} bytes per token")
    share = tokenizer.byte_fallback_share(cache.tokens[:SAMPLED_TOKENS])
    print_byte_share(share, files.train, model=options.pretrained_model_path)
    say(*count_lost(tokenizer.vocabulary, sample_texts(files.train, files.reading)).lines())
    split = _split(cache, documents, chosen, val_fraction, length)
    train, sources, val, val_sources = split
    if val is None and val_fraction:
        say("no validation: the text is too short to hold some of it out; --val_data FILE")
    if val_cache is not None:
        val, val_sources = whole_stream(val_cache), tokens_by_source(val_cache, files.val_sources)
    if chosen is None:
        report_duplicates(cache, val_cache, train, val)
    if val is not None and ranks.is_main:
        report_near_copies(tokenizer, train, val)
    if val is not None:
        share = len(val) / (len(val) + len(train))
        say(f"validation   {len(val):,} tokens held out ({share:.1%} of all)")
    if len(train) <= length:
        say(f"the text is shorter than --max_seq_len {length}: training on one short chunk")

    key = cache.key.hex()[:16]
    if chosen is not None and not chosen.all():
        key = fingerprint(cache.key + np.packbits(chosen).tobytes())
    cut = functools.partial(PretrainDataset, chunk_length=length, tokenizer=tokenizer)
    val_set = None if val is None else cut(val, sources=val_sources)
    train_set = cut(train, sources=sources, seed=options.seed)
    return Texts(train_set, val_set, tokenizer, length, key, cache, files.train)


def load_held_out(
    options: Options, files: TextFiles, tokenizer: Tokenizer, *, stop: StopRequest
) -> PretrainDataset | None:
    """What an earlier run of these options, its --max_seq_len among them, held out of its text.

    By its token cache, which is made again where it is gone. Raises UsageError.
    """
    load = functools.partial(
        build_or_load,
        tokenizer=tokenizer,
        reading=files.reading,
        cache_dir=options.cache_dir,
        check_stop=stop.check,
    )
    length = options.max_seq_len
    if files.val:
        cache = load(files.val)
        val, sources = whole_stream(cache), tokens_by_source(cache, files.val_sources)
    else:
        cache = load(files.train)
        first = first_occurrences(cache.fingerprints)
        chosen = first == np.arange(len(first)) if options.dedup else None
        documents = documents_by_source(cache, files.sources, chosen)
        *_, val, sources = _split(cache, documents, chosen, options.val_fraction, length)
    if val is None:
        return None
    val_set = PretrainDataset(val, length, tokenizer=tokenizer, sources=sources)
    return val_set.cut(length, options.val_tokens)


def _split(
    cache: TokenCache,
    documents: dict[str, np.ndarray],
    chosen: np.ndarray | None,
    val_fraction: float,
    length: int,
) -> tuple[TokenStream, dict[str, int], TokenStream | None, dict[str, int]]:
    """The text to train on and what is held out of it, each with the tokens of its sources."""
    if documents:
        return split_sources(cache, documents, val_fraction, length)
    train, val = split_documents(cache, val_fraction, chunk_length=length, chosen=chosen)
    return train, {}, val, {}


def fit_context(options: Options, tokens: int, longest: int) -> int:
    """The context for a text of so many tokens, where --max_seq_len names none; says which.

    The `longest`, halved until the whole schedule has about a thousand steps: a small text is
    learnt better in more and shorter steps.
    """
    batch_size = options.global_batch_size or 1

    def steps(context: int) -> int:
        return options.epochs * max(1, -(-count_chunks(tokens, context) // batch_size))

    context = longest
    while steps(context) < WANTED_STEPS and context > MIN_CONTEXT:
        context //= 2
    say(  # about, since what is held out is not known yet
        f"context      {context:,} tokens, for about {steps(context):,} steps; --max_seq_len N "
        "sets it"
    )
    return context


def without_validation(files: Sequence[Path], val_files: Sequence[Path]) -> Sequence[Path]:
    """The training files that are not --val_data's, too; says what is left out."""
    held_out = {real_path(path) for path in val_files}
    remaining = [path for path in files if real_path(path) not in held_out]
    if not remaining:
        print("warning: --val_data is the text to train on: its loss says nothing of other text")
        return files
    if count := len(files) - len(remaining):
        print(f"not trained on: {count} of the files, which --val_data names, too")
    return remaining


def print_loaded(files: Sequence[Path], cache: TokenCache, reading: Reading, length: int) -> None:
    """Say how many chunks of `length` tokens the files have, and where they may be misread."""
    if line := encoding_line(files, reading):
        say(line)
    remarks = [_remark(path, reading, alone=len(files) == 1) for path in files[:SHOWN_FILES]]
    if len(files) > FEW_FILES:
        where = f"{len(files):,} files, {files[0]} to {files[-1]}"
        print(f"Loaded {count_chunks(len(cache), length):,} chunks from {where}")
        for remark, count in Counter(filter(None, remarks)).items():
            print(f"  {count} of the first {len(remarks)}: {remark}")
        return
    for path, tokens, remark in zip(files, cache.file_tokens, remarks, strict=True):
        print(f"Loaded {count_chunks(int(tokens), length)} chunks from {path}")
        if remark:
            print(f"  {remark}")


def _remark(path: Path, reading: Reading, *, alone: bool) -> str:
    """A note on a file that may not be meant to be read as it is; else an empty string."""
    if is_labelled(path, reading) and not reading.sentences_only:
        return "labelled lines in it: --sentences_only reads the sentences alone"
    if has_records(path):
        return ""
    start = next(iter(read_blocks(path, reading)), "")
    if is_html(start[:HEAD_BYTES].encode()):
        return "a web page, read with its markup: plain text is learnt better"
    if not is_text_name(path):
        return "read as plain text, markup included"
    if reading.document_separator is None and not reading.document_per_line:
        mark = seen_separator(start)
        if mark is not None and (alone or mark != BLANK_LINE):
            parts = quoted("--document_separator", mark)
            return f"one document with {mark}s in it: {parts} if these stand between documents"
    return ""


def print_byte_share(share: float, files: Sequence[Path], model: Path | None) -> None:
    """Say what `share` of the text is encoded byte by byte, if any that matters.

    Where that is most of it, how to train a vocabulary; that of a `model` to go on from stays.
    """
    if share > MOSTLY and model is not None:
        say(
            f"warning: {share:.0%} of the text is encoded byte by byte, since the vocabulary of "
            f"--pretrained_model_path {model} has no pieces for its characters, and a model keeps "
            "its vocabulary: go on from a model of such text, or leave the flag out to begin with "
            "a vocabulary of this text"
        )
    elif share > MOSTLY:
        train = ["--input", *files[:SHOWN_FILES], "--vocab_size", "8000", "--output", "my.model"]
        print(
            f"warning: {share:.0%} of the text is encoded byte by byte, since the vocabulary has "
            "no pieces for its characters: the model would learn slowly and see little at a time. "
            "Train a vocabulary on the text, then name it with --tokenizer_model my.model:\n"
            f"  {launch_command(own_script('tokenizer.py'), 'train', *train)}"
        )
    elif share >= SOME:
        print(f"byte pieces  {share:.1%} of the text: characters that the vocabulary lacks")
