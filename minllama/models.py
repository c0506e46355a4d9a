"""Which model to use, and the vocabulary that belongs to it: a model is never used with another."""

from __future__ import annotations

from pathlib import Path

import torch

from config import SHIPPED_MODEL, Options
from llama import Llama, load_pretrained
from minllama.errors import UsageError
from tokenizer import Tokenizer, vocabulary_remedy

SHOWN_FILES = 10  # of many, named one by one


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
    """The model file or folder to use, as named or the first default that is there; says which.

    Of a run's folder that is its model. Raises UsageError where it has several, or none.
    """
    path = options.pretrained_model_path
    if path is not None:
        of_a_run = path.is_dir() and not (path / "config.json").is_file()  # not Hugging Face's
        files = sorted(path.glob("*.pt")) if of_a_run else []
        return model_of_run(path, files) if files else path
    defaults = (Path("checkpoints/final-model.pt"), Path("stories42M.pt"), SHIPPED_MODEL)
    path = next((path for path in defaults if path.exists()), SHIPPED_MODEL)
    print(f"--pretrained_model_path is not given: using {path}")
    return path


def model_of_run(folder: Path, files: list[Path]) -> Path:
    """The final model among a run folder's .pt files, else the only best one; says which."""
    final = [path for path in files if path.name == "final-model.pt"]
    best = [path for path in files if path.name.endswith("best-model.pt")]
    found = final or best
    if len(found) != 1:
        named = ", ".join(str(path) for path in (best or files)[:SHOWN_FILES])
        raise UsageError(f"--pretrained_model_path {folder}: is a folder; name one of {named}")
    print(f"--pretrained_model_path {folder} is a folder: using {found[0]}")
    return found[0]


def find_vocabulary(llama: Llama, path: Path, options: Options) -> Tokenizer:
    """The vocabulary of a loaded model: its own; files without one take a file of the same size.

    Raises UsageError, naming both fingerprints or sizes, for a vocabulary that is not the model's.
    """
    given = options.tokenizer_model
    if llama.vocabulary is not None:
        tokenizer = Tokenizer(tokenizer_model=llama.vocabulary)
        if given is not None:
            named = Tokenizer(tokenizer_model=given)
            if named.fingerprint != tokenizer.fingerprint:
                raise UsageError(
                    f"--tokenizer_model {given} has the fingerprint {named.fingerprint}, and "
                    f"{path} was trained with {tokenizer.fingerprint}: leave the flag out"
                )
        if tokenizer.n_words != llama.config.vocab_size:
            raise UsageError(
                f"{path}: the vocabulary in it has {tokenizer.n_words:,} pieces and the model "
                f"{llama.config.vocab_size:,}: they do not belong together: the file is damaged"
            )
        return tokenizer
    beside = Path("tokenizer.model")
    if given is None and not beside.exists():
        raise UsageError(
            f"{path} carries no vocabulary: {vocabulary_remedy(llama.config.vocab_size)}"
        )
    tokenizer = Tokenizer(tokenizer_model=given or beside)
    if tokenizer.n_words != llama.config.vocab_size:
        raise UsageError(
            f"--tokenizer_model {given or beside} has {tokenizer.n_words:,} pieces (fingerprint "
            f"{tokenizer.fingerprint}) and {path} was trained with "
            f"{llama.config.vocab_size:,}: name the vocabulary it was trained with"
        )
    return tokenizer
