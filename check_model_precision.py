"""What is in a model file: precision, size by part, tied or not; verified, compared, converted.

    python check_model_precision.py                        # stories42M.pt, or the newest model
    python check_model_precision.py a.pt model.bin folder
    python check_model_precision.py a.pt --verify
    python check_model_precision.py a.pt --compare b.pt
    python check_model_precision.py a.pt --text story.txt
    python check_model_precision.py a.pt --convert hf --output folder
    python check_model_precision.py --compare-runs run1 run2 --csv both.csv --output both.html

Reads every format that llama.load_pretrained reads and writes them too. Knows files only: it
trains nothing, generates nothing and downloads nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from config import DTYPE_BYTES, add_reading_flags
from minllama.cli.command_line import exit_status, parse_or_exit, protect_output, read_path
from minllama.cli.suggestions import WholeLineParser
from minllama.system.errors import UsageError

PROGRAM = "check_model_precision.py"
FORMATS = ("pt", *(f"pt-{name}" for name in DTYPE_BYTES), "bin", "bin-int8", "gguf", "hf")
DTYPES = (*DTYPE_BYTES, "q8_0")  # the last: llama.cpp's int8, of GGUF files alone

# ---------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line. Raises UsageError."""
    parser = WholeLineParser(
        prog=PROGRAM,
        description="What is in a model file; verify, compare and convert it. And runs compared.",
        epilog="Every option is accepted with _ and with -. Exit status: 0, 1 when --verify finds "
        "damage, 2 on bad input.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "files",
        nargs="*",
        type=read_path,
        metavar="FILE",
        help="model files or Hugging Face folders",
    )
    add("--verify", action="store_true", help="read every byte; count NaN and Inf per tensor")
    add(
        "--compare",
        type=read_path,
        metavar="OTHER",
        help="largest difference per tensor and of logits",
    )
    add("--text", nargs="+", metavar="TEXT", help="text files: bits per byte, perplexity of them")
    add_reading_flags(parser.add_argument_group("how --text is read, as a pretraining reads it"))
    add("--json", action="store_true", help="machine-readable output, and nothing else on stdout")
    add("--convert", choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    add(
        "--compare_runs",
        nargs="+",
        type=read_path,
        metavar="RUN",
        help="runs' folders as a table: figures, and flags that differ; --output: as one page, too",
    )
    add("--csv", type=read_path, metavar="FILE", help="write the table of --compare_runs as CSV")
    add("--output", type=read_path, metavar="PATH", help="where --convert or --compare_runs writes")
    add("--save_dtype", choices=DTYPES, help="precision of pt, gguf and hf (default: float32)")
    add(
        "--tokenizer_model",
        type=read_path,
        metavar="PATH",
        help="vocabulary for a file without one",
    )
    add("--overwrite", action="store_true", help="let --output replace what is there")
    words = list(arguments)
    for i, word in enumerate(words):  # the formats, too, in both spellings
        if i and words[i - 1] == "--convert" or word.startswith("--convert="):
            words[i] = word.replace("_", "-")
    args = parser.parse_args(words)
    if len(args.files) > 1 and (args.convert or args.compare):
        raise UsageError("--convert and --compare take one FILE; several were given")
    if args.compare_runs and (args.files or args.convert or args.compare or args.verify):
        raise UsageError("--compare_runs takes runs, and no model file to look at: leave those out")
    if args.compare_runs and len(args.compare_runs) < 2:
        raise UsageError(f"--compare_runs {args.compare_runs[0]}: give two runs or more")
    if args.csv and not args.compare_runs:
        raise UsageError("--csv is for --compare_runs, whose table it writes")
    if not args.compare_runs and bool(args.convert) != bool(args.output):
        raise UsageError("--convert FORMAT and --output PATH need each other: give both")
    if args.output and not args.output.name:  # "." or "/", which cannot be replaced
        raise UsageError(f"--output {args.output}: name a file or folder to write, such as hf")
    if args.convert and args.compare:
        raise UsageError("--convert and --compare exclude each other: give one")
    if args.convert and args.convert.startswith("pt-"):
        args.convert, named = args.convert.split("-")
        if args.save_dtype not in (None, named):
            raise UsageError(f"--save_dtype {args.save_dtype}: --convert pt-{named} says otherwise")
        args.save_dtype = named
    if args.save_dtype and args.convert not in ("pt", "gguf", "hf"):
        raise UsageError("--save_dtype is for --convert pt, gguf and hf")
    if args.save_dtype == "q8_0" and args.convert != "gguf":
        raise UsageError("--save_dtype q8_0 is for --convert gguf")
    args.save_dtype = args.save_dtype or "float32"
    return args


if __name__ == "__main__":  # --help and bad flags are answered before torch, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback till then
    parse_or_exit(parse, PROGRAM, sys.argv[1:])

import contextlib
import json
import math
import re
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from config import SHIPPED_MODEL
from llama import load_pretrained
from minllama.cli.console import human_size, say
from minllama.formats import gguf, hugging_face, llama2c, pt_model
from minllama.formats.export import export
from minllama.formats.find_model import model_in, own_or_given_vocabulary
from minllama.formats.model_file import format_named, read_contents, read_model
from minllama.formats.pt_file import tensors_in
from minllama.formats.stored_model import REAL_DTYPES, Contents, same_bits
from minllama.formats.vocabulary_fit import check_fit
from minllama.inference.evaluation import score_text
from minllama.machine.ranks import check_runs_alone
from minllama.runs.comparison import as_csv, page_of, read_run, sorted_runs, table, warnings
from minllama.runs.run_folder import RunFolder
from minllama.system.encodings import check_encoding
from minllama.system.files import (
    real_path,
    remove_temporaries,
    restore_folder,
    size_on_disk,
    write_text,
)
from minllama.system.packages import import_optional
from minllama.text.documents import sample_texts
from minllama.text.find_files import find_text_files
from minllama.text.reading import Reading
from minllama.vocabulary.lost import count_lost
from tokenizer import Tokenizer, tokenizer_bin, vocabulary_remedy

# ---------------------------------------------------------------------------- what is in a file


@dataclass
class Report:
    """The facts of one model file; sizes in bytes, `nan` and `inf` filled in by --verify."""

    path: str
    format: str
    size: int
    parts: dict[str, int]  # weights, optimizer, other: together the size
    tensors: list[dict[str, Any]]  # name, dtype, shape
    dtypes: dict[str, int]  # tensors by dtype
    parameters: int  # a tied table counted once
    embedding: str
    vocabulary: str | None = None  # fingerprint
    nan: dict[str, int] = field(default_factory=dict)
    inf: dict[str, int] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """False once --verify has found anything."""
        return not (self.nan or self.inf or self.damage)


def default_file() -> Path:
    """stories42M.pt, else the newest model in ./checkpoints, else the shipped one."""
    if Path("stories42M.pt").is_file():
        return Path("stories42M.pt")
    saved = [path for path in Path("checkpoints").glob("*.pt") if path.is_file()]
    return max(saved, key=lambda path: path.stat().st_mtime, default=SHIPPED_MODEL)


def stored_bytes(node: Any) -> int:
    """Bytes of the storages under the tensors in nested dicts and lists, each counted once."""
    storages = [tensor.untyped_storage() for _, tensor in tensors_in(node)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def inspect(path: Path, *, verify: bool = False) -> Report:
    """Read the facts of a model file; with verify every byte of it."""
    contents = read_contents(path)
    weights, fingerprint = contents.values["model"], contents.values.get("vocabulary_fingerprint")
    optimizer = stored_bytes({key: contents.values.get(key) for key in ("optimizer", "scaler")})
    held = contents.packed_bytes or stored_bytes(weights)
    size = size_on_disk(path)
    if size < held:  # the index or a part of what was read, which is the folder
        size = size_on_disk(path.parent)
    tensors = [
        {
            "name": name,
            "dtype": contents.dtypes.get(name, str(tensor.dtype).removeprefix("torch.")),
            "shape": list(tensor.shape),
        }
        for name, tensor in weights.items()
    ]
    unique = {(t.data_ptr(), t.shape): t.numel() for t in weights.values()}
    report = Report(
        path=str(path),
        format=contents.format,
        size=size,
        parts={"weights": held, "optimizer": optimizer, "other": size - held - optimizer},
        tensors=tensors,
        dtypes=dict(Counter(tensor["dtype"] for tensor in tensors)),
        parameters=sum(unique.values()),
        embedding=describe_embedding(weights),
        vocabulary=fingerprint if isinstance(fingerprint, str) else None,
    )
    if verify:
        verify_file(path, report, contents)
    return report


def describe_embedding(weights: dict[str, Tensor]) -> str:
    """Whether embedding and head are one table, and whether that is stored once."""
    names = {pt_model.own_name(name): tensor for name, tensor in weights.items()}
    tables = ("tok_embeddings.weight", "embed_tokens.weight", "token_embd.weight")
    tables += ("transformer.wte.weight",)  # litgpt's
    table = next((names[name] for name in tables if name in names), None)
    head = names.get("output.weight", names.get("lm_head.weight"))
    if table is None:
        return "none found"
    if head is None:
        return "tied: one tensor under one name"
    if table.data_ptr() == head.data_ptr():
        return "tied: one tensor under two names"
    return "tied, but stored twice" if same_bits(table, head) else "not tied"


def verify_file(path: Path, report: Report, contents: Contents) -> None:
    """Read every byte: checksums where the format has them, each number, and the model's shape."""
    for name, tensor in tensors_in(contents.values):
        if tensor.dtype in REAL_DTYPES:
            for counts, bad in ((report.nan, tensor.isnan()), (report.inf, tensor.isinf())):
                if bad.any():
                    counts[name.removeprefix("model.")] = int(bad.sum())
    try:
        if contents.adapters:  # part of a checkpoint, not of the model that it began with
            pt_model.read(path, without_adapters=True)
        else:
            read_model(path)
    except UsageError as error:
        report.damage.append(str(error))


def print_report(report: Report, *, verified: bool) -> None:
    print(f"{report.path}: {report.format}")
    for tensor in report.tensors[:5]:
        print(f"  {tensor['name']:<44} {tensor['dtype']:<9} {tuple(tensor['shape'])}")
    if len(report.tensors) > 5:
        print(f"  and {len(report.tensors) - 5} more tensors")
    by_dtype = ", ".join(f"{count} {dtype}" for dtype, count in report.dtypes.items())
    parts = ", ".join(f"{name} {human_size(size)}" for name, size in report.parts.items())
    print(f"  tensors by dtype: {by_dtype}")
    print(f"  parameters: {report.parameters:,}")
    print(f"  size on disk: {human_size(report.size)} ({report.size:,} bytes): {parts}")
    print(f"  embedding and output: {report.embedding}")
    if report.vocabulary:
        print(f"  vocabulary: {report.vocabulary}")
    if not verified:
        return
    for kind, counts in (("NaN", report.nan), ("Inf", report.inf)):
        for name, count in counts.items():
            print(f"  BAD {name}: {count:,} {kind}")
    for text in report.damage:
        print(f"  BAD {text}")
    if report.sound:
        print("  verified: every byte read, no NaN, no Inf, tensors as the shape asks")
        if not zipfile.is_zipfile(report.path):  # that is what .pt files are
            print("  this format has no checksum: a weight that became another one is not seen")


# ---------------------------------------------------------------------------- comparing two


@torch.inference_mode()
def compare(path: Path, other: Path) -> dict[str, Any]:
    """Largest absolute difference of each tensor, and of the logits on a fixed batch."""
    one, two = load_pretrained(path), load_pretrained(other)
    ours, theirs = one.state_dict(), two.state_dict()
    differences = {
        name: None  # other shapes have no difference
        if name not in theirs or theirs[name].shape != tensor.shape
        else plain_number((tensor - theirs[name]).abs().max().item())
        for name, tensor in ours.items()
    }
    differences |= {name: None for name in theirs if name not in ours}
    logits = None
    if None not in differences.values():
        width = min(64, one.config.max_seq_len, two.config.max_seq_len)
        generator = torch.Generator().manual_seed(0)
        batch = torch.randint(one.config.vocab_size, (2, width), generator=generator)
        logits = plain_number((one(batch, batch)[0] - two(batch, batch)[0]).abs().max().item())
    return {"other": str(other), "tensors": differences, "logits": logits}


def plain_number(value: float) -> float | str:
    """A number that JSON has: NaN and infinity by name."""
    return value if math.isfinite(value) else str(value)


def print_comparison(path: Path, result: dict[str, Any]) -> None:
    print(f"{path} and {result['other']}: largest difference")
    for name, difference in (*result["tensors"].items(), ("logits", result["logits"])):
        text = f"{difference:.3g}" if isinstance(difference, float) else difference
        print(f"  {name:<44} {text or 'other shape'}")


# ---------------------------------------------------------------------------- converting


def convert(path: Path, args: argparse.Namespace) -> list[Path]:
    """Write the model in another format; returns what was written. Raises UsageError."""
    model = load_pretrained(path)
    tokenizer = own_or_given_vocabulary(model, path, args.tokenizer_model)
    if tokenizer is not None:
        model.vocabulary = tokenizer.model_bytes
        beside = format_named(args.convert).BESIDE
        file = beside and args.output.with_name(beside)
        if beside == gguf.BESIDE:
            file = gguf.recipe_beside(args.output)
        if file and not holds_vocabulary(file, tokenizer):
            check_output(path, args.convert, file, args.overwrite)
    stored = read_contents(path).values
    extra = {key: stored[key] for key in pt_model.CLASSIFIER_KEYS if key in stored}
    options = {"dtype": args.save_dtype, "tokenizer": tokenizer, "extra": extra}
    options["classifier"] = None if args.convert == "pt" else pt_model.read_classifier(path)
    written = export(model, args.convert, args.output, **options)
    if tokenizer is None:
        print(
            f"{PROGRAM}: warning: {path} has no vocabulary, so {args.output} has none either: "
            f"{vocabulary_remedy(model.config.vocab_size)}",
            file=sys.stderr,
        )
    return written


def holds_vocabulary(path: Path, tokenizer: Tokenizer) -> bool:
    """Whether this is the tokenizer.bin that would be written: then nothing is lost by it."""
    if path.name != llama2c.BESIDE or not path.is_file():
        return False
    data = tokenizer_bin(tokenizer)
    return path.stat().st_size == len(data) and path.read_bytes() == data


def check_output(path: Path, target: str, output: Path, overwrite: bool) -> None:
    """Raise UsageError where `output` is not to be written; needs no look into any model."""
    in_folder = path.name in (hugging_face.WEIGHTS, hugging_face.INDEX)
    if real_path(output) in (real_path(path), *([real_path(path.parent)] if in_folder else [])):
        raise UsageError(f"--output {output}: is the file to convert; give another name")
    check_new(output, overwrite)
    if output.exists() and output.is_dir() != (target == "hf"):
        raise UsageError(f"--output {output}: a folder and a file cannot replace each other")
    there = output.iterdir() if output.is_dir() else ()
    others = {path.name for path in there} - hugging_face.FILES
    if others:
        raise UsageError(
            f"--output {output}: holds {min(others)}, which is no part of a model; name another"
        )


def check_new(output: Path, overwrite: bool, flag: str = "--output") -> None:
    """Raise UsageError where `output` is there and is not to be replaced."""
    if output.exists() and not overwrite:
        raise UsageError(f"{flag} {output}: is there already; --overwrite replaces it")


# ---------------------------------------------------------------------------- scoring a text


def score(
    path: Path, texts: list[Path], reading: Reading, args: argparse.Namespace
) -> dict[str, Any]:
    """Print what the model makes of the texts, as bits per byte and more; returns the same."""
    model = load_pretrained(path)
    tokenizer = own_or_given_vocabulary(model, path, args.tokenizer_model)
    if tokenizer is None:
        remedy = vocabulary_remedy(model.config.vocab_size)
        raise UsageError(f"--text: {path} has no vocabulary: {remedy}")
    sample, what = [*sample_texts(texts, reading)], f"--text {' '.join(args.text)}"
    check_fit(tokenizer, sample, what=what, remedy="FILE", is_default=not args.files)
    result = score_text(model, tokenizer, texts, reading)
    lost = count_lost(tokenizer.vocabulary, sample)
    if not args.json:
        say(f"{path} on {', '.join(args.text)}: {result.line()}", *lost.lines())
    figures = asdict(result) | {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
    figures = {name: plain_number(value) for name, value in figures.items()}
    return figures | {"bits_per_byte_compare": not lost.spoils_bits_per_byte}


# ---------------------------------------------------------------------------- a run's folder


def is_run_folder(path: Path) -> bool:
    """Whether a folder is a run's, and not a model of Hugging Face's."""
    return path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.pt"))


def print_runs(folder: Path) -> None:
    """Print the command that repeats each run in the folder."""
    for record in sorted(folder.glob("*run.json")):
        prefix = record.name.removesuffix("run.json").removesuffix("-") or "pretrain"
        if again := RunFolder(folder, prefix).repeating_command():
            print(f"{record}: to repeat the run in another folder\n  {again}")


# ---------------------------------------------------------------------------- several runs


def compare_runs(args: argparse.Namespace) -> int:
    """Print a table of runs, and write it and their page where that is asked for."""
    for flag, path in (("--output", args.output), ("--csv", args.csv)):
        if path and path.is_dir():
            raise UsageError(f"{flag} {path}: is a folder; name a file")
        if path:
            check_new(path, args.overwrite, flag)
    runs = sorted_runs([read_run(path) for path in args.compare_runs])
    print("\n".join(table(runs)))
    say(*(f"note: {line}" for line in warnings(runs)))
    if args.csv:
        write_text(args.csv, as_csv(runs))
        print(f"wrote {args.csv}")
    if args.output:
        write_text(args.output, page_of(runs))
        print(f"wrote {args.output}: open it in a browser")
    return 0


# ---------------------------------------------------------------------------- entry


def notes_apart(as_json: bool) -> contextlib.AbstractContextManager:
    """What is said of the texts within the block goes to stderr where stdout has JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    if args.compare_runs:
        return compare_runs(args)
    folders = [path for path in args.files if is_run_folder(path)]
    files = [model_in(path, "FILE") if path in folders else path for path in args.files]
    files = files or [default_file()]
    if not args.files and not args.json:
        print(f"no file named: looking at {files[0]}")
    if args.compare and not args.compare.exists():
        raise UsageError(f"--compare {args.compare}: no such file")
    if args.convert:
        restore_folder(args.output)
        remove_temporaries(args.output.parent, re.escape(args.output.name), older_than=86400)
        beside = format_named(args.convert).BESIDE
        if beside and args.output.name.lower() == beside.lower():  # one file to Windows and macOS
            raise UsageError(
                f"--output {args.output}: is the name of a file beside the model; give another"
            )
        check_output(files[0], args.convert, args.output, args.overwrite)
        if package := format_named(args.convert).PACKAGE:
            import_optional(package, f"--convert {args.convert}")
    check_encoding(args.encoding)
    reading = Reading.from_flags(args)
    with notes_apart(args.json):
        texts = find_text_files(args.text, flag="--text") if args.text else []
    reports = [inspect(path, verify=args.verify) for path in files]
    results: list[dict[str, Any]] = [asdict(report) for report in reports]
    sound = all(report.sound for report in reports)
    # Before anything is printed, so that an error stands alone.
    written = convert(files[0], args) if args.convert and sound else []
    for report in reports if not args.json else ():
        print_report(report, verified=args.verify)
    for folder in folders if not args.json else ():
        print_runs(folder)
    if args.compare:
        results[0]["compared"] = compare(files[0], args.compare)
        if not args.json:
            print_comparison(files[0], results[0]["compared"])
    for result, path in zip(results, files, strict=True) if texts else ():
        with notes_apart(args.json):
            result["text"] = score(path, texts, reading, args)
    if args.convert and not sound:
        print(f"{PROGRAM}: damaged, so nothing was converted", file=sys.stderr)
    elif args.convert:
        results[0]["written"] = [{"path": str(p), "size": size_on_disk(p)} for p in written]
        for path in written if not args.json else ():
            print(f"wrote {path}: {human_size(size_on_disk(path))}, read back and equal")
    if args.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    return 0 if sound else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 when damage was found, 2 after one line about bad input."""

    def work() -> int:
        check_runs_alone(PROGRAM)
        return run(parse(sys.argv[1:] if arguments is None else arguments))

    return exit_status(PROGRAM, work)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    protect_output()
    sys.exit(main())
