"""The plan of a run: steps, memory, disk and time, by arithmetic alone.

Nothing here trains or looks at the machine. The plan is printed before every run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from config import CONTINUED_LR, DTYPE_BYTES, USUAL_DECAY, LlamaConfig, Options, recommended_lr
from minllama.cli.console import human_size, human_time, say
from minllama.machine.gpus import Gpu
from minllama.model.kernels import chunk_rows_for, max_materialized_len
from minllama.runs.advice import REREAD

# Of a process without a model: Python, torch and its kernels, and on a GPU the CUDA context.
PROCESS_BYTES = {"cpu": 400 * 10**6, "cuda": 500 * 10**6, "mps": 400 * 10**6}
RECORD_BYTES = 400  # of one step in metrics.jsonl

# Assumed by --plan --world_size, and printed: the share of a GPU's peak FLOP/s that computing
# reaches, and GB/s in each direction between two machines, over all their network adapters.
GPUS_PER_NODE, ASSUMED_MFU, INTER_NODE_GB_S = 8, 0.4, 400

# A learning rate this many times below the usual one is pointed out, and so is a pretraining of
# fewer steps than this.
FAR_BELOW, FEW_STEPS = 20, 200
# So is a fine-tuning on dialogues of a model up to this width, which learns them in about so many:
# 48 questions of width 64 by heart: after 120 steps none, 480 two, 1,200 28.
SMALL_DIM, ENOUGH_STEPS = 256, 1000

# Assumed by --compile auto: the share of an eager step that compiling saves (measured: 4 to 15 % on
# a CPU, 16 % on a GPU); the seconds it takes; and the least seconds that a layer's forward and
# backward pass take on a GPU, in which its kernels are launched.
COMPILED_SAVES, COMPILING_TAKES = {"cpu": 0.08, "cuda": 0.16}, {"cpu": 35, "cuda": 30}
SECONDS_PER_LAYER = 1e-3


def epoch_steps(data: int, batch: int) -> int:
    """Optimizer steps of one pass over the data, a smaller last batch included; at least 1.

    Both in the same unit, sequences or tokens.
    """
    return max(1, -(-data // batch))


def micro_batches(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that each rank accumulates in one optimizer step; at least 1."""
    return max(1, global_batch_size // (micro_batch_size * world_size))


class PlannedSource(NamedTuple):
    """A source of the text with --data_weights."""

    name: str
    tokens: int  # to train on
    share: float  # of the tokens read
    weight: float  # as given


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run will do and need. Memory is in bytes, of one process."""

    options: Options  # their global batch is resolved
    world_size: int
    device: str  # cpu, cuda or mps
    dtype: str
    config: LlamaConfig
    trainable_parameters: int
    muon_parameters: int  # of those, what Muon updates: one moment each, where AdamW has two
    sequences: int  # to train on: chunks of text, labelled sentences or dialogues
    tokens: int  # in all sequences
    sequence_length: int  # of the longest sequence
    logits_width: int  # logits per target: the vocabulary's size, or the number of labels
    sources: tuple[PlannedSource, ...] = ()  # with --data_weights
    vocabulary_bytes: int = 0  # of it in every file

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one optimizer step on each rank."""
        options = self.options
        return micro_batches(options.global_batch_size, options.micro_batch_size, self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return epoch_steps(self.sequences, self.options.global_batch_size)

    @property
    def schedule_steps(self) -> int:
        """Steps of the learning-rate schedule: as given, else those of all epochs."""
        return self.options.schedule_steps or self.options.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """The step after which the run ends: the schedule's last, or --max_steps before it."""
        return min(self.options.max_steps or self.schedule_steps, self.schedule_steps)

    @property
    def is_timed(self) -> bool:
        """Whether the clock ends the run (--minutes), and not its steps."""
        return self.options.option == "pretrain" and self.options.minutes is not None

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warmup: as given, else 5 % of the schedule."""
        given = self.options.warmup_steps
        return round(0.05 * self.schedule_steps) if given is None else given

    def decay_reason(self) -> str:
        """Why the program chose another weight decay than the usual one, and how to undo it."""
        options = self.options
        was_typed = "weight_decay" in options.given or options.resume is not None
        if options.option != "pretrain" or was_typed or options.decay() == USUAL_DECAY:
            return ""
        return f" for a text of this size (else --weight_decay {USUAL_DECAY})"

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch in which all sequences are the longest."""
        return self.options.micro_batch_size * self.sequence_length

    def source_reads(self) -> list[float]:
        """How often the run reads each source."""
        read = self.tokens * self.last_step / self.steps_per_epoch
        return [read * source.share / source.tokens for source in self.sources]

    def source_lines(self) -> list[str]:
        """A line for each source: its tokens, its share of what is read, how often it is read."""
        lines = [
            f"{source.name}: {source.tokens:,} tokens, {source.share:.1%} of those read: "
            f"{reads:,.3g} times"
            for source, reads in zip(self.sources, self.source_reads(), strict=True)
        ]
        labels = ["sources", *[""] * len(lines)]
        return [f"{label:<13}{line}" for label, line in zip(labels, lines, strict=False)]

    def activation_bytes(self) -> int:
        """Activations kept for a micro-batch's backward pass, and the last states' gradient."""
        config, compute = self.config, DTYPE_BYTES[self.dtype]
        heads = config.query_dim + config.kv_dim
        on_gpu = self.device == "cuda"
        residual = (compute if on_gpu else 4) * config.dim
        # Two normalised states, q, k, v and the attention's output; on a CPU another q and k, and
        # those that a norm of heads has read.
        attention = 2 * config.dim + 2 * heads + (0 if on_gpu else heads) + config.qk_norm * heads
        layer = 2 * residual + compute * (attention + 4 * config.hidden_dim)
        if self.device == "cpu" and self.sequence_length <= max_materialized_len(
            getattr(torch, self.dtype)
        ):
            layer += compute * config.n_heads * self.sequence_length
        layers = config.n_layers * layer
        if self.options.activation_checkpointing:
            layers = config.n_layers * residual + layer
        return self.micro_tokens * (layers + 2 * residual + 4 * config.dim)

    def logits_bytes(self) -> int:
        """A chunk of logits in `dtype` and its softmax in float32, and the head's gradient."""
        rows = min(self.micro_tokens, chunk_rows_for(self.device, self.logits_width))
        chunk = rows * self.logits_width * (4 + DTYPE_BYTES[self.dtype])
        return chunk + 4 * self.logits_width * self.config.dim

    def flops_per_token(self) -> float:
        """FLOPs to train on one token; in finetuning, as if all weights were trained."""
        logits = self.logits_width == self.config.vocab_size
        return self.config.flops_per_token(self.sequence_length, logits=logits)

    @property
    def step_tokens(self) -> float:
        """Tokens that each process trains on in one step, on average."""
        return self.tokens / self.steps_per_epoch / self.world_size

    def step_seconds(self, eager_flops: float) -> float:
        """What a step may be expected to take, at this eager speed in FLOP/s."""
        seconds = self.step_tokens * self.flops_per_token() / eager_flops
        if self.device == "cuda":  # small models take longer there than their FLOPs say
            layers = self.accumulation_steps * self.config.n_layers
            seconds = max(seconds, SECONDS_PER_LAYER * layers)
        return seconds

    def compiling_pays(self, eager_flops: float) -> tuple[bool, str]:
        """Whether the run is long enough to compile for, at this eager speed in FLOP/s; and why."""
        seconds = self.last_step * self.step_seconds(eager_flops)
        seconds = max(seconds, 60 * (self.options.minutes or 0))
        saved, takes = COMPILED_SAVES[self.device] * seconds, COMPILING_TAKES[self.device]
        reason = f"it would save about {human_time(saved)} and takes about {human_time(takes)}"
        return saved > 2 * takes, reason

    @property
    def shards(self) -> int:
        """Among how many processes weights, gradients and moments are divided."""
        return self.world_size if self.options.parallel == "fsdp" else 1

    def gathered_bytes(self) -> int:
        """Copies of weights that a process holds beside its float32 weights, or its shard.

        With FSDP: the weights in `dtype` of two blocks, of which one computes while the next is
        gathered; one block's gradients in `dtype`, and in float32 to be reduced; embedding and head
        in float32, with their gradients. Without: autocast's copies of the matrices.
        """
        compute = DTYPE_BYTES[self.dtype]
        blocks, rest = self.config.block_parameters()
        if self.shards > 1:
            return blocks // self.config.n_layers * (3 * compute + 4) + 8 * rest
        return compute * blocks if self.dtype != "float32" else 0

    def memory(self) -> dict[str, int]:
        """Bytes by part while training."""
        gradients = {"gradients": 4 * self.trainable_parameters // self.shards}
        activations = {"activations": self.activation_bytes()}
        if self.device == "cuda" and self.world_size == self.accumulation_steps == 1:
            # In the backward pass a layer's gradients take the place of its activations.
            largest = max(*gradients.values(), *activations.values())
            gradients, activations = {}, {"activations or gradients": largest}
        return {
            "weights": 4 * self.config.parameters // self.shards,
            **gradients,
            "optimizer": self.optimizer_bytes() // self.shards,
            "copies": self.gathered_bytes(),
            **activations,
            "logits": self.logits_bytes(),
            "process": PROCESS_BYTES[self.device],
        }

    def optimizer_bytes(self) -> int:
        """The optimizer's moments, float32: two per parameter, of Muon's one."""
        return 8 * self.trainable_parameters - 4 * self.muon_parameters

    def checkpoint_bytes(self) -> int:
        """A resumable checkpoint: float32 weights, vocabulary and the optimizer's moments."""
        return self.weights_file_bytes("float32") + self.optimizer_bytes()

    def weights_file_bytes(self, dtype: str) -> int:
        """A file of the weights and the vocabulary; a tied embedding is stored once."""
        return DTYPE_BYTES[dtype] * self.config.parameters + self.vocabulary_bytes

    def disk(self) -> dict[str, int]:
        """Bytes of the run's files by kind, at their peak: old ones go when new ones are whole."""
        options, last, size = self.options, self.last_step, self.checkpoint_bytes()
        # The last step is counted by itself: it always has a checkpoint, of its epoch or its step.
        save_interval = options.save_interval * self.steps_per_epoch
        interval = options.checkpoint_interval or last
        both = math.lcm(save_interval, interval)  # such a step has its epoch's checkpoint alone
        ends_epoch = last % self.steps_per_epoch == 0
        epochs = (last - 1) // save_interval + ends_epoch
        steps = (last - 1) // interval - (last - 1) // both + (not ends_epoch)
        if options.keep_last and self.is_timed:  # which may come to more steps than planned
            steps = options.keep_last + 1
        elif options.keep_last:  # the oldest is deleted once the newest is written
            steps = min(steps, options.keep_last + 1)
        models = 3 if options.option == "pretrain" else 2  # the final one, the best, its successor
        return {
            f"{epochs:,} epoch checkpoint{'s' * (epochs > 1)}": epochs * size,
            f"{steps:,} step checkpoint{'s' * (steps > 1)}": steps * size,
            f"{models} models": models * self.weights_file_bytes(options.save_dtype),
            "records": last * RECORD_BYTES,
        }

    def disk_line(self) -> str:
        """The bytes on disk by kind, to print."""
        return ", ".join(f"{name} {human_size(size)}" for name, size in self.disk().items() if size)

    def flags_for_less_disk(self) -> list[str]:
        """The flags, with values, each of which makes the run's files smaller."""
        smaller = {
            "keep_last": 1,
            "checkpoint_interval": 0,
            "save_interval": self.options.epochs,
            "save_dtype": "bfloat16",
        }
        flags = []
        for name, value in smaller.items():
            plan = replace(self, options=replace(self.options, **{name: value}))
            if sum(plan.disk().values()) < sum(self.disk().values()):
                flags.append(f"--{name} {value}")
        return flags

    def lines(self, available: int | None) -> list[str]:
        """The plan in lines to print; `available` is the machine's free memory in bytes."""
        config, options, memory = self.config, self.options, self.memory()
        noun = "dialogues" if options.is_chat else "sentences"
        noun = "chunks" if options.option == "pretrain" else noun
        counts = config.parameter_counts().items()
        parts = ", ".join(f"{name} {count:,}" for name, count in counts if count)
        needs = ", ".join(f"{name} {human_size(size)}" for name, size in memory.items() if size)
        have = f"; {human_size(available)} available" if available else ""
        processes = per_process = ends = ""
        if self.world_size > 1:
            processes = f" x {self.world_size} processes"
            per_process = f" per process ({options.parallel})"
        if self.last_step < self.schedule_steps:
            ends = f", ended after {self.last_step:,} by --max_steps"
        epochs = f"{self.schedule_steps / self.steps_per_epoch:,.4g}"
        own_width = "" if config.query_dim == config.dim else f" of {config.head_dim}"
        moments = "moments" if self.muon_parameters else "two moments of each"
        weights = human_size(self.weights_file_bytes(options.save_dtype))
        checkpoint = human_size(self.checkpoint_bytes())
        return [
            f"model        {config.parameters:,} parameters: {parts}",
            f"             dim {config.dim}, {config.n_layers} layers, {config.n_heads} heads"
            f"{own_width} ({config.n_kv_heads} key/value), vocabulary {config.vocab_size:,}, "
            f"context {config.max_seq_len:,}",
            f"data         {self.tokens:,} tokens in {self.sequences:,} {noun} of up to "
            f"{self.sequence_length:,}",
            *self.source_lines(),
            f"steps        {self.steps_per_epoch:,} per epoch x {epochs} epochs = "
            f"{self.schedule_steps:,}, of {options.global_batch_size:,} {noun} "
            f"({options.micro_batch_size} x {self.accumulation_steps} accumulated{processes}); "
            f"warmup {self.warmup_steps:,}{ends}",
            f"learning     up to {options.peak_lr():.3g}, then {options.lr_scheduler} to "
            f"{options.min_lr:g}; {options.optimizer}{options.optimizer_reason()}, weight decay "
            f"{options.decay():g}{self.decay_reason()}",
            f"memory       {human_size(sum(memory.values()))} in {self.dtype}{per_process}: "
            f"{needs}{have}",
            f"files        weights {weights} ({options.save_dtype}), resumable checkpoint "
            f"{checkpoint} (float32 weights and the optimizer's {moments})",
            f"disk         {human_size(sum(self.disk().values()))} at most: {self.disk_line()}",
        ]


@dataclass(frozen=True)
class Cluster:
    """Machines of eight GPUs of one kind, and the time that training on them takes.

    Collectives go round a ring of all GPUs, at the speed of its slowest link: NVLink (or PCIe)
    within a machine, all network adapters of a machine between machines.
    """

    gpu: Gpu

    def compute_seconds(self, plan: TrainingPlan) -> float:
        """Computing of one optimizer step on one GPU."""
        tokens = plan.accumulation_steps * plan.micro_tokens
        recomputed = 4 / 3 if plan.options.activation_checkpointing else 1  # forward: a third
        flops = tokens * plan.flops_per_token() * recomputed
        return flops / (self.gpu.flops(plan.dtype) * ASSUMED_MFU)

    def communicated_bytes(self, plan: TrainingPlan) -> float:
        """Bytes that each of N GPUs sends, and receives, per optimizer step.

        DDP: a ring all-reduce of the float32 gradients sends 2 (N-1)/N of them. FSDP, per
        micro-batch: (N-1)/N of every block's weights in `dtype`, for the forward and again for the
        backward pass, and of its gradients in float32; embedding and head in float32, each once.
        """
        share = (plan.world_size - 1) / plan.world_size
        blocks, around = plan.config.block_parameters()
        if plan.options.parallel == "ddp":
            return 2 * share * 4 * (blocks + around)
        per_block = 2 * DTYPE_BYTES[plan.dtype] + 4
        return plan.accumulation_steps * share * (per_block * blocks + 8 * around)

    def communication_seconds(self, plan: TrainingPlan) -> float:
        """The time of that traffic by itself."""
        slowest = self.gpu.link_gb_s
        if plan.world_size > GPUS_PER_NODE:
            slowest = min(slowest, INTER_NODE_GB_S)
        return self.communicated_bytes(plan) / (slowest * 1e9)

    def step_seconds(self, plan: TrainingPlan) -> float:
        """One optimizer step whose communication overlaps with computing as far as possible.

        DDP's overlaps with the last micro-batch's backward pass, FSDP's with all computing.
        """
        compute, communication = self.compute_seconds(plan), self.communication_seconds(plan)
        overlap = compute
        if plan.options.parallel == "ddp":
            backward = 3 / 4 if plan.options.activation_checkpointing else 2 / 3
            overlap = backward * compute / plan.accumulation_steps
        return compute + max(0.0, communication - overlap)

    def lines(self, plan: TrainingPlan) -> list[str]:
        """Traffic, speed and time in lines to print."""
        step, compute = self.step_seconds(plan), self.compute_seconds(plan)
        communication = self.communication_seconds(plan)
        tokens = plan.options.global_batch_size * plan.sequence_length
        rate = tokens / step
        reached = rate * plan.flops_per_token() / (plan.world_size * self.gpu.flops(plan.dtype))
        nodes = -(-plan.world_size // GPUS_PER_NODE)
        tflops = self.gpu.flops(plan.dtype) / 1e12
        return [
            f"cluster      {plan.world_size:,} GPUs in {nodes:,} node{'s' * (nodes > 1)}, "
            f"{tflops:,.0f} TFLOP/s each; assumed: computing reaches {ASSUMED_MFU:.0%} "
            f"of that, links have {self.gpu.link_gb_s:,.0f} GB/s within a node and "
            f"{INTER_NODE_GB_S:,.0f} GB/s between nodes",
            f"traffic      {human_size(self.communicated_bytes(plan))} per GPU and step "
            f"({plan.options.parallel}): {communication:.3g} s",
            f"step         {tokens:,} tokens: computing {compute:.3g} s; {step:.3g} s with all the "
            f"overlap there can be, {compute + communication:.3g} s with none",
            f"speed        {rate:,.0f} tokens/s, {rate / plan.world_size:,.0f} per GPU, "
            f"MFU {reached:.1%}",
            f"time         {human_time(1e9 / rate)} per billion tokens, "
            f"{human_time(plan.last_step * step)} for the run",
        ]


def warn_of_plan(plan: TrainingPlan, available: int | None) -> None:
    """Print what will not fit, and settings by which a run learns little."""
    needed = sum(plan.memory().values())
    if available is not None and needed > available:
        sharded = ", --parallel fsdp" if plan.world_size > plan.shards else ""
        say(
            f"warning: about {human_size(needed)} of memory are needed and {human_size(available)} "
            f"are free: try --activation_checkpointing{sharded}, a smaller batch with more "
            "--gradient_accumulation_steps, or a smaller model"
        )
    flag, what, share = "--pretrain_lr", "it from scratch", 1.0
    if plan.options.option == "finetune":
        flag, what, share = "--lr", "the fine-tuning of so small a model", CONTINUED_LR
    lr, suited = plan.options.peak_lr(), share * recommended_lr(plan.config, plan.options.optimizer)
    if lr < suited / FAR_BELOW:
        print(
            f"note: {flag} {lr:g} is {suited / lr:,.0f} times below what suits {what} "
            f"({suited:g}): it will learn little in {plan.last_step:,} steps"
        )
    if plan.options.option == "pretrain" and plan.schedule_steps < FEW_STEPS:
        longer, chosen = (
            ("--minutes", "") if plan.is_timed else ("--epochs", "; --minutes chooses them")
        )
        say(
            f"note: {plan.schedule_steps:,} steps are few to learn in: more come from {longer}, a "
            f"smaller --pretrain_batch_size and a shorter --max_seq_len{chosen}"
        )
    is_small = plan.config.dim <= SMALL_DIM and plan.schedule_steps < FEW_STEPS
    if is_small and plan.options.is_chat:
        epochs = -(-ENOUGH_STEPS // plan.steps_per_epoch)
        say(
            f"note: {plan.schedule_steps:,} steps are few to learn answers in: --epochs {epochs} "
            f"makes {epochs * plan.steps_per_epoch:,}"
        )
    warn_of_sources(plan)
    if plan.warmup_steps >= plan.last_step > 1:
        say(
            f"warning: warmup takes {plan.warmup_steps:,} steps (--warmup_steps) and the run ends "
            f"after {plan.last_step:,}: the full learning rate is never reached"
        )
    if plan.sequences < plan.options.global_batch_size:
        say(
            f"note: a step takes up to {plan.options.global_batch_size:,} sequences and there are "
            f"{plan.sequences:,}: each epoch is one step on all of them"
        )


def warn_of_sources(plan: TrainingPlan) -> None:
    """Print which source is learnt by heart while another is hardly read, if one is."""
    reads = plan.source_reads()
    most, least = max(reads, default=0), min(reads, default=0)
    if most <= REREAD * max(1.0, least):
        return
    often, seldom = plan.sources[reads.index(most)], plan.sources[reads.index(least)]
    weight = often.weight * REREAD * least / most
    say(
        f"warning: {often.name} is read {most:,.3g} times and {seldom.name} {least:,.3g}: what is "
        f"read more than {REREAD} times is worth less each time, and learnt by heart. Its weight "
        f"{weight:.2g} instead of {often.weight:g} makes it {REREAD} times as often as the other; "
        "fewer --epochs read all less often"
    )
