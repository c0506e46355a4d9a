"""Flags from files as words of a command line: of a TOML file, and of a run's record.

Knows a table of flags as dataclass fields and their types, and nothing of what they are for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tomllib
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minllama.cli.command_line import read_stored
from minllama.system.errors import UsageError
from minllama.system.files import read_whole, real_path

# Of a TOML file: tomllib is quadratic in a key's parts, and argparse in flags.
TOML_BYTES, TOML_FLAGS = 1 << 14, 1000
Fields = Mapping[str, dataclasses.Field]
# Outputs, which replace the file that is there.
OUTPUTS = {"dev_out", "test_out"} | {f"generated_sentence_{n}_temp_out" for n in ("low", "high")}


def toml_words(path: Path, fields: Fields, *, without: Collection[str]) -> list[str]:
    """The keys of a TOML file, which are flags without hyphens, as words of a command line.

    Keys in `without` are left out; an unknown one becomes a word too, for the parser to refuse.
    Raises UsageError, naming file and key, for a value of a type that the flag does not have.
    """
    try:
        content = tomllib.loads(read_whole(path, TOML_BYTES).decode("utf-8-sig"))
        str(content)  # a ValueError for a number that is too long to be written
    except UsageError as error:
        raise UsageError(f"--config {error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path}: not TOML ({error})") from None
    words = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if isinstance(value, dict):
            raise UsageError(
                f"--config {path}: {key!r} is a table: flags stand outside of one, so leave its "
                "line in brackets out"
            )
        if name in without:
            continue
        if name not in fields:
            words.append(f"--{name}")
        elif can_be_typed(value, fields[name]):
            words += flag_words(fields[name], value)
        else:
            raise UsageError(f"--config {path}: {key} = {value!r}: not a value of --{name}")
    count = sum(word.startswith("--") for word in words)
    if count > TOML_FLAGS:
        raise UsageError(f"--config {path}: has {count:,} flags, more than {TOML_FLAGS:,}")
    return words


def check_harmless(words: Collection[str], path: Path, options: argparse.Namespace) -> None:
    """Raise UsageError where `words`, the flags in a file, would cost the user files of his own.

    Such a file may be somebody else's. It may write new files into the run's folder alone, and none
    over an earlier run's, unless the flag is typed. `options` are all flags' values.
    """
    flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    if "overwrite" in flags:
        raise UsageError(
            f"--config {path}: overwrite removes an earlier run's files: leave it out, and type "
            "--overwrite"
        )
    folder = Path(real_path(options.save_dir))
    goes_on = options.overwrite or (options.resume and "resume" not in flags)
    for name in sorted(flags & OUTPUTS):
        value = getattr(options, name)
        if folder not in Path(real_path(value)).parents:
            raise UsageError(
                f"--config {path}: {name} = {str(value)!r} is outside --save_dir "
                f"{options.save_dir}, where it may replace a file: type --{name}"
            )
        if os.path.lexists(value) and not goes_on:
            raise UsageError(
                f"--config {path}: {name} = {str(value)!r} would replace that file: type --{name}"
            )


def can_be_typed(value: Any, field: dataclasses.Field) -> bool:
    """Whether a TOML value has a type that the flag may have; the parser reads the value."""
    if isinstance(value, bool):
        return field.type is bool or bool(value and field.metadata["alone"])
    several = isinstance(value, list) and typing.get_origin(field.type) is tuple
    values = value if several else [value]
    if field.metadata["many"] and any(str(item).startswith("-") for item in values):
        return False  # a word of its own, which would be a flag
    return field.type is not bool and all(type(item) in (str, int, float) for item in values)


def recorded_words(stored: Mapping[str, Any], fields: Fields, *, where: str) -> list[str]:
    """The options that a run has on record as words of a command line; defaults are left out.

    Raises UsageError, naming `where` they are stored, for a value that a flag could not have.
    """
    words = []
    for name, field in fields.items():
        if name in stored:
            value = read_stored(field, stored[name], where=where)
            words += flag_words(field, value) if value != field.default else []
    return words


def flag_words(field: dataclasses.Field, value: Any) -> list[str]:
    """A flag with its value, or values, as they are typed."""
    flag, text = f"--{field.name}", _as_typed(value)
    if isinstance(value, bool):
        return [flag] * value
    if isinstance(value, list | tuple):
        if field.metadata["many"]:
            words = map(_as_typed, value)
            return [flag, *(f"./{word}" if word.startswith("-") else word for word in words)]
        return [word for item in value for word in flag_words(field, item)]
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _as_typed(value: Any) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
