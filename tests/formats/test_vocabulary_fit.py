"""Characters that a model's vocabulary lacks: the model to take instead is named, or it stops."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from byte_vocabularies import byte_vocabulary
from running import command, write_dialogues, write_model
from vocabularies import vocabulary

import check_model_precision
from config import LlamaConfig
from llama import Llama, model_payload
from minllama.formats.pt_file import save_pt
from minllama.formats.vocabulary_fit import check_fit, misfit
from minllama.system.errors import UsageError
from tokenizer import Tokenizer, train_vocabulary

pytestmark = pytest.mark.usefixtures("empty_folder")
FOX = "从前有一只小狐狸住在森林里"


def write_chinese(folder: str) -> Path:
    """A small untrained model with a Chinese vocabulary, as a pretraining leaves it."""
    Path(folder).mkdir()
    Path("text.txt").write_text(f"{FOX}\n" * 200, encoding="utf-8")
    train_vocabulary([Path("text.txt")], Path("zh.model"))
    tokenizer = Tokenizer(tokenizer_model="zh.model")
    config = LlamaConfig(vocab_size=tokenizer.n_words, dim=32, n_layers=1, n_heads=2)
    torch.manual_seed(0)
    model = Llama(config)
    model.vocabulary = tokenizer.model_bytes
    save_pt(Path(folder, "final-model.pt"), model_payload(model))
    os.utime(Path(folder, "final-model.pt"), (1, 1))
    return Path(folder, "final-model.pt")


def write_inputs() -> dict[str, str]:
    """The flags of each command that learns from or judges a Chinese text."""
    chats = [{"prompt": FOX, "response": FOX[:n]} for n in range(2, 13)]
    lines = "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    Path("chat.jsonl").write_text(lines, encoding="utf-8")
    Path("labels.json").write_text('["好", "坏"]', encoding="utf-8")
    for name in ("train", "dev", "test"):
        text = "".join(f"{n % 2} ||| {FOX[n:]}\n" for n in range(6))
        Path(f"{name}.txt").write_text(text, encoding="utf-8")
    Path("pairs.tsv").write_text(f"{FOX}\t{FOX[::-1]}\n", encoding="utf-8")
    labelled = "--train train.txt --dev dev.txt --test test.txt --label_names labels.json"
    return {
        "chat": "--option finetune --train chat.jsonl --plan",
        "labelled": f"--option finetune {labelled} --plan",
        "prompt": f"--option prompt {labelled}",
        "pairs": "--option prompt --pairs pairs.tsv",
    }


@pytest.mark.parametrize("kind", ["chat", "labelled", "prompt", "pairs"])
def test_a_default_model_of_another_script_is_not_used(kind):
    """The Chinese quick start fine-tuned the English model on Chinese dialogues: 0 of 120."""
    line = write_inputs()[kind]
    chinese = write_chinese("zh")
    Path("checkpoints").mkdir()
    shutil.copy(write_model(Path(), dim=32), "checkpoints/final-model.pt")
    status, _, error = command(line)
    assert status == 2 and error.count("error: ") == 1
    assert f"--pretrained_model_path {chinese} (0%)" in error and "the text has no pieces" in error
    # One that was typed is used, and the better one named in a line.
    status, out, error = command(f"{line} --pretrained_model_path checkpoints/final-model.pt")
    assert status == 0, error
    assert (out + error).count("warning: ") == 1 and f"{chinese} (0%)" in out + error
    status, out, error = command(f"{line} --pretrained_model_path {chinese}")
    assert status == 0 and "no pieces" not in out + error, error


def test_a_model_that_fits_is_used_without_a_word():
    """English dialogues with the model of English stories, of a --save_dir and by default."""
    write_dialogues(Path())
    Path("checkpoints").mkdir()
    shutil.copy(write_model(Path(), dim=32), "checkpoints/final-model.pt")
    for words in ("", " --save_dir checkpoints"):
        done = command(f"--option finetune --train chat.jsonl --plan{words}")
        assert done.status == 0 and "no pieces" not in done.out + done.error


def test_a_tenth_of_rare_characters_stops_nobody(capsys):
    """One's own Chinese model was refused by default: a seventh of its text is in bytes."""
    write_chinese("zh")
    tokenizer = Tokenizer("zh.model")
    known = FOX * 4
    texts = [known + "".join(map(chr, range(0x9000, 0x9000 + n))) for n in (0, 20, 200)]
    shares = [misfit(tokenizer, [text]) for text in texts]
    assert shares[0] < 0.1 < shares[1] < 0.5 < shares[2]
    for text, share in zip(texts, shares, strict=True):
        with pytest.raises(UsageError) if share > 0.5 else contextlib.nullcontext():
            check_fit(tokenizer, [text], what="--train x", remedy="--model", is_default=True)
        advice = "no model here has a better one: pretrain one on text with such characters"
        assert (advice in capsys.readouterr().out) == (0.1 < share < 0.5)


def test_scoring_a_text(capsys):
    """`check_model_precision.py --text` gave bits per byte of byte tokens without a word."""
    chinese = write_chinese("zh")
    Path("checkpoints").mkdir()
    shutil.copy(write_model(Path(), dim=32), "checkpoints/final-model.pt")
    assert check_model_precision.main(["--text", "text.txt"]) == 2
    assert f"FILE {chinese} (0%)" in capsys.readouterr().err
    english = "checkpoints/final-model.pt"
    assert check_model_precision.main([english, "--text", "text.txt"]) == 0
    assert f"FILE {chinese} (0%)" in capsys.readouterr().out
    assert check_model_precision.main([str(chinese), "--text", "text.txt"]) == 0
    assert "no pieces" not in capsys.readouterr().out


def test_a_damaged_or_foreign_file_near_by_is_passed_over():
    """Only models that can be read are named."""
    line = write_inputs()["chat"]
    chinese = write_chinese("zh")
    for name in ("a", "b"):
        Path(name).mkdir()
    Path("a/final-model.pt").write_bytes(b"no model")
    Path("b/final-model.pt").write_bytes(chinese.read_bytes()[:500])
    os.utime(chinese, (9e9, 9e9))
    shutil.copy(write_model(Path(), dim=32), "stories42M.pt")
    chinese.rename("zh/best-model.pt")  # of a pretraining that was stopped: never a default
    Path("a/final-model.pt").unlink()
    Path("b/final-model.pt").unlink()
    Path("a/best-model.pt").write_bytes(b"no model")
    status, _, error = command(line)
    assert status == 2 and f"--pretrained_model_path {Path('zh/best-model.pt')} (0%)" in error


def test_the_share_for_every_kind_of_vocabulary():
    """Parts of characters in SentencePiece's and byte-level BPE, and characters that are lost."""
    english, mixed = "the cat sat on the mat. ", FOX * 4
    for tokenizer in (vocabulary("embedded"), byte_vocabulary("llama-bpe")):
        assert misfit(tokenizer, [english * 9]) < 0.05
        assert misfit(tokenizer, [mixed]) > 0.9
    lossy = vocabulary("no-byte-fallback")
    assert misfit(lossy, [mixed]) == 1
    half, known = "the cat sat.." + FOX[:13], b"".join(lossy.vocabulary.token_texts).decode()
    lost = sum(character not in known for character in half)
    assert 13 <= lost < 26 and misfit(lossy, [half]) == lost / 26
    assert misfit(lossy, []) == misfit(vocabulary("embedded"), [""]) == 0
