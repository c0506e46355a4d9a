"""Jinja texts of strangers, rendered so that they can do nothing else.

Jinja's own sandbox keeps a template from running code; here it is also kept from running for long
and from filling the memory: every turn of a loop and every letter that it makes or looks through is
a step, and its steps are bounded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, MappingView
from typing import Any

from minllama.system.errors import UsageError
from minllama.system.packages import import_optional

jinja2 = import_optional("jinja2", "the model's chat template")
for module in ("ext", "sandbox"):
    import_optional(f"jinja2.{module}", "the model's chat template")
nodes = jinja2.nodes

TEMPLATE_CHARS = 1 << 16  # of a template; the longest public ones have a quarter of that
MOST_STEPS = 1 << 24  # of a rendering: letters of all that it makes, and its turns and calls
STEPS_OF_A_CALL = 100  # as long as that takes
STEPS_OF_AN_ITEM = 20  # of a list: its size in memory
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
SHALLOW = {  # of these, those that look at no letters of what they are given
    "length", "count", "first", "last", "list", "default", "d", "items", "map", "selectattr",
    "rejectattr", "select", "reject",
}  # fmt: skip
TESTS = {
    "defined", "undefined", "none", "boolean", "true", "false", "string", "mapping", "iterable",
    "sequence", "number", "integer", "float", "odd", "even", "sameas",
}  # fmt: skip
COMPARISONS = {
    "in", "eq", "==", "equalto", "ne", "!=", "lt", "lessthan", "<", "le", "<=", "gt",
    "greaterthan", ">", "ge", ">=",
}  # fmt: skip


READABLE = (str, int, float, range, type(None), jinja2.Undefined)


class TooMuch(Exception):
    """A template loops or allocates beyond its bounds."""


class Refused(Exception):
    """A template's own complaint, by raise_exception."""


def render(text: str, **values: Any) -> str:
    """What a template makes of these values; UsageError for one that fails or takes too much."""
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
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        problem = error
    reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:200]
    raise UsageError(f"the model's chat template does not work: {reason}")


@functools.lru_cache(maxsize=4)
def _compiled(text: str) -> Any:
    """The template, in which each turn of a loop and all that is written is counted."""
    environment = _environment()
    tree = _Counting().visit(environment.parse(text))
    return environment.from_string(tree.set_environment(environment).set_lineno(1))


def _call(method: str, arguments: list[Any]) -> Any:
    """A call of a method of the environment, which no variable can hide."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


class _Counting(jinja2.visitor.NodeTransformer):
    def visit_Concat(self, node: Any) -> Any:
        """`a ~ b` as a call that looks at the sizes first."""
        return _call("concatenated", self.generic_visit(node).nodes)

    def visit_Output(self, node: Any) -> Any:
        """What is written, also into a variable, one piece after the other."""
        node = self.generic_visit(node)
        for place, part in enumerate(node.nodes):
            part = nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part
            node.nodes[place] = _call("read", [part])
        return node

    def visit_Compare(self, node: Any) -> Any:
        """What is compared, or searched."""
        node = self.generic_visit(node)
        for side in (node, *node.ops):
            side.expr = _call("read", [side.expr])
        return node

    def visit_Getitem(self, node: Any) -> Any:
        """A part of a text or list, which is copied; a key, which an error may spell."""
        node = self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _call("read", [node])
        if not isinstance(node.arg, nodes.Const):
            node.arg = _call("read", [node.arg])
        return node

    def visit_Tuple(self, node: Any) -> Any:
        """A list: a tuple as the key of a dict would be read whole."""
        node = self.generic_visit(node)
        return nodes.List(node.items) if node.ctx == "load" else node

    def visit_For(self, node: Any) -> Any:
        """A turn of a loop, or of a macro: as many steps as it has parts."""
        parts = sum(1 for _ in node.find_all(nodes.Node))
        node = self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("turn", [nodes.Const(parts)])]))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Name(self, node: Any) -> Any:
        """A variable, but not the tuple of a macro's surplus arguments."""
        if node.name == "varargs":
            raise jinja2.exceptions.SecurityError("varargs")
        return node


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])
    budget = 0  # of steps that are left to a rendering; a letter made is one

    def take(self, steps: int) -> None:
        """Use up some of it; raises TooMuch where it is not enough."""
        self.budget -= steps
        if self.budget < 0:
            raise TooMuch

    def counted(self, value: Any) -> Any:
        """A value that was made; what makes others lazily is a list, and so are pairs."""
        self.take(STEPS_OF_A_CALL + _size(value))
        if not isinstance(value, Iterator | MappingView):
            return value
        made = []
        for item in value:
            self.take(STEPS_OF_AN_ITEM)
            made.append(list(item) if isinstance(item, tuple) else item)
        return made

    def read(self, value: Any) -> Any:
        """A value that is looked through, with all that is in it."""
        left = [value]
        while left:
            item = left.pop()
            self.take(STEPS_OF_AN_ITEM + _size(item))
            if isinstance(item, dict):
                left += [*item, *item.values()]
            elif isinstance(item, list | tuple):
                left += item
            elif not isinstance(item, READABLE):
                raise jinja2.exceptions.SecurityError(f"{type(item).__name__} as a text")
        return value

    def concatenated(self, *values: Any) -> str:
        """What `~` does."""
        return "".join(map(str, self.read(values)))

    def turn(self, parts: int) -> str:
        """A turn of a loop, of so many steps; writes nothing."""
        self.take(parts)
        return ""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic; of texts and lists nothing but sums."""
        numbers = all(isinstance(v, int | float) and abs(v) < 2**53 for v in (left, right))
        if operator == "**" or not (numbers or operator == "+"):
            raise jinja2.exceptions.SecurityError(f"{operator} of these values")
        self.take(STEPS_OF_A_CALL + _size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """What may be called, and the values of messages."""
        allowed = attr in METHODS or (
            isinstance(obj, jinja2.runtime.LoopContext) and attr == "cycle"
        )
        return super().is_safe_attribute(obj, attr, value) and (allowed or not callable(value))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method, whose result is counted."""
        name = getattr(function, "__name__", "")
        if name.startswith("format"):  # the sandbox has a way of its own to let it pass
            raise jinja2.exceptions.SecurityError("format makes texts of any size")
        text = getattr(function, "__self__", None)
        if isinstance(text, str):  # its methods take texts and numbers
            self.read([text, *args, *kwargs.values()])
            if name == "replace" and len(args) > 1:
                self.take(text.count(args[0]) * len(args[1]))
            elif name.endswith("split"):
                most = text.count(args[0]) if args and args[0] else len(text) // 2
                self.take(STEPS_OF_AN_ITEM * most)
        return self.counted(super().call(context, function, *args, **kwargs))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks an answer in a template: what is in it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """The body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    """Jinja's sandbox as `transformers` sets it up, with bounds."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def refuse(message: Any) -> None:
        raise Refused(" ".join(str(environment.read(message))[:200].split()))

    def bounded_range(*bounds: int) -> range:
        numbers = range(*bounds)
        environment.take(STEPS_OF_AN_ITEM * len(numbers))
        return numbers

    def join(values: Any, separator: str = "") -> str:
        parts = [str(value) for value in values]
        environment.take(len(separator) * len(parts))
        return separator.join(parts)

    def replace(text: Any, old: str, new: str) -> str:
        text = str(text)
        environment.take(text.count(old) * len(new))
        return text.replace(old, new)

    def as_list(value: Any) -> list[Any]:
        environment.take(STEPS_OF_AN_ITEM * len(value))
        return list(value)

    def to_json(value: Any, **options: Any) -> str:  # without its indent, of any size
        return json.dumps(value, ensure_ascii=False)

    def counting(function: Any, reads: bool) -> Any:
        passed = hasattr(function, "jinja_pass_arg")  # its first argument is Jinja's

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            # An error may spell what stands behind the value, the name of a filter to map by.
            environment.read([*args[passed + (not reads) :], *kwargs.values()])
            return environment.counted(function(*args, **kwargs))

        return counted

    ours = {"tojson": to_json, "join": join, "replace": replace, "list": as_list}
    filters = {name: environment.filters[name] for name in FILTERS} | ours
    environment.filters = {
        name: counting(function, name not in SHALLOW) for name, function in filters.items()
    }
    tests = {name: environment.tests[name] for name in TESTS | COMPARISONS}
    environment.tests = {
        name: counting(function, name in COMPARISONS) for name, function in tests.items()
    }
    environment.globals = {
        "range": bounded_range,
        "namespace": environment.globals["namespace"],
        "raise_exception": refuse,
    }
    return environment


def _size(value: Any) -> int:
    """The steps that a value itself takes, without what is in it."""
    if isinstance(value, str):
        return len(value)
    return STEPS_OF_AN_ITEM * len(value) if isinstance(value, list | tuple | dict) else 0
