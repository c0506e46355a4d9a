"""Byte-level BPE (GPT-2's way) by the package `tokenizers`: text, cut into words, spelt in bytes.

Its file is `tokenizer.json`, which does not say which tokens are BOS and EOS: what a model file
carries is an object of that file and of these settings, from the `tokenizer_config.json` beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from minllama.system.errors import UsageError
from minllama.system.packages import import_optional
from minllama.vocabulary.base import END_TOKENS, Vocabulary
from minllama.vocabulary.pre_tokenizers import GPT2, PRE_TOKENIZERS, name_of

NAME_CHARS = 1000  # of a token that is searched for in a text
FILE = "tokenizer"  # the key of tokenizer.json's content; beside it the keys of SETTINGS
SETTINGS = {"bos_token": str, "eos_token": str, "pad_token": str, "add_bos_token": bool}
ADDED = ("id", "content", "special", "single_word", "lstrip", "rstrip", "normalized")
AROUND = ("single_word", "lstrip", "rstrip")  # looks at, or takes, what is around it
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

    def __init__(self, content: bytes, where: str) -> None:
        package = import_optional("tokenizers", f"{where}: its vocabulary")
        self.content = content
        settings = read_object(content, where)
        self.file, self.pre_tokenizer = canonical(settings.get(FILE), where)
        self.engine = _engine(package, self.file, where)
        self.size = self.engine.get_vocab_size()
        names = [self.engine.id_to_token(i) for i in range(self.size)]
        if None in names:
            raise UsageError(f"{where}: no token has the id {names.index(None):,}")
        self.names: list[str] = names
        added = self.file["added_tokens"]
        for each in added:
            name = each["content"]
            if self.engine.token_to_id(name) != each["id"]:
                raise UsageError(f"{where}: the id of its added token {name[:40]!r} is another's")
        self.control_tokens = _control_tokens(added)
        self.added_tokens = {each["content"]: each["id"] for each in added if not each["special"]}
        self.settings = read_settings({}, settings)
        self.adds_bos: bool = self.settings["add_bos_token"]
        self.bos_id, self.eos_id = _marks(self.control_tokens, self.settings, where)
        if self.adds_bos:  # for other programs
            self.file["post_processor"] = opening_processor(names[self.bos_id], self.bos_id)
        # A token that is searched for in a text may lie across a cut.
        searched = [each for each in added if not each["special"]]
        across = any(
            re.search(r"\s", each["content"]) or any(map(each.get, AROUND)) for each in searched
        )
        self.cut = None if across else CUT

    @property
    def stated_marks(self) -> tuple[int, int]:
        """BOS and EOS as tokenizer_config.json names them."""
        bos, eos = (self.settings.get(key) for key in ("bos_token", "eos_token"))
        tokens = self.control_tokens
        return tokens.get(bos, self.bos_id), tokens.get(eos, self.eos_id)

    @property
    def merges(self) -> list[list[str]]:
        """The pairs that are merged, the first ones first."""
        return self.file["model"]["merges"]

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
    def byte_tokens(self) -> list[int]:
        """Tokens that spell parts of characters, which are put together of them."""
        return [i for i, text in enumerate(self.token_texts) if not _is_utf8(text)]

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


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


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


def canonical(file: Any, where: str) -> tuple[dict[str, Any], str]:
    """What of a tokenizer.json decides the ids, always in the same form, and the name of its
    pre-tokenizer; UsageError for one of another kind.

    So a vocabulary is the same bytes whatever file it comes from, and nothing of a stranger's
    file gets to `tokenizers` that is not known.
    """
    model = file.get("model") if isinstance(file, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise UsageError(f"{where}: is no tokenizer.json: it has no model with a vocab of BPE")
    try:
        name = name_of(file.get("pre_tokenizer"))
    except RecursionError:
        name = None
    if name is None:
        shown = repr(file.get("pre_tokenizer"))[:200]
        known = ", ".join(PRE_TOKENIZERS)
        raise UsageError(f"{where}: its pre-tokenizer is none of the known ({known}): {shown}")
    normalizer, decoder = file.get("normalizer"), file.get("decoder")
    supported = {
        "model": (model.get("type"), model.get("type", "BPE") == "BPE"),
        "normalizer": (normalizer, normalizer in (None, {"type": "NFC"})),
        "decoder": (decoder, decoder is None or _has_type(decoder, "ByteLevel")),
        **{f"model {key}": (model.get(key), not model.get(key)) for key in ONLY_WITHOUT},
    }
    for what, (value, fits) in supported.items():
        if not fits:
            raise UsageError(f"{where}: its {what} {str(value)[:60]!r} is not supported")
    added = file.get("added_tokens") or []
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise UsageError(f"{where}: its added_tokens are no list of content, id and special")
    names = {each["content"]: each["id"] for each in added}
    spelt = {token: i for token, i in model["vocab"].items() if token not in names}
    foreign = next((token for token in spelt if not BYTE_OF.keys() >= {*token}), None)
    if foreign is not None:
        raise UsageError(f"{where}: its token {foreign[:40]!r} is not spelt in bytes")
    merges = model.get("merges")
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in _list(merges)]
    vocab = {**spelt, **names}
    if (
        not isinstance(merges, list)
        or any(type(i) is not int for i in vocab.values())
        or any(not isinstance(m, list) or [*map(type, m)] != [str, str] for m in pairs)
        or sorted(vocab.values()) != [*range(len(vocab))]
        or any(m[0] + m[1] in names for m in pairs)  # no text spells an added token
    ):
        raise UsageError(f"{where}: its vocab, merges and added tokens do not fit together")
    # Tokens that follow all others are no word of a text, not even where words are looked up.
    inside = spelt if min(names.values(), default=0) >= len(spelt) else vocab
    made = {
        "version": "1.0",
        "added_tokens": [
            {**{key: each.get(key, False) for key in ADDED}, "content": each["content"]}
            for each in sorted(added, key=lambda each: each["id"])
        ],
        "normalizer": normalizer,
        "pre_tokenizer": PRE_TOKENIZERS[name],
        "decoder": GPT2 | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "ignore_merges": model.get("ignore_merges") is True,
            "vocab": {token: inside[token] for token in sorted(inside, key=inside.__getitem__)},
            "merges": pairs,
        },
    }
    return made, name


def _engine(package: ModuleType, file: dict[str, Any], where: str) -> Any:
    """The package's own object, for which the name of a control token in a text is text."""
    try:
        engine = package.Tokenizer.from_str(json.dumps(file))
    except BaseException as error:  # its errors have no class of their own, its panics no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UsageError(f"{where}: no vocabulary ({str(error)[:200]!r})") from None
    engine.encode_special_tokens = True
    return engine


def _control_tokens(added: list[dict[str, Any]]) -> dict[str, int]:
    return {each["content"]: each["id"] for each in added if each["special"]}


def _marks(control: dict[str, int], settings: dict[str, Any], where: str) -> tuple[int, int]:
    """The tokens that documents begin and end with."""
    adds_bos, *stated = (settings.get(key) for key in ("add_bos_token", "bos_token", "eos_token"))
    bos, eos = (control.get(name) for name in stated)
    known = (control.get(name) for name in (*DOCUMENT_ENDS, *END_TOKENS))
    end = next((token for token in known if token is not None), eos)
    if end is None or (adds_bos and bos is None):
        raise UsageError(
            f"{where}: names no BOS and EOS token among its control tokens "
            f"({', '.join(control)[:200] or 'none'}): a tokenizer_config.json beside it can, by "
            "bos_token and eos_token"
        )
    return (bos, end) if adds_bos else (end, end)


def _has_type(value: Any, kind: str) -> bool:
    return isinstance(value, dict) and value.get("type") == kind


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _is_added_token(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and 0 < len(token["content"]) <= NAME_CHARS
        and type(token.get("id")) is int
        and isinstance(token.get("special"), bool)
    )


def pack(file: dict[str, Any], settings: dict[str, Any], where: str) -> bytes:
    """The bytes of a vocabulary: a tokenizer.json, and what its tokenizer_config.json says of BOS
    and EOS. Raises UsageError, naming `where`, for one of another kind.
    """
    stated = read_settings(file, settings)
    made, _ = canonical(file, where)
    control = _control_tokens(made["added_tokens"])
    stated = {key: v for key, v in stated.items() if isinstance(v, bool) or v in control}
    marks = dict(zip(("bos_token", "eos_token"), _marks(control, stated, where), strict=True))
    name_of_id = {token: name for name, token in control.items()}
    stated = {key: name_of_id[token] for key, token in marks.items()} | stated
    if stated.get("pad_token") == stated["eos_token"]:  # as it is where there is none
        del stated["pad_token"]
    ordered = {key: stated[key] for key in SETTINGS if key in stated}
    return json.dumps(ordered | {FILE: made}, ensure_ascii=False).encode("utf-8", "surrogatepass")


def read_settings(file: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer_config.json says of BOS, EOS and padding, and whether a prompt has BOS.

    A token may be named there by an object with its `content`. What is not said is seen from what
    the file's post-processor puts before a text.
    """
    stated: dict[str, Any] = {}
    for key, kind in SETTINGS.items():
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, kind):
            stated[key] = value
    opening = _opening_token(file.get("post_processor"))
    if opening is not None:
        return stated | {"add_bos_token": True, "bos_token": stated.get("bos_token", opening)}
    return stated | {"add_bos_token": stated.get("add_bos_token", False)}


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
        openings = map(_opening_token, parts if isinstance(parts, list) else [])
        return next((token for token in openings if token is not None), None)
    single = post_processor.get("single")
    first = single[0] if isinstance(single, list) and single else None
    token = first.get("SpecialToken") if isinstance(first, dict) else None
    name = token.get("id") if isinstance(token, dict) else None
    return name if isinstance(name, str) else None
