"""The plan of a run: steps, memory, files and time, by arithmetic alone.

Nothing here trains or looks at the machine; `session` prints it before every run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from config import CONTINUED_LR, DTYPE_BYTES, LlamaConfig, Options, suited_lr
from minllama.cli.console import say
from minllama.machine.gpus import Gpu
from minllama.model.kernels import chunk_rows_for, max_materialized_len
from minllama.system.units import human_size, human_time

# What a process takes before it has a model: Python and torch with their kernels, CUDA's context.
PROCESS_BYTES = {"cpu": 400 * 10**6, "cuda": 500 * 10**6, "mps": 400 * 10**6}

RECORD_BYTES = 400  # of a step in metrics.jsonl

# Assumed for --plan --world_size, and printed: what computing alone reaches of a GPU's peak, and
# the GB/s each way between two machines, all their network adapters together.
GPUS_PER_NODE, ASSUMED_MFU, INTER_NODE_GB_S = 8, 0.4, 400

# A learning rate so many times below the usual one is noted, and so are fewer steps to pretrain.
FAR_BELOW, FEW_STEPS = 20, 200

# What --compile auto assumes: the share of an eager step that a compiled one saves (4 to 15 % on a
# CPU, 16 on a GPU), seconds that compiling takes, and that a GPU waits for a layer's launches.
COMPILED_SAVES, COMPILING_TAKES = {"cpu": 0.08, "cuda": 0.16}, {"cpu": 35, "cuda": 30}
LAUNCHING_A_LAYER = 1e-3


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run will do and need. Memory is that of one process, in bytes."""

    options: Options  # with the global batch settled
    world_size: int
    device: str  # cpu, cuda or mps
    dtype: str
    config: LlamaConfig
    trainable_parameters: int
    muon_parameters: int  # of those: Muon keeps one number for each, AdamW two
    sequences: int  # to train on: chunks of text, or labelled sentences
    tokens: int  # in those sequences
    sequence_length: int  # of the longest
    logits_width: int  # logits per target: the vocabulary's size, or the number of labels

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one optimizer step on each rank."""
        at_once = self.options.micro_batch_size * self.world_size
        return self.options.global_batch_size // at_once

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass over the data, a last short one included: at least 1."""
        return max(1, -(-self.sequences // self.options.global_batch_size))

    @property
    def schedule_steps(self) -> int:
        """Steps that the learning rate's schedule spans: as given, else all epochs."""
        return self.options.schedule_steps or self.options.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """Steps after which the run ends: --max_steps may come before the schedule's end."""
        return min(self.options.max_steps or self.schedule_steps, self.schedule_steps)

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warmup: as given, else 5 % of the schedule."""
        given = self.options.warmup_steps
        return round(0.05 * self.schedule_steps) if given is None else given

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch of the longest sequences."""
        return self.options.micro_batch_size * self.sequence_length

    def activation_bytes(self) -> int:
        """What a micro-batch keeps for the backward pass, and the gradient of its last states."""
        config, compute = self.config, DTYPE_BYTES[self.dtype]
        kv_dim = config.n_kv_heads * config.head_dim
        on_gpu = self.device == "cuda"
        residual = (compute if on_gpu else 4) * config.dim
        # Two normed states, queries, keys, values and what attention gives; a CPU keeps others.
        attention = 4 * config.dim + 2 * kv_dim + (0 if on_gpu else config.dim + kv_dim)
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
        """A chunk of logits, their softmax in float32, and the head's gradient as it is made."""
        rows = min(self.micro_tokens, chunk_rows_for(self.device, self.logits_width))
        chunk = rows * self.logits_width * (4 + DTYPE_BYTES[self.dtype])
        return chunk + 4 * self.logits_width * self.config.dim

    def flops_per_token(self) -> float:
        """Operations to train on one token; of finetuning, as if all weights were trained."""
        logits = self.logits_width == self.config.vocab_size
        return self.config.flops_per_token(self.sequence_length, logits=logits)

    def compiling_pays(self, eager_flops: float) -> tuple[bool, str]:
        """Whether a run is long enough to compile for, at an eager step's FLOP/s, and why."""
        tokens = self.tokens * self.last_step / self.steps_per_epoch / self.world_size
        seconds = tokens * self.flops_per_token() / eager_flops
        if self.device == "cuda":  # where small models take longer than their arithmetic
            layers = self.last_step * self.accumulation_steps * self.config.n_layers
            seconds = max(seconds, LAUNCHING_A_LAYER * layers, 60 * (self.options.minutes or 0))
        saved, takes = COMPILED_SAVES[self.device] * seconds, COMPILING_TAKES[self.device]
        reason = (
            f"it would save about {human_time(saved)} of {human_time(seconds)} and takes about "
            f"{human_time(takes)}"
        )
        return saved > 2 * takes, reason

    @property
    def shards(self) -> int:
        """Processes that divide up weights, gradients and the optimizer's moments."""
        return self.world_size if self.options.parallel == "fsdp" else 1

    def gathered_bytes(self) -> int:
        """What a process holds of the weights beside its own float32 shard of them.

        Sharded: of two blocks the weights in `dtype`, one used and one on its way, of one its
        gradients, in `dtype` and as float32 for the exchange; embedding and head whole, in float32,
        with their gradients. Whole: autocast's copies of the matrices.
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
            # Layer by layer, backward, the ones take the place of the others.
            largest = max(*gradients.values(), *activations.values())
            gradients, activations = {}, {"activations or gradients": largest}
        return {
            "weights": self.weights_file_bytes("float32") // self.shards,
            **gradients,
            "optimizer": self.optimizer_bytes() // self.shards,
            "copies": self.gathered_bytes(),
            **activations,
            "logits": self.logits_bytes(),
            "process": PROCESS_BYTES[self.device],
        }

    def optimizer_bytes(self) -> int:
        """The optimizer's moments: two float32 numbers for each parameter, one where it is Muon."""
        return 8 * self.trainable_parameters - 4 * self.muon_parameters

    def checkpoint_bytes(self) -> int:
        """A resumable checkpoint: float32 weights and the optimizer's moments."""
        return self.weights_file_bytes("float32") + self.optimizer_bytes()

    def weights_file_bytes(self, dtype: str) -> int:
        """The weights alone, a tied embedding once."""
        return DTYPE_BYTES[dtype] * sum(self.config.parameter_counts().values())

    def disk(self) -> dict[str, int]:
        """Bytes of the run's files by kind, at their most: one that is replaced stays till then."""
        options, last, one = self.options, self.last_step, self.checkpoint_bytes()
        save = options.save_interval * self.steps_per_epoch
        kept = {*range(save, last + 1, save)}
        if last % self.steps_per_epoch == 0:
            kept.add(last)
        interval = options.checkpoint_interval or last
        steps = len({*range(interval, last + 1, interval), last} - kept)
        if options.keep_last:  # the oldest goes when the newest is there
            steps = min(steps, options.keep_last + 1)
        models = 3 if options.option == "pretrain" else 2  # the final one, the best, its next
        return {
            f"{len(kept):,} epoch checkpoint{'s' * (len(kept) > 1)}": len(kept) * one,
            f"{steps:,} step checkpoint{'s' * (steps > 1)}": steps * one,
            f"{models} models": models * self.weights_file_bytes(options.save_dtype),
            "records": last * RECORD_BYTES,
        }

    def disk_line(self) -> str:
        """What takes how much of the disk."""
        return ", ".join(f"{name} {human_size(size)}" for name, size in self.disk().items() if size)

    def flags_for_less_disk(self) -> list[str]:
        """The flags, with values, that would have less on the disk."""
        whole, options = sum(self.disk().values()), self.options
        changes = {
            "keep_last": 1,
            "checkpoint_interval": 0,
            "save_interval": options.epochs,
            "save_dtype": "bfloat16",
        }
        return [
            f"--{name} {value}"
            for name, value in changes.items()
            for other in [replace(self, options=replace(options, **{name: value}))]
            if sum(other.disk().values()) < whole
        ]

    def lines(self, available: int | None) -> list[str]:
        """The plan as a person reads it, with the bytes of memory that are available."""
        config, options, memory = self.config, self.options, self.memory()
        noun = {"pretrain": "chunks"}.get(options.option, "sentences")
        noun = "dialogues" if options.is_chat else noun
        counts = config.parameter_counts()
        parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
        needs = ", ".join(f"{name} {human_size(size)}" for name, size in memory.items() if size)
        have = f"; {human_size(available)} available" if available else ""
        processes = per_process = ends = ""
        if self.world_size > 1:
            processes = f" x {self.world_size} processes"
            per_process = f" per process ({options.parallel})"
        if self.last_step < self.schedule_steps:
            ends = f", ended after {self.last_step:,} by --max_steps"
        epochs = f"{self.schedule_steps / self.steps_per_epoch:,.4g}"
        moments = "moments" if self.muon_parameters else "two moments of each"
        weights = human_size(self.weights_file_bytes(options.save_dtype))
        checkpoint = human_size(self.checkpoint_bytes())
        return [
            f"model        {sum(counts.values()):,} parameters: {parts}",
            f"             dim {config.dim}, {config.n_layers} layers, {config.n_heads} heads "
            f"({config.n_kv_heads} key/value), vocabulary {config.vocab_size:,}, "
            f"context {config.max_seq_len:,}",
            f"data         {self.tokens:,} tokens in {self.sequences:,} {noun} of up to "
            f"{self.sequence_length:,}",
            f"steps        {self.steps_per_epoch:,} per epoch x {epochs} epochs = "
            f"{self.schedule_steps:,}, of {options.global_batch_size:,} {noun} "
            f"({options.micro_batch_size} x {self.accumulation_steps} accumulated{processes}); "
            f"warmup {self.warmup_steps:,}{ends}",
            f"learning     up to {options.peak_lr():.3g}, then {options.lr_scheduler} to "
            f"{options.min_lr:g}; {options.optimizer}, weight decay {options.decay():g}",
            f"memory       {human_size(sum(memory.values()))} in {self.dtype}{per_process}: "
            f"{needs}{have}",
            f"files        weights {weights} ({options.save_dtype}), resumable checkpoint "
            f"{checkpoint} (float32 weights and the optimizer's {moments})",
            f"disk         {human_size(sum(self.disk().values()))} at most: {self.disk_line()}",
        ]


@dataclass(frozen=True)
class Cluster:
    """Machines of eight GPUs of one kind, and what training on them takes.

    Collectives go round a ring of all GPUs at the pace of its slowest link: NVLink (or PCIe)
    within a machine, all network adapters of a machine together between machines.
    """

    gpu: Gpu

    def compute_seconds(self, plan: TrainingPlan) -> float:
        """An optimizer step's computing on one GPU."""
        tokens = plan.accumulation_steps * plan.micro_tokens
        again = 4 / 3 if plan.options.activation_checkpointing else 1  # the forward third twice
        return tokens * plan.flops_per_token() * again / (self.gpu.flops(plan.dtype) * ASSUMED_MFU)

    def communicated_bytes(self, plan: TrainingPlan) -> float:
        """Bytes that each GPU sends, and receives, per optimizer step.

        DDP: a ring's all-reduce of the float32 gradients sends 2 (N-1)/N of them. FSDP: of each
        micro-batch a block's weights in `dtype` for the forward and for the backward pass, and its
        gradients in float32, (N-1)/N of each; embedding and head once each way, in float32.
        """
        share = (plan.world_size - 1) / plan.world_size
        blocks, around = plan.config.block_parameters()
        if plan.options.parallel == "ddp":
            return 2 * share * 4 * (blocks + around)
        per_block = 2 * DTYPE_BYTES[plan.dtype] + 4
        return plan.accumulation_steps * share * (per_block * blocks + 8 * around)

    def communication_seconds(self, plan: TrainingPlan) -> float:
        """The time of that traffic alone."""
        slowest = self.gpu.link_gb_s
        if plan.world_size > GPUS_PER_NODE:
            slowest = min(slowest, INTER_NODE_GB_S)
        return self.communicated_bytes(plan) / (slowest * 1e9)

    def step_seconds(self, plan: TrainingPlan) -> float:
        """An optimizer step whose communication overlaps with computing as far as it can.

        DDP's overlaps with the backward pass of the last micro-batch, FSDP's with everything.
        """
        compute, communication = self.compute_seconds(plan), self.communication_seconds(plan)
        overlap = compute
        if plan.options.parallel == "ddp":
            backward = 3 / 4 if plan.options.activation_checkpointing else 2 / 3
            overlap = backward * compute / plan.accumulation_steps
        return compute + max(0.0, communication - overlap)

    def lines(self, plan: TrainingPlan) -> list[str]:
        """Traffic, speed and time as a person reads them."""
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
    """Say what of a plan will not fit, or cannot do what it is there for."""
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
    lr, suited = plan.options.peak_lr(), share * suited_lr(plan.config, plan.options.optimizer)
    if lr < suited / FAR_BELOW:
        print(
            f"note: {flag} {lr:g} is {suited / lr:,.0f} times below what suits {what} "
            f"({suited:g}): it will learn little in {plan.last_step:,} steps"
        )
    if plan.options.option == "pretrain" and plan.schedule_steps < FEW_STEPS:
        print(
            f"note: {plan.schedule_steps:,} steps are few to learn in: more come from --epochs, a "
            "smaller --pretrain_batch_size and a shorter --max_seq_len; --minutes chooses them"
        )
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
