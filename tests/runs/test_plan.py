"""The arithmetic of a run: steps, memory, files, and what many GPUs would make of it."""

from __future__ import annotations

import dataclasses
import random

import pytest

from config import PRESETS, LlamaConfig, parse_options
from minllama.cli.console import human_size
from minllama.machine.gpus import Gpu
from minllama.runs import plan as plans
from minllama.runs.plan import Cluster, PlannedSource, TrainingPlan, warn_of_plan


def plan_of(**changes) -> TrainingPlan:
    """stories42M on SST, with other options or other sizes."""
    settings = {
        "config": LlamaConfig(),
        "trainable_parameters": 41_689_600,
        "muon_parameters": 0,
        "sequences": 249,
        "tokens": 254_455,
        "sequence_length": 1024,
        "logits_width": 32000,
        "sources": (),
        "world_size": 1,
        "dtype": "float32",
        "device": "cpu",
    }
    sizes = {name: changes.pop(name, value) for name, value in settings.items()}
    options = dataclasses.replace(
        parse_options(["--option", "pretrain", "--epochs", "100"]), **changes
    )
    return TrainingPlan(options.with_global_batch(sizes["world_size"]), **sizes)


def changed(plan: TrainingPlan, **changes) -> TrainingPlan:
    return dataclasses.replace(plan, options=dataclasses.replace(plan.options, **changes))


def test_an_epoch_has_at_least_one_step():
    """The old ZeroDivisionError: a batch larger than the data made an epoch of no batches."""
    assert plan_of(sequences=1, pretrain_batch_size=32).steps_per_epoch == 1
    assert plan_of(sequences=249).steps_per_epoch == 32  # 31 full steps and a short one


def test_steps_of_a_run():
    """--max_steps ends the run early and leaves the schedule as it is."""
    plan = plan_of(max_steps=50)
    assert (plan.schedule_steps, plan.last_step, plan.warmup_steps) == (3200, 50, 160)
    assert plan_of(gradient_accumulation_steps=4, world_size=2).options.global_batch_size == 64
    assert plan_of(warmup_steps=10).warmup_steps == 10
    assert plan_of(max_steps=10**6).last_step == 3200


@pytest.mark.parametrize(
    "line, said",
    [
        ("", "muon from scratch (else --optimizer adamw)"),
        ("--pretrain_lr 2e-5", "up to 2e-05, then cosine to 0; adamw since --pretrain_lr is typed"),
        ("--pretrain_lr 1e-4 --optimizer muon", "up to 0.0001, then cosine to 0; muon, weight"),
        ("--pretrained_model_path a.pt", "adamw since it goes on from a model (else --optimizer"),
        ("--parallel fsdp", "adamw with --parallel fsdp, weight"),
    ],
)
def test_what_decided_the_optimizer_is_said(line, said):
    """A sweep of rates lost to the default: a typed one changed the optimizer without a word."""
    options = parse_options(["--option", "pretrain", *line.split()]).with_global_batch(1)
    lines = dataclasses.replace(plan_of(), options=options).lines(None)
    assert sum(said in line for line in lines) == 1


@pytest.mark.parametrize(
    "line, decay, said",
    [
        ("", 0.54, "weight decay 0.54 for a text of this size (else --weight_decay 0.1)"),
        ("", None, "weight decay 0.1"),
        ("--weight_decay 0.54", 0.54, "weight decay 0.54"),
        ("--resume auto", 0.54, "weight decay 0.54"),
    ],
)
def test_why_the_weight_decay_is_not_the_usual_one_is_said(line, decay, said):
    """0.54 stood there, and neither why nor how to have another one."""
    options = parse_options(["--option", "pretrain", *line.split()]).with_global_batch(1)
    options = dataclasses.replace(options, weight_decay=decay)
    lines = dataclasses.replace(plan_of(), options=options).lines(None)
    assert sum(text.endswith(said) for text in lines) == 1


def test_a_source_is_read_by_its_share(capsys):
    """By hand: half of a run's tokens, from a hundredth of the text, is that 50 times an epoch."""
    sources = (PlannedSource("wiki", 990_000, 0.5, 1.0), PlannedSource("code", 10_000, 0.5, 1.0))
    plan = plan_of(tokens=1_000_000, sequences=1000, sources=sources, epochs=2)
    reads = plan.source_reads()
    assert reads == pytest.approx([1_000_000 / 990_000, 100])
    lines = plan.lines(None)
    assert lines[3] == "sources      wiki: 990,000 tokens, 50.0% of those read: 1.01 times"
    assert lines[4] == "             code: 10,000 tokens, 50.0% of those read: 100 times"
    warn_of_plan(plan, None)
    assert "code is read 100 times and wiki 1.01" in capsys.readouterr().out
    warn_of_plan(changed(plan, max_steps=5), None)  # 4 times of one, 0.04 of the other
    assert "is read" not in capsys.readouterr().out
    assert plan_of().source_lines() == plan_of().source_reads() == []


def test_muon_keeps_one_number_where_adamw_keeps_two():
    """Memory and checkpoint shrink by one float32 number for each of Muon's parameters."""
    plan, muon = plan_of(), plan_of(muon_parameters=25_000_000)
    saved = 4 * 25_000_000
    assert plan.memory()["optimizer"] - muon.memory()["optimizer"] == saved
    assert plan.checkpoint_bytes() - muon.checkpoint_bytes() == saved


@pytest.mark.parametrize(
    ("changes", "epochs", "steps"),
    [
        ({}, 2, 3),  # after 50 and 100; after 1,000, 2,000 and, before the first goes, 3,000
        ({"keep_last": 0}, 2, 3),
        ({"keep_last": 1}, 2, 2),
        ({"checkpoint_interval": 0}, 2, 0),
        ({"save_interval": 1000}, 1, 3),  # the last is always kept
        ({"checkpoint_interval": 1600}, 2, 0),  # those of epochs, at the same steps
        ({"max_steps": 1500}, 0, 2),  # its end is no epoch's end
        ({"max_steps": 1500, "checkpoint_interval": 0}, 0, 1),
    ],
)
def test_the_plan_counts_the_files_there_will_be(changes, epochs, steps):
    """A run was refused for checkpoints that it would never have written."""
    plan = plan_of(**changes, save_dtype="float16")
    one, model = plan.checkpoint_bytes(), plan.weights_file_bytes("float16")
    assert [*plan.disk().values()][:3] == [epochs * one, steps * one, 3 * model]
    assert "disk         " in plan.lines(None)[-1] and "3 models" in plan.lines(None)[-1]


def checkpoints_counted_one_by_one(plan: TrainingPlan) -> tuple[int, int]:
    """Those of epochs and of steps, at their most: the oracle of the plan's arithmetic."""
    options, last, per_epoch = plan.options, plan.last_step, plan.steps_per_epoch
    save = options.save_interval * per_epoch
    epochs = {step for step in range(1, last + 1) if step % save == 0}
    epochs |= {last} if last % per_epoch == 0 else set()
    interval = options.checkpoint_interval or last
    steps = {step for step in range(1, last + 1) if step % interval == 0 or step == last} - epochs
    most = options.keep_last + 1 if options.keep_last else len(steps)
    return len(epochs), min(len(steps), most)


def test_checkpoints_are_counted_without_making_a_list_of_them():
    """Of 5 million steps with --checkpoint_interval 1 that took 560 MB and 4 seconds."""
    plan, rng = plan_of(), random.Random(0)
    size = plan.checkpoint_bytes()
    for _ in range(5000):
        case = changed(
            dataclasses.replace(plan, sequences=rng.randint(1, 12)),
            global_batch_size=rng.randint(1, 4),
            epochs=rng.randint(1, 8),
            schedule_steps=rng.choice([None, rng.randint(1, 60)]),
            max_steps=rng.choice([None, rng.randint(1, 60)]),
            save_interval=rng.randint(1, 9),
            checkpoint_interval=rng.randint(0, 20),
            keep_last=rng.choice([0, 0, 1, 2]),
        )
        epochs, steps, *_ = case.disk().values()
        assert (epochs // size, steps // size) == checkpoints_counted_one_by_one(case)
    long = changed(plan, schedule_steps=5 * 10**6, checkpoint_interval=1, keep_last=0)
    assert [*long.disk().values()][1] > 4.9e6 * size
    # As many steps as a faster machine makes of --minutes: one checkpoint was planned, two came.
    timed = changed(plan, schedule_steps=9, checkpoint_interval=10, minutes=1.0)
    assert [*timed.disk().values()][1] == (timed.options.keep_last + 1) * size


def test_the_flags_that_need_less_disk_are_those_that_do():
    """ "Name a folder on a larger one" helped nobody who has no other disk."""
    assert plan_of().flags_for_less_disk() == [
        "--keep_last 1", "--checkpoint_interval 0", "--save_interval 100", "--save_dtype bfloat16",
    ]  # fmt: skip
    small = plan_of(checkpoint_interval=0, save_interval=100, save_dtype="bfloat16")
    assert small.flags_for_less_disk() == []


def test_why_a_checkpoint_is_larger_than_a_model():
    """stories42M: weights once, tied, 167 MB; with AdamW's two moments 500 MB."""
    plan = plan_of()
    assert human_size(plan.weights_file_bytes("float32")) == "167 MB"
    assert human_size(plan.weights_file_bytes("bfloat16")) == "83.4 MB"
    assert human_size(plan.checkpoint_bytes()) == "500 MB"
    text = "\n".join(plan.lines(8 << 30))
    for word in ("41,689,600 parameters", "249 chunks", "32 per epoch", "167 MB", "8.59 GB"):
        assert word in text
    early = plan_of(max_steps=50).lines(None)
    assert "ended after 50 by --max_steps" in "\n".join(early)


def test_what_recomputing_saves():
    """Of all layers' activations one layer's and the residual stream between them are left."""
    plan = plan_of()
    less = changed(plan, activation_checkpointing=True)
    layers = plan.config.n_layers
    assert less.activation_bytes() < plan.activation_bytes() / (layers / 2)
    assert less.memory()["weights"] == plan.memory()["weights"]


SMALL = {"dim": 768, "n_layers": 12, "n_heads": 12, "max_seq_len": 1024}
LARGE = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "max_seq_len": 2048}


@pytest.mark.parametrize(
    "shape, vocabulary, batch, muon, measured",
    [
        (SMALL, 2048, 32, True, 13.1e9),  # its operations one by one; compiled 12.7
        (SMALL, 32000, 32, False, 13.45e9),
        (LARGE | {"hidden_dim": 5632}, 32000, 4, False, 27.19e9),
    ],
)
def test_memory_of_a_gpu_is_what_was_measured(
    shape: dict, vocabulary: int, batch: int, muon: bool, measured: float
):
    """Bytes allocated on an H200 at the peak. A tensor of a CPU's attention was once counted that a
    GPU's does not keep, and gradients beside the activations whose place they take."""
    config = LlamaConfig(vocab_size=vocabulary, **shape)
    plan = plan_of(
        config=config,
        device="cuda",
        dtype="bfloat16",
        pretrain_batch_size=batch,
        global_batch_size=batch,
        sequence_length=config.max_seq_len,
        logits_width=vocabulary,
        trainable_parameters=sum(config.parameter_counts().values()),
        muon_parameters=config.block_parameters()[0] if muon else 0,
    )
    memory = plan.memory()
    assert sum(memory.values()) - memory["process"] == pytest.approx(measured, rel=0.05)
    accumulated = changed(plan, global_batch_size=2 * batch).memory()
    assert sum(accumulated.values()) == sum(memory.values()) + accumulated["gradients"]


def test_compiling_is_for_long_runs():
    """The run's operations decide: not its name, and not how many steps an epoch has."""
    pays, why = plan_of().compiling_pays(120e9)
    assert pays and "would save about" in why
    assert not plan_of(epochs=1).compiling_pays(120e9)[0]
    assert not plan_of(max_steps=10).compiling_pays(120e9)[0]
    assert not plan_of().compiling_pays(60e12)[0]


def test_minutes_are_what_a_run_takes_on_a_cpu_too():
    """The steps of --minutes were timed, and an assumed speed said how long they would take."""
    for minutes, pays in ((12, False), (18, True)):
        assert plan_of(minutes=minutes, max_steps=10).compiling_pays(120e9)[0] is pays


def test_a_gpu_compiles_for_runs_of_minutes():
    """It compiled for the bare command, too, which is over sooner than the compiler."""
    on_gpu = {"device": "cuda", "dtype": "bfloat16"}
    small = LlamaConfig(vocab_size=2048, dim=128, n_layers=4, n_heads=2, max_seq_len=256)
    bare = plan_of(**on_gpu, config=small, sequences=9216, tokens=2_900_000, epochs=5)
    assert bare.last_step > 1000 and not bare.compiling_pays(0.28 * 989e12)[0]
    plan = plan_of(**on_gpu)
    seconds = plan.last_step * plan.step_seconds(0.28 * 989e12)
    assert seconds == pytest.approx(26, abs=0.5)  # of launches, not of products
    assert plan_of(**on_gpu, epochs=3000).compiling_pays(0.28 * 989e12)[0]
    for minutes, pays in ((6, False), (7, True)):
        assert changed(bare, minutes=minutes).compiling_pays(0.28 * 989e12)[0] is pays


@pytest.mark.parametrize(
    ("changes", "available", "said"),
    [
        ({}, 10**9, "1 GB are free: try --activation_checkpointing, a smaller batch"),
        ({"world_size": 2}, 10**9, "--parallel fsdp"),
        ({"max_steps": 100}, None, "warmup takes 160 steps (--warmup_steps)"),
        ({"pretrain_batch_size": 500}, None, "up to 500 sequences and there are 249"),
        ({}, 10**12, ""),
        ({}, None, ""),
    ],
)
def test_what_a_plan_cannot_do_is_said(changes, available, said, capsys):
    """Before the run: memory that is missing, a peak that is never reached, a batch too large."""
    warn_of_plan(plan_of(**changes), available)
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said)


def test_the_assignments_rate_is_noted_where_the_model_is_far_too_small_for_it(capsys):
    """2e-5 is for its model of 42 million parameters: one of a million learns nothing by it."""
    tiny = {"config": LlamaConfig(vocab_size=2048, **PRESETS["tiny"].shape), "option": "finetune"}
    for changes, note in (
        ({"option": "finetune"}, ""),
        (tiny, "note: --lr 2e-05 is 50 times below what suits the fine-tuning of so small a model"),
        (tiny | {"lr": 5e-4}, ""),
        (tiny | {"option": "pretrain", "pretrain_lr": 2e-5}, "2e-05 is 250 times below what suits"),
    ):
        warn_of_plan(plan_of(optimizer="adamw", **changes), None)
        out = capsys.readouterr().out
        assert note in out and ("times below" in out) == bool(note)


# ---------------------------------------------------------------------------- many GPUs

CLUSTER = Cluster(Gpu(1000, float32_tflops=500, memory_gb=80, link_gb_s=400))


@pytest.fixture(autouse=True)
def round_numbers(monkeypatch):
    """Half of the peak is reached, and 100 GB/s go between two machines."""
    monkeypatch.setattr(plans, "ASSUMED_MFU", 0.5)
    monkeypatch.setattr(plans, "INTER_NODE_GB_S", 100)


def plan_of_preset(name: str, **changes) -> TrainingPlan:
    config = parse_options(["--model_size", name, "--max_seq_len", "2048"]).llama_config(32000)
    whole = sum(config.parameter_counts().values())
    settings = {"config": config, "trainable_parameters": whole, "sequence_length": 2048}
    return plan_of(**settings | {"dtype": "bfloat16", "device": "cuda"} | changes)


def test_ddp_on_one_node_by_hand():
    """1.1B on 8 GPUs: a ring's all-reduce of float32 gradients, hidden behind the backward pass."""
    plan = plan_of_preset(
        "1.1B", world_size=8, pretrain_batch_size=8, gradient_accumulation_steps=2
    )
    assert CLUSTER.communicated_bytes(plan) == pytest.approx(2 * 7 / 8 * 4 * 1_100_048_384)
    assert CLUSTER.communication_seconds(plan) == pytest.approx(7.700e9 / 400e9, rel=1e-3)
    per_token = 6 * (1_100_048_384 - 65_536_000 - 45 * 2048) + 6 * 22 * 2048 * 2048
    compute = 8 * 2 * 2048 * per_token / 0.5e15
    assert CLUSTER.compute_seconds(plan) == pytest.approx(compute)
    assert CLUSTER.step_seconds(plan) == pytest.approx(compute)  # 0.44 s, against 0.02 of traffic
    again = changed(plan, activation_checkpointing=True)
    assert CLUSTER.compute_seconds(again) == pytest.approx(compute * 4 / 3)
    text = "\n".join(CLUSTER.lines(plan))
    assert f"{8 * 8 * 2 * 2048 / compute:,.0f} tokens/s" in text and "MFU 50.0%" in text


def test_ddp_waits_for_what_the_last_backward_pass_does_not_hide():
    """Slow links: two thirds of the last micro-batch's time hide the traffic, no more."""
    slow = Cluster(Gpu(1000, float32_tflops=500, memory_gb=80, link_gb_s=10))
    plan = plan_of_preset(
        "1.1B", world_size=2, pretrain_batch_size=1, gradient_accumulation_steps=4
    )
    compute, traffic = slow.compute_seconds(plan), 4 * 1_100_048_384 / 10e9
    assert slow.step_seconds(plan) == pytest.approx(compute + traffic - compute / 4 * 2 / 3)


def test_fsdp_on_eight_nodes_by_hand():
    """7B on 64: bfloat16 weights twice and float32 gradients once, for every micro-batch."""
    plan = plan_of_preset("7B", parallel="fsdp", world_size=64, gradient_accumulation_steps=2)
    around = 2 * 32000 * 4096 + 4096  # embedding, head and last norm: float32, once each way
    blocks = 6_738_415_616 - around
    each = 63 / 64 * ((2 + 2 + 4) * blocks + (4 + 4) * around)
    assert CLUSTER.communicated_bytes(plan) == pytest.approx(2 * each)
    traffic = CLUSTER.communication_seconds(plan)
    assert traffic == pytest.approx(2 * each / 100e9)  # between the nodes
    assert CLUSTER.step_seconds(plan) == max(CLUSTER.compute_seconds(plan), traffic)
    memory = plan.memory()
    sharded = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert sharded == pytest.approx(16 * 6_738_415_616 / 64, abs=8)
    assert memory["copies"] == blocks // 32 * (2 + 2 + 2 + 4) + around * (4 + 4)
    whole = changed(plan, parallel="ddp").memory()
    assert whole["weights"] + whole["optimizer"] == 12 * 6_738_415_616


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_gpu_communicates_with_nobody(parallel):
    """Neither way has anything to send to itself."""
    plan = plan_of_preset("1.1B", parallel=parallel, world_size=1)
    assert CLUSTER.communicated_bytes(plan) == 0
    assert CLUSTER.step_seconds(plan) == CLUSTER.compute_seconds(plan)
