"""Decoding, ours and other programs': what compare.py measures of it.

A group of rows shares a task (one text greedily, one text sampled, 16 texts at once); a row is a
program that does it. llama2.c's programs get our weights, converted by check_model_precision.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from programs import SHAPES, hugging_face_model, our_model

NEW_TOKENS = 100  # of a decoding run
PROMPT = list(range(10, 18))
C_PROGRAMS = {"run.c": "bin", "runq.c": "bin-int8"}  # and the format of model that each reads

Row = dict[str, Any]  # what a process of its own is told to measure


def decoding_groups(shape: str, *, llama2c: str, folder: str) -> dict[str, dict[str, Row]]:
    """The rows of each group by name.

    llama2.c's programs are among them where a checkout of it is named; prepare_c_programs has put
    them into the folder.
    """
    job = {"task": "decode", "shape": shape, "folder": folder}
    ours = {
        f"ours{', compiled' * compiled}, {weights}": job
        | {"who": "ours", "weights": weights, "compiled": compiled}
        for compiled in (False, True)
        for weights in ("float32", "bfloat16", "int8")
    }
    hugging_face = {"transformers": job | {"who": "transformers"}}
    c_programs = {name: job | {"who": name} for name in C_PROGRAMS if llama2c}

    def each(group: dict[str, Row], **settings: Any) -> dict[str, Row]:
        return {name: row | settings for name, row in group.items()}

    fewer = {name: row for name, row in ours.items() if row["weights"] != "bfloat16"}
    return {
        "greedy": hugging_face | c_programs | ours,
        "top-p 0.9": each(c_programs | fewer, top_p=0.9),
        "16 rows": each(hugging_face | ours, rows=16),
    }


def is_ours(row: str) -> bool:
    """Whether a row of this name is a figure of this program."""
    return row.startswith("ours")


def measure_decoding(job: Row) -> dict[str, float]:
    """Tokens per second, reading the prompt of 8 tokens included, and seconds of compiling."""
    if job["who"] in C_PROGRAMS:
        return {"rate": c_program_tokens_per_second(job), "compiling": 0.0}
    decode = our_decoding(job) if job["who"] == "ours" else hugging_face_decoding(job)
    begun = time.perf_counter()
    decode(8)
    compiled = time.perf_counter()
    decode(NEW_TOKENS)
    rate = job.get("rows", 1) * NEW_TOKENS / (time.perf_counter() - compiled)
    return {"rate": rate, "compiling": compiled - begun if job.get("compiled") else 0.0}


def our_decoding(job: Row) -> Callable[[int], None]:
    """A function that generates `count` tokens with our model."""
    import torch

    from minllama.model.generation import Sampling, compile_step, generate_tokens
    from minllama.model.packing import pack_weights

    model = our_model(job["shape"]).eval()
    rows, compiled = job.get("rows", 1), job["compiled"]
    pack_weights(model, getattr(torch, job["weights"]), rows=rows, compiled=compiled)
    step = compile_step() if compiled else None
    sampling = Sampling(temperature=0)
    if "top_p" in job:
        sampling = Sampling(temperature=1, top_p=job["top_p"])
    prompts = [PROMPT] * rows

    def decode(count: int) -> None:
        steps = generate_tokens(
            model,
            prompts,
            max_new_tokens=count,
            sampling=sampling,
            seeds=range(len(prompts)),
            step=step,
        )
        assert len(list(steps)) == count

    return decode


def hugging_face_decoding(job: Row) -> Callable[[int], None]:
    """The same with transformers' model."""
    import torch

    model = hugging_face_model(job["shape"]).eval()
    ids = torch.tensor([PROMPT] * job.get("rows", 1))

    def decode(count: int) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    return decode


def c_program_tokens_per_second(job: Row) -> float:
    """What a program of llama2.c says of itself; its clock starts after the first token."""
    folder = Path(job["folder"])
    program = folder / job["who"].removesuffix(".c")
    sampling = ["-t", "1", "-p", str(job["top_p"])] if "top_p" in job else ["-t", "0"]
    words = [program, folder / f"{job['shape']}.{C_PROGRAMS[job['who']]}", "-n", "101", "-s", "7"]
    done = subprocess.run(
        [*map(str, words), *sampling, "-z", str(folder / f"{job['shape']}.vocabulary")],
        capture_output=True,
        check=True,
    )
    rate = re.search(rb"achieved tok/s: ([\d.]+)", done.stderr)
    if rate is None:  # it wrote BOS at once, which ends it
        sys.exit(f"{program.name} wrote no token of {job['shape']}: {done.stderr.decode()}")
    return float(rate[1])


def prepare_c_programs(checkout: Path, folder: Path, shapes: list[str]) -> None:
    """Compile llama2.c's programs into the folder, and put our models and vocabularies there."""
    import torch

    import check_model_precision
    from llama import model_payload
    from minllama.formats.pt_file import save_pt

    for name in C_PROGRAMS:
        flags = ["-Ofast", "-march=native", "-fopenmp", "-o", folder / name.removesuffix(".c")]
        subprocess.run(["gcc", *flags, checkout / name, "-lm"], check=True)
    for shape in shapes:
        model = our_model(shape)
        with torch.no_grad():  # BOS ends the programs: the random model must not find it likely
            for table in (model.tok_embeddings, model.output):
                table.weight[1] = 0.0
        save_pt(folder / f"{shape}.pt", model_payload(model))
        for target in C_PROGRAMS.values():
            words = [folder / f"{shape}.pt", "--convert", target, "--output"]
            words.append(folder / f"{shape}.{target}")
            with contextlib.redirect_stdout(io.StringIO()):
                failed = check_model_precision.main([*map(str, words)])
            if failed:
                sys.exit(f"{shape} was not converted for llama2.c")
        pieces = [f"t{number} ".encode() for number in range(SHAPES[shape][3])]
        vocabulary = [struct.pack("<fi", 0.0, len(piece)) + piece for piece in pieces]
        longest = struct.pack("<i", max(map(len, pieces)))
        (folder / f"{shape}.vocabulary").write_bytes(longest + b"".join(vocabulary))


def perplexity_cost() -> dict[str, float]:
    """By dtype of the weights, how many per cent of perplexity it costs the shipped model.

    Measured on the first 256 tokens of each of the embedded held-out stories.
    """
    import torch
    import torch.nn.functional as F

    from config import DATA_DIR, SHIPPED_MODEL
    from llama import load_pretrained
    from minllama.model.packing import pack_weights
    from tokenizer import Tokenizer

    lines = (DATA_DIR / "stories-val.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    losses = {}
    for name in ("unpacked", "float32", "bfloat16", "int8"):
        model, loss, count = load_pretrained(SHIPPED_MODEL), 0.0, 0
        tokenizer = Tokenizer(tokenizer_model=model.vocabulary)
        if name != "unpacked":
            pack_weights(model, getattr(torch, name))
        for text in texts:
            tokens = torch.tensor(tokenizer.encode(text, True, True)[:257])
            with torch.inference_mode():
                logits = model.output(model.hidden_states(tokens[None, :-1]))[0]
            loss += F.cross_entropy(logits, tokens[1:], reduction="sum").item()
            count += len(tokens) - 1
        losses[name] = loss / count
    plain = losses.pop("unpacked")
    return {name: 100 * math.expm1(loss - plain) for name, loss in losses.items()}


def decoding_rows(title: str, figures: dict[str, list[dict[str, float]]]) -> list[str]:
    """A group's rows, a figure of each round in them; ratios are taken within a round."""
    lines = []
    for name, mine in figures.items():
        ratios = []
        for peer, theirs in figures.items():
            if is_ours(name) and not is_ours(peer):
                pairs = zip(mine, theirs, strict=True)
                ratio = statistics.median(a["rate"] / b["rate"] for a, b in pairs)
                ratios.append(f"{ratio:.2f} x {peer}")
        compiling = max(figure["compiling"] for figure in mine)  # later rounds find it done
        lines.append(
            f"| {title} | {name} | {statistics.median(figure['rate'] for figure in mine):,.0f} "
            f"| {', '.join(ratios)} | {f'{compiling:.0f}' if compiling else ''} "
            f"| {statistics.median(figure['memory'] for figure in mine):,.0f} |"
        )
    return lines
