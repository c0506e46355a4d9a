"""What the command lines share: one-line errors, bounded numbers, flags from a dataclass.

Imports no torch, so that `--help` and bad flags are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, TypeVar

from minllama import COMMANDS, ROOT
from minllama.cli.chinese import read_language, translate
from minllama.system.errors import UsageError

Parsed = TypeVar("Parsed")
# All control characters but line ends and tabs, and what stands for bytes that are no text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
UNTYPABLE = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte
LONGEST, LAST = 2000, 500  # characters of an error's line, of which the last hold the remedy
PATH_BYTES, NAME_CHARS = 4096, 255  # of a path and of each name in it: the highest limits known
BOUNDS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}


class OneLineParser(argparse.ArgumentParser):
    """argparse that raises UsageError, without its usage, and accepts `-` for `_` in flags."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        read_language(words)  # what is wrong with these words is said in it
        for word in words:  # up to Python 3.12 argparse makes an empty list of this value
            if re.fullmatch(r"--\w+=--", word):
                self.error(f"{word}: -- is no value; a path of that name is ./--")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def with_underscores(word: str) -> str:
    """`--save-dir=x` as `--save_dir=x`: both spellings are accepted on the command line."""
    return re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)


def number_reader(kind: type, **bounds: float) -> Callable[[str], Any]:
    """A `type` for argparse: a finite int or float within bounds, which are named as in BOUNDS."""
    noun = "a whole number" if kind is int else "a number"

    def read(text: str) -> Any:
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            glued = re.match(r".+?(--\w.*)", text)  # 6--epochs
            remedy = f"; a space is missing before {glued[1]}" if glued else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}{remedy}") from None
        for name, bound in bounds.items():
            if not BOUNDS[name](value, bound):
                words = name.replace("_", " ")
                raise argparse.ArgumentTypeError(f"{text} must be {words} {bound:g}")
        return value

    return read


def read_words(text: str) -> str:
    """A `type` for argparse: text such as a command line can hold, and a path can be."""
    if UNTYPABLE.search(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} holds a NUL or half a character")
    return text


def read_path(text: str) -> Path:
    """A `type` for argparse: a path that a file system could have."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path")
    path = Path(read_words(text))
    if has_line_break(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} has a line break in its name: rename it")
    size = len(text.encode("utf-8", "surrogateescape"))
    if size > PATH_BYTES or max(map(len, path.parts), default=0) > NAME_CHARS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}...: is too long for a path")
    return path


def has_line_break(path: str | Path) -> bool:
    """Whether a path's name, printed, would begin a line that looks like one of the program's."""
    return re.search("[\r\n]", str(path)) is not None


READ = {str: read_words, Path: read_path}

# ---------------------------------------------------------------------------- a table of flags


def section(
    title: str, *read_by: str, on_resume: Literal["stored", "typed"] = "stored"
) -> Callable[..., Any]:
    """Begin or continue a section of the table: returns `flag`, which makes each row's field.

    `read_by` are the values of --option that read these flags; on a resume their value is the one
    that the checkpoint stored, or the one that is typed.
    """

    def flag(
        default: Any,
        help: str,
        *,
        many: bool = False,  # takes several values at once, else the flag is repeated
        metavar: str | None = None,
        alone: str | None = None,  # what the flag means when it is typed without a value
        instead: str | None = None,  # the flag that the other options have for the same thing
        **bounds: float,
    ) -> Any:
        row = dict(help=help, many=many, metavar=metavar, alone=alone, instead=instead)
        shared = dict(section=title, read_by=read_by, on_resume=on_resume)
        return dataclasses.field(default=default, metadata=row | shared | {"bounds": bounds})

    return flag


def flags_of(table: type) -> dict[str, dataclasses.Field]:
    """The flags in a table by name; the type of each is resolved, and without `| None`."""
    fields = {f.name: f for f in dataclasses.fields(table) if "help" in f.metadata}
    hints = typing.get_type_hints(table)
    for name, field in fields.items():
        kinds = typing.get_args(hints[name])
        field.type = kinds[0] if type(None) in kinds else hints[name]
    return fields


def read_stored(field: dataclasses.Field, value: Any, *, where: str = "the checkpoint") -> Any:
    """A flag's value from `where` it is stored; UsageError for one that it could not have."""
    kind = field.type
    if value is None and field.default is None:
        return None
    if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    if kind == tuple[float, ...] and isinstance(value, list):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return tuple(map(number_reader(float, **field.metadata["bounds"]), map(repr, value)))
    elif typing.get_origin(kind) is tuple and isinstance(value, list):
        if all(isinstance(item, str) and not UNTYPABLE.search(item) for item in value):
            return tuple(value)
    elif kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return number_reader(kind, **field.metadata["bounds"])(repr(value))
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind in (str, Path) and isinstance(value, str):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return READ[kind](value)
    raise UsageError(f"{where}'s --{field.name} is {str(value)[:80]!r}: it is damaged")


def add_flag(group: Any, field: dataclasses.Field, *, shown: bool = True) -> None:
    """Add a row of the table to an argparse group; a flag that is not shown has no help."""
    kind, metadata = field.type, field.metadata
    default = "" if field.default in (None, (), False) else f" (default: {field.default})"
    text = metadata["help"] + default if shown else argparse.SUPPRESS
    settings = {"default": field.default, "help": text}
    if kind is bool:
        settings["action"] = "store_true"
    elif typing.get_origin(kind) is Literal:
        settings["choices"] = typing.get_args(kind)
    elif typing.get_origin(kind) is tuple:
        settings |= {"nargs": "+"} if metadata["many"] else {"action": "append"}
        numeric = typing.get_args(kind)[0] is float
        read = number_reader(float, **metadata["bounds"]) if numeric else read_words
        # Without a default, to which argparse would append.
        settings |= {"metavar": metadata["metavar"] or "PATH", "default": None, "type": read}
    else:
        numeric = kind in (int, float)
        words = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
        settings["metavar"] = metadata["metavar"] or words[kind]
        settings["type"] = number_reader(kind, **metadata["bounds"]) if numeric else READ[kind]
    if metadata["alone"]:
        settings |= {"nargs": "?", "const": metadata["alone"]}
    group.add_argument(f"--{field.name}", **settings)


# ---------------------------------------------------------------------------- for scripts


def parse_or_exit(
    parse: Callable[[Sequence[str]], Parsed], program: str, arguments: Sequence[str]
) -> Parsed:
    """The parsed command line; for a bad one, a line per problem and exit status 2.

    Scripts call this before they import torch. Under torchrun every process has the same command
    line, and rank 0 alone prints.
    """
    try:
        return parse(arguments)
    except UsageError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0":
            print_error(program, error)
        sys.exit(2)


def printable(text: str) -> str:
    """The text with control characters shown as escapes, for a terminal would obey them.

    Names of files, labels, and models' text may hold some; a name's byte that is no UTF-8, which
    Python reads as a surrogate, shows as `\\xb2`.
    """
    return CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    byte = _byte(match[0])
    return ascii(match[0])[1:-1] if byte is None else f"\\x{byte:02x}"


def protect_output() -> None:
    """Let no print end the program, nor control the terminal that it goes to.

    What cannot be written is dropped: a closed pipe, a full disk under a log, no terminal. All that
    is printed is made `printable`; characters that the terminal lacks show as `?`.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        else:
            stream.reconfigure(errors="replace")
            setattr(sys, name, _Droppable(stream))


class _Droppable:
    """A text stream whose failing writes are dropped; control characters are shown, not obeyed."""

    def __init__(self, stream: TextIO, show: Callable[[str], str] = printable) -> None:
        self.stream, self.show = stream, show

    def __eq__(self, other: object) -> bool:  # as tqdm asks whether its bar is where one prints
        return isinstance(other, _Droppable) and self.stream is other.stream

    def __hash__(self) -> int:
        return hash(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        self._try(self.stream.write, self.show(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is buffered."""
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:  # the rest of the buffer would fail again at exit: drop it as well
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), self.stream.fileno())


def for_drawing(stream: TextIO) -> TextIO:
    """A protected stream as a progress bar needs it: its own control characters are obeyed."""
    return _Droppable(stream.stream, str) if isinstance(stream, _Droppable) else stream


def print_error(program: str, error: Exception | str) -> None:
    """Print each problem of the error on a line of its own, to stderr."""
    for line in str(error).split("\n"):
        line = printable(line)
        if len(line) > LONGEST:  # it quotes something endless; the remedy stands last
            line = f"{line[: LONGEST - LAST]} [{len(line) - LONGEST:,} more] {line[-LAST:]}"
        print(f"{program}: {translate(f'error: {line}', sys.stderr)}", file=sys.stderr)


def exit_status(program: str, work: Callable[[], int]) -> int:
    """What `work` returns; 2 after a line about bad input or a file, 130 after Ctrl-C."""
    try:
        return work()
    except UsageError as error:
        print_error(program, error)
    except OSError as error:
        print_error(program, describe_os_error(error))
    except KeyboardInterrupt:
        return 130
    return 2


def describe_os_error(error: OSError) -> str:
    """The file, where it is known, and what is wrong with it."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def quoted(*words: str | Path) -> str:
    """A command as it can be pasted into this system's shell, where it names the same files."""
    plain = [str(word) for word in words]
    if os.name == "nt":  # where nothing stands for a line's end, which would end the command
        return subprocess.list2cmdline([printable(" ".join(word.splitlines())) for word in plain])
    return " ".join(shlex.quote(word) if word.isprintable() else _in_octal(word) for word in plain)


def own_script(name: str = "run_llama.py") -> Path:
    """A script of this program, as it is named in a command to type.

    Beside the one that runs; where that is the user's own, which imports this, where it is.
    """
    running = Path(sys.argv[0])
    if running.name in COMMANDS:
        return running.with_name(name)
    return Path(name) if Path.cwd() == ROOT else ROOT / name


def launch_command(
    script: str | Path, *words: str | Path, processes: int = 1, machines: int = 1
) -> str:
    """A command that starts a script of this program, several processes of it with torchrun.

    Of several machines it is typed on each; HOST is for the user to fill in.
    """
    launcher = ["python"]
    if machines > 1:
        launcher = ["torchrun", f"--nnodes={machines}", f"--nproc_per_node={processes // machines}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=HOST:29400"]
    elif processes > 1:
        launcher = ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
    return quoted(*launcher, script, *words)


def _in_octal(word: str) -> str:
    """A word in which control characters and bytes are octal, as bash and zsh read it."""

    def escape(character: str) -> str:
        if character.isprintable():
            return f"\\{character}" if character in "\\'" else character
        byte = _byte(character)
        data = character.encode("utf-8", "replace") if byte is None else bytes([byte])
        return "".join(f"\\{value:03o}" for value in data)

    return f"$'{''.join(map(escape, word))}'"


def _byte(character: str) -> int | None:
    """The byte of a name that is no UTF-8 for which a surrogate stands; None for other ones."""
    return ord(character) - 0xDC00 if "\udc80" <= character <= "\udcff" else None
