"""The ways in which a command ends early; each message is for the user."""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input: what was given, where, and the remedy; a line per problem. Exit status 2."""


class RunFailed(Exception):
    """A run that cannot continue, though its input was good. Exit status 1."""


class TextLost(RunFailed):
    """The text can no longer be read; what was trained so far can be saved."""


class Interrupted(Exception):
    """The user asked to stop while there was nothing to save; no partial file is left."""
