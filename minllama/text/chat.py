"""Chat: dialogues as a template's plain text, and as token ids with answers.

The template needs no ids of its own: every format keeps the vocabulary that it has. Knows nothing
of files, nor of tensors; `utils.ChatDataset` makes batches of what is encoded here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minllama.system.errors import UsageError
from minllama.text.dialogues import Dialogue, Exchange

if TYPE_CHECKING:
    from tokenizer import Tokenizer

LABEL = re.compile(r"[^\s{}%\"'\\]{1,40}")  # safe inside Jinja's, Go's and Ollama's quotes


# ---------------------------------------------------------------------------- the template


@dataclass(frozen=True)
class ChatTemplate:
    """The labels that set a dialogue as text: BOS and EOS stand around each question and answer.

    <s>System: Be brief.
    User: Where does a fox live?
    Assistant: In a den.</s><s>User: And a bear?
    Assistant: In a cave.</s>
    """

    system: str = "System:"
    user: str = "User:"
    assistant: str = "Assistant:"

    @classmethod
    def from_stored(cls, stored: Any, where: Path) -> ChatTemplate:
        """The template in a model file, a dict of labels; UsageError for anything else."""
        names = {each.name for each in fields(cls)}
        if not isinstance(stored, dict) or stored.keys() != names:
            raise UsageError(f"{where}: its chat template has not the labels {sorted(names)}")
        for label in stored.values():
            if not isinstance(label, str) or not LABEL.fullmatch(label):
                raise UsageError(f"{where}: its chat template has the label {str(label)[:60]!r}")
        return cls(**stored)

    @classmethod
    def from_jinja(cls, text: Any) -> ChatTemplate | None:
        """This program's template, where another program's file holds just that."""
        return cls() if text == cls().jinja() else None

    def to_stored(self) -> dict[str, str]:
        """The labels as a model file stores them."""
        return asdict(self)

    @property
    def next_question(self) -> str:
        """A text to stop before: an answer ends where the model asks the next question itself."""
        return f"\n{self.user}"

    def question_ids(self, tokenizer: Tokenizer, question: str, system: str = "") -> list[int]:
        """BOS and the ids of a question, up to where the answer begins."""
        head = f"{self.system} {system}\n" if system else ""
        text = f"{head}{self.user} {question}\n{self.assistant}"
        return tokenizer.encode(text, bos=True, eos=False)

    def prompt_ids(
        self,
        tokenizer: Tokenizer,
        question: str,
        history: Sequence[Exchange] = (),
        system: str = "",
    ) -> list[int]:
        """The ids of the history and of the question."""
        ids: list[int] = []
        for asked, answer in history:
            ids += self.question_ids(tokenizer, asked, system) + answer_ids(tokenizer, answer)
            system = ""  # it stands before the first question
        return ids + self.question_ids(tokenizer, question, system)

    def jinja(self) -> str:
        """The template as Hugging Face's `chat_template` and GGUF's have it."""
        system, user, assistant = (
            repr(label) for label in (self.system, self.user, self.assistant)
        )
        return (
            "{% for message in messages %}"
            "{% if message['role'] == 'system' %}"
            f"{{{{ bos_token + {system} + ' ' + message['content'] | trim + '\\n' }}}}"
            "{% elif message['role'] == 'user' %}"
            "{% if loop.first or messages[loop.index0 - 1]['role'] != 'system' %}"
            "{{ bos_token }}{% endif %}"
            f"{{{{ {user} + ' ' + message['content'] | trim + '\\n' }}}}"
            "{% else %}"
            f"{{{{ {assistant} + ' ' + message['content'] | trim + eos_token }}}}"
            "{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
        )

    def ollama(self, bos: str, eos: str) -> str:
        """The template for a Modelfile; Ollama itself begins with BOS."""
        return (
            "{{ range .Messages }}"
            f'{{{{ if eq .Role "system" }}}}{self.system} {{{{ .Content }}}}\n'
            f'{{{{ else if eq .Role "user" }}}}{self.user} {{{{ .Content }}}}\n'
            f"{{{{ else }}}}{self.assistant} {{{{ .Content }}}}{eos}{bos}"
            f"{{{{ end }}}}{{{{ end }}}}{self.assistant}"
        )


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """An answer's ids and EOS. Encoded alone it begins with a space, as behind the label."""
    return tokenizer.encode(answer, bos=False, eos=True)


# ---------------------------------------------------------------------------- token ids


@dataclass
class Encoded:
    """Token ids to read, and which of them are an answer's, to be learnt."""

    ids: list[int] = field(default_factory=list)
    is_answer: list[bool] = field(default_factory=list)

    def add(self, ids: list[int], *, is_answer: bool) -> None:
        """Append a question's or an answer's ids."""
        self.ids += ids
        self.is_answer += [is_answer] * len(ids)


@dataclass
class Cuts:
    """How dialogues were made to fit a context."""

    context: int
    dialogues: int = 0  # split between two exchanges
    answers: int = 0  # cut at their end
    questions: int = 0  # left out, too long for an answer to follow

    def lines(self) -> list[str]:
        """A line for each kind of cut that there was."""
        counts = {
            "dialogues were split between two questions": self.dialogues,
            "answers were cut at their end": self.answers,
            "questions left no room for an answer and were left out": self.questions,
        }
        return [
            f"  longer than the context of {self.context:,} tokens: {count:,} {what}"
            for what, count in counts.items()
            if count
        ]


def encode_dialogue(
    dialogue: Dialogue, tokenizer: Tokenizer, template: ChatTemplate, cuts: Cuts
) -> list[Encoded]:
    """A dialogue's ids in as few parts of up to context + 1 as hold it (the last is never read).

    It is split between two exchanges, and every part begins with the system text.
    """
    parts: list[Encoded] = []
    room = cuts.context + 1
    for question, answer in dialogue.exchanges:
        asked = template.question_ids(tokenizer, question)
        answered = answer_ids(tokenizer, answer)
        if not parts or len(parts[-1].ids) + len(asked) + len(answered) > room:
            asked = template.question_ids(tokenizer, question, dialogue.system)
            if len(asked) >= room:
                cuts.questions += 1
                continue
            cuts.answers += len(asked) + len(answered) > room
            answered = answered[: room - len(asked)]
            parts.append(Encoded())
        parts[-1].add(asked, is_answer=False)
        parts[-1].add(answered, is_answer=True)
    cuts.dialogues += len(parts) > 1
    return parts
