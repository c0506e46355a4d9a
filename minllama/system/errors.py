"""The three ways in which a command ends early; each message is for the user."""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input: what was given, where, and the remedy. Exit status 2."""


class RunFailed(Exception):
    """A run that cannot continue, through no bad input: one line per problem. Exit status 1."""


class TextLost(RunFailed):
    """The text cannot be read any more; what was trained on it can be saved."""


class Interrupted(Exception):
    """The user asked to stop while there was nothing to save; no half-made file is left."""
