"""Which vocabulary is taken: of folders and files, of models, and what is said of a wrong one."""

from __future__ import annotations

import base64
import importlib
import json
from pathlib import Path

import pytest
from byte_vocabularies import KINDS, byte_vocabulary, tokenizer_json
from oracles import make_model, write
from running import command
from vocabularies import vocabulary

import check_model_precision
import tokenizer as tokenizer_module
from llama import model_payload
from minllama.formats.hugging_face_vocabulary import tokenizer_json as sentence_piece_json
from minllama.formats.pt_file import save_pt
from minllama.system.errors import UsageError
from minllama.vocabulary.byte_bpe import ByteBPE
from minllama.vocabulary.sentence_piece import SentencePiece
from tokenizer import Tokenizer

pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("empty_folder")
TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


def write_folder(kind: str = "qwen2", name: str = "vocabulary") -> Path:
    """What `save_pretrained` leaves of a vocabulary."""
    folder = Path(name)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    settings = json.dumps(KINDS[kind][2])
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    return folder


def say(*words: str | Path) -> str:
    """The one line of a command that is refused."""
    done = command([*map(str, words)])
    assert done.status == 2 and "Traceback" not in done.error, done.error
    (line,) = (line for line in done.error.splitlines() if not line.startswith("device "))
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_and_its_file_are_the_same_vocabulary(kind: str):
    folder = write_folder(kind)
    wanted = byte_vocabulary(kind)
    for path in (folder, folder / "tokenizer.json", str(folder)):
        tokenizer = Tokenizer(tokenizer_model=path)
        assert tokenizer.fingerprint == wanted.fingerprint
        assert Tokenizer(tokenizer.model_bytes).fingerprint == wanted.fingerprint
        assert tokenizer.vocabulary.kind == "byte-level BPE"
    with pytest.raises(UsageError, match="is byte-level BPE"):
        _ = tokenizer.sp_model


def test_a_folder_with_both_kinds():
    """SentencePiece's own file, unless it is of another kind, or tokens were added beside it."""
    folder, wanted = Path("both"), vocabulary("ours")
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(wanted.model_bytes)
    file = sentence_piece_json(wanted)
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    assert Tokenizer(tokenizer_model=folder).fingerprint == wanted.fingerprint
    file["added_tokens"].append({"id": wanted.n_words, "content": "<pad>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    more = Tokenizer(tokenizer_model=folder)
    assert more.n_words == wanted.n_words + 1 and isinstance(more.vocabulary, SentencePiece)
    assert more.encode("a cat", True, True) == wanted.encode("a cat", True, True)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert Tokenizer(tokenizer_model=folder).fingerprint == wanted.fingerprint
    (folder / "tokenizer.model").write_bytes(TIKTOKEN)  # as Llama 3's is
    (folder / "tokenizer.json").write_text(tokenizer_json("llama-bpe"), encoding="utf-8")
    assert isinstance(Tokenizer(tokenizer_model=folder).vocabulary, ByteBPE)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="both: is tiktoken's"):
        Tokenizer(tokenizer_model=folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UsageError, match="holds no tokenizer.model and no tokenizer.json"):
        Tokenizer(tokenizer_model=folder)


UNREAD = {
    "WordPiece": ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "its model 'WordPiece'"),
    "Unigram": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "no model with a vocab"),
    "words": ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer is none of the known"),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "its normalizer"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_vocabulary_lying_by_is_not_taken_for_one_that_is_not_read(name: str):
    """Its size may fit by chance: the text would be nonsense, and nothing would say so."""
    pytest.importorskip("safetensors")
    change, complaint = UNREAD[name]
    beside = vocabulary("ours")
    Path("tokenizer.model").write_bytes(beside.model_bytes)
    write(make_model(beside), "hf", Path("model"))
    file = json.loads(tokenizer_json("gpt-2")) | change
    Path("model/tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    said = say("--pretrained_model_path", "model", "--prompt", "x")
    assert complaint in said and "model" in said
    Path("model/tokenizer.json").unlink()
    Path("model/vocab.json").write_text("{}", encoding="utf-8")
    said = say("--pretrained_model_path", "model", "--prompt", "x")
    assert "its vocabulary is in vocab.json, which is not read" in said
    Path("model/vocab.json").unlink()
    done = command("--pretrained_model_path model --prompt x --max_new_tokens 2")
    assert done.status == 0, done.error  # a model that has none takes the one lying by


def test_a_damaged_vocabulary_in_a_model_names_the_file():
    model = make_model(byte_vocabulary("qwen2"))
    model.vocabulary = model.vocabulary.replace(b'"BPE"', b'"BPX"')
    save_pt(Path("a.pt"), model_payload(model))
    assert "a.pt: the vocabulary: its model 'BPX'" in say("--pretrained_model_path", "a.pt")


def test_a_model_is_never_used_with_another_vocabulary():
    model = make_model(byte_vocabulary("qwen2"))
    save_pt(Path("a.pt"), model_payload(model))
    folder, other = write_folder(), write_folder("smollm", "other")
    words = ["--pretrained_model_path", "a.pt", "--prompt", "Hi", "--max_new_tokens", "2"]
    assert command([*words, "--tokenizer_model", str(folder)]).status == 0
    said = say(*words, "--tokenizer_model", other)
    assert "was trained with" in said and byte_vocabulary("qwen2").fingerprint in said


def test_llama2_c_has_no_such_vocabulary(capsys):
    """`--convert bin` and `tokenizer.py export`: one line, and no file is left."""
    save_pt(Path("a.pt"), model_payload(make_model(byte_vocabulary("gpt-2"))))
    assert check_model_precision.main(["a.pt", "--convert", "bin", "--output", "a.bin"]) == 2
    assert "llama2.c knows only SentencePiece's BPE" in capsys.readouterr().err
    folder = write_folder("gpt-2")
    words = ["export", "--tokenizer_model", str(folder), "--output", "t.bin"]
    assert tokenizer_module.main(words) == 2
    assert "llama2.c knows only SentencePiece's BPE" in capsys.readouterr().err
    assert not Path("a.bin").exists() and not Path("t.bin").exists()


def test_without_tokenizers_a_command_says_what_to_install(monkeypatch):
    """By one line, before any long work; of a model with another vocabulary nothing is needed."""
    folder, real = write_folder(), importlib.import_module
    save_pt(Path("a.pt"), model_payload(make_model(byte_vocabulary("qwen2"))))
    save_pt(Path("b.pt"), model_payload(make_model(Tokenizer())))

    def absent(name: str, *rest: str):
        if name.partition(".")[0] in ("tokenizers", "jinja2"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", absent)
    remedy = "needs another package: pip install tokenizers"
    assert remedy in say("--pretrained_model_path", "a.pt", "--prompt", "x")
    assert remedy in say("--option", "pretrain", "--tokenizer_model", folder, "--save_dir", "r")
    done = command("--pretrained_model_path b.pt --prompt x --max_new_tokens 2")
    assert done.status == 0, done.error
