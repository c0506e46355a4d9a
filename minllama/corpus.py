"""The text of a pretraining: found, tokenized, partly held out, cut into chunks, and described."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from config import DATA_DIR, Options
from minllama.command_line import quoted
from minllama.console import say
from minllama.models import SHOWN_FILES
from minllama.ranks import Ranks
from minllama.signals import StopRequest
from minllama.text import JSON_SUFFIXES, TEXT_SUFFIXES, Reading, find_text_files, is_labelled
from minllama.tokens import TokenCache, build_or_load
from tokenizer import Tokenizer
from utils import PretrainDataset, count_chunks, split_documents, whole_stream

TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SAMPLED_TOKENS = 1 << 20  # looked at to see whether the vocabulary fits the text
MOSTLY = 0.5  # of a text's bytes; English under an English vocabulary has next to none


@dataclass(frozen=True)
class Texts:
    """The text to train on and the held-out text, cut into chunks."""

    train: PretrainDataset
    val: PretrainDataset | None
    key: str  # of the training text, its vocabulary and how it was read
    locate: Callable[[int], str]  # where a training chunk is in the files


def load_texts(options: Options, tokenizer: Tokenizer, *, stop: StopRequest, ranks: Ranks) -> Texts:
    """The text, tokenized now or earlier, some of it held out. Every rank must call this.

    Raises UsageError.
    """
    length, patterns, val_data = options.max_seq_len, options.pretrain_data, options.val_data
    if not patterns:
        patterns = (str(DATA_DIR / "stories-train.jsonl"),)
        if not val_data and options.val_fraction:
            val_data = (str(DATA_DIR / "stories-val.jsonl"),)
    files = find_text_files(patterns, flag="--pretrain_data")
    val_files = find_text_files(val_data, flag="--val_data") if val_data else []
    files = without_validation(files, val_files)
    cache = load_cache(files, options, tokenizer, stop=stop, ranks=ranks)
    warn_of_vocabulary(tokenizer.spelt_in_bytes(cache.tokens[:SAMPLED_TOKENS]), files)
    if val_files:
        train = whole_stream(cache)
        val = whole_stream(load_cache(val_files, options, tokenizer, stop=stop, ranks=ranks))
    else:
        train, val = split_documents(cache, options.val_fraction, chunk_length=length)
        if val is None and options.val_fraction:
            print("no validation: the text is too short to hold some of it out; --val_data FILE")
    if val is not None:
        share = len(val) / (len(val) + len(train))
        say(f"validation   {len(val):,} tokens held out ({share:.1%} of all)")
    if len(train) <= length:
        print(f"the text is shorter than --max_seq_len {length}: training on one short chunk")

    def locate(chunk: int) -> str:
        file, token = cache.place(train.locate(chunk * length))
        text = tokenizer.decode(train.read(chunk * length, chunk * length + 8)[:8].tolist())
        return f"{files[file]}, token {token:,} ({text!r})"

    cut = functools.partial(PretrainDataset, chunk_length=length, bos_id=tokenizer.bos_id)
    return Texts(cut(train), None if val is None else cut(val), cache.key.hex()[:16], locate)


def without_validation(files: Sequence[Path], val_files: Sequence[Path]) -> Sequence[Path]:
    """The training files that are not --val_data's, too; says what is left out."""
    held_out = {path.resolve() for path in val_files}
    left = [path for path in files if path.resolve() not in held_out]
    if not left:
        print("warning: --val_data is the text to train on: its loss tells nothing of other text")
        return files
    if len(left) < len(files):
        print(f"not trained on: {len(files) - len(left)} of the files, which --val_data names, too")
    return left


def load_cache(
    files: Sequence[Path],
    options: Options,
    tokenizer: Tokenizer,
    *,
    stop: StopRequest,
    ranks: Ranks,
) -> TokenCache:
    """The token cache of the files, built once per machine; says what was loaded."""
    reading = Reading(
        document_per_line=options.document_per_line,
        text_field=options.text_field,
        encoding_errors=options.encoding_errors,
        sentences_only=options.sentences_only,
    )
    cache = ranks.first_on_node(
        lambda: build_or_load(
            files, tokenizer, reading, options.cache_dir, should_stop=lambda: stop.requested
        )
    )
    if cache.rebuilt_because not in (None, "there was none"):
        print(f"tokenized again: the cache in {options.cache_dir}: {cache.rebuilt_because}")
    for path, tokens in list(zip(files, cache.file_tokens, strict=True))[:SHOWN_FILES]:
        chunks = count_chunks(int(tokens), options.max_seq_len)
        print("\n".join([f"Loaded {chunks} chunks from {path}", *remarks(path, reading)]))
    if len(files) > SHOWN_FILES:
        chunks = count_chunks(len(cache), options.max_seq_len)
        print(f"... {len(files):,} files in all, {chunks:,} chunks")
    return cache


def remarks(path: Path, reading: Reading) -> list[str]:
    """What to say of a file that may not be meant to be read as it is."""
    name = path.name.lower()
    if is_labelled(path) and not reading.sentences_only:
        return ["  labelled lines in it: --sentences_only reads the sentences alone"]
    if name.endswith(TABLE_SUFFIXES):
        return [
            "  a table, read as plain text with all its separators: to train on one of its "
            'columns make a .jsonl of it, a line {"text": ...} for each row'
        ]
    if not name.endswith((*TEXT_SUFFIXES, *JSON_SUFFIXES)):
        return ["  read as plain text, markup included"]
    return []


def warn_of_vocabulary(share: float, files: Sequence[Path]) -> None:
    """Say so where `share` of the text is encoded byte by byte, and how to train a vocabulary."""
    if share > MOSTLY:
        train = ["--input", *files[:SHOWN_FILES], "--vocab_size", "8000", "--output", "my.model"]
        print(
            f"warning: {share:.0%} of the text is encoded byte by byte, since the vocabulary has "
            "no pieces for its characters: the model would learn slowly and see little at a time. "
            "Train a vocabulary on the text, then name it with --tokenizer_model my.model:\n"
            f"  {quoted('python', 'tokenizer.py', 'train', *train)}"
        )
