"""Packages that only some uses of the program need."""

from __future__ import annotations

import importlib
from types import ModuleType

from minllama.system.errors import UsageError


def import_optional(name: str, purpose: str) -> ModuleType:
    """An optional package or a module of it; UsageError says what to install where it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UsageError(f"{purpose} needs another package: pip install {package}") from None
