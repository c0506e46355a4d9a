"""Chat templates of other programs' models: their dialogues begin and end as they do there.

What is rendered is `jinja_sandbox`'s; here it becomes token ids, in which a control token is one
only where the template wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minllama.system.encodings import as_utf8
from minllama.system.errors import UsageError
from minllama.text.dialogues import Exchange

if TYPE_CHECKING:
    from minllama.vocabulary.base import Vocabulary
    from tokenizer import Tokenizer

MARK = "\ud800"  # in no text, since it is no UTF-8


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template as Hugging Face's and GGUF's files have it.

    Which tokens begin and end a turn it says itself, by their names; a name of one in what a
    speaker says is no token but text.
    """

    text: str

    def to_stored(self) -> dict[str, str]:
        """The template as a model file stores it."""
        return {"jinja": self.text}

    def jinja(self, *, marks_answers: bool = False) -> str:
        """The template's own text, as it is."""
        return self.text

    @property
    def stops(self) -> list[str]:
        """Texts to stop before: none, since a token ends an answer."""
        return []

    def prompt_ids(
        self,
        tokenizer: Tokenizer,
        question: str,
        history: Sequence[Exchange] = (),
        system: str = "",
    ) -> list[int]:
        """The ids of the history and of the question, up to where the answer begins."""
        messages = _messages(tokenizer.vocabulary, [*history, (question, "")], system)[:-1]
        return _encode(tokenizer.vocabulary, self._render(tokenizer, messages, opens=True))

    def exchange_ids(
        self,
        tokenizer: Tokenizer,
        exchange: Exchange,
        history: Sequence[Exchange] = (),
        system: str = "",
        *,
        continues: bool = False,
    ) -> tuple[list[int], list[int]] | None:
        """Ids of a question and of its answer with what ends it; with `continues` without those of
        its history, which are there already.

        None for a template that writes the history in another way once there is another question.
        Raises UsageError for one that takes no such dialogue.
        """
        vocabulary = tokenizer.vocabulary
        messages = _messages(vocabulary, [*history, exchange], system)
        before = self._render(tokenizer, messages[:-2], opens=False) if continues else ""
        before = _up_to_control(vocabulary, before) or before
        asked = self._render(tokenizer, messages[:-1], opens=True)
        answered = self._render(tokenizer, messages, opens=False)
        if not asked.startswith(before):
            return None
        if not answered.startswith(asked):
            raise UsageError(
                "the model's chat template writes an answer in another way than it opens one: it "
                "cannot be trained on"
            )
        answer = answered[len(asked) :]
        answer = _up_to_control(vocabulary, answer) or answer
        return _encode(vocabulary, asked[len(before) :]), _encode(vocabulary, answer, behind=asked)

    def _render(self, tokenizer: Tokenizer, messages: list[dict], *, opens: bool) -> str:
        """The text of messages, and with `opens` of how an answer opens; raises UsageError."""
        from minllama.text.jinja_sandbox import render  # which needs a package

        bos, eos = map(tokenizer.vocabulary.name, tokenizer.vocabulary.stated_marks)
        return render(
            self.text, messages=messages, add_generation_prompt=opens, bos_token=bos, eos_token=eos
        )


def _messages(
    vocabulary: Vocabulary, exchanges: Sequence[Exchange], system: str
) -> list[dict[str, str]]:
    """Messages as a template takes them, with MARK before what would be a control token."""
    spoken = [("system", system)] if system else []
    for question, answer in exchanges:
        spoken += [("user", question), ("assistant", answer)]
    named = re.compile(f"(?={vocabulary.control_pattern.pattern})")
    return [{"role": role, "content": named.sub(MARK, as_utf8(text))} for role, text in spoken]


def _written(vocabulary: Vocabulary) -> re.Pattern[str]:
    """The names of control tokens that are the template's."""
    return re.compile(f"(?<!{MARK}){vocabulary.control_pattern.pattern}")


def _encode(vocabulary: Vocabulary, text: str, *, behind: str = "") -> list[int]:
    """The ids of a text, and where it follows another, `behind` it."""
    ids: list[int] = []
    encode = vocabulary.encode_behind if _up_to_control(vocabulary, behind) != behind else None
    for number, part in enumerate(_written(vocabulary).split(text)):
        if number % 2:
            ids.append(vocabulary.control_tokens[part])
        else:
            ids += (encode or vocabulary.encode)(as_utf8(part.replace(MARK, "")))
        encode = None
    return ids


def _up_to_control(vocabulary: Vocabulary, text: str) -> str:
    """A text without what is behind its last control token; without any, where it has none."""
    ends = [match.end() for match in _written(vocabulary).finditer(text)]
    return text[: ends[-1]] if ends else ""
