"""Flags in files: a TOML file as words of a command line, a run's record as the command it was.

Knows a table of flags as dataclass fields and their types, and nothing of what they are for.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minllama.cli.command_line import read_stored, without_none
from minllama.system.errors import UsageError
from minllama.system.files import check_regular, read_bounded

TOML_BYTES = 1 << 20
Fields = Mapping[str, dataclasses.Field]


def toml_words(
    path: Path, fields: Fields, hints: Mapping[str, Any], *, without: Collection[str]
) -> list[str]:
    """The keys of a TOML file as words of a command line, less those `without`.

    Keys are flags without their hyphens. One that is no flag becomes a word, too, for the parser to
    refuse. Raises UsageError, naming the file and the key, for a value of another type.
    """
    try:
        check_regular(path)
        content = tomllib.loads(read_bounded(path, TOML_BYTES))
    except UsageError as error:
        raise UsageError(f"--config {error}") from None
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path}: not TOML ({error})") from None
    words = []
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in without:
            continue
        if name not in fields:
            words.append(f"--{name}")
            continue
        found = _words(name, value, fields[name], hints[name])
        if found is None:
            shown = "a table" if isinstance(value, dict) else repr(value)
            raise UsageError(f"--config {path}: {key} = {shown}: not a value of --{name}")
        words += found
    return words


def _words(name: str, value: Any, field: dataclasses.Field, annotation: Any) -> list[str] | None:
    """A value as it is typed; None for one of a type that the flag does not have."""
    kind, _ = without_none(annotation)
    if isinstance(value, bool):
        if kind is bool or (value and field.metadata["alone"]):
            return [f"--{name}"] * value
        return None
    values = value if isinstance(value, list) else [value]
    several = typing.get_origin(kind) is tuple
    typable = all(isinstance(v, str | int | float) and not isinstance(v, bool) for v in values)
    if kind is bool or not typable or (isinstance(value, list) and not several):
        return None
    if several and field.metadata["many"]:
        return [f"--{name}", *map(str, values)]
    return [f"--{name}={v}" for v in values]


def typed_words(
    stored: Mapping[str, Any], fields: Fields, hints: Mapping[str, Any], *, where: str
) -> list[str]:
    """The options that a run has on record as words of its command line; defaults are left out.

    Raises UsageError, naming `where` they are, for a value that a flag could not have.
    """
    words = []
    for name, field in fields.items():
        if name not in stored:
            continue
        value = read_stored(field, hints[name], stored[name], where=where)
        if value == field.default:
            continue
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, tuple) and field.metadata["many"]:
            words += [f"--{name}", *value]
        elif isinstance(value, tuple):
            words += [f"--{name}={text}" for text in value]
        elif str(value).startswith("-"):
            words.append(f"--{name}={value}")
        else:
            words += [f"--{name}", str(value)]
    return words
