"""Dialogues as files have them: FORMS is the table of what is read.

Every form becomes a list of turns, and these become questions with their answers. Knows nothing of
templates and vocabularies: `chat` makes text and token ids of a `Dialogue`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minllama.system.errors import UsageError
from minllama.system.files import is_text
from minllama.system.json_lines import read_values
from minllama.system.peek import first_object, is_csv_name, is_table
from minllama.text.reading import UTF8, Reading, read_lines, with_lf
from minllama.text.records import places, read_records, shown

Exchange = tuple[str, str]  # a question and its answer
Record = dict[str, Any]  # an object of a file, or a row of a table


@dataclass(frozen=True)
class Dialogue:
    """Questions and their answers, the system text, and the line of the file.

    The line is for messages: in a `.json` list many dialogues may have the same one.
    """

    exchanges: list[Exchange]
    system: str = ""
    line: int = 0


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


class BadDialogue(UsageError):
    """A record that is no dialogue: what kind of fault, and the words for it."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


# ---------------------------------------------------------------------------- files


def read_dialogues(
    path: Path,
    reading: Reading = UTF8,
    on_bytes: Callable[[int], object] = lambda count: None,
    intake: Intake | None = None,
) -> Iterator[Dialogue]:
    """The dialogues of a file of records, streamed; `on_bytes` gets the bytes of each read.

    All lines are read before UsageError `file:line: ...` is raised for those that are none; what is
    left out is counted in the `intake`.
    """
    intake, place_of = intake or Intake(), places(path)
    if is_table(path) or is_csv_name(path):
        records = read_records(path, reading, on_bytes, columns=_columns(path))
    else:
        records = _json_values(path, read_lines(path, reading, on_bytes), intake)
    for number, record in _with_trees(records, place_of, intake):
        left_out: Counter[str] = Counter()
        try:
            exchanges, system = _exchanges(_turns(record, left_out), left_out)
        except BadDialogue as fault:
            intake.add_fault(fault.kind, f"{place_of(number)}: {fault}")
            continue
        intake.dialogues += 1
        intake.left_out += left_out
        if exchanges:
            yield Dialogue(exchanges, system, number)
    intake.check(path)


def holds_dialogues(path: Path, reading: Reading) -> bool:
    """Whether a file's first record is a dialogue, and has no text of its own."""
    names = first_object(path).keys()
    return reading.text_field not in names and any(form.fields <= names for form in FORMS)


def _columns(path: Path) -> set[str] | None:
    """The columns of a table that forms have; UsageError where none fits.

    None where they cannot be read, and to read them all will say why.
    """
    names = first_object(path)
    forms = [MESSAGE, TREE, *(form.fields for form in FORMS)]
    if names and not any(fields <= names.keys() for fields in forms):
        raise UsageError(f"{path}: {_no_form(names)}")
    return names.keys() & COLUMNS or None


def _json_values(
    path: Path, lines: Iterator[tuple[int, str]], intake: Intake
) -> Iterator[tuple[int, Any]]:
    """The values of a file, each with its line; a line that is a list of turns is one value.

    Where a line is a value by itself, one that is not JSON is a fault of its own.
    """
    filled = (pair for pair in lines if pair[1].strip())
    first = list(itertools.islice(filled, 2))  # one of them may be bad
    lines = itertools.chain(first, filled)
    opens_list = bool(first) and first[0][1].lstrip().startswith("[")
    if opens_list and not _is_turn(_first_item(first[0][1])):
        yield from read_values(lines, path)  # one list, of dialogues
        return
    if not opens_list and not any(_is_object(line) for _, line in first):
        yield from read_values(lines, path)  # an object may take several lines
        return
    for number, line in lines:
        try:
            values = [value for _, value in read_values([(number, line)], path)]
        except UsageError as error:
            intake.add_fault("no JSON", str(error))
            continue
        if line.lstrip().startswith("["):
            values = [values]
        for value in values:
            yield number, value


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


# ---------------------------------------------------------------------------- the forms


class Form(NamedTuple):
    """The fields by which data sets write a dialogue: its turns, or a question and its answer."""

    asked: str  # a text of the user's, or a list of turns
    answered: str | None = None  # a text of the assistant's, or a list of turns; None: all in one
    about: str | None = None  # what the question is about, below it; a record need not have it

    @property
    def fields(self) -> set[str]:
        """Those that a record must have."""
        return {self.asked, self.answered} - {None}

    def __str__(self) -> str:
        return "+".join(filter(None, (self.asked, self.answered)))


# The first that fits is taken: those with more fields before those with fewer, turns before texts,
# and what was chosen before any other answer.
FORMS = (
    Form("conversations", "chosen"),  # LLaMA-Factory's preference sets
    Form("messages", "chosen"),  # UltraFeedback, whose `chosen` is all of the dialogue
    Form("conversations"),  # ShareGPT, minimind
    Form("messages"),  # OpenAI, TRL, UltraChat
    Form("conversation"),  # Firefly's and Capybara's, of pairs
    Form("prompt", "chosen"),  # TRL's preference sets
    Form("instruction", "chosen", about="input"),  # Alpaca's, of LLaMA-Factory
    Form("question", "chosen"),  # Orca's DPO pairs
    Form("input", "chosen"),  # the same by Argilla
    Form("chosen"),  # HH: "\n\nHuman: ...\n\nAssistant: ..."; TRL's with an implicit prompt
    Form("prompt", "response"),
    Form("prompt", "completion"),  # OpenAI's and TRL's
    Form("instruction", "output", about="input"),  # Alpaca, BELLE
    Form("instruction", "response", about="context"),  # Dolly
    Form("question", "answer"),  # GSM8K
    Form("question", "response"),  # OpenOrca
    Form("input", "target"),  # Firefly, beside `kind`
    Form("input", "output"),
)
MESSAGE = {"message_id", "role", "text"}  # OASST's flat files, with `parent_id` but of the first
TREE = {"message_tree_id", "prompt"}  # and its nested ones: a message has a list of `replies`
READ = ", ".join([*map(str, FORMS), "message_id+role+text", "message_tree_id+prompt"])
SYSTEM = ("system", "system_prompt")  # a text, beside any form
PAIRS = (("human", "assistant"), ("input", "output"))  # items of a list instead of turns
ROLES = {"human": "user", "gpt": "assistant", "prompter": "user"}  # ShareGPT's, OASST's
ROLES |= {role: role for role in ("user", "assistant", "system")} | {"developer": "system"}
# Turns of a program and not of a speaker, which are left out.
TOOLS = {"tool", "function", "observation", "function_call", "tool_call", "tool_response"}
HH = re.compile(r"\n\n(Human|Assistant):")
# What templates put before a turn, where a data set has its dialogues as finished text.
MARKS = re.compile(
    r"<\|(?:im_start|user|system|assistant|start_header_id|begin_of_text)\|>|<start_of_turn>"
    r"|\[INST\]|### (?:Human|Instruction|User):"
)
TURN = 'a turn is {"role": "user", "content": "..."} or {"from": "human", "value": "..."}'
SHOWN_KINDS = 10  # of what was left out
SHOWN_FIELDS = 8
KEPT = (*("message_id", "parent_id", "role", "text"), *("rank", "deleted", "review_result"))
# Those of a table that are read.
COLUMNS = {"history", "label", *SYSTEM, *KEPT, *TREE}.union(*FORMS) - {None}
MOST_HELD = 1 << 30  # bytes, about, of the messages of trees
MESSAGE_BYTES = 1000  # of one, beside its text


def _turns(record: Any, left_out: Counter[str]) -> list[Any]:
    """The turns of a record by the first form that fits it, system text and history before them."""
    if isinstance(record, list):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise BadDialogue("no object", "not a JSON object")
    if record.keys() >= TREE and isinstance(record["prompt"], dict):
        return _best_path(record["prompt"], left_out)
    form, *others = [form for form in FORMS if form.fields <= record.keys()] or [None]
    if form is None:
        raise _no_form(record)
    passed = sorted(set().union(*(each.fields for each in others)) - {*form.fields, form.about})
    if passed:
        left_out[f"dialogues were read by {form}, and not by {', '.join(passed)}"] += 1
    if _says(record.get("label"), False):  # of TRL's unpaired preferences
        left_out["answers with a 'label' of false were left out"] += 1
        return []
    if form.answered is None:
        turns = _all_turns(record[form.asked])
    else:
        turns = _one_side(record, form.answered, "assistant")
        if _role(turns[0]) not in ("user", "system"):  # else it is all of the dialogue
            turns = [*_one_side(record, form.asked, "user", form.about), *turns]
    turns = [*_history(record), *turns]
    system = next((record[name] for name in SYSTEM if record.get(name)), None)
    if system and _role(turns[0]) != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns


def _no_form(record: Record) -> BadDialogue:
    for name, value in record.items():
        if isinstance(value, str) and (mark := MARKS.match(value.lstrip())):
            return BadDialogue(
                "text of a template",
                f"its {shown(name)!r} is text in a chat template ({mark[0]}), not turns: name a "
                "file that has these as lists, or train on the text by --option pretrain",
            )
    has = ", ".join(map(shown, sorted(record)[:SHOWN_FIELDS])) or "nothing"
    return BadDialogue("no dialogue", f"no dialogue (has: {has}); the forms read are {READ}")


def _all_turns(value: Any) -> list[Any]:
    """The turns of a dialogue that is all in one field."""
    value = _parsed(value)
    turns = _as_turns(value)
    if turns is None and isinstance(value, list):
        turns = value  # what is wrong with its items is told of these
    if not turns:
        raise BadDialogue("no turns", f"its turns are {shown(value)!r}; {TURN}")
    return turns


def _one_side(record: Record, name: str, role: str, about: str | None = None) -> list[Any]:
    """The turns in a field of the user's or the assistant's side; most often it is one text."""
    value = record[name]
    turns = _as_turns(value)
    if turns is not None:
        return turns
    if isinstance(value, list) and len(value) > 1 and all(isinstance(each, str) for each in value):
        raise BadDialogue("several texts", f"its {name!r} is a list of texts: give one of them")
    below = record.get(about) if about else None
    if isinstance(value, str) and isinstance(below, str) and below.strip():
        value = f"{value}\n{below}"
    elif below and not isinstance(below, str):
        raise BadDialogue("no text", f"its {about!r} is {shown(below)!r}; give it words")
    return [{"role": role, "content": value}]


def _as_turns(value: Any) -> list[Any] | None:
    """The turns of a list, of JSON that is one (so .csv has it), or of HH's text; else None."""
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        _, *pieces = HH.split(value)
        return [
            {"role": speaker, "content": text}
            for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
        ]
    if isinstance(value, str):
        items = _parsed(value)
        return items if isinstance(items, list) and items and all(map(_is_turn, items)) else None
    if isinstance(value, dict) and _named(value) is not None:
        return [value]  # LLaMA-Factory's `chosen`
    if isinstance(value, list) and value and isinstance(value[0], dict):
        names = next((names for names in PAIRS if {*names} <= value[0].keys()), None)
        if names:
            return [turn for pair in value for turn in _turns_of_pair(pair, names)]
        if "role" in value[0] or "from" in value[0]:
            return value
    return None


def _parsed(value: Any) -> Any:
    """A list that a text has as JSON, as .csv does; any other value as it is."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _turns_of_pair(pair: Any, names: tuple[str, str]) -> list[Any]:
    if not isinstance(pair, dict) or not {*names} <= pair.keys():
        raise BadDialogue("no turn", f"the turn {shown(pair)!r} is not {' and '.join(names)}")
    system = [{"role": "system", "content": pair["system"]}] if pair.get("system") else []
    sides = zip(("user", "assistant"), names, strict=True)
    return [*system, *({"role": role, "content": pair[name]} for role, name in sides)]


def _history(record: Record) -> list[Any]:
    """LLaMA-Factory's `history`, pairs of a question and its answer, as turns."""
    pairs = _parsed(record.get("history")) or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise BadDialogue("a bad history", 'its history is no list of ["question", "answer"]')
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


# ---------------------------------------------------------------------------- trees of messages


def _with_trees(
    records: Iterable[tuple[int, Any]], place_of: Callable[[int], str], intake: Intake
) -> Iterator[tuple[int, Any]]:
    """The records; those that are messages of OASST's are put together to nested trees.

    A tree's messages may stand anywhere in the file, so all are held until it ends.
    """
    replies: dict[str | None, list[Record]] = {}  # by the parent's id; None: what begins a tree
    ids: set[str] = set()  # none twice, so that what hangs on a first message is a tree
    held = 0
    for number, record in records:
        if not (isinstance(record, dict) and record.keys() >= MESSAGE):
            yield number, record
            continue
        message = {name: record.get(name) for name in KEPT} | {"line": number}
        message["parent_id"] = message["parent_id"] or None  # "" in .csv
        problem = _message_problem(message, ids)
        if problem:
            intake.add_fault("a bad message", f"{place_of(number)}: {problem}")
            continue
        name = message["message_id"]
        ids.add(name)
        message["replies"] = replies.setdefault(name, [])
        replies.setdefault(message["parent_id"], []).append(message)
        held += len(message["text"]) + MESSAGE_BYTES
        if held > MOST_HELD:
            raise UsageError(
                f"{place_of(number)}: more messages of trees than {MOST_HELD:,} bytes of memory "
                "hold: cut the file between two trees"
            )
    roots = replies.get(None, [])
    yield from ((root["line"], {"message_tree_id": None, "prompt": root}) for root in roots)
    lost = len(ids) - sum(1 for root in roots for _ in _messages(root))
    if lost:  # their parents are not in the file, or they are each other's
        intake.left_out["messages without the first of their tree were left out"] += lost


def _message_problem(message: Record, ids: set[str]) -> str | None:
    """What is wrong with a message of a flat file; None for a good one."""
    for name in ("message_id", "parent_id", "text"):
        value = message[name]
        if not isinstance(value, str) and (value is not None or name != "parent_id"):
            return f"the {name} of a message is {shown(value)!r}; give it a text"
    name = message["message_id"]
    return f"the message_id {shown(name)!r} is there twice" if name in ids else None


def _messages(root: Record) -> Iterator[Record]:
    """A message and all that hang on it. Without recursion: a tree may be a long chain."""
    waiting = [root]
    while waiting:
        message = waiting.pop()
        yield message
        waiting += _replies(message)


def _replies(message: Record) -> list[Record]:
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(each, dict) for each in replies):
        raise BadDialogue("bad replies", f"the replies of a message are {shown(replies)!r}")
    return replies


def _best_path(root: Record, left_out: Counter[str]) -> list[Record]:
    """The turns from a tree's first message on, by the reply that people ranked first (0) each."""
    path: list[Record] = []
    replies = [root]
    while good := [each for each in replies if not _is_rejected(each)]:
        message = min(good, key=_rank)  # of equal ones the first
        path.append({"role": message.get("role"), "content": message.get("text")})
        replies = _replies(message)
    beside = sum(1 for _ in _messages(root)) - len(path)
    left_out["messages beside the best path of their tree were left out"] += beside
    return path


def _is_rejected(message: Record) -> bool:
    """Whether a message was deleted, or its reviewers did not accept it."""
    return _says(message.get("deleted"), True) or _says(message.get("review_result"), False)


def _says(value: Any, answer: bool) -> bool:
    """Whether a value is true, or false, also as a word, as .csv has it."""
    return value is answer or value in (str(answer), str(answer).lower())


def _rank(message: Record) -> float:
    rank = message.get("rank")
    with contextlib.suppress(ValueError, OverflowError):
        if isinstance(rank, int | float | str) and not math.isnan(rank := float(rank)):
            return rank
    return math.inf


# ---------------------------------------------------------------------------- turns


def _exchanges(turns: list[Any], left_out: Counter[str]) -> tuple[list[Exchange], str]:
    """The answered questions of a dialogue, and its system text."""
    spoken = [turn for turn in (_turn(turn, left_out) for turn in turns) if turn is not None]
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


def _turn(turn: Any, left_out: Counter[str]) -> tuple[str, str] | None:
    """(role, text) of a turn: OpenAI's role and content, or ShareGPT's from and value.

    None for a tool's. An assistant's text may be empty, of a call of a tool or no answer, and a
    system's, of a form that was filled in.
    """
    if not isinstance(turn, dict):
        raise BadDialogue("no turn", f"the turn {shown(turn)!r} is not an object; {TURN}")
    named, role, text = _named(turn), _role(turn), turn.get("content")
    text = turn.get("value") if text is None else text
    if isinstance(named, str) and named.lower() in TOOLS:
        left_out["turns of tools and functions were left out"] += 1
        return None
    if role is None:
        raise BadDialogue(
            "an unknown role",
            f"the role {shown(named)!r} is not one of {', '.join(ROLES)}; rename it or take the "
            "line out",
        )
    if isinstance(text, list):
        text = _text_of_parts(text, left_out)
    if text is None and role != "user":
        text = ""
    if not isinstance(text, str) or not (text.strip() or role != "user"):
        raise BadDialogue(
            "a turn without text",
            f"the text of a turn of {named!r} is {shown(text)!r}; give it words or take the "
            "line out",
        )
    if not is_text(text):  # JSON can escape what UTF-8 cannot encode
        kind = "half a surrogate pair"
        raise BadDialogue(kind, f"{kind} in a text; repair the line")
    return role, with_lf(text).strip()


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


def _named(turn: Any) -> Any:
    """Who speaks a turn, as the file names it."""
    return (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None


def _role(turn: Any) -> str | None:
    """Who speaks a turn: user, assistant or system; None for anybody else."""
    named = _named(turn)
    return ROLES.get(named.lower()) if isinstance(named, str) else None
