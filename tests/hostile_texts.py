"""Attacks on what people bring that is no model: texts, labels, settings, names, servers.

Each kind makes a file, or a server's answer, of the right form with something odd in it, or one of
a list of crafted ones; `attacker` carries the attacks out. They are small: each must end by itself.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import io
import json
import os
import random
import socket
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from attacker import (
    FORGED,
    INTEGERS,
    NUMBERS,
    ODD,
    ODD_JSON,
    ODD_LINES,
    PATHS,
    TEXTS,
    Attack,
    copy_of,
    hostile_pickle,
    hurt_bytes,
    odd_json,
    overwrite,
    run_task,
    write_place,
)
from survivor import SMALL, Tally

from config import FLAGS
from minllama.formats.pt_file import load_pt

Command = tuple[str, list[str]]
MINE = b"what I wrote\n"  # in files that no attack may cost
STRANGE = (
    "\ud800",
    f"a\n{FORGED}",
    f"a\r{FORGED}",
    "a\x1b[2J",
    "\x9b31m",
    "\u2028",
    "\0",
    "a ||| b",
)
SMALL_TEXT = [word for word in SMALL if word not in ("--pretrain_data", "text.jsonl")]
PROMPT = "--option prompt --pretrained_model_path model.pt --prompt_template {sentence}".split()
FINETUNE = "--option finetune --pretrained_model_path model.pt --max_steps 1".split()


# ---------------------------------------------------------------------------- JSON

CRAFTED_JSON: tuple[Callable[[], str], ...] = (
    *(functools.partial(str, text) for text in ODD_JSON),
    lambda: "[" * 100_000,
    lambda: '[{"text": ' * 50_000,
    lambda: '{"a":' * 100_000,
    lambda: '[{"text": "a"}{"text": "b"}]',
    lambda: '[{"text": "a"}] {"text": "b"}',
    lambda: '{"text": "a"}' * 1000,
    lambda: '[{"text": "a"},' * 10_000,
    lambda: '{"text": [\n' + '"a",\n' * 50_000,  # an item that never ends
    lambda: '{"text": "' + "a\n" * 200_000,
    lambda: '[{"text": "a"},\n' + "\n" * 300_000 + "]",
    lambda: '{"' + "k" * 3_000_000 + '": 1}',
    lambda: '{"text": ' + "9" * 5000 + "}",
    lambda: '{"text": "\\ud800"}\n{"text": "\\udc00\\ud800"}',
    lambda: '{"text": "a", "text": null}',
    lambda: '\ufeff\ufeff[{"text": "a"}]',
    lambda: '{"text": "a"}\r{"text": "b"}\r',
    lambda: '{"text": NaN}\n{"text": -Infinity}',
    lambda: "{'text': 'a'}",
    lambda: '// a\n{"text": "a"}',
    lambda: f'{{"{FORGED}\\n{FORGED}\\u001b[2J": 1}}',
    lambda: f"[1,\r{FORGED}",
)


def json_file(path: Path, items: list, chance: random.Random, form: str) -> None:
    """A file of items in one of the `form`s, one of them odd; or something crafted."""
    if chance.random() < 0.3:
        content = chance.choice(CRAFTED_JSON)().encode("utf-8", "surrogatepass")
    else:
        texts = [json.dumps(item, indent=1 if form == "lines" else None) for item in items]
        at = chance.randrange(len(texts))
        if isinstance(items[at], dict) and chance.random() < 0.3:  # where nobody looks
            items = [*items[:at], {**items[at], "more": ["a", {"b": "c"}]}, *items[at + 1 :]]
        texts[at] = odd_json(items[at], chance, odd=STRANGE, ensure_ascii=chance.random() < 0.5)
        if form == "list" and chance.random() < 0.5:
            text = odd_json(items, chance, odd=STRANGE, indent=chance.choice((None, 2)))
        elif form == "list":
            text = f"[{','.join(texts)}]"
        else:
            text = "\n".join(texts) + "\n"
        content = text.encode(chance.choice(("utf-8",) * 18 + ("utf-16", "gb18030")), "replace")
        if chance.random() < 0.2:
            content = hurt_bytes(content, chance)
    if path.suffix == ".gz":
        content = gzip.compress(content)
        content = hurt_bytes(content, chance) if chance.random() < 0.2 else content
    overwrite(path, content)


STORIES = [{"text": f"There was a cat number {n}. " * 12, "id": n} for n in range(8)]
NESTED = [{"data": {"text": [story["text"], {"content": "b"}]}} for story in STORIES]


def json_texts(form: str) -> Callable[[Path, random.Random], Command]:
    """Texts to pretrain on as JSON of one form."""

    def make(target: Path, chance: random.Random) -> Command:
        suffixes = (".json", ".json.gz") if form == "list" else (".jsonl", ".json", ".jsonl.gz")
        name = "t" + chance.choice(suffixes)
        items, field = chance.choice(
            ((STORIES, "text"), (NESTED, "data.text"), (DIALOGUES, "conversations"))
        )
        json_file(target / name, items, chance, form)
        words = ["--pretrain_data", name, "--text_field", field, "--max_steps", "1"]
        if chance.random() < 0.2:
            return "tokenizer.py", [
                *("train", "--input", name, "--text_field", field, "--vocab_size", "300"),
                *("--output", "new.model"),
            ]
        more = chance.choice(([], ["--plan"], ["--dedup"], ["--encoding_errors", "replace"]))
        return "run_llama.py", [*SMALL_TEXT, *words, *more, "--save_dir", "new"]

    return make


# ---------------------------------------------------------------------------- dialogues

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Tom."},
    {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    {"role": "assistant", "content": "Here.", "tool_calls": [{"function": {"name": "f"}}]},
]
FORMS: tuple[Any, ...] = (
    {"messages": TURNS},
    {"conversations": TURNS[1:3], "system": "Be kind."},
    {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Tom."}]},
    TURNS,
    {"prompt": "Who?", "response": "Tom."},
    {"prompt": "Who?", "completion": "Tom."},
    {"question": "Who?", "answer": "Tom."},
    {"instruction": "Say", "input": "who", "output": "Tom.", "history": [["a", "b"], ["c", "d"]]},
    {"prompt": TURNS[1:2], "completion": TURNS[2:3]},
    {"prompt": "Who?", "chosen": TURNS[1:3], "rejected": TURNS[1:2], "messages": TURNS[1:3]},
    {"chosen": "\n\nHuman: Who?\n\nAssistant: Tom.", "rejected": "\n\nHuman: Who?"},
    {"conversation": [{"human": "Who?", "assistant": "Tom."}]},
    {"message_id": "1", "role": "prompter", "text": "Who?"},
    {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "Tom.", "rank": 0},
    {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "Who?", "replies": [
        {"role": "assistant", "text": "Tom.", "rank": 0, "replies": []}]}},
)  # fmt: skip
DIALOGUES = [{"conversations": TURNS[1:3]} for _ in range(8)]
ODD_TURNS = (
    [{"role": role, "content": "a"} for role in ("assistant", "tool", "x" * 10**5, "\x1b[2J", 7)],
    {"messages": [{"role": "user", "content": "a"}] * 20_000},
    {"messages": [{"role": "user", "content": [[[]]]}, {"role": "assistant", "content": {}}]},
    {"messages": [{"role": "user", "content": "<s>a</s>" * 5000}, TURNS[2]]},
    {"prompt": "a " * 100_000, "response": "b " * 100_000},
    {"instruction": [], "output": [], "history": 7},
    {"messages": {"0": TURNS[1]}},
    {"messages": [{"role": "user", "content": [{"type": "\x1b[2J"}]}, TURNS[2]]},
    {f"{FORGED}\n{FORGED}": [TURNS[1]]},
    {"message_id": "2", "parent_id": "2", "role": "assistant", "text": "Tom."},
    {"message_id": {}, "parent_id": [], "role": "\x1b[2J", "text": 7},
    {"text": "<|im_start|>user\n\x1b[2J"},
)


def dialogues(target: Path, chance: random.Random) -> Command:
    """Dialogues to fine-tune on, of all formats."""
    kind = chance.choice(("lines", "list", "each"))
    name = "d" + (chance.choice((".json", ".json.gz")) if kind == "list" else ".jsonl")
    items = [chance.choice(FORMS)] * 8 if chance.random() < 0.5 else chance.choices(FORMS, k=8)
    items += chance.choices(ODD_TURNS, k=chance.randrange(2))
    json_file(target / name, items, chance, kind)
    words = chance.choice((["--skip_bad_lines"], [], ["--val_fraction", "0.5"]))
    if chance.random() < 0.3:
        overwrite(target / "good.jsonl", json.dumps(DIALOGUES[0]).encode() * 1)
        pair = chance.choice((("good.jsonl", name), (name, "good.jsonl")))
        return "run_llama.py", [*FINETUNE, "--train", pair[0], "--dev", pair[1], *words]
    return "run_llama.py", [*FINETUNE, "--train", name, *words]


# ---------------------------------------------------------------------------- labelled rows

ROWS = [{"text": f"a film, number {n}", "label": ("bad", "good")[n % 2]} for n in range(8)]
CRAFTED_TABLES: tuple[Callable[[], str], ...] = (
    lambda: "text,label\n" + '"a\n' * 50_000,  # a quote that never closes
    lambda: "text,label\n" + "x" * 200_000 + ",0\nb,1\n",  # beyond csv's own limit
    lambda: "text,label\na\0b,0\nc,1\n",
    lambda: "text,label\n" + "".join(f"a,{n}\n" for n in range(20_000)),
    lambda: "text,label\n" + f'"a\n{FORGED}",0\n"b\r{FORGED}",1\n',
    lambda: f"text,label\na,\x1b[2J{FORGED}\nb,c\n",
    lambda: "," * 100_000 + "\n" + "a,0\n",
    lambda: "text,text,label,label\na,b,0,1\nc,d,1,0\n",
    lambda: "a,0\nb,1\n",
    lambda: "text\na\nb\n",
    lambda: "label\n0\n1\n",
    lambda: "text,label\n,0\n,1\n",
    lambda: "text,label\na,1e400\nb,nan\n",
    lambda: "text,label\na,0\nb\nc,1,2,3\n",
    lambda: "\ufefftext;label\r\na;0\r\nb;1\r\n",
    lambda: "text,label\na,-0\nb,+1\nc,01\nd,1.0\n",
    lambda: "text,label\na,\u0661\nb,\u0662\n",
    lambda: "text,label\na,=cmd|' /C calc'!A0\nb,c\n",
    lambda: f"{FORGED}\x1b[2J,\x9b2J\na,b\n",
    lambda: "",
    lambda: "text,label\n",
)


def use_of(name: str, chance: random.Random) -> Command:
    """A command that reads a labelled file as one of its splits."""
    train, dev = chance.choice(((name, name), (name, "toy-train.txt"), ("toy-train.txt", name)))
    words = ["--train", train, "--dev", dev]
    if chance.random() < 0.5:
        return "run_llama.py", [*FINETUNE, *words]
    words += chance.choice(([], ["--label_names", "names.json"]))
    return "run_llama.py", [*PROMPT, *words]


def labelled_json(target: Path, chance: random.Random) -> Command:
    """Labelled objects, a line each, in a list, or over several lines."""
    kind = chance.choice(("each", "lines", "list"))
    name = "l.json" if kind == "list" else "l.jsonl"
    labels = chance.choice((("bad", "good"), (0, 1), (1, 5), ("0", "1.0"), (True, False)))
    rows = [{**row, "label": labels[n % 2]} for n, row in enumerate(ROWS)]
    json_file(target / name, rows, chance, kind)
    return use_of(name, chance)


def labelled_table(target: Path, chance: random.Random) -> Command:
    """Labelled rows as CSV or TSV."""
    name = "l" + chance.choice((".csv", ".tsv", ".csv.gz"))
    if chance.random() < 0.4:
        text = chance.choice(CRAFTED_TABLES)()
    else:
        out = io.StringIO()
        odd = [value for value in (*ODD, *STRANGE, *ODD_LINES) if not isinstance(value, bytes)]
        with contextlib.suppress(csv.Error):
            writer = csv.writer(out, delimiter=chance.choice(",;\t"))
            cells = [list(ROWS[0]), *([row["text"], row["label"]] for row in ROWS)]
            for _ in range(chance.randrange(3)):
                chance.choice(cells)[chance.randrange(2)] = chance.choice(odd)
            writer.writerows(cells)
        text = out.getvalue()
    content = text.encode("utf-8", "surrogatepass")
    content = hurt_bytes(content, chance) if content and chance.random() < 0.3 else content
    overwrite(target / name, gzip.compress(content) if name.endswith(".gz") else content)
    return use_of(name, chance)


# ---------------------------------------------------------------------------- configuration

CRAFTED_TOML: tuple[Callable[[], str], ...] = (
    lambda: "a." * 200_000 + "b = 1",
    lambda: "[" + "a." * 100_000 + "b]",
    lambda: "epochs = " + "[" * 100_000,
    lambda: "epochs = " + "{a=" * 50_000,
    lambda: "".join(f"k{n} = 1\n" for n in range(60_000)),
    lambda: "epochs = " + "9" * 100_000,
    lambda: "epochs = 0x" + "f" * 100_000,
    lambda: "epochs = 1e999",
    lambda: "epochs = 1979-05-27T07:32:00Z",
    lambda: "lr = nan\nseed = inf",
    lambda: 'save_dir = "a\\u0000b"',
    lambda: 'save_dir = "\\ud800"',
    lambda: f'"{FORGED}\\n{FORGED}\\u001b[2J" = 1',
    lambda: f'seed = "{FORGED}\\n{FORGED}\\u001b[2J"',
    lambda: f'save_dir = "a\\r{FORGED}"',
    lambda: '"" = 1',
    lambda: '"-" = "--overwrite"',
    lambda: '"seed=1 --overwrite" = 1',
    lambda: '"overwrite=" = true',
    lambda: '"over-write" = true\nOVERWRITE = true',
    lambda: "overwrite = true\n",
    lambda: '"overw" = true',
    lambda: 'config = "c.toml"',
    lambda: 'train = ["toy-train.txt", "--overwrite"]',
    lambda: 'pretrain_data = ["text.jsonl", "--overwrite", "--save_dir=precious"]',
    lambda: 'pretrain_data = ["a", "--generated-sentence-low-temp-out=precious.txt"]',
    lambda: 'pairs = ["a", "--dev-out=precious.txt"]',
    lambda: 'pretrain_data = ["--generated-sentence-low-temp-out=precious.txt"]',
    lambda: 'prompt = ["a", "--generated-sentence-low-temp-out", "precious.txt"]',
    lambda: 'val_data = ["a", "--", "--overwrite"]',
    lambda: "pretrain_data = [" + '"-x",' * 100_000 + "]",
    lambda: "pretrain_data = [" + '"text.jsonl",' * 50_000 + "]",
    lambda: "val_data = [" + '"--seed=1",' * 50_000 + "]",
    lambda: 'dev_out = "precious.txt"\ntest_out = "precious.txt"',
    lambda: 'generated_sentence_low_temp_out = "precious.txt"',
    lambda: 'generated_sentence_low_temp_out = "new/../precious.txt"',
    lambda: 'save_dir = "precious"\ndev_out = "precious/notes.txt"',
    lambda: 'save_dir = "precious"\ngenerated_sentence_low_temp_out = "precious/notes.txt"',
    lambda: 'save_dir = "."\ngenerated_sentence_high_temp_out = "precious.txt"',
    lambda: 'save_dir = "."',
    lambda: 'save_dir = "/"\ngenerated_sentence_high_temp_out = "precious.txt"',
    lambda: 'cache_dir = "precious.txt"',
    lambda: 'resume = "precious.txt"',
    lambda: "seed = 1\nseed = 2",
    lambda: "\ufeff\ufeffseed = 1",
    lambda: "seed = 1 \0",
    lambda: "x" * (1 << 21),
    lambda: "a." * 8000 + "b = 1",
    lambda: "[" + "a." * 8000 + "b]",
    lambda: "prompt = [" + '"a",' * 4000 + "]",
    lambda: "stop = [" + '"a",' * 900 + "]",
    lambda: "".join(f"[k{n}]\n" for n in range(2000)),
    lambda: "".join(f"[[k]]\na.b.c.d{n} = 1\n" for n in range(800)),
)
# Not what takes minutes, as compiling, or a model that a hundred layers make slow.
SET_BY_TOML = sorted({*FLAGS} - {"compile", "minutes", "profile", "config", "n_layers"})


def toml_value(name: str, chance: random.Random) -> str:
    """A flag's value as TOML writes it: often of its type."""
    kind: Any = FLAGS[name].type
    if chance.random() < 0.2:
        return chance.choice(("[]", "{}", "[[1]]", "true", "nan", "12:00:00", '""', "[1, true]"))
    if kind is bool:
        return chance.choice(("true", "true", "false"))
    if kind in (int, float):
        return chance.choice(INTEGERS if kind is int else NUMBERS) or '""'
    pool = [*TEXTS, *PATHS, *STRANGE, "precious.txt", "precious", "new"]
    if typing.get_origin(kind) is typing.Literal:
        pool = [str(value) for value in typing.get_args(kind)]
    text = json.dumps(chance.choice(pool)).replace("\\udcff", "\\u00ff")
    return f"[{text}]" if FLAGS[name].metadata["many"] else text


def settings(target: Path, chance: random.Random) -> Command:
    """A TOML file of flags, somebody else's: it may not cost a file that is there."""
    option = chance.choice(("pretrain", "finetune", "prompt", "generate"))
    if chance.random() < 0.5:
        text = chance.choice(CRAFTED_TOML)()
    else:
        names = [n for n in SET_BY_TOML if option in FLAGS[n].metadata["read_by"]]
        names = chance.sample(names, k=chance.randrange(1, 6))
        text = "".join(f"{name} = {toml_value(name, chance)}\n" for name in names)
    content = text.encode("utf-8", "surrogatepass")
    content = hurt_bytes(content, chance) if chance.random() < 0.2 else content
    overwrite(target / "c.toml", content)
    model = "--pretrained_model_path model.pt".split()
    words = {
        "pretrain": [
            *"--pretrain_data text.jsonl --max_steps 1 --n_layers 1 --max_seq_len 16".split(),
            *chance.choice(([], "--dim 16 --n_heads 2".split())),
        ],
        "finetune": [*model, *"--train toy-train.txt --dev toy-train.txt --max_steps 1".split()],
        "prompt": [*PROMPT, *"--train toy-train.txt --dev toy-train.txt".split()],
        "generate": [*model, *"--prompt a --max_new_tokens 4".split()],
    }[option]
    return "run_llama.py", ["--config", "c.toml", "--option", option, *words]


# ---------------------------------------------------------------------------- names

NAMES = (
    b"\xff\xfe", "中文".encode("gb18030"), b"a\xff.b", b"\xed\xa0\x80",  # not UTF-8
    f"a\n{FORGED}".encode(), f"a\r{FORGED}".encode(), b"\x1b[2J\x1b]0;a\x07", b"\x7f\x08\x08",
    "\x9b2J".encode(), "\u202etxt.exe".encode(), "\u2028".encode(), "\ufeff".encode(),
    b"-", b"--", b"--help", b"-x", b" ", b"a ", b".", b"...", b"~", b"*", b"[a]", b"?", b"{x}",
    b"%s", b"'", b'"', b"`touch executed`", b"$(touch executed)", b";touch executed", b"a&b",
    b"a|||b", b"<script>", b"#", b"\\", b"\\n", b"a:b", b"C:", b"aux",
    b"x" * 248, "中".encode() * 82,
)  # fmt: skip
ENDS = {"text": (".txt", ".jsonl"), "rows": ("-train.txt", "-train.csv"), "chat": (".jsonl",)}


def names(target: Path, chance: random.Random) -> Command:
    """A file or folder with a name that nobody expects, where each of the flags takes one."""
    role = chance.choice(
        (*ENDS, "folder", "run", "model", "toml", "labels", "output", "vocabulary")
    )
    end = chance.choice(ENDS.get(role, (".pt",) if role == "model" else ("",)))
    name = os.fsdecode(chance.choice(NAMES)[: 255 - len(end)]) + end
    if name in (".", ".."):
        name += "a"
    path = target / name
    pretrain = [*SMALL_TEXT, "--max_steps", "1"]
    if role == "text":
        overwrite(path, (target / "text.jsonl").read_bytes())
        if chance.random() < 0.3:
            return "tokenizer.py", ["train", f"--input={name}", "--output=v", "--vocab_size=300"]
        return "run_llama.py", [*pretrain, f"--pretrain_data={name}", "--save_dir", "new"]
    if role == "folder":
        path.mkdir()
        inner = os.fsdecode(chance.choice(NAMES)[:240]) + ".jsonl"
        overwrite(path / inner, (target / "text.jsonl").read_bytes())
        return "run_llama.py", [*pretrain, f"--pretrain_data={name}", "--save_dir", "new"]
    if role == "rows":
        lines = (target / "toy-train.txt").read_text(encoding="utf-8")
        if end.endswith(".csv"):
            rows = [line.split(" ||| ") for line in lines.splitlines()]
            lines = "label,text\n" + "".join(f"{label},{text}\n" for label, text in rows)
        overwrite(path, lines.encode())
        option = chance.choice((FINETUNE, PROMPT))
        return "run_llama.py", [*option, f"--train={name}", f"--dev={name}"]
    if role == "chat":
        overwrite(path, "\n".join(map(json.dumps, DIALOGUES)).encode())
        return "run_llama.py", [*FINETUNE, f"--train={name}"]
    if role == "run":
        (target / "run").rename(path)
        words = chance.choice(
            (["--resume", "--max_steps", "3"], ["--overwrite", "--max_steps", "1"])
        )
        return "run_llama.py", [*SMALL, *words, f"--save_dir={name}"]
    if role == "model":
        overwrite(path, (target / "model.pt").read_bytes())
        if chance.random() < 0.5:
            return "run_llama.py", [f"--pretrained_model_path={name}", "--max_new_tokens=3"]
        words = chance.choice(([], ["--verify"], ["--json"], ["--convert", "hf"]))
        return "check_model_precision.py", [*words, *(["--"] if name[0] == "-" else []), name]
    if role == "toml":
        overwrite(path, b"seed = 1\n" if chance.random() < 0.5 else b"x = 1\n")
        return "run_llama.py", [*pretrain, f"--config={name}", "--pretrain_data=text.jsonl"]
    if role == "labels":
        overwrite(path, b'["bad", "good"]' if chance.random() < 0.5 else b"[1]")
        return "run_llama.py", [
            *(*PROMPT, f"--label_names={name}"),
            *("--train=toy-train.txt", "--dev=toy-train.txt"),
        ]
    if role == "vocabulary":
        overwrite(path, (target / "vocabulary.model").read_bytes())
        words = [f"--tokenizer_model={name}", "--pretrain_data=text.jsonl", "--save_dir=new"]
        return "run_llama.py", [*pretrain, *words]
    if chance.random() < 0.5:
        flag = chance.choice(
            ("--generated_sentence_low_temp_out", "--generated_sentence_high_temp_out")
        )
        return "run_llama.py", [
            "--pretrained_model_path=model.pt",
            f"{flag}={name}",
            "--max_new_tokens=3",
        ]
    form = chance.choice(("pt", "bin", "gguf", "hf"))
    return "check_model_precision.py", ["model.pt", "--convert", form, f"--output={name}"]


# ---------------------------------------------------------------------------- a server

STATUS = (
    *("200 OK",) * 8, "206 Partial Content", "206", "416 No", "500 \x1b[2J", "301 Moved",
    "302 Found", "304 Not Modified", "401 No", "407 No", "100 Continue", "999 x", "-1 x", "", "x",
    "200" * 30_000, f"404 \x1b]0;a\x07\r{FORGED}", f"404 \x9b2J{FORGED}", f"503 a\x0b{FORGED}",
)  # fmt: skip
LENGTHS = ("-1", "1" + "0" * 30, "1_0", "\u0663", "x", "", "0", "5, 5", "1e3")
RANGES = ("bytes 0-1/2", "bytes 5-", "bytes", "x" * 5000, f"bytes \x1b[2J\r{FORGED}", "")
LOCATIONS = (
    "file:///etc/passwd", "ftp://127.0.0.1:1/x", "http://[", "//", "", "data:,x", "/same",
    "x" * 9000, "http://127.0.0.1:1/", f"http://127.0.0.1/\x1b[2J{FORGED}", 
    "http://a:b@127.0.0.1:x/", "gopher://x",
)  # fmt: skip


def answer(chance: random.Random, bodies: list[bytes]) -> tuple[bytes, int]:
    """An answer's bytes, and how often the last of them are sent."""
    body = chance.choice(bodies)
    lines = [f"HTTP/1.1 {chance.choice(STATUS)}"]
    kind = chance.random()
    length = str(len(body)) if kind < 0.4 else chance.choice((*LENGTHS, str(2 * len(body))))
    lines += [f"Content-Length: {length}"] if kind < 0.8 else []
    if chance.random() < 0.3:
        lines.append(f"Content-Range: {chance.choice(RANGES)}")
    if "30" in lines[0]:
        lines.append(f"Location: {chance.choice(LOCATIONS)}")
    if chance.random() < 0.2:
        lines.append("Transfer-Encoding: chunked")
        sizes = (f"{len(body):x}", "-1", "f" * 40, "x", "", "0", "1" * 70_000)
        body = f"{chance.choice(sizes)}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    if chance.random() < 0.1:
        lines += chance.choice((["X: y"] * 5000, ["X: " + "y" * 100_000], ["\0", ": ", "x"]))
    sent = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    sent = hurt_bytes(sent, chance) if chance.random() < 0.2 else sent
    return sent, chance.choice((1, 1, 1, 100_000))


def serve(listener: socket.socket, seed: int, bodies: list[bytes]) -> None:
    """Answer every connection, the Nth to one path as the path and N say; some a byte at a time."""

    def reply(client: socket.socket, number: int) -> None:
        with client, contextlib.suppress(OSError):
            path = client.recv(1 << 16).split(b" ")[1:2]
            chance = random.Random(f"{seed} {path} {number % 3}")
            sent, times = answer(chance, bodies)
            if chance.random() < 0.1:
                for byte in sent[:100]:
                    client.sendall(bytes([byte]))
                    threading.Event().wait(0.1)
            client.sendall(sent)
            for _ in range(times - 1):
                client.sendall(sent[-1000:])

    number = 0
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            client.settimeout(5)
            threading.Thread(target=reply, args=(client, number), daemon=True).start()
            number += 1


def downloads(port: int, number: int, target: Path, chance: random.Random) -> Command:
    """A download from the hostile server, often with a part that is there."""
    name, file = chance.choice(
        (
            ("sst", "sst-train.txt"),
            ("tokenizer", "tokenizer.model"),
            ("stories42M", "stories42M.pt"),
        )
    )
    (target / "got").mkdir()
    if chance.random() < 0.3:
        (target / "got" / f"{file}.part").write_bytes(chance.randbytes(5000))
    if chance.random() < 0.1:
        (target / "got" / file).write_bytes(MINE)
    url = f"http://127.0.0.1:{port}/{number}"
    if chance.random() < 0.1:
        url = chance.choice((*LOCATIONS, "http://127.0.0.1:99999", "http://\ud800", "\x1b[2J"))
    return "download.py", [name, "--output", "got", f"--base_url={url}"]


# ---------------------------------------------------------------------------- all of them


def hostile_texts(folder: Path, count: int, seed: int = 0) -> Tally:
    """Texts, settings, names and answers of servers made to be believed, or to have no end."""
    chance = random.Random(seed)
    place = folder / "place"
    write_place(place)
    kept = {name: MINE for name in ("precious.txt", "precious/notes.txt", "precious/report.html")}
    (place / "precious").mkdir()
    (place / "names.json").write_text('["bad", "good"]', encoding="utf-8")
    for name, content in kept.items():
        (place / name).write_bytes(content)
    kept |= {
        name: (place / name).read_bytes() for name in ("model.pt", "toy-train.txt", "text.jsonl")
    }
    state = load_pt(place / "run" / "pretrain-step-2.pt", verify=False)
    torch.save(hostile_pickle(state, chance), place / "hostile.pt")
    bodies = [b"", MINE, b"\0" * 300_000, (place / "hostile.pt").read_bytes(), kept["model.pt"]]
    makers: dict[str, Callable[[Path, random.Random], Command]] = {
        "JSON list of texts": json_texts("list"),
        "JSON lines of texts": json_texts("each"),
        "JSON texts over several lines": json_texts("lines"),
        "dialogues": dialogues,
        "labelled JSON": labelled_json,
        "labelled CSV": labelled_table,
        "TOML configuration": settings,
        "file names": names,
    }

    def attacks(port: int) -> Iterator[Attack]:
        for number in range(count):
            kind = [*makers, "download server"][number % (len(makers) + 1)]
            target = copy_of(folder, number)
            if kind in makers:
                program, words = makers[kind](target, chance)
            else:
                program, words = downloads(port, number, target, chance)
            must_end = kind != "TOML configuration"  # which may ask for a long work
            yield Attack(f"hostile {kind}", target, program, words, must_end, tuple(kept.items()))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener, seed, bodies), daemon=True).start()
        return run_task(attacks(listener.getsockname()[1]))
