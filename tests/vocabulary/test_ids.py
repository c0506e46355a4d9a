"""Ids of difficult texts: ours, and those of the programs that the vocabularies are made for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_vocabularies import KINDS, byte_vocabulary, hostile_strings, tokenizer_json
from llama_cpp_server import llama_cpp
from oracles import make_model, write
from vocabularies import vocabulary

from llama import load_pretrained
from minllama.formats.hugging_face_vocabulary import tokenizer_json as sentence_piece_json
from minllama.formats.model_file import read_model
from minllama.vocabulary.lost import count_lost
from tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
STRINGS = hostile_strings(1000)


def theirs(file: str) -> tokenizers.Tokenizer:
    """The library's own, for which names of control tokens in a text are text, too."""
    engine = tokenizers.Tokenizer.from_str(file)
    engine.encode_special_tokens = True
    return engine


def check_ids(tokenizer: Tokenizer, encode) -> None:
    ours = [tokenizer.vocabulary.encode(text) for text in STRINGS]
    for text, ids in zip(STRINGS, ours, strict=True):
        assert encode(text) == ids, text


# ---------------------------------------------------------------------------- byte-level BPE


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers_and_transformers(kind: str):
    """1,000 strings; and each text comes back, from all of its tokens and from their bytes."""
    tokenizer, file = byte_vocabulary(kind), tokenizer_json(kind)
    library = theirs(file)
    check_ids(tokenizer, lambda text: library.encode(text, add_special_tokens=False).ids)
    many = tokenizer.vocabulary.encode_many(STRINGS)
    texts = tokenizer.vocabulary.token_texts
    for text, ids in zip(STRINGS, many, strict=True):
        assert tokenizer.decode(ids) == text
        assert b"".join(texts[i] for i in ids) == text.encode()
        assert not {*ids.tolist()} & {*tokenizer.vocabulary.control_tokens.values()}
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(file), split_special_tokens=True
    )
    check_ids(tokenizer, lambda text: fast.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_goes_through_every_format(tmp_path: Path, kind: str):
    """GGUF, .pt, Hugging Face's folder, .pt and GGUF again: the same bytes, and their programs
    have the ids that it has here, of prompts with what opens them, too."""
    pytest.importorskip("gguf"), pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    first = byte_vocabulary(kind)
    model = make_model(first)
    steps = [("gguf", "a.gguf"), ("pt", "b.pt"), ("hf", "c"), ("pt", "d.pt"), ("gguf", "e.gguf")]
    contents = []
    for target, name in steps:
        tokenizer = Tokenizer(model.vocabulary)
        write(model, target, tmp_path / name, tokenizer=tokenizer)
        model = load_pretrained(tmp_path / name)
        contents.append(model.vocabulary)
    last = Tokenizer(model.vocabulary).vocabulary
    for what in ("size", "bos_id", "eos_id", "stated_marks", "adds_bos", "end_ids", "merges"):
        assert getattr(last, what) == getattr(first.vocabulary, what), what
    assert last.control_tokens == first.vocabulary.control_tokens
    assert last.added_tokens == first.vocabulary.added_tokens
    check_ids(first, last.encode)
    assert {*contents[:2]} == {contents[0]} and contents[2] == contents[3]
    assert contents[0] == contents[-1]
    folder = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    folder.split_special_tokens = True
    check_ids(first, lambda text: folder.encode(text, add_special_tokens=False))
    assert folder("Hi")["input_ids"] == first.encode("Hi", bos=True, eos=False)
    stated = tuple(folder.convert_tokens_to_ids([folder.bos_token, folder.eos_token]))
    assert stated == last.stated_marks
    with llama_cpp(tmp_path / "e.gguf") as ask:
        check_llama_cpp(first, ask)


def check_llama_cpp(tokenizer: Tokenizer, ask) -> None:
    for text in STRINGS:
        told = ask("tokenize", content=text, add_special=False, parse_special=False)["tokens"]
        assert told == tokenizer.vocabulary.encode(text), text


def test_ids_of_a_public_model(smollm2: Path):
    """SmolLM2's vocabulary, from its GGUF file, in llama.cpp and in `tokenizers`.

    It has no token for some bytes of rare characters: these alone do not come back.
    """
    stored = read_model(smollm2)
    tokenizer = Tokenizer(stored.vocabulary)
    library = theirs(json.dumps(tokenizer.vocabulary.file))
    check_ids(tokenizer, lambda text: library.encode(text, add_special_tokens=False).ids)
    spelt, losses = {*b"".join(tokenizer.vocabulary.token_texts)}, 0
    for text in STRINGS:
        lost = count_lost(tokenizer.vocabulary, [text])
        comes_back = {*text.encode()} <= spelt
        assert (tokenizer.decode(tokenizer.vocabulary.encode(text)) == text) == comes_back
        assert lost.spoils_bits_per_byte == (not comes_back)
        losses += not comes_back
    assert 0 < losses < 200
    with llama_cpp(smollm2) as ask:
        check_llama_cpp(tokenizer, ask)


# ---------------------------------------------------------------------------- byte fallback


def metaspace(scheme: str) -> dict:
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return {"normalizer": None, "pre_tokenizer": words}


FORMS = {"Prepend": {}, "first": metaspace("first"), "always": metaspace("always")}


CASES = [(name, pad, form) for name in ("embedded", "ours") for pad in (0, 1) for form in FORMS]
LARGE = [("llama-2", 1, "Prepend"), ("llama-2", 0, "first"), ("llama-2", 1, "always")]


@pytest.mark.parametrize(("name", "pad", "form"), CASES + LARGE)
def test_a_tokenizer_json_with_byte_fallback(tmp_path: Path, name: str, pad: int, form: str):
    """What `save_pretrained` leaves of a SentencePiece model, without its tokenizer.model.

    Metaspace differs from the model before a text that begins with a space, which it puts none
    before: the ids that a model was pretrained with are SentencePiece's.
    """
    transformers = pytest.importorskip("transformers")
    wanted = vocabulary(name)
    file = sentence_piece_json(wanted) | FORMS[form]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(file)),
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    if pad:
        fast.add_special_tokens({"pad_token": "<pad>"})
    fast.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    tokenizer = Tokenizer(tokenizer_model=tmp_path)
    assert tokenizer.n_words == wanted.n_words + pad
    assert (tokenizer.bos_id, tokenizer.eos_id) == (wanted.bos_id, wanted.eos_id)
    assert tokenizer.vocabulary.is_plain_bpe and tokenizer.vocabulary.opening_space
    library = theirs((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for text in STRINGS[:100]:
        ids = tokenizer.vocabulary.encode(text)
        assert ids == wanted.vocabulary.encode(text), text
        assert tokenizer.decode(ids) == wanted.decode(ids)
        if form == "Prepend" or text[:1] not in ("", " ", "▁"):
            assert library.encode(text, add_special_tokens=False).ids == ids, text
