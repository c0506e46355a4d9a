"""What of a text does not come back from a vocabulary's tokens."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import NamedTuple

from minllama.vocabulary.base import Vocabulary
from minllama.vocabulary.sentence_piece import SPACE

LITTLE = 0.0005  # of the characters, that rounds to 0.0 %


class Lost(NamedTuple):
    """What of a text does not come back from a vocabulary's tokens."""

    tokens: int
    unknown: int  # of these tokens, which stand for any characters
    characters: int
    lost: collections.Counter[str]  # of these characters

    @property
    def spoils_bits_per_byte(self) -> bool:
        """Whether the tokens spell less than the text; a space for SPACE is as good as that."""
        return self.unknown > 0 or any(self.lost.keys() - {SPACE})

    def lines(self) -> list[str]:
        """What to say of it, if anything."""
        lost, lines = self.lost - collections.Counter({SPACE: self.lost[SPACE]}), []
        if self.lost[SPACE]:
            lines += [
                f"note: {SPACE} (U+2581), SentencePiece's sign for a space, is read as a space"
            ]
        if self.spoils_bits_per_byte:
            newlines_first = sorted(lost.items(), key=lambda item: (item[0] != "\n", -item[1]))
            counts = [f"{character!r} {count:,}" for character, count in newlines_first[:5]]
            counts += ["..."] if len(lost) > 5 else []
            unknown = f"{_share(self.unknown, self.tokens)} of its tokens are <unk>, and "
            is_little = self.unknown + lost.total() < LITTLE * self.characters
            lines.append(
                f"{'note' if is_little else 'warning'}: the vocabulary loses some of the text: "
                f"{unknown if self.unknown else ''}{lost.total():,} of {self.characters:,} "
                f"characters do not come back ({', '.join(counts)}). Bits per byte are of what "
                "does, and do not compare with another vocabulary's; tokenizer.py train makes one "
                "without loss"
            )
        return lines


def _share(count: int, total: int) -> str:
    """A share, where it rounds to nothing as a count."""
    share = f"{count / total:.1%}"
    return f"{count:,}" if share == "0.0%" else share


def count_lost(vocabulary: Vocabulary, texts: Iterable[str]) -> Lost:
    """Try a vocabulary on texts: encoded, decoded, and the characters counted."""
    tokens = unknown = characters = 0
    lost: collections.Counter[str] = collections.Counter()
    for text in texts:
        ids = vocabulary.encode(text)
        tokens, characters = tokens + len(ids), characters + len(text)
        unknown += ids.count(vocabulary.unknown_id)
        lost += collections.Counter(text) - collections.Counter(vocabulary.decode(ids))
    return Lost(max(1, tokens), unknown, characters, lost)
