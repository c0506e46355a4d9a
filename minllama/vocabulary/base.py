"""What every vocabulary can do: the one interface that the rest of the program asks."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np

# Control tokens that end a text or an answer, by the names that public models give them.
END_TOKENS = (
    "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>",
    "<|end|>", "<|endofturn|>", "<end_of_turn>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
MODEL_BYTES = 64 << 20  # a vocabulary's file is at most some megabytes


class Vocabulary(ABC):
    """Token ids from 0 to `size` - 1 and their text.

    A document is put between `bos_id` and `eos_id`. Where they are the same token, it only opens
    documents and so ends the one before. Texts are plain: the name of a control token in a text is
    spelt like any other word.
    """

    kind: str  # "SentencePiece" or "byte-level BPE"
    content: bytes  # as model files carry it
    size: int
    bos_id: int
    eos_id: int
    unknown_id: int | None  # stands for what has no other token; None: there is nothing like that
    adds_bos: bool = True  # whether a prompt begins with BOS
    cut: re.Pattern[str] | None = None  # where a text may be cut: its match goes to neither part
    control_tokens: dict[str, int]  # by name; they stand in no text and spell none
    added_tokens: dict[str, int]  # by their text, which is looked for in a text before all others

    @abstractmethod
    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Token ids of each text, without BOS and EOS; (n,) of any integer dtype."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens have none, bytes that are no UTF-8 are U+FFFD."""

    @abstractmethod
    def name(self, token: int) -> str:
        """What the vocabulary's file calls a token."""

    @cached_property
    @abstractmethod
    def token_texts(self) -> list[bytes]:
        """The bytes of UTF-8 that each token spells; none for control and unknown tokens."""

    @cached_property
    @abstractmethod
    def byte_tokens(self) -> list[int]:
        """Tokens that spell parts of characters which have no token of their own."""

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """The names of control tokens in a text, the longest first, as a group."""
        names = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    @property
    def stated_marks(self) -> tuple[int, int]:
        """BOS and EOS as the vocabulary's file has them, which may end answers, not documents."""
        return self.bos_id, self.eos_id

    @property
    def opening_space(self) -> bool:
        """Whether a space is put before every text."""
        return False

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS and EOS."""
        return self.encode_many([text])[0].tolist()

    def encode_behind(self, text: str) -> list[int]:
        """Token ids of a text behind another, before which no space is put."""
        return self.encode(text)

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens at which a text or an answer is over: EOS, and others like it."""
        named = (self.control_tokens.get(name) for name in END_TOKENS)
        ends = {self.eos_id, self.stated_marks[1], *named}
        return sorted(token for token in ends if token is not None)

    def document(self, ids: np.ndarray, *, starts: bool, ends: bool) -> list[np.ndarray]:
        """A document's ids, or those of a part of it, with the marks around documents."""
        mark = self.bos_id != self.eos_id
        before, after = [self.bos_id] * starts, [self.eos_id] * (ends and mark)
        return [np.array(before, ids.dtype), ids, np.array(after, ids.dtype)]
