"""Vocabularies in damaged and hostile files: one line of complaint, or a vocabulary that works."""

from __future__ import annotations

import copy
import importlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_vocabularies import KINDS, byte_vocabulary, content, tokenizer_json
from vocabularies import vocabulary

from minllama.formats.gguf_vocabulary import rebuilt_vocabulary, vocabulary_values
from minllama.formats.hugging_face_vocabulary import tokenizer_json as sentence_piece_json
from minllama.system.errors import UsageError
from minllama.vocabulary.byte_bpe import FILE, pack
from minllama.vocabulary.files import open_vocabulary, read_vocabulary_file
from minllama.vocabulary.pre_tokenizers import PRE_TOKENIZERS
from tokenizer import Tokenizer

pytest.importorskip("tokenizers")
STRANGE: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**400, 1.5, float("nan"),
    float("inf"), "", "x", "\ud800", "\0", "Ġ", " ", "a b", "▁", "<s>", "(a+)+$", "x" * 100_000,
    [], [[]], {}, [None], [1], ["a"], [["a", "b"]], [["a"]], [["a", "b", "c"]], {"": 0},
    {"type": "BPE"}, {"type": "Unigram"}, {"type": "Replace", "pattern": {"Regex": "(a+)+$"}},
    {"Regex": "(a*)*b"}, {"type": "Sequence", "normalizers": []}, {"id": 0}, {"content": "x"},
]  # fmt: skip
TEXT = "Hello world, don't 123 <s> 🙂 \n\n x\0"


def use(content: bytes) -> None:
    """A vocabulary that was taken can do all that is asked of it."""
    tokenizer = Tokenizer(content)
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    assert all(0 <= i < tokenizer.n_words for i in ids)
    tokenizer.decode(ids), tokenizer.decode(range(tokenizer.n_words))
    assert len(tokenizer.vocabulary.token_texts) == tokenizer.n_words
    assert all(0 <= i < tokenizer.n_words for i in tokenizer.vocabulary.end_ids)
    assert not {*tokenizer.vocabulary.encode(TEXT)} & {
        *tokenizer.vocabulary.control_tokens.values()
    }
    vocabulary_values(tokenizer)


def tried(read) -> bool:
    """Whether it was refused, by one line."""
    started = time.process_time()
    try:
        use(read())
    except UsageError as error:
        assert str(error).isprintable() and len(str(error)) < 700
        return True
    finally:
        assert time.process_time() - started < 5
    return False


def places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a file, a few of those in long lists and tables."""
    keys = [*value] if isinstance(value, dict) else range(len(value))
    keys = [*keys[:3], *keys[-2:]] if len(keys) > 12 else keys
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key], depth + 1)


def mutated(file: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The file with each of its values, one after the other, strange, twice or not there.

    It is changed where it is, which costs less than a copy, and each time put back.
    """
    for holder, key in [*places(file)]:
        whole = copy.copy(holder)
        for strange in (*STRANGE, "remove", "double"):
            if strange == "remove":
                del holder[key]
            elif strange == "double" and isinstance(holder, list):
                holder.append(holder[key])
            elif strange == "double":
                holder[f"{key} "] = holder[key]
            else:
                holder[key] = copy.deepcopy(strange)
            yield file
            holder.clear()
            holder.extend(whole) if isinstance(holder, list) else holder.update(whole)


def small(kind: str) -> dict[str, Any]:
    """A tokenizer.json of a kind with few tokens, so that thousands of it are quick."""
    return json.loads(tokenizer_json(kind, 270 + sum(map(len, KINDS[kind][:2]))))


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2"])
def test_every_value_of_a_tokenizer_json(kind: str):
    """Wrong types, ids that are negative, huge or another's, regular expressions, nothing.

    Some raised what was no UsageError; a panic of `tokenizers` is not even an Exception.
    """
    refused = total = 0
    for changed in mutated(small(kind)):
        refused += tried(lambda changed=changed: pack(changed, KINDS[kind][2], "x"))
        total += 1
    assert refused > total / 3


def test_every_value_of_a_packed_vocabulary():
    """As it is in a .pt file of a stranger's, which `pack` has not seen."""
    packed = json.loads(pack(small("qwen2"), KINDS["qwen2"][2], "x"))
    for changed in mutated(packed):
        tried(lambda changed=changed: json.dumps(changed).encode())
    for key in ("decoder", "post_processor", "truncation", "padding", "normalizer", "version"):
        for strange in STRANGE:
            changed = packed | {FILE: packed[FILE] | {key: strange}}
            tried(lambda changed=changed: json.dumps(changed).encode())


def test_every_value_of_a_tokenizer_json_with_byte_fallback(tmp_path: Path):
    file = sentence_piece_json(vocabulary("ours"))
    path = tmp_path / "tokenizer.json"
    pick = random.Random(0)
    for changed in mutated(file):
        if pick.random() < 0.2:
            path.write_text(json.dumps(changed), encoding="utf-8")
            tried(lambda: read_vocabulary_file(path))


def test_every_value_of_a_tokenizer_config(tmp_path: Path):
    """It names tokens by a text or by an object; what it says wrongly is not believed."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json("llama-bpe"), encoding="utf-8")
    path = tmp_path / "tokenizer_config.json"
    known = KINDS["llama-bpe"][2] | {"add_bos_token": True, "pad_token": {"content": "<|eot_id|>"}}
    for changed in mutated(known):
        path.write_text(json.dumps(changed), encoding="utf-8")
        tried(lambda: read_vocabulary_file(tmp_path))
    for damaged in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000):
        path.write_bytes(damaged)
        assert tried(lambda: read_vocabulary_file(tmp_path))


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "ours"])
def test_every_value_of_a_gguf_files_vocabulary(name: str):
    """As `minllama.formats.gguf` reads them; None is a vocabulary of another kind."""
    if name == "ours":
        tokenizer = vocabulary(name)
    else:
        tokenizer = Tokenizer(pack(small(name), KINDS[name][2], name))
    values = vocabulary_values(tokenizer)
    values = json.loads(json.dumps(values))
    for changed in mutated(values):
        made = []

        def read(changed=changed, made=made) -> bytes:
            made.append(rebuilt_vocabulary(Path("x"), changed))
            return made[0] or tokenizer.model_bytes

        tried(read)


@pytest.mark.parametrize("depth", [50, 100, 200, 500, 900, 3000, 200_000])
def test_deep_nesting(tmp_path: Path, depth: int):
    """In each place of a tokenizer.json that is looked into, or handed on."""
    text = tokenizer_json("qwen2")
    lists = "[" * depth + "]" * depth
    sequences = '{"type":"Sequence","pretokenizers":[' * depth + "]}" * depth
    path = tmp_path / "tokenizer.json"
    for key in ("pre_tokenizer", "normalizer", "decoder", "post_processor", "added_tokens"):
        for nested in (lists, sequences, sequences.replace("pretokenizers", "processors")):
            file = json.loads(text) | {key: "HERE"}
            path.write_text(json.dumps(file).replace('"HERE"', nested), encoding="utf-8")
            tried(lambda: read_vocabulary_file(path))
    path.write_text(lists, encoding="utf-8")
    assert tried(lambda: read_vocabulary_file(path))


def test_a_huge_file_is_not_read(tmp_path: Path):
    """A gigabyte, sparse on the disk."""
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.write(b"{")
        file.truncate(1 << 30)
    with pytest.raises(UsageError, match="tokenizer.json"):
        read_vocabulary_file(path)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}}, "none of the known"),
        (
            {"pre_tokenizer": PRE_TOKENIZERS["gpt-2"] | {"add_prefix_space": True}},
            "none of the kno",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer .* is not supported"),
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}}}, "its decoder .* is not"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "its model 'WordPiece' is not supported"),
        ({"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}}, "is not spelt in bytes"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "no model with a vocab of BPE"),
        ({"added_tokens": [{"id": 3, "content": "", "special": True}]}, "added_tokens are no list"),
        ({"added_tokens": []}, "names no BOS and EOS|do not fit together"),
    ],
)
def test_what_is_not_known_is_named(change: dict, complaint: str):
    """A wrong reading would give wrong ids without any error."""
    with pytest.raises(UsageError, match=f"^x: .*{complaint}"):
        pack(json.loads(tokenizer_json("llama-bpe")) | change, KINDS["llama-bpe"][2], "x")


def test_merges_and_ids_that_do_not_fit():
    """Two tokens of one id, an id left out, a merge without its token or into a control token."""
    file = json.loads(tokenizer_json("gpt-2"))
    model = file["model"]
    first, second = [*model["vocab"]][300:302]
    end = "<|endoftext|>"
    for change in (
        {"vocab": model["vocab"] | {first: model["vocab"][second]}},
        {"vocab": model["vocab"] | {first: 10_000}},
        {"vocab": model["vocab"] | {first: -1}},
        {"vocab": model["vocab"] | {first: 2**40}},
        {"merges": [*model["merges"], ["Ġthe", "nowhere"]]},
        {"merges": [*model["merges"], [end[:5], end[5:]]]},
        {"merges": ["ab"]},
        {"merges": {"a": "b"}},
    ):
        with pytest.raises(UsageError, match="^(x|the vocabulary): "):
            Tokenizer(pack(file | {"model": model | change}, {}, "x"))
    added = file["added_tokens"]
    for change in ({"id": 5}, {"id": 10_000}, {"id": -1}, {"id": True}, {"special": 1}):
        with pytest.raises(UsageError, match="^x: "):
            Tokenizer(pack(file | {"added_tokens": [added[0] | change]}, {}, "x"))


def test_random_bytes_are_no_vocabulary():
    """Of either kind: also such as begin like one, and one that is cut or has a bit turned."""
    rng = np.random.default_rng(0)
    good = [content("qwen2"), Tokenizer().model_bytes]
    for number in range(300):
        data = bytearray(good[number % 2])
        if number % 3 == 0:
            data = data[: rng.integers(1, len(data))]
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        tried(lambda data=data: bytes(data))
    for data in (
        b"",
        b"{",
        b"{}",
        b"[]",
        b"{" + rng.bytes(1000),
        rng.bytes(1000),
        b"\xef\xbb\xbf{}",
    ):
        assert tried(lambda data=data: data)


def test_a_panic_of_the_package_is_one_line(monkeypatch):
    """PyO3's PanicException is no Exception; Ctrl-C, which is none either, stays what it is."""
    import tokenizers

    class Panic(BaseException):
        pass

    for raised, expected in ((Panic("at x.rs:1"), UsageError), (KeyboardInterrupt(),) * 2):

        def fail(text, raised=raised):
            raise raised

        monkeypatch.setattr(tokenizers, "Tokenizer", type("T", (), {"from_str": fail}))
        with pytest.raises(expected if isinstance(expected, type) else KeyboardInterrupt):
            open_vocabulary(content("qwen2"), "x")


def test_without_tokenizers_one_line_says_what_to_install(monkeypatch):
    real = importlib.import_module

    def absent(name: str):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name)

    data = byte_vocabulary("qwen2").model_bytes
    open_vocabulary.cache_clear()
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UsageError, match="needs another package: pip install tokenizers"):
        Tokenizer(data)
    Tokenizer()  # the embedded one needs nothing
