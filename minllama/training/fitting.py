"""What fits a text and a time: the shape, batch and schedule of a pretraining of --minutes.

Steps of a few shapes are timed on this machine; of what each would train on in the time, a rule
says the loss, and the best is taken. `benchmarks/README.md` has the runs that the rule was made of.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from config import SHAPE_FLAGS, LlamaConfig, Options, recommended_decay
from llama import Llama, NextTokenLoss
from minllama.cli.console import human_time, say
from minllama.machine.device import autocast, is_out_of_memory, training_arithmetic
from minllama.machine.random_state import random_state, restore_random_state
from minllama.machine.ranks import Ranks
from minllama.model.lora import add_lora
from minllama.runs.plan import epoch_steps, micro_batches
from minllama.system.errors import UsageError
from minllama.text.corpus import Texts
from minllama.training.deadline import FINISHING, MAX_EPOCHS
from optimizer import make_optimizer

# Shapes from small to large: width, layers, heads.
SHAPES = (
    (64, 3, 2),
    (96, 4, 3),
    (128, 4, 2),
    (192, 4, 3),
    (256, 4, 4),
    (320, 5, 5),
    (384, 6, 6),
    (512, 8, 8),
    (640, 10, 10),
    (768, 12, 12),
    (1024, 16, 16),
    (1536, 20, 12),
)
TIMED_SHARE = 0.05  # of the time may go into timing shapes
TIMED_SECONDS = 0.3  # of steps of one shape
EVALUATIONS = 10  # in a run, and the share of its time that they may take
EVALUATED_SHARE = 0.05
TOKENS_PER_PARAMETER, EXPONENT = 30, 0.3
# Parameters for each distinct token up to which a model gains as from new text, and at which it is
# best: it gains by so small a power of its size up to there, and loses by it from there on.
FED, BEST_FED, BEYOND_EXPONENT = 2, 8, 0.2
PATIENCE = 3  # of those without a better loss end the run
LEAST_HELD_OUT = 8192  # tokens to evaluate on, whatever they take
TIMED_CONTEXT = {"cpu": 256, "cuda": 1024, "mps": 512}  # where none is typed
TIMED_TOKENS = {"cpu": 1024, "cuda": 32768, "mps": 8192}  # of a step that is timed
MICRO_TOKENS = {"cpu": 4096, "cuda": 65536, "mps": 8192}  # at most, of a micro-batch
KEPT_SECONDS = 60  # between checkpoints
DROPOUT = ((4.0, 0.0), (14.0, 0.1), (math.inf, 0.2))  # by epochs up to


def predicted_loss(parameters: int, tokens: float, distinct: int) -> float:
    """What orders models by their loss: what their size and their training leave to be learnt.

    `parameters` are those of the layers; of `tokens` of training `distinct` differ. A parameter is
    worth as much as TOKENS_PER_PARAMETER (Hoffmann et al. 2022, by our sweep). A token read again
    is worth less each time (Muennighoff et al. 2023), the sooner the smaller the text; and so are
    parameters beyond some for each token, until they learn it by heart.
    """
    epochs = max(1.0, tokens / distinct)
    lasting = min(15.0, max(3.0, distinct / 60_000))  # epochs until another is worth a third
    repeated = distinct * (1 + lasting * (1 - math.exp((1 - epochs) / lasting)))
    per_token = parameters / distinct
    per_token = min(per_token, BEST_FED**2 / per_token)
    size = distinct * min(per_token, FED) * max(1.0, per_token / FED) ** BEYOND_EXPONENT
    return size**-EXPONENT + (min(tokens, repeated) / TOKENS_PER_PARAMETER) ** -EXPONENT


def batch_tokens(tokens: float, least: int) -> int:
    """Tokens of a step that suit a training of so many, a power of two times `least`.

    Step Law's (arXiv:2503.04715), within limits.
    """
    wished = max(1024.0, min(0.58 * tokens**0.571, 2.0**20))
    return least * 2 ** max(0, round(math.log2(wished / least)))


class Speed(NamedTuple):
    """What a model's training takes on this machine, in seconds."""

    token: float  # forward and backward pass
    update: float  # of the weights, once a step

    @property
    def evaluated_token(self) -> float:
        """Forward pass alone."""
        return self.token / 3


@dataclass(frozen=True)
class Fit:
    """A choice of options, and what is expected of it."""

    options: Options
    tokens: int  # trained on in all
    loss: float  # but for a constant
    seconds: float  # to train in
    rate: float  # tokens a second


def fit_to_time(
    options: Options,
    texts: Texts,
    config: LlamaConfig | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Options:
    """The options of --minutes with what was not typed chosen; says what and why.

    `config` is the shape of a model to go on from. Every rank must call this.
    """
    before = random_state()  # the first weights must not depend on what was timed
    begun, total = time.monotonic(), 60 * options.minutes

    def clock() -> tuple[float, bool]:
        """Seconds left to train in, and whether the time for timing is over."""
        now = time.monotonic()
        return total - (now - options.started) - FINISHING, now - begun > TIMED_SHARE * total

    fits: list[Fit] = []
    for candidate in candidates(options, fixed=config is not None):
        shape = config or candidate.llama_config(texts.tokenizer.n_words)
        measured = functools.partial(measure, candidate, shape, device, dtype)
        speeds = ranks.gather(ranks.on_all(measured))
        if None in speeds:
            if not fits:
                raise UsageError(
                    f"--max_seq_len {candidate.max_seq_len}: with --dim {shape.dim} not one "
                    "row of it fits the memory: give a smaller one of either"
                )
            break
        speed = Speed(*(max(values) for values in zip(*speeds, strict=True)))
        left, over = ranks.on_main(clock)
        fits.append(fit(candidate, shape, speed, left, texts, device, ranks.world_size))
        if over or fits[-1].loss > min(earlier.loss for earlier in fits):
            break  # larger ones are only slower
    restore_random_state(before)
    best = min(fits, key=lambda candidate: candidate.loss)
    say(*describe(best, options, len(fits), len(texts.train.stream)))
    return best.options


def candidates(options: Options, *, fixed: bool) -> Iterator[Options]:
    """The options with the shapes between which the time decides; those typed are left alone."""
    if fixed or options.given.intersection(("model_size", *SHAPE_FLAGS)):
        yield options
        return
    for dim, n_layers, n_heads in SHAPES:
        yield dataclasses.replace(options, dim=dim, n_layers=n_layers, n_heads=n_heads)


def measure(
    options: Options,
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int | None = None,
    context: int | None = None,
    most: float = TIMED_SECONDS,
) -> Speed | None:
    """Time some steps of a model of this shape on random tokens, as many as fit the memory.

    Of so many `rows` of `context` tokens, for at most these seconds and the first step's. None
    where not even a row of them does.
    """
    context = context or options.max_seq_len
    rows = rows or max(1, TIMED_TOKENS[device.type] // context)
    while rows:
        try:
            return time_steps(options, config, (rows, context), device, dtype, most)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        rows //= 2
    return None


def time_steps(
    options: Options,
    config: LlamaConfig,
    batch: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    most: float = TIMED_SECONDS,
) -> Speed:
    """Time steps on a batch of so many rows and tokens in each."""
    rows, context = batch
    apart = options.option == "pretrain" and options.document_mask
    bos_id = 0 if apart else None  # any token takes the time of the mask
    llama = untrained(options, dataclasses.replace(config, max_seq_len=context))
    model = NextTokenLoss(llama, bos_id).to(device)
    optimizer = make_optimizer(
        model, name=options.optimizer, lr=1e-4, weight_decay=0.0, dtype=dtype
    )
    tokens = torch.randint(config.vocab_size, (rows, context), device=device)

    def passes() -> None:
        with autocast(device, dtype):
            loss = model(tokens, tokens)[0]
        loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def seconds(work: Callable[[], None]) -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    times: list[tuple[float, float]] = []
    with training_arithmetic(device, dtype, deterministic=options.deterministic):
        for work in (passes, update):  # the first time memory is taken and kernels are chosen
            work()
        while sum(map(sum, times)) < most and len(times) < 10:
            times.append((seconds(passes), seconds(update)))
    pass_times, update_times = zip(*times, strict=True)
    return Speed(statistics.median(pass_times) / (rows * context), statistics.median(update_times))


def untrained(options: Options, config: LlamaConfig) -> Llama:
    """A model of this shape, of which as much is trained, and kept for it, as the options say."""
    finetune = options.option == "finetune"
    if finetune and options.freeze_backbone:  # its head has gradients, and the embedding none
        llama = Llama(dataclasses.replace(config, tie_word_embeddings=False)).requires_grad_(False)
        llama.output.requires_grad_()
    else:
        llama = Llama(config)
    if finetune and options.lora_rank:
        add_lora(llama, rank=options.lora_rank)
    llama.activation_checkpointing = options.activation_checkpointing
    return llama


def fit(
    options: Options,
    config: LlamaConfig,
    speed: Speed,
    seconds: float,
    texts: Texts,
    device: torch.device,
    processes: int,
) -> Fit:
    """What to train a model of this shape with in the time, as far as it was not typed."""
    seconds = max(seconds, 1.0)
    context, distinct = options.max_seq_len, len(texts.train.stream)
    held_out = 0 if texts.val is None else len(texts.val.stream)
    to_watch = EVALUATED_SHARE * seconds  # for all evaluations, the first and the last included
    val_tokens = min(held_out, int(to_watch / (EVALUATIONS + 2) / speed.evaluated_token))
    val_tokens = min(held_out, max(val_tokens, LEAST_HELD_OUT))
    an_evaluation = val_tokens * speed.evaluated_token
    evaluations = max(1, min(EVALUATIONS, int(to_watch / max(1e-9, an_evaluation)) - 2))
    training = max(1.0, seconds - (evaluations + 2) * an_evaluation)

    def step_seconds(batch: int) -> float:
        return speed.token * batch / processes + speed.update

    def steps_of(batch: int) -> int:
        return max(1, int(training / step_seconds(batch)))

    batch = 1024
    for _ in range(10):  # a larger batch makes fewer steps, and a little more of the time
        tokens = min(steps_of(batch) * batch, MAX_EPOCHS * distinct)
        batch = batch_tokens(tokens, context * processes)
    micro = min(MICRO_TOKENS[device.type], max(context, batch // processes))
    rows = max(1, micro // context)
    if "global_batch_size" in options.given:  # of which a micro-batch is a whole share
        rows = math.gcd(rows, max(1, options.global_batch_size // processes))
    options = options.choose({"pretrain_batch_size": rows})
    whole = options.global_batch_size if "global_batch_size" in options.given else batch // context
    chosen: dict[str, Any] = {
        "gradient_accumulation_steps": micro_batches(whole, options.micro_batch_size, processes),
        "lr_scheduler": "linear",
        "early_stopping": PATIENCE if held_out else None,  # a step's own loss goes up and down
        "val_tokens": max(2, val_tokens),
    }
    options = options.choose(chosen)
    if "global_batch_size" not in options.given:
        options = dataclasses.replace(options, global_batch_size=None)
    options = options.with_global_batch(processes)
    batch = options.global_batch_size * context
    steps = min(steps_of(batch), MAX_EPOCHS * epoch_steps(distinct, batch))
    tokens = steps * batch
    epochs = tokens / distinct
    chosen = {
        "schedule_steps": steps,
        "dropout": next(rate for most, rate in DROPOUT if epochs <= most),
        "eval_interval": -(-steps // evaluations),
        "checkpoint_interval": max(1, int(steps * KEPT_SECONDS / training)),
        "best_model_interval": MAX_EPOCHS + 1,  # the steps between evaluations choose it
    }
    size = config.block_parameters()[0]
    loss = predicted_loss(size, tokens, distinct)
    options = options.choose(chosen).with_recommended_lr(config, continued=False)
    options = with_recommended_decay(options, distinct)
    return Fit(options, tokens, loss, training, batch / step_seconds(batch))


def with_recommended_decay(options: Options, distinct: int) -> Options:
    """The options with a weight decay to pretrain on `distinct` tokens, where none was typed.

    It follows from the text for Muon from scratch alone.
    """
    decay = options.decay()
    if options.weight_decay is None and options.optimizer == "muon" and options.is_from_scratch:
        batch = options.global_batch_size * options.max_seq_len
        steps = options.schedule_steps
        tokens = options.epochs * distinct if steps is None else steps * batch
        decay = recommended_decay(options.peak_lr(), tokens=tokens, distinct=distinct, batch=batch)
    return dataclasses.replace(options, weight_decay=decay)


def describe(best: Fit, typed: Options, timed: int, distinct: int) -> list[str]:
    """What was chosen and why, a line each."""
    options, epochs = best.options, best.tokens / distinct
    rate, tokens = map(tqdm.format_sizeof, (best.rate, best.tokens))
    patience = f"; --early_stopping {options.early_stopping}" if options.early_stopping else ""
    lines = [
        f"minutes      {typed.minutes:g} in all, {human_time(best.seconds)} of them to train in; "
        "chosen for that, each unless its flag is typed:",
        f"batch        --max_seq_len {options.max_seq_len} --pretrain_batch_size "
        f"{options.pretrain_batch_size} --gradient_accumulation_steps "
        f"{options.gradient_accumulation_steps}: at {rate} tokens/s {tokens} "
        f"tokens in {options.schedule_steps:,} steps, {epochs:.3g} epochs",
        f"rate         --optimizer {options.optimizer} --pretrain_lr {options.peak_lr():.3g} "
        f"--lr_scheduler {options.lr_scheduler}",
        f"schedule     --schedule_steps {options.schedule_steps} --eval_interval "
        f"{options.eval_interval} --val_tokens {options.val_tokens} --best_model_interval "
        f"{options.best_model_interval}: more or fewer steps, where the speed changes",
        f"repetition   --dropout {options.dropout:g} --weight_decay {options.decay():g} for "
        f"{epochs:.3g} epochs{patience}",
    ]
    if timed > 1:
        shape = f"--dim {options.dim} --n_layers {options.n_layers} --n_heads {options.n_heads}"
        lines.insert(1, f"shape        {shape}: of {timed} timed here the least loss expected")
    if epochs >= 0.99 * MAX_EPOCHS:
        lines.append(
            f"             more than {MAX_EPOCHS} epochs teach a text by heart: the run ends "
            "before its time"
        )
    return lines
