"""Ways to hurt a run: kills, crashes, failing disks, flipped bytes, signals.

Each function tries one way in a folder of its own and returns what was tried and what was survived,
by kind; the tests ask that all is survived, `benchmarks/survival.py` prints the table. What a
process does while it is hurt is changed from outside, by patches: the program knows nothing of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

os.environ["TQDM_DISABLE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch._dynamo  # every optimizer imports it, for two seconds; here once for all processes
from hurried import hurried, hurry
from running import TIMED, records
from several import start_process

import run_llama
from config import LlamaConfig, parse_options
from llama import Llama, load_pretrained
from minllama.formats import pt_file
from minllama.formats.pt_file import FORMAT_VERSION, SealingFile, load_pt, save_pt
from minllama.machine import sharding
from minllama.machine.ranks import Ranks
from minllama.runs.checkpoints import Checkpoints, load_checkpoint
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError
from minllama.system.files import atomic_folder, remove_temporaries, restore_folder
from minllama.system.signals import HANDLED
from minllama.text import encoder
from minllama.text.token_cache import BadCache, TokenCache
from minllama.training import loop
from minllama.training import task as tasks
from tokenizer import EMBEDDED_VOCABULARY, Tokenizer, train_vocabulary

SMALL = (
    "--option pretrain --pretrain_data text.jsonl --dim 16 --n_layers 1 --n_heads 2 "
    "--max_seq_len 16 --pretrain_batch_size 4 --dtype float32 --dropout 0.1 --pretrain_lr 0.01 "
    "--cache_dir cache --checkpoint_interval 3 --eval_interval 20 --val_fraction 0.02"
).split() + ["--tokenizer_model", str(EMBEDDED_VOCABULARY)]


@dataclass
class Tally:
    """How often each kind was tried and survived, and what went wrong where it was not."""

    tried: Counter = field(default_factory=Counter)
    survived: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def count(self, kind: str, survived: bool, story: str = "", times: int = 1) -> None:
        """Add attempts of one kind."""
        self.tried[kind] += times
        self.survived[kind] += times * survived
        if not survived:
            self.failures.append(f"{kind}: {story}")


def write_text_file(folder: Path, stories: int = 12) -> None:
    """The training text of all runs here: about 150 chunks of 16 tokens."""
    lines = (ROOT / "data" / "stories-train.jsonl").read_text(encoding="utf-8").splitlines()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.jsonl").write_text("\n".join(lines[:stories]) + "\n", encoding="utf-8")


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[io.StringIO]:
    """Work in a folder, with what is printed kept."""
    before, output = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield output
    finally:
        os.chdir(before)


def run_here(folder: Path, *words: str) -> tuple[int, str]:
    """Run a command in this process; returns its exit status and what it printed."""
    with (
        inside(folder) as output,
        mock.patch.object(sys, "argv", ["run_llama.py", *words]),
        hurried(),
    ):
        status = run_llama.main(parse_options([*SMALL, *words]))
    return status, output.getvalue()


def outcome(folder: Path, step: int) -> dict[str, Any]:
    """All that a run leaves, less what tells who ran it and how fast."""
    state = load_checkpoint(folder / "run" / f"pretrain-step-{step}.pt")
    kept = ("model", "optimizer", "scaler", "rng", "progress", "identity")
    found = {name: content_digest(state[name]) for name in kept}
    for name in ("final-model.pt", "best-model.pt"):
        found[name] = content_digest(load_pt(folder / "run" / name))
    metrics = records(folder / "run" / "metrics.jsonl")
    found["metrics"] = [{k: v for k, v in r.items() if k not in TIMED} for r in metrics]
    return found


def content_digest(content: Any) -> str:
    """SHA-256 over every key, plain value and tensor byte of nested dicts and lists, in order."""
    digest = hashlib.sha256()

    def add(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            digest.update(f"{node.dtype}{tuple(node.shape)}".encode())
            digest.update(node.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(node, dict):
            digest.update(f"dict{len(node)}".encode())
            for key, value in node.items():
                digest.update(repr(key).encode())
                add(value)
        elif isinstance(node, list | tuple):
            digest.update(f"{type(node).__name__}{len(node)}".encode())
            for value in node:
                add(value)
        else:
            digest.update(repr(node).encode())

    add(content)
    return digest.hexdigest()


# ---------------------------------------------------------------------------- kills


def live(folder: str, words: list[str], slow_save: int | None) -> None:
    """A process's whole life: the run, with save number `slow_save` drawn out and announced."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = ["run_llama.py", *words]
    sys.stdout = sys.stderr = open("output.txt", "a", encoding="utf-8", buffering=1)
    hurry()
    train = run_llama.train

    def announced(run: loop.Run, *rest: Any) -> bool:
        Path("training").touch()
        return train(run, *rest)

    run_llama.train = announced
    if slow_save is not None:
        slow_down(slow_save)
    sys.exit(run_llama.main(parse_options([*SMALL, *words])))


def slow_down(number: int) -> None:
    """Make save `number` of this process take a tenth of a second, and say that it runs."""
    real, counts = pt_file.atomic_write, Counter()

    def drawn_out(function: Callable, seconds: float) -> Callable:
        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **kwargs)

        return slow

    @contextlib.contextmanager
    def atomic_write(path: Path, **kwargs: Any) -> Iterator[BinaryIO]:
        counts["saves"] += 1
        if counts["saves"] != number:
            with real(path, **kwargs) as file:
                yield file
            return
        Path("in-save").touch()
        with (
            mock.patch.object(SealingFile, "_pass_on", drawn_out(SealingFile._pass_on, 5e-4)),
            mock.patch.object(os, "fsync", drawn_out(os.fsync, 0.02)),
            mock.patch.object(os, "replace", drawn_out(os.replace, 0.02)),
            mock.patch.object(pt_file, "verify_seal", drawn_out(pt_file.verify_seal, 0.02)),
            real(path, **kwargs) as file,
        ):
            yield file
        Path("in-save").rename("saved")

    pt_file.atomic_write = atomic_write


def kill_once(
    folder: Path, words: list[str], chance: random.Random, kind: str, training_seconds: float
) -> tuple[int | None, str]:
    """Start or resume the run and kill it.

    Returns the exit status, None where the kill came, and the kind that the kill turned out to be.
    """
    announced = {IN_TRAINING: "training", IN_SAVE: "in-save"}.get(kind)
    for name in ("training", "in-save"):
        (folder / name).unlink(missing_ok=True)
    slow_save = chance.randrange(1, 5) if kind == IN_SAVE else None
    process = start_process(live, str(folder), words, slow_save)
    while announced and process.is_alive() and not (folder / announced).exists():
        time.sleep(0.001)
    # A third of the training: enough lives come so far that the run gets on.
    longest = {IN_TRAINING: training_seconds / 3, IN_SAVE: 0.1, IN_START: 0.4}[kind]
    process.join(chance.uniform(0, longest))
    if process.is_alive():
        process.kill()
        process.join()
    killed = process.exitcode == -signal.SIGKILL if os.name != "nt" else process.exitcode != 0
    if kind == IN_SAVE and not (folder / "in-save").exists():
        kind = IN_TRAINING  # the save was over by then
    return None if killed else process.exitcode, kind


IN_START, IN_TRAINING, IN_SAVE = "a start or resume", "training", "the middle of a save"
KINDS = (
    IN_TRAINING,
    IN_TRAINING,
    IN_SAVE,
    IN_TRAINING,
    IN_TRAINING,
    IN_START,
    IN_SAVE,
    IN_TRAINING,
)


def kills(folder: Path, count: int, *, steps: int = 60, per_run: int = 8, seed: int = 0) -> Tally:
    """SIGKILL at random moments, every fourth inside a save; each run ends as the one never killed.

    A run is killed up to `per_run` times and then left to end; then the next one begins.
    """
    tally, chance = Tally(), random.Random(seed)
    write_text_file(folder / "whole")
    words = ["--max_steps", str(steps), "--save_dir", "run"]
    process = start_process(live, str(folder / "whole"), words, None)
    process.join()
    training = (folder / "whole" / "run" / f"pretrain-step-{steps}.pt").stat().st_mtime
    training -= (folder / "whole" / "training").stat().st_mtime
    expected = outcome(folder / "whole", steps)
    number, landed = 0, Counter()
    while tally.tried.total() < count:
        number += 1
        place, status = folder / f"killed-{number}", None
        write_text_file(place)
        landed.clear()
        while status is None and landed.total() < min(per_run, count - tally.tried.total()):
            kind = KINDS[(tally.tried.total() + landed.total()) % len(KINDS)]
            began = (place / "run" / "run.json").exists()
            resume = ["--resume", "auto"] if began else []
            status, kind = kill_once(place, words + resume, chance, kind, training)
            landed[kind] += status is None  # else the run had ended before the kill
        if status is None:
            resume = ["--resume", "auto"] if (place / "run" / "run.json").exists() else []
            process = start_process(live, str(place), words + resume, None)
            process.join()
            status = process.exitcode
        same = status == 0 and outcome(place, steps) == expected
        story = (place / "output.txt").read_text(encoding="utf-8")
        for kind, times in landed.items():
            tally.count(f"SIGKILL in {kind}", same, f"run {number}: exit {status}, {story}", times)
        if same:
            shutil.rmtree(place)
    return tally


# ---------------------------------------------------------------------------- crash points


def small_payload(step: int, run_id: str = "crash") -> dict[str, Any]:
    """A resumable checkpoint in small."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a": torch.randn(40, 30, generator=generator), "b": torch.full((7,), step)},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(40, 30, generator=generator)}}},
        "scaler": {},
        "rng": {"torch": torch.randn(64, generator=generator)},
        "progress": {"step": step, "skipped": 0},
        "identity": {},
        "run_id": run_id,
    }


def save_and_prune(folder: Path, step: int) -> None:
    """What a run does after a step: a checkpoint, a new best model, the oldest file deleted."""
    run = RunFolder(folder, "pretrain")
    save_pt(run.file("best-model.pt"), small_payload(step))
    save_pt(run.step_checkpoint(step), small_payload(step))
    checkpoints = Checkpoints(run, Ranks(), sharded=False, keep_last=2)
    checkpoints.list_own("crash")
    checkpoints.prune()


def load_newest(folder: Path) -> list[dict[str, Any]]:
    """What a resumed run finds of that; removes what was left half-written."""
    run = RunFolder(folder, "pretrain")
    _, checkpoint = run.find_checkpoint("auto")
    run.remove_incomplete()
    return [checkpoint, load_pt(run.file("best-model.pt"))]


def save_shards(folder: Path, step: int) -> None:
    """A sharded checkpoint of a single rank, always under the name of step 1."""
    run = RunFolder(folder, "pretrain")
    checkpoints = Checkpoints(run, Ranks(), sharded=True, keep_last=2)
    checkpoints.save(small_payload(step), run.step_checkpoint(1))
    checkpoints.finish()


def load_shards(folder: Path) -> list[dict[str, Any]]:
    """The tensors of that checkpoint, joined."""
    run = RunFolder(folder, "pretrain")
    _, found = run.find_checkpoint("auto")
    run.remove_incomplete()
    return [{key: joined(found[key]) for key in small_payload(0)}]


def joined(node: Any) -> Any:
    """Nested dicts with a list of shards at each tensor, as they were before the save."""
    if isinstance(node, dict):
        return {key: joined(value) for key, value in node.items()}
    return sharding.join_shards(node) if isinstance(node, list) else node


def replace_folder(folder: Path, step: int) -> None:
    """A folder of two files in place of the one that is there."""
    with atomic_folder(folder / "exported") as new:
        (new / "one.txt").write_text(str(step), encoding="utf-8")
        (new / "two.txt").write_text(str(step), encoding="utf-8")


def load_folder(folder: Path) -> list[dict[str, Any]]:
    """What is read from it; removes what was left half-written."""
    restore_folder(folder / "exported")
    remove_temporaries(folder, "exported")
    one, two = ((folder / "exported" / name).read_text("utf-8") for name in ("one.txt", "two.txt"))
    return [{"progress": {"step": int(one)}, "same": one == two}]


@contextlib.contextmanager
def counted(on_call: Callable[[], None]) -> Iterator[None]:
    """Call `on_call()` before and after each write, fsync, rename, unlink and rmtree."""

    def watched(function: Callable, flush: bool = False) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            on_call()
            result = function(*args, **kwargs)
            if flush:  # else a crash would take the buffer along, and fewer states were seen
                args[0].file.flush()
            on_call()
            return result

        return call

    with (
        mock.patch.object(SealingFile, "_pass_on", watched(SealingFile._pass_on, flush=True)),
        mock.patch.object(os, "fsync", watched(os.fsync)),
        mock.patch.object(os, "replace", watched(os.replace)),
        mock.patch.object(Path, "unlink", watched(Path.unlink)),
        mock.patch.object(shutil, "rmtree", watched(shutil.rmtree)),
    ):
        yield


def whole(step: int) -> str:
    """The digest of what `small_payload(step)` is on the disk."""
    return content_digest(small_payload(step) | {"format_version": FORMAT_VERSION})


CRASHES: dict[str, tuple[Callable, Callable, Callable[[dict[str, Any], int], bool]]] = {
    "a save": (save_and_prune, load_newest, lambda p, step: content_digest(p) == whole(step)),
    "a sharded save": (
        save_shards,
        load_shards,
        lambda p, step: content_digest(p) == content_digest(small_payload(step)),
    ),
    "replacing a folder": (replace_folder, load_folder, lambda found, step: found["same"]),
}


def crash(folder: str, kind: str, point: int) -> None:
    """Write step 3, and end the process without any clean-up at call `point`."""
    calls = Counter()

    def on_call() -> None:
        calls["n"] += 1
        if calls["n"] == point:
            os._exit(77)

    with counted(on_call):
        CRASHES[kind][0](Path(folder), 3)


def crash_points(folder: Path, every: int = 1, kinds: Sequence[str] = tuple(CRASHES)) -> Tally:
    """End a process at each point of a write: what is there is whole, the old or the new.

    Then the same is written again, as the next start does, and is the new.
    """
    tally = Tally()
    for kind in kinds:
        write, load, is_whole = CRASHES[kind]
        before, calls = folder / f"{kind}-before", Counter()
        before.mkdir(parents=True)
        for step in (1, 2):
            write(before, step)
        shutil.copytree(before, folder / f"{kind}-counting")
        with counted(lambda calls=calls: calls.update(n=1)):
            write(folder / f"{kind}-counting", 3)
        for point in range(1, calls["n"] + 1, every):
            place = folder / f"{kind}-{point}"
            shutil.copytree(before, place)
            process = start_process(crash, str(place), kind, point)
            process.join()
            assert process.exitcode == 77, process.exitcode
            try:
                with inside(place):
                    found = load(place)
                    left = [path.name for path in place.glob(".*.tmp")]
                    write(place, 3)
                    again = load(place)
                steps = {one["progress"]["step"] for one in found}
                sound = steps <= {2, 3} and {one["progress"]["step"] for one in again} == {3}
                sound &= all(is_whole(one, one["progress"]["step"]) for one in [*found, *again])
                story = f"{steps}, {left}, sound: {sound}"
            except (UsageError, OSError, KeyError) as error:
                sound, left, story = False, [], repr(error)
            tally.count(f"crash point of {kind}", sound and not left, f"point {point}: {story}")
            shutil.rmtree(place)
    return tally


# ---------------------------------------------------------------------------- faults of the disk


def _raise(number: int) -> Callable:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def _lose_the_end(real: Callable) -> Callable:
    def fsync(descriptor: int) -> None:
        if size := os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, max(0, size - 100))
        real(descriptor)

    return fsync


def _fill_up() -> Callable:
    real, room = SealingFile._pass_on, [200]

    def write(self: SealingFile, data: bytes) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    return write


FAULTS: dict[str, Callable[[], Any]] = {
    "disk full": lambda: mock.patch.object(SealingFile, "_pass_on", _fill_up()),
    "I/O error": lambda: mock.patch.object(os, "fsync", _raise(errno.EIO)),
    "permission denied": lambda: mock.patch.object(os, "replace", _raise(errno.EACCES)),
    "short write": lambda: mock.patch.object(os, "fsync", _lose_the_end(os.fsync)),
}


@contextlib.contextmanager
def failing(fault: str, names: str, times: int) -> Iterator[list[str]]:
    """Let the first `times` saves of the files that match `names` fail; yields what was written."""
    real, log = pt_file.atomic_write, []

    @contextlib.contextmanager
    def atomic_write(path: Path, **kwargs: Any) -> Iterator[BinaryIO]:
        if not path.match(names) or sum(line.startswith("failed") for line in log) >= times:
            with real(path, **kwargs) as file:
                yield file
            log.append(f"wrote {path.name}")
            return
        before = path.read_bytes() if path.exists() else None
        log.append(f"failed {path.name}")
        try:
            with FAULTS[fault](), real(path, **kwargs) as file:
                yield file
        finally:
            if (path.read_bytes() if path.exists() else None) != before:
                log.append(f"CHANGED {path.name}")

    with mock.patch.object(pt_file, "atomic_write", atomic_write):
        yield log


def faults(folder: Path) -> Tally:
    """Every fault in a checkpoint, a best model and the final save.

    The old file stays as it was, the run goes on and tries again; only a failing last save ends it
    with exit status 1, and then the same command with --resume auto ends the run.
    """
    tally = Tally()
    for fault in FAULTS:
        for names, times in (
            ("pretrain-step-3.pt", 1),
            ("best-model.pt", 3),
            ("final-model.pt", 9),
        ):
            place = folder / f"{fault}-{names}".replace(" ", "-").replace("/", "")
            write_text_file(place)
            words = "--max_steps 9 --eval_interval 4 --save_dir run --keep_last 0".split()
            with failing(fault, names, times) as log:
                status, text = run_here(place, *words)
            wrote = [line for line in log if line.startswith("wrote ")]
            fine = "warning: " in text and not any("CHANGED" in line for line in log)
            if names == "final-model.pt":
                lines = [line for line in text.splitlines() if "error:" in line]
                fine &= status == 1 and len(lines) == 1 and "--resume auto" in lines[0]
                status, text = run_here(place, *words, "--resume", "auto")
            elif names == "pretrain-step-3.pt":
                fine &= "wrote pretrain-step-4.pt" in wrote[:2]  # tried again at the next step
            fine &= status == 0 and (place / "run" / names.replace("3", "4")).exists()
            for path in (place / "run").glob("*.pt"):
                load_pt(path)
            tally.count(f"{fault} while saving", fine, f"{names}: exit {status}, {log}")
    return tally


# ---------------------------------------------------------------------------- damaged files


def detected(load: Callable[[], Any]) -> bool:
    """Whether loading says in one line that the file is damaged."""
    try:
        load()
    except (UsageError, BadCache) as error:
        return "\n" not in str(error)
    return False


def refusal(load: Callable[[Path], Any], path: Path) -> str:
    """The one line, in which it is named, with which a file is refused."""
    try:
        load(path)
    except UsageError as error:
        message = str(error)
        assert "\n" not in message and path.name in message and len(message) < 300, message
        return message
    raise AssertionError(f"{path} was not refused")


class Malicious:
    """What a pickle can do to who loads it."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def corruption(folder: Path, count: int, seed: int = 0) -> Tally:
    """`count` random flips and truncations, spread over all kinds of files: all detected."""
    tally, chance = Tally(), random.Random(seed)
    write_text_file(folder)
    status, text = run_here(folder, "--max_steps", "4", "--save_dir", "run")
    assert status == 0, text
    cache = next((folder / "cache").glob("*.tokens"))
    files: dict[str, tuple[Path, Callable[[Path], Any]]] = {
        "checkpoint": (folder / "run" / "pretrain-step-4.pt", load_checkpoint),
        "weights file": (folder / "run" / "final-model.pt", load_pretrained),
        "token cache": (cache, TokenCache),
    }
    train_vocabulary([folder / "text.jsonl"], folder / "own.model", vocab_size=320)
    files["vocabulary"] = (folder / "own.model", lambda path: Tokenizer(tokenizer_model=path))
    save_shards(folder / "shards", 1)
    state = folder / "shards" / "pretrain-step-1-sharded"
    (shard,) = state.glob("shard-*")
    files["shard"] = (shard, lambda _: load_checkpoint(state))
    for number in range(count):
        kind, (path, load) = list(files.items())[number % len(files)]
        damaged = shard if kind == "shard" else folder / "damaged.pt"
        whole = path.read_bytes()
        content = bytearray(whole)
        if number % 2:
            # At times among the last bytes, where the directory and the checksum stand.
            last = chance.choice((len(content), 400))
            content[len(content) - 1 - chance.randrange(last)] ^= 1 << chance.randrange(8)
            what = "flipped bit"
        else:
            content = content[: len(content) - chance.choice((1, chance.randrange(len(content))))]
            what = "truncation"
        damaged.write_bytes(content)
        found = detected(lambda load=load, damaged=damaged: load(damaged))
        path.write_bytes(whole)
        tally.count(f"{what}, {kind}", found, f"number {number}")
    return tally


# ---------------------------------------------------------------------------- signals


def signalled(function: Callable, number: int, nth: int = 1) -> Callable:
    """`function`, with a real signal to this process at the beginning of call `nth`."""
    calls = Counter()

    def call(*args: Any, **kwargs: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == nth:
            signal.raise_signal(number)
        return function(*args, **kwargs)

    return call


def signals(folder: Path) -> Tally:
    """Each of the signals in each phase: the exit status, the step that is saved, no traceback."""
    tally, numbers = Tally(), [getattr(signal, name) for name in HANDLED if hasattr(signal, name)]
    write_text_file(folder / "base")
    write_labelled(folder / "base")
    status, text = run_here(folder / "base", "--max_steps", "2", "--save_dir", "model")
    assert status == 0, text
    tuning = "--option finetune --train toy-train.txt --dev toy-train.txt --save_dir run"
    model = ["--pretrained_model_path", "model/final-model.pt"]
    pretraining = "--save_dir run --max_steps 40 --eval_interval 8".split()
    cases: list[tuple[str, list[str], Any, str, int, str | None]] = [
        ("tokenizing", pretraining, encoder.DocumentEncoder, "encode", 1, None),
        ("the first step", pretraining, loop, "optimizer_step", 1, "pretrain-step-1.pt"),
        ("validation", pretraining, tasks, "evaluate_tokens", 2, "pretrain-step-8.pt"),
        ("saving", pretraining, pt_file, "verify_seal", 1, "pretrain-step-3.pt"),
        ("finetuning", [*tuning.split(), *model], loop, "optimizer_step", 2,
         "finetune-toy-step-2.pt"),
        ("generation", ["--option", "generate", *model, "--max_new_tokens", "8"], run_llama.Writer,
         "continue_texts", 1, None),
    ]  # fmt: skip
    for phase, words, owner, name, nth, saved in cases:
        for number in numbers:
            place = folder / f"{phase}-{int(number)}".replace(" ", "-")
            shutil.copytree(folder / "base", place)
            if phase == "tokenizing":
                shutil.rmtree(place / "cache")
            changed = signalled(getattr(owner, name), number, nth)
            with not_under_nohup(), mock.patch.object(owner, name, changed):
                status, text = run_here(place, *words)
            fine = status == 128 + number and "Traceback" not in text
            if saved:
                fine &= load_checkpoint(place / "run" / saved)["progress"]["step"] > 0
                fine &= "--resume auto" in text
            else:
                fine &= not list(place.glob("run/*.pt")) and not list(place.glob("generated*"))
            name_of = signal.Signals(number).name
            tally.count(f"{name_of}", fine, f"{phase}: exit {status}, {text[-300:]}")
            shutil.rmtree(place)
    return tally


@contextlib.contextmanager
def not_under_nohup() -> Iterator[None]:
    """With SIGHUP as a terminal has it: one that is ignored from the start a run ignores, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def write_labelled(folder: Path) -> None:
    """Two labels that one word decides between."""
    words = ["awful", "excellent"]
    lines = [f"{i % 2} ||| The film is {words[i % 2]} ." for i in range(40)]
    (folder / "toy-train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------- small models


def tiny_model() -> Llama:
    """A Llama of a few hundred weights, without a vocabulary, the same everywhere."""
    config = LlamaConfig(vocab_size=16, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, max_seq_len=8)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 64)
    return model
