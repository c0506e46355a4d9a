"""pyproject.toml: the programs, packages and extras that pip makes of this repository."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROGRAMS = TABLE["project"]["scripts"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_its_script(name, tmp_path):
    """From any folder; another package's config.py on the path is not taken for the program's."""
    (tmp_path / "config.py").write_text("raise SystemExit(9)", encoding="utf-8")
    module, function = PROGRAMS[name].split(":")
    code = (
        f"import sys; sys.path[:0], sys.argv = [{str(tmp_path)!r}], [{name!r}, '--help']\n"
        f"sys.path.append({str(ROOT)!r})\nfrom {module} import {function} as f\n"
        f"try: f()\nfinally: print('printed as', sys.argv[0])"
    )
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    script = ROOT / f"{function}.py"
    assert script.exists() and f"printed as {script}" in done.stdout
    assert re.search(f"usage: (python )?{script.name}", done.stdout)


@pytest.mark.parametrize("script", ["run_llama", "check_model_precision", "tokenizer"])
def test_a_python_without_the_packages_is_told_so_in_a_line(script, tmp_path):
    """In a new terminal, without the virtual environment, it ended in a traceback."""
    run = [sys.executable, "-S", ROOT / f"{script}.py"]  # -S: without installed packages
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    for part in (f"{script}.py: error: ", "no torch, numpy, sentencepiece, tqdm", "activate"):
        assert part in line
    assert line.endswith(f"{sys.executable} -m pip install -r {ROOT / 'requirements.txt'}")


def test_every_module_is_installed():
    """A module of the top that was forgotten is missed on the first import alone."""
    assert sorted(TABLE["tool"]["setuptools"]["py-modules"]) == sorted(
        path.stem for path in ROOT.glob("*.py")
    )
    assert TABLE["project"]["dynamic"] == ["dependencies"]
    assert TABLE["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    needed = re.search(r"Python (3\.\d+) or newer", (ROOT / "README.md").read_text("utf-8"))[1]
    assert TABLE["project"]["requires-python"] == f">={needed}"


def test_the_extras_are_the_optional_packages():
    """What some code imports only where it needs it can be installed by name, and nothing else."""
    imported = {"tensorboard"}  # by torch
    for path in (*ROOT.glob("*.py"), *ROOT.glob("minllama/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "import_optional":
                module = importlib.import_module(
                    ".".join(path.relative_to(ROOT).with_suffix("").parts)
                )
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    imported.add(name.value.partition(".")[0])
                elif ast.unparse(name) == "PACKAGE":
                    imported.add(module.PACKAGE)
    extras = TABLE["project"]["optional-dependencies"].values()
    assert {package for extra in extras for package in extra} == imported
