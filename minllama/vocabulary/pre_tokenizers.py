"""How byte-level BPE cuts a text into words before it merges: the ways that are known.

A wrong one gives wrong ids without any error, and a regular expression of a stranger's may take
forever: so only these are used. They are named as llama.cpp names them (`tokenizer.ggml.pre`); its
list: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

from __future__ import annotations

from typing import Any

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
GPT2 = BYTE_LEVEL | {"use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    """Words by a regular expression, each then spelt in bytes."""
    isolated = {"behavior": "Isolated", "invert": False}
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, **isolated},
            BYTE_LEVEL | {"use_regex": False},
        ],
    }


ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SINGLE_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2],
}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": GPT2,
    "smollm": SINGLE_DIGITS,
    "llama-bpe": _split(ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST),
    "qwen2": _split(ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST),
}
# Other names for the same, in files of llama.cpp's converter.
SAME = {
    "gpt-2": {"phi-2", "olmo"},
    "smollm": {"starcoder", "refact", "command-r", "codeshell"},
    "llama-bpe": {"llama3", "llama-v3"},
    "qwen2": {"deepseek-r1-qwen"},
}
IGNORE_MERGES = {"llama-bpe"}  # a word that is itself a token is not merged from others


def find_pre_tokenizer(name: str) -> str | None:
    """The name in PRE_TOKENIZERS that a GGUF file's `pre` means; None for an unknown one."""
    names = [known for known in PRE_TOKENIZERS if name == known or name in SAME[known]]
    return names[0] if names else None


def name_of(pre_tokenizer: Any) -> str | None:
    """The name in PRE_TOKENIZERS of a tokenizer.json's pre-tokenizer; None for an unknown one."""
    wanted = _canonical(pre_tokenizer)
    return next((n for n, known in PRE_TOKENIZERS.items() if _canonical(known) == wanted), None)


def _canonical(pre_tokenizer: Any) -> Any:
    """Without what changes no ids: default values, offsets, a sequence of one."""
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    parts = pre_tokenizer.get("pretokenizers")
    if isinstance(parts, list):
        parts = [_canonical(part) for part in parts]
        return parts[0] if len(parts) == 1 else parts
    defaults = {"use_regex": True, "invert": False}
    kept = {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}
    if kept.get("type") == "ByteLevel":
        kept = {"use_regex": True} | kept
    return {key: value for key, value in kept.items() if defaults.get(key) != value}
