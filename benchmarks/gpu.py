"""Everything that a GPU changes, measured in some twenty minutes, for benchmarks/README.md.

    pip install transformers
    python benchmarks/gpu.py
    python benchmarks/gpu.py --nanogpt ../nanoGPT --only steps runs

`steps` is a training step beside other programs', `runs` whole pretrainings with what their plans
said, `loss` and `attention` the kernels, `optimizer` its update, `generate` decoding, `waits` how
often a step waits for the GPU, and `resume` whether a run interrupted under --deterministic ends
bit-equal. A part that fails says why, and the others go on. `--device cpu --small` tries all parts
out where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from compare import in_a_process, take_turns
from programs import GPU_SHAPES, SHAPES, our_config, our_model, run
from training import training_rows

Args = argparse.Namespace
LARGEST = [*GPU_SHAPES][-1]  # of which less is measured: it takes longer


def seconds_of(work: Callable[[], Any], device: str, *, repeats: int = 5) -> float:
    """Median seconds of a piece of work on the device, after two that warm it up."""
    import torch

    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def peak_memory(work: Callable[[], Any], device: str) -> float:
    """MB of device memory that the work takes at its peak; 0 on a CPU."""
    import torch

    if device != "cuda":
        work()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# ---------------------------------------------------------------------------- training


def steps(args: Args) -> Iterable[str]:
    """A step on random tokens, ours and others', each in a process of its own, in turn."""
    yield "| shape | program | tokens/s | MFU | peak MB | ours, compiled ours / it |"
    yield "|---|---|---:|---:|---:|---|"
    others = ["transformers", *(["nanoGPT"] if args.nanogpt else [])]
    for shape in args.shapes:
        common = {"task": "train", "shape": shape, "steps": 10, "device": args.device}
        both = {"as it comes": False, "compiled": True}
        ways = {"compiled": True} if shape == LARGEST else both
        jobs = {
            f"{who}, {way}": common | {"who": who, "compiled": compiled, "nanogpt": args.nanogpt}
            for who in ("ours", *others)
            for way, compiled in ways.items()
        }
        compile_side_by_side(jobs)
        yield from training_rows(shape, take_turns(jobs, 1))


def compile_side_by_side(jobs: dict[str, dict[str, Any]]) -> None:
    """Do the jobs that compile all at once: what the compiler makes is on disk for their turns."""
    compiled = [job | {"steps": 1} for job in jobs.values() if job["compiled"]]
    with ThreadPoolExecutor(len(compiled)) as pool:
        for done in [pool.submit(in_a_process, job) for job in compiled]:
            with contextlib.suppress(SystemExit):  # together they may not fit the memory
                done.result()


OFF = "--compile off"  # compiling each would take the most of the time
RUNS = (  # of the program itself: what is typed beside the shape
    "--compile",
    OFF,
    f"{OFF} --optimizer adamw",
    f"{OFF} --document_mask",
    f"{OFF} --deterministic",
    f"{OFF} --dtype float32",
)


def pretrain(args: Args, work: Path, *words: object) -> tuple[str, list[dict[str, Any]]]:
    """A pretraining on the stories; what it printed, and the records of its steps."""
    from minllama.runs.metrics import read_records

    gpu = ["--use_gpu"] if args.device == "cuda" else []
    out = run("run_llama.py", "--option", "pretrain", *gpu, "--save_dir", work / "run",
              "--cache_dir", work / "cache", "--sample_tokens", 0, "--checkpoint_interval", 0,
              *words)  # fmt: skip
    return out, list(read_records(work / "run" / "metrics.jsonl"))


def last_line(error: SystemExit) -> str:
    """What a program that failed said last."""
    return str(error).strip().splitlines()[-1]


def shape_words(name: str) -> list[object]:
    """The flags that give the program a shape and its batch; the vocabulary is the stories'."""
    shape = (SHAPES | GPU_SHAPES)[name]
    config = our_config(name)
    return ["--dim", config.dim, "--n_layers", config.n_layers, "--n_heads", config.n_heads,
            "--n_kv_heads", config.n_kv_heads, "--hidden_dim", config.hidden_dim, "--max_seq_len",
            shape.length, "--pretrain_batch_size", shape.batch,
            "--gradient_accumulation_steps", shape.accumulated]  # fmt: skip


def runs(args: Args) -> Iterable[str]:
    """Whole runs of the program: what its records say, beside what its plan said before."""
    yield "| shape | run | tokens/s | MFU | first step, s | peak GB | planned GB |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for shape in args.shapes:
        for words in RUNS[: 1 if shape == LARGEST else None]:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    count = args.steps // 3 if shape == LARGEST else args.steps
                    more = "--max_steps", count, *words.split()
                    out, records = pretrain(args, Path(folder), *shape_words(shape), *more)
                except SystemExit as error:
                    yield f"| {shape} | {words} | failed: {last_line(error)} | | | | |"
                    continue
            late = records[len(records) // 2 :]
            rate, mfu = (
                statistics.median(record[key] for record in late)
                for key in ("tokens_per_second", "mfu")
            )
            tokens = records[0]["tokens"]
            first = tokens / records[0]["tokens_per_second"]
            peak = max(record["memory"] or 0 for record in records) / 1e9
            planned = re.search(r"^memory +([\d.]+ \w+)", out, re.MULTILINE)[1]
            yield (
                f"| {shape} | {words} | {rate:,.0f} | {mfu:.0%} | {first:.1f} | {peak:.1f} | "
                f"{planned} |"
            )


def waits(args: Args) -> Iterable[str]:
    """How often the host waits for the GPU in a step of the program: once is meant."""
    if args.device != "cuda":
        yield "a CPU is not waited for"
        return
    import torch

    import run_llama
    from config import parse_options
    from minllama.training import loop

    counts, real = [], loop.optimizer_step

    def counted(run: Any, batches: Any) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            record = real(run, batches)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(w.message) for w in caught))
        return record

    nowhere = io.StringIO()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(mock.patch.object(loop, "optimizer_step", counted))
        words = ["--option", "pretrain", "--use_gpu", *OFF.split(), "--max_steps", 8,
                 "--save_dir", folder, "--cache_dir", folder, *shape_words("T")]  # fmt: skip
        run_llama.main(parse_options([str(word) for word in words]))
    yield f"\nwaits in steps 1 to 8: {counts}"


def resume(args: Args) -> Iterable[str]:
    """The weights of a run that was stopped and resumed, against those of one that was not."""
    import torch

    from minllama.formats.pt_file import load_pt

    weights = []
    words = [*shape_words("T"), *OFF.split(), "--deterministic", "--epochs", 1]
    with tempfile.TemporaryDirectory() as folder:
        for stops in ([], [7]):
            work = Path(folder) / f"{len(stops)}"
            for stop in (*stops, 15):
                again = ["--resume"] if stops and stop == 15 else []
                pretrain(args, work, *words, "--max_steps", stop, *again)
            weights.append(load_pt(work / "run" / "final-model.pt")["model"])
    equal = all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    yield f"interrupted after 7 of 15 steps and resumed: {'bit-equal' if equal else 'NOT EQUAL'}"


# ---------------------------------------------------------------------------- its parts


def both_passes(way: Callable, *inputs: Any) -> None:
    """Forward and backward of a function in bfloat16 autocast, with fresh gradients."""
    import torch

    for tensor in inputs:
        tensor.grad = None
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        value = way(*inputs)
    value.backward()


def loss(args: Args) -> Iterable[str]:
    """The head's loss, forward and backward: ours, torch's in chunks, and plain logits."""
    import torch
    import torch.nn.functional as F

    from minllama.model.kernels import linear_cross_entropy, sums_in_float32

    found = sums_in_float32(torch.device(args.device), torch.bfloat16)
    yield f"sums of bfloat16 products in float32: {found}\n"
    yield "| rows, dim, vocabulary | loss | ms | peak MB | ours / it |"
    yield "|---|---|---:|---:|---:|"
    ways: dict[str, Callable] = {"ours": lambda h, w, t: linear_cross_entropy(h, w, t)[0]}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        ways["torch, in chunks"] = lambda h, w, t: F.linear_cross_entropy(
            h.bfloat16(), w.bfloat16(), t, reduction="sum", options=options
        )
    ways["plain logits"] = lambda h, w, t: F.cross_entropy((h @ w.t()).float(), t, reduction="sum")
    sizes = [(512, 64, 1000)] if args.small else [(32768, 768, 32000), (8192, 2048, 128000)]
    for rows, dim, vocabulary in sizes:
        hidden = torch.randn(rows, dim, device=args.device, requires_grad=True)
        weight = torch.randn(vocabulary, dim, device=args.device).mul_(0.02).requires_grad_()
        targets = torch.randint(vocabulary, (rows,), device=args.device)
        taken: dict[str, float] = {}
        for name, way in ways.items():
            work = functools.partial(both_passes, way, hidden, weight, targets)
            taken[name] = seconds_of(work, args.device)
            memory = peak_memory(work, args.device)
            yield (
                f"| {rows:,}, {dim:,}, {vocabulary:,} | {name} | {1e3 * taken[name]:.2f} | "
                f"{memory:,.0f} | {taken['ours'] / taken[name]:.2f} |"
            )


def attention(args: Args) -> Iterable[str]:
    """Forward and backward, and the kernels that did it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from minllama.model.kernels import attend, document_masks, document_starts

    yield "| attention | ms | kernels |"
    yield "|---|---:|---|"
    batch, heads, length, width = (1, 4, 64, 16) if args.small else (8, 16, 2048, 64)
    tokens = torch.randint(300, (batch, length), device=args.device)
    activity = ProfilerActivity.CUDA if args.device == "cuda" else ProfilerActivity.CPU
    for dtype in (torch.bfloat16, torch.float32):
        apart = document_masks(document_starts(tokens, 1), dtype)
        for kv_heads in (heads, heads // 4):
            for name, masks in (("causal", None), ("documents apart", apart)):
                inputs = [
                    torch.randn(batch, count, length, width, dtype=dtype, device=args.device)
                    for count in (heads, kv_heads, kv_heads)
                ]
                way = functools.partial(summed, attend, masks)
                work = functools.partial(both_passes, way, *(x.requires_grad_() for x in inputs))
                taken = seconds_of(work, args.device)
                with profile(activities=[activity], acc_events=True) as found:
                    work()
                names = sorted({event.key[:60] for event in found.key_averages()})
                kernels = [n for n in names if re.search("flash|fmha|attention|softmax", n, re.I)]
                yield (
                    f"| {str(dtype)[6:]}, {heads} heads ({kv_heads} key/value), {name} | "
                    f"{1e3 * taken:.2f} | {'; '.join(kernels[:3])} |"
                )


def summed(attend: Callable, masks: Any, *inputs: Any) -> Any:
    """The sum of an attention's output: something to go backward from."""
    return attend(*inputs, masks).sum()


def optimizer(args: Args) -> Iterable[str]:
    """An update of all weights: milliseconds, and gigabytes a second at 28 bytes a parameter."""
    import torch

    from optimizer import make_optimizer

    yield "| shape | optimizer | ms | GB/s at 28 bytes a parameter |"
    yield "|---|---|---:|---:|"
    model = our_model(args.shapes[0]).to(args.device)
    count = sum(p.numel() for p in model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    made = {
        name: make_optimizer(model, name=name, lr=1e-4, weight_decay=0.1, dtype=torch.bfloat16)
        for name in ("adamw", "muon")
    }
    fused = args.device == "cuda" or None
    made["torch's AdamW, fused"] = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    for name, of_name in made.items():
        taken = seconds_of(of_name.step, args.device)
        yield f"| {args.shapes[0]} | {name} | {1e3 * taken:.2f} | {28e-9 * count / taken:,.0f} |"


def generate(args: Args) -> Iterable[str]:
    """Decoding 100 tokens after a prompt of 8, greedily."""
    import torch

    from minllama.model.generation import compile_step
    from minllama.model.packing import pack_weights
    from minllama.system.errors import UsageError

    yield "| shape | rows | weights | tokens/s | compiled, tokens/s |"
    yield "|---|---:|---|---:|---:|"
    shape, count = args.shapes[0], 10 if args.small else 100
    for weights in ("float32", "bfloat16", "int8"):
        model = our_model(shape).to(args.device).eval()
        try:
            pack_weights(model, getattr(torch, weights))
        except UsageError as error:
            yield f"| {shape} | | {weights} | refused: {error} | |"
            continue
        for rows in (1, 16):
            rates = [
                rows * count / seconds_of(decode, args.device, repeats=2)
                for step in (None, compile_step(args.device))
                for decode in [functools.partial(continue_prompts, model, rows, count, step)]
            ]
            yield f"| {shape} | {rows} | {weights} | {rates[0]:,.0f} | {rates[1]:,.0f} |"


def continue_prompts(model: Any, rows: int, count: int, step: Any) -> None:
    """Continue so many prompts of 8 tokens by `count`, greedily."""
    from minllama.model.generation import Sampling, generate_tokens

    prompts, sampling = [[*range(10, 18)]] * rows, Sampling(temperature=0)
    for _ in generate_tokens(model, prompts, max_new_tokens=count, sampling=sampling, step=step):
        pass


PARTS = {
    part.__name__: part
    for part in (steps, runs, loss, attention, optimizer, generate, waits, resume)
}


def main() -> None:
    """Print the parts asked for, a section each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--shapes", nargs="+", choices=GPU_SHAPES, default=[*GPU_SHAPES])
    parser.add_argument("--steps", type=int, default=30, help="of a run")
    parser.add_argument("--nanogpt", help="a checkout, to measure it too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes that a CPU can do")
    args = parser.parse_args()
    import torch

    from minllama.machine.gpus import measured_flops

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: torch finds no CUDA GPU here; --device cpu --small tries the script out")
    if args.small:
        args.shapes, args.steps = ["T"], min(args.steps, 4)
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
        print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
        for dtype in (torch.bfloat16, torch.float32):
            rate = measured_flops(torch.device("cuda"), dtype, width=8192)
            print(f"products of 8,192 x 8,192 in {str(dtype)[6:]}: {rate / 1e12:,.0f} TFLOP/s")
    for name in args.only:
        part, started = PARTS[name], time.monotonic()
        print(f"\n{name}: {part.__doc__.splitlines()[0]}\n", flush=True)
        try:
            with contextlib.closing(iter(part(args))) as lines:
                for line in lines:
                    print(line, flush=True)
        except (Exception, SystemExit) as error:  # the others are still worth their minutes
            print(f"failed: {type(error).__name__}: {str(error).strip()[-500:]}")
        print(f"\n({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
