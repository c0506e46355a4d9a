"""Chat: dialogues as files have them, as a template's plain text, and as token ids with answers.

The template needs no ids of its own: every format keeps the vocabulary that it has. Knows nothing
of tensors; `utils.ChatDataset` makes batches of what is encoded here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
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
    """Questions and their answers, the system text, and the line of the file.

    The line is for messages: in a `.json` list many dialogues may have the same one.
    """

    exchanges: list[Exchange]
    system: str = ""
    line: int = 0


class BadDialogue(UsageError):
    """A line that is no dialogue: what kind of fault, and the words for it."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


@dataclass
class Intake:
    """What was found while dialogues were read: faults by kind, and what was left out of them."""

    skip_bad_lines: bool = False
    dialogues: int = 0  # good ones
    faults: dict[str, tuple[str, int]] = field(default_factory=dict)  # kind: first one, how many
    left_out: Counter[str] = field(default_factory=Counter)

    def add_fault(self, kind: str, message: str) -> None:
        """Count a bad line; of each kind the first is told of."""
        first, count = self.faults.get(kind, (message, 0))
        self.faults[kind] = first, count + 1

    def fault_lines(self) -> list[str]:
        """A line for each kind of fault: the first one, and how many more there are."""
        return [
            first + (f" (and {count - 1:,} more like it)" if count > 1 else "")
            for first, count in self.faults.values()
        ]

    def lines(self) -> list[str]:
        """A line for each kind of thing that was left out."""
        bad = [f"  left out: {line}" for line in self.fault_lines()]
        kinds = self.left_out.most_common(SHOWN_KINDS)
        return [*bad, *(f"  {count:,} {what}" for what, count in kinds)]

    def check(self, path: Path) -> None:
        """Raise UsageError for all the bad lines of a file, unless they are to be left out."""
        if self.faults and not self.skip_bad_lines:
            problems, bad = self.fault_lines(), sum(count for _, count in self.faults.values())
            if self.dialogues:
                problems.append(
                    f"{path}: {bad:,} of {bad + self.dialogues:,} dialogues are bad; "
                    "--skip_bad_lines trains on the others"
                )
            raise UsageError("\n".join(problems))


SHOWN_KINDS = 10  # of what was left out
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's
ROLES |= {role: role for role in ("user", "assistant", "system")} | {"developer": "system"}
# Turns of a program and not of a speaker, which are left out.
TOOLS = {"tool", "function", "observation", "function_call", "tool_call", "tool_response"}
FORMS = (
    'a line is {"conversations": [{"role": "user", "content": "..."}, {"role": "assistant", '
    '"content": "..."}]} or {"prompt": "...", "response": "..."}'
)
# What a line without turns calls a question and its answer; the second is Alpaca's.
PAIRS = (
    ("prompt", "response"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("question", "answer"),
)


def read_dialogues(
    path: Path,
    reading: Reading = UTF8,
    on_bytes: Callable[[int], object] = lambda count: None,
    intake: Intake | None = None,
) -> Iterator[Dialogue]:
    """The dialogues of a .jsonl file, streamed; `on_bytes` gets the number of bytes of each read.

    All lines are read before UsageError `file:line: ...` is raised for those that are none; what is
    left out is counted in the `intake`.
    """
    intake = intake or Intake()
    for number, record in _records(path, read_lines(path, reading, on_bytes), intake):
        left_out: Counter[str] = Counter()
        try:
            exchanges, system = _exchanges(record, left_out)
        except BadDialogue as fault:
            intake.add_fault(fault.kind, f"{path}:{number}: {fault}")
            continue
        intake.dialogues += 1
        intake.left_out += left_out
        if exchanges:
            yield Dialogue(exchanges, system, number)
    intake.check(path)


def _records(
    path: Path, lines: Iterator[tuple[int, str]], intake: Intake
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with its line; a line that is a list of turns is one object.

    Where a line is a value by itself, one that is not JSON is a fault of its own.
    """
    filled = (pair for pair in lines if pair[1].strip())
    first = list(itertools.islice(filled, 2))  # one of them may be bad
    lines = itertools.chain(first, filled)
    opens_list = bool(first) and first[0][1].lstrip().startswith("[")
    if opens_list and not _is_turn(_first_item(first[0][1])):
        yield from read_objects(lines, path)  # one list, of dialogues
        return
    if not opens_list and not any(_is_object(line) for _, line in first):
        yield from read_objects(lines, path)  # an object may take several lines
        return
    for number, line in lines:
        try:
            records = [record for _, record in read_objects([(number, line)], path)]
        except UsageError as error:
            intake.add_fault("no JSON", str(error))
            continue
        if line.lstrip().startswith("["):
            records = [{"messages": records}]
        for record in records:
            yield number, record


def _first_item(line: str) -> Any:
    """The first item of a list that begins in the line; None where it does not end there."""
    with contextlib.suppress(ValueError, RecursionError):
        if line.lstrip().startswith("["):
            return json.JSONDecoder().raw_decode(line.lstrip()[1:].lstrip())[0]
    return None


def _is_turn(value: Any) -> bool:
    fields = value.keys() if isinstance(value, dict) else set()
    return {"role", "content"} <= fields or {"from", "value"} <= fields


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _exchanges(record: dict[str, Any], left_out: Counter[str]) -> tuple[list[Exchange], str]:
    """The answered questions of a dialogue, and its system text."""
    turns = record.get("conversations", record.get("messages"))
    if turns is None:
        turns = _turns_of_pairs(record)
    if not isinstance(turns, list) or not turns:
        raise BadDialogue("no turns", f"its turns are {str(turns)[:40]!r}; {FORMS}")
    spoken = [turn for turn in (_turn(turn, left_out) for turn in turns) if turn is not None]
    if record.get("system") and not (spoken and spoken[0][0] == "system"):
        spoken.insert(0, _turn({"role": "system", "content": record["system"]}, left_out))
    joined: list[tuple[str, str]] = []
    for role, text in spoken:
        if joined and joined[-1][0] == role:
            if text and joined[-1][1]:
                left_out["turns were joined with the one before, of the same role"] += 1
            joined[-1] = role, "\n".join(filter(None, (joined[-1][1], text)))
        else:
            joined.append((role, text))
    system = joined.pop(0)[1] if joined and joined[0][0] == "system" else ""
    if any(role == "system" for role, _ in joined):
        raise BadDialogue("a late system text", "a turn of 'system' behind others: put it first")
    if joined and joined[0][0] == "assistant":
        left_out["turns of an assistant that began were left out"] += 1
        joined.pop(0)
    texts = [text for _, text in joined]
    exchanges = list(zip(texts[::2], texts[1::2], strict=False))
    answered = [(question, answer) for question, answer in exchanges if answer]
    unanswered = -(-len(texts) // 2) - len(answered)
    left_out["questions without an answer were left out"] += unanswered
    return answered, system


def _turns_of_pairs(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of a line that has a question and its answer in fields of their own.

    Alpaca's `input` is what the instruction is about; LLaMA-Factory's `history` comes before it.
    """
    names = next((names for names in PAIRS if {*names} <= record.keys()), None)
    if names is None:
        has = ", ".join(sorted(record)[:8]) or "nothing"
        raise BadDialogue("no dialogue", f"no dialogue (has: {has}); {FORMS}")
    asked, answer = (record[name] for name in names)
    if names[0] == "instruction" and record.get("input") and isinstance(asked, str):
        asked = f"{asked}\n{record['input']}"
    history = record.get("history") or []
    pairs = [*history, [asked, answer]] if isinstance(history, list) else [history]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise BadDialogue("a bad history", 'its history is no list of ["question", "answer"]')
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _turn(turn: Any, left_out: Counter[str]) -> tuple[str, str] | None:
    """(role, text) of a turn: OpenAI's role and content, or ShareGPT's from and value.

    None for a tool's. An assistant's text may be empty: of a call of a tool, or no answer.
    """
    if not isinstance(turn, dict):
        raise BadDialogue("no turn", f"the turn {str(turn)[:40]!r} is not an object; {FORMS}")
    named, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    named = named.lower() if isinstance(named, str) else named
    if isinstance(named, str) and named in TOOLS:
        left_out["turns of tools and functions were left out"] += 1
        return None
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise BadDialogue(
            "an unknown role",
            f"the role {str(named)[:40]!r} is not one of {', '.join(ROLES)}; rename it or take the "
            "line out",
        )
    if isinstance(text, list):
        text = _text_of_parts(text, left_out)
    if text is None and role == "assistant":
        text = ""
    if not isinstance(text, str) or not (text.strip() or role == "assistant"):
        raise BadDialogue(
            "a turn without text",
            f"the text of a turn of {named!r} is {str(text)[:40]!r}; give it words or take the "
            "line out",
        )
    try:  # JSON can escape half a surrogate pair, which UTF-8 cannot encode
        text.encode()
    except UnicodeEncodeError:
        words = "half a surrogate pair in a text; repair the line"
        raise BadDialogue("half a surrogate pair", words) from None
    return role, text.replace("\r\n", "\n").strip()


def _text_of_parts(parts: list[Any], left_out: Counter[str]) -> str:
    """The text of a content in parts, OpenAI's `{"type": "text", "text": "..."}`, and no images."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str) and kind in ("text", "input_text", "output_text", "str"):
            texts.append(text)
        else:
            left_out[f"parts of the kind {str(kind)[:20]!r} were left out"] += 1
    return "\n".join(texts)


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
