"""Texts and minimal pairs are scored as transformers does it; files of pairs are read strictly."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_vocabularies import byte_vocabulary
from oracles import make_model
from running import command, pretrain, records, write_model

import check_model_precision as C
from llama import LlamaZeroShotClassifier, load_pretrained
from minllama.formats.export import export
from minllama.inference.evaluation import (
    compare_pairs,
    pair_report,
    read_pairs,
    score_text,
    wilson_interval,
)
from minllama.system.errors import UsageError
from minllama.system.signals import StopRequest
from minllama.text.reading import Reading
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def transformer(tokenizer: Tokenizer, tmp_path_factory):
    """A small model, and the same in `transformers`, from the exported folder."""
    transformers = pytest.importorskip("transformers")
    model = make_model(tokenizer, max_seq_len=48)
    folder = tmp_path_factory.mktemp("hf") / "hf"
    export(model, "hf", folder, dtype="float32", tokenizer=tokenizer, extra={})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, theirs, transformers.AutoTokenizer.from_pretrained(folder)


def their_loss_sum(theirs, ids: list[int], ignored: int | None = None) -> float:
    """Nats of all tokens but the first, by transformers' own loss."""
    tokens = torch.tensor([ids])
    labels = tokens.masked_fill(tokens == ignored, -100) if ignored is not None else tokens
    counted = int((labels[0, 1:] != -100).sum())
    with torch.no_grad():
        return theirs(tokens, labels=labels).loss.item() * counted


# ---------------------------------------------------------------------------- bits per byte


def test_bits_per_byte_are_transformers_loss_over_the_bytes(transformer, tokenizer: Tokenizer):
    """Two documents, each between BOS and EOS, in chunks of the context; BOS is never predicted."""
    model, theirs, their_tokenizer = transformer
    texts = ["Once upon a time there was a naïve fox. " * 6, "你好. It rained."]
    lines = [json.dumps({"story": text}) + "\n" for text in texts]
    Path("a.jsonl").write_text("".join(lines), encoding="utf-8")
    found = score_text(model, tokenizer, [Path("a.jsonl")], Reading(text_field="story"))
    ids = [i for text in texts for i in [*their_tokenizer(text)["input_ids"], tokenizer.eos_id]]
    chunks = [ids[start : start + 49] for start in range(0, len(ids) - 1, 48)]
    assert len(chunks) > 2
    wanted = sum(their_loss_sum(theirs, chunk, ignored=tokenizer.bos_id) for chunk in chunks)
    assert found.loss_sum == pytest.approx(wanted, rel=1e-5)
    assert found.utf8_bytes == sum(len(text.encode()) for text in texts)
    assert found.tokens == len(ids) - 2
    assert found.bits_per_byte == pytest.approx(wanted / math.log(2) / found.utf8_bytes, rel=1e-5)


def test_bits_per_byte_from_the_command_line(capsys):
    """The shipped model on part of its validation text, and two models beside each other."""
    stories = (ROOT / "data" / "stories-val.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    Path("val.jsonl").write_text("\n".join(stories), encoding="utf-8")
    shipped, other = str(ROOT / "data" / "stories-tiny.pt"), str(write_model(Path.cwd()))
    assert C.main([shipped, other, "--text", "val.jsonl", "--json"]) == 0
    one, two = (result["text"] for result in json.loads(capsys.readouterr().out))
    assert 0.2 < one["bits_per_byte"] < 0.35 < 2 < two["bits_per_byte"]
    assert C.main([shipped, "--text", "val.jsonl"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"{one['bits_per_byte']:.4f} bits per byte" in line and "val.jsonl: " in line


def test_a_run_s_validation_loss_is_found_again(capsys):
    """Where a line is a document --text read the file as one: 2.58 for a loss of 1.91."""
    lines = [f"The {who} ran {where} ." for who in ("cat", "dog") for where in ("home", "away")]
    Path("a.txt").write_text(
        "\n".join(f"{i % 2} ||| {x}" for i, x in enumerate(lines * 9)), "utf-8"
    )
    Path("val.txt").write_text("\n".join(f"1 ||| {x}" for x in lines[::-1]), encoding="utf-8")
    for flags in ("--document_per_line", "--sentences_only"):
        words = f"--pretrain_data a.txt --val_data val.txt --max_steps 2 --overwrite {flags}"
        assert pretrain(words).status == 0
        assert C.main(f"run/final-model.pt --text val.txt --json {flags}".split()) == 0
        found, last = json.loads(capsys.readouterr().out)[0]["text"], records()[-1]
        assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
        assert found["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)


def test_a_text_that_cannot_be_scored_is_one_line(capsys):
    Path("empty.txt").write_text(" \n", encoding="utf-8")
    Path("a.jsonl").write_text('{"body": "x"}', encoding="utf-8")
    model = str(write_model(Path.cwd()))
    C.main([model, "--convert", "bin", "--output", "bare.bin"])
    for words, message in (
        ([model, "--text", "none.txt"], "--text none.txt: no such file"),
        ([model, "--text", "empty.txt"], "empty.txt: empty"),
        ([model, "--text", "a.jsonl"], "name it with --text_field"),
        (["bare.bin", "--text", "empty.txt"], "has no vocabulary: name its vocabulary"),
        ([model, "--text", "a.jsonl", "--document_separator", " "], "name a text, or 'blank line'"),
    ):
        capsys.readouterr()
        assert C.main(words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------- minimal pairs

PAIRS = [
    ("The dog ran home.", "The dog home ran.", "order"),
    ("She was happy.", "She were happy all day long.", "agreement"),
    ("a b", "a b c", "prefix"),
    ("same", "same", "tie"),
]


def write_pairs() -> list[Path]:
    blimp = [
        {"sentence_good": good, "sentence_bad": bad, "linguistics_term": kind, "UID": "x"}
        for good, bad, kind in PAIRS[:2]
    ]
    lines = "\n".join(map(json.dumps, blimp))
    Path("blimp.jsonl").write_text(lines, encoding="utf-8")
    tabbed = ["\t".join(pair) for pair in PAIRS[2:]]
    Path("own.tsv").write_text("\n\n".join(tabbed) + "\n", encoding="utf-8")
    return [Path("blimp.jsonl"), Path("own.tsv")]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_pair_is_judged_as_transformers_judges_it(transformer, tokenizer, batch_size: int):
    """By the sum over each whole sentence, whatever else is in the batch."""
    model, theirs, _ = transformer
    pairs = read_pairs(write_pairs(), Reading())
    assert [(pair.good, pair.bad, pair.category) for pair in pairs] == PAIRS
    options = {"batch_size": batch_size, "stop": StopRequest()}
    found = compare_pairs(LlamaZeroShotClassifier(model), tokenizer, pairs, **options)
    for pair, difference in zip(pairs, found, strict=True):
        good, bad = (
            -their_loss_sum(theirs, tokenizer.encode(text, bos=True, eos=False))
            for text in (pair.good, pair.bad)
        )
        assert difference == pytest.approx(good - bad, abs=1e-3)
    assert found[3] == 0 and found[2] > 0  # a tie; and to go on costs something


def test_the_first_token_is_judged_where_prompts_have_no_bos(empty_folder):
    """Two sentences that differ in it, of a vocabulary like SmolLM's, were once refused."""
    tokenizer = byte_vocabulary("smollm")
    assert not tokenizer.vocabulary.adds_bos
    model = make_model(tokenizer)
    Path("p.txt").write_text("cat sat\tDog sat\na\tbb\n", encoding="utf-8")
    pairs = read_pairs([Path("p.txt")], Reading())
    judge, options = LlamaZeroShotClassifier(model), {"batch_size": 2, "stop": StopRequest()}
    for pair, difference in zip(
        pairs, compare_pairs(judge, tokenizer, pairs, **options), strict=True
    ):
        sums = []
        for text in (pair.good, pair.bad):
            ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text, False, False)]])
            sums.append(-model.loss(ids[:, :-1], ids[:, 1:])[0].item())
        assert difference == pytest.approx(sums[0] - sums[1], abs=1e-3)


def test_pairs_from_the_command_line():
    """By category and in all, a tie counted as half; the bare program says which model it took."""
    write_pairs()
    model = write_model(Path.cwd())
    words = f"--option prompt --pretrained_model_path {model} --pairs blimp.jsonl own.tsv"
    done = command(words)
    assert done.status == 0, done.error
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[-5:]] == [
        "agreement",
        "order",
        "prefix",
        "tie",
        "all",
    ]
    assert lines[-2].split()[:4] == ["tie", "1", "1", "0.500"]
    assert lines[-1].split()[1:3] == ["4", "1"] and "95 % interval" in lines[-6]


def test_pairs_one_by_one():
    """As --test_out: a row a pair, in the files' order, that adds up to the figures."""
    write_pairs()
    words = f"--option prompt --pretrained_model_path {write_model(Path.cwd())} --pairs own.tsv"
    done = command(f"{words} --test_out pairs.csv")
    assert done.status == 0, done.error
    rows = list(csv.DictReader(Path("pairs.csv").read_text(encoding="utf-8").splitlines()))
    expected = read_pairs([Path("own.tsv")], Reading())
    assert [tuple(row[key] for key in ("good", "bad", "category", "where")) for row in rows] == [
        (pair.good, pair.bad, pair.category, pair.where) for pair in expected
    ]
    right = [{"good": 1, "neither": 0.5, "bad": 0}[row["likelier"]] for row in rows]
    assert f"{sum(right) / len(right):.3f}" == done.out.splitlines()[-2].split()[3]
    for row in rows:
        ratio = float(row["log_ratio"])
        assert row["likelier"] == ("good" if ratio > 0 else "bad" if ratio < 0 else "neither")
    for out, said in (("pairs.txt", "name it .csv or .jsonl"), ("own.tsv", "name it .csv")):
        refused = command(f"{words} --test_out {out}")
        assert refused.status == 2 and said in refused.error


def test_lm_eval_judges_the_exported_folder_alike(tmp_path: Path, tokenizer: Tokenizer):
    """The recipe of benchmarks/README.md, offline, with its task file and our own sentences."""
    for name in ("lm_eval", "accelerate"):
        pytest.importorskip(name, reason='lm_eval is a large one: pip install "lm_eval[hf]"')
    model = load_pretrained(ROOT / "data" / "stories-tiny.pt")
    export(model, "hf", tmp_path / "hf", dtype="float32", tokenizer=tokenizer, extra={})
    stories = (ROOT / "data" / "stories-val.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    good = [json.loads(line)["text"].split(".")[0] + "." for line in stories]
    records = [
        {"sentence_good": text, "sentence_bad": " ".join(text.split()[::-1])} for text in good
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    words = "--model hf --model_args pretrained=hf --tasks pairs --device cpu --log_samples"
    places = ["--include_path", str(ROOT / "benchmarks"), "--output_path", "out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *words.split(), *places],
        env=os.environ | offline,
        check=True,
        capture_output=True,
    )
    (samples,) = Path("out").rglob("samples_pairs_*.jsonl")
    lines = samples.read_text(encoding="utf-8").splitlines()
    answers = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    theirs = [float(a[0][0]) - float(b[0][0]) for a, b in (x["resps"] for x in answers)]
    pairs = read_pairs([Path("pairs.jsonl")], Reading())
    options = {"batch_size": 4, "stop": StopRequest()}
    ours = compare_pairs(LlamaZeroShotClassifier(model), tokenizer, pairs, **options)
    assert theirs == pytest.approx(ours.tolist(), abs=1e-3)


def test_shares_and_intervals():
    """Wilson's interval against the root of its own equation, and known values."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 5)[0] == 0.0 and wilson_interval(5, 5)[1] == 1.0
    for right, n in ((30.5, 67), (1, 3), (500, 1000)):
        for edge in wilson_interval(right, n):
            far = abs(right / n - edge) / math.sqrt(edge * (1 - edge) / n)
            assert far == pytest.approx(1.959964, rel=1e-6)
    pairs = read_pairs(write_pairs(), Reading())
    lines = pair_report(pairs, np.array([1.0, -1.0, 0.0, 2.0]))
    assert lines[-1].startswith("all") and " 0.625 (" in lines[-1]
    assert len(pair_report(pairs[:1], np.ones(1))) == 2  # one category: no line of its own


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "good\tbad\nonly one\n", "a.tsv:2: a line reads `good<TAB>bad`"),
        ("a.tsv", "a\tb\tc\td", "a.tsv:1: a line reads"),
        ("a.tsv", "\tbad", "a.tsv:1: a line reads"),
        ("a.txt", "\n\n", "a.txt: empty"),
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not JSON"),
        ("a.jsonl", '"x"', "a.jsonl:1: not a JSON object"),
        ("a.jsonl", '{"x": 1}', "a.jsonl:1: lacks a text in sentence_good or sentence_bad"),
        ("a.jsonl", '{"sentence_good": "x", "sentence_bad": 3}', "a.jsonl:1: lacks a text"),
        ("a.jsonl", '{"sentence_good": "x", "sentence_bad": " "}', "a.jsonl:1: lacks a text"),
        ("a.tsv", "x\t" + "word " * 200, "a.tsv:1: .* tokens, and the model reads 128"),
    ],
)
def test_bad_pairs_are_named(name: str, content: str, message: str, tokenizer: Tokenizer):
    Path(name).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        pairs = read_pairs([Path(name)], Reading())
        model = LlamaZeroShotClassifier(load_pretrained(write_model(Path.cwd())))
        compare_pairs(model, tokenizer, pairs, batch_size=8, stop=StopRequest())


def test_texts_and_pairs_in_another_encoding(capsys):
    """The error named --encoding, which the one ignored and the other did not have."""
    good, bad = "他从前有一座山，山里有一座庙。", "山从前有一座他，庙里有一座山。"
    for encoding in ("utf-8", "gb18030"):
        Path(f"{encoding}.tsv").write_text(f"{good}\t{bad}\n", encoding=encoding)
        Path(f"{encoding}.txt").write_text(f"{good}\n{bad}\n", encoding=encoding)
    model, scored = str(write_model(Path.cwd())), []
    for encoding in ("utf-8", "gb18030"):
        pairs = read_pairs([Path(f"{encoding}.tsv")], Reading(encoding=encoding))
        assert (pairs[0].good, pairs[0].bad) == (good, bad)
        words = ["--encoding", encoding] if encoding != "utf-8" else []
        capsys.readouterr()
        assert C.main([model, "--text", f"{encoding}.txt", *words]) == 0
        scored.append(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
        line = f"--option prompt --pairs {encoding}.tsv --pretrained_model_path {model}"
        assert command(" ".join([line, *words])).status == 0
    assert scored[0] == scored[1]
    assert C.main([model, "--text", "utf-8.txt", "--encoding", "klingon"]) == 2
    assert "--encoding klingon" in capsys.readouterr().err


def test_pairs_need_no_labels():
    done = command("--option prompt --pairs none.tsv")
    assert done.status == 2 and "--pairs none.tsv: no such file" in done.error
    with pytest.raises(UsageError, match="--pairs compares whole sentences, without --shots"):
        command("--option prompt --pairs a.tsv --shots 2")


def test_a_document_of_several_parts_is_scored_whole(tmp_path):
    """Longer than one read, it ended in a traceback: a part that begins no document has no BOS."""
    (tmp_path / "long.txt").write_text("One day a fox ran.\n" * 30_000, encoding="utf-8")
    model = load_pretrained(write_model(tmp_path, dim=16, n_layers=1, max_seq_len=64))
    tokenizer = Tokenizer()
    score = score_text(model, tokenizer, [tmp_path / "long.txt"], Reading())
    assert score.utf8_bytes == 30_000 * 19
    assert score.tokens == len(tokenizer.encode("One day a fox ran.\n" * 30_000, False, True))
