"""Byte-level BPE (GPT-2's way) by the package `tokenizers`: text, cut into words, spelt in bytes.

Its file is `tokenizer.json`, which does not say which tokens are BOS and EOS: what a model file
carries is an object of that file and of these settings, from the `tokenizer_config.json` beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from minllama.system.errors import UsageError
from minllama.system.packages import import_optional
from minllama.vocabulary.base import END_TOKENS, Vocabulary
from minllama.vocabulary.pre_tokenizers import PRE_TOKENIZERS, name_of

FILE = "tokenizer"  # the key of tokenizer.json's content; beside it the keys of SETTINGS
SETTINGS = ("bos_token", "eos_token", "pad_token", "add_bos_token")
ONLY_WITHOUT = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")  # in its model
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")  # where others' names for EOS end an answer
# Where none of the known pre-tokenizers joins what is before with what is behind: before the space
# of a word, and behind a line's end before a word.
CUT = re.compile(
    r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=[\w.!?,;:\u3002\uff01\uff1f\u201d]\n)(?=[^\W\d_])"
)


class ByteBPE(Vocabulary):
    """A vocabulary of byte-level BPE, from `pack`'s bytes.

    Raises UsageError, naming `where` they came from, for what is damaged or of another kind, and
    where `tokenizers` is not installed.
    """

    kind = "byte-level BPE"
    unknown_id = None
    byte_tokens: Sequence[int] = ()  # its tokens spell bytes: none stands for a lack of others

    def __init__(self, content: bytes, where: str) -> None:
        package = import_optional("tokenizers", f"{where}: its vocabulary")
        self.content = content
        settings = read_object(content, where)
        self.file: dict[str, Any] = settings.get(FILE)
        self.pre_tokenizer = check_kind(self.file, where)
        try:
            self.engine = package.Tokenizer.from_str(json.dumps(self.file))
        except Exception as error:  # the package has a class for nothing in particular
            raise UsageError(f"{where}: no vocabulary ({str(error)[:200]})") from None
        # What is called a control token in a text is text.
        self.engine.encode_special_tokens = True
        self.engine.no_truncation()
        self.engine.no_padding()
        self.size = self.engine.get_vocab_size()
        names = [self.engine.id_to_token(i) for i in range(self.size)]
        if None in names:
            raise UsageError(f"{where}: no token has the id {names.index(None):,}")
        self.names: list[str] = names
        added = self.file.get("added_tokens") or []
        self.control_tokens = {each["content"]: each["id"] for each in added if each["special"]}
        self.added_tokens = {each["content"]: each["id"] for each in added if not each["special"]}
        self.settings = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
        self.adds_bos = bool(self.settings.get("add_bos_token", False))
        self.bos_id, self.eos_id = self._marks(where)
        # A token that is searched for in a text may lie across a cut.
        across = any(re.search(r"\s", name) for name in self.added_tokens)
        self.cut = None if across else CUT

    def _marks(self, where: str) -> tuple[int, int]:
        """The tokens that documents begin and end with."""
        stated = [self.settings.get(key) for key in ("bos_token", "eos_token")]
        bos, eos = (self.control_tokens.get(name) for name in stated)
        known = (self.control_tokens.get(name) for name in (*DOCUMENT_ENDS, *END_TOKENS))
        end = next((token for token in known if token is not None), eos)
        if end is None or (self.adds_bos and bos is None):
            raise UsageError(
                f"{where}: names no BOS and EOS token among its control tokens "
                f"({', '.join(self.control_tokens) or 'none'}): a tokenizer_config.json beside it "
                "can, by bos_token and eos_token"
            )
        return (bos, end) if self.adds_bos else (end, end)

    @property
    def stated_marks(self) -> tuple[int, int]:
        """BOS and EOS as tokenizer_config.json names them."""
        bos, eos = (self.settings.get(key) for key in ("bos_token", "eos_token"))
        tokens = self.control_tokens
        return tokens.get(bos, self.bos_id), tokens.get(eos, self.eos_id)

    @property
    def merges(self) -> list[list[str]]:
        """The pairs that are merged, the first ones first."""
        merges = self.file["model"]["merges"]
        return [m.split(" ", 1) if isinstance(m, str) else m for m in merges]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Token ids of each text, without BOS and EOS; `threads` are as many as there are cores."""
        encoded = self.engine.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return b"".join(map(self.token_texts.__getitem__, ids)).decode("utf-8", "replace")

    def name(self, token: int) -> str:
        """The token as tokenizer.json has it: a letter for each byte."""
        return self.names[token]

    @cached_property
    def token_texts(self) -> list[bytes]:
        """The bytes that each token spells; none for control tokens."""
        plain = {*self.control_tokens.values(), *self.added_tokens.values()}
        texts = [
            b"" if i in plain else bytes(map(BYTE_OF.__getitem__, name))
            for i, name in enumerate(self.names)
        ]
        for name, token in self.added_tokens.items():
            texts[token] = name.encode()
        return texts


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for every byte: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def read_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object; UsageError naming `where` for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: neither a SentencePiece model nor a tokenizer.json") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: is no JSON object, as a tokenizer.json is")
    return value


def check_kind(file: Any, where: str) -> str:
    """The name of the pre-tokenizer; UsageError for a tokenizer.json of another kind."""
    model = file.get("model") if isinstance(file, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise UsageError(f"{where}: is no tokenizer.json: it has no model with a vocab of BPE")
    pre_tokenizer = name_of(file.get("pre_tokenizer"))
    if pre_tokenizer is None:
        shown = json.dumps(file.get("pre_tokenizer"), ensure_ascii=False)[:200]
        known = ", ".join(PRE_TOKENIZERS)
        raise UsageError(f"{where}: its pre-tokenizer is none of the known ({known}): {shown}")
    normalizer = file.get("normalizer")
    supported = {
        "model": model.get("type", "BPE") == "BPE",
        "normalizer": normalizer is None or normalizer == {"type": "NFC"},
        **{f"model {key}": not model.get(key) for key in ONLY_WITHOUT},
    }
    for what, fits in supported.items():
        if not fits:
            value = normalizer if what == "normalizer" else model.get(what.split()[-1], "type")
            raise UsageError(f"{where}: its {what} {str(value)[:60]!r} is not supported")
    added = file.get("added_tokens") or []
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise UsageError(f"{where}: its added_tokens are no list of content, id and special")
    spelt = model["vocab"].keys() - {each["content"] for each in added}
    foreign = next((name for name in spelt if not BYTE_OF.keys() >= {*name}), None)
    if foreign is not None:
        raise UsageError(f"{where}: its token {foreign[:40]!r} is not spelt in bytes")
    return pre_tokenizer


def _is_added_token(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and token["content"] != ""
        and type(token.get("id")) is int
        and isinstance(token.get("special"), bool)
    )


def pack(file: dict[str, Any], settings: dict[str, Any]) -> bytes:
    """The bytes of a vocabulary: a tokenizer.json, and what its tokenizer_config.json says of BOS
    and EOS.

    A token may be named there by an object with its `content`. What is not said is seen from what
    the file's post-processor puts before a text.
    """
    said: dict[str, Any] = {}
    for key in SETTINGS:
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str | bool):
            said[key] = value
    opening = _opening_token(file.get("post_processor"))
    if opening is not None:
        said |= {"add_bos_token": True, "bos_token": said.get("bos_token", opening)}
    else:
        said.setdefault("add_bos_token", False)
    return json.dumps(said | {FILE: file}, ensure_ascii=False).encode("utf-8", "surrogatepass")


def opening_processor(bos: str, bos_id: int) -> dict[str, Any]:
    """A tokenizer.json's post-processor that puts a token before every text."""
    piece = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, *({"Sequence": {"id": which, "type_id": 0}} for which in "AB")],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _opening_token(post_processor: Any) -> str | None:
    """The control token that a post-processor puts before a text, if it does."""
    if not isinstance(post_processor, dict):
        return None
    if post_processor.get("type") == "Sequence":
        parts = post_processor.get("processors")
        found = map(_opening_token, parts if isinstance(parts, list) else [])
        return next((token for token in found if token is not None), None)
    single = post_processor.get("single")
    first = single[0] if isinstance(single, list) and single else None
    token = first.get("SpecialToken") if isinstance(first, dict) else None
    return token.get("id") if isinstance(token, dict) else None
