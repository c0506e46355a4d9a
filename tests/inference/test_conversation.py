"""A conversation as a user holds it: history, commands, Ctrl-C, whole characters."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from config import LlamaConfig, parse_options
from llama import Llama
from minllama.inference import streaming
from minllama.inference.conversation import Conversation, converse
from minllama.inference.streaming import Writer
from minllama.system.signals import StopRequest
from minllama.text.chat import ChatTemplate
from minllama.text.dialogues import Dialogue, read_dialogues
from tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def own_folder(empty_folder) -> None:
    """Conversations are saved where the user is."""


class Model:
    """Stands in for generation: answers as it is told to, and keeps what it was given to read."""

    sends = signal.SIGINT

    def __init__(self, tokenizer: Tokenizer, answers: Iterable[str]) -> None:
        self.tokenizer, self.answers = tokenizer, iter(answers)
        self.prompts: list[str] = []
        self.asked: list[dict] = []

    def generate_tokens(self, llama, prompts, **settings):
        self.prompts.append(self.tokenizer.decode(prompts[0]))
        self.asked.append(settings)
        answer = next(self.answers)
        for token in self.tokenizer.encode(answer, bos=False, eos=False):
            if settings["should_stop"]():
                return
            yield [token]
            if token == INTERRUPTS:
                signal.raise_signal(self.sends)


INTERRUPTS = Tokenizer().encode("!", bos=False, eos=False)[-1]  # Ctrl-C behind this token


def writer(
    tokenizer: Tokenizer, line: str = "", *, context: int = 256, chat: bool = True
) -> Writer:
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": context}
    llama = Llama(LlamaConfig(vocab_size=tokenizer.n_words, **shape)).eval()
    options = parse_options(f"--interactive {line}".split())
    template = ChatTemplate() if chat else None
    return Writer(llama, tokenizer, options, StopRequest(), template=template)


@pytest.fixture
def hold(tokenizer, monkeypatch):
    """Hold a conversation: the lines typed and the answers given; returns it and the model."""

    def hold(typed: list[str | type], answers: Iterable[str] = (), line: str = "", **more):
        model, lines = Model(tokenizer, answers), iter(typed)
        monkeypatch.setattr(streaming, "generate_tokens", model.generate_tokens)

        def type_line(prompt: str) -> str:
            print(prompt, end="")
            entered = next(lines, EOFError)
            if isinstance(entered, type):
                raise entered
            return entered

        monkeypatch.setattr(builtins, "input", type_line)
        conversation = Conversation(writer(tokenizer, line, **more), 0.5)
        model.status = conversation.run()
        return conversation, model

    return hold


# ---------------------------------------------------------------------------- history


def test_a_question_is_read_behind_what_was_said(hold, capsys):
    """The answers come without the label's space; /reset forgets; each has its own seed."""
    asked = ["Where does a fox live?", "", "And a bear?", "/reset", "And a mole?"]
    conversation, model = hold(asked, ["In a den.", "In a cave.", "In a burrow."], "--seed 5")
    assert model.prompts == [
        "User: Where does a fox live?\nAssistant:",
        "User: Where does a fox live?\nAssistant: In a den. User: And a bear?\nAssistant:",
        "User: And a mole?\nAssistant:",
    ]
    out = capsys.readouterr().out
    assert "> In a den.\n> > In a cave.\n> (a new conversation)\n> In a burrow.\n> \n" in out
    assert conversation.history == [("And a mole?", "In a burrow.")] and model.status == 0
    assert [settings["seeds"] for settings in model.asked] == [[5], [6], [7]]


def test_the_oldest_questions_are_forgotten_whole(hold, capsys):
    """Before the context is full there is room for an answer, and the user is told."""
    questions = [f"Question {i}?" for i in range(8)]
    conversation, model = hold(questions, ["It is so."] * 8, context=128)
    for prompt, settings in zip(model.prompts, model.asked, strict=True):
        assert prompt.startswith("User: Question")
        length = len(conversation.writer.tokenizer.encode(prompt, True, False))
        assert length <= 64 + 8 and settings["max_new_tokens"] >= 56
    assert "Question 7" in model.prompts[-1] and "Question 6" in model.prompts[-1]
    assert "Question 0" not in model.prompts[-1]
    assert capsys.readouterr().out.count("from here on the oldest questions are forgotten)") == 1
    assert len(conversation.history) == 8  # /save writes them all


def test_a_question_longer_than_the_context_is_not_cut(hold, capsys):
    """The model would answer another question than was asked."""
    conversation, model = hold(["fox " * 80, "Hello!"], ["Hello."], context=64)
    assert "more than the model can read" in capsys.readouterr().out
    assert len(model.prompts) == 1 and conversation.history == [("Hello!", "Hello.")]


def test_an_answer_may_be_as_long_as_the_context_allows(hold):
    """Unless --max_new_tokens is typed; it ends before the model asks itself a question."""
    answer = "In a den.\nUser: And you?"
    conversation, model = hold(["Where?"], [answer])
    read = len(ChatTemplate().question_ids(conversation.writer.tokenizer, "Where?"))
    assert model.asked[0]["max_new_tokens"] == 256 - read
    assert conversation.history == [("Where?", "In a den.")]
    _, model = hold(["Where?"], [answer], "--max_new_tokens 9")
    assert model.asked[0]["max_new_tokens"] == 9


def test_half_a_character_is_never_shown(hold, capsys, monkeypatch):
    """The embedded vocabulary spells Chinese in bytes, three to a character."""
    shown: list[str] = []
    real = builtins.print

    def watch(*texts, **settings):
        shown.append(str(texts[0]) if texts else "")
        real(*texts, **settings)

    monkeypatch.setattr(streaming, "print", watch, raising=False)
    conversation, _ = hold(["狐狸？"], ["洞里 🦊 。"])
    assert conversation.history == [("狐狸？", "洞里 🦊 。")]
    assert "洞里 🦊 。" in "".join(shown) and "\ufffd" not in "".join(shown)
    assert "洞" in shown and len(shown) > 10  # as it comes


# ---------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_ends_the_answer_and_not_the_conversation(hold, capsys):
    """What was shown stays in the history, and the next question is answered."""
    conversation, model = hold(["A story?", "More?"], ["Once ! upon a time", "No."])
    assert conversation.history == [("A story?", "Once !"), ("More?", "No.")]
    assert model.status == 0 and "stopping" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_at_the_prompt_ends_only_when_it_is_meant(hold, capsys):
    """One that came just after an answer's end would else throw the conversation away."""
    _, model = hold([KeyboardInterrupt, "Hello!", KeyboardInterrupt, KeyboardInterrupt], ["Hi."])
    assert model.status == 130
    assert capsys.readouterr().out.count("once more") == 2


def test_a_termination_while_it_answers_ends_it(hold, monkeypatch):
    """As before: only Ctrl-C is the answer's."""
    monkeypatch.setattr(Model, "sends", signal.SIGTERM)
    _, model = hold(["A story?", "More?"], ["Once ! upon a time"])
    assert len(model.prompts) == 1 and model.status == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---------------------------------------------------------------------------- commands


def test_commands_say_what_they_did(hold, capsys):
    """And what is wrong with them, without ending anything."""
    Path("there.jsonl").write_text("", encoding="utf-8")
    conversation, _ = hold(
        [
            "Where?",
            "/help",
            "/temperature 0.7",
            "/temperature hot",
            "/temperature",
            "/temperature -1",
        ]
        + ["/save", "/save there.jsonl", "/save there.jsonl/x", "/exit"],
        ["Here."],
    )
    said = capsys.readouterr().out.split("> ")[2:]
    assert conversation.temperature == 0.7
    assert "/reset" in said[0] and "/save FILE" in said[0] and "(temperature 0.7)" in said[1]
    assert "'hot' is not a number" in said[2] and "'' is not a number" in said[3]
    assert "at least 0" in said[4] and "needs FILE" in said[5]
    assert "there.jsonl: is there already" in said[6] and "/save there.jsonl/x: " in said[7]
    assert "/exit: no such command; /help lists them" in said[8]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "folder/" * 2000 + "x"])
def test_a_name_that_no_file_can_have_does_not_end_the_conversation(hold, capsys, name):
    """It was a traceback, and what was said was lost."""
    hold(["Where?", f"/save {name}", "/reset"], ["Here."])
    said = capsys.readouterr().out
    assert "/save " in said and "(a new conversation)" in said and "Traceback" not in said


def test_a_saved_conversation_can_be_trained_on(hold, capsys):
    """It is a line that --train reads."""
    hold(["Where？", "And?", "/save a file.jsonl"], ["In a “den”.", "In a cave."])
    assert "(wrote a file.jsonl)" in capsys.readouterr().out
    exchanges = [("Where？", "In a “den”."), ("And?", "In a cave.")]
    assert [*read_dialogues(Path("a file.jsonl"))] == [Dialogue(exchanges, "", 1)]
    assert "“" in Path("a file.jsonl").read_text(encoding="utf-8")


def test_a_conversation_of_nothing_is_not_saved(hold, capsys):
    """After /reset it wrote a line of no turns, which --train refuses."""
    hold(["/save a.jsonl", "Where?", "/reset", "/save a.jsonl"], ["Here."])
    assert capsys.readouterr().out.count("(nothing has been said that could be saved)") == 2
    assert not Path("a.jsonl").exists()


def test_bytes_that_are_not_the_terminals_encoding_end_nothing(hold, capsys):
    """They were a traceback; half a surrogate pair of a Windows console could not be saved."""
    conversation, _ = hold(["b\udce4r?", "\ud83d?", "/save a.jsonl"], ["Here.", "There."])
    assert [question for question, _ in conversation.history] == ["b\ufffdr?", "\ufffd?"]
    assert capsys.readouterr().err.count("note: not in ") == 2
    assert [each.exchanges for each in read_dialogues(Path("a.jsonl"))] == [conversation.history]


@pytest.mark.skipif(os.name == "nt", reason="has no pseudo-terminals")
def test_a_line_is_edited_at_a_terminal(empty_folder):
    """Ctrl-A, the arrow that brings the last line back, a byte of Latin-1, Ctrl-D."""
    pytest.importorskip("readline")
    program = (
        "from minllama.inference.conversation import TypedLines\n"
        "from minllama.cli.command_line import protect_output\n"
        "protect_output()\n"
        "for line in TypedLines(): print(f'<{line}>', flush=True)"
    )
    master, slave = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
    env = os.environ | {"PYTHONUTF8": "1", "TERM": "xterm"}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program], **streams, cwd=root, env=env, start_new_session=True
    )
    os.close(slave)
    for typed, expected in (
        (b"", b"> "),
        (b"world\x01hello \r", b"<hello world>\r\n> "),
        (b"\x1b[A!\r", b"<hello world!>\r\n> "),
        (b"b\xe4r\r", b"r>\r\n> "),  # readline itself drops what is no character
        (b"\x04", b"\r\n"),
    ):
        os.write(master, typed)
        shown, deadline = b"", time.monotonic() + 60
        while expected not in shown and time.monotonic() < deadline:
            if select.select([master], [], [], 1)[0]:
                shown += os.read(master, 1000)
        assert expected in shown
    assert process.wait(timeout=60) == 0
    os.close(master)


# ---------------------------------------------------------------------------- other models


def type_lines(monkeypatch, *lines: str | type) -> None:
    """Have these typed, or raised, and then the end of input."""
    typed = iter(lines)

    def type_line(prompt: str) -> str:
        entered = next(typed, EOFError)
        if isinstance(entered, type):
            raise entered
        return entered

    monkeypatch.setattr(builtins, "input", type_line)


def test_a_model_without_a_template_continues_texts(tokenizer, monkeypatch, capsys):
    """As it always did; and the way to a conversation is shown, by a file that is there."""
    type_lines(monkeypatch, "Once", "")
    torch.manual_seed(0)
    plain = writer(tokenizer, "--max_new_tokens 3 --pretrained_model_path own.pt", chat=False)
    assert converse(plain, 0.0) == 0
    first, how_to_end, *rest = capsys.readouterr().out.splitlines()
    command = shlex.split(first)
    assert Path(command[-1]).is_file() and rest[0].startswith("Once")
    assert command[-4:-1] == ["--pretrained_model_path", "own.pt", "--train"]
    assert "Ctrl-D" in how_to_end  # "/quit" was continued as a text


def test_the_model_that_is_to_converse_is_the_one_at_hand(tokenizer, monkeypatch, capsys):
    """With --save_dir the command was to tune the model of another, later pretraining."""
    type_lines(monkeypatch)
    plain = writer(tokenizer, "--save_dir run1", chat=False)
    assert converse(plain, 0.0) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert command[-4:-1] == ["--pretrained_model_path", "run1", "--train"]


def test_ctrl_c_ends_a_text_of_a_model_without_a_template(tokenizer, monkeypatch, capsys):
    """It ended the program; at the prompt it is the second in a row that does."""
    model = Model(tokenizer, ["upon ! a time", "there"])
    monkeypatch.setattr(streaming, "generate_tokens", model.generate_tokens)
    plain = writer(tokenizer, chat=False)
    type_lines(monkeypatch, "Once", KeyboardInterrupt, "And", KeyboardInterrupt, KeyboardInterrupt)
    assert converse(plain, 0.0) == 130
    assert capsys.readouterr().out.splitlines()[2:-3] == [
        "Once upon !",
        "",
        "(Ctrl-C once more, or Ctrl-D, ends the conversation)",
        "And there",
    ]
    monkeypatch.setattr(Model, "sends", signal.SIGTERM)
    model.answers = iter(["!"])
    type_lines(monkeypatch, "Once", "And")
    assert converse(plain, 0.0) == 143 and model.prompts[-1] == "Once"


def test_a_prompt_for_a_chat_model_is_a_question(tokenizer, monkeypatch, capsys):
    """One is answered as it comes, several when they are whole."""
    model = Model(tokenizer, ["In a den.", "In a den."])
    monkeypatch.setattr(streaming, "generate_tokens", model.generate_tokens)
    texts = writer(tokenizer).continue_texts(["Where does a fox live?"], 0.5)
    assert texts == ["Where does a fox live?\nIn a den."]
    assert capsys.readouterr().out == texts[0] + "\n"
    assert model.prompts == ["User: Where does a fox live?\nAssistant:"]
    writer(tokenizer).continue_texts(["Where?"], 0.5, first=1, total=2)
    assert "--- 2 of 2\nWhere?\nIn a den." in capsys.readouterr().out


def test_the_stored_labels_are_used(tokenizer):
    """A file's own, whatever this program would write today."""
    template = ChatTemplate(user="Q:", assistant="A:")
    row = dataclasses.replace(writer(tokenizer), template=template).row("Where?", [("a", "b")])
    assert tokenizer.decode(row.prompt_ids) == "Q: a\nA: b Q: Where?\nA:"
    assert json.dumps(template.to_stored()) and row.stops == ["\nQ:"]
