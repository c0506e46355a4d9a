"""Which model to use, and the vocabulary that belongs to it: a model is never used with another."""

from __future__ import annotations

from pathlib import Path

import torch

from config import SHIPPED_MODEL, Options
from llama import Llama, load_pretrained
from minllama.checkpoint import STATE_FILE
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

    Of a run's folder that is final-model.pt, else best-model.pt if there is exactly one. Raises
    UsageError where there is none or more.
    """
    path = options.pretrained_model_path
    if path is None:
        defaults = (Path("checkpoints/final-model.pt"), Path("stories42M.pt"), SHIPPED_MODEL)
        path = next((path for path in defaults if path.exists()), SHIPPED_MODEL)
        print(f"--pretrained_model_path is not given: using {path}")
        return path
    files = sorted(path.glob("*.pt"))
    if (path / STATE_FILE).is_file():
        raise UsageError(
            f"{path}: is a sharded checkpoint: resume it (--resume {path}, one process is enough) "
            "to get final-model.pt"
        )
    if not files or (path / "config.json").is_file():  # a file, or Hugging Face's folder
        return path
    final = [file for file in files if file.name == "final-model.pt"]
    best = [file for file in files if file.name.endswith("best-model.pt")]
    found = final or best
    if len(found) != 1:
        named = ", ".join(str(file) for file in (best or files)[:SHOWN_FILES])
        raise UsageError(f"--pretrained_model_path {path}: is a folder; name one of {named}")
    print(f"--pretrained_model_path {path} is a folder: using {found[0]}")
    return found[0]


def find_vocabulary(llama: Llama, path: Path, options: Options) -> Tokenizer:
    """The vocabulary of a loaded model: its own; files without one take a file of the same size.

    Raises UsageError, naming both fingerprints or sizes, for a vocabulary that is not the model's.
    """
    given, size = options.tokenizer_model, llama.config.vocab_size
    if llama.vocabulary is not None:
        tokenizer = Tokenizer(tokenizer_model=llama.vocabulary)
        named = tokenizer if given is None else Tokenizer(tokenizer_model=given)
        if named.fingerprint != tokenizer.fingerprint:
            raise UsageError(
                f"--tokenizer_model {given} has the fingerprint {named.fingerprint}, and {path} "
                f"was trained with {tokenizer.fingerprint}: leave the flag out"
            )
        if tokenizer.n_words != size:
            raise UsageError(
                f"{path}: the vocabulary in it has {tokenizer.n_words:,} pieces and the model "
                f"{size:,}: they do not belong together: the file is damaged"
            )
        return tokenizer
    beside = Path("tokenizer.model")
    if given is None and not beside.exists():
        raise UsageError(f"{path} carries no vocabulary: {vocabulary_remedy(size)}")
    tokenizer = Tokenizer(tokenizer_model=given or beside)
    if tokenizer.n_words != size:
        raise UsageError(
            f"--tokenizer_model {given or beside} has {tokenizer.n_words:,} pieces (fingerprint "
            f"{tokenizer.fingerprint}) and {path} was trained with {size:,}: name the vocabulary "
            "it was trained with"
        )
    return tokenizer
