"""Other programs' chat templates: what `transformers` makes of them, and nothing that harms."""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from byte_vocabularies import KINDS, byte_vocabulary
from chat_templates import CHATML, LLAMA_2, LLAMA_3, MISTRAL, QWEN_3, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_model, write
from vocabularies import vocabulary

from llama import load_pretrained
from minllama.inference.streaming import Continuation
from minllama.system.errors import UsageError
from minllama.text import jinja_sandbox
from minllama.text.chat import ChatTemplate, Cuts, encode_dialogue, template_of_jinja
from minllama.text.dialogues import Dialogue
from minllama.text.jinja_sandbox import render
from minllama.text.jinja_template import JinjaTemplate
from tokenizer import Tokenizer
from utils import ChatDataset

transformers = pytest.importorskip("transformers")
EXCHANGES = [
    ("Where does a fox live?", "In a den."),
    ("  naïve\n\n你好 ", " 🙂 x"),
    ("And\ta bear?\n", "It  sleeps\nin a cave."),
]


def tokenizer_of(name: str) -> Tokenizer:
    kind = TEMPLATES[name][1]
    return byte_vocabulary(kind) if kind in KINDS else vocabulary(kind)


@functools.cache
def their_folder(name: str, folder: Path):
    """`transformers`' tokenizer of our export, with the template in it."""
    tokenizer = tokenizer_of(name)
    model = make_model(tokenizer)
    model.chat_template = JinjaTemplate(TEMPLATES[name][0])
    write(model, "hf", folder / "hf", tokenizer=tokenizer)
    assert load_pretrained(folder / "hf").chat_template == model.chat_template
    return transformers.AutoTokenizer.from_pretrained(folder / "hf")


def messages(exchanges, system: str = "") -> list[dict[str, str]]:
    said = [{"role": "system", "content": system}] if system else []
    for question, answer in exchanges:
        said.append({"role": "user", "content": question})
        if answer is not None:
            said.append({"role": "assistant", "content": answer})
    return said


# ---------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_transformers(tmp_path, name: str, system: str):
    """The same ids for a first question, and for one behind others, that `transformers` makes."""
    tokenizer, theirs = tokenizer_of(name), their_folder(name, tmp_path)
    template = JinjaTemplate(TEMPLATES[name][0])
    for count in (1, 2, 3):
        *history, (question, _) = EXCHANGES[:count]
        said = messages([*history, (question, None)], system)
        wanted = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert template.prompt_ids(tokenizer, question, history, system) == wanted
        text = theirs.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        marks = (theirs.bos_token, theirs.eos_token)
        ours = render(
            template.text,
            messages=said,
            add_generation_prompt=True,
            bos_token=marks[0],
            eos_token=marks[1],
        )
        assert ours == text


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_learnt_is_between_the_prompt_and_the_end_token(tmp_path, name: str, system: str):
    """The ids of a dialogue are those of `transformers`; of them each answer with its end."""
    tokenizer, theirs = tokenizer_of(name), their_folder(name, tmp_path)
    text, _, end = TEMPLATES[name]
    cuts = Cuts(10_000)
    parts = encode_dialogue(Dialogue(EXCHANGES, system), tokenizer, JinjaTemplate(text), cuts)
    assert (len(parts) == 1) == (name != "Qwen 3")  # which opens an answer otherwise than it writes
    end_id = theirs.convert_tokens_to_ids(end)
    for number, part in enumerate(parts if len(parts) > 1 else [parts[0]]):
        exchanges = EXCHANGES[: number + 1] if len(parts) > 1 else EXCHANGES
        whole = theirs.apply_chat_template(messages(exchanges, system), return_dict=False)
        last = len(whole) - whole[::-1].index(end_id)  # what is behind the end is not read
        assert part.ids == whole[:last]
        learnt, expected = [i for i, a in zip(part.ids, part.is_answer, strict=True) if a], []
        for count in range(number + 1 if len(parts) > 1 else 1, len(exchanges) + 1):
            *history, (question, answer) = exchanges[:count]
            asked = theirs.apply_chat_template(
                messages([*history, (question, None)], system),
                add_generation_prompt=True,
                return_dict=False,
            )
            rest = whole[len(asked) :]
            expected += rest[: rest.index(end_id) + 1]
        assert learnt == expected
        assert tokenizer.decode(part.ids)


def test_control_tokens_added_to_a_sentence_piece_vocabulary(tmp_path):
    """The export knew BOS and EOS alone as such, and a template's `<|im_start|>` was a text."""
    given, asked, written = tmp_path / "given", "Hi <|im_end|>there", "Hi there"
    write(make_model(Tokenizer()), "hf", given, tokenizer=Tokenizer())
    (given / "tokenizer.model").unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(given)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.save_pretrained(given)
    tokenizer = Tokenizer(tokenizer_model=given)
    assert tokenizer.n_words == Tokenizer().n_words + 2
    model = make_model(tokenizer)
    model.chat_template = JinjaTemplate(CHATML)
    write(model, "hf", tmp_path / "hf", tokenizer=tokenizer)
    back = load_pretrained(tmp_path / "hf")
    assert Tokenizer(tokenizer_model=back.vocabulary).fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    wanted = theirs.apply_chat_template(
        messages([(written, None)]), add_generation_prompt=True, return_dict=False
    )
    assert model.chat_template.prompt_ids(tokenizer, written) == wanted
    ends = tokenizer.vocabulary.control_tokens["<|im_end|>"]
    assert model.chat_template.prompt_ids(tokenizer, asked).count(ends) == wanted.count(ends) == 2


def test_a_dialogue_that_a_template_refuses_is_named():
    """As those with a system text are by templates that have no place for it."""
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    said = [Dialogue(EXCHANGES[:1], system, line) for line, system in ((7, ""), (8, "Be brief."))]
    how = (byte_vocabulary("smollm"), JinjaTemplate(text + CHATML), 200, "a.jsonl:{}".format)
    assert len(ChatDataset(said[:1], *how)) == 1
    with pytest.raises(UsageError, match="^a.jsonl:8: .* refuses this dialogue: no system"):
        ChatDataset(said, *how)


def test_a_history_that_is_rewritten(tmp_path):
    """Qwen3 leaves out what was thought, once there is another question: each answer is learnt
    in a part of its own, behind the history as it will be read."""
    tokenizer, template = tokenizer_of("Qwen 3"), JinjaTemplate(QWEN_3)
    theirs = their_folder("Qwen 3", tmp_path)
    thought = [("Hi", "<think>\nhm\n</think>\n\nHo"), ("So", "<think>\nso\n</think>\n\nNo")]
    parts = encode_dialogue(Dialogue(thought), tokenizer, template, Cuts(500))
    texts = [theirs.decode(part.ids) for part in parts]
    assert texts == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nHo<|im_end|>",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\n<think>\nso\n</think>\n\nNo<|im_end|>",
    ]
    for part, answer in zip(parts, ("hm\n</think>\n\nHo", "so\n</think>\n\nNo"), strict=True):
        learnt = [i for i, a in zip(part.ids, part.is_answer, strict=True) if a]
        assert theirs.decode(learnt) == f"<think>\n{answer}<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_dialogue_fits_every_context(name: str):
    """No part is longer than the context, none is without something to learn, none is lost."""
    tokenizer, template = tokenizer_of(name), JinjaTemplate(TEMPLATES[name][0])
    dialogue = Dialogue(EXCHANGES, "Be brief.")
    whole = encode_dialogue(dialogue, tokenizer, template, Cuts(10_000))
    longest = max(len(part.ids) for part in whole)
    for context in range(2, longest + 2):
        cuts = Cuts(context)
        parts = encode_dialogue(dialogue, tokenizer, template, cuts)
        for part in parts:
            assert len(part.ids) == len(part.is_answer) <= context + 1
            assert any(part.is_answer) and not part.is_answer[0]
        assert len(parts) + cuts.questions >= 1
        if context >= longest - 1:
            assert [part.ids for part in parts] == [part.ids for part in whole]
            assert cuts.answers == cuts.questions == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_control_tokens_name_that_is_said_is_text(name: str):
    """No speaker can end a turn, or speak as another; the template's own tokens stay."""
    tokenizer, template = tokenizer_of(name), JinjaTemplate(TEMPLATES[name][0])
    control = tokenizer.vocabulary.control_tokens

    def marks(said: str) -> list[int]:
        ids = template.prompt_ids(tokenizer, f"a{said}b", [(f"c{said}", f"d{said}e")], f"f{said}g")
        assert tokenizer.decode(ids).count(said) == 4
        return [i for i in ids if i in control.values()]

    plain = marks("x")
    assert plain or name == "Zephyr"
    for spelt in control:
        for said in (spelt, f"{spelt}\n{spelt}", f"{spelt[:1]}{spelt}", f"{spelt}{spelt[1:]}"):
            assert marks(said) == plain


def test_names_that_overlap_are_text(monkeypatch):
    """Also a name of one letter, one in another, and one that overlaps itself."""
    tokenizer = Tokenizer(byte_vocabulary("smollm").model_bytes)
    names = {"aa": 1, "<|a|>": 2, "|a|>": 3, "#": 4, "<|im_end|>": 5}
    monkeypatch.setattr(tokenizer.vocabulary, "control_tokens", names)
    template = JinjaTemplate("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    for said in ("aaa", "aaaa", "<|a|>", "<|<|a|>", "a#a", "##", "<|im_end|>" * 3, "\ue000aa"):
        ids = template.prompt_ids(tokenizer, said)
        assert ids == [*tokenizer.vocabulary.encode(said), 5]


def test_what_is_no_utf8_is_a_question_mark():
    """A command line's bytes and JSON's escapes can hold surrogates, which no vocabulary takes."""
    for tokenizer, text in ((byte_vocabulary("smollm"), CHATML), (Tokenizer(), LLAMA_2)):
        template = JinjaTemplate(text)
        bad, good = "a\udcff\ud800b", "a??b"
        assert template.prompt_ids(tokenizer, bad) == template.prompt_ids(tokenizer, good)
    assert template_of_jinja("{{ 'a\ud800' }}") == JinjaTemplate("{{ 'a?' }}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=3))
def test_any_texts_are_those_of_transformers(exchanges):
    """Rendered by Jinja as `transformers` sets it up, whatever is said."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for text in (CHATML, QWEN_3, LLAMA_3):
        values = {"messages": messages(exchanges), "add_generation_prompt": True}
        values |= {"bos_token": "<s>", "eos_token": "</s>"}
        assert render(text, **values) == _compile_jinja_template(text).render(**values)


def test_our_own_template_as_a_jinja_text(tmp_path):
    """Both of its forms, which other programs render, give the ids that it has here."""
    tokenizer, plain = Tokenizer(), ChatTemplate()
    for form in (plain.jinja(), plain.jinja(marks_answers=True)):
        assert template_of_jinja(form) == plain
        for count in (1, 2):
            *history, (question, _) = EXCHANGES[:count]
            stripped = [(q.strip(), a.strip()) for q, a in history]
            ours = plain.prompt_ids(tokenizer, question.strip(), stripped, "Be brief.")
            theirs = JinjaTemplate(form).prompt_ids(tokenizer, question, history, "Be brief.")
            assert theirs == ours
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
    assert render(plain.jinja(), **said, bos_token="<s>") == "<s>User: ab\nAssistant:"
    said["messages"][0]["role"] = "tool"
    with pytest.raises(UsageError, match="refuses this dialogue: the roles are system, user and"):
        render(plain.jinja(), **said, bos_token="<s>")


@pytest.mark.parametrize("text", [LLAMA_2, MISTRAL])
def test_a_template_that_refuses_says_why(text: str):
    said = [{"role": role, "content": "x"} for role in ("user", "user")]
    with pytest.raises(UsageError, match="refuses this dialogue: .*must alternate user/assistant"):
        render(text, messages=said, bos_token="", eos_token="", add_generation_prompt=False)


def test_a_refusal_is_one_line():
    with pytest.raises(UsageError, match="refuses this dialogue: a b$"):
        render("{{ raise_exception('a\n\tb ') }}")


def test_several_templates_in_a_file():
    """A list of named ones, of which `default` counts; what is no text is none."""
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert template_of_jinja(named) == JinjaTemplate("y")
    for none in (
        None,
        3,
        "",
        " \n",
        [],
        [3],
        named[:1],
        {"default": "x"},
        [{"name": ["default"]}],
        [{}],
    ):
        assert template_of_jinja(none) is None


def test_an_answer_is_shown_to_its_end_token(tmp_path):
    """The end token has no text, and a name that the model spells in letters is shown."""
    tokenizer = tokenizer_of("ChatML")
    prompt = JinjaTemplate(CHATML).prompt_ids(tokenizer, "Hi")
    row = Continuation(prompt, tokenizer, [], is_answer=True)
    said = "Ho <|im_end|> 🙂"
    shown = "".join(map(row.add, [*tokenizer.vocabulary.encode(said), 2, None]))
    assert shown == row.text == said


# ---------------------------------------------------------------------------- attacks

GROW = "{% set n = namespace(s='a', t='a', i=0) %}{% for i in range(22) %}%s{% endfor %}"
BIG = GROW.replace("%s", "{% set n.s = n.s + n.s %}")
NESTED = "{% set n = namespace(s=[1], t=[1]) %}{% for i in range(60) %}%s{% endfor %}"
NEST = NESTED.replace("%s", "{% set n.s = [n.s, n.s] %}{% set n.t = [n.t, n.t] %}")
TUPLES = NESTED.replace("%s", "{% set n.s = (n.s, n.s) %}")
OBJECTS = NESTED.replace("%s", "{% set n.s = namespace(x=n.s, y=n.s) %}")
PAIRS = NESTED.replace("%s", "{% set n.s = ({'a': n.s}.items()|first, n.s) %}")
MANY = "{% for i in range(99999) %}%s{% endfor %}"
BOUNDED = {
    "loop": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "range": "{{ range(10000000000) | list }}",
    "a long body": MANY.replace("%s", "{% set x = not x %}" * 6000),
    "sum": GROW.replace("22", "60").replace("%s", "{% set n.s = n.s + n.s %}"),
    "concatenation": GROW.replace("22", "60").replace("%s", "{% set n.s = n.s ~ n.s %}"),
    "replace": GROW.replace("22", "60").replace("%s", "{% set n.s = n.s.replace('a', 'aa') %}"),
    "filter replace": GROW.replace("22", "60").replace(
        "%s", "{% set n.s = n.s | replace('a','aa') %}"
    ),
    "list": NESTED.replace("%s", "{% set n.s = n.s + n.s %}"),
    "captured": GROW.replace("22", "60").replace(
        "%s", "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}"
    ),
    "macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "call block": "{% macro g() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call g() %}" * 40 + "a" + "{% endcall %}" * 40,
    "search": BIG + MANY.replace("%s", "{% set x = 'ab' in n.s %}"),
    "comparison": BIG + "{% set x = n.s ~ 'b' %}{% set y = n.s ~ 'c' %}"
    + MANY.replace("%s", "{% set z = x == y %}"),
    "test": BIG + MANY.replace("%s", "{% set x = 'ab' is in(n.s) %}"),
    "tests": BIG + "{{ range(99999) | map('string') | select('in', n.s) | list }}",
    "method": BIG + MANY.replace("%s", "{% set x = n.s.find('ab') %}"),
    "filter": BIG + MANY.replace("%s", "{% set x = n.s | upper %}"),
    "number": BIG + MANY.replace("%s", "{% set x = n.s | int %}"),
    "slice": BIG + MANY.replace("%s", "{% set x = n.s[1:] %}"),
    "split": BIG + "{% for i in range(9) %}{% set n.t = n.s.split('a') + [n.t] %}{% endfor %}",
    "letters": BIG + "{{ n.s | list | length }}",
    "lists in lists": NEST + "{{ n.s }}",
    "lists as a text": NEST + "{{ n.s | string | length }}",
    "lists joined": NEST + "{{ n.s ~ '' }}",
    "lists as JSON": NEST + "{{ n.s | tojson }}",
    "lists compared": NEST + "{{ n.s == n.t }}",
    "lists trimmed": NEST + "{{ n.s | trim }}",
    "lists in a join": NEST + "{{ n.s | join }}",
    "lists sorted": NEST + "{{ [n.s, n.t] | sort }}",
    "lists in a refusal": NEST + "{{ raise_exception(n.s) }}",
    "lists in an error": NEST + "{{ [][n.s].x }}",
    "lists as a filter": NEST + "{{ [1] | map(n.s) | list }}",
    "tuples": TUPLES + "{{ n.s in [] }}",
    "JSON": MANY.replace("%s", "{{ messages | tojson }}"),
    "join": "{{ range(100000) | join('" + "a" * 9999 + "') | length }}",
}  # fmt: skip
REFUSED = {
    "times": "{{ 'a' * 1000000000 }}", "power": "{{ 9**9**9 }}", "lists": "{{ [1] * 100000000 }}",
    "product": "{% set n=namespace(s=7) %}" + MANY.replace("%s", "{% set n.s = n.s*n.s %}"),
    "percent": "{{ '%1000000000d' % 1 }}", "format": "{{ '{:>1000000000}'.format(1) }}",
    "format map": "{{ '{x:>1000000000}'.format_map({'x': 1}) }}",
    "center": "{{ 'a'|center(1000000000) }}", "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}", "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "batch": "{{ [1]|batch(1000000000,'x')|list }}", "lipsum": "{{ lipsum(100000) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ ''|attr('__class__') }}",
    "map attr": "{{ (['']|map(attribute='__class__')|first).mro }}",
    "import": "{% import 'os' as os %}", "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}", "globals": "{{ namespace.__init__.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "environment": "{{ range.__globals__.x }}", "self": "{{ self._TemplateReference__context.x }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(60) }}",
    "loop in itself": "{% for x in [[1]] recursive %}{{ loop([[x]]) }}{% endfor %}",
    "object": "{{ namespace(x=1) }}", "macro": "{% macro f() %}{% endmacro %}{{ f }}",
    "objects": OBJECTS + "{{ n.s }}", "objects in a list": OBJECTS + "{{ [n] }}",
    "surplus": "{% macro f() %}{{ varargs }}{% endmacro %}{{ f(1) }}",
    "key": TUPLES + "{% set x = {n.s: 1} %}",
    "pairs": PAIRS + "{{ {n.s: 1} }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "lists deep": "{{ " + "[" * 5000 + " }}",
    "blocks deep": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "minus": "{{ " + "-" * 50000 + "1 }}", "sums": "{{ 1" + "+1" * 40000 + " }}",
    "append": "{{ messages.append(1) }}", "clear": "{{ messages[0].clear() }}",
    "changed": MANY.replace("%s", "{% set x = loop.changed(messages) %}"),
    "upper": NEST + "{{ n.s is upper }}", "no template": "{% for", "no filter": "{{ 1|nothing }}",
    "division": "{{ 1 / 0 }}", "infinite": "{{ 1e308 * 10 | int }}", "too long": "x" * 200_000,
    "nothing": "{{ nothing.of.it }}", "type": "{{ 1 + 'a' }}", "index": "{{ [].x.y }}",
}  # fmt: skip


def attack(text: str) -> str:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    started = time.process_time()
    try:
        return render(text, messages=said, add_generation_prompt=True, bos_token="", eos_token="")
    finally:
        assert time.process_time() - started < 20  # mostly below 1 s; hours without the bounds


@pytest.mark.parametrize("name", BOUNDED)
def test_a_template_that_takes_too_much_is_stopped(name: str):
    """One error, within seconds; no more memory than the texts that it may make."""
    with pytest.raises(UsageError, match="takes too long or too much memory$"):
        attack(BOUNDED[name])


def test_what_a_template_may_fill_of_the_memory(monkeypatch):
    """In proportion to its steps, of which it has few here: measuring takes time."""
    monkeypatch.setattr(jinja_sandbox, "MOST_STEPS", 1 << 20)
    for name in (
        "range",
        "list",
        "captured",
        "split",
        "letters",
        "join",
        "lists as JSON",
        "replace",
    ):
        tracemalloc.start()
        with pytest.raises(UsageError):
            attack(BOUNDED[name].replace("range(22)", "range(17)"))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20, name
        tracemalloc.stop()


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_reaches_out_is_refused(name: str, monkeypatch):
    """Nothing is run, opened or imported for it: one error of one line."""
    monkeypatch.setattr(builtins, "open", lambda *_: pytest.fail("opened a file"))
    with pytest.raises(UsageError, match="chat template (does not work|takes too)") as caught:
        attack(REFUSED[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_template_cannot_hide_what_counts():
    """Its own variables of the same names change nothing."""
    names = ("read", "turn", "concatenated", "counted", "concat", "range", "environment", "context")
    hidden = "".join(f"{{% set {name} = 0 %}}" for name in names if name != "range")
    assert attack(f"{hidden}{{% for i in range(3) %}}{{{{ i ~ 'x' }}}}{{% endfor %}}") == "0x1x2x"
    with pytest.raises(UsageError, match="takes too long"):
        attack(hidden + BOUNDED["concatenation"])


def test_long_dialogues_are_rendered():
    """The bounds are no bounds to a conversation of hundreds of questions."""
    exchanges = [("What is next?" * 5, "This is next. " * 20)] * 300
    for text, kind, _ in TEMPLATES.values():
        tokenizer = byte_vocabulary(kind) if kind in KINDS else vocabulary(kind)
        assert JinjaTemplate(text).prompt_ids(tokenizer, "x", exchanges)


def test_without_jinja2_one_line_says_what_to_install(monkeypatch):
    def absent(name: str):
        raise ImportError(name)

    monkeypatch.delitem(sys.modules, jinja_sandbox.__name__)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UsageError, match="chat template needs another package: pip install jinja2"):
        JinjaTemplate(CHATML).prompt_ids(byte_vocabulary("smollm"), "Hi")
