"""The four options as a user runs them, on small models and texts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import (
    RESUME,
    SMALL,
    assert_same,
    assert_same_run,
    command,
    pretrain,
    progress,
    records,
    steps,
    stop_after,
    write_labelled,
    write_model,
    write_stories,
)

import check_model_precision
import run_llama
from config import parse_options
from llama import load_pretrained
from minllama.formats.pt_file import load_pt, save_pt
from minllama.formats.pt_model import read_classifier
from minllama.inference import streaming
from minllama.runs.checkpoints import load_checkpoint
from minllama.system.signals import StopRequest
from minllama.training import pretraining
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, as a user would, with a text and no run in it."""
    monkeypatch.chdir(tmp_path)
    write_stories(tmp_path)


@pytest.fixture
def labelled(tmp_path) -> str:
    """Flags that name small labelled files: a word decides between three labels."""
    return write_labelled(tmp_path)


@pytest.fixture
def model(tmp_path) -> Path:
    """A small model with the embedded vocabulary."""
    return write_model(tmp_path)


@pytest.fixture
def finetune(model, labelled) -> str:
    """A finetuning that learns the toy labels within three epochs."""
    words = f"--option finetune --pretrained_model_path {model} {labelled} --save_dir run"
    return f"{words} --lr 0.01 --epochs 3 --dtype float32"


# ---------------------------------------------------------------------------- pretrain


def test_pretraining_leaves_all_it_promises():
    """Checkpoints, models, records and their page; each step once; the loss falls."""
    done = pretrain("--epochs 3")
    assert done.status == 0 and not done.error
    assert "chunks from text.jsonl" in done.out and "a sample of what it writes" in done.out
    assert "--option generate" in done.out and "check_model_precision.py" in done.out
    names = {path.name for path in Path("run").iterdir()} - {"run.lock"}
    assert names == {
        "pretrain-epoch-3.pt", "final-model.pt", "best-model.pt",
        "metrics.jsonl", "run.json", "report.html",
    }  # fmt: skip
    lines = records()
    assert steps() == list(range(1, 46)) and lines[-1]["epoch"] == 3
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["val_loss"] < math.log(2048)
    wanted = {"epoch", "tokens", "lr", "grad_norm", "tokens_per_second", "mfu", "memory", "elapsed"}
    assert wanted <= lines[0].keys()
    assert lines[-1]["val_perplexity"] == pytest.approx(math.exp(lines[-1]["val_loss"]))
    assert f"{lines[-1]['val_perplexity']:.2f} after 45 steps" in done.out
    started = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["starts"][0]
    assert started["options"]["epochs"] == 3 and started["environment"]["torch"]
    for name in ("final-model.pt", "best-model.pt", "pretrain-epoch-3.pt"):
        assert load_pretrained(Path("run") / name).vocabulary == Tokenizer().model_bytes


def test_the_validation_figures_are_those_of_the_model():
    """Loss per token over all held-out text, whatever the batches, and per byte of it.

    BOS counted as a token to predict, which made the perplexity of short documents look lower.
    """
    assert pretrain("--max_steps 3 --val_data text.jsonl --pretrain_batch_size 7").status == 0
    model, tokenizer = load_pretrained("run/final-model.pt"), Tokenizer()
    texts = [json.loads(line)["text"] for line in Path("text.jsonl").read_text("utf-8").split("\n")
             if line]  # fmt: skip
    ids = [token for text in texts for token in tokenizer.encode(text, True, True)]
    total, targets = 0.0, 0
    for start in range(0, len(ids) - 1, 16):
        chunk = torch.tensor([ids[start : start + 17]])
        with torch.no_grad():
            logits = model.output(model.hidden_states(chunk[:, :-1]))[0]
        real = chunk[0, 1:] != tokenizer.bos_id  # after EOS it is certain
        loss = torch.nn.functional.cross_entropy(logits[real], chunk[0, 1:][real], reduction="sum")
        total, targets = total + loss.item(), targets + int(real.sum())
    last = records()[-1]
    assert last["val_loss"] == pytest.approx(total / targets, rel=1e-5)
    size = sum(len(text.encode()) for text in texts)
    assert last["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_samples_are_written_while_it_trains_and_change_nothing():
    """After each validation the model continues the held-out text's first words, or what is given.

    Weights, optimizer and random state are bit for bit those of a run without samples.
    """
    words = "--epochs 1 --eval_interval 4 --dropout 0.3"
    assert pretrain(f"{words} --sample_tokens 0 --save_dir without").status == 0
    done = pretrain(words)
    lines = [line for line in records() if "sample" in line]
    assert lines == [line for line in records() if line["val_loss"] is not None]
    (start,) = re.findall("--prompt '(.+)'", done.out)
    assert len(start.split()) == 4 and start in Path("text.jsonl").read_text(encoding="utf-8")
    assert all(line["sample"].startswith(start) for line in lines)
    assert all(f"  {' '.join(line['sample'].split())}\n" in done.out for line in lines)
    assert len({line["sample"] for line in lines}) > 1
    state, other = (load_checkpoint(Path(f, "pretrain-epoch-1.pt")) for f in ("run", "without"))
    for part in ("model", "optimizer", "rng", "progress"):
        assert_same(state[part], other[part], part)
    assert not any("sample" in line for line in records("without/metrics.jsonl"))
    command(["--option", "pretrain", "--pretrain_data", "text.jsonl", *SMALL, "--sample_prompt",
             "The fox", "--max_steps", "1", "--save_dir", "given"])  # fmt: skip
    assert records("given/metrics.jsonl")[0]["sample"].startswith("The fox")


def test_ctrl_c_within_a_sample_saves_and_the_resumed_run_is_the_same(monkeypatch):
    """The sample is made again by the run that goes on."""
    assert pretrain("--epochs 1 --eval_interval 4 --save_dir whole").status == 0
    stop, real = StopRequest(), streaming.generate_tokens

    def generate_tokens(*arguments, **settings):
        for number, tokens in enumerate(real(*arguments, **settings)):
            stop.signal_number = signal.SIGINT if number else None
            yield tokens

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "generate_tokens", generate_tokens)
        assert pretrain("--epochs 1 --eval_interval 4", stop=stop).status == 130
    assert steps() == [1, 2, 3]
    assert command(RESUME).status == 0
    assert_same_run("whole", "run", "pretrain-epoch-1.pt")


def test_documents_apart_are_the_runs_own(monkeypatch):
    """Trained and evaluated with --document_mask, resumed with it untyped, alike bit for bit."""
    lines = [json.dumps({"text": f"The {who} ran home."}) for who in ("cat", "dog", "fox") * 30]
    Path("text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = "--epochs 1 --val_fraction 0.1 --save_dir"
    assert pretrain(f"{words} together").status == 0
    assert pretrain(f"{words} whole --document_mask").status == 0
    with monkeypatch.context() as patch:
        stop = stop_after(3, patch)
        assert pretrain(f"{words} parts --document_mask", stop=stop).status == 130
    assert command(RESUME.replace("save_dir run", "save_dir parts")).status == 0
    assert_same_run("whole", "parts", "pretrain-epoch-1.pt")
    first = [records(f"{folder}/metrics.jsonl")[0]["loss"] for folder in ("whole", "together")]
    last = [records(f"{folder}/metrics.jsonl")[-1]["val_loss"] for folder in ("whole", "together")]
    assert first[0] != first[1] and last[0] != last[1]


def test_a_batch_larger_than_the_data_trains():
    """`avg_loss = train_loss / num_batches` with no batches was a ZeroDivisionError."""
    Path("short.txt").write_text("Once there was a fox.", encoding="utf-8")
    done = pretrain("--pretrain_data short.txt --pretrain_batch_size 64")
    assert done.status == 0 and "one short chunk" in done.out and steps() == [1, 2, 3, 4, 5]
    assert "up to 64 sequences and there are 1" in done.out


def test_two_tokens_and_fewer():
    """The least that can be trained on is one token to read and one to predict."""
    Path("one.txt").write_text("a", encoding="utf-8")  # BOS, a, EOS
    assert pretrain("--pretrain_data one.txt --epochs 1").status == 0
    Path("empty.txt").write_text("", encoding="utf-8")
    done = pretrain("--pretrain_data empty.txt --overwrite")
    assert done.status == 2 and "empty.txt" in done.error


def test_the_weights_of_the_models_are_saved_in_their_dtype():
    """The checkpoint stays float32, so that the run resumes bit for bit."""
    assert pretrain("--max_steps 2 --save_dtype bfloat16").status == 0
    for name, dtype in (("final-model", torch.bfloat16), ("best-model", torch.bfloat16),
                        ("pretrain-step-2", torch.float32)):  # fmt: skip
        weights = load_pt(Path(f"run/{name}.pt"))["model"]
        assert {tensor.dtype for tensor in weights.values()} == {dtype}


def test_profile_shows_where_a_step_goes():
    """A trace for a viewer, a table, the share that waits for data; the run itself is unchanged."""
    done = pretrain("--max_steps 8 --profile")
    assert "profile of 5 steps of " in done.out and "waiting for data" in done.out
    assert "aten::mm" in done.out and "Self CPU" in done.out
    with gzip.open("run/profile.json.gz", "rt", encoding="utf-8") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"data", "forward and backward", "optimizer"} <= names
    profiled = load_pretrained(Path("run/final-model.pt")).state_dict()
    assert pretrain("--max_steps 8 --overwrite").status == 0
    assert not Path("run/profile.json.gz").exists()
    assert_same(dict(profiled), dict(load_pretrained(Path("run/final-model.pt")).state_dict()))
    done = pretrain("--overwrite --profile --max_steps 2")
    assert done.status == 0 and "has none to profile" in done.out


def test_the_plan_for_other_machines():
    """--world_size plans for GPUs that are not here."""
    words = "--plan --world_size 64 --model_size 7B --max_seq_len 1024 --parallel fsdp"
    done = command(f"--option pretrain --pretrain_data text.jsonl --cache_dir cache {words}")
    assert done.status == 0 and not Path("checkpoints").exists()
    for line in ("64 GPUs in 8 nodes", "989 TFLOP/s each", "per process (fsdp)", "MFU"):
        assert line in done.out
    assert "GB are free: try" not in done.out
    words = words.replace("fsdp", "ddp --gpu a100")
    done = command(f"--option pretrain --pretrain_data text.jsonl --cache_dir cache {words}")
    assert "80 GB are free: try" in done.out and "312 TFLOP/s each" in done.out
    assert "1 node," in pretrain("--plan --world_size 8").out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--pretrain_data missing.txt", ["--pretrain_data", "missing.txt"]),
        ("--pretrain_data data/sst-train.txt", ["python data/download.py sst"]),
        ("--pretrain_data bad.jsonl", ["bad.jsonl:2"]),
        ("--pretrain_data field.jsonl", ["field.jsonl:1", "text"]),
        ("--pretrain_data latin.txt", ["latin.txt:2", "--encoding cp1252"]),
        ("--tokenizer_model missing.model", ["--tokenizer_model", "missing.model"]),
        ("--save_dir file.txt", ["--save_dir", "file.txt"]),
        ("--cache_dir file.txt", ["file.txt"]),
        ("--resume nothing.pt", ["nothing.pt"]),
        ("--resume text.pt --save_dir .", ["text.pt: "]),
        ("--resume .", ["--resume .", "holds no pretrain checkpoint"]),
    ],
)
def test_bad_input_is_one_clear_line(line, words):
    """Exit status 2, the culprit named, no traceback, and no file of a run left behind."""
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n', encoding="utf-8")
    Path("field.jsonl").write_text('{"body": "a"}\n', encoding="utf-8")
    Path("latin.txt").write_bytes(b"good\nb\xe4d\n")
    Path("file.txt").write_text("a", encoding="utf-8")
    Path("text.pt").write_text("not a checkpoint", encoding="utf-8")
    done = pretrain(line)
    assert done.status == 2
    assert done.error.count("\n") == 1 and done.error.startswith("run_llama.py: error:")
    for word in words:
        assert word in done.error
    assert not list(Path("run").glob("*.pt")) and not Path("run/metrics.jsonl").exists()


def test_flags_that_are_not_read_are_said(finetune, model):
    """Before anything long: the run is not what its user thinks it is."""
    done = command(f"{finetune} --dropout 0.2 --plan")
    assert done.error.startswith("note: --dropout has no effect on --option finetune\n")
    words = "--prompt a --max_new_tokens 1 --dtype bfloat16 --epochs 2"
    done = command(f"--option generate --pretrained_model_path {model} {words}")
    assert "note: --dtype has no effect on --option generate" in done.error
    assert "note: --epochs has no effect on --option generate" in done.error


@pytest.mark.parametrize("option", ["pretrain", "generate"])
def test_several_processes_without_a_launcher_are_refused(option, monkeypatch):
    """Each process once trained apart, on its own part of the data."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = command(["--option", option, *SMALL])
    assert done.status == 2 and done.error.count("\n") == 1
    assert "WORLD_SIZE=2" in done.error and "torchrun" in done.error


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_a_real_signal_saves_and_the_run_resumes():
    """A signal in the middle of training saves within a step and names the command that resumes.

    A signal that comes during the evaluation after a step saves that step too, its record still to
    be completed: the test once took the last record for the last step, and failed now and then.
    """
    words = ["--option", "pretrain", "--pretrain_data", "text.jsonl", "--epochs", "500", *SMALL]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_llama.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    metrics = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "--resume auto" in out and "Traceback" not in out
    last = max(progress(str(path))["step"] for path in Path("run").glob("pretrain-step-*.pt"))
    assert last - steps()[-1] in (0, 1)
    assert command(f"{RESUME} --max_steps {last + 2}").status == 0
    assert steps() == list(range(1, last + 3))


# ---------------------------------------------------------------------------- finetune


MODES = ["", "--freeze_backbone", "--lora_rank 2", "--optimizer muon", "--pooling mean"]


@pytest.mark.parametrize("mode", MODES)
def test_finetuning_learns_and_writes_predictions(finetune, model, mode):
    """Each mode ends with figures, prediction files in the file's order, and an ordinary model."""
    done = command(f"{finetune} {mode}")
    assert done.status == 0 and not done.error
    for word in ("dev accuracy", "test accuracy", "macro-F1", "label \\ predicted"):
        assert word in done.out
    assert records("run/finetune-toy-metrics.jsonl")[-1]["dev_accuracy"] is not None
    for split in ("dev", "test"):
        written = Path(f"run/toy-{split}-finetuning-output.txt").read_text(encoding="utf-8")
        given = Path(f"toy-{split}.txt").read_text(encoding="utf-8")
        pairs = [[line.split(" ||| ") for line in text.splitlines()] for text in (written, given)]
        assert [line[1] for line in pairs[0]] == [line[1] for line in pairs[1]]
        hits = sum(line[0] == wanted[0] for line, wanted in zip(*pairs, strict=True))
        assert f"{split} accuracy {hits / len(pairs[0]):.3f}" in done.out
    tuned, before = load_pretrained("run/finetune-toy-best-model.pt"), load_pretrained(model)
    assert tuned.state_dict().keys() == before.state_dict().keys()
    pairs = zip(tuned.state_dict().values(), before.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) == (mode == "--freeze_backbone")
    if not mode:
        assert records("run/finetune-toy-metrics.jsonl")[-1]["dev_accuracy"] > 0.7


def test_a_test_file_without_labels_gets_predictions_alone(finetune):
    """-1 on every line: no accuracy is claimed."""
    lines = Path("toy-test.txt").read_text(encoding="utf-8").splitlines()
    unlabelled = [f"-1 ||| {line.split(' ||| ')[1]}" for line in lines]
    Path("toy-test.txt").write_text("\n".join(unlabelled) + "\n", encoding="utf-8")
    done = command(f"{finetune} --epochs 1")
    assert done.status == 0
    assert "test: unlabelled" in done.out and "test accuracy" not in done.out
    assert len(Path("run/toy-test-finetuning-output.txt").read_text("utf-8").splitlines()) == 9


def test_a_finetuning_checkpoint_is_a_model_file(finetune):
    """Its tensors once had a prefix that --verify called damage and nothing could load."""
    assert command(f"{finetune} --epochs 1").status == 0
    path = "run/finetune-toy-epoch-1.pt"
    assert check_model_precision.main([path, "--verify"]) == 0
    assert load_pretrained(path).vocabulary == Tokenizer().model_bytes
    best = "run/finetune-toy-best-model.pt"
    assert check_model_precision.main([best, "--convert", "pt", "--output", "copy.pt"]) == 0
    assert load_pt(Path("copy.pt"))["label_names"] == ["awful", "average", "excellent"]


def test_a_finetuning_goes_on_with_its_pooling(finetune):
    """A checkpoint of before there were two says nothing and read the last token's state."""
    assert "pooling      last" in command(f"{finetune} --max_steps 1").out
    path = next(Path("run").glob("finetune-toy-step-*.pt"))
    checkpoint = load_pt(path)
    assert checkpoint["identity"].pop("--pooling") == "last"
    save_pt(path, checkpoint)
    refused = command(f"{finetune} --max_steps 2 --resume auto --pooling mean")
    assert (
        refused.status == 2 and "--pooling mean differs from the checkpoint's last" in refused.error
    )
    assert command(f"{finetune} --max_steps 2 --resume auto").status == 0


def test_the_embedded_reviews_need_no_flag():
    """`--option finetune` alone: plan, data and the shipped model are there."""
    done = command("--option finetune --plan")
    assert done.status == 0 and "reviews-train.txt (train)" in done.out
    assert "using" in done.out and "steps" in done.out and not Path("checkpoints").exists()


def test_outputs_that_cannot_be_written_are_found_first(finetune):
    """The original checked its output names after training."""
    Path("folder").mkdir()
    done = command(f"{finetune} --dev_out folder")
    assert done.status == 2 and "--dev_out folder" in done.error and not Path("run").exists()


def test_interrupted_while_predicting_the_model_is_kept(finetune, monkeypatch):
    """The training is done and saved: the same command with --resume auto writes the files."""
    stop, real = StopRequest(), run_llama.Classification.load_weights

    def load_weights(task, path):
        real(task, path)
        stop.signal_number = signal.SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(run_llama.Classification, "load_weights", load_weights)
        done = command(f"{finetune} --epochs 1", stop=stop)
    assert done.status == 130 and "--resume auto" in done.out
    assert not Path("run/toy-dev-finetuning-output.txt").exists()
    assert command(f"{finetune} --epochs 1 --resume auto").status == 0
    assert Path("run/toy-dev-finetuning-output.txt").is_file()


def test_one_labelled_file_is_split_by_itself(finetune):
    """Without --dev it was refused. A resume holds the same ones out."""
    words = (
        "--option finetune --pretrained_model_path model.pt --train toy-train.txt --save_dir one"
    )
    done = command(f"{words} --val_fraction 0.2 --max_steps 2 --dev_out dev.jsonl")
    assert done.status == 0 and "12 of the sentences held out" in done.out, done.error
    rows = [json.loads(line) for line in Path("dev.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 12 and all(f"{r['gold']} ||| {r['sentence']}" for r in rows)
    resumed = f"{words} --max_steps 3 --resume auto"
    refused = command(f"{resumed} --dev toy-dev.txt")
    assert refused.status == 2 and "held out of --train (--dev, --val_fraction)" in refused.error
    assert "12 of the sentences held out" in command(resumed).out
    refused = command(f"{resumed} --val_fraction 0.5")
    assert refused.status == 2 and "held out of --train (--dev, --val_fraction)" in refused.error


def test_the_probabilities_of_each_class(finetune):
    """As the model gives them to one sentence alone, whatever the batch; --option prompt's, too."""
    done = command(f"{finetune} --max_steps 2 --dev_out dev.csv --test_out test.jsonl")
    assert done.status == 0, done.error
    model = "run/finetune-toy-best-model.pt"
    again = f"--option prompt --pretrained_model_path {model} --dev toy-dev.txt --dev_out"
    assert command(f"{again} again.csv --batch_size 2").status == 0
    classifier = read_classifier(Path(model))
    llama, tokenizer = load_pretrained(model), Tokenizer()
    rows, rows_again = (
        list(csv.DictReader(Path(name).read_text("utf-8").splitlines()))
        for name in ("dev.csv", "again.csv")
    )
    assert len(rows) == len(rows_again) == 21
    for row, other in zip(rows, rows_again, strict=True):
        ids = torch.tensor([tokenizer.encode(row["sentence"], bos=True, eos=False)])
        with torch.inference_mode():
            state = llama(ids)[1][0, -1]
        p = torch.softmax(classifier.head["weight"] @ state + classifier.head["bias"], -1)
        for name, expected in zip(classifier.label_names, p.tolist(), strict=True):
            assert float(row[f"p_{name}"]) == pytest.approx(expected, abs=2e-6)
            assert float(other[f"p_{name}"]) == pytest.approx(expected, abs=2e-6)
        assert row["class"] == classifier.label_names[int(row["prediction"])]
        assert row["prediction"] == str(p.argmax().item())
    assert len(Path("test.jsonl").read_text("utf-8").splitlines()) == 9


# ---------------------------------------------------------------------------- prompt


def test_prompting_writes_predictions_and_figures(model, labelled):
    """In the files' order, on dev and test; nothing is trained."""
    done = command(f"--option prompt --pretrained_model_path {model} {labelled}")
    assert done.status == 0 and "dev accuracy" in done.out and "test accuracy" in done.out
    written = Path("checkpoints/toy-dev-prompting-output.txt")
    lines = written.read_text(encoding="utf-8").splitlines()
    given = Path("toy-dev.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ||| ")[1] for line in lines] == [s.split(" ||| ")[1] for s in given]
    assert {line.split(" ||| ")[0] for line in lines} <= {"0", "1", "2"}
    assert {path.suffix for path in Path("checkpoints").iterdir()} == {".txt"}


def test_sentences_alone_are_prompted_with(model, labelled):
    """--label_names and --test are all that zero-shot reads; it asked for two more files."""
    Path("plain.txt").write_text("The film is good.\nThe film is bad.\n", encoding="utf-8")
    words = f"--option prompt --pretrained_model_path {model} --test plain.txt --test_out out.jsonl"
    done = command(f"{words} --label_names toy-label-mapping.json --label_norm sum")
    assert done.status == 0 and "unlabelled (2 sentences)" in done.out, done.error
    rows = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    probabilities = [[row[f"p_{n}"] for n in ("awful", "average", "excellent")] for row in rows]
    assert [sum(p) for p in probabilities] == pytest.approx([1, 1], abs=2e-6)
    for row, p in zip(rows, probabilities, strict=True):
        assert row["gold"] is None and p.index(max(p)) == int(row["prediction"])
    done = command(f"{words} --label_names toy-label-mapping.json --shots 1")
    assert done.status == 2 and "--shots 1 needs --train" in done.error


def test_predictions_never_replace_an_input(model, labelled):
    """`--dev X --dev_out X` once overwrote the labels with predictions."""
    before = Path("toy-dev.txt").read_bytes()
    words = f"--option prompt --pretrained_model_path {model} {labelled} --dev_out toy-dev.txt"
    done = command(words)
    assert done.status == 2 and "--dev_out toy-dev.txt" in done.error
    assert Path("toy-dev.txt").read_bytes() == before


def test_sentences_that_were_cut_are_counted(model, labelled):
    """CFIMDB's reviews, cut to a small model's context, once looked as if they had been read."""
    long = "0 ||| bad " + "very " * 40 + "bad\n1 ||| good\n2 ||| fine\n"
    Path("toy-dev.txt").write_text(long, encoding="utf-8")
    words = f"--pretrained_model_path {model} --train toy-train.txt --dev toy-dev.txt"
    done = command(f"--option prompt {words} --max_sentence_len 20")
    assert "dev: 1 of 3 sentences were cut" in done.error
    done = command(f"--option finetune --plan {words} --max_sentence_len 20")
    assert "Loaded 3 sentences from toy-dev.txt (dev), 1 of them cut to 20 tokens" in done.out
    assert "cut" not in command(f"--option finetune --plan {words}").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shots 61", "--shots 61: --train toy-train.txt has 60 examples"),
        ("--shots 60", "--prompt_template and --shots take more than the model's context"),
        ("--label_names twice.json", "--label_names twice.json: 'good'"),
        ("--label_names folder", "folder"),
    ],
)
def test_labels_and_examples_that_cannot_be(model, labelled, words, message):
    """More shots than lines were once as many as there are; a name given twice was scored twice."""
    Path("twice.json").write_text('["good", "good", "bad"]', encoding="utf-8")
    Path("folder").mkdir()
    done = command(f"--option prompt --pretrained_model_path {model} {labelled} {words}")
    assert done.status == 2 and message in done.error and done.error.count("error: ") == 1


def test_a_newline_can_be_typed_in_a_template(model, labelled, monkeypatch):
    """A shell hands over the two characters; the prompt once had a backslash in it."""
    seen, real = [], run_llama.Prompts.text
    monkeypatch.setattr(
        run_llama.Prompts, "text", lambda self, s: seen.append(real(self, s)) or seen[-1]
    )
    words = f"--option prompt --pretrained_model_path {model} {labelled} --prompt_template"
    assert command([*words.split(), "{sentence}\\nIt is"]).status == 0
    assert "The film number 0 is awful .\nIt is" in seen


def test_interrupted_prompting_leaves_no_half_file(model, labelled):
    """There is nothing to save, and that is said."""
    words = f"--option prompt --pretrained_model_path {model} {labelled}"
    done = command(words, stop=StopRequest(signal_number=signal.SIGINT))
    assert done.status == 130 and "nothing to save" in done.error
    assert not Path("checkpoints/toy-dev-prompting-output.txt").exists()


# ---------------------------------------------------------------------------- generate


def test_generate_without_flags_is_the_original(model):
    """Two files, the assignment's prefix, temperature 0 and 1."""
    done = command(f"--option generate --pretrained-model-path {model} --max_new_tokens 9")
    assert done.status == 0
    assert "Temperature is 0" in done.error and "Temperature is 1" in done.error
    texts = ""
    for number in (0, 1):
        path = Path(f"generated-sentence-temp-{number}.txt")
        texts += path.read_text(encoding="utf-8") + "\n"
        assert f"Wrote generated sentence to {path}." in done.error
    assert texts.count(run_llama.PREFIX) == 2
    assert done.out == texts  # `> story.txt` once held the device, the model's path and more


def test_interrupted_generation_leaves_the_files_as_they_were(model):
    """Ctrl-C once replaced both whole texts by what had been written of the new ones."""
    Path("generated-sentence-temp-0.txt").write_text("whole", encoding="utf-8")
    stop = StopRequest(signal_number=signal.SIGINT)
    done = command(f"--option generate --pretrained_model_path {model}", stop=stop)
    assert done.status == 130
    assert Path("generated-sentence-temp-0.txt").read_text(encoding="utf-8") == "whole"


def test_the_two_texts_need_a_file_each(model):
    """The one at temperature 1 overwrote the other."""
    flags = "--generated_sentence_low_temp_out a.txt --generated_sentence_high_temp_out ./a.txt"
    done = command(f"--option generate --pretrained_model_path {model} {flags}")
    assert done.status == 2 and "a.txt: is --generated_sentence_low_temp_out, too" in done.error
    assert not Path("a.txt").exists()


def test_prompts_from_a_file_are_those_typed(model):
    """A line each, blank ones left out; the default files are not written then."""
    Path("prompts.txt").write_text("One day\n\nThe fox\n", encoding="utf-8")
    base = f"--option generate --pretrained_model_path {model} --max_new_tokens 5".split()
    typed = command([*base, "--prompt", "One day", "--prompt", "The fox"])
    from_file = command([*base, "--prompt_file", "prompts.txt"])
    assert typed.status == from_file.status == 0 and typed.out == from_file.out
    assert "--- 2 of 2\nThe fox" in typed.out and not list(Path.cwd().glob("generated-*"))
    # Of a folder or a glob the first file was read, and no other.
    for number, text in enumerate(["One day", "The fox"]):
        Path("many").mkdir(exist_ok=True)
        Path(f"many/{number}.txt").write_text(text, encoding="utf-8")
    for name in ("many", "many/*.txt"):
        assert command([*base, "--prompt_file", name]).out == typed.out
    Path("prompts.txt").write_text("\n", encoding="utf-8")
    done = command([*base, "--prompt_file", "prompts.txt"])
    assert done.status == 2 and "prompts.txt: is empty" in done.error


def test_many_prompts_are_continued_batch_by_batch(model):
    """A file of ten thousand lines once was one batch, and did not fit the memory."""
    prompts = [word for i in range(5) for word in ("--prompt", f"{'One day ' * i}the fox")]
    base = f"--option generate --pretrained_model_path {model} --max_new_tokens 5 --num_samples 2"
    at_once = command([*base.split(), *prompts])
    in_parts = command([*base.split(), *prompts, "--batch_size", "2"])
    assert in_parts.status == 0 and in_parts.out == at_once.out
    assert "--- 10 of 10\n" in in_parts.out


def test_samples_count_as_rows_of_a_batch(model, monkeypatch):
    """--batch_size counted prompts alone: eight of them, sampled 20 times, were 160 rows at once.

    The samples of one prompt stay together, however many they are.
    """
    rows, real = [], streaming.generate_tokens

    def generate_tokens(llama, prompts, **settings):
        rows.append(len(prompts))
        return real(llama, prompts, **settings)

    monkeypatch.setattr(streaming, "generate_tokens", generate_tokens)
    prompts = [word for i in range(5) for word in ("--prompt", f"Number {i}")]
    base = f"--option generate --pretrained_model_path {model} --max_new_tokens 2 --batch_size 4"
    for samples, batches in ((2, [4, 4, 2]), (3, [3] * 5), (5, [5] * 5), (1, [4, 1])):
        done = command([*base.split(), *prompts, "--num_samples", str(samples)])
        assert done.status == 0 and f"--- 1 of {5 * samples}\n" in done.out
        assert rows == batches
        rows.clear()


def test_typed_prompts_are_continued_until_the_end_of_input(model, monkeypatch):
    """Each as if it had been given alone; bytes that are no UTF-8 do not end the program."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("One day\nb\udce4d\n"))
    base = f"--option generate --pretrained_model_path {model} --max_new_tokens 5"
    done = command(f"{base} --interactive")
    assert done.status == 0 and "> One day" in done.out and "> b" in done.out
    alone = command([*base.split(), "--prompt", "One day"]).out.splitlines()[-1]
    assert f"> {alone}\n" in done.out


def test_packed_weights_and_a_compiled_step_are_what_is_generated_with(model, monkeypatch):
    """Each changes what computes, and greedily, on a small model, not what is written."""
    packed, calls = [], []
    pack, step = run_llama.pack_weights, run_llama.compile_step.__globals__["decode_step"]

    def compile_step(device: str):
        return lambda *args, **key: calls.append(len(args[1])) or step(*args, **key)

    monkeypatch.setattr(run_llama, "compile_step", compile_step)
    monkeypatch.setattr(run_llama, "check_compiler", lambda device: None)
    monkeypatch.setattr(
        run_llama,
        "pack_weights",
        lambda llama, dtype, **how: packed.append((dtype, *how.values())) or pack(llama, dtype),
    )
    base = f"--option generate --pretrained_model_path {model} --temperature 0".split()
    base += ["--prompt", "One day", "--max_new_tokens", "9"]
    texts = []
    two = ["--prompt", "She"]
    for words in ("", "--compile on", "--weights bfloat16", "--weights int8", "--compile on"):
        done = command([*base, *(two if len(texts) == 4 else []), *words.split()])
        assert done.status == 0
        texts.append(done.out.splitlines()[-1])
    assert packed == [
        (torch.float32, 1, False), (torch.float32, 1, True), (torch.bfloat16, 1, False),
        (torch.int8, 1, False), (torch.float32, 2, True),
    ]  # fmt: skip
    # One to compile with, then 8: the first token came with the prompt.
    assert calls == [1] * 9 + [2] * 9
    assert texts[1] == texts[0] and texts[0].startswith("One day")


def test_the_shipped_model_writes_stories():
    """What the bare command does in a fresh checkout, with its own vocabulary."""
    words = ["--prompt", "Once upon a time", "--max_new_tokens", "8", "--temperature", "0"]
    done = command(["--option", "generate", *words])
    assert done.status == 0 and "stories-tiny.pt" in done.error
    assert len(done.out.splitlines()[-1]) > len("Once upon a time") + 10


# ---------------------------------------------------------------------------- how it ends


def test_a_disk_error_is_one_line(monkeypatch):
    """Exit status 1 and the file's name, where a traceback was."""

    def full(*_):
        raise OSError(28, "No space left on device", "run/x")

    monkeypatch.setattr(pretraining, "load_texts", lambda *_, **__: full())
    done = pretrain("")
    assert done.status == 1
    assert done.error == "run_llama.py: error: run/x: No space left on device\n"


def test_a_bug_shows(monkeypatch):
    """What nobody foresaw must end in its traceback, not in a line that hides it."""
    monkeypatch.setattr(pretraining, "load_texts", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain("")


def test_main_takes_options_as_they_are(capsys):
    """For those who call it from Python; at the end of a run it shows what the model writes."""
    words = ["--option", "pretrain", "--pretrain_data", "text.jsonl", *SMALL, "--max_steps", "1"]
    assert run_llama.main(parse_options(words)) == 0
    sample = capsys.readouterr().out.split("a sample of what it writes:\n")[1].split("\n\n")[0]
    assert sample.split() and records()[0]["mfu"] > 0


@pytest.mark.parametrize("per_line", [False, True])
def test_the_last_sample_continues_the_opening_of_a_long_text(per_line, capsys, monkeypatch):
    """A model of one document has seen one beginning: of BOS alone its sample was noise, where any
    prompt gave sentences."""
    prompts = []
    monkeypatch.setattr(
        pretraining, "sample_text", lambda m, t, prompt, **_: prompts.append(prompt)
    )
    Path("long.txt").write_text("One day a fox met a bear in the forest.\n" * 150, encoding="utf-8")
    words = [*SMALL, "--max_steps", "1", "--sample_tokens", "0", "--val_fraction", "0"]
    words += ["--document_per_line"] * per_line
    words = ["--option", "pretrain", "--pretrain_data", "long.txt", *words]
    assert run_llama.main(parse_options(words)) == 0
    assert prompts == (["" if per_line else "One day a fox"])


@pytest.mark.usefixtures("empty_folder")
def test_int8_is_refused_where_it_is_slower(monkeypatch):
    """On a GPU its weights would be cast at every token; before a model is read."""
    monkeypatch.setattr(run_llama, "choose_device", lambda use_gpu: (torch.device("cuda"), "a GPU"))
    done = command("--option generate --prompt One --weights int8 --use_gpu")
    assert done.status == 2 and "--use_gpu give --weights bfloat16" in done.error


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_not_utf8_are_as_good_as_others(tmp_path):
    """Chinese names from a zip are GBK: shown as `????`, in commands to be pasted and the report,
    too, and an encoding error at a run's end.
    """
    name = b"\xb2\xe2\xca\xd4"
    text, folder, script = name + b".jsonl", name + b"-run", bytes(ROOT / "run_llama.py")
    (tmp_path / "text.jsonl").rename(os.fsdecode(text))
    words = [sys.executable, script, b"--option", b"pretrain", b"--pretrain_data", text]
    words += [*(word.encode() for word in SMALL), b"--save_dir", folder, b"--max_steps", b"2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"rror" not in done.stderr, done.stderr
    assert b"from \\xb2\\xe2\\xca\\xd4.jsonl\n" in done.stdout and b"stopped" not in done.stdout
    resumed = command([*map(os.fsdecode, words[2:-1]), "3", "--resume"])
    assert resumed.status == 0 and "made after step 2" in resumed.out
    page = (tmp_path / os.fsdecode(folder) / "report.html").read_text(encoding="utf-8")
    assert "<title>\\xb2\\xe2\\xca\\xd4-run</title>" in page and "udcb2" not in page
    record = json.loads((tmp_path / os.fsdecode(folder) / "run.json").read_text(encoding="utf-8"))
    assert os.fsencode(record["starts"][0]["options"]["save_dir"]) == folder
    # The command that is printed names the model by its bytes.
    lines = done.stdout.decode().splitlines()
    pasted = next(line for line in lines if "--option generate" in line)
    assert r"--pretrained_model_path $'\262\342\312\324-run/final-model.pt'" in pasted
    shell = subprocess.run(["bash", "-c", f"printf '%s\\0' {pasted}"], capture_output=True)
    _, _, *words = map(os.fsdecode, shell.stdout.split(b"\0")[:-1])
    generated = command([*words, "--max_new_tokens", "2"])
    assert generated.status == 0 and generated.out
