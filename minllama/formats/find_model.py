"""Which model to use, and the vocabulary that belongs to it: a model is never used with another."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from config import SHIPPED_MODEL, LlamaConfig, Options
from llama import Llama, build_model, load_pretrained
from minllama.cli.console import say
from minllama.formats import litgpt, peft
from minllama.formats.model_file import read_model
from minllama.formats.pt_file import STATE_FILE, load_pt
from minllama.formats.pt_model import CONSOLIDATED, read_vocabulary
from minllama.formats.stored_model import StoredModel, read_shape
from minllama.machine.ranks import Ranks
from minllama.system.errors import UsageError
from minllama.system.files import read_json_object
from minllama.text.find_files import SHOWN_FILES, download_hint
from tokenizer import Tokenizer, tokenizer_of, vocabulary_remedy


def load_model(options: Options, device: torch.device) -> tuple[Llama, Tokenizer]:
    """The model that the options mean, in float32 and eval mode on the device, with its vocabulary.

    Raises UsageError.
    """
    path = find_model(options)
    llama = load_pretrained(path)
    tokenizer = find_vocabulary(llama, path, options)
    llama.vocabulary = tokenizer.model_bytes
    return llama.to(device), tokenizer


def find_model(options: Options) -> Path:
    """The model file or folder to use: as named, that of a --save_dir typed, or the first default.

    Says which, where that is not what was typed. Raises UsageError.
    """
    path, run = options.pretrained_model_path, options.save_dir
    if path is not None:
        file = model_in(path, "--pretrained_model_path")
        if file != path:
            say(f"--pretrained_model_path {path} is a folder: using {file}")
        elif file.name == MODELS[0] and (pretraining_result(file.parent) or file) != file:
            better = pretraining_result(file.parent)
            say(f"note: {file} is the end of a run that was overfitted; its result is {better}")
        return file
    if options.interactive and options.option == "generate":
        chat_model = newest_chat_model(run)
        if chat_model is not None:
            which = f"using {chat_model}, which is for dialogues"
            say(f"--pretrained_model_path is not given: {which}")
            return chat_model
    if is_named(options):
        file = pretrained_in(run) or model_in(run, "--save_dir")
        say(f"--pretrained_model_path is not given: using --save_dir's {file}")
        return file
    path, *earlier = finished_pretrainings()[::-1] or [Path("stories42M.pt")]
    path = path if path.exists() else SHIPPED_MODEL
    last = f", of the last pretraining here; before it came {_listed(earlier, 3)}"
    say(f"--pretrained_model_path is not given: using {path}{last if earlier else ''}")
    return path


def is_named(options: Options) -> bool:
    """Whether the model is one that the user named, by its path or by a run's folder."""
    if "pretrained_model_path" in options.given:
        return True
    finetune = options.option == "finetune"  # its own models may be in its folder, or will be
    return "save_dir" in options.given and not (finetune and not pretrained_in(options.save_dir))


# Of a pretraining. Which is its result, the last or the one before it was overfitted, its run.json
# says; of runs that do not, it is the first of these.
MODELS = ("final-model.pt", "best-model.pt")


def pretraining_result(folder: Path) -> Path | None:
    """The model that the record of a pretraining in this folder names as its result, if any."""
    with contextlib.suppress(UsageError):
        name = read_json_object(folder / "run.json").get("result")
        if name in MODELS and (folder / name).is_file():
            return folder / name
    return None


def pretrained_in(folder: Path) -> Path | None:
    """The model that a pretraining left in its folder, if it did."""
    models = (folder / name for name in MODELS)
    return pretraining_result(folder) or next((path for path in models if path.is_file()), None)


def folders_with(name: str) -> set[Path]:
    """Of this folder and those up to two levels below the ones that have a file of this name."""
    return {path.parent for depth in ("", "*/", "*/*/") for path in Path().glob(depth + name)}


def finished_pretrainings() -> list[Path]:
    """The results of the pretrainings that ended in this folder, or two levels below; last last."""
    folders = folders_with("run.json") | {Path("checkpoints")}
    ended = {}
    for final in (folder / MODELS[0] for folder in sorted(folders)):
        with contextlib.suppress(OSError):  # of a run without one, or that is being removed
            ended[final] = final.stat().st_mtime
    return [pretraining_result(path.parent) or path for path in sorted(ended, key=ended.get)]


def newest_chat_model(folder: Path) -> Path | None:
    """The last model that was trained on dialogues in a run's folder, if any was."""
    models = sorted(folder.glob("finetune-*best-model.pt"), key=lambda path: -path.stat().st_mtime)
    for path in models:
        with contextlib.suppress(UsageError):  # it is read again and complained of when it is used
            if "chat_template" in load_pt(path, verify=False):
                return path
    return None


def model_in(path: Path, flag: str) -> Path:
    """A model file, a Hugging Face folder, or the model file in a run's folder.

    Of a run's folder that is the result of its pretraining, else final-model.pt, else the one
    best-model.pt, else the one checkpoint.
    Raises UsageError that names `flag` and what there is instead.
    """
    if not path.exists():
        raise UsageError(f"{flag} {path}: no such file or folder{_models_nearby(path)}")
    # Hugging Face's, Meta's, litgpt's, PEFT's, and this program's own that are sharded.
    of_folders = ("config.json", CONSOLIDATED, litgpt.WEIGHTS, peft.SHAPE, STATE_FILE)
    if path.is_file() or any((path / name).is_file() for name in of_folders):
        return path  # of a sharded checkpoint, its reader says what to do
    files = sorted(path.glob("*.pt"))
    if not files:
        raise UsageError(f"{flag} {path}: the folder holds no model{_models_nearby(path)}")
    final = [file for file in files if file.name == "final-model.pt"]
    best = [file for file in files if file.name.endswith("best-model.pt")]
    if result := pretraining_result(path):
        return result
    models = final or best or files
    if len(models) != 1:
        raise UsageError(f"{flag} {path}: is a folder; name one of {_listed(models)}")
    return models[0]


def _models_nearby(path: Path) -> str:
    """What to add to the message of a model that is not there: which models are, near by."""
    if hint := download_hint(path):
        return hint
    folder = path if path.is_dir() else path.parent
    near = sorted(folder.glob("*.pt"))
    if not near:  # beside a folder whose name is mistyped, or that a run left elsewhere
        near = sorted({*folder.glob("*/*.pt"), *Path().glob("*.pt"), *Path().glob("*/*.pt")})
    models = [file for file in near if file.name.endswith("-model.pt")]
    return f"; there is {_listed(models or near)}" if near else ""


def _listed(files: Sequence[Path], most: int = SHOWN_FILES) -> str:
    more = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(map(str, files[:most])) + more


def find_vocabulary(model: Llama | StoredModel, path: Path, options: Options) -> Tokenizer:
    """The vocabulary of a model: its own; for files without one as named, or tokenizer.model.

    Raises UsageError for a vocabulary that is not the model's, and where there is none.
    """
    given, beside = options.tokenizer_model, Path("tokenizer.model")
    if model.vocabulary is None and given is None and beside.exists():
        given = beside
    tokenizer = own_or_given_vocabulary(model, path, given)
    if tokenizer is None:
        remedy = vocabulary_remedy(model.config.vocab_size)
        raise UsageError(f"{path} carries no vocabulary: {remedy}")
    return tokenizer


def own_or_given_vocabulary(
    model: Llama | StoredModel, path: Path, given: Path | None
) -> Tokenizer | None:
    """The vocabulary in the model's file, else the one given; None for neither.

    Raises UsageError, naming both fingerprints or sizes, for a vocabulary that is not the model's.
    """
    size = model.config.vocab_size
    named = None if given is None else Tokenizer(tokenizer_model=given)
    if model.vocabulary is None:
        if named is not None and named.n_words != size:
            raise UsageError(
                f"--tokenizer_model {given} has {named.n_words:,} pieces (fingerprint "
                f"{named.fingerprint}) and {path} was trained with {size:,}: name the vocabulary "
                "it was trained with"
            )
        return named
    tokenizer = tokenizer_of(model, path)
    if named is not None and named.fingerprint != tokenizer.fingerprint:
        raise UsageError(
            f"--tokenizer_model {given} has the fingerprint {named.fingerprint}, and {path} "
            f"was trained with {tokenizer.fingerprint}: leave the flag out"
        )
    return tokenizer


# ---------------------------------------------------------------------------- a pretraining's start

STARTING_WEIGHTS = "--pretrained_model_path: SHA-256 of its weights"  # in a run's identity


class Start(NamedTuple):
    """What a pretraining is initialised from."""

    config: LlamaConfig
    tokenizer: Tokenizer
    weights: str  # their fingerprint
    # With those weights on rank 0, on `meta` elsewhere. None: a resumed run's checkpoint has later
    # ones.
    model: Llama | None


def find_start_model(
    options: Options, checkpoint: dict[str, Any] | None, ranks: Ranks
) -> tuple[Options, Start | None]:
    """The shape, vocabulary and weights to pretrain from, and the options that suit them.

    Without --pretrained_model_path there are none: from scratch. Shape and vocabulary are the
    file's, and a larger --max_seq_len makes its context longer. A resumed run finds all of it in
    its `checkpoint`; a file that is named again is read to see that it is the one of before. Rank 0
    alone reads it; every rank must call this. Raises UsageError.
    """
    path = options.pretrained_model_path
    weights = checkpoint and checkpoint["identity"].get(STARTING_WEIGHTS)
    if path is None and weights is None:
        return options, None
    named = "pretrained_model_path" in options.given
    reads_file = weights is None or (named and ranks.on_main(path.exists))
    if reads_file:
        path = ranks.on_main(lambda: find_model(options))
        stored = ranks.on_main(
            lambda: read_model(path), tell=lambda stored: stored._replace(weights={})
        )
    else:
        path = Path("the checkpoint")
        config = read_shape(path, checkpoint.get("model_args"))
        stored = StoredModel(config, {}, read_vocabulary(path, checkpoint))
        if "tokenizer_model" not in options.given:  # its file, too, may be gone
            options = dataclasses.replace(options, tokenizer_model=None)
    options.check_shape(path, stored.config)
    tokenizer = find_vocabulary(stored, path, options)
    if checkpoint is None:
        options = options.with_recommended_lr(stored.config, continued=True)
    context = max(stored.config.max_seq_len, options.max_seq_len or 0)
    config = dataclasses.replace(stored.config, max_seq_len=context, dropout=options.dropout)

    def build() -> tuple[Llama | None, str]:
        built = build_model(stored._replace(config=config))
        return built, weights_fingerprint(built)

    model = None
    if reads_file:
        model, weights = ranks.on_main(build, tell=lambda built: (None, built[1]))
        if model is None:
            with torch.device("meta"):
                model = Llama(config)
            model.chat_template = stored.chat_template
        longer = f", made longer than its {stored.config.max_seq_len:,}"
        print(
            f"initialised from {path}, context {context:,}"
            f"{longer if context > stored.config.max_seq_len else ''}; learning rate up to "
            f"{options.peak_lr():g} (--pretrain_lr)"
        )
    return options, Start(config, tokenizer, weights, model)


def weights_fingerprint(model: Llama) -> str:
    """Names a model's weights, whatever format they were read from."""
    digest = hashlib.sha256()
    for parameter in model.parameters():  # in the order of the layers, what is tied once
        digest.update(parameter.detach().numpy())
    return digest.hexdigest()[:16]
