"""The floors and how they hang together: who may import whom, and how much."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = {
    "check_model_precision", "config", "llama", "optimizer", "run_llama", "tokenizer", "utils",
}  # fmt: skip
# A module of a folder imports from its own and from the folders before it.
FOLDERS = "system cli machine vocabulary text model formats inference runs training".split()
LONGEST, LONGEST_OF_SOME = 600, dict.fromkeys(("run_llama", "llama", "config"), 750)
MOST_NAMES = 12


def module_name(path: Path) -> str:
    """minllama/text/chat.py: minllama.text.chat; a folder's __init__.py is the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path for path in (*ROOT.glob("*.py"), *ROOT.glob("minllama/**/*.py"))
}  # fmt: skip


def docstring(module: str) -> str:
    """What a module says of itself."""
    return ast.get_docstring(ast.parse(FILES[module].read_text(encoding="utf-8")))


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
        """`import minllama.system.files`: as if it took one name."""
        for alias in node.names:
            self._add(alias.name, "*")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """`from minllama.system.files import a`, and `from minllama.system import files`."""
        assert not node.level, "modules are named in full"
        for alias in node.names:
            if f"{node.module}.{alias.name}" in FILES:
                self._add(f"{node.module}.{alias.name}", "*")
            else:
                self._add(node.module, alias.name)

    def _add(self, module: str, name: str) -> None:
        if module in FILES:
            self.names.setdefault(module, set()).add(name)


@functools.cache
def imports(module: str) -> dict[str, set[str]]:
    """The names that a module takes from each of the others."""
    return Imports(FILES[module]).names


def test_the_modules_of_the_top_are_the_seven():
    """A user finds the commands and what they import from; everything else has a floor."""
    assert {module for module in FILES if "." not in module} == TOP | {"minllama"}


def test_every_folder_is_a_floor_and_lists_its_files():
    """`__init__.py` of the package lists the folders from the ground up, theirs the files."""
    listed = re.findall(r"^ {4}(\w+) ", docstring("minllama"), re.M)
    assert listed == FOLDERS
    for folder in FOLDERS:
        files = {path.stem for path in (ROOT / "minllama" / folder).glob("*.py")} - {"__init__"}
        assert set(re.findall(r"^ {4}(\w+) ", docstring(f"minllama.{folder}"), re.M)) == files
    assert {path.parent.name for path in ROOT.glob("minllama/*/*.py")} == set(FOLDERS)


def test_imports_form_no_circle():
    """Of modules that import each other none can be read, tested or moved alone."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in imports(module):
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_folders_import_from_those_below():
    """One direction: what is on a lower floor can be read without what is above it."""
    level = {folder: number for number, folder in enumerate(FOLDERS)}
    wrong = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports(module)
        if module.startswith("minllama.") and other.startswith("minllama.")
        if level[module.split(".")[1]] < level[other.split(".")[1]]
    ]
    assert not wrong


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_module_is_of_a_size_that_can_be_read(module):
    """Nor does it know another one's inside, or half of another one's names."""
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_OF_SOME.get(module, LONGEST), f"{lines} lines"
    for other, names in imports(module).items():
        assert len(names) <= MOST_NAMES, f"{len(names)} names from {other}"
        assert not [name for name in names if name.startswith("_")], f"private names of {other}"
