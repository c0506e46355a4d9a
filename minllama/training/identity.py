"""What a resumed run must share with its first one, and every rank with the others."""

from __future__ import annotations

from typing import Any

from minllama.machine.ranks import Ranks
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError

# Names of what is compared, as checkpoints have them.
TEXT = "--pretrain_data, --tokenizer_model or how the text is read: key"
DATA_WEIGHTS = "--data_weights"  # of a run without any it is not there
TEXT_TOKENS = "training tokens (--val_fraction, --val_data)"
CHUNK_ORDER = "the order of the text's chunks (of another version of this program)"
GLOBAL_BATCH = (
    "--global_batch_size (--pretrain_batch_size or --batch_size x --gradient_accumulation_steps x "
    "processes)"
)
# What runs were before there was a choice, and their checkpoints do not say.
EARLIER_DEFAULTS = {CHUNK_ORDER: 1, "--pooling": "last"}


def check_identity(earlier: dict[str, Any], identity: dict[str, Any], folder: RunFolder) -> None:
    """Raise UsageError, a line for each thing in which a run differs from its checkpoint.

    `folder` is the run's, whose models can be trained on with another text.
    """
    problems = []
    for name, value in identity.items():
        before = earlier.get(name, EARLIER_DEFAULTS.get(name))
        if before == value or (name == TEXT_TOKENS and problems):  # another text has other tokens
            continue
        if name == TEXT:
            models = [folder.file("best-model.pt"), *folder.checkpoints()]
            model = next((path for path in models if path.exists()), "FILE")
            problems.append(
                "the text, its vocabulary or how it is read has changed since the run was started "
                f"({TEXT} {value}, then {before}): give what it was, or train a model of it on "
                f"with this one: --pretrained_model_path {model} and another --save_dir"
            )
            continue
        if isinstance(value, dict) and isinstance(before, dict):  # a model's shape
            differs = [key for key in value if before.get(key) != value[key]]
            value = ", ".join(f"{key} {value[key]}" for key in differs)
            before = ", ".join(str(before.get(key)) for key in differs)
        problems.append(
            f"{name} {value} differs from the checkpoint's {before}: a run is resumed with what "
            "it was started with"
        )
    if problems:
        raise UsageError("\n".join(problems))


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
