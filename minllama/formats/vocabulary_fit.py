"""Whether a model's vocabulary fits a text, and which of the models near by has one that does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from config import Options
from minllama.cli.console import say
from minllama.formats.find_model import MODELS, folders_with, is_named, pretrained_in
from minllama.formats.pt_file import load_pt
from minllama.formats.pt_model import read_vocabulary
from minllama.system.encodings import as_utf8
from minllama.system.errors import UsageError
from minllama.vocabulary.lost import SPACE, count_lost
from tokenizer import Tokenizer

MISFIT = 0.1  # of a text, from which on its vocabulary may have been made for another
MOSTLY = 0.5  # and from which on it was
SAMPLED_TEXTS, SAMPLED_CHARS = 400, 60_000  # looked at
TRIED_MODELS, NAMED_MODELS = 20, 3


def check_vocabulary(
    tokenizer: Tokenizer, texts: Sequence[str], options: Options, *, flag: str
) -> None:
    """See to it that the model's vocabulary fits the texts of `flag`.

    Where this one was chosen by default, raises UsageError that names better ones, or that there is
    none for a text that hardly fits; where the user named it, says so.
    """
    remedy = "--pretrained_model_path"
    is_default = not is_named(options)
    check_fit(tokenizer, texts, what=flag, remedy=remedy, is_default=is_default)


def check_fit(
    tokenizer: Tokenizer, texts: Iterable[str], *, what: str, remedy: str, is_default: bool
) -> None:
    """`check_vocabulary` of a text called `what`, where a model is named after `remedy`."""
    sample = sampled(texts)
    share = misfit(tokenizer, sample)
    if share <= MISFIT:
        return
    better = [(path, other) for path, other in models_here(sample) if other < share / 2]
    names = " or ".join(f"{remedy} {path} ({other:.0%})" for path, other in better[:NAMED_MODELS])
    none = "no model here has a better one: pretrain one on text with such characters"
    names = f"better of those here: {names}" if better else none
    problem = (
        f"{what}: {share:.0%} of the text has no pieces in the model's vocabulary, which was made "
        f"for other text; {names}"
    )
    # The rare characters of a large script may be a seventh of its own vocabulary's text.
    if not is_default or not (better or share > MOSTLY):
        say(f"warning: {problem}")
        return
    raise UsageError(f"{problem}; to use this one all the same name it: {remedy}")


def sampled(texts: Iterable[str]) -> list[str]:
    """Some of the texts, from all of a sequence evenly, each of them cut."""
    texts = texts if isinstance(texts, Sequence) else [*texts]
    chosen = texts[:: -(-len(texts) // SAMPLED_TEXTS) or 1]
    return [as_utf8(text[: SAMPLED_CHARS // len(chosen)]) for text in chosen]


def misfit(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """The share of texts that a vocabulary spells in parts of characters, or loses; 0 to 1."""
    ids = tokenizer.vocabulary.encode_many(texts)
    byte_share = tokenizer.byte_fallback_share(np.concatenate([np.zeros(0, int), *ids]))
    trial = count_lost(tokenizer.vocabulary, texts)
    lost = trial.lost.total() - trial.lost[SPACE]
    return max(byte_share, lost / max(1, trial.characters))


def models_here(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """The models of pretrainings here or two folders below, and the misfit of their vocabularies.

    Those that fit come first, of these the newest. Of the files the vocabulary alone is read.
    """
    folders = set().union(*map(folders_with, MODELS))
    models = {pretrained_in(folder) for folder in folders} - {None}
    shares, seen = [], {}
    with contextlib.suppress(OSError):  # of a file that is removed meanwhile
        models = sorted(models, key=lambda path: -path.stat().st_mtime)
    for path in [*models][:TRIED_MODELS]:
        with contextlib.suppress(UsageError):  # not one of this program
            content = read_vocabulary(path, load_pt(path, verify=False))
            if content is not None and content not in seen:
                seen[content] = misfit(Tokenizer(tokenizer_model=content), texts)
            if content is not None:
                shares.append((path, seen[content]))
    return sorted(shares, key=lambda model: max(MISFIT, model[1]))
