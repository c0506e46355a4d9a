"""Vocabularies in folders of `transformers`: tokenizer.json, and what is beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minllama.formats.vocabularies import check_same_ids, merges, require_exportable
from minllama.system.errors import UsageError
from minllama.system.files import read_json_object, read_whole
from minllama.text.chat import Template, template_of_jinja
from minllama.vocabulary.byte_bpe import ByteBPE, opening_processor
from minllama.vocabulary.files import CONFIG, NAMES, read_vocabulary_file
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama import Llama

OTHERS = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.tiktoken", CONFIG)
TEMPLATE, TEMPLATE_BYTES = "chat_template.jinja", 1 << 20


def read_vocabulary(folder: Path) -> bytes | None:
    """The vocabulary in a folder; None where there is none. Raises UsageError, also for one in
    other files alone, so that no vocabulary that lies by is taken for it.
    """
    if any((folder / name).exists() for name in NAMES):
        return read_vocabulary_file(folder)
    others = [name for name in OTHERS if (folder / name).exists()]
    if others:
        raise UsageError(
            f"{folder}: its vocabulary is in {others[0]}, which is not read: transformers' "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) writes tokenizer.json"
        )
    return None


def read_template(folder: Path) -> Template | None:
    """The chat template in a folder: in a file of its own, as `transformers` writes it since 4.50,
    or in tokenizer_config.json. Raises UsageError.
    """
    own, settings = folder / TEMPLATE, folder / CONFIG
    if own.exists():
        return template_of_jinja(read_whole(own, TEMPLATE_BYTES).decode("utf-8", "replace"))
    if settings.exists():
        return template_of_jinja(read_json_object(settings).get("chat_template"))
    return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file as `transformers` does."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def write_vocabulary(tokenizer: Tokenizer, model: Llama, folder: Path) -> None:
    """Write a vocabulary into a folder; UsageError for one that `tokenizers` cannot hold."""
    require_exportable(tokenizer)
    vocabulary = tokenizer.vocabulary
    if isinstance(vocabulary, ByteBPE):
        write_json(folder / "tokenizer.json", vocabulary.file)
    else:
        (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    write_json(folder / CONFIG, tokenizer_config(tokenizer, model))


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary in the `tokenizers` library's own format.

    Not left to transformers' reading of tokenizer.model, which drops a leading space.
    """
    vocabulary = tokenizer.vocabulary
    names = [vocabulary.name(i) for i in range(vocabulary.size)]
    special = {*vocabulary.control_tokens.values(), vocabulary.unknown_id}
    symbols = {} if vocabulary.opening_space else vocabulary.added_tokens
    for symbol, token in symbols.items():
        names[token] = symbol
    added = sorted({*special, *symbols.values()})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": names[i], **flags, "special": i in special} for i in added
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([{"type": "Prepend", "prepend": "▁"}] if vocabulary.opening_space else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": opening_processor(names[tokenizer.bos_id], tokenizer.bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([strip] if vocabulary.opening_space else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[vocabulary.unknown_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges(tokenizer),
        },
    }


def padding_id(tokenizer: Tokenizer) -> int:
    """The token that others pad with, when they train or classify: one that stands in no text."""
    vocabulary = tokenizer.vocabulary
    if not isinstance(vocabulary, ByteBPE):
        return vocabulary.unknown_id
    named = vocabulary.settings.get("pad_token")
    return vocabulary.control_tokens.get(named, vocabulary.stated_marks[1])


def tokenizer_config(tokenizer: Tokenizer, model: Llama) -> dict[str, Any]:
    """What `transformers` has to know of the vocabulary beside tokenizer.json."""
    vocabulary, template = tokenizer.vocabulary, model.chat_template
    bos, eos = map(vocabulary.name, vocabulary.stated_marks)
    named = {"bos_token": bos, "eos_token": eos}
    if isinstance(vocabulary, ByteBPE):
        named["add_bos_token"] = vocabulary.adds_bos
    else:
        named["unk_token"] = vocabulary.name(vocabulary.unknown_id)
    named["pad_token"] = vocabulary.name(padding_id(tokenizer))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        **named,
        "model_max_length": model.config.max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],  # generate() takes no others
        "clean_up_tokenization_spaces": False,
        # "<s>" in a text is text, as it is here; but a chat template has to write it.
        "split_special_tokens": template is None,
        **({} if template is None else {"chat_template": template.jinja(marks_answers=True)}),
    }


def check_token_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Where `tokenizers` is installed, its ids of difficult texts must be ours."""
    try:
        from tokenizers import Tokenizer as TheirTokenizer
    except ImportError:
        return
    # Not by its name, which their library looks for as UTF-8 whatever the locale.
    theirs = TheirTokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    theirs.encode_special_tokens = True
    check_same_ids(
        tokenizer, lambda text: theirs.encode(text, add_special_tokens=False).ids, "tokenizer.json"
    )
