"""Own symbols (chess moves, notes, tags): strings that are one token wherever they stand in a text.

At every place the longest that fits is taken, from the left: so do SentencePiece and `tokenizers`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from minllama.system.errors import UsageError
from minllama.system.files import read_whole
from minllama.vocabulary.base import END_TOKENS

LONGEST = 128  # characters of a symbol
MOST, MOST_BYTES = 1 << 16, 1 << 24
SIGNS = "\u2581\u2585"  # SentencePiece's, for a space and for an unknown character
# By these names llama.cpp takes a token for a control token, whatever its file says, and looks for
# none in plain text; https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
CONTROL_BY_NAME = """
    <EOT> _<EOT> [EOT] [EOS] <eos> <end_of_utterance> <turn|> <|tool_response> <|return|> <|call|>
    <|flush|> <|calls|> <|file_sep|> <PRE> <SUF> <MID> <PAD> [PAD] <REPO> <reponame> <|repo_name|>
    <|prefix|> <|suffix|> <|middle|> <|code_prefix|> <|code_suffix|> <|code_middle|>
    <|fim_prefix|> <|fim_suffix|> <|fim_middle|> <|fim_pad|> <|fim_repo|>
    <fim-prefix> <fim-suffix> <fim-middle> <fim-pad> <fim-repo>
    <fim_prefix> <fim_suffix> <fim_middle> <fim_pad> <fim_repo>
""".split()
RESERVED = {"<unk>", "<s>", "<|begin_of_text|>", *END_TOKENS, *CONTROL_BY_NAME}


def read_symbols(path: Path, reserved: Iterable[str] = ()) -> list[str]:
    """The symbols in a UTF-8 file, one a line.

    Raises UsageError, naming the line, for one that no vocabulary can hold, or that is `reserved`.
    """
    try:
        text = read_whole(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--symbols {path}: not UTF-8 (byte {error.start:,})") from None
    except UsageError as error:
        raise UsageError(f"--symbols {error}") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if len(lines) > MOST:
        raise UsageError(f"--symbols {path}: holds {len(lines):,} symbols, more than {MOST:,}")
    first: dict[str, int] = {}
    names = RESERVED.union(reserved)
    for number, symbol in enumerate(lines, 1):
        problem = _problem(symbol, names)
        if symbol in first:
            problem = f"{symbol!r} stands in line {first[symbol]} already"
        if problem:
            raise UsageError(f"--symbols {path}: line {number}: {problem}")
        first[symbol] = number
    return lines


def _problem(symbol: str, names: set[str]) -> str | None:
    """Why no vocabulary can hold a symbol, if so."""
    if not symbol:
        return "is empty; each line is one symbol"
    if len(symbol) > LONGEST:
        return f"{symbol[:40]!r}... has {len(symbol):,} characters, and a symbol at most {LONGEST}"
    if symbol != symbol.strip():
        return f"{symbol!r} begins or ends with white space, which belongs to what is beside it"
    if symbol in names:
        return f"{symbol!r} is the name of a control token"
    if any(c in SIGNS or unicodedata.category(c) == "Cc" for c in symbol):
        return f"{symbol!r} holds a control character, or one of SentencePiece's own signs"
    return None


def find_overlap(symbols: Sequence[str]) -> tuple[str, str] | None:
    """Two symbols that may overlap in a text, such that it matters which is looked for first.

    That is so where the end of the first is the beginning of another that is at least as long, and
    no longer one begins at the first's place.
    """
    begun: dict[str, list[str]] = {}  # with these characters, but longer: the longest two
    for symbol in sorted(symbols, key=len, reverse=True):
        for length in range(1, len(symbol)):
            with_it = begun.setdefault(symbol[:length], [])
            if len(with_it) < 2:
                with_it.append(symbol)
    known = {*symbols}
    for first in symbols:
        for start in range(1, len(first)):
            for second in begun.get(first[start:], ()):
                text = first[:start] + second
                longer = (text[:end] in known for end in range(len(first) + 1, len(text) + 1))
                if first != second and len(second) >= len(first) and not any(longer):
                    return first, second
    return None
