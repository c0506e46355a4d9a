"""Dialogues: set as text, cut to a context, with the answers as targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from byte_vocabularies import KINDS, byte_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_model

from config import IGNORE_INDEX
from llama import NextTokenLoss, load_pretrained, model_payload
from minllama.formats.export import export
from minllama.formats.pt_file import save_pt
from minllama.model.kernels import linear_cross_entropy
from minllama.system.errors import UsageError
from minllama.text.chat import ChatTemplate, Cuts, encode_dialogue
from minllama.text.dialogues import Dialogue
from tokenizer import Tokenizer, train_vocabulary
from utils import ChatDataset

ASKED = [("Where does a fox live?", "In a den."), ("And a bear?", "In a cave.")]
SPOKEN = Dialogue(ASKED, "Be brief.")


def dataset(*dialogues: Dialogue, context: int = 256) -> ChatDataset:
    return ChatDataset(dialogues, Tokenizer(), ChatTemplate(), context)


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


@pytest.mark.parametrize("kind", [*KINDS, "symbols"])
def test_transformers_makes_the_same_ids_with_other_vocabularies(tmp_path, kind):
    """Without a space before an answer, and with BOS and EOS for documents and not for answers,
    the training once had other ids than the template that is written."""
    transformers = pytest.importorskip("transformers")
    if kind == "symbols":
        (tmp_path / "a.txt").write_text("In a den, e2-e4 a fox lives.\n" * 50, encoding="utf-8")
        train_vocabulary([tmp_path / "a.txt"], tmp_path / "a", symbols=["e2-e4"])
        tokenizer = Tokenizer(tokenizer_model=tmp_path / "a")
    else:
        tokenizer = byte_vocabulary(kind)
    model = make_model(tokenizer, max_seq_len=1000)
    model.chat_template = ChatTemplate()
    export(model, "hf", tmp_path / "hf", dtype="float32", tokenizer=tokenizer, extra={})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = zip(["user", "assistant"] * 2, [t for each in ASKED for t in each], strict=True)
    messages = [{"role": role, "content": text} for role, text in texts]
    made = theirs.apply_chat_template(messages, return_dict=False)
    assert made == ChatDataset([Dialogue(ASKED)], tokenizer, ChatTemplate(), 1000).tokens.tolist()
    assert made[-1] in tokenizer.vocabulary.end_ids


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
