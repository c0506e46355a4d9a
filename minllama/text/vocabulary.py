"""The vocabulary of a pretraining: the one that was named, the stories' own, or one of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from config import Options
from minllama.cli.console import say
from minllama.machine.ranks import Ranks
from minllama.system.errors import UsageError
from minllama.system.files import check_writable, remove, remove_temporaries
from minllama.text.corpus import TextFiles
from minllama.text.reading import Reading
from minllama.text.token_cache import place_name, text_signature
from tokenizer import Tokenizer, train_vocabulary

SAMPLED_BYTES = 16 << 20  # of text to train on: more changes next to nothing


def choose_vocabulary(
    options: Options,
    files: TextFiles,
    *,
    stored: bytes | None,
    ranks: Ranks,
    check_stop: Callable[[], None] = lambda: None,
) -> Tokenizer:
    """The vocabulary to pretrain with; says which. Every rank must call this.

    That of `--tokenizer_model`; of a resumed run the one `stored` in its checkpoint; of the stories
    the embedded one; of other text one trained on it, kept in --cache_dir. Raises UsageError, and
    what `check_stop` raises.
    """
    if options.tokenizer_model is not None:
        model, source = options.tokenizer_model, options.tokenizer_model
    elif stored is not None:
        model, source = stored, "the checkpoint's"
    elif not options.pretrain_data:
        model, source = None, "the embedded one"
    else:
        model, path = ranks.on_main(
            lambda: _train_or_load(files.train, files.reading, options.cache_dir, check_stop)
        )
        source = f"trained on the text, in {path}"
    tokenizer = Tokenizer(tokenizer_model=model)
    say(f"vocabulary   {tokenizer.n_words:,} pieces: {source}")
    beside = Path("tokenizer.model")
    if beside.is_file() and Path(source) != beside:
        print(f"             {beside} is not used: --tokenizer_model {beside} takes it")
    return tokenizer


def _train_or_load(
    files: Sequence[Path], reading: Reading, cache_dir: Path, check_stop: Callable[[], None]
) -> tuple[bytes, Path]:
    """The bytes and the file of a vocabulary trained on the text, now or earlier."""
    # Named by the place of the text and then by its state: changed text replaces its old one.
    place = place_name(files, reading)
    path = cache_dir / f"{place}-{text_signature(files, reading).hex()[:12]}.model"
    try:
        return Tokenizer(tokenizer_model=path).model_bytes, path
    except UsageError:  # none yet, or a damaged one
        say("vocabulary   training one on the text, since --tokenizer_model names none")
    check_writable(cache_dir, "--cache_dir")
    train_vocabulary(files, path, reading=reading, max_bytes=SAMPLED_BYTES, check_stop=check_stop)
    remove_temporaries(cache_dir, r".*\.model", older_than=86400)  # of trainings that were killed
    for old in cache_dir.glob(f"{place}-*.model"):
        if old != path:
            remove(old)
    return Tokenizer(tokenizer_model=path).model_bytes, path
