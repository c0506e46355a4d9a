"""Chat templates of other programs' models: Jinja texts, rendered so that they can do nothing else.

A template comes with a stranger's file. Jinja's sandbox keeps it from running code; here it is also
kept from running for long and from filling the memory: every turn of a loop and every letter that
it makes is a step, and its steps are bounded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minllama.system.errors import UsageError
from minllama.system.packages import import_optional
from minllama.text.dialogues import Exchange

if TYPE_CHECKING:
    from minllama.vocabulary.base import Vocabulary
    from tokenizer import Tokenizer

TEMPLATE_CHARS = 1 << 17  # of a template; the longest public ones have a tenth of that
MOST_STEPS = 1 << 25  # of a rendering: letters of all that it makes, and its turns and calls
STEPS_OF_A_CALL = 100  # as long as that takes
METHODS = {  # of texts, lists and dicts that a template may call
    "strip", "lstrip", "rstrip", "split", "rsplit", "startswith", "endswith", "find", "upper",
    "lower", "title", "capitalize", "replace", "removeprefix", "removesuffix", "get", "items",
    "keys", "values",
}  # fmt: skip
FILTERS = {
    "trim", "length", "count", "upper", "lower", "capitalize", "title", "first", "last", "list",
    "string", "int", "default", "d", "items", "safe", "join", "replace", "map", "selectattr",
    "rejectattr", "select", "reject", "sort", "dictsort", "unique", "reverse",
}  # fmt: skip


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
        said, mark = _messages(tokenizer.vocabulary, [*history, (question, None)], system)
        return _encode(tokenizer.vocabulary, self._render(tokenizer, said, opens=True), mark)

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
        said, mark = _messages(vocabulary, [*history, exchange], system)
        before = self._render(tokenizer, said[:-2], opens=False) if continues else ""
        before = _up_to_control(vocabulary, before)
        asked = self._render(tokenizer, said[:-1], opens=True)
        answered = self._render(tokenizer, said, opens=False)
        if not asked.startswith(before):
            return None
        if not answered.startswith(asked):
            raise UsageError(
                "the model's chat template writes an answer in another way than it opens one: it "
                "cannot be trained on"
            )
        answer = _up_to_control(vocabulary, answered[len(asked) :])
        return (
            _encode(vocabulary, asked[len(before) :], mark),
            _encode(vocabulary, answer, mark),
        )

    def _render(self, tokenizer: Tokenizer, messages: list[dict], *, opens: bool) -> str:
        """The text of messages, and with `opens` of how an answer opens; raises UsageError."""
        bos, eos = map(tokenizer.vocabulary.name, tokenizer.vocabulary.stated_marks)
        return render(
            self.text,
            messages=messages,
            add_generation_prompt=opens,
            bos_token=bos,
            eos_token=eos,
        )


def _messages(
    vocabulary: Vocabulary, exchanges: Sequence[tuple[str, str | None]], system: str
) -> tuple[list[dict[str, str]], str]:
    """Messages as a template takes them, and a character that is in none of them.

    It stands in the names of control tokens that were said, so that these are text.
    """
    said = [("system", system)] if system else []
    for question, answer in exchanges:
        said.append(("user", question))
        if answer is not None:
            said.append(("assistant", answer))
    texts = "".join(text for _, text in said)
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in texts)
    messages = []
    for role, text in said:
        for name in vocabulary.control_tokens:
            text = text.replace(name, f"{name[:1]}{mark}{name[1:]}")
        messages.append({"role": role, "content": text})
    return messages, mark


def _encode(vocabulary: Vocabulary, text: str, mark: str) -> list[int]:
    ids: list[int] = []
    for part in vocabulary.control_pattern.split(text):
        token = vocabulary.control_tokens.get(part)
        ids += vocabulary.encode(part.replace(mark, "")) if token is None else [token]
    return ids


def _up_to_control(vocabulary: Vocabulary, text: str) -> str:
    """A text without what is behind its last control token; whole, where it has none."""
    ends = [match.end() for match in vocabulary.control_pattern.finditer(text)]
    return text[: ends[-1]] if ends else text


# ---------------------------------------------------------------------------- rendering


class TooMuch(Exception):
    """A template loops or allocates beyond its bounds."""


class Refused(Exception):
    """A template's own complaint, by raise_exception."""


def render(text: str, **values: Any) -> str:
    """What a template makes of these values; UsageError for one that fails or takes too much."""
    jinja2 = import_optional("jinja2", "the model's chat template")
    try:
        if len(text) > TEMPLATE_CHARS:
            raise TooMuch
        template = _compiled(text)
        template.environment.budget = MOST_STEPS
        return template.render(values)
    except TooMuch:
        raise UsageError("the model's chat template takes too long or too much memory") from None
    except Refused as error:
        raise UsageError(f"the model's chat template refuses this dialogue: {error}") from None
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError) as error:
        problem = error
    except (RecursionError, SyntaxError, TypeError, ValueError) as error:
        problem = error
    reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    raise UsageError(f"the model's chat template does not work: {reason}")


@functools.lru_cache(maxsize=4)
def _compiled(text: str) -> Any:
    """The template, in which each turn of a loop and all that is written is counted."""
    jinja2 = import_optional("jinja2", "the model's chat template")
    for module in ("ext", "sandbox", "visitor"):
        import_optional(f"jinja2.{module}", "the model's chat template")
    nodes, environment = jinja2.nodes, _environment(jinja2)

    def call(name: str, arguments: list[Any]) -> Any:
        return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)

    class Counting(jinja2.visitor.NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:
            """`a ~ b` as a call that looks at the sizes first."""
            return call("concat", self.generic_visit(node).nodes)

        def visit_Output(self, node: Any) -> Any:
            """What is written, also into a variable, one piece after the other."""
            node = self.generic_visit(node)
            node.nodes = [call("written", [_expression(nodes, part)]) for part in node.nodes]
            return node

        def visit_For(self, node: Any) -> Any:
            """A turn of a loop, or of a macro."""
            node = self.generic_visit(node)
            node.body.insert(0, nodes.Output([call("written", [nodes.Const("")])]))
            return node

        visit_Macro = visit_For

    tree = Counting().visit(environment.parse(text))
    return environment.from_string(tree.set_environment(environment).set_lineno(1))


def _expression(nodes: ModuleType, part: Any) -> Any:
    return nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part


def _environment(jinja2: ModuleType) -> Any:
    """Jinja's sandbox as `transformers` sets it up, with bounds."""

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**", "%"])
        budget = 0  # of steps that are left to a rendering; a letter made is one

        def take(self, steps: int) -> None:
            """Use up some of it; raises TooMuch where it is not enough."""
            self.budget -= STEPS_OF_A_CALL + steps
            if self.budget < 0:
                raise TooMuch

        def counted(self, value: Any) -> Any:
            """A value that was made."""
            self.take(_size(value))
            return value

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Arithmetic; of texts and lists nothing but sums."""
            numbers = all(isinstance(v, int | float) and abs(v) < 2**53 for v in (left, right))
            if operator == "**" or not (numbers or operator == "+"):
                raise jinja2.exceptions.SecurityError(f"{operator} of these values")
            self.take(_size(left) + _size(right))
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            """What may be called, and the values of messages."""
            allowed = attr in METHODS or isinstance(obj, jinja2.runtime.LoopContext)
            return super().is_safe_attribute(obj, attr, value) and (allowed or not callable(value))

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            """Call a function or a method, whose result is counted."""
            name = getattr(function, "__name__", "")
            if name.startswith("format"):  # the sandbox has a way of its own to let it pass
                raise jinja2.exceptions.SecurityError("format makes texts of any size")
            if name == "replace" and len(args) > 1:
                text, (old, new) = function.__self__, args[:2]
                self.take(len(text) + text.count(old) * len(new))
            return self.counted(super().call(context, function, *args, **kwargs))

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks an answer in a template: what is in it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            """The body."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def bounded_range(*bounds: int) -> range:
        numbers = range(*bounds)
        environment.take(len(numbers))
        return numbers

    def concat(*values: Any) -> str:
        texts = [str(value) for value in values]
        environment.take(sum(map(len, texts)))
        return "".join(texts)

    def join(values: Any, separator: str = "") -> str:
        parts = [str(value) for value in values]
        environment.take(sum(map(len, parts)) + len(separator) * len(parts))
        return separator.join(parts)

    def replace(text: Any, old: str, new: str) -> str:
        text = str(text)
        environment.take(len(text) + text.count(old) * len(new))
        return text.replace(old, new)

    def to_json(value: Any, **options: Any) -> str:  # without its indent, of any size
        return json.dumps(value, ensure_ascii=False)

    def counting(function: Any) -> Any:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            # What is made lazily is made here, so that it can be counted.
            return environment.counted(list(value) if hasattr(value, "__next__") else value)

        return counted

    ours = {"tojson": to_json, "join": join, "replace": replace}
    filters = {name: environment.filters[name] for name in FILTERS} | ours
    environment.filters = {name: counting(function) for name, function in filters.items()}
    environment.globals = {
        "range": bounded_range,
        "namespace": environment.globals["namespace"],
        "raise_exception": _refuse,
        "concat": concat,
        "written": environment.counted,
    }
    return environment


def _refuse(message: Any) -> None:
    raise Refused(str(message)[:200])


def _size(value: Any) -> int:
    """The letters of a text, or of those in a list."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return len(value) + sum(len(item) for item in value if isinstance(item, str))
    return len(value) if isinstance(value, dict | range) else 1
