"""The command line as a user meets it, and the arithmetic of shapes and plans."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config import (
    PRESETS,
    Cluster,
    LlamaConfig,
    Options,
    TrainingPlan,
    UsageError,
    find_idle_flags,
    human_size,
    human_time,
    parse_options,
)


def test_public_flags_are_these():
    """The command line is a contract: a flag that goes or changes its default breaks scripts."""
    options = parse_options([])
    assert (options.option, options.batch_size, options.lr) == ("generate", 8, 2e-5)
    assert (options.epochs, options.hidden_dropout_prob, options.seed) == (5, 0.3, 1337)
    assert options.max_sentence_len is None
    assert options.generated_sentence_low_temp_out.name == "generated-sentence-temp-0.txt"
    assert options.generated_sentence_high_temp_out.name == "generated-sentence-temp-1.txt"
    assert (options.max_seq_len, options.pretrain_batch_size) == (1024, 8)
    assert (options.gradient_accumulation_steps, options.save_interval) == (1, 50)
    assert options.save_dir.as_posix() == "checkpoints" and options.lr_scheduler == "cosine"


def test_the_stories_are_cut_into_shorter_chunks():
    """Chunks of 1,024 would hold five stories each and leave the bare command too few steps."""
    assert parse_options(["--option", "pretrain"]).max_seq_len == 256
    assert parse_options(["--option", "pretrain", "--max_seq_len", "64"]).max_seq_len == 64
    assert parse_options(["--option", "pretrain", "--pretrain_data", "x"]).max_seq_len == 1024


@pytest.mark.parametrize(
    "spelling", ["--pretrained_model_path", "--pretrained-model-path", "--pretrained-model_path"]
)
@pytest.mark.parametrize("joint", [" ", "="])
def test_underscores_and_hyphens_are_one(spelling, joint):
    """The original mixes `--label-names` with `--batch_size`; a value's hyphens stay."""
    options = parse_options(f"{spelling}{joint}my-model_file.pt".split(" "))
    assert options.pretrained_model_path.as_posix() == "my-model_file.pt"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "--pretrain_batch_size 6--gradient_accumulation_steps 4",
            ["--pretrain_batch_size", "space is missing before --gradient_accumulation_steps"],
        ),
        ("--pretrain_batch_size 0", ["--pretrain_batch_size", "0", "at least 1"]),
        ("--pretrain_batch_size -3", ["--pretrain_batch_size", "-3", "at least 1"]),
        ("--lr 0", ["--lr", "above 0"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--dropout 1", ["--dropout", "below 1"]),
        ("--epochs 1.5", ["--epochs", "1.5", "whole number"]),
        ("--option train", ["--option", "train", "pretrain"]),
        ("--sav_dir x", ["--sav_dir", "did you mean --save_dir?"]),
        ("pretrain", ["did you mean --option pretrain?"]),
        ("--option pretrain --dim 100 --n_heads 7", ["--dim 100", "--n_heads 7", "98"]),
        ("--option pretrain --n_heads 4 --n_kv_heads 3", ["--n_heads 4", "--n_kv_heads 3"]),
        ("--option pretrain --dim 12 --n_heads 4", ["--dim 12", "--n_heads 4", "even"]),
        ("--option pretrain --pretrain_lr 1e-5 --min_lr 1e-4", ["--min_lr", "--pretrain_lr"]),
        ("--option finetune --freeze_backbone --lora_rank 4", ["--freeze_backbone", "--lora_rank"]),
        (
            "--option finetune --freeze_backbone --optimizer muon",
            ["--freeze_backbone", "muon"],
        ),
        ("--option generate --profile", ["--profile", "pretrain"]),
        ("--option finetune --resume auto --overwrite", ["--resume", "--overwrite"]),
        ("--prompt_template hello", ["--prompt_template", "{sentence}"]),
        ("--prompt_template {sentence}{label}", ["{label} is not filled in", "{labels}"]),
        ("--top_p 1.5", ["--top_p", "1.5"]),
        ("--option generate --plan", ["--plan", "pretrain"]),
    ],
)
def test_bad_input_names_flag_value_and_remedy(line, words):
    """Each in one line; `6--gradient_accumulation_steps` was the user's missing space."""
    with pytest.raises(UsageError) as error:
        parse_options(line.split())
    for word in words:
        assert word in str(error.value)


def test_all_contradictions_are_told_at_once():
    """A user should not find them one run at a time."""
    with pytest.raises(UsageError) as error:
        words = "--option finetune --resume auto --overwrite --top_p 2"
        parse_options([*words.split(), *"--freeze_backbone --lora_rank 2".split()])
    assert len(str(error.value).splitlines()) == 3


def test_help_needs_no_torch():
    """`--help` and a wrong flag answer at once: the options load neither torch nor numpy."""
    code = (
        "import sys, config; config.build_parser(); assert not {'torch', 'numpy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    text = subprocess.run(
        [sys.executable, "run_llama.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for name in Options().to_plain():
        assert f"--{name}" in text


@pytest.mark.parametrize(
    "words",
    [
        "run_llama.py --help",
        "run_llama.py --no_such_flag",
        "check_model_precision.py --help",
        "check_model_precision.py --convert bin",
        "tokenizer.py train --help",
        "tokenizer.py train",
    ],
)
def test_what_the_parser_alone_can_answer_comes_before_torch(tmp_path, words):
    """`check_model_precision.py --help` once took two seconds, nearly all of them torch's."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')", encoding="utf-8")
    script, *arguments = words.split()
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert "torch was imported" not in done.stderr
    assert done.returncode == (0 if "--help" in words else 2)
    assert (f"{script}: error: " in done.stderr) == ("--help" not in words)


def test_options_become_plain_values():
    """What checkpoints and run.json hold can be read without this program's classes."""
    plain = parse_options("--pretrain_data a b --save_dir x/y".split()).to_plain()
    assert plain["pretrain_data"] == ["a", "b"] and plain["save_dir"] == "x/y"
    assert all(isinstance(v, str | int | float | list | None) for v in plain.values())


def test_presets_have_their_known_sizes():
    """stories42M and its siblings are llama2.c's shapes, 1.1B is TinyLlama's, 7B Llama-2's."""
    expected = {"stories15M": 15.2e6, "stories42M": 41.7e6, "stories110M": 109.5e6, "1.1B": 1.1e9}
    expected["7B"] = 6_738_415_616  # exactly Llama-2's
    for name, size in expected.items():
        options = parse_options(["--model_size", name])
        counts = options.llama_config(vocab_size=32000).parameter_counts()
        assert sum(counts.values()) == pytest.approx(size, rel=0.01)
    assert set(expected) | {"tiny"} == set(PRESETS)


def test_single_flags_change_a_preset():
    """A new width derives the rest again instead of keeping the preset's."""
    config = parse_options(
        "--model_size 1.1B --dim 1024 --n_heads 16 --max_seq_len 64".split()
    ).llama_config(500)
    assert (config.dim, config.n_kv_heads, config.max_seq_len) == (1024, 16, 64)
    assert config.hidden_dim == 2752 and config.vocab_size == 500


def test_model_args_of_other_programs():
    """llama2.c's `norm_eps`, the original's extra keys, and what either leaves out."""
    config = LlamaConfig.from_model_args(
        {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "position_embedding_type": "x"}
    )
    assert config.layer_norm_eps == 1e-6 and config.n_kv_heads == 4
    assert LlamaConfig.from_model_args(config.to_model_args()) == config


def plan_of(**changes) -> TrainingPlan:
    settings = {
        "config": LlamaConfig(),
        "trainable_parameters": 41_689_600,
        "muon_parameters": 0,
        "sequences": 249,
        "tokens": 254_455,
        "sequence_length": 1024,
        "logits_width": 32000,
        "micro_batch_size": 8,
        "accumulation_steps": 1,
        "world_size": 1,
        "epochs": 100,
        "max_steps": None,
        "warmup_steps_given": None,
        "dtype": "float32",
        "device": "cpu",
        "keep_last": 2,
        "checkpoints_kept": 3,
        "activation_checkpointing": False,
    }
    return TrainingPlan(**settings | changes)


def test_an_epoch_has_at_least_one_step():
    """The old ZeroDivisionError: a batch larger than the data made an epoch of no batches."""
    assert plan_of(sequences=1, micro_batch_size=32).steps_per_epoch == 1
    assert plan_of(sequences=249).steps_per_epoch == 32  # 31 full steps and a short one


def test_plan_arithmetic():
    """--max_steps ends the run early and leaves the schedule as it is."""
    plan = plan_of(max_steps=50)
    assert (plan.schedule_steps, plan.last_step, plan.warmup_steps) == (3200, 50, 160)
    assert plan_of(accumulation_steps=4, world_size=2).sequences_per_step == 64
    assert plan_of(warmup_steps_given=10).warmup_steps == 10


def test_muon_keeps_one_number_where_adamw_keeps_two():
    """Memory and checkpoint shrink by one float32 number for each of Muon's parameters."""
    plan, muon = plan_of(), plan_of(muon_parameters=25_000_000)
    saved = 4 * 25_000_000
    assert plan.memory()["optimizer"] - muon.memory()["optimizer"] == saved
    assert plan.checkpoint_bytes() - muon.checkpoint_bytes() == saved


def test_plan_counts_every_file_that_will_stand():
    """Three epochs' checkpoints, two of steps, and one that is being replaced."""
    plan = plan_of()
    expected = 6 * plan.checkpoint_bytes() + 3 * plan.weights_file_bytes("float16")
    assert plan.disk_bytes("float16") == expected


def test_flags_of_another_option_are_told():
    """`--option pretrain --lr 7e-3` once trained at --pretrain_lr without a word."""
    notes = find_idle_flags(parse_options("--option pretrain --lr 7e-3 --top-k 4".split()))
    assert notes == [
        "note: --lr has no effect on --option pretrain: --pretrain_lr has",
        "note: --top_k has no effect on --option pretrain",
    ]
    assert not find_idle_flags(parse_options("--option finetune --save_dtype float16".split()))


def test_a_resumed_run_takes_what_is_not_typed_from_its_checkpoint():
    """Left out, --pretrain_lr and --dtype once went back to their defaults on a resume."""
    stored = parse_options(
        "--option pretrain --pretrain_lr 1e-4 --dtype float32 --pretrain_data a b --val_data c "
        "--tokenizer_model x/y --epochs 7".split()
    ).to_plain()
    resumed = parse_options("--option pretrain --resume auto --epochs 9".split()).resumed(stored)
    assert (resumed.pretrain_lr, resumed.dtype, resumed.epochs) == (1e-4, "float32", 9)
    assert resumed.pretrain_data == ("a", "b") and resumed.resume == "auto"
    assert resumed.tokenizer_model == Path("x/y") and resumed.dev is None


def test_compile_is_a_choice_or_a_plain_flag():
    """Typed alone it means on, also before another flag; a checkpoint of when it was a flag."""
    for words, want in (
        ("", "auto"),
        ("--compile", "on"),
        ("--compile --epochs 2", "on"),
        ("--compile off", "off"),
        ("--compile=auto", "auto"),
    ):
        assert parse_options(f"--option pretrain {words}".split()).compile == want
    resumed = parse_options("--option pretrain --resume auto".split())
    assert resumed.resumed({"compile": True}).compile == "on"
    assert resumed.resumed({"compile": False}).compile == "off"
    assert resumed.resumed({"compile": "on"}).compile == "on"


def test_compiling_is_for_long_runs():
    """The run's operations decide: not its name, and not how many steps an epoch has."""
    pays, why = plan_of().compiling_pays(2)
    assert pays and "would save about" in why
    assert not plan_of(epochs=1).compiling_pays(2)[0]
    assert not plan_of(max_steps=10).compiling_pays(2)[0]
    assert not plan_of().compiling_pays(1000)[0]


def plan_of_preset(name: str, **changes) -> TrainingPlan:
    config = parse_options(["--model_size", name, "--max_seq_len", "2048"]).llama_config(32000)
    whole = sum(config.parameter_counts().values())
    settings = {"config": config, "trainable_parameters": whole, "sequence_length": 2048}
    return plan_of(**settings | {"dtype": "bfloat16", "device": "cuda"} | changes)


H100 = Cluster(gpus_per_node=8, flops=1e15, mfu=0.5, intra_node=400e9, inter_node=100e9)


def test_ddp_on_one_node_by_hand():
    """1.1B on 8 GPUs: a ring's all-reduce of float32 gradients, hidden behind the backward pass."""
    plan = plan_of_preset("1.1B", world_size=8, micro_batch_size=8, accumulation_steps=2)
    assert H100.exchanged_bytes(plan) == pytest.approx(2 * 7 / 8 * 4 * 1_100_048_384)
    assert H100.exchange_seconds(plan) == pytest.approx(7.700e9 / 400e9, rel=1e-3)
    per_token = 6 * (1_100_048_384 - 65_536_000 - 45 * 2048) + 6 * 22 * 2048 * 2048
    compute = 8 * 2 * 2048 * per_token / 0.5e15
    assert H100.compute_seconds(plan) == pytest.approx(compute)
    assert H100.step_seconds(plan) == pytest.approx(compute)  # 0.44 s, against 0.02 s of traffic
    again = dataclasses.replace(plan, activation_checkpointing=True)
    assert H100.compute_seconds(again) == pytest.approx(compute * 4 / 3)
    text = "\n".join(H100.lines(plan))
    assert f"{8 * 8 * 2 * 2048 / compute:,.0f} tokens/s" in text and "MFU 50.0%" in text


def test_ddp_waits_for_what_the_last_backward_pass_does_not_hide():
    """Slow links: two thirds of the last micro-batch's time hide the exchange, no more."""
    slow = dataclasses.replace(H100, intra_node=10e9)
    plan = plan_of_preset("1.1B", world_size=2, micro_batch_size=1, accumulation_steps=4)
    compute, exchange = slow.compute_seconds(plan), 4 * 1_100_048_384 / 10e9
    assert slow.step_seconds(plan) == pytest.approx(compute + exchange - compute / 4 * 2 / 3)


def test_fsdp_on_eight_nodes_by_hand():
    """7B on 64: bfloat16 weights twice and float32 gradients once, for every micro-batch."""
    plan = plan_of_preset("7B", parallel="fsdp", world_size=64, accumulation_steps=2)
    around = 2 * 32000 * 4096 + 4096  # embedding, head and last norm: float32, once each way
    blocks = 6_738_415_616 - around
    each = 63 / 64 * ((2 + 2 + 4) * blocks + (4 + 4) * around)
    assert H100.exchanged_bytes(plan) == pytest.approx(2 * each)
    assert H100.exchange_seconds(plan) == pytest.approx(2 * each / 100e9)  # between the nodes
    assert H100.step_seconds(plan) == max(H100.compute_seconds(plan), H100.exchange_seconds(plan))
    memory = plan.memory()
    shared_out = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert shared_out == pytest.approx(16 * 6_738_415_616 / 64, abs=8)
    assert memory["copies"] == blocks // 32 * (2 + 2 + 2 + 4) + around * (4 + 4)
    whole = dataclasses.replace(plan, parallel="ddp").memory()
    assert whole["weights"] + whole["optimizer"] == 12 * 6_738_415_616


def test_one_gpu_exchanges_nothing():
    """Neither way of sharing out has anything to send to itself."""
    for parallel in ("ddp", "fsdp"):
        plan = plan_of_preset("1.1B", parallel=parallel, world_size=1)
        assert H100.exchanged_bytes(plan) == 0
        assert H100.step_seconds(plan) == H100.compute_seconds(plan)


def test_flags_for_other_machines_need_the_plan():
    """`--world_size 8` in a real run would promise what torchrun does."""
    for words in ("--world_size 8", "--plan --mfu 0.3"):
        with pytest.raises(UsageError, match="is for --plan with --world_size N"):
            parse_options(f"--option pretrain {words}".split())
    options = parse_options("--option pretrain --plan --world_size 8 --plan_tokens 3e12".split())
    assert options.max_seq_len == 1024 and options.cluster().flops == 989e12


def test_plan_says_why_a_checkpoint_is_larger_than_a_model():
    """stories42M: weights once, tied, 167 MB; with AdamW's two moments 500 MB."""
    plan = plan_of()
    assert human_size(plan.weights_file_bytes("float32")) == "167 MB"
    assert human_size(plan.weights_file_bytes("bfloat16")) == "83.4 MB"
    assert human_size(plan.checkpoint_bytes()) == "500 MB"
    text = "\n".join(plan.lines(noun="chunks", save_dtype="float32", available=8 << 30))
    for word in ("41,689,600 parameters", "249 chunks", "32 per epoch", "167 MB", "8.59 GB"):
        assert word in text


def test_sizes_and_times_as_people_read_them():
    """Three digits, decimal units."""
    assert [human_size(n) for n in (0, 999, 1000, 226e6, 1.17e9)] == [
        "0 B", "999 B", "1 kB", "226 MB", "1.17 GB",
    ]  # fmt: skip
    assert [human_time(s) for s in (45, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]
    assert human_time(98 * 86400 + 21 * 3600) == "98 days 21 h"


@pytest.mark.parametrize(
    ("words", "processes", "whole"),
    [
        ("--pretrain_batch_size 4 --gradient_accumulation_steps 3", 2, 24),
        ("--pretrain_batch_size 4 --global_batch_size 24", 2, 24),
        ("--pretrain_batch_size 4 --global_batch_size 24", 1, 24),
    ],
)
def test_the_global_batch_is_settled(words, processes, whole):
    """As given, or as the micro-batch, the accumulation and the processes make it."""
    options = parse_options(f"--option pretrain {words}".split())
    assert options.with_global_batch(processes).global_batch_size == whole


@pytest.mark.parametrize(
    ("words", "processes", "remedy"),
    [
        ("--option pretrain --pretrain_batch_size 4 --global_batch_size 8", 4, "_batch_size 2"),
        ("--option pretrain --pretrain_batch_size 4 --global_batch_size 9", 2, "multiple of 8"),
        ("--option finetune --batch_size 4 --global_batch_size 6", 1, "--batch_size 2"),
    ],
)
def test_a_global_batch_that_does_not_divide(words, processes, remedy):
    """The message has the arithmetic and what would do."""
    with pytest.raises(UsageError, match="not divisible") as raised:
        parse_options(words.split()).with_global_batch(processes)
    assert remedy in str(raised.value)


def test_one_of_batch_and_accumulation():
    """Each follows from the other."""
    words = "--option pretrain --global_batch_size 8 --gradient_accumulation_steps 2"
    with pytest.raises(UsageError, match="give one of the two"):
        parse_options(words.split())


def test_a_resumed_run_keeps_its_global_batch():
    """Another micro-batch or number of processes makes it of other pieces; it once was dropped."""
    stored = {"global_batch_size": 32, "pretrain_batch_size": 4, "gradient_accumulation_steps": 2}
    cases = {"": 32, "--pretrain_batch_size 2": 32, "--gradient_accumulation_steps 1": 8}
    for words, whole in cases.items():
        options = parse_options(f"--option pretrain --resume auto {words}".split()).resumed(stored)
        assert options.with_global_batch(2).global_batch_size == whole
