"""Chat: dialogues as files have them, as a template's plain text, and as token ids with answers.

The template needs no ids of its own: every format keeps the vocabulary that it has. Knows nothing
of tensors; `utils.ChatDataset` makes batches of what is encoded here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minllama.system.errors import UsageError
from minllama.system.json_lines import read_objects
from minllama.text.reading import UTF8, Reading, read_lines

if TYPE_CHECKING:
    from tokenizer import Tokenizer

LABEL = re.compile(r"[^\s{}%\"'\\]{1,40}")  # safe inside Jinja's, Go's and Ollama's quotes
Exchange = tuple[str, str]  # a question and its answer


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


# ---------------------------------------------------------------------------- dialogues in files


@dataclass(frozen=True)
class Dialogue:
    """Questions and their answers, the system text, and the line of the file."""

    exchanges: list[Exchange]
    system: str = ""
    line: int = 0


ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
ROLES |= {role: role for role in ("user", "assistant", "system")}
FORMS = (
    'a line is {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", '
    '"content": "..."}]} or {"prompt": "...", "response": "..."}'
)
# What a line without turns calls a question and its answer; the second is Alpaca's.
PAIRS = (("prompt", "response"), ("instruction", "output"), ("prompt", "completion"))


def read_dialogues(
    path: Path, reading: Reading = UTF8, on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[Dialogue]:
    """The dialogues of a .jsonl file, streamed; `on_bytes` gets the number of bytes of each read.

    Raises UsageError `file:line: ...` for a line that is none.
    """
    for number, record in read_objects(read_lines(path, reading, on_bytes), path):
        yield Dialogue(*_exchanges(record, f"{path}:{number}"), number)


def _exchanges(record: dict[str, Any], where: str) -> tuple[list[Exchange], str]:
    turns = record.get("conversations", record.get("messages"))
    if turns is None:
        turns = _turns_of_pairs(record, where)
    if not isinstance(turns, list) or not turns:
        raise UsageError(f"{where}: its turns are {str(turns)[:40]!r}; {FORMS}")
    spoken = [_turn(turn, where) for turn in turns]
    if record.get("system") and spoken[0][0] != "system":
        spoken.insert(0, _turn({"role": "system", "content": record["system"]}, where))
    system = spoken.pop(0)[1] if spoken[0][0] == "system" else ""
    for number, (role, _) in enumerate(spoken):
        if role != ("user", "assistant")[number % 2]:
            before = f"behind {spoken[number - 1][0]!r}" if number else "at the beginning"
            raise UsageError(
                f"{where}: a turn of {role!r} {before}: user and assistant take turns, the user "
                "begins; repair the line or take it out"
            )
    if len(spoken) < 2:
        raise UsageError(f"{where}: a dialogue without an answer; add one or take the line out")
    texts = [text for _, text in spoken]
    return list(zip(texts[::2], texts[1::2], strict=False)), system


def _turns_of_pairs(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The turns of a line that has a question and its answer in fields of their own.

    Alpaca's `input` is what the instruction is about; LLaMA-Factory's `history` comes before it.
    """
    names = next((names for names in PAIRS if {*names} <= record.keys()), None)
    if names is None:
        has = ", ".join(sorted(record)[:8]) or "nothing"
        raise UsageError(f"{where}: no dialogue (has: {has}); {FORMS}")
    asked, answer = (record[name] for name in names)
    if names[0] == "instruction" and record.get("input") and isinstance(asked, str):
        asked = f"{asked}\n{record['input']}"
    history = record.get("history") or []
    pairs = [*history, [asked, answer]] if isinstance(history, list) else [history]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UsageError(f'{where}: its history is no list of ["question", "answer"]')
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _turn(turn: Any, where: str) -> tuple[str, str]:
    """(role, text) of a turn: OpenAI's role and content, or ShareGPT's from and value."""
    if not isinstance(turn, dict):
        raise UsageError(f"{where}: the turn {str(turn)[:40]!r} is not an object; {FORMS}")
    named, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise UsageError(
            f"{where}: the role {str(named)[:40]!r} is not one of {', '.join(ROLES)}; rename it or "
            "take the line out"
        )
    if not isinstance(text, str) or not text.strip():
        raise UsageError(
            f"{where}: the text of a turn of {named!r} is {str(text)[:40]!r}; give it words or "
            "take the line out"
        )
    try:  # JSON can escape half a surrogate pair, which UTF-8 cannot encode
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where}: half a surrogate pair in a text; repair the line") from None
    return role, text.replace("\r\n", "\n").strip()


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
