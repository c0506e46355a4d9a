"""What a model was trained on before is measured while it learns another text: it may forget it.

A run that trained on with new text showed its loss on that alone, and a model that had lost all it
knew looked like a good one.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import several
import torch
from running import SMALL, assert_same_run, command, pretrain, records, stop_after, write_stories

from config import parse_options
from llama import load_pretrained
from minllama.formats.find_model import pretraining_result
from minllama.runs.run_folder import RunFolder
from minllama.training import old_text
from tokenizer import Tokenizer

STORIES = Path(__file__).resolve().parents[2] / "data" / "stories-val.jsonl"
REVIEWS = STORIES.with_name("reviews-unlabelled.jsonl")
FORGETTING = "--epochs 40 --max_steps 60 --pretrain_lr 0.03"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory) -> Path:
    """A folder with the run `old` on text.jsonl, which held old-val.jsonl out, and a new text."""
    folder = tmp_path_factory.mktemp("earlier")
    with contextlib.chdir(folder):
        write_stories(folder, 80)
        for name, source, lines in (("old-val", STORIES, 2), ("new", REVIEWS, 60)):
            text = source.read_text("utf-8").splitlines(keepends=True)[:lines]
            Path(f"{name}.jsonl").write_text("".join(text), encoding="utf-8")
        done = pretrain("--val_data old-val.jsonl --max_steps 100 --save_dir old")
    assert done.status == 0, done.error
    assert "old text" not in done.out
    return folder


@pytest.fixture(autouse=True)
def own_folder(earlier, tmp_path, monkeypatch):
    """Every test runs in a copy of it."""
    shutil.copytree(earlier, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def go_on(line: str = "", model: str = "old/final-model.pt") -> Any:
    """Train on with the new text, of which some is held out, into the folder run."""
    words = [*SMALL, "--pretrained_model_path", model, "--max_steps", "12", *line.split()]
    of_shape = words.index("--dim"), words.index("--max_seq_len")
    del words[of_shape[0] : of_shape[1]]
    return command(["--option", "pretrain", "--pretrain_data", "new.jsonl", *words])


def own_loss(model: str) -> float:
    """Nats per token of old-val.jsonl in chunks of 16, by the whole logits of a model."""
    llama, tokenizer, losses = load_pretrained(model), Tokenizer(), []
    lines = Path("old-val.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    ids = [token for text in texts for token in tokenizer.encode(text, True, True)]
    for start in range(0, len(ids) - 1, 16):
        chunk = torch.tensor([ids[start : start + 17]])
        with torch.no_grad():
            logits = llama.output(llama.hidden_states(chunk[:, :-1]))[0]
        real = chunk[0, 1:] != tokenizer.bos_id
        losses.append(
            torch.nn.functional.cross_entropy(logits[real], chunk[0, 1:][real], reduction="none")
        )
    return torch.cat(losses).mean().item()


def notes(out: str) -> list[str]:
    """What a run says of the old text."""
    return [line for line in out.splitlines() if line.startswith("old text")]


@pytest.mark.parametrize(
    ("steps", "result"), [(60, "run/final-model.pt"), (260, "run/best-model.pt")]
)
def test_a_model_that_forgets_is_said_to(steps, result):
    """At the start, at each evaluation and at the end: by an independent loss of the same text.

    Of an overfitted run the result is its best model, of an earlier step.
    """
    done = go_on(f"{FORGETTING} --eval_interval 20 --max_steps {steps}")
    assert done.status == 0, done.error
    assert pretraining_result(Path("run")) == Path(result)
    before, now = own_loss("old/final-model.pt"), own_loss(result)
    assert now > before + 0.02
    measured = {r["step"]: r["old_val_loss"] for r in records() if "old_val_loss" in r}
    assert {20, 40, 60, steps} <= measured.keys()
    assert min(abs(loss - now) for loss in measured.values()) < 1e-4
    last = records()[-1]
    assert last["old_val_perplexity"] == pytest.approx(math.exp(last["old_val_loss"]))
    begun, verdict = notes(done.out)
    assert "tokens held out of text.jsonl are measured, too" in begun
    said = re.search("of the old text val perplexity ([0-9.]+)", done.out)
    assert float(said[1]) == pytest.approx(math.exp(before), rel=1e-3)
    figures = re.search("perplexity ([0-9.]+) before, ([0-9.]+) now", verdict)
    said = [*map(float, figures.groups())]
    assert said == pytest.approx([math.exp(before), math.exp(now)], rel=1e-3)
    assert "it forgets" in verdict
    rows = RunFolder(Path("run"), "pretrain").findings()["the old text"]
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert figures[0] in rows[0][1] and figures[0] in page and '"old_val_loss"' in page
    options = parse_options(shlex.split(rows[1][1])[2:])
    assert options.pretrain_data == ("text.jsonl", "new.jsonl")
    assert options.data_weights == (1.0, 1.0)
    assert rows[1][1] in done.out


def test_it_can_be_mixed_in_by_the_printed_command():
    """That run holds some of both out, so the old text is not measured twice."""
    go_on(FORGETTING)
    folder = RunFolder(Path("run"), "pretrain")
    again = command(shlex.split(folder.findings()["the old text"][1][1])[2:])
    assert again.status == 0, again.error
    assert "its files are among those to train on" in notes(again.out)[0]
    assert {*records("run-again/metrics.jsonl")[-1]["val_loss_by_source"]} == {
        "text.jsonl",
        "new.jsonl",
    }


def test_one_that_does_not_forget():
    """The same number is no news: there is no command to keep what was not lost."""
    done = go_on("--pretrain_lr 1e-9")
    assert "it does not forget" in notes(done.out)[-1]
    assert len(RunFolder(Path("run"), "pretrain").findings()["the old text"]) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [("", ["its files are among those to train on"]), ("--val_data old-val.jsonl", [])],
)
def test_the_same_text_is_not_measured_twice(line, said):
    """Its validation is that of before, or of the same files."""
    done = go_on(f"--pretrain_data text.jsonl {line}")
    assert done.status == 0
    assert "old_val_loss" not in records()[-1]
    assert [note.split(": ")[1] for note in notes(done.out)] == said


def change(**changes: Any) -> None:
    """Write other things into the old run's record."""
    record = json.loads(Path("old/run.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        record["starts"][-1][name] = value
    Path("old/run.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize(
    ("happen", "reason"),
    [
        (lambda: Path("old-val.jsonl").write_text('{"text": "other"}\n'), "has changed since"),
        (lambda: Path("old-val.jsonl").unlink(), "no such file"),
        (lambda: Path("text.jsonl").unlink(), "no such file"),
        (lambda: "--pretrain_data old-val.jsonl", "is trained on now"),
        (lambda: Path("old/run.json").unlink(), None),  # as of a model from elsewhere
        (lambda: shutil.copy("old/final-model.pt", "old/public.pt"), None),
        (lambda: change(data={"held_out": "9 bytes"}), "of an earlier version"),
        (lambda: change(data=None), "does not say which text"),
        (lambda: change(options=[1]), "does not say which text"),
        (lambda: change(options={"pretrain_data": "text.jsonl"}), "it is damaged"),
        (lambda: change(options={"pretrain_data": ["text.jsonl"]}), "how it was held out"),
        (lambda: change(options={"pretrain_data": [""], "max_seq_len": 16}), ""),
    ],
)
def test_what_is_not_as_it_was_is_not_believed(happen, reason):
    """One line says that it is not measured and why; the run goes on. Of a public model, none."""
    flags = happen()
    is_public = Path("old/public.pt").exists()
    line = flags if isinstance(flags, str) and flags.startswith("--") else ""
    done = go_on(line, model="old/public.pt" if is_public else "old/final-model.pt")
    assert done.status == 0, done.error
    assert "old_val_loss" not in records()[-1]
    if reason is None:
        assert notes(done.out) == []
    else:
        assert len(notes(done.out)) == 1
        assert "not measured by itself" in done.out and reason in notes(done.out)[0]


def test_a_large_old_text_is_not_tokenized_again(monkeypatch):
    """A --minutes run must not spend its time on the tokens of another text."""
    assert go_on("--save_dir before").status == 0  # leaves them in the cache
    monkeypatch.setattr(old_text, "AFFORDABLE_BYTES", 1)
    Path("new.jsonl").write_text('{"text": "A short one."}\n', encoding="utf-8")
    done = go_on("--cache_dir elsewhere --val_fraction 0")
    assert done.status == 0, done.error
    assert "would take longer" in notes(done.out)[0]
    done = go_on("--val_fraction 0 --save_dir with-cache")
    assert "old_val_loss" in records("with-cache/metrics.jsonl")[-1], "whose cache is there"


def test_a_resumed_run_measures_the_same(monkeypatch):
    """Bit-equal; and where the old run was replaced meanwhile, the other text is not taken."""
    line = "--eval_interval 4 --epochs 40 --checkpoint_interval 4"
    assert go_on(f"{line} --save_dir whole").status == 0
    words = f"--option pretrain --pretrain_data new.jsonl {' '.join(SMALL[8:])}"
    words += f" --pretrained_model_path old/final-model.pt --max_steps 12 {line}"
    with monkeypatch.context() as patch:
        assert command(words, stop=stop_after(6, patch)).status == 130
    shutil.copytree("run", "other")
    resume = "--option pretrain --cache_dir cache --resume auto --max_steps 12"
    assert command(f"{resume} --save_dir run").status == 0
    assert_same_run("run", "whole", "pretrain-step-12.pt")
    Path("old-val.jsonl").write_text(Path("new.jsonl").read_text("utf-8"), encoding="utf-8")
    assert pretrain("--val_data old-val.jsonl --max_steps 1 --save_dir old --overwrite").status == 0
    done = command(f"{resume} --save_dir other")
    assert done.status == 0
    assert "it is another one now" in notes(done.out)[0]
    assert "old_val_loss" not in records("other/metrics.jsonl")[-1]


def test_several_ranks_measure_what_one_does():
    """Rank 0 reads the old text, and sends it to the others."""
    line = "--eval_interval 4 --epochs 40"
    assert go_on(f"{line} --global_batch_size 8 --save_dir alone").status == 0
    words = ["--option", "pretrain", "--pretrain_data", "new.jsonl", *SMALL[8:], *line.split()]
    words += ["--pretrained_model_path", "old/final-model.pt", "--max_steps", "12"]
    output = several.run(2, [*words, "--global_batch_size", "8"])
    assert output.count("are measured, too") == 1
    one, two = (
        [r["old_val_loss"] for r in records(f"{name}/metrics.jsonl") if "old_val_loss" in r]
        for name in ("alone", "run")
    )
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-5)


def test_a_loss_beyond_all_bounds_is_forgotten():
    """Its perplexity is no number that a float holds."""
    verdict, forgets = old_text.verdict_on_old_text(2.0, 5000.0)
    assert forgets and "perplexity 7.39 before, 1.01e+304 now: it forgets" in verdict
    assert not old_text.verdict_on_old_text(2.0, 2.001)[1]
