"""Chat: dialogues as a template's plain text, and as token ids with answers.

Models trained here have a plain template, which needs no tokens of its own; another program's model
keeps the one that it has (`jinja_template`). Knows nothing of files, nor of tensors;
`utils.ChatDataset` makes batches of what is encoded here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import fingerprint
from minllama.system.encodings import as_utf8
from minllama.system.errors import UsageError
from minllama.text.dialogues import Dialogue, Exchange
from minllama.text.jinja_template import JinjaTemplate

if TYPE_CHECKING:
    from tokenizer import Tokenizer

# The fingerprint of what `ChatTemplate.jinja` gave before it refused other roles.
EARLIER_JINJA = "239f6a35119abc5b"
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

    def to_stored(self) -> dict[str, str]:
        """The labels as a model file stores them."""
        return asdict(self)

    @property
    def stops(self) -> list[str]:
        """Texts to stop before: an answer ends where the model asks the next question itself."""
        return [f"\n{self.user}"]

    def question_ids(self, tokenizer: Tokenizer, question: str, system: str = "") -> list[int]:
        """BOS and the ids of a question, up to where the answer begins."""
        head = f"{self.system} {system}\n" if system else ""
        text = f"{head}{self.user} {question}\n{self.assistant}"
        bos, _ = tokenizer.vocabulary.stated_marks  # those that `jinja` writes
        return [bos, *tokenizer.encode(text, bos=False, eos=False)]

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

    def exchange_ids(
        self,
        tokenizer: Tokenizer,
        exchange: Exchange,
        history: Sequence[Exchange] = (),
        system: str = "",
        *,
        continues: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Ids of a question and of its answer with EOS; with `continues` without those of its
        history, which are there already.
        """
        question, answer = exchange
        if not continues:
            asked = self.prompt_ids(tokenizer, question, history, system)
        else:
            asked = self.question_ids(tokenizer, question)
        return asked, answer_ids(tokenizer, answer)

    def jinja(self, *, marks_answers: bool = False) -> str:
        """The template as Hugging Face's `chat_template` and GGUF's have it.

        `marks_answers` by `{% generation %}`, by which `transformers` finds what is to be learnt
        and which others do not know.
        """
        system, user, assistant = map(repr, (self.system, self.user, self.assistant))
        opens, closes = ("{% generation %}", "{% endgeneration %}") if marks_answers else ("", "")
        return (
            "{% for message in messages %}"
            "{% set content = message['content'] %}"
            "{% if content is not string %}"
            "{% set content = content | map(attribute='text') | join('') %}{% endif %}"
            "{% if message['role'] == 'system' %}"
            f"{{{{ bos_token + {system} + ' ' + content | trim + '\\n' }}}}"
            "{% elif message['role'] == 'user' %}"
            "{% if loop.first or messages[loop.index0 - 1]['role'] != 'system' %}"
            "{{ bos_token }}{% endif %}"
            f"{{{{ {user} + ' ' + content | trim + '\\n' }}}}"
            "{% elif message['role'] == 'assistant' %}"
            f"{{{{ {assistant} }}}}{opens}{{{{ ' ' + content | trim + eos_token }}}}{closes}"
            "{% else %}{{ raise_exception('the roles are system, user and assistant') }}"
            "{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
        )

    def ollama(self, bos: str, eos: str, *, first: str = "") -> str:
        """The template for a Modelfile; `first` is BOS where Ollama does not begin with it."""
        return (
            f"{first}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "system" }}}}{self.system} {{{{ .Content }}}}\n'
            f'{{{{ else if eq .Role "user" }}}}{self.user} {{{{ .Content }}}}\n'
            f"{{{{ else }}}}{self.assistant} {{{{ .Content }}}}{eos}{bos}"
            f"{{{{ end }}}}{{{{ end }}}}{self.assistant}"
        )


Template = ChatTemplate | JinjaTemplate


def template_of_jinja(text: Any) -> Template | None:
    """The template of another program's file: this program's own, where it holds just that.

    Of several templates, a list of names and texts, the one named `default` counts.
    """
    if isinstance(text, list):
        named = (each for each in text if isinstance(each, dict) and each.get("name") == "default")
        text = next(named, {}).get("template")
    if not isinstance(text, str) or not text.strip():
        return None
    text = as_utf8(text)
    plain = ChatTemplate()
    ours = (plain.jinja(), plain.jinja(marks_answers=True))
    is_plain = text in ours or fingerprint(text.encode()) == EARLIER_JINJA
    return plain if is_plain else JinjaTemplate(text)


def template_from_stored(stored: Any, where: Path) -> Template:
    """The template in a .pt file; UsageError, naming it, for anything else."""
    if isinstance(stored, dict) and stored.keys() == {"jinja"} and isinstance(stored["jinja"], str):
        return JinjaTemplate(stored["jinja"])
    return ChatTemplate.from_stored(stored, where)


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """An answer's ids and EOS. It begins with a space, which many vocabularies put there."""
    vocabulary = tokenizer.vocabulary
    text = answer if vocabulary.opening_space else f" {answer}"
    return [*tokenizer.encode(text, bos=False, eos=False), vocabulary.stated_marks[1]]


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
    dialogue: Dialogue, tokenizer: Tokenizer, template: Template, cuts: Cuts
) -> list[Encoded]:
    """A dialogue's ids in as few parts of up to context + 1 as hold it (the last is never read).

    It is split between two exchanges, and every part begins with the system text.
    """
    parts: list[Encoded] = []
    room, first = cuts.context + 1, 0  # the first exchange of the part
    for number, exchange in enumerate(dialogue.exchanges):
        history = dialogue.exchanges[first:number]
        ids = functools.partial(template.exchange_ids, tokenizer, exchange, system=dialogue.system)
        pair = ids(history=history, continues=True) if parts else None
        if pair is None or len(parts[-1].ids) + sum(map(len, pair)) > room:
            # A template that rewrites what was said before has each answer in a part of its own.
            pair = ids(history=history) if parts and pair is None else None
            if pair is None or sum(map(len, pair)) > room:
                pair, first = ids(), number
            asked, answered = pair
            if len(asked) >= room:
                cuts.questions += 1
                continue
            cuts.answers += len(asked) + len(answered) > room
            pair = asked, answered[: room - len(asked)]
            parts.append(Encoded())
        parts[-1].add(pair[0], is_answer=False)
        parts[-1].add(pair[1], is_answer=True)
    cuts.dialogues += first > 0 and len(parts) > 1
    return parts
