"""Attacks on the programs: command lines and files that nobody means well with.

Each attack is a start of a program in a folder of its own, in a process with bounded memory. It
holds if the program ends by itself, says what is wrong in lines and not in a traceback, and runs
nothing. Attacks are counted by kind, as those of `survivor`; `benchmarks/survival.py` prints them.
`hostile_texts` makes more of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import threading
import time
import traceback
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import survivor
import torch
from hurried import hurry
from oracles import write_adapter, write_litgpt
from survivor import ROOT, SMALL, Malicious, Tally, run_here, start_process, write_labelled

sys.path.insert(0, str(ROOT / "data"))

import download

import check_model_precision
import run_llama
import tokenizer
from config import EVERY, FLAGS, parse_options
from llama import load_pretrained
from minllama.cli.command_line import parse_or_exit, protect_output
from minllama.formats.pt_file import load_pt, save_pt
from minllama.training import pretraining

MEMORY = 2 << 30  # bytes that an attack may add to those of a process that has imported torch
PATIENCE, GRACE = 4.0, 60.0  # seconds until an attack that works is interrupted, and then killed
LONGEST = 30.0  # seconds of an attack that is small, and must end by itself
TOGETHER, IN_ONE_PROCESS = 3, 10  # processes at a time, and attacks in each
MARKER = "executed"  # the file that hostile code would leave
FORGED = "forged: a line that the program never wrote"
UNPRINTED = re.compile(r"[^\n\r\t -~\u00a0-\U0010ffff]")  # control characters
PROGRAMS = ("run_llama.py", "check_model_precision.py", "tokenizer.py")
MODULES = dict(zip(PROGRAMS[1:], (check_model_precision, tokenizer), strict=True))
MODULES["download.py"] = download

# ---------------------------------------------------------------------------- one attack


def attack(attacks: list[tuple[str, str, list[str], bool]]) -> None:
    """A process's whole life: the programs, one after the other, with little memory."""
    with contextlib.suppress(ImportError, OSError):
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    sys.stdin = open(os.devnull, encoding="utf-8")
    hurry()
    pretraining.sample_text = lambda *_, **__: "One day."
    download.TIMEOUT, download.PAUSE, download.LARGEST = 0.3, 0.0, 1 << 22
    os.environ["no_proxy"] = "*"
    for folder, program, words, must_end in attacks:
        os.chdir(folder)
        sys.argv = [program, *words]
        with open("output.txt", "w", encoding="utf-8", errors="replace") as output:
            sys.stdout = sys.stderr = output
            status = start(program, words, LONGEST if must_end else PATIENCE)
            sys.stdout.flush()
        Path("status.txt").write_text(str(status), encoding="utf-8")


def start(program: str, words: list[str], patience: float) -> int:
    """Start a program as its script does; one that works for long is interrupted as by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(patience, lambda: os.kill(os.getpid(), signal.SIGINT))
    protect_output()
    try:
        timer.start()
        if program == "run_llama.py":
            return run_llama.main(parse_or_exit(parse_options, program, words))
        return MODULES[program].main(words)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        timer.cancel()


class Attack(typing.NamedTuple):
    """What is tried: in `folder`, of whose files the program may make what it wants."""

    kind: str
    folder: Path
    program: str
    words: list[str]
    must_end: bool = False  # by itself, not by Ctrl-C
    kept: tuple[tuple[str, bytes], ...] = ()  # files, and what must still be in them


def judge(one: Attack, status: int | None) -> str | None:
    """What went wrong, or None: the program ended by itself and said why in lines."""
    path = one.folder / "output.txt"
    output = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    story = f"{one.program} {one.words}: {output[-1500:]}"
    if (one.folder / MARKER).exists():
        return f"executed code: {story}"
    if status is None:
        return f"did not end: {story}"
    if "Traceback" in output or status not in (0, 1, 2, 130):
        return f"exit {status}: {story}"
    if one.must_end and status == 130:
        return f"works for more than {LONGEST:g} s: {story}"
    if status == 2 and "error: " not in output and "错误：" not in output:  # --lang zh
        return f"says nothing: {story}"
    if re.search(rf"(^|[\r\n]){FORGED}", output):
        return f"lets a line be forged: {story!r}"
    for name, content in one.kept:
        if not (one.folder / name).is_file() or (one.folder / name).read_bytes() != content:
            return f"costs {name}: {story}"
    if UNPRINTED.search(output):
        return f"prints raw control characters: {story!r}"
    return None


def run_task(attacks: Iterator[Attack]) -> Tally:
    """Carry out all attacks, several in a process and a few processes at a time; count what held.

    One that ends its process is one that did not hold; those behind it get another process.
    """
    tally, running, waiting = Tally(), [], list[Attack]()

    def begin(group: list[Attack]) -> None:
        plain = [(str(one.folder), one.program, one.words, one.must_end) for one in group]
        running.append((group, start_process(attack, plain), time.monotonic()))

    def settle(group: list[Attack], process: Any, since: float) -> bool:
        if process.is_alive() and time.monotonic() - since < PATIENCE * len(group) + GRACE:
            return False
        status = None if process.is_alive() else process.exitcode
        process.kill()
        process.join()
        for number, one in enumerate(group):
            said = one.folder / "status.txt"
            ended = said.exists()
            problem = judge(one, int(said.read_text(encoding="utf-8")) if ended else status)
            if not ended and problem is None:
                problem = f"ended its process with {status}: {one.words}"
            tally.count(one.kind, problem is None, problem or "")
            shutil.rmtree(one.folder)
            if not ended:
                waiting.extend(group[number + 1 :])
                break
        return True

    def settle_some() -> None:
        running[:] = [entry for entry in running if not settle(*entry)]
        time.sleep(0.02)

    for one in attacks:
        waiting.append(one)
        if len(waiting) >= IN_ONE_PROCESS:
            while len(running) >= TOGETHER:
                settle_some()
            begin(waiting[:])
            waiting.clear()
    while running or waiting:
        if waiting:
            begin(waiting[:])
            waiting.clear()
        settle_some()
    return tally


# ---------------------------------------------------------------------------- command lines

INTEGERS = ("0", "1", "2", "-1", "3", "7", "100000000", "99999999999999999999", "1e9", "", "2.5")
NUMBERS = ("0", "0.5", "1", "-1", "1e308", "1e-320", "nan", "inf", "-0.0", "", "x", "1e400")
TEXTS = ("", "a", "\x1b[31m", "\udcff", "{x}", "%s", "a.b.c", "x" * 5000, "-", "--", "\\n", "💥")
PATHS = (
    "", "missing", "model.pt", "text.jsonl", ".", "..", "/dev/null", "x" * 300, "toy-train.txt",
    "pipe", "link", "empty", "noise", "vocabulary.model", "labels.json", "deep.json", "run",
    "run/pretrain-step-2.pt", "run/metrics.jsonl", "\x1b]0;a\x07", "a\udcff", "model.pt/x", "*",
)  # fmt: skip
FORMATS = ("pt", "pt-float16", "bin", "bin-int8", "gguf", "hf", "x", "")
OF_OTHERS = {  # flags of the other two programs, and what they take
    "check_model_precision.py": {
        "verify": (), "compare": PATHS, "text": PATHS, "text_field": TEXTS, "json": (),
        "convert": FORMATS, "output": PATHS, "save_dtype": ("float16", "q8_0", "x"),
        "tokenizer_model": PATHS, "overwrite": (),
    },
    "tokenizer.py": {
        "input": PATHS, "output": PATHS, "vocab_size": INTEGERS, "character_coverage": NUMBERS,
        "text_field": TEXTS, "encoding": TEXTS, "encoding_errors": ("replace", "x"),
        "sentences_only": (), "tokenizer_model": PATHS, "overwrite": (),
    },
}  # fmt: skip


def write_place(folder: Path) -> None:
    """A folder with a run, a model, texts, and things that are none of these."""
    survivor.write_text_file(folder, 6)
    status, text = run_here(folder, "--save_dir", "run", "--max_steps", "2")
    assert status == 0, text
    write_labelled(folder)
    shutil.copy(folder / "run" / "final-model.pt", folder / "model.pt")
    shutil.copy(tokenizer.EMBEDDED_VOCABULARY, folder / "vocabulary.model")
    (folder / "labels.json").write_text('["\\u001b[31mbad", "good"]', encoding="utf-8")
    (folder / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    (folder / "empty").touch()
    (folder / "noise").write_bytes(random.Random(0).randbytes(3000))
    with contextlib.suppress(OSError, AttributeError):  # Windows
        os.mkfifo(folder / "pipe")
        (folder / "link").symlink_to("link")


def values_of(name: str, chance: random.Random) -> list[str]:
    """What a flag of run_llama.py is given: often what it could take, at times what none could."""
    field, kind = FLAGS[name], FLAGS[name].type
    pool: tuple[str, ...] = TEXTS
    if kind is bool:
        return []
    if typing.get_origin(kind) is typing.Literal:
        pool = (*map(str, typing.get_args(kind)), "x")
    elif kind in (int, float):
        pool = INTEGERS if kind is int else NUMBERS
    elif kind is Path or field.metadata["many"] or name == "resume":
        pool = PATHS
    if chance.random() < 0.1:
        pool = (*INTEGERS, *NUMBERS, *TEXTS, *PATHS)
    return chance.choices(pool, k=chance.randrange(4) if field.metadata["many"] else 1)


def command_line(chance: random.Random) -> tuple[str, list[str]]:
    """A program and words for it: some flags at random, on top of what would be a short run."""
    program = chance.choices(PROGRAMS, (8, 1, 1))[0]
    if program == "run_llama.py":
        option = chance.choice(EVERY)
        quick = [name for name in FLAGS if name != "compile"]  # which takes minutes
        readers = [name for name in quick if option in FLAGS[name].metadata["read_by"]]
        known = readers if chance.random() < 0.9 else quick
        names = chance.sample(known, k=chance.randrange(6))
        flags = [[f"--{n}", *values_of(n, chance)] for n in names]
        base = {
            "pretrain": SMALL,
            "finetune": "--pretrained_model_path model.pt --train toy-train.txt --dev "
            "toy-train.txt --epochs 1".split(),
            "prompt": "--pretrained_model_path model.pt --train toy-train.txt --dev "
            "toy-train.txt".split(),
            "generate": "--pretrained_model_path model.pt --prompt a --max_new_tokens 4".split(),
        }[option]
        base = [*base, "--option", option] if chance.random() < 0.9 else []
        last = ["--max_steps", "2"] if option in ("pretrain", "finetune") else []
        return program, [*base, *(word for flag in flags for word in flag), *last]
    known = OF_OTHERS[program]
    names = chance.sample(list(known), k=chance.randrange(5))
    words = [w for n in names for w in (f"--{n}", *([chance.choice(known[n])] if known[n] else []))]
    if program == "tokenizer.py":
        return program, [chance.choice(("train", "export", "x", "train")), *words]
    return program, [
        *chance.choices((*PATHS, "model.pt", "model.pt"), k=chance.randrange(3)),
        *words,
    ]


def command_lines(folder: Path, count: int, seed: int = 0) -> Tally:
    """Random command lines: each ends as it should, without a traceback."""
    chance = random.Random(seed)
    write_place(folder / "place")

    def lines() -> Iterator[Attack]:
        for number in range(count):
            program, words = command_line(chance)
            words = [word.replace("\0", "") for word in words]
            yield Attack("random command line", copy_of(folder, number), program, words)

    return run_task(lines())


def copy_of(folder: Path, number: int) -> Path:
    """A place of its own for an attack."""
    place = folder / f"attack-{number}"
    shutil.copytree(folder / "place", place, symlinks=True, copy_function=os.link)
    for path in place.rglob("*"):  # what is written in place must not reach the other copies
        if path.is_file() and path.suffix in (".jsonl", ".json", ".lock"):
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    return place


# ---------------------------------------------------------------------------- hostile files

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**26, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x",
    "\x1b[31mred", "x" * 100_000, [], {}, [[]], {"a": 1}, (1, 2), b"\0",
)  # fmt: skip
ODD_TENSORS: tuple[Callable[[], torch.Tensor], ...] = (
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(1).expand(2**36),
    lambda: torch.full((3, 3), float("nan")),
    lambda: torch.zeros(4, dtype=torch.int64),
    lambda: torch.zeros(4, dtype=torch.complex64),
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.zeros(7, device="meta"),
    lambda: quantized(),
)
ODD_LINES = (
    "0 ||| a", "999999999 ||| a", "10000000000000000000000 ||| a", "-5 ||| a", " ||| ", "0",
    "1 ||| " + "x " * 9000, "\x1b[31m ||| a", "1||| a ||| b", "\u0663 ||| a",
)  # fmt: skip
ODD_JSON = (
    "null",
    "",
    "\ufeff{}",
    "{}",
    "[1]",
    "1e999",
    "\0",
    '"x"',
    "NaN",
    "[" + "9" * 5000 + "]",
)


def quantized() -> torch.Tensor:
    """A tensor of a kind that torch is about to give up, as old files may hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)


def places_in(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to every node of nested dicts and lists."""
    children = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from places_in(child, (*path, key))


def with_odd_node(node: Any, chance: random.Random, odd: tuple = ODD) -> Any:
    """A copy of nested plain values and tensors with a node that is something else, or gone."""
    # By depth first: else nearly all that is hurt were one of many tensors.
    places = list(places_in(node))
    depth = chance.choice(sorted({len(place) for place in places}))
    *parents, key = chance.choice([place for place in places if len(place) == depth])

    def copied(part: Any, path: list) -> Any:
        part = part.copy()
        if path:
            part[path[0]] = copied(part[path[0]], path[1:])
        elif chance.random() < 0.1:
            del part[key]
        else:
            part[key] = chance.choice(odd)
            if torch.is_tensor(node_at(node, (*parents, key))) or chance.random() < 0.1:
                part[key] = chance.choice(ODD_TENSORS)()
            if isinstance(part, dict) and chance.random() < 0.1:
                part[chance.choice((7, None, "\x1b[31m", "optimizer"))] = part.pop(key)
        return part

    return copied(node, parents)


def node_at(node: Any, path: tuple) -> Any:
    """What the keys lead to."""
    for key in path:
        node = node[key]
    return node


def hurt_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut off, doubled, or overwritten with a number that is too large."""
    data, at = (
        bytearray(content),
        int(chance.random() ** 3 * len(content)),
    )  # oftener near the start
    kind = chance.randrange(5)
    if kind == 0:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at : at + 8] = struct.pack("<q", chance.choice((-1, 2**31, 2**62, 2**63 - 1, 0)))
    elif kind == 3:
        data[at:at] = data[: chance.randrange(64)]
    else:
        data[at : at + 40] = chance.randbytes(40)
    return bytes(data)


READ_MODEL = ("run_llama.py", "--option generate --prompt a --max_new_tokens 3".split())
VERIFY = ("check_model_precision.py", ["--verify"])


def hostile_files(folder: Path, count: int, seed: int = 0) -> Tally:
    """Files made to run code, to fill the memory, to be read beyond their end, to be believed."""
    chance = random.Random(seed)
    write_place(folder / "place")
    place = folder / "place"
    for kind, output in (
        ("bin", "m.bin"),
        ("bin-int8", "m8.bin"),
        ("gguf", "m.gguf"),
        ("hf", "hf"),
    ):
        line = ["model.pt", "--convert", kind, "--output", output]
        with survivor.inside(place) as said:
            assert check_model_precision.main(line) == 0, said.getvalue()
    write_folders_of_others(place)
    cache = next((place / "cache").glob("*.tokens")).relative_to(place).as_posix()
    state = load_pt(place / "run" / "pretrain-step-2.pt", verify=False)
    state = {key: value for key, value in state.items() if key != "format_version"}
    resume = ("run_llama.py", [*SMALL, "--max_steps", "3", "--save_dir", "run", "--resume"])
    prompt = ("run_llama.py", "--option prompt --pretrained_model_path model.pt --train "
              "toy-train.txt --dev toy-train.txt --label_names labels.json".split())  # fmt: skip
    finetune = ("run_llama.py", "--option finetune --pretrained_model_path model.pt --max_steps 1 "
                "--train toy-train.txt --dev toy-train.txt".split())  # fmt: skip
    pretrain = ("run_llama.py", [*SMALL, "--max_steps", "1"])

    def read_as_model(name: str) -> tuple[str, list[str]]:
        program, words = chance.choice((READ_MODEL, VERIFY))
        flag = ["--pretrained_model_path"] if program == "run_llama.py" else []
        return program, [*words, *flag, name]

    def payload(target: Path) -> tuple[str, list[str]]:
        if chance.random() < 0.3:
            torch.save(hostile_pickle(state, chance), target / "a.pt")
            return read_as_model("a.pt")
        save_pt(target / "a.pt", with_odd_node(state, chance))
        return read_as_model("a.pt")

    def checkpoint(target: Path) -> tuple[str, list[str]]:
        path = target / "run" / "pretrain-step-2.pt"
        path.unlink()
        if chance.random() < 0.1:
            torch.save(hostile_pickle(state, chance), path)
        else:
            save_pt(path, with_odd_node(state, chance))
        return resume[0], [*resume[1], chance.choice(("auto", "run/pretrain-step-2.pt"))]

    def graph(target: Path) -> tuple[str, list[str]]:
        node: list = [1]
        for _ in range(chance.choice((25, 60))):
            node = [node] * 2
        key = chance.choice(("progress", "identity", "options", "optimizer", "model_args"))
        path = target / "run" / "pretrain-step-2.pt"
        path.unlink()
        torch.save({**state, key: {"step": node}}, path)
        return chance.choice(
            ((resume[0], [*resume[1], "auto"]), read_as_model("run/pretrain-step-2.pt"))
        )

    def folder_of_pipes(target: Path) -> tuple[str, list[str]]:
        path = target / "hf" / chance.choice([path.name for path in (place / "hf").iterdir()])
        path.unlink()
        if chance.random() < 0.5:
            os.mkfifo(path)
        else:
            with path.open("wb") as file:
                file.truncate(6 << 30)
        return read_as_model("hf")

    def archive(target: Path) -> tuple[str, list[str]]:
        with zipfile.ZipFile(target / "a.pt", "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a/data.pkl", bytes(chance.choice((10, 1 << 27))))
            file.writestr("../../outside", b"x")
        return read_as_model("a.pt")

    def binary(name: str) -> Callable[[Path], tuple[str, list[str]]]:
        def make(target: Path) -> tuple[str, list[str]]:
            overwrite(target / name, hurt_bytes((place / name).read_bytes(), chance))
            return read_as_model(name.split("/")[0])

        return make

    def config(name: str) -> Callable[[Path], tuple[str, list[str]]]:
        def make(target: Path) -> tuple[str, list[str]]:
            write_odd_json(target / name, chance)
            return read_as_model(name.split("/")[0])

        return make

    def pickled(target: Path) -> tuple[str, list[str]]:
        (target / "hf" / "model.safetensors").unlink()
        torch.save(hostile_pickle(state, chance)["model"], target / "hf" / "pytorch_model.bin")
        return read_as_model("hf")

    def vocabulary(target: Path) -> tuple[str, list[str]]:
        overwrite(target / "v.model", hurt_bytes((place / "vocabulary.model").read_bytes(), chance))
        return pretrain[0], [*pretrain[1], "--tokenizer_model", "v.model", "--save_dir", "new"]

    def labels(target: Path) -> tuple[str, list[str]]:
        write_odd_json(target / "labels.json", chance)
        return prompt

    def sentences(target: Path) -> tuple[str, list[str]]:
        lines = chance.choices(ODD_LINES, k=3)
        overwrite(target / "toy-train.txt", "\n".join([*lines, "1 ||| b"]).encode())
        return finetune

    def tokens(target: Path) -> tuple[str, list[str]]:
        overwrite(target / cache, hurt_bytes((place / cache).read_bytes(), chance))
        return pretrain[0], [*pretrain[1], "--save_dir", "new"]

    def record(name: str) -> Callable[[Path], tuple[str, list[str]]]:
        def make(target: Path) -> tuple[str, list[str]]:
            if chance.random() < 0.5:
                write_odd_json(target / name, chance)
            else:
                overwrite(target / name, hurt_bytes((place / name).read_bytes(), chance))
            return resume[0], [*resume[1], "auto"]

        return make

    makers: dict[str, Callable[[Path], tuple[str, list[str]]]] = {
        ".pt file": payload,
        "checkpoint": checkpoint,
        "graph": graph,
        "archive": archive,
        "llama2.c .bin": binary("m.bin"),
        "llama2.c int8 .bin": binary("m8.bin"),
        "GGUF": binary("m.gguf"),
        "safetensors": binary("hf/model.safetensors"),
        "config.json": config("hf/config.json"),
        "pytorch_model.bin": pickled,
        "adapter_config.json": config("adapter/adapter_config.json"),
        "adapter_model.safetensors": binary("adapter/adapter_model.safetensors"),
        "model_config.yaml": binary("lit/model_config.yaml"),
        "pipes and sparse files": folder_of_pipes,
        "SentencePiece vocabulary": vocabulary,
        "label names": labels,
        "labelled sentences": sentences,
        "token cache": tokens,
        "run.json": record("run/run.json"),
        "metrics.jsonl": record("run/metrics.jsonl"),
    }

    def attacks() -> Iterator[Attack]:
        for number in range(count):
            kind = list(makers)[number % len(makers)]
            target = copy_of(folder, number)
            program, words = makers[kind](target)
            yield Attack(f"hostile {kind}", target, program, words)

    return run_task(attacks())


def write_folders_of_others(place: Path) -> None:
    """A folder of litgpt's, and an adapter to the one of Hugging Face's."""
    model = load_pretrained(place / "model.pt")
    write_litgpt(place / "lit", model)
    config = model.config
    write_adapter(place / "adapter", "../hf", dim=config.dim, hidden_dim=config.hidden_dim)


def hostile_pickle(state: dict, chance: random.Random) -> dict:
    """A weights file's content with an object in it that runs code when it is loaded."""
    hurt = {**state, "model": {**state["model"]}}
    where = chance.choice((hurt, hurt["model"]))
    where[chance.choice(list(where))] = chance.choice(
        (Malicious(), [Malicious()], {1: Malicious()})
    )
    return hurt


def write_odd_json(path: Path, chance: random.Random) -> None:
    """The JSON of a file with an odd node, or something else that JSON can be."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:  # a line each
        content = json.loads(path.read_bytes().splitlines()[-1])
    text = odd_json(content, chance)
    if chance.random() < 0.3:
        text = chance.choice(("[" * 100_000, '{"a":' * 100_000, *ODD_JSON))
    overwrite(path, text.encode() + b"\n")


def odd_json(content: Any, chance: random.Random, *, odd: tuple = (), **form: Any) -> str:
    """JSON with a node that is something else, or gone."""
    plain = (*odd, *(value for value in ODD if not isinstance(value, bytes)))
    hurt = content
    while torch.is_tensor(hurt) or hurt is content or "tensor(" in repr(hurt):
        hurt = with_odd_node(content, chance, plain)
    return json.dumps(hurt, default=str, skipkeys=True, **form)


def overwrite(path: Path, content: bytes) -> None:
    """Put a file in place of one that other copies share."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
