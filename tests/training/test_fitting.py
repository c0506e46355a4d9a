"""What --minutes chooses."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import several
import torch
from running import RESUME, assert_same, command, records, write_stories
from tqdm import tqdm

from config import LlamaConfig, parse_options
from llama import load_pretrained
from minllama.machine.ranks import Ranks
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError
from minllama.system.signals import StopRequest
from minllama.text.corpus import Texts, find_texts, load_texts
from minllama.training import fitting
from minllama.training.deadline import Deadline
from minllama.training.fitting import (
    SHAPES,
    Speed,
    candidates,
    describe,
    fit,
    predicted_loss,
    untrained,
    with_recommended_decay,
)
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("empty_folder")
CPU = torch.device("cpu")
USUAL = Speed(1e-4, 1e-3)


def options_of(line: str = ""):
    """The options of a pretraining of ten minutes, in chunks of 32 tokens."""
    words = f"--option pretrain --minutes 10 --pretrain_data text.jsonl --cache_dir cache {line}"
    return parse_options(words.split())


@pytest.fixture
def texts() -> Texts:
    """A few stories, in chunks of 32 tokens."""
    write_stories(Path.cwd(), 40)
    options = options_of("--max_seq_len 32")
    return load_texts(options, find_texts(options), Tokenizer(), stop=StopRequest(), ranks=Ranks())


class Sized:
    """Stands for a text of so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.stream = range(tokens)


def fitted(texts: Texts, line: str = "", *, speed: Speed = USUAL, seconds: float = 590):
    """The choice for a small model of a given speed."""
    options = options_of(f"--max_seq_len 32 {line}")
    config = LlamaConfig(vocab_size=2048, dim=64, n_layers=2, n_heads=2, max_seq_len=32)
    return fit(options, config, speed, seconds, texts, CPU, 1)


def test_the_rule_is_that_of_the_sweep():
    """More parameters and more tokens help, each less and less; repeated ones less."""
    many = 10**9
    losses = [predicted_loss(size, 10**7, many) for size in (10**5, 10**6, 10**7)]
    assert losses[0] - losses[1] > losses[1] - losses[2] > 0
    losses = [predicted_loss(10**6, tokens, many) for tokens in (10**6, 10**7, 10**8)]
    assert losses[0] - losses[1] > losses[1] - losses[2] > 0
    new, four, forty = (predicted_loss(10**6, 4 * 10**7, n) for n in (many, 10**7, 10**6))
    assert 0 < four - new < 0.1 * (forty - new)
    at_20 = [predicted_loss(n, 20 * 214_000, 214_000) for n in (804_000, 1_770_000, 3_150_000)]
    assert at_20[1] < min(at_20[0], at_20[2])  # 4 x 128, 192 and 256 of a megabyte


def test_the_steps_fill_the_time(texts):
    """With their evaluations, which take at most about a twentieth of it."""
    for speed in (Speed(1e-4, 1e-3), Speed(1e-6, 1e-3), Speed(1e-2, 0.1)):
        found = fitted(dataclasses.replace(texts, train=Sized(10**9)), speed=speed)
        options, batch = found.options, found.options.global_batch_size * 32
        training = options.schedule_steps * (speed.token * batch + speed.update)
        assert 0.85 * 590 < training <= 590
        evaluations = -(-options.schedule_steps // options.eval_interval)
        assert 1 <= evaluations <= fitting.EVALUATIONS
        assert found.tokens == options.schedule_steps * batch


def test_a_longer_training_takes_larger_steps(texts):
    """As Step Law has it."""
    large = dataclasses.replace(texts, train=Sized(10**9))
    batches = [
        fitted(large, speed=Speed(token, 1e-4)).options.global_batch_size
        for token in (1e-2, 1e-4, 1e-6)
    ]
    assert batches == sorted(batches) and batches[0] < batches[-1]


def test_without_held_out_text_nothing_ends_the_run_early(texts):
    """The loss of a single step did, by chance: there was no other to look for a better one in."""
    found = fitted(dataclasses.replace(texts, val=None))
    assert found.options.early_stopping is None
    assert not any("early_stopping" in line for line in describe(found, options_of(), 1, 100))
    assert fitted(texts).options.early_stopping == fitting.PATIENCE


def test_what_was_typed_is_kept(texts):
    """Every flag that is chosen can be set by hand."""
    line = (
        "--pretrain_batch_size 3 --gradient_accumulation_steps 2 --optimizer adamw --dropout 0.3 "
        "--pretrain_lr 0.002 --lr_scheduler cosine --eval_interval 7 --early_stopping 9 "
        "--checkpoint_interval 11 --val_tokens 99"
    )
    typed, found = options_of(f"--max_seq_len 32 {line}"), fitted(texts, line).options
    for name in typed.given:
        assert getattr(found, name) == getattr(typed, name), name
    assert found.global_batch_size == 6 and found.schedule_steps
    assert len([*candidates(options_of("--dim 48"), fixed=False)]) == 1
    assert len([*candidates(options_of(), fixed=True)]) == 1
    assert len([*candidates(options_of(), fixed=False)]) == len(SHAPES)


def test_a_text_read_often_is_protected(texts):
    """Dropout where the time is long for the text, and an end before the text is known by heart.

    The speed was printed as if such a run took all of its time.
    """
    few, many = (fitted(texts, seconds=seconds) for seconds in (3, 3000))
    assert few.options.dropout == 0 < many.options.dropout
    assert many.options.early_stopping == fitting.PATIENCE
    assert many.tokens / len(texts.train.stream) < 1.1 * fitting.MAX_EPOCHS
    speed = 1 / (USUAL.token + USUAL.update / (32 * many.options.global_batch_size))
    assert f"at {tqdm.format_sizeof(speed)} tokens/s" in " ".join(
        describe(many, many.options, 1, 9)
    )


def test_a_decay_is_chosen_for_muon_from_scratch_alone():
    """A typed one stays, AdamW's, and that of a model that is trained on."""
    shape = LlamaConfig(dim=64, n_layers=3, n_heads=2, vocab_size=960, max_seq_len=256)

    def decay(line: str) -> float:
        options = parse_options(f"--option pretrain --max_seq_len 256 {line}".split())
        options = options.with_global_batch(1).with_recommended_lr(shape, continued=False)
        return with_recommended_decay(options, 40_000).weight_decay

    muon = decay("--epochs 6")
    assert muon == pytest.approx(decay("--epochs 3") * 2, rel=0.05) and muon > 0.3
    assert muon == decay("--schedule_steps 117")  # of 2,048 tokens
    assert muon == decay("--epochs 6 --pretrain_batch_size 4 --gradient_accumulation_steps 2")
    assert muon == pytest.approx(decay("--epochs 6 --pretrain_batch_size 16") / 2, rel=0.05)
    assert decay("--epochs 10") == decay("--epochs 40")
    assert decay("--epochs 6 --weight_decay 0.2") == 0.2
    for line in ("--optimizer adamw", "--pretrain_lr 0.01", "--pretrained_model_path model.pt"):
        assert decay(f"--epochs 6 {line}") == 0.1


def test_what_is_chosen_can_be_resumed(texts):
    """Without a held-out text --val_tokens 1 was chosen, which a checkpoint could not have."""
    options = fitted(dataclasses.replace(texts, val=None)).options
    assert options_of().resumed(options.to_plain()).schedule_steps == options.schedule_steps


def test_a_global_batch_that_was_typed_is_made_of_whole_micro_batches(texts):
    """16 rows were chosen beside a typed 24, and then refused."""
    large = dataclasses.replace(texts, train=Sized(10**9))
    for typed in (24, 7):
        options = fitted(large, f"--global_batch_size {typed}").options
        assert options.global_batch_size == typed and typed % options.pretrain_batch_size == 0


@pytest.mark.parametrize("line", ["--pretrain_batch_size 2", "--max_seq_len 8192"])
def test_steps_are_as_large_as_the_time_asks_for(texts, line):
    """The accumulation was that of the micro-batch that would have been chosen, not the typed one.

    A typed --pretrain_batch_size 2 made steps of a fraction of the wished size, and a context
    longer than a usual micro-batch's tokens made them twice as large.
    """
    large = dataclasses.replace(texts, train=Sized(10**9))
    context = 8192 if "8192" in line else 32
    fast = Speed(1e-7, 1e-4)
    tokens = fitted(large, speed=fast).options.global_batch_size * 32
    assert tokens > 8192
    assert fitted(large, line, speed=fast).options.global_batch_size * context == tokens


@pytest.mark.parametrize("largest, chosen", [(64, 64), (0, None)])
def test_a_shape_beyond_the_memory_of_one_rank_is_beyond_all(texts, largest, chosen, monkeypatch):
    """Of several ranks the error of one ended them all, with a traceback."""
    real = fitting.time_steps

    def time_steps(options, *rest):
        if options.dim > largest:
            raise torch.OutOfMemoryError
        return real(options, *rest)

    monkeypatch.setattr(fitting, "time_steps", time_steps)

    def on_rank(ranks: Ranks):
        settings = {"device": CPU, "dtype": torch.float32, "ranks": ranks}
        return fitting.fit_to_time(options_of("--max_seq_len 32"), texts, None, **settings)

    for found in several.on_threads(2, on_rank):
        if chosen is None:
            assert isinstance(found, UsageError) and "--dim 64" in str(found)
        else:
            assert found.dim == chosen


def test_minutes_alone_make_a_model():
    """From the plan to the last file; a resumed run finds the choices in its checkpoint."""
    write_stories(Path.cwd(), 60)
    line = "--option pretrain --minutes 0.1 --pretrain_data text.jsonl --cache_dir cache"
    line += " --save_dir run"
    done = command(f"{line} --plan")
    assert done.status == 0 and "minutes      0.1 in all" in done.out and "steps  " in done.out
    assert not Path("run/metrics.jsonl").exists()
    # On a fast machine it would end early, with fewer steps than the time's.
    done = command(f"{line} --compile off --early_stopping 99")
    assert done.status == 0, done.error
    assert "what would help most" in done.out
    made = records()
    assert made[-1]["lr"] < 0.5 * max(record["lr"] for record in made)
    assert made[-1]["val_loss"] < made[0]["loss"]
    done = command(f"{RESUME} --compile off")
    assert done.status == 0 and "--pretrained_model_path run" in done.out
    for flag in ("--epochs 9", "--schedule_steps 999"):
        done = command(f"{RESUME} --compile off {flag}")
        assert done.status == 2 and f"{flag}: the run to resume is as long as" in done.error
    again = RunFolder(Path("run"), "pretrain").repeating_words()
    assert "--minutes" not in again
    assert parse_options(again).schedule_steps == len(made)  # the time's, not the plan's


@pytest.mark.parametrize("moves", [False, True])
def test_the_command_that_repeats_a_run_of_minutes(moves, monkeypatch):
    """It had the steps that were planned, 401 of a run that made 374, and not all of the flags.

    A run whose end the clock did not move is repeated bit for bit.
    """
    write_stories(Path.cwd(), 60)
    monkeypatch.setattr(fitting, "SHAPES", [(16, 1, 2)])
    monkeypatch.setattr(fitting, "time_steps", lambda *_: Speed(1e-5, 0.1))  # some 40 steps
    monkeypatch.setattr(Deadline, "last_step", lambda self, _, end, __: 20 if moves else end)
    line = "--option pretrain --minutes 0.1 --pretrain_data text.jsonl --cache_dir cache"
    done = command(f"{line} --save_dir run --compile off")
    assert done.status == 0, done.error
    shown = done.out.split("instead of the clock:\n")[1].splitlines()[0]
    words = shlex.split(shown)[2:]
    assert words == RunFolder(Path("run"), "pretrain").repeating_words()
    folder = words[words.index("--save_dir") + 1]
    again = command(words)
    assert again.status == 0, again.error
    assert len(records(f"{folder}/metrics.jsonl")) == len(records())
    if not moves:
        one, other = (load_pretrained(f"{name}/final-model.pt") for name in ("run", folder))
        assert_same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    "line, problem",
    [
        ("--epochs 3", "--minutes and --epochs both say how long to train"),
        ("--schedule_steps 3", "--minutes and --schedule_steps both say how long to train"),
        ("--minutes 0", "--minutes"),
        ("--plan --world_size 8", "--minutes times steps on this machine"),
    ],
)
def test_contradictions_are_told(line, problem):
    """Before anything is read."""
    with pytest.raises((Exception, SystemExit), match=problem):
        options_of(line)


@pytest.mark.parametrize(
    "line, trained",
    [
        ("--option finetune", 5168),
        ("--option finetune --freeze_backbone", 64 * 16),
        ("--option finetune --lora_rank 2", 2 * (4 * (16 + 16) + 3 * (16 + 64))),
        ("--option pretrain --activation_checkpointing", 5168),
    ],
)
def test_what_is_timed_is_what_is_trained(line, trained):
    """The whole model's steps were, without recomputing: of a frozen one the plan's time was twice
    what it took, and with --activation_checkpointing two thirds of it."""
    config = LlamaConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, max_seq_len=32)
    options = parse_options(line.split())
    model = untrained(options, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert model.activation_checkpointing == options.activation_checkpointing
    speed = fitting.time_steps(options, config, (2, 8), CPU, torch.float32, 0.01)
    assert speed.token > 0 and speed.update > 0
