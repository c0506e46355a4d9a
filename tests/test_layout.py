"""The modules and how they hang together: who may import whom, and how much."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {
    "check_model_precision", "config", "llama", "optimizer", "run_llama", "tokenizer", "utils",
}  # fmt: skip
FILES = {path.stem: path for path in ROOT.glob("*.py")} | {
    f"minllama.{path.stem}": path for path in (ROOT / "minllama").glob("*.py")
}
LONGEST, LONGEST_OF_SOME = 600, dict.fromkeys(("run_llama", "llama", "config"), 750)
MOST_NAMES = 12


class Imports(ast.NodeVisitor):
    """The names that a module takes from others of the project, also inside functions."""

    def __init__(self, path: Path) -> None:
        self.names: dict[str, set[str]] = {}
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_If(self, node: ast.If) -> None:
        """What only a type checker imports is no dependency."""
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        """`import minllama.files`: as if it took one name."""
        for alias in node.names:
            self._add(alias.name, "*")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """`from minllama.files import a, b`, and `from minllama import files`."""
        assert not node.level, "modules are named in full"
        for alias in node.names:
            if node.module == "minllama":
                self._add(f"minllama.{alias.name}", "*")
            else:
                self._add(node.module, alias.name)

    def _add(self, module: str, name: str) -> None:
        if module in FILES:
            self.names.setdefault(module, set()).add(name)


IMPORTS = {module: Imports(path).names for module, path in FILES.items()}


def test_the_modules_of_the_top_are_the_seven():
    """A user finds the commands and what they import from; everything else has a room."""
    assert {module for module in FILES if "." not in module} == TOP


def test_imports_form_no_circle():
    """Of modules that import each other none can be read, tested or moved alone."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in IMPORTS[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in IMPORTS:
        visit(module, ())


def test_imports_go_down_the_map():
    """`minllama/__init__.py` lists every room; a module imports only those above it, or beside."""
    text = ast.get_docstring(ast.parse(FILES["minllama.__init__"].read_text(encoding="utf-8")))
    level: dict[str, int] = {}
    for number, line in enumerate(text.splitlines()):
        if re.match(r" {4}\S", line):
            users = line.strip().startswith("(")
            names = line.split(")")[0] if users else line[:25]
            for name in re.findall(r"\w+", names):
                level[name if users else f"minllama.{name}"] = number
    assert set(level) == set(FILES) - {"minllama.__init__"}
    wrong = [
        f"{module} imports {other}"
        for module, names in IMPORTS.items()
        for other in names
        if level[other] > level[module]
    ]
    assert not wrong


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_is_of_a_size_that_can_be_read(module):
    """Nor does it know another one's inside, or half of another one's names."""
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_OF_SOME.get(module, LONGEST), f"{lines} lines"
    for other, names in IMPORTS[module].items():
        assert len(names) <= MOST_NAMES, f"{len(names)} names from {other}"
        assert not [name for name in names if name.startswith("_")], f"private names of {other}"
