"""Dialogues in files: every form of the data sets is read alike, and bad ones are told of."""

from __future__ import annotations

import csv
import gzip
import json
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minllama.system.errors import UsageError
from minllama.text.chat import ChatTemplate
from minllama.text.dialogues import FORMS, Dialogue, Intake, read_dialogues
from tokenizer import Tokenizer
from utils import ChatDataset

ASKED = [("Where does a fox live?", "In a den."), ("And a bear?", "In a cave.")]
TURNS = [text for exchange in ASKED for text in exchange]


def dataset(*dialogues: Dialogue, context: int = 256) -> ChatDataset:
    return ChatDataset(dialogues, Tokenizer(), ChatTemplate(), context)


def said(role: str, text: str, first: str, second: str) -> list[dict[str, str]]:
    """The dialogue in the words of one of the forms."""
    names = [first, second] * 2
    return [{role: name, text: turn} for name, turn in zip(names, TURNS, strict=True)]


LISTS = {
    "minimind": {"conversations": said("role", "content", "user", "assistant")},
    "sharegpt": {"id": "7", "conversations": said("from", "value", "human", "gpt")},
    "openai": {"messages": said("role", "content", "user", "assistant")},
}


@pytest.mark.parametrize("form", LISTS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_every_form_is_read_alike(tmp_path, form, name):
    """Two dialogues, blank lines between them and CRLF; the second has a system text."""
    (key, turns) = list(LISTS[form].items())[-1]
    speaker, text = turns[0]
    system = [{speaker: "system", text: "Be brief. "}]
    lines = [LISTS[form], {key: [*system, *turns]}]
    content = "\ufeff" + "\r\n\r\n".join(map(json.dumps, lines))
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert [*read_dialogues(path)] == [Dialogue(ASKED, "", 1), Dialogue(ASKED, "Be brief.", 3)]


def test_a_prompt_and_its_response_are_a_dialogue(tmp_path):
    """And a last question that nobody answered is left out."""
    path = tmp_path / "a.jsonl"
    asked = {"role": "user", "content": "And a mole?"}
    both = [{"prompt": " 狐狸住在哪里？\n", "response": "洞里。", "source": 3}]
    both += [{"conversations": [*LISTS["minimind"]["conversations"], asked]}]
    path.write_text("\n".join(map(json.dumps, both)), encoding="utf-8")
    assert [each.exchanges for each in read_dialogues(path)] == [
        [("狐狸住在哪里？", "洞里。")],
        ASKED,
    ]


def test_alpacas_fields_are_a_dialogue(tmp_path):
    """As most of the Chinese sets have it, with LLaMA-Factory's `system` and `history`."""
    path = tmp_path / "a.jsonl"
    lines = [
        {"instruction": "翻译成英文", "input": "狐狸", "output": "fox"},
        {"instruction": "Say hi.", "input": "", "output": "Hi.", "system": "Be brief."},
        {"instruction": "And now?", "output": "Yes.", "history": [["Is it day?", "No."]]},
        {"prompt": "Hi", "completion": " Ho"},
        {"conversations": LISTS["minimind"]["conversations"], "system": "Be brief."},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    one_list = tmp_path / "a.json"
    one_list.write_text(json.dumps(lines, indent=2, ensure_ascii=False), encoding="utf-8")
    of_list = [(each.exchanges, each.system) for each in read_dialogues(one_list)]
    assert of_list == [(each.exchanges, each.system) for each in read_dialogues(path)]
    assert [*read_dialogues(path)] == [
        Dialogue([("翻译成英文\n狐狸", "fox")], "", 1),
        Dialogue([("Say hi.", "Hi.")], "Be brief.", 2),
        Dialogue([("Is it day?", "No."), ("And now?", "Yes.")], "", 3),
        Dialogue([("Hi", "Ho")], "", 4),
        Dialogue(ASKED, "Be brief.", 5),
    ]


# ---------------------------------------------------------------------------- the hub's forms


def turns_of(exchanges, names=("user", "assistant"), keys=("role", "content")) -> list[dict]:
    """The dialogue as turns."""
    return [
        dict(zip(keys, pair, strict=True))
        for each in exchanges
        for pair in zip(names, each, strict=True)
    ]


def transcript(exchanges) -> str:
    """The dialogue as HH writes it."""
    return "".join(
        f"\n\nHuman: {question}\n\nAssistant: {answer}" for question, answer in exchanges
    )


def messages_of(exchanges) -> list[dict[str, Any]]:
    """The dialogue as OASST's flat messages, each with a worse sibling before and after it."""
    messages, parent = [], None
    for number, (role, text) in enumerate(
        (turn["role"], turn["content"]) for turn in turns_of(exchanges, ("prompter", "assistant"))
    ):
        ranked = [(1, "worse"), (0, text), (None, "unranked")] if parent else [(None, text)]
        ranked += [(0, "deleted")] if parent else []
        for rank, words in ranked:
            name = f"{number}-{words[:8]}" if words != text else f"{number}"
            messages.append({"message_id": name, "parent_id": parent, "text": words, "role": role})
            messages[-1] |= {"rank": rank, "deleted": words == "deleted", "message_tree_id": "0"}
        parent = f"{number}"
    return messages


def tree_of(exchanges) -> dict[str, Any]:
    """The same, nested."""
    messages = messages_of(exchanges)
    for message in messages:
        message["replies"] = [
            each for each in messages if each["parent_id"] == message["message_id"]
        ]
    return {"message_tree_id": "0", "tree_state": "ready_for_export", "prompt": messages[0]}


def pair_form(question: str, answer: str, about: str | None = None) -> Callable:
    """Writes a form of one question and one answer; what was said before is its history."""

    def write(exchanges):
        (asked, answered), before = exchanges[-1], exchanges[:-1]
        record = {question: asked, answer: answered, "history": [list(each) for each in before]}
        if about and "\n" in asked:
            record[question], record[about] = asked.split("\n", 1)
        return record

    return write


def last_chosen(before: str, exchanges) -> dict[str, Any]:
    """A preference set's: the turns but the last, and that one."""
    turns = turns_of(exchanges)
    return {before: turns[:-1], "chosen": turns[-1:], "rejected": turns_of([("", "Bad.")])[1:]}


sharegpt = {"names": ("human", "gpt"), "keys": ("from", "value")}
WRITERS: dict[str, Callable[[list[tuple[str, str]]], Any]] = {
    "conversations": lambda e: {"conversations": turns_of(e, **sharegpt)},
    "messages": lambda e: {"messages": turns_of(e), "label": True},
    "a list": turns_of,
    "JSON in a text": lambda e: {"messages": json.dumps(turns_of(e))},
    "content in parts": lambda e: {
        "messages": [t | {"content": [{"type": "text", "text": t["content"]}]} for t in turns_of(e)]
    },
    "conversation": lambda e: {"conversation": [{"human": q, "assistant": a} for q, a in e]},
    "Capybara's": lambda e: {"conversation": [{"input": q, "output": a} for q, a in e]},
    "conversations+chosen": lambda e: {
        "conversations": turns_of(e, **sharegpt)[:-1],
        "chosen": {"from": "gpt", "value": e[-1][1]},
        "rejected": {"from": "gpt", "value": "Bad."},
    },
    "messages+chosen": lambda e: {
        "prompt": e[0][0], "messages": turns_of(e), "chosen": turns_of(e), "score_chosen": 8.0
    },
    "prompt+chosen": lambda e: last_chosen("prompt", e),
    "prompt+chosen, texts": pair_form("prompt", "chosen"),
    "prompt+chosen, HH": lambda e: {
        "prompt": transcript(e)[: -len(e[-1][1])], "chosen": e[-1][1], "rejected": "Bad."
    },
    "instruction+chosen": pair_form("instruction", "chosen", "input"),
    "question+chosen": pair_form("question", "chosen"),
    "input+chosen": pair_form("input", "chosen"),
    "chosen": lambda e: {"chosen": transcript(e), "rejected": transcript([("Hi", "Ho")])},
    "chosen, turns": lambda e: {"chosen": turns_of(e), "rejected": turns_of(e)[:-1]},
    "prompt+response": pair_form("prompt", "response"),
    "prompt+completion": lambda e: {"prompt": turns_of(e)[:-1], "completion": turns_of(e)[-1:]},
    "prompt+completion, texts": pair_form("prompt", "completion"),
    "instruction+output": pair_form("instruction", "output", "input"),
    "instruction+response": pair_form("instruction", "response", "context"),
    "question+answer": pair_form("question", "answer"),
    "question+response": pair_form("question", "response"),
    "input+target": pair_form("input", "target"),
    "input+output": pair_form("input", "output"),
    "OASST's messages": messages_of,
    "OASST's tree": tree_of,
}  # fmt: skip
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).map(
    lambda text: f"a {text}\nb".replace("\r", " ")
)


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


def test_every_form_of_the_table_has_a_writer():
    """So that none is in the table that the next test does not try."""
    assert {name.split(",")[0] for name in WRITERS} >= {str(form) for form in FORMS}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), st.none() | TEXTS)
def test_every_form_gives_the_ids_of_our_own(tmp_path_factory, exchanges, system):
    """Of the same dialogue: the same token ids, and the same of them to learn."""
    folder = tmp_path_factory.mktemp("forms")
    own = {"conversations": turns_of(exchanges)} | ({"system": system} if system else {})
    expected = dataset(*read_dialogues(write_lines(folder / "own.jsonl", own)), context=4096)
    assert len(expected) == 1
    for name, write in WRITERS.items():
        written = write(exchanges)
        if name == "OASST's messages":
            records = random.Random(0).sample(written, len(written))  # in any order
        elif isinstance(written, dict) and name != "OASST's tree":
            records = [written | ({"system": system} if system else {})]
        elif name == "a list" and system:
            records = [[{"role": "system", "content": system}, *written]]
        else:
            records = [written]
        if name.startswith("OASST") and system:
            continue  # they have none
        path = write_lines(folder / "a.jsonl", *records)
        intake = Intake()
        found = dataset(*read_dialogues(path, intake=intake), context=4096)
        assert found.tokens.tolist() == expected.tokens.tolist(), name
        assert found.is_answer.tolist() == expected.is_answer.tolist(), name
        listed = folder / "a.json"  # the same in one list: of dialogues, lists of turns or messages
        listed.write_text(json.dumps(records, indent=1), encoding="utf-8")
        found = dataset(*read_dialogues(listed), context=4096)
        assert found.tokens.tolist() == expected.tokens.tolist(), name


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    """As spreadsheets and pandas write it: cells of text, lists as JSON, nothing for null."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys())
        writer.writeheader()
        for record in records:
            cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()}
            writer.writerow(cells)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.none() | TEXTS)
def test_rows_of_tables_give_the_same_ids(tmp_path_factory, exchanges, system):
    """Parquet, whose lists of structs are lists of turns with null for what a turn lacks; CSV."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("tables")
    said = {"system": system} if system else {}
    own = {"messages": turns_of(exchanges)} | said
    expected = dataset(*read_dialogues(write_lines(folder / "own.jsonl", own)), context=4096)
    for name, write in WRITERS.items():
        written = write(exchanges)
        if name == "a list" or (name.startswith("OASST") and system):
            continue
        records = written if isinstance(written, list) else [written | said]
        tables = [folder / "a.parquet"]
        parquet.write_table(pyarrow.Table.from_pylist(records), tables[0])
        if not any(isinstance(value, dict) for value in records[0].values()):
            tables.append(folder / "a.csv")
            write_csv(tables[1], records)
        for path in tables:
            found = dataset(*read_dialogues(path), context=4096)
            assert found.tokens.tolist() == expected.tokens.tolist(), (name, path.name)
            assert found.is_answer.tolist() == expected.is_answer.tolist(), (name, path.name)


def test_a_bad_row_and_a_table_of_other_things_are_named(tmp_path):
    """By row or line; a table without the columns of any form by its columns, before it is read."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "a", "response": "b"}, {"prompt": None, "response": "b"}]
    turns = [{"role": "user", "content": "a", "from": None}, {"role": "poet", "content": "b"}]
    for records, row, line, problem in (
        (rows, ", row 2", ":3", "the text of a turn of 'user' is '"),
        ([{"messages": turns}], ", row 1", ":2", "the role 'poet' is not one of"),
        ([{"text": "a", "label": 1}], "", "", r"no dialogue \(has: label, text\); the forms read"),
        ([{"messages": "a, b"}], ", row 1", ":2", "its turns are 'a, b'"),
    ):
        parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
        write_csv(tmp_path / "a.csv", records)
        for name, place in (("a.parquet", row), ("a.csv", line)):
            with pytest.raises(UsageError, match=f"{name}{place}: {problem}"):
                list(read_dialogues(tmp_path / name))


def test_where_two_forms_fit_the_more_specific_is_taken_and_said(tmp_path):
    """What was chosen before what was not, turns before texts; Alpaca's `input` is no question."""
    turns = turns_of([("Q", "chosen")])
    both = {"prompt": "P", "response": "R", "messages": turns, "prompt_id": "7"}
    preference = {"prompt": "Q", "response": "not", "chosen": "chosen", "rejected": "not"}
    alpaca = {"instruction": "Q", "input": "about", "output": "chosen"}
    unpaired = [{"prompt": "Q", "completion": "not", "label": label} for label in (False, "False")]
    labelled = {"question": "Q", "answer": "of class", "label": 0}
    path = write_lines(tmp_path / "a.jsonl", both, preference, alpaca, *unpaired, labelled)
    intake = Intake()
    read = [each.exchanges for each in read_dialogues(path, intake=intake)]
    assert read == [
        [("Q", "chosen")],
        [("Q", "chosen")],
        [("Q\nabout", "chosen")],
        [("Q", "of class")],
    ]
    assert sorted(intake.lines()) == [
        "  1 dialogues were read by messages, and not by prompt, response",
        "  1 dialogues were read by prompt+chosen, and not by response",
        "  2 answers with a 'label' of false were left out",
    ]


def test_what_is_beside_the_best_path_of_a_tree_is_counted(tmp_path):
    """And what hangs on no first question: an unknown parent, or parents in a circle."""
    lost = [
        {"message_id": a, "parent_id": b, "role": "assistant", "text": "x"}
        for a, b in ("ab", "ba", "cz", "dd")
    ]
    path = write_lines(tmp_path / "a.jsonl", *lost, *messages_of(ASKED))
    intake = Intake()
    assert [each.exchanges for each in read_dialogues(path, intake=intake)] == [ASKED]
    assert sorted(intake.lines()) == [
        "  4 messages without the first of their tree were left out",
        "  9 messages beside the best path of their tree were left out",
    ]
    twice = write_lines(tmp_path / "b.jsonl", *messages_of(ASKED), *lost, lost[0])
    with pytest.raises(UsageError, match=r"b.jsonl:18: the message_id 'a' is there twice\n"):
        list(read_dialogues(twice))


# ---------------------------------------------------------------------------- bad ones


BAD = {
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    '{"prompt": ' + "1" * 5000 + ', "response": "b"}': "not JSON",
    '"hello"': "not a JSON object",
    "[]": r"its turns are '\[\]'",
    '["a"]': "the turn 'a' is not an object",
    "[": "not JSON",
    '{"instruction": "a", "output": "b", "history": 5}': "its history is no list of",
    '{"instruction": "a", "output": "b", "history": ["ab"]}': "its history is no list of",
    '{"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}': "its history is no list",
    '{"instruction": "a", "output": "b", "history": [["a", 3]]}': "'assistant' is '3'",
    '{"instruction": null, "input": "a", "output": "b"}': "the text of a turn of 'user' is 'None'",
    '{"prompt": "a", "response": "b", "system": 3}': "the text of a turn of 'system' is '3'",
    "{}": r"no dialogue \(has: nothing\); the forms read are conversations\+chosen, ",
    '{"text": "Once"}': r"no dialogue \(has: text\)",
    '{"prompt": "a"}': r"\(has: prompt\)",
    '{"prompt": 3, "response": "b"}': "the text of a turn of 'user' is '3'",
    '{"prompt": "a", "response": "\\ud800"}': "half a surrogate pair",
    '{"conversations": {"a": 1}}': "its turns are",
    '{"conversations": "User: hello"}': "its turns are 'User: hello'",
    '{"conversations": [{"role": {"a": 1}, "content": "x"}]}': "the role \"{'a': 1}\" is not",
    '{"conversation": [{"human": "a", "assistant": "b"}, {"human": "c"}]}': "is not human and assi",
    '{"chosen": "The sky is blue.", "rejected": "Green."}': "its turns are 'The sky is blue.'",
    '{"instruction": "a", "output": ["good", "bad"]}': "its 'output' is a list of texts: give one",
    '{"instruction": "a", "input": {"b": 1}, "output": "c"}': "its 'input' is \"{'b': 1}\"",
    '{"text": "<|im_start|>user\\nHi<|im_end|>"}': r"'text' is text in a chat .*im_start\|>\)",
    '{"t": "### Human: Hi ### Assistant: Ho"}': r"template \(### Human:\), not turns: name a file",
    '{"message_id": 7, "role": "prompter", "text": "a"}': "message_id of a message is '7'",
    '{"message_tree_id": "a", "prompt": {"role": "prompter", "text": "a", "replies": 5}}': "the r",
    '{"conversations": []}': "its turns are",
    '{"conversations": ["hello"]}': "the turn 'hello' is not an object",
    '{"conversations": [{"role": "bard", "content": "x"}]}': "the role 'bard' is not one of human,",
    '{"conversations": [{"role": null, "content": "x"}]}': "the role 'None'",
    '{"messages": [{"from": "human", "value": null}]}': "a turn of 'human' is 'None'",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "a turn of 'user' is ''",
    '{"messages": [{"from": "human", "value": "x"}, {"from": "system", "value": "y"}]}': (
        "a turn of 'system' behind others"
    ),
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named(tmp_path, line):
    """By file and line, with what is wrong in few words and what to do, and no traceback."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line, encoding="utf-8")
    with pytest.raises(UsageError, match=BAD[line]) as error:
        list(read_dialogues(path))
    fault, remedy = str(error.value).split("\n")
    assert fault.startswith(f"{path}:2: ") and len(fault) < len(str(path)) + 450
    assert remedy.endswith("1 of 2 dialogues are bad; --skip_bad_lines trains on the others")
    intake = Intake(skip_bad_lines=True)
    assert [each.line for each in read_dialogues(path, intake=intake)] == [1]
    assert intake.lines() == [f"  left out: {fault}"]


def test_all_lines_are_read_before_one_of_them_ends_it(tmp_path):
    """Of many bad lines the first ended it, and the next one showed after its repair.

    All are counted by their kind, the first of each is told of, and none of them is in the way of
    the others, if that is asked for.
    """
    good, role = (
        '{"prompt": "a", "response": "b"}',
        '{"messages": [{"role": "%s", "content": "x"}]}',
    )
    lines = [good, "{", good, role % "bard", "nonsense", role % "poet", good, '{"text": "x"}']
    path = tmp_path / "a.jsonl"
    for order in (lines, [lines[1], lines[0], *lines[2:]]):  # the first line may be bad, too
        path.write_text("\n".join(order), encoding="utf-8")
        with pytest.raises(UsageError) as error:
            list(read_dialogues(path))
        told = str(error.value).split("\n")
        places = [order.index("{") + 1, 4, 8]
        assert [line.split(": ")[0] for line in told] == [f"{path}:{n}" for n in places] + [
            str(path)
        ]
        assert told[0].endswith("(and 1 more like it)") and told[1].endswith("(and 1 more like it)")
        assert "5 of 8 dialogues are bad" in told[-1]
        intake = Intake(skip_bad_lines=True)
        assert len([*read_dialogues(path, intake=intake)]) == 3 == len(intake.lines())


def test_dialogues_as_people_have_them(tmp_path):
    """A list of turns a line, roles that repeat or begin wrongly, tools, null, and parts.

    Each ended the reading of all, or was no dialogue.
    """

    def turn(role, content):
        return {"role": role, "content": content}

    ask, answer = turn("user", "Where?"), turn("assistant", "Here.")
    parts = [
        {"type": "text", "text": "Look:"},
        {"type": "image_url"},
        {"type": "text", "text": "x"},
    ]
    call = turn("assistant", None) | {"tool_calls": [{"id": 1}]}
    cases = [
        ([ask, answer], [("Where?", "Here.")], ""),
        ([turn("developer", "Be brief."), ask, answer], [("Where?", "Here.")], "Be brief."),
        ([ask, turn("user", "Who?"), answer, turn("assistant", "Now.")],
         [("Where?\nWho?", "Here.\nNow.")], ""),
        ([turn("assistant", "Hello!"), ask, answer], [("Where?", "Here.")], ""),
        ([ask, call, turn("tool", "{}"), turn("function", "7"), answer], [("Where?", "Here.")], ""),
        ([turn("user", parts), answer], [("Look:\nx", "Here.")], ""),
        ([turn("user", "Why?"), turn("assistant", " "), ask, answer], [("Where?", "Here.")], ""),
        ([turn("system", ""), turn("user", "a\rb"), answer], [("a\nb", "Here.")], ""),
    ]  # fmt: skip
    lines = [case[0] for case in cases] + [{"question": "Q", "answer": "A"}]
    lines += [{"instruction": "x", "input": "", "output": ""}]  # as 28 of Alpaca's are
    lists, objects = tmp_path / "lists.jsonl", tmp_path / "objects.jsonl"
    lists.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    wrapped = [line if isinstance(line, dict) else {"messages": line} for line in lines]
    objects.write_text("\n".join(map(json.dumps, wrapped)), encoding="utf-8")
    one = tmp_path / "one.json"
    one.write_text(json.dumps(wrapped), encoding="utf-8")
    expected = [case[1:] for case in cases] + [([("Q", "A")], "")]
    for path in (lists, objects, one):
        intake = Intake()
        read = [*read_dialogues(path, intake=intake)]
        assert [(each.exchanges, each.system) for each in read] == expected
        assert dataset(*read).dialogues == len(expected)
        assert sorted(intake.lines()) == [
            "  1 parts of the kind 'image_url' were left out",
            "  1 turns of an assistant that began were left out",
            "  2 questions without an answer were left out",
            "  2 turns of tools and functions were left out",
            "  2 turns were joined with the one before, of the same role",
        ]


def test_a_dialogue_that_says_where_it_is_from_is_no_turn(tmp_path):
    """A list of them in one line was taken for one dialogue, of a role `reddit`."""
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(3 * [{"from": "reddit", "conversations": turns}]), encoding="utf-8")
    assert len(list(read_dialogues(path))) == 3


def chain(count: int) -> list[dict[str, Any]]:
    """A dialogue in which everybody has one more thing to say."""
    return [
        {"message_id": str(i), "parent_id": str(i - 1) if i else None, "text": "x"}
        | {"role": ("prompter", "assistant")[i % 2]}
        for i in range(count)
    ]


def test_trees_of_any_shape_take_little_time_and_memory(tmp_path):
    """A long chain, very many replies to one message, and as many that hang on nothing."""
    first, count = chain(2), 5_000
    many = [first[1] | {"message_id": f"m{i}", "parent_id": "0"} for i in range(count)]
    nothing = [first[1] | {"message_id": f"m{i}", "parent_id": f"m{i + 1}"} for i in range(count)]
    for name, records in {
        "a": chain(count),
        "b": [first[0], *many],
        "c": [*first, *nothing],
    }.items():
        path = write_lines(tmp_path / f"{name}.jsonl", *records)
        started = time.process_time()
        tracemalloc.start()
        assert len(list(read_dialogues(path))) == 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - started < 5 and peak < count * 2_000


def test_more_trees_than_memory_holds_are_refused(tmp_path, monkeypatch):
    """In one line, before they are all read."""
    monkeypatch.setattr("minllama.text.dialogues.MOST_HELD", 10_000)
    path = write_lines(tmp_path / "a.jsonl", *chain(50))
    with pytest.raises(UsageError, match=r"a.jsonl:10: more messages of trees than 10,000 bytes"):
        list(read_dialogues(path))


DEEP = 50_000
HOSTILE = {
    "nested replies": '{"message_tree_id": "0", "prompt": '
    + '{"role": "prompter", "text": "x", "replies": [' * DEEP + "]}" * DEEP + "}",
    "nested content": '{"messages": [{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]}",
    "a nested role": '{"messages": [{"role": ' + "[" * 900 + "]" * 900 + ', "content": "x"}]}',
    "a nested label": '{"prompt": "x", "chosen": "y", "label": ' + "[" * 900 + "]" * 900 + "}",
    "a nested text in JSON": json.dumps({"messages": "[{" + '"a":[{' * DEEP}),
    "names of fields": json.dumps({"\n\x1b[31m" + "x" * 10**6 + str(i): 1 for i in range(9)}),
    "a rank": '{"message_tree_id": "0", "prompt": {"role": "prompter", "text": 1, "replies": ['
    '{"rank": NaN}, {"rank": {}}, {"rank": 1e999}]}}',
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_line_is_one_line_of_error(tmp_path, name):
    """Whatever its depth and size, in printed characters; or it is read as what it says."""
    path = tmp_path / "a.jsonl"
    path.write_text(HOSTILE[name] + "\n" + '{"prompt": "a", "response": "b"}', encoding="utf-8")
    intake = Intake(skip_bad_lines=True)
    started = time.process_time()
    assert len(list(read_dialogues(path, intake=intake))) == 1 + (name == "a nested label")
    assert time.process_time() - started < 20
    for line in intake.lines():
        assert line.isprintable() and len(line) < len(str(path)) + 900


ODD = (
    None,
    True,
    0,
    -1.5,
    float("nan"),
    "",
    "a\x1b[2J",
    "\ud800",
    "[{",
    [],
    ["a", "b"],
    [[]],
    {},
    {"role": []},
)


def with_odd_parts(value: Any):
    """Copies of a value, in each of which one part of it is something else, or is not there."""
    yield from ODD
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            for odd in with_odd_parts(value[key]):
                copy = value.copy()
                copy[key] = odd
                yield copy
            copy = value.copy()
            del copy[key]
            yield copy


@pytest.mark.parametrize("name", WRITERS)
def test_any_part_of_a_dialogue_may_be_anything(tmp_path, name):
    """It is read, or it is told of in a line of printed characters; nothing else is raised."""
    told = 0
    for record in with_odd_parts(WRITERS[name](ASKED[:1])):
        path = tmp_path / "a.json"  # a list of one, or of messages
        is_list = name == "OASST's messages" and isinstance(record, list)
        path.write_text(json.dumps(record if is_list else [record]), encoding="utf-8")
        intake = Intake(skip_bad_lines=True)
        for dialogue in read_dialogues(path, intake=intake):
            texts = [dialogue.system, *(text for pair in dialogue.exchanges for text in pair)]
            assert all(isinstance(text, str) for text in texts) and all(texts[1:])
        for line in intake.lines():
            assert line.isprintable() and len(line) < len(str(path)) + 600
        told += bool(intake.faults)
    assert told
