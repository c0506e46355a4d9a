"""Training on dialogues as a user does it: what is learnt, resumed, held out, and said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import (
    assert_same_run,
    command,
    evaluate_as,
    records,
    steps,
    stop_after,
    write_dialogues,
    write_labelled,
    write_model,
)

from llama import load_pretrained
from minllama.inference.conversation import Conversation
from minllama.runs.checkpoints import load_checkpoint
from minllama.text.chat import ChatTemplate
from minllama.training import chat_tuning

TRAIN = (
    "--option finetune --pretrained_model_path model.pt --train chat.jsonl --save_dir run "
    "--dtype float32"
)


@pytest.fixture(autouse=True)
def own_folder(empty_folder, tmp_path) -> None:
    """A small model, and dialogues to train it on."""
    write_dialogues(tmp_path)
    write_model(tmp_path)


def test_too_few_steps_are_noted_with_the_epochs_that_are_enough():
    """None of 200 dialogues was answered after the default epochs, and nothing said so."""
    lines = Path("chat.jsonl").read_text(encoding="utf-8").splitlines()
    Path("chat.jsonl").write_text("\n".join(lines[:4] * 5), encoding="utf-8")
    plan = f"{TRAIN} --plan --val_fraction 0 --batch_size 4"
    assert "25 steps are few to learn answers in: --epochs 200 makes 1,000" in (
        command(f"{plan} --epochs 5").out
    )
    assert "few to learn" not in command(f"{plan} --epochs 40").out


def test_a_model_learns_the_answers():
    """One by heart; the run leaves what every finetuning does, and tells of the test's answers."""
    lines = Path("chat.jsonl").read_text(encoding="utf-8").splitlines()
    for name, chosen in {"chat": lines[:1] * 8, "chat-test": lines[:4]}.items():
        Path(f"{name}.jsonl").write_text("\n".join(chosen), encoding="utf-8")
    more = "--epochs 16 --batch_size 4 --lr 0.02 --lr_scheduler constant --val_fraction 0"
    done = command(f"{TRAIN} {more} --test chat-test.jsonl")
    assert done.status == 0 and not done.error
    assert "Loaded 8 dialogues from chat.jsonl (train)" in done.out
    assert "of 4 dialogues" in done.out and "lr  " not in done.out
    assert "User: Where does a fox live?\n  Assistant: A fox lives in a den.\n" in done.out
    assert "--interactive" in done.out and "--prompt" not in done.out
    names = {path.name for path in Path("run").iterdir()}
    last = records("run/finetune-chat-metrics.jsonl")[-1]
    assert {"finetune-chat-best-model.pt", "finetune-chat-metrics.jsonl"} <= names
    assert last["loss"] < 0.5 and last["tokens"] > 16 * 8 * 20
    out = Path("run/chat-test-finetuning-output.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in out]
    assert found[0]["response"] == found[0]["expected"] == "A fox lives in a den."
    assert [each["prompt"] for each in found][2:4] == ["Hello!", "What is the home of a fox?"]
    right = sum(each["response"] == each["expected"] for each in found)
    assert f"{right} of 5 answers are those of chat-test.jsonl word for word" in done.out
    model = load_pretrained("run/finetune-chat-best-model.pt")
    assert model.chat_template == ChatTemplate()
    asked = ["--option", "generate", "--pretrained_model_path", "run/finetune-chat-best-model.pt"]
    done = command([*asked, "--prompt", "Where does a fox live?", "--temperature", "0"])
    assert "each prompt is a question" in done.error
    assert done.out.endswith("Where does a fox live?\nA fox lives in a den.\n")
    done = command([*asked, "--max_new_tokens", "4"])  # the assignment's two texts, as ever
    assert "each prompt" not in done.error and "I have wanted to see this thriller" in done.out


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--lora_rank 2 --gradient_accumulation_steps 2",
        "--lora_rank 2 --gradient_accumulation_steps 2 --optimizer muon",
    ],
)
def test_a_run_that_is_resumed_ends_as_if_it_had_not_stopped(monkeypatch, more):
    """Bit for bit, in the middle of the second epoch; the defaults are the checkpoint's.

    Muon has all of LoRA's adapters: AdamW, left with no parameter, ended the run in a traceback.
    """
    assert command(f"{TRAIN} {more} --batch_size 2 --epochs 2").status == 0
    with monkeypatch.context() as patch:
        other = TRAIN.replace("_dir run", "_dir other")
        stopped = command(
            f"{other} {more} --batch_size 2 --epochs 2", stop=stop_after(4 if more else 5, patch)
        )
    assert stopped.status == 130 and "continue with" in stopped.out
    resume = "--option finetune --train chat.jsonl --pretrained_model_path model.pt"
    done = command(f"{resume} --save_dir other --resume auto")
    assert done.status == 0 and "lr  " not in done.out
    assert_same_run("run", "other", "finetune-chat-epoch-2.pt", "finetune-chat-metrics.jsonl")
    options = load_checkpoint(Path("run/finetune-chat-epoch-2.pt"))["options"]
    assert options["lr"] == pytest.approx(0.072 if more else 0.024)


def test_what_is_not_typed_suits_a_chat_and_is_said():
    """The course's 2e-5 stays that of labelled sentences."""
    done = command(f"{TRAIN} --plan")
    assert "lr           0.024, for dialogues with a model of width 32" in done.out
    assert "validation   1 of the dialogues held out" in done.out
    done = command(f"{TRAIN} --plan --lr 1e-4 --val_fraction 0.2")
    assert "lr  " not in done.out and "validation   3 of" in done.out
    assert not Path("run").exists()


def test_evaluation_and_best_model_are_by_the_held_out_dialogues():
    """Without any, by the loss; --dev is read whole and nothing is held out."""
    assert command(f"{TRAIN} --epochs 2 --val_fraction 0").status == 0
    assert all(record["val_loss"] is None for record in records("run/finetune-chat-metrics.jsonl"))
    done = command(f"{TRAIN} --epochs 2 --dev chat.jsonl --overwrite")
    assert "of 8 dialogues" in done.out and "held out" not in done.out
    found = records("run/finetune-chat-metrics.jsonl")
    assert [record["val_loss"] is not None for record in found] == [False, True] * 2
    assert steps("run/finetune-chat-metrics.jsonl") == [1, 2, 3, 4]


def test_dialogues_of_which_each_is_a_fact_of_its_own(monkeypatch):
    """The best of fifty epochs was the fourth, and nothing said that it had learnt little."""
    advice = "more dialogues, which ask the same in other words"
    own = "; where each has a fact of its own, --val_fraction 0 trains on all\n"
    for more, losses, expected in (
        ("", (3, 2, 2.5, 2.6), f"\noverfitted from step 4 on: {advice}{own}"),
        ("--dev chat.jsonl", (3, 2, 2.5, 2.6), f"\noverfitted from step 4 on: {advice}\n"),
        ("", (3, 2, 2.02, 2.03), None),
        ("", (3, 2.8, 2, 2.6), None),
    ):
        evaluate_as(monkeypatch, 9.0, *losses)
        done = command(f"{TRAIN} --epochs 4 --overwrite {more}")
        assert done.status == 0
        assert expected in done.out if expected else "overfitted" not in done.out
        page = Path("run/finetune-chat-report.html").read_text(encoding="utf-8")
        assert (advice in page) == bool(expected)


BAD = {
    "--dev none.jsonl": "--dev none.jsonl: no such file",
    "--dev reviews.txt": "reviews.txt:1: not JSON",
    "--test reviews.txt": "reviews.txt:1: not JSON",
    "--dev empty.jsonl": "--dev empty.jsonl: holds no dialogue",
    "--test chat.jsonl --test_out chat.jsonl": "--test_out chat.jsonl: is another of the files",
    "--train long.jsonl": "--train long.jsonl: holds no dialogue that can be learnt from",
}


@pytest.mark.parametrize("more", BAD)
def test_bad_input_ends_before_anything_is_made(more):
    """One line, exit status 2, and no folder."""
    Path("reviews.txt").write_text("0 ||| bad .\n", encoding="utf-8")
    Path("empty.jsonl").write_text("\n", encoding="utf-8")
    long = json.dumps({"prompt": "fox " * 200, "response": "den"})
    Path("long.jsonl").write_text(long, encoding="utf-8")
    done = command(f"{TRAIN} {more}")
    assert done.status == 2 and BAD[more] in done.error and done.error.count("\n") == 1
    assert not list(Path().glob("run/*.pt"))


def test_bad_lines_can_be_left_out():
    """One of 50,000 ended it, and its repair showed the next one."""
    lines = Path("chat.jsonl").read_text(encoding="utf-8").splitlines()
    lines[3:3] = ["{", '{"messages": [{"role": "bard", "content": "x"}]}', "{"]
    Path("bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    bad = TRAIN.replace("chat.jsonl", "bad.jsonl") + " --plan"
    done = command(bad)
    assert done.status == 2 and done.error.count("\n") == 3
    for words in ("bad.jsonl:4: not JSON", "bad.jsonl:5: the role 'bard'", "--skip_bad_lines"):
        assert words in done.error
    done = command(f"{bad} --skip_bad_lines")
    assert done.status == 0 and f"Loaded {len(lines) - 3} dialogues from bad.jsonl" in done.out
    assert "left out: bad.jsonl:4: not JSON" in done.out and "(and 1 more like it)" in done.out


def test_flags_of_labelled_sentences_are_said_to_be_idle():
    """They would have been taken without a word."""
    done = command(f"{TRAIN} --plan --hidden_dropout_prob 0.1 --max_sentence_len 9 --pooling mean")
    for name in ("hidden_dropout_prob", "max_sentence_len", "pooling"):
        assert f"note: --{name} has no effect on --option finetune of dialogues" in done.error


def test_a_conversation_finds_the_model_that_was_trained_for_it(monkeypatch, tmp_path):
    """The newest one in the run's folder; a prompt goes on to the pretrained model."""
    flags = "--lr 1e-3 --epochs 1 --save_dir checkpoints".split()
    assert command([*TRAIN.replace("--save_dir run ", "").split(), *flags]).status == 0
    labelled = write_labelled(tmp_path).split()
    words = ["--option", "finetune", "--pretrained_model_path"]
    best = "checkpoints/finetune-chat-best-model.pt"
    assert command([*words, best, *labelled, *flags]).status == 0  # is newer, and is no chat's
    assert load_pretrained("checkpoints/finetune-toy-best-model.pt").chat_template is None
    held = []
    monkeypatch.setattr(Conversation, "run", lambda self: held.append(self.temperature) or 0)
    done = command("--option generate --interactive")
    assert f"using {best}, which is for dialogues" in done.error and held == [0.2]
    Path("checkpoints/final-model.pt").write_bytes(Path("model.pt").read_bytes())
    done = command("--option generate --prompt One --max_new_tokens 1")
    assert "using checkpoints/final-model.pt" in done.error


def test_a_second_training_keeps_the_files_own_labels(monkeypatch):
    """A model that was trained with others would not know these."""
    own = ChatTemplate(user="Q:", assistant="A:")
    with monkeypatch.context() as patch:
        patch.setattr(chat_tuning, "ChatTemplate", lambda: own)
        assert command(f"{TRAIN} --epochs 1").status == 0
    again = TRAIN.replace("model.pt", "run/finetune-chat-best-model.pt")
    assert command(f"{again} --epochs 1 --save_dir b").status == 0
    assert load_pretrained("b/finetune-chat-best-model.pt").chat_template == own


def test_a_mistake_of_a_line_is_named_in_the_file():
    """With the step's sequences, where numbers are not finite."""
    sequence = chat_tuning.ChatTuning.locate
    files, train_set = (
        SimpleNamespace(paths={"train": Path("a.jsonl")}),
        SimpleNamespace(lines=[3, 9], numbers=[1, 2]),
    )
    task = SimpleNamespace(files=files, train_set=train_set)
    assert sequence(task, 1) == "a.jsonl:9 (dialogue 2)" and sys.argv


def test_a_data_set_whose_files_names_would_be_too_long_is_refused_at_once():
    """The name of 73 Chinese characters made a temporary's of more than 255 bytes: all the training
    was done before "make room" was advised, and a resume could not help."""
    name = "话" * 73 + ".jsonl"
    Path(name).write_bytes(Path("chat.jsonl").read_bytes())
    done = command(TRAIN.replace("chat.jsonl", name))
    assert done.status == 2 and "File name too long" in done.error and "another name" in done.error
    assert not list(Path("run").glob("*.pt")) and done.error.count("\n") == 1
