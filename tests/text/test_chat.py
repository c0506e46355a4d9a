"""Dialogues: read from every form, set as text, cut to a context, with the answers as targets."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_model

from config import IGNORE_INDEX
from llama import NextTokenLoss, load_pretrained, model_payload
from minllama.formats.export import export
from minllama.formats.pt_file import save_pt
from minllama.model.kernels import linear_cross_entropy
from minllama.system.errors import UsageError
from minllama.text.chat import ChatTemplate, Cuts, Dialogue, Intake, encode_dialogue, read_dialogues
from minllama.text.reading import Reading
from tokenizer import Tokenizer
from utils import ChatDataset

ASKED = [("Where does a fox live?", "In a den."), ("And a bear?", "In a cave.")]
SPOKEN = Dialogue(ASKED, "Be brief.")
TURNS = [text for exchange in ASKED for text in exchange]


def dataset(*dialogues: Dialogue, context: int = 256) -> ChatDataset:
    return ChatDataset(dialogues, Tokenizer(), ChatTemplate(), context)


# ---------------------------------------------------------------------------- files


def said(role: str, text: str, first: str, second: str) -> list[dict[str, str]]:
    """The dialogue in the words of one of the forms."""
    names = [first, second] * 2
    return [{role: name, text: turn} for name, turn in zip(names, TURNS, strict=True)]


FORMS = {
    "minimind": {"conversations": said("role", "content", "user", "assistant")},
    "sharegpt": {"id": "7", "conversations": said("from", "value", "human", "gpt")},
    "openai": {"messages": said("role", "content", "user", "assistant")},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_every_form_is_read_alike(tmp_path, form, name):
    """Two dialogues, blank lines between them and CRLF; the second has a system text."""
    (key, turns) = list(FORMS[form].items())[-1]
    speaker, text = turns[0]
    system = [{speaker: "system", text: "Be brief. "}]
    lines = [FORMS[form], {key: [*system, *turns]}]
    content = "\ufeff" + "\r\n\r\n".join(map(json.dumps, lines))
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    assert [*read_dialogues(path)] == [Dialogue(ASKED, "", 1), Dialogue(ASKED, "Be brief.", 3)]


def test_a_prompt_and_its_response_are_a_dialogue(tmp_path):
    """And a last question that nobody answered is left out."""
    path = tmp_path / "a.jsonl"
    asked = {"role": "user", "content": "And a mole?"}
    both = [{"prompt": " 狐狸住在哪里？\n", "response": "洞里。", "source": 3}]
    both += [{"conversations": [*FORMS["minimind"]["conversations"], asked]}]
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
        {"conversations": FORMS["minimind"]["conversations"], "system": "Be brief."},
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


BAD = {
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    '{"prompt": ' + "1" * 5000 + ', "response": "b"}': "not JSON",
    '"hello"': "not a JSON object",
    "[]": r"its turns are '\[\]'",
    '["a"]': "not a JSON object",
    "[": "not JSON",
    '{"instruction": "a", "output": "b", "history": 5}': "its history is no list of",
    '{"instruction": "a", "output": "b", "history": ["ab"]}': "its history is no list of",
    '{"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}': "its history is no list",
    '{"instruction": "a", "output": "b", "history": [["a", 3]]}': "'assistant' is '3'",
    '{"instruction": null, "input": "a", "output": "b"}': "the text of a turn of 'user' is 'None'",
    '{"prompt": "a", "response": "b", "system": 3}': "the text of a turn of 'system' is '3'",
    "{}": r"no dialogue \(has: nothing\); a line is",
    '{"text": "Once"}': r"no dialogue \(has: text\)",
    '{"prompt": "a"}': r"\(has: prompt\)",
    '{"prompt": 3, "response": "b"}': "the text of a turn of 'user' is '3'",
    '{"prompt": "a", "response": "\\ud800"}': "half a surrogate pair",
    '{"conversations": {"a": 1}}': "its turns are",
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
    assert fault.startswith(f"{path}:2: ") and len(fault) < 400
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


# ---------------------------------------------------------------------------- the template


def test_the_template_is_the_text_that_its_docstring_shows(tokenizer):
    """Pieces of the vocabulary alone: BOS and EOS are the only ids that are no text's."""
    data = dataset(SPOKEN)
    pieces = [tokenizer.sp_model.id_to_piece(i) for i in data.tokens.tolist()]
    text = "".join(pieces).replace("▁", " ").replace("<0x0A>", "\n")
    assert text == (
        "<s> System: Be brief.\nUser: Where does a fox live?\nAssistant: In a den.</s>"
        "<s> User: And a bear?\nAssistant: In a cave.</s>"
    )
    learnt = [piece for piece, is_answer in zip(pieces, data.is_answer, strict=True) if is_answer]
    assert "".join(learnt).replace("▁", " ") == " In a den.</s> In a cave.</s>"


def test_a_conversation_reads_what_was_trained_on(tokenizer):
    """The prompt of the second question is the training's ids, up to where the answer begins."""
    ids = ChatTemplate().prompt_ids(tokenizer, ASKED[1][0], ASKED[:1], "Be brief.")
    trained = dataset(SPOKEN).tokens.tolist()
    assert ids == trained[: len(ids)]
    assert trained[len(ids) :] == tokenizer.encode("In a cave.", bos=False, eos=True)


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_transformers_makes_the_same_ids(tmp_path, system):
    """From the exported folder; the folder's template is known again when it is read."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer()
    model = make_model(tokenizer)
    model.chat_template = ChatTemplate()
    export(model, "hf", tmp_path / "hf", dtype="float32", tokenizer=tokenizer, extra={})
    assert load_pretrained(tmp_path / "hf").chat_template == ChatTemplate()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    odd = [("  naïve\n\n你好 ", " 🙂 x"), *ASKED]
    roles = ["user", "assistant"] * 3
    texts = [text for exchange in odd for text in exchange]
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    messages[:0] = [{"role": "system", "content": system}] if system else []
    stripped = [(question.strip(), answer.strip()) for question, answer in odd]
    whole = dataset(Dialogue(stripped, system)).tokens.tolist()
    made = theirs.apply_chat_template(messages, return_dict=False)
    assert made == whole
    prompt = theirs.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    assert prompt == ChatTemplate().prompt_ids(tokenizer, texts[-2], stripped[:-1], system)
    assert theirs.decode(prompt).endswith("Assistant:")
    # A template of theirs is text, in which a user's `<s>` is the template's: README says so.
    messages = [{"role": "user", "content": "Is <s>old</s> a tag?"}]
    spelt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ours = ChatTemplate().prompt_ids(tokenizer, messages[0]["content"])
    assert spelt.count(tokenizer.bos_id) == 2 and ours.count(tokenizer.bos_id) == 1
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "unless one of its texts spells `<s>` or `</s>`" in readme


def test_the_template_travels_in_the_model_file(tmp_path):
    """Also through a conversion; a file's own labels are used, and checked before."""
    model = make_model(Tokenizer())
    model.chat_template = ChatTemplate(user="问：", assistant="答：")
    save_pt(tmp_path / "a.pt", model_payload(model))
    read = load_pretrained(tmp_path / "a.pt")
    assert read.chat_template == model.chat_template
    export(read, "pt", tmp_path / "b.pt", dtype="float16", tokenizer=Tokenizer(), extra={})
    assert load_pretrained(tmp_path / "b.pt").chat_template == model.chat_template
    assert load_pretrained(Path(__file__).parents[2] / "data/stories-tiny.pt").chat_template is None


@pytest.mark.parametrize(
    "stored",
    [None, "User:", {}, {"user": "U:"}, ChatTemplate().to_stored() | {"more": "x"}]
    + [
        ChatTemplate().to_stored() | {"user": bad} for bad in ("", "a b", "{{x}}", "'", "x" * 99, 7)
    ],
)
def test_a_strange_template_in_a_file_is_refused(tmp_path, stored):
    """Labels go into other programs' templates: none that could be code gets there."""
    payload = model_payload(make_model(Tokenizer())) | {"chat_template": stored}
    save_pt(tmp_path / "a.pt", payload)
    with pytest.raises(UsageError, match="a.pt: its chat template has"):
        load_pretrained(tmp_path / "a.pt")


# ---------------------------------------------------------------------------- what is learnt


def test_the_loss_is_that_of_the_answers_alone(tokenizer):
    """Against plain logits, one sequence at a time; what is masked has no gradient."""
    model = make_model(tokenizer, max_seq_len=256)
    dialogues = [SPOKEN, Dialogue([("Hello!", "Hello.")])]
    tokens, targets = dataset(*dialogues).batch([1, 0])
    loss, count = NextTokenLoss(model)(tokens, targets)
    assert count == dataset(*dialogues).count_targets([1, 0])
    expected, answers = 0.0, 0
    for dialogue in dialogues:
        ids: list[int] = []
        for number, (question, answer) in enumerate(dialogue.exchanges):
            head = f"System: {dialogue.system}\n" if dialogue.system and not number else ""
            text = f"{head}User: {question}\nAssistant:"
            ids += tokenizer.encode(text, bos=True, eos=False)
            for token in tokenizer.encode(answer, bos=False, eos=True):
                with torch.no_grad():
                    logits = model(torch.tensor([ids]))[0][0, -1]
                expected -= logits.log_softmax(-1)[token].item()
                ids, answers = [*ids, token], answers + 1
    assert count == answers and loss.item() == pytest.approx(expected, rel=1e-5)
    hidden = model.hidden_states(tokens).detach().flatten(0, 1).requires_grad_()
    linear_cross_entropy(hidden, model.output.weight, targets.flatten())[0].backward()
    learnt = hidden.grad.abs().sum(-1) > 0
    assert torch.equal(learnt, targets.flatten() != IGNORE_INDEX)
    assert (targets == tokenizer.eos_id).sum() == 3  # the end of each answer is learnt, too


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(0, 8),
    st.integers(20, 120),
)
def test_long_dialogues_are_split_between_questions(words, system_words, context):
    """No part is longer than the context, no answer is lost but those that are told of, and every
    part begins with the system text."""
    tokenizer, template, cuts = Tokenizer(), ChatTemplate(), Cuts(context)
    exchanges = [(f"{i} " + "fox " * q, f"{i} " + "den " * a) for i, (q, a) in enumerate(words)]
    exchanges = [(question.strip(), answer.strip()) for question, answer in exchanges]
    dialogue = Dialogue(exchanges, ("be " * system_words).strip())
    parts = encode_dialogue(dialogue, tokenizer, template, cuts)
    found = []
    for part in parts:
        assert len(part.ids) <= context + 1 and any(part.is_answer) and not part.is_answer[0]
        assert tokenizer.decode(part.ids).startswith(
            f"System: {dialogue.system}\n" if dialogue.system else "User:"
        )
        answers = np.split(part.ids, np.flatnonzero(np.diff(part.is_answer)) + 1)[1::2]
        found += [tokenizer.decode(ids.tolist()) for ids in answers]
    whole = [answer for _, answer in exchanges]
    assert len(found) == len(whole) - cuts.questions
    assert sum(answer not in whole for answer in found) <= cuts.answers
    assert all(any(answer.startswith(cut) for answer in whole) for cut in found)
    assert cuts.dialogues == (len(parts) > 1)
    assert len(cuts.lines()) == sum(map(bool, (cuts.dialogues, cuts.answers, cuts.questions)))


def test_held_out_dialogues_are_whole_and_the_same_every_time():
    """A part of a dialogue in training and another in validation would tell of each other.

    A line served as a dialogue's identity: all those of a list that `json.dump` writes are in line
    1, so they were one, and nothing was held out.
    """
    long = Dialogue(ASKED * 10, "")
    lines = [Dialogue(long.exchanges, "", line) for line in range(1, 41)]
    data = dataset(*lines, context=64)
    assert len(data) > 100
    train, held_out = data.split(0.1)
    assert held_out.dialogues == 4 and len(train) + len(held_out) == len(data)
    assert not {*train.lines} & {*held_out.lines}
    assert data.split(0.1)[1].lines.tolist() == held_out.lines.tolist()
    in_one_line = dataset(*(Dialogue(long.exchanges, "", 1) for _ in range(40)), context=64)
    assert in_one_line.split(0.1)[1].numbers.tolist() == held_out.lines.tolist()
    assert train.batch([0])[0].shape[1] == train.lengths[0]
    assert dataset(SPOKEN).split(0.5)[1] is None and data.split(0)[1] is None


def test_a_dialogue_that_says_where_it_is_from_is_no_turn(tmp_path):
    """A list of them in one line was taken for one dialogue, of a role `reddit`."""
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(3 * [{"from": "reddit", "conversations": turns}]), encoding="utf-8")
    assert len(list(read_dialogues(path, Reading()))) == 3
