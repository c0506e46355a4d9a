"""minllama/text/compression.py: what gzip and xz need for a text, beside a model's figure."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from running import evaluate_as, pretrain, records, write_stories

from minllama.runs.run_folder import RunFolder
from minllama.text.compression import compressed_bits, text_of
from minllama.text.stream import TokenStream
from minllama.training.pretraining import Pretraining
from tokenizer import Tokenizer
from utils import PretrainDataset

TEXT = "".join(f"{n} foxes and {n * n % 97} hens went to wood {n % 7}.\n" for n in range(4000))


@pytest.mark.parametrize("name, words", [("gzip", ["gzip", "-9"]), ("xz", ["xz", "-T1"])])
def test_the_figures_are_those_of_the_commands(name, words):
    """The programs themselves, where they are installed, come to as many bytes but for headers."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"no {words[0]} here")
    packed = subprocess.run([*words, "-c"], input=TEXT.encode(), capture_output=True, check=True)
    bits = compressed_bits(TEXT.encode())[name]
    assert bits == pytest.approx(8 * len(packed.stdout) / len(TEXT.encode()), rel=0.02)


def test_a_long_text_is_looked_at_in_part():
    """Of each source the beginning, at most so many bytes; of a short one all."""
    tokenizer = Tokenizer()
    texts = (TEXT[:9000], "One day. " * 3000)
    parts = [tokenizer.encode(text, bos=False, eos=False) for text in texts]
    ids = np.concatenate(parts).astype(np.int32)
    stream = TokenStream(ids, np.array([0]), np.array([len(ids)]))
    sources = {"a": len(parts[0]), "b": len(parts[1])}
    dataset = PretrainDataset(stream, 16, tokenizer=tokenizer, sources=sources)
    assert text_of(dataset).decode().split() == " ".join(texts).split()
    part = text_of(dataset, 2000).decode()
    assert 1500 < len(part) <= 2000 and part.strip().startswith(TEXT[:200])
    assert "One day. One day." in part


def row_texts(title: str) -> dict[str, str]:
    """A table of what was found, in the page's data; the record has the same."""
    page = Path("run/report.html").read_text(encoding="utf-8")
    data = json.loads(re.search('id="data">(.*?)</script>', page, re.S)[1])
    rows = data["runs"][0]["findings"][title]
    assert RunFolder(Path("run"), "pretrain").findings()[title] == rows
    return dict(rows)


def test_a_run_ends_with_its_bits_per_byte_beside_the_compressors(monkeypatch, tmp_path):
    """Printed, recorded and on the page: recomputed from the held-out documents and the losses."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path, 300)
    summary, kept = Pretraining.print_summary, []

    def keep(task, *arguments, **named):
        stream = task.val_set.stream
        kept.append(task.texts.tokenizer.decode(stream.read(0, len(stream)).tolist()))
        return summary(task, *arguments, **named)

    monkeypatch.setattr(Pretraining, "print_summary", keep)
    done = pretrain("--max_steps 2")
    assert done.status == 0
    record = records()[-1]
    rows = row_texts("how good")
    assert rows["this model"].startswith(f"{record['bits_per_byte']:.4f} bits per byte")
    for name, bits in compressed_bits(kept[0].encode()).items():
        # A document begins with a space in the one, with none in the other.
        assert float(rows[name].split()[0]) == pytest.approx(bits, rel=0.05)
        assert f" {name} {rows[name].split()[0]} " in done.out
        assert f"{rows[name].partition(' ')[2]}\n" in done.out


def test_an_overfitted_run_is_judged_by_its_best_model(monkeypatch, tmp_path):
    """Which is its result: bits per byte go with the loss, and the last ones are not its."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path)
    with monkeypatch.context() as patch:
        evaluate_as(patch, 9.0, 3.0, 4.0)
        evaluate = Pretraining.evaluate
        patch.setattr(
            Pretraining,
            "evaluate",
            lambda task: (found := evaluate(task)) | {"bits_per_byte": found["val_loss"] / 2},
        )
        assert pretrain("--epochs 2 --best_model_interval 1").status == 0
    assert row_texts("how good")["this model"].startswith("1.5000 bits per byte")
