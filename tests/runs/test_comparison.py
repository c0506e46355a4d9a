"""minllama/runs/comparison.py: a sweep as a table, and what in it does not compare."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from hurried import NO_COPIES
from running import (
    command,
    pretrain,
    records,
    write_dialogues,
    write_labelled,
    write_model,
    write_stories,
)

import check_model_precision
from minllama.cli.chinese import columns_of
from minllama.runs.comparison import read_run, sorted_runs, table, warnings
from minllama.runs.run_folder import RunFolder
from tokenizer import train_vocabulary

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture
def sweep() -> list[str]:
    """Three runs, of which each has another learning rate; the second is the longest."""
    write_stories(Path.cwd(), 5)
    for name, words in (
        ("slow", "--pretrain_lr 1e-5"),
        ("fast", "--pretrain_lr 0.02 --epochs 2"),
        ("mid", "--pretrain_lr 1e-3"),
    ):
        assert pretrain(f"--epochs 1 --val_fraction 0.2 {words} --save_dir {name}").status == 0
    return ["slow", "fast", "mid"]


def compare(*words: str) -> int:
    return check_model_precision.main(["--compare-runs", *words])


def test_a_sweep_is_a_table(sweep, capsys):
    """Best first, with what differs and nothing else; each figure is that of the records."""
    assert compare(*sweep, "--csv", "sweep.csv") == 0
    head, *rows, wrote = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["fast", "mid", "slow"] and "sweep.csv" in wrote
    assert head.split("  ")[-2].strip() == "--epochs" and head.endswith("--pretrain_lr")
    assert "note:" not in "".join(rows)
    with Path("sweep.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        kept = records(f"{line['run']}/metrics.jsonl")
        measured = [record for record in kept if record["val_loss"] is not None]
        best = min(measured, key=lambda record: record["val_loss"])
        assert float(line["best_val_loss"]) == best["val_loss"]
        assert int(line["best_step"]) == best["step"]
        assert float(line["best_bits_per_byte"]) == min(r["bits_per_byte"] for r in measured)
        assert int(line["steps"]) == kept[-1]["step"] and int(line["tokens"]) == kept[-1]["tokens"]
        assert float(line["seconds"]) == kept[-1]["elapsed"]
        losses = [record["loss"] for record in kept[-20:]]
        assert float(line["train_loss"]) == pytest.approx(sum(losses) / len(losses))
        assert line["text"].endswith("bytes in 5 documents")
        flags = {"--epochs", "--pretrain_lr"}
        assert flags == {name for name in line if name.startswith("--")}
    assert {line["run"]: line["--pretrain_lr"] for line in lines}["slow"] == "1e-05"
    shown = dict(zip((row.split()[0] for row in rows), rows, strict=True))
    for line in lines:
        assert f"{float(line['best_val_loss']):,.4f}" in shown[line["run"]]


def test_losses_of_other_texts_and_vocabularies_do_not_compare(capsys):
    """A larger vocabulary, or an easier text, once looked like a better or a worse run."""
    write_stories(Path.cwd(), 8)
    lines = Path("text.jsonl").read_text(encoding="utf-8").splitlines()
    Path("words.txt").write_text("\n".join(lines), encoding="utf-8")
    train_vocabulary([Path("words.txt")], Path("own.model"), vocab_size=340)
    short = "--max_steps 1 --val_fraction 0.2"
    assert pretrain(f"{short} --save_dir one").status == 0
    assert pretrain(f"{short} --save_dir own --tokenizer_model own.model").status == 0
    Path("text.jsonl").write_text("\n".join(lines[2:]), encoding="utf-8")
    assert pretrain(f"{short} --save_dir other").status == 0
    assert compare("one", "own") == 0
    out = capsys.readouterr().out
    assert (
        "note: these runs have different vocabularies: losses, which are per token, do not" in out
    )
    assert "other texts" not in out
    assert compare("own", "other", "--output", "page.html") == 0
    out = capsys.readouterr().out
    for word in (
        "different texts to train on",
        "different held-out text",
        "different vocabularies",
    ):
        assert word in out and word in Path("page.html").read_text(encoding="utf-8")
    assert out.index("\nown ") < out.index("\nother ")  # in the order given
    for path in Path("one").glob("run.json"):  # of an earlier version, which did not say
        stored = json.loads(path.read_text(encoding="utf-8"))
        del stored["starts"][0]["data"]
        path.write_text(json.dumps(stored), encoding="utf-8")
    assert compare("one", "own") == 0
    assert "whether these runs have different vocabularies is not on record of one" in (
        capsys.readouterr().out.replace("\n", " ")
    )


def test_many_flags_stand_below(sweep, capsys):
    """A table wider than any terminal is none."""
    more = "--weight_decay 0.3 --warmup_steps 2 --grad_clip 2 --min_lr 1e-6"
    assert pretrain(f"--epochs 1 --val_fraction 0.2 {more} --save_dir other").status == 0
    assert compare(*sweep, "other") == 0
    above, below = capsys.readouterr().out.split("\n\n")
    assert "--" not in above and len(above.splitlines()) == 5
    cells = {line.split()[0]: line.split()[1:] for line in below.splitlines()}
    place = cells["flag"].index("other")
    assert cells["--weight_decay"][place] == "0.3" and cells["--epochs"].count("2") == 1
    assert "--sample_prompt" not in cells and "--check_copies" not in cells


def test_a_record_may_hold_anything():
    """run.json may be damaged or somebody else's; the table has what there is."""
    write_stories(Path.cwd())
    assert pretrain("--max_steps 1 --save_dir one").status == 0
    runs = [read_run(Path("one"))]
    for content in ("{", '{"starts": [{"options": 3, "data": {"text": ["a"]}}]}'):
        Path("one/run.json").write_text(content, encoding="utf-8")
        runs.append(read_run(Path("one")))
    assert len(table(runs)) == 4
    assert sorted_runs(runs) == runs and "is not on record of one, one" in warnings(runs)[0]
    assert "do not say of which text" in warnings(runs[1:])[0]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--csv", "a.csv"], "--csv is for --compare_runs"),
        (["--compare_runs", "one", "one", "--csv", "one"], "--csv one: is a folder"),
        (["--compare_runs", "one", "one", "--csv", "a.txt"], "--csv a.txt: is there already"),
        (["--compare_runs", "no", "one"], "no: no such folder of a run"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    """And nothing is written."""
    write_stories(Path.cwd())
    Path("a.txt").write_text("mine", encoding="utf-8")
    folder = RunFolder(Path("one"), "pretrain")
    folder.add_start({})
    folder.note_copies(NO_COPIES)
    assert check_model_precision.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error:") == 1
    assert Path("a.txt").read_text(encoding="utf-8") == "mine" and not Path("a.csv").exists()


def test_names_of_wide_characters_keep_the_columns_apart(sweep):
    """A Chinese character takes two columns: the figures behind such a name stood to the right."""
    Path("slow").rename("小说模型")
    lines = table([read_run(Path(name)) for name in ("小说模型", "fast")])
    ends = [[cell.end() for cell in re.finditer(r"\S+(?: \S+)*", line)] for line in lines]
    columns = [
        [columns_of(line[:end]) for end in row] for line, row in zip(lines, ends, strict=True)
    ]
    assert len({row[1] for row in columns}) == 1 and columns[1][0] == 8


@pytest.mark.parametrize("kind", ["chat.jsonl", "toy-train.txt"])
def test_what_is_held_out_of_other_data_does_not_compare(kind, capsys):
    """Two fine-tunings without --dev on different files were ranked, as if by the same sentences:
    of both `of --train (14 are left)` was on record, or nothing."""
    write_model(Path.cwd())
    write_dialogues(Path.cwd())
    write_labelled(Path.cwd())
    lines = Path(kind).read_text(encoding="utf-8").splitlines(keepends=True)
    common = "--option finetune --pretrained_model_path model.pt --dtype float32 --max_steps 1"
    for name, chosen in (("one", lines[:-1]), ("other", lines[1:])):
        Path(kind).write_text("".join(chosen), encoding="utf-8")
        assert command(f"{common} --train {kind} --save_dir {name}").status == 0
    assert compare("one", "other") == 0
    assert "different held-out text: neither losses nor" in capsys.readouterr().out
