"""A conversation in the terminal with a model: it answers questions, or continues texts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from config import DATA_DIR
from minllama.cli.command_line import launch_command, number_reader, own_script, printable
from minllama.cli.console import say
from minllama.inference.streaming import Continuation, Writer
from minllama.system.files import write_text
from minllama.system.signals import StopRequest
from minllama.text.dialogues import Exchange

GREETING = "Ask something. Ctrl-C ends an answer, Ctrl-D the conversation; /help lists commands."
HOW_TO_END = "Type how a text begins. Ctrl-C ends what follows, Ctrl-D the program."
HELP = """\
/reset          forget what was said
/save FILE      write the conversation as a line of .jsonl, which --train reads
/temperature X  0: always the likeliest word; higher: more varied
/help           this list"""


def converse(writer: Writer, temperature: float) -> int:
    """Hold a conversation, or with a model without a chat template continue what is typed.

    Returns the exit status, at the end of input or when Ctrl-C ends it.
    """
    writer.stop.restore()  # each answer has a StopRequest of its own
    if writer.template is not None:
        return Conversation(writer, temperature).run()
    train = DATA_DIR / "chat-train.jsonl"
    words = ["--option", "finetune"]
    for name in ("save_dir", "pretrained_model_path"):  # of the two the second is what is used
        if name in writer.options.given:
            words[2:] = ["--pretrained_model_path", getattr(writer.options, name)]
    here = Path.cwd()
    words += ["--train", train.relative_to(here) if train.is_relative_to(here) else train]
    print(f"This model continues texts. To converse: {launch_command(own_script(), *words)}")
    print(HOW_TO_END)
    typed = TypedLines()
    for line in typed:
        with StopRequest(silent=True).listening() as stop:
            dataclasses.replace(writer, stop=stop).continue_texts([line], temperature)
        if stop.requested and stop.signal_number != signal.SIGINT:
            return stop.exit_status
    return typed.status


class TypedLines:
    """What is typed, line by line: to the end of input, or to the second Ctrl-C in a row."""

    def __init__(self) -> None:
        self.status = 0  # the exit status when they have ended
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # Windows' console edits lines by itself
                importlib.import_module("readline")  # from here on input() edits, with a history
        if isinstance(sys.stdin, io.TextIOWrapper):  # else one strange byte would end it all
            sys.stdin.reconfigure(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        warned = False
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if warned:
                    print()
                    self.status = 130
                    return
                print("\n(Ctrl-C once more, or Ctrl-D, ends the conversation)")
                warned = True
                continue
            warned = False
            whole = line.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if whole != line:
                told = f"note: not in {sys.stdin.encoding}, the terminal's encoding: {whole}"
                print(told, file=sys.stderr)
            yield whole


class Conversation:
    """Questions and answers, each behind those before it."""

    def __init__(self, writer: Writer, temperature: float) -> None:
        self.writer, self.temperature = writer, temperature
        self.history: list[Exchange] = []
        self.forgotten = 0  # exchanges at the beginning that the context has no room for
        self.asked = 0  # questions, whose number seeds the answer

    def run(self) -> int:
        """Converse until the input ends; returns the exit status. Ctrl-C ends an answer."""
        say(GREETING)
        typed = TypedLines()
        for line in map(str.strip, typed):
            if line.startswith("/"):
                print(self.command(line))
            elif line and (status := self.ask(line)):
                return status
        return typed.status

    def ask(self, question: str) -> int:
        """Answer a question; returns the exit status to end the conversation with, else 0."""
        row = self._row(question)
        room = self.writer.llama.config.max_seq_len - len(row.prompt_ids)
        if room < 1:
            print(f"(a question of {len(row.prompt_ids):,} tokens, more than the model can read)")
            return 0
        options = self.writer.options
        typed = "max_new_tokens" in options.given
        with StopRequest(silent=True).listening() as stop:
            self.writer.write(
                [row],
                self.temperature,
                seeds=[options.seed + self.asked],
                max_new_tokens=min(room, options.max_new_tokens) if typed else room,
                prefix="",
                stop=stop,
            )
        self.asked += 1
        if row.text:
            self.history.append((question, row.text.strip()))
        return stop.exit_status if stop.requested and stop.signal_number != signal.SIGINT else 0

    def _row(self, question: str) -> Continuation:
        """The question behind as much of the history as leaves room for an answer."""
        context = self.writer.llama.config.max_seq_len
        room = context - min(self.writer.options.max_new_tokens, context // 2)
        forgotten_before = self.forgotten
        while True:
            kept = self.history[self.forgotten :]
            row = self.writer.row(question, kept)
            if len(row.prompt_ids) <= room or not kept:
                break
            self.forgotten += 1
        if self.forgotten and not forgotten_before:
            print("(the context is full: from here on the oldest questions are forgotten)")
        return row

    def command(self, line: str) -> str:
        """Carry out a line that begins with /; returns what to print."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/reset":
            self.history, self.forgotten = [], 0
            return "(a new conversation)"
        if name == "/temperature":
            try:
                self.temperature = number_reader(float, at_least=0)(argument)
            except argparse.ArgumentTypeError as error:
                return f"/temperature {error}"
            return f"(temperature {self.temperature:g})"
        if name == "/save":
            return self._save(argument)
        return HELP if name == "/help" else f"{name}: no such command; /help lists them"

    def _save(self, name: str) -> str:
        if not name:
            return "/save needs FILE"
        if not self.history:
            return "(nothing has been said that could be saved)"
        path = Path(name)
        turns = [
            {"role": role, "content": text}
            for exchange in self.history
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
        try:  # a name may be too long even to be looked for
            if path.exists():
                return f"/save {name}: is there already; name a new file"
            write_text(path, json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")
        except OSError as error:
            return f"/save {name}: {error.strerror or error}"
        except ValueError as error:  # a NUL, or what is not UTF-8
            return f"/save {printable(name)}: {error}; name another file"
        return f"(wrote {path})"
