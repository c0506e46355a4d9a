"""What a run leaves at its end, and what is said of it."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from running import (
    RESUME,
    command,
    evaluate_as,
    pretrain,
    write_dialogues,
    write_labelled,
    write_model,
    write_stories,
)

from minllama.formats.pt_file import load_pt, save_pt
from minllama.runs.checkpoints import Checkpoints


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder that has nothing but text: 47 chunks of 16 tokens to train on."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path)


def named_result() -> str:
    """The model that the record of the run names."""
    return json.loads(Path("run/run.json").read_text(encoding="utf-8"))["result"]


def test_the_result_of_an_overfitted_run_is_its_best_model(monkeypatch):
    """Every later command takes it, also after the run was resumed and ended again."""
    with monkeypatch.context() as patch:
        evaluate_as(patch, 9.0, 3.0, 4.0)
        done = pretrain("--epochs 2 --best_model_interval 1")
    best = Path("run/best-model.pt")
    assert named_result() == best.name and f"{best} is the model of that step" in done.out
    assert load_pt(best)["step"] == 15
    used = command("--option generate --save_dir run --prompt One --max_new_tokens 2")
    assert f"using --save_dir's {best}" in used.error
    with monkeypatch.context() as patch:
        evaluate_as(patch, 2.0)
        assert command(f"{RESUME} --epochs 3").status == 0
    assert named_result() == "final-model.pt"


def test_a_run_that_stopped_since_nothing_got_better_is_not_told_to_go_on(monkeypatch):
    """`stopped: no better val_loss in 2 evaluations`, and below it `more training` would help."""
    evaluate_as(monkeypatch, 9.0, 3.0, 3.001, 3.002)
    done = pretrain("--optimizer muon --eval_interval 3 --early_stopping 2 --sample_tokens 0")
    assert "stopped: no better val_loss in 2 evaluations" in done.out
    assert "what would help most: more text; else fewer epochs" in done.out
    assert "overfitted" not in done.out and named_result() == "final-model.pt"


ZH = "今天天气很好。我们去公园散步吧，看看花。\n"
EN = "The quick brown fox, jumps over: 'a lazy dog'! Would it? BCDEGHIJKLMNOPQRSUVXYZ 0123456789\n"


@pytest.mark.parametrize(
    ("best", "flags", "why"),
    [
        (9.5, "", "training: the text is likely too short to learn from"),
        (9.5, " --val_data others.jsonl", "training: --val_data is likely of another kind"),
        (3.0, "", ""),
    ],
)
def test_held_out_text_that_is_predicted_worse_is_told(monkeypatch, best, flags, why):
    """A perplexity of 465,818 after 3,596 before training passed without a word.

    And a part of the text itself was said to be of another kind.
    """
    write_stories(Path.cwd(), 12)
    Path("others.jsonl").write_text('{"text": "Of another kind."}\n', encoding="utf-8")
    evaluate_as(monkeypatch, 9.0, best)
    done = pretrain(f"--epochs 1 --max_steps 3 --sample_tokens 0{flags}")
    assert done.status == 0 and why in done.out
    assert ("predicted worse than before training" in done.out) == bool(why)
    assert f"{math.exp(best):,.2f} after 3 steps" in done.out  # with commas, as elsewhere


def test_a_classifier_is_for_sentences():
    """Its `next:` proposed to generate with it, which nobody trains a classifier for."""
    words = f"{write_labelled(Path.cwd())} --pretrained_model_path {write_model(Path.cwd())}"
    done = command(f"--option finetune {words} --save_dir run --max_steps 2")
    assert done.status == 0 and "--option generate" not in done.out
    printed = [shlex.split(line) for line in done.out.partition("next:")[2].splitlines() if line]
    assert command(printed[0][2:]).status == 0 and printed[0][3] == "prompt"


@pytest.mark.parametrize("dev", ["", " --dev ./toy-train.txt"])
def test_a_classifier_is_not_tried_on_what_it_has_learnt(dev):
    """Of a file that was split by itself, or named twice, `next:` tested on the training sentences.

    And an accuracy on these passed for one on others.
    """
    write_labelled(Path.cwd())
    words = f"--option finetune --train toy-train.txt{dev} --pretrained_model_path "
    words += f"{write_model(Path.cwd())} --save_dir run --max_steps 2"
    done = command(words)
    after = done.out.partition("next:")[2]
    assert done.status == 0 and "toy-train.txt" not in after
    assert ("--dev toy-train.txt is --train, too: what is measured" in done.out) == bool(dev)
    line, note = after.strip().splitlines()[:2]
    assert shlex.split(line)[-2:] == ["--test", "SENTENCES.txt"]
    assert "SENTENCES.txt: sentences that it was not trained on" in note
    Path("SENTENCES.txt").write_text("The film number 1 is average .\n", encoding="utf-8")
    assert command(shlex.split(line)[2:]).status == 0
    page = Path("run/finetune-toy-report.html").read_text(encoding="utf-8")
    assert "to prompt with it (SENTENCES.txt: sentences" in page


def test_predictions_are_in_the_folder_of_their_run():
    """A second chat finetuning replaced the first one's answers, of another folder."""
    write_dialogues(Path.cwd())
    first, *_ = Path("chat.jsonl").read_text(encoding="utf-8").splitlines()
    Path("asked.jsonl").write_text(first, encoding="utf-8")
    model = write_model(Path.cwd(), dim=16, n_layers=1)
    words = "--option finetune --train chat.jsonl --test asked.jsonl --cache_dir cache --epochs 1"
    words += f" --pretrained_model_path {model}"
    output = "chat-test-finetuning-output.jsonl"
    assert command(f"{words} --save_dir one --lr 0.02").status == 0
    first = Path("one", output).read_text(encoding="utf-8")
    assert command(f"{words} --save_dir two").status == 0
    assert Path("one", output).read_text(encoding="utf-8") == first
    assert Path("two", output).is_file() and not Path(output).exists()
    done = command(f"{words} --save_dir one --overwrite --lr 0.1")
    assert "had other answers, of an earlier run: kept as" in done.out
    assert Path("one/chat-test-finetuning-output.1.jsonl").read_text(encoding="utf-8") == first
    # Resumed by a file it goes on in that file's folder.
    done = command(f"{words} --resume one/finetune-chat-epoch-1.pt --lr 0.1 --epochs 2")
    assert done.status == 0 and f"wrote {Path('one', output)}" in done.out
    assert not Path("checkpoints").exists()
    assert command(f"{words} --save_dir three --test_out typed.jsonl").status == 0
    assert Path("typed.jsonl").is_file() and not Path("three", output).exists()


@pytest.mark.parametrize("damage", ["bytes", "weights", "shape"])
def test_the_model_is_read_back_before_the_run_says_that_it_is_done(monkeypatch, damage):
    """A file that no later command could read, or of other weights, was told of as the result."""
    final, real = Path("run/final-model.pt"), Checkpoints.finish

    def finish(checkpoints):
        real(checkpoints)
        if damage == "bytes":
            content = bytearray(final.read_bytes())
            content[len(content) // 2] ^= 1
            final.write_bytes(content)
        else:
            payload = load_pt(final)
            payload["model"]["norm.weight"] = payload["model"]["norm.weight"] + 1
            payload["model_args"]["n_layers"] += damage == "shape"
            save_pt(final, payload)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "finish", finish)
        done = pretrain("--max_steps 3 --save_dtype bfloat16")
    assert done.status == 1 and "files:" not in done.out
    assert "final-model.pt" in done.error and "--resume auto writes it again" in done.error
    done = command(f"{RESUME} --max_steps 3")
    assert done.status == 0 and "final-model.pt" in done.out


def found(prefix: str = "") -> dict[str, list[list[str]]]:
    """What was found of a run, from the data in its page; its record has the same."""
    page = Path(f"run/{prefix}report.html").read_text(encoding="utf-8")
    tables = json.loads(re.search('id="data">(.*?)</script>', page, re.S)[1])["runs"][0]["findings"]
    record = json.loads(Path(f"run/{prefix}run.json").read_text(encoding="utf-8"))
    assert tables == record["findings"]
    return tables


def test_what_next_is_on_the_page_with_commands_that_run():
    """The advice that was printed, the run with what would help most, and what the model is for."""
    done = pretrain("--max_steps 2 --optimizer adamw")
    rows = dict(found()["what next"])
    assert all(text in done.out for text in rows.values()) and len(rows) > 4
    again = shlex.split(rows["the same run with that"])
    assert again[again.index("--max_steps") + 1] == "4" and "--pretrain_lr" in again
    assert command([*again[2:], "--plan"]).status == 0
    words = shlex.split(rows["to generate with it"])
    assert command([*words[2:], "--max_new_tokens", "2"]).status == 0


def test_a_typed_rate_is_told_that_muon_would_help_most():
    """A sweep of rates ended at twice the default's perplexity, and more training was advised."""
    assert pretrain("--max_steps 2").status == 0
    rows = dict(found()["what next"])
    assert rows["what would help most"].startswith("Muon, which learns more")
    again = shlex.split(rows["the same run with that"])
    assert again[again.index("--optimizer") + 1] == "muon" and "--pretrain_lr" not in again
    done = command([*again[2:], "--plan"])
    assert done.status == 0 and "; muon, weight decay" in done.out


def test_a_classifiers_confusions_are_on_its_page():
    """Counted again from the predictions that it wrote and the labels in the file."""
    words = f"{write_labelled(Path.cwd())} --pretrained_model_path {write_model(Path.cwd())}"
    done = command(f"--option finetune {words} --save_dir run --max_steps 12 --lr 0.003")
    assert done.status == 0, done.error
    lines = Path("run/toy-dev-finetuning-output.txt").read_text(encoding="utf-8").splitlines()
    gold = Path("toy-dev.txt").read_text(encoding="utf-8").splitlines()
    pairs = Counter((g[0], line[0]) for g, line in zip(gold, lines, strict=True))
    tables = found("finetune-toy-")
    (labelled, figures), *matrix = tables["predictions on dev"]
    names = ["awful", "average", "excellent"]
    assert labelled == "21 labelled" and "predictions on test" in tables
    assert figures.startswith(f"accuracy {sum(pairs[i, i] for i in '012') / 21:.3f}, macro-F1")
    for i, (row, text) in zip("012", matrix, strict=True):
        assert row == f"{names[int(i)]}, predicted as"
        assert text == ", ".join(f"{names[int(j)]} {pairs[i, j]}" for j in "012")
    assert shlex.split(dict(tables["what next"])["to prompt with it"])[3] == "prompt"


def test_a_chats_answers_and_score_are_on_its_page():
    """As they are in the file of answers; of many the first."""
    write_dialogues(Path.cwd())
    write_dialogues(Path.cwd(), "chat-test.jsonl")
    words = f"--train chat.jsonl --pretrained_model_path {write_model(Path.cwd())}"
    done = command(f"--option finetune {words} --test chat-test.jsonl --save_dir run --max_steps 2")
    assert done.status == 0, done.error
    out = Path("run/chat-test-finetuning-output.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in out]
    right = sum(each["response"] == each["expected"] for each in written)
    tables = found("finetune-chat-")
    (_, score), *rows = tables["answers to --test"]
    assert score.startswith(f"{right} of {len(written)} answers are those of chat-test.jsonl")
    for number, (each, (name, text)) in enumerate(zip(written, rows, strict=True), start=1):
        assert name == f"{number}. {each['prompt']}" and text.startswith(each["response"])
        wrong = each["response"] != each["expected"]
        assert text.endswith(f"(expected: {each['expected']})") == wrong
    assert 1 <= len(tables["what it answers"]) <= 3


def test_what_a_model_of_chinese_is_fine_tuned_on_is_its_readers():
    """Without --train `next:` trained it on the English reviews, which its vocabulary lacks."""
    for text, train in ((ZH, ["--train", "DIALOGUES.jsonl"]), (EN, [])):
        Path("text.txt").write_text(text * 60, encoding="utf-8")
        done = command(
            "--option pretrain --pretrain_data text.txt --save_dir run --max_steps 2 --overwrite "
            "--dim 16 --n_layers 1 --n_heads 2 --max_seq_len 32 --cache_dir cache"
        )
        assert done.status == 0
        lines = done.out.partition("next:")[2].splitlines()
        (line,) = (words for words in map(shlex.split, lines) if "finetune" in words)
        assert line[-2:] == train or not train and "--train" not in line
        page = Path("run/report.html").read_text(encoding="utf-8")
        assert ("DIALOGUES.jsonl" in page) == bool(train)
