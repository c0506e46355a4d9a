"""The text that a model was trained on before, measured while it learns another: it may forget it.

Known by the record of the run that the model is of, and believed only where what was held out of
it is still the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from config import DATA_DIR, FLAGS, READING_FLAGS, Options, fingerprint
from minllama.cli.command_line import read_stored
from minllama.cli.console import say
from minllama.inference.evaluation import perplexity
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError
from minllama.system.files import real_path
from minllama.text.corpus import EMBEDDED_TEXTS, TextFiles, Texts, find_texts, load_held_out
from minllama.text.stream import TokenStream
from minllama.text.token_cache import is_cached
from minllama.training.run import Run
from utils import PretrainDataset

OLD_LOSS, OLD_PERPLEXITY = "old_val_loss", "old_val_perplexity"  # of it, in a record
HELD_OUT_KEY = "held_out_key"  # in run.json: the fingerprint of the held-out tokens
LEAST_TOKENS = 8192  # to measure on, of as many as the new text's held-out part has
AFFORDABLE_BYTES = 1 << 20  # to tokenize, however small the new text is
FORGOTTEN = 1.02  # times its perplexity of before
HOW_READ = ("pretrain_data", "data_weights", "dedup", *READING_FLAGS)
HOW_HELD_OUT = ("val_data", "val_fraction", "val_tokens", "max_seq_len")


@dataclasses.dataclass(frozen=True)
class OldText:
    """What the earlier run held out of its text, as plain values that ranks can be sent."""

    key: str
    ids: np.ndarray  # (tokens,)
    sources: dict[str, int]
    options: Options  # how that run read its text

    @property
    def name(self) -> str:
        """The text as it was named."""
        return " ".join(self.options.pretrain_data) or "the embedded text"

    def dataset(self, texts: Texts) -> PretrainDataset:
        """Its chunks as the new text is cut, at most about as many."""
        stream = TokenStream(self.ids, np.array([0]), np.array([len(self.ids)]))
        whole = PretrainDataset(
            stream, texts.context, tokenizer=texts.tokenizer, sources=self.sources
        )
        most = len(texts.val.stream) if texts.val else 0
        return whole.cut(texts.context, max(LEAST_TOKENS, most))


def held_out_key(dataset: PretrainDataset | None) -> str | None:
    """The fingerprint of a held-out text's tokens."""
    if dataset is None:
        return None
    ids = dataset.stream.read(0, len(dataset.stream)).astype("<u4")
    return fingerprint(ids.tobytes() + repr([*dataset.sources.values()]).encode())


def find_old_text(run: Run, texts: Texts) -> OldText | None:
    """The text of the run whose model this one goes on from, if it is another one than `texts`.

    Says why where it cannot be measured. Every rank must call this.
    """

    def find() -> OldText | str | None:
        try:
            return read_old_text(run, texts)
        except UsageError as error:
            return str(error).split("\n")[0]

    found = run.ranks.on_main(find)
    if not isinstance(found, str):
        return found
    say(f"old text     not measured by itself: {found}")
    return None


def read_old_text(run: Run, texts: Texts) -> OldText | None:
    """Of `find_old_text`; raises UsageError where there is one and it cannot be measured."""
    record = record_of(run.options.pretrained_model_path)
    if record is None:
        return None
    folder, start = record
    stored, data = start.get("options"), start.get("data")
    if not isinstance(stored, dict) or not isinstance(data, dict):
        raise UsageError(f"{folder.file('run.json')} does not say which text it was")
    key = data.get(HELD_OUT_KEY)
    if data.get("held_out") is None or key == held_out_key(texts.val):
        return None  # nothing was held out, or it is the same text
    if not isinstance(key, str):
        raise UsageError(f"{folder.file('run.json')} is of an earlier version, without its key")
    if data.get("vocabulary") != texts.tokenizer.fingerprint:
        raise UsageError(f"{folder.file('run.json')} is of a model with another vocabulary")
    where = str(folder.file("run.json"))
    flags = [name for name in (*HOW_READ, *HOW_HELD_OUT) if name in stored]
    values = {flag: read_stored(FLAGS[flag], stored[flag], where=where) for flag in flags}
    options = dataclasses.replace(Options(), cache_dir=run.options.cache_dir, **values)
    earlier = run.checkpoint and run.checkpoint["progress"].get("old_text")
    if run.checkpoint is not None and earlier != key:
        raise UsageError("it was not when this run began, or it is another one now")
    if options.max_seq_len is None:
        raise UsageError(f"{where} does not say how it was held out")
    with contextlib.redirect_stdout(io.StringIO()):
        files = find_texts(options)
    trained = {*map(real_path, texts.files)}
    if trained.issuperset(map(real_path, files.train)):
        raise UsageError("its files are among those to train on")
    if not trained.isdisjoint(map(real_path, files.val)):
        raise UsageError("what was held out of it is trained on now")
    check_is_affordable(files, texts, options)
    with contextlib.redirect_stdout(io.StringIO()):
        held_out = load_held_out(options, files, texts.tokenizer, stop=run.stop)
    if held_out is None or held_out_key(held_out) != key:
        raise UsageError(f"{' '.join(options.pretrain_data) or 'it'} has changed since")
    ids = held_out.stream.read(0, len(held_out.stream))
    return OldText(key, ids, held_out.sources, options)


def record_of(model: Path | None) -> tuple[RunFolder, dict[str, Any]] | None:
    """The run's folder, and its last start, that a model file or folder is of, if any is."""
    if model is None:
        return None
    folder = RunFolder(model if model.is_dir() else model.parent, "pretrain")
    if not model.is_dir() and real_path(model) not in map(real_path, folder.own_files()):
        return None
    starts = folder.starts()
    return (folder, starts[-1]) if starts else None


def check_is_affordable(files: TextFiles, texts: Texts, options: Options) -> None:
    """Raise UsageError where the old text would have to be tokenized, and is the larger one."""
    needed = files.val or files.train
    if is_cached(needed, texts.tokenizer, files.reading, options.cache_dir):
        return
    size = sum(path.stat().st_size for path in needed)
    if size > max(AFFORDABLE_BYTES, sum(path.stat().st_size for path in texts.files)):
        raise UsageError(
            f"--cache_dir {options.cache_dir} has no tokens of it, and making them again would "
            "take longer than those of the text to train on"
        )


# ---------------------------------------------------------------------------- what is said of it


def verdict_on_old_text(before: float, now: float) -> tuple[str, bool]:
    """What became of the old text, by the losses of its held-out part; whether it is forgotten."""
    forgets = now - before > math.log(FORGOTTEN)
    what = "it forgets; mix the old text in" if forgets else "it does not forget"
    figures = f"perplexity {_shown(before)} before, {_shown(now)} now"
    return f"{figures}: {what}", forgets


def _shown(loss: float) -> str:
    value = perplexity(loss)
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def mixed_in(old: Options, new: Options) -> dict[str, Any] | None:
    """The options of a run that reads as much of the old text as of the new.

    None where the two are read in different ways, which one run cannot, or have the same names.
    """
    if any(getattr(old, name) != getattr(new, name) for name in READING_FLAGS):
        return None
    embedded = tuple(str(DATA_DIR / name) for name in EMBEDDED_TEXTS)
    texts = new.pretrain_data or embedded
    added = [name for name in old.pretrain_data or embedded if name not in texts]
    if not added:
        return None
    weights = new.data_weights or (1.0,) * len(texts)
    share = sum(weights) / len(added)
    return {
        "pretrain_data": [*added, *texts],
        "data_weights": [*(share,) * len(added), *weights],
    }
