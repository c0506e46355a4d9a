"""--data_weights: whole runs on several sources, stopped, divided, measured by source."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import several
import torch
from running import (
    RESUME,
    ROOT,
    SMALL,
    TIMED,
    assert_same_run,
    command,
    records,
    stop_after,
)

from llama import load_pretrained
from minllama.runs import plan as plans
from minllama.runs.checkpoints import load_checkpoint
from minllama.runs.report import Curves
from minllama.training import pretraining
from tokenizer import Tokenizer

SOURCES = "--pretrain_data stories reviews.jsonl"
WEIGHTS = f"{SOURCES} --data_weights 3 1"


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch) -> None:
    """The test runs where a folder has eight stories in two files, and a file forty reviews."""
    monkeypatch.chdir(tmp_path)
    Path("stories").mkdir()
    for path, name, start, count in (
        ("stories/a.jsonl", "stories-train", 0, 4),
        ("stories/b.jsonl", "stories-train", 4, 4),
        ("reviews.jsonl", "reviews-unlabelled", 0, 40),
        ("stories-val.jsonl", "stories-val", 0, 3),
        ("reviews-val.jsonl", "reviews-unlabelled", 40, 9),
    ):
        lines = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        Path(path).write_text("\n".join(lines[start : start + count]) + "\n", encoding="utf-8")


def pretrain(line: str, **settings):
    """A small pretraining into the folder run, unless the line says otherwise."""
    done = command(["--option", "pretrain", *SMALL, *line.split()], **settings)
    assert done.status in (0, 130), done.error
    return done


def untimed(folder: str = "run") -> list[dict]:
    """The records of a run, less what the clock decides."""
    found = records(f"{folder}/metrics.jsonl")
    return [{key: of[key] for key in of if key not in TIMED} for of in found]


# ---------------------------------------------------------------------------- as without weights


def test_one_source_is_trained_on_as_without_weights():
    """Bit for bit, over two epochs: the order of its chunks, the losses, what is held out."""
    pretrain("--pretrain_data stories --epochs 2 --save_dir plain")
    pretrain("--pretrain_data stories --data_weights 0.7 --epochs 2")
    assert_same_run("plain", "run", "pretrain-epoch-2.pt")
    identities = [
        load_checkpoint(Path(of, "pretrain-epoch-2.pt"))["identity"] for of in ("plain", "run")
    ]
    assert "--data_weights" not in identities[0] and identities[1]["--data_weights"] == "0.7"


def test_without_weights_nothing_is_told_by_source():
    """Neither in the records nor in the plan; the identity is what it was."""
    done = pretrain(f"{SOURCES} --max_steps 2 --eval_interval 1")
    assert "\nsources " not in done.out and "reviews.jsonl: val" not in done.out
    assert not [key for record in untimed() for key in record if key.endswith("by_source")]
    identity = load_checkpoint(Path("run/pretrain-step-2.pt"))["identity"]
    assert "--data_weights" not in identity
    assert isinstance(identity["training tokens (--val_fraction, --val_data)"], int)


# ---------------------------------------------------------------------------- as one run


@pytest.mark.parametrize(
    ("stops", "words"),
    [
        ([3, 20], "--gradient_accumulation_steps 2"),
        ([7], "--document_mask --eval_interval 5 --checkpoint_interval 2 --max_steps 12"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(stops, words, monkeypatch):
    """Bit for bit, with dropout, in the middle of an epoch and of a pass over a source; the
    checkpoint has the weights."""
    words = f"--epochs 2 --dropout 0.1 {words}"
    pretrain(f"{WEIGHTS} {words} --save_dir whole")
    for number, step in enumerate(stops):
        with monkeypatch.context() as patch:
            resume = "--resume auto" if number else WEIGHTS
            assert pretrain(f"{words} {resume}", stop=stop_after(step, patch)).status == 130
    assert pretrain(f"{words} --resume auto").status == 0
    last = "step-12" if "--max_steps" in words else "epoch-2"
    assert_same_run("whole", "run", f"pretrain-{last}.pt")


def test_the_order_is_that_of_any_batch_size(monkeypatch):
    """Chunk for chunk, over several epochs; another accumulation is another batch, too."""
    orders, real = {}, pretraining.Pretraining.sequences

    def sequences(task, epoch, index):
        found = real(task, epoch, index)
        orders[task.run.options.save_dir.name] += found.tolist()
        return found

    monkeypatch.setattr(pretraining.Pretraining, "sequences", sequences)
    for name, words in (
        ("four", ""),
        ("six", "--pretrain_batch_size 3 --gradient_accumulation_steps 2"),
        ("one", "--pretrain_batch_size 1 --max_steps 30"),
    ):
        orders[name] = []
        pretrain(f"{WEIGHTS} {words} --epochs 3 --save_dir {name}")
    assert len(orders["four"]) > 300 and orders["four"] == orders["six"]
    assert orders["one"] == orders["four"][:30]
    part = len(orders["four"]) // 3  # an epoch is another one each time
    assert len({*map(tuple, (orders["four"][at : at + part] for at in (0, part, 2 * part)))}) == 3


def test_two_processes_train_what_one_does():
    """The same chunks in each step, so the same losses to rounding; those by source, too."""
    line = (
        f"{WEIGHTS} --pretrain_batch_size 2 --global_batch_size 8 --max_steps 9 --eval_interval 4"
    )
    pretrain(f"{line} --save_dir alone")
    words = ["--option", "pretrain", *SMALL, *line.split()]
    output = several.run(2, words)
    assert output.count("reviews.jsonl: val loss") == 3, "rank 0 alone prints"
    for one, two in zip(untimed("alone"), untimed("run"), strict=True):
        for key in ("step", "tokens", "lr"):
            assert one[key] == two[key]
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert (one["val_loss"] is None) == (two["val_loss"] is None)
        for key in ("val_loss_by_source", "bits_per_byte_by_source") if one["val_loss"] else ():
            assert one[key] == pytest.approx(two[key], abs=1e-5)
    resumed = pretrain(f"{line} --max_steps 12 --resume auto")  # by one what two have saved
    assert resumed.status == 0 and len(untimed()) == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data_weights 1 1", "--data_weights 1.0 1.0 differs from the checkpoint's 3.0 1.0:"),
        ("--pretrain_data stories/a.jsonl stories/b.jsonl reviews.jsonl --data_weights 3 1 1",
         "--data_weights 3.0 1.0 1.0 differs from the checkpoint's 3.0 1.0"),
        ("--data_weights 1 1 1", "and --pretrain_data names 2 sources"),
        ("--val_fraction 0.2", "training tokens"),
    ],
)  # fmt: skip
def test_other_weights_are_another_run(words, message):
    """Told by name before anything is trained; those of the run need not be typed again."""
    pretrain(f"{WEIGHTS} --max_steps 2")
    done = command(f"{RESUME} {words}")
    assert done.status == 2 and message in done.error
    assert command(f"{RESUME} --max_steps 3").status == 0 and len(records()) == 3


def test_weights_given_to_a_run_without_any_are_refused():
    """They would give it another order from there on."""
    pretrain(f"{SOURCES} --max_steps 2")
    done = command(f"{RESUME} --data_weights 3 1")
    assert (
        done.status == 2
        and "--data_weights 3.0 1.0 differs from the checkpoint's None" in done.error
    )


@pytest.mark.parametrize("words", ["--minutes 0.1", "--val_fraction 0", "--dedup"])
def test_other_flags_go_with_weights(words):
    """A time to keep to, nothing held out, duplicates dropped."""
    done = pretrain(f"{WEIGHTS} {words} --max_steps 3 --save_dir other")
    assert "\nsources      stories: " in done.out
    told = "reviews.jsonl: val loss" in done.out
    assert told == (words != "--val_fraction 0")


# ---------------------------------------------------------------------------- measured by source


def loss_by_hand(model, documents: list[str], length: int) -> tuple[float, int]:
    """Summed nats and count over a source's tokens, from logits; BOS is no target."""
    tokenizer = Tokenizer()
    ids = [i for text in documents for i in tokenizer.encode(text, True, True)]
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, length):
        chunk = torch.tensor(ids[start : start + length + 1])
        logits = model(chunk[None, :-1], chunk[None, 1:])[0][0].double()
        for row, target in zip(logits.log_softmax(-1), chunk[1:], strict=True):
            if target != tokenizer.bos_id:
                total, count = total - float(row[target]), count + 1
    return total, count


def texts_in(path: str) -> list[str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_the_loss_of_each_source_is_that_of_its_text():
    """Computed from the final model's logits and the files alone; the total is over all tokens."""
    pretrain(f"{WEIGHTS} --max_steps 6 --val_data stories-val.jsonl reviews-val.jsonl")
    record, model = untimed()[-1], load_pretrained("run/final-model.pt")
    sums = []
    for name in ("stories-val.jsonl", "reviews-val.jsonl"):
        documents = texts_in(name)
        with torch.no_grad():
            total, count = loss_by_hand(model, documents, 16)
        size = sum(len(text.encode()) for text in documents)
        sums.append((total, count, size))
        assert record["val_loss_by_source"][name] == pytest.approx(total / count, abs=1e-5)
        bits = total / math.log(2) / size
        assert record["bits_per_byte_by_source"][name] == pytest.approx(bits, abs=1e-5)
    total, count, size = map(sum, zip(*sums, strict=True))
    assert record["val_loss"] == pytest.approx(total / count, abs=1e-5)
    assert record["bits_per_byte"] == pytest.approx(total / math.log(2) / size, abs=1e-5)
    assert record["val_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_log_and_report_tell_the_loss_of_each_source():
    """In the terminal, as curves of the page, and in the plan what is read of each."""
    done = pretrain(f"{WEIGHTS} --max_steps 4 --eval_interval 2")
    last = untimed()[-1]
    for name in ("stories", "reviews.jsonl"):
        loss, bits = (last[f"{key}_by_source"][name] for key in ("val_loss", "bits_per_byte"))
        assert f"  {name}: val loss {loss:.4f}, bits per byte {bits:.4f}\n" in done.out
    columns = Curves(records()).to_plain()["evaluations"]
    assert columns["step"] == [2, 4]
    assert columns["val_loss, stories"][-1] == pytest.approx(
        last["val_loss_by_source"]["stories"], rel=1e-5
    )
    assert len(columns["bits_per_byte, reviews.jsonl"]) == 2
    assert "val_loss, reviews.jsonl" in Path("run/report.html").read_text(encoding="utf-8")
    start = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["starts"][-1]
    assert any(line.startswith("sources      stories: ") for line in start["plan"])


def test_a_source_that_is_read_far_more_often_is_told():
    """By counting how often chunks come; the weight that the warning names keeps what it says."""
    words = f"{SOURCES} --epochs 20 --plan"
    done = pretrain(f"{words} --data_weights 1 9")
    line = next(line for line in done.out.splitlines() if line.startswith("warning: reviews.jsonl"))
    often, seldom = (
        float(line.split(" is read ")[1].split()[0]),
        float(line.split("stories ")[1].split(":")[0]),
    )
    assert often > 4 * seldom and "9" in line
    weight = line.split("Its weight ")[1].split()[0]
    done = pretrain(f"{words} --data_weights 1 {weight}")
    times = [float(part.split(" times")[0]) for part in done.out.split("of those read: ")[1:3]]
    assert times[1] / times[0] == pytest.approx(plans.REREAD, rel=0.05)
    assert "warning: reviews" not in pretrain(f"{words} --data_weights 2 1").out
