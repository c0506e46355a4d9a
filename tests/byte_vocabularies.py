"""Byte-level BPE vocabularies like those of public models, trained by `tokenizers`."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import pytest
from vocabularies import corpus_lines

from minllama.vocabulary.byte_bpe import pack
from minllama.vocabulary.pre_tokenizers import IGNORE_MERGES, PRE_TOKENIZERS
from tokenizer import Tokenizer

LLAMA_3 = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# By pre-tokenizer: control tokens, others that are searched for in a text, and what their
# tokenizer_config.json says.
KINDS: dict[str, tuple[list[str], list[str], dict[str, Any]]] = {
    "gpt-2": (["<|endoftext|>"], [], {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "smollm": (CHATML, [], {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "llama-bpe": (LLAMA_3, [], {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "qwen2": (
        CHATML,
        ["<think>", "</think>", "<tool_call>"],
        {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
}


@functools.cache
def tokenizer_json(kind: str, size: int = 600) -> str:
    """The tokenizer.json of a kind, as `tokenizers` itself writes it."""
    tokenizers = pytest.importorskip("tokenizers")
    control, others, _ = KINDS[kind]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind in IGNORE_MERGES))
    made = json.loads(engine.to_str()) | {"pre_tokenizer": PRE_TOKENIZERS[kind]}
    engine = tokenizers.Tokenizer.from_str(json.dumps(made))
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=control,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(corpus_lines(), trainer)
    engine.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in others])
    if kind == "llama-bpe":
        engine.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{LLAMA_3[0]} $A", special_tokens=[(LLAMA_3[0], 0)]
        )
    return engine.to_str()


def content(kind: str) -> bytes:
    """The bytes of a vocabulary as model files carry them."""
    return pack(json.loads(tokenizer_json(kind)), KINDS[kind][2], kind)


@functools.cache
def byte_vocabulary(kind: str) -> Tokenizer:
    """The vocabulary of a kind."""
    return Tokenizer(tokenizer_model=content(kind))


PIECES = [
    "Hello", " world", "\n", "\n\n", " ", "  ", "   ", "\t", "123", "4567", "٣٤", "Ⅷ", "²", "é",
    "e\u0301", "你好", "，", "世界。", "🙂", "👩‍👩‍👧", "<|im_start|>", "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>", "<think>", "</think>", "don't", "DON'T",
    "'ll", "'S", "ﬁ", "\u00a0", "\u3000", "\u2028", "\r\n", "\r", "हिन्दी", "עברית", "العربية",
    "ไทย",
    "ქართული", "አማርኛ", "한국어", "\u1112\u1161\u11ab", "ᏣᎳᎩ", "𝔘𝔫𝔦", "𐍈", "a" * 50, "_", "\\",
    "/*", "::", "...", "!?", "\x00", "\x1f", "\x7f", "\x85", "\u200b", "\u200d", "\ufeff", "Ġ",
    "Ċ", "▁", "ſ", "ß", "İ", "\u0338", "\u3099", "\ufffd", "\ufffe", "\U0010ffff", "\ue000",
]  # fmt: skip


def hostile_strings(count: int, seed: int = 1) -> list[str]:
    """Scripts, emoji, marks, control and special tokens, odd white space and any character."""
    pick = random.Random(seed)

    def any_character() -> str:
        return chr(pick.choice([pick.randrange(1, 0xD800), pick.randrange(0xE000, 0x110000)]))

    def piece() -> str:
        return any_character() if pick.random() < 0.1 else pick.choice(PIECES)

    return ["".join(piece() for _ in range(pick.randint(0, 12))) for _ in range(count)]
