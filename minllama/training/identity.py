"""What a resumed run must share with its first one, and every rank with the others.

And how a model is trained on where a run cannot be: because its data changed, or because it ended.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from config import FLAGS, READERS, READING_FLAGS, Options
from minllama.cli.command_line import launch_command, own_script
from minllama.cli.config_file import recorded_words
from minllama.formats.find_model import pretraining_result
from minllama.machine.ranks import Ranks
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError
from minllama.system.files import real_path

# Names of what is compared, as checkpoints have them.
TEXT = "--pretrain_data, --tokenizer_model or how the text is read: key"
LABELLED = "--train"  # the file's fingerprint, of sentences or dialogues
DATA_WEIGHTS = "--data_weights"  # of a run without any it is not there
TEXT_TOKENS = "training tokens (--val_fraction, --val_data)"
DIALOGUES = "dialogues to train on (--dev, --val_fraction)"
SENTENCES_HELD_OUT = "sentences held out of --train (--dev, --val_fraction)"
FOLLOW_FROM_DATA = (TEXT, TEXT_TOKENS, LABELLED, DIALOGUES, SENTENCES_HELD_OUT)
CHUNK_ORDER = "the order of the text's chunks (of another version of this program)"
GLOBAL_BATCH = (
    "--global_batch_size (--pretrain_batch_size or --batch_size x --gradient_accumulation_steps x "
    "processes)"
)
# What runs were before there was a choice, and their checkpoints do not say.
EARLIER_DEFAULTS = {CHUNK_ORDER: 1, "--pooling": "last", SENTENCES_HELD_OUT: 0}
# The flags that say what a text is, and those with which a model is trained on.
TEXT_FLAGS = (
    *("pretrain_data", "data_weights", "val_data", "val_fraction", "dedup"),
    *READING_FLAGS,
)
LABELLED_FLAGS = ("train", "dev", "test", "label_names", "label_field", "skip_bad_lines")
TRAINED_ON_WITH = {*TEXT_FLAGS, *LABELLED_FLAGS, "document_mask", "cache_dir", "use_gpu"}


def check_identity(
    checkpoint: dict[str, Any],
    identity: dict[str, Any],
    *,
    options: Options,
    folder: RunFolder,
    ranks: Ranks,
) -> None:
    """Raise UsageError, a line for each thing in which a run differs from its checkpoint.

    Of another text it says what changed, and the command that trains the run's model on with it.
    """
    earlier, problems = checkpoint["identity"], []
    has_other_data = any(
        name in identity and earlier.get(name) != identity[name] for name in (TEXT, LABELLED)
    )
    if has_other_data:
        problems.append(
            f"{_describe_change(checkpoint, identity, options)}: a run is resumed with the data "
            "that it was started with. This trains its model on with what there is now: "
            f"{command_to_train_on(options, folder, ranks)}"
        )
    for name, value in identity.items():
        before = earlier.get(name, EARLIER_DEFAULTS.get(name))
        if before == value or (has_other_data and name in FOLLOW_FROM_DATA):
            continue
        if isinstance(value, dict) and isinstance(before, dict):  # a model's shape
            differs = [key for key in value if before.get(key) != value[key]]
            value = ", ".join(f"{key} {value[key]}" for key in differs)
            before = ", ".join(str(before.get(key)) for key in differs)
        remedy = "a run is resumed with what it was started with"
        if name in (CHUNK_ORDER, TEXT_TOKENS):  # another version's may differ, whatever the flags
            remedy += f". This trains its model on: {command_to_train_on(options, folder, ranks)}"
        problems.append(f"{name} {value} differs from the checkpoint's {before}: {remedy}")
    if problems:
        raise UsageError("\n".join(problems))


def _describe_change(checkpoint: dict[str, Any], identity: dict[str, Any], options: Options) -> str:
    """In words: which data changed, by how much, and which of its flags."""
    before, now = checkpoint.get("options", {}), options.to_plain()
    changed = [
        f"--{name} {_as_typed(now[name])} now, {_as_typed(before[name])} then"
        for name in (*TEXT_FLAGS, *LABELLED_FLAGS, "tokenizer_model")
        if name in before and before[name] != now[name]
    ]
    what = "the text" if TEXT in identity else f"--train {options.train}"
    for name, unit in ((TEXT_TOKENS, "tokens"), (DIALOGUES, "dialogues")):
        count, count_before = identity.get(name), checkpoint["identity"].get(name)
        if isinstance(count, int) and isinstance(count_before, int) and count != count_before:
            changed.insert(0, f"{count:,} {unit} to train on now, {count_before:,} then")
    return f"{what} has changed since the run was started" + (
        f" ({'; '.join(changed)})" if changed else ""
    )


def _as_typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def command_to_train_on(options: Options, folder: RunFolder, ranks: Ranks) -> str:
    """The command that trains a run's model on, with the data of `options`, in a new folder."""
    models = [folder.file(name) for name in ("best-model.pt", "final-model.pt")]
    models += [path for path in folder.checkpoints() if path.is_file()]
    result = pretraining_result(folder.path) if folder.prefix == "pretrain" else None
    model = result or next((path for path in models if path.is_file()), "FILE")
    lengths = {"epochs", "schedule_steps"} if options.minutes is None else {"minutes"}
    fields = {
        name: field
        for name, field in FLAGS.items()
        if options.option in READERS[name] and name in TRAINED_ON_WITH | lengths
    }
    words = recorded_words(options.to_plain(), fields, where="the run's flags")
    name = Path(real_path(folder.path)).name
    names = (folder.path.parent / f"{name}-{number}" for number in itertools.count(2))
    words += ["--save_dir", str(next(path for path in names if not path.exists()))]
    start = ["--option", options.option, "--pretrained_model_path", str(model)]
    launch = {"processes": ranks.world_size, "machines": ranks.nodes}
    return launch_command(own_script(), *start, *words, **launch)


def check_ranks_agree(identity: dict[str, Any], ranks: Ranks) -> None:
    """Raise UsageError where machines have other text or arithmetic: they would train apart.

    Every rank must call this.
    """
    identities = ranks.gather(identity)
    for rank, other in enumerate(identities):
        for name, value in other.items():
            if value != identities[0][name]:
                raise UsageError(
                    f"{name} is {value} on rank {rank} and {identities[0][name]} on rank 0: give "
                    "all machines the same files and flags"
                )
