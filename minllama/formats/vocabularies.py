"""Vocabularies in other programs' formats: which ones they can hold, and texts to try them on."""

from __future__ import annotations

from collections.abc import Callable

from minllama.system.errors import UsageError
from minllama.vocabulary.sentence_piece import SentencePiece
from tokenizer import Tokenizer

SAMPLES = [
    "Once upon a time, there was a girl.",
    "",
    " ",
    "  two leading",
    "trailing  ",
    "a\nb\n\n c\t",
    "naïve café",
    "你好，世界",
    "👩‍👩‍👧 🙂",
    "<s> </s> <unk>",
    "▁",
    "aaaaaaaaaaa",
    "x" + " " * 9 + "y",
    "<0x0A>",
]


def check_same_ids(tokenizer: Tokenizer, encode: Callable[[str], list[int]], name: str) -> None:
    """UsageError if what was written as `name` gives difficult texts other ids."""
    symbols = list(tokenizer.vocabulary.added_tokens)[:50]
    texts = [text for s in symbols for text in (s, f"a{s}b", f" {s} {s[:-1]}{s}\n{s}{s}")]
    for text in SAMPLES + texts:
        if encode(text) != tokenizer.vocabulary.encode(text):
            raise UsageError(f"self-check: {name} gives other ids for {text!r}; nothing written")


def require_exportable(tokenizer: Tokenizer) -> None:
    """UsageError for a vocabulary whose rules the other programs' formats do not have.

    Byte-level BPE is their own; of SentencePiece they have Llama's: BPE over unchanged text.
    """
    if not isinstance(tokenizer.vocabulary, SentencePiece):
        return
    if not tokenizer.vocabulary.is_bpe:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: only BPE vocabularies that leave the text as it "
            "is, as tokenizer.py trains them, can be exported"
        )
    if not tokenizer.vocabulary.opening_space:  # its symbols are looked for first, in all formats
        return
    merged = {"".join(pair) for pair in merges(tokenizer)}
    unmerged = [p for p in normal_pieces(tokenizer) if len(p) > 1 and p not in merged]
    if unmerged:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: no merge makes its piece {unmerged[0]!r}, a "
            "symbol that its maker defined, so it cannot be exported"
        )


def merges(tokenizer: Tokenizer) -> list[list[str]]:
    """The pairs that make each piece, best pieces first: what `tokenizers` calls BPE merges."""
    pieces = normal_pieces(tokenizer)
    return [
        [piece[:cut], piece[cut:]]
        for piece in sorted(pieces, key=pieces.get, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def normal_pieces(tokenizer: Tokenizer) -> dict[str, float]:
    """The pieces that text is made of, and their scores."""
    sp = tokenizer.sp_model
    added = {*tokenizer.vocabulary.added_tokens.values()}
    added = set() if tokenizer.vocabulary.opening_space else added
    return {
        sp.id_to_piece(i): sp.get_score(i)
        for i in range(tokenizer.n_words)
        if i not in added
        and not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))
    }
