"""Pretraining: the text, the model to begin with, the task, and what is written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import DATA_DIR, MAX_CONTEXT, LlamaConfig, Options
from llama import Llama, load_pretrained
from minllama.cli.console import say, say_command
from minllama.formats.find_model import STARTING_WEIGHTS, Start, find_start_model
from minllama.formats.model_file import read_model
from minllama.formats.pt_model import read_vocabulary
from minllama.formats.vocabulary_fit import MISFIT, misfit, sampled
from minllama.inference.copying import Original, measure_copies, most_looked_at
from minllama.inference.evaluation import perplexity
from minllama.inference.repeating import measure_repeats, repeat_line
from minllama.inference.streaming import sample_text
from minllama.machine.gpus import GPUS
from minllama.machine.ranks import Ranks
from minllama.machine.sharding import is_sharded, load_state
from minllama.runs.advice import MORE_TEXT, Outcome, advise, find_remedy, remedied
from minllama.runs.metrics import add_findings, finite_or_none, read_records
from minllama.runs.plan import Cluster, PlannedSource, TrainingPlan, warn_of_plan
from minllama.runs.run_folder import Findings
from minllama.system.errors import RunFailed, UsageError
from minllama.system.signals import StopRequest
from minllama.text.compression import compare_with_compressors, verdict_line
from minllama.text.copies import Copies
from minllama.text.corpus import Texts, find_texts, load_texts
from minllama.text.vocabulary import choose_vocabulary
from minllama.training.fitting import TIMED_CONTEXT, fit_to_time, with_recommended_decay
from minllama.training.identity import CHUNK_ORDER, DATA_WEIGHTS, TEXT, TEXT_TOKENS
from minllama.training.old_text import (
    HELD_OUT_KEY,
    OLD_LOSS,
    OLD_PERPLEXITY,
    find_old_text,
    held_out_key,
    mixed_in,
    verdict_on_old_text,
)
from minllama.training.results import NEW_DIALOGUES, WHAT_NEXT, print_results
from minllama.training.run import Run
from minllama.training.task import NextTokenTask, score_tokens
from tokenizer import Tokenizer
from utils import ORDER_VERSION, Mixture, batch_indices, batch_positions

RECENT_STEPS = 20  # whose mean is the training loss at the end
FEW_DOCUMENTS = 100
OVERFITTED = 1.005  # times its best: a validation loss that has risen


def prepare_pretraining(
    options: Options,
    checkpoint: dict[str, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
    stop: StopRequest,
    ranks: Ranks,
) -> tuple[Options, LlamaConfig, Texts, Start | None]:
    """What to train on what: the options with what follows from text and time, and the start.

    Every rank must call this. Raises UsageError.
    """
    options, start = find_start_model(options, checkpoint, ranks)
    files = find_texts(options)
    if start is None:
        stored = checkpoint and read_vocabulary(Path("the checkpoint"), checkpoint)
        tokenizer = choose_vocabulary(
            options, files, stored=stored, ranks=ranks, check_stop=stop.check
        )
        longest = MAX_CONTEXT
    else:
        tokenizer, longest = start.tokenizer, min(MAX_CONTEXT, start.config.max_seq_len)
    if options.minutes is not None:
        longest = min(longest, TIMED_CONTEXT[device.type])
    texts = load_texts(options, files, tokenizer, longest=longest, stop=stop, ranks=ranks)
    options = dataclasses.replace(options, max_seq_len=texts.context)
    if options.minutes is not None and checkpoint is None:
        shape = start and start.config
        options = fit_to_time(options, texts, shape, device=device, dtype=dtype, ranks=ranks)
    texts = texts.cut(options.max_seq_len, options.val_tokens)
    config = start.config if start else options.llama_config(tokenizer.n_words)
    options = options.with_recommended_lr(config, continued=False)
    if checkpoint is None:  # that of a resumed run is the checkpoint's
        options = with_recommended_decay(options, len(texts.train.stream))
    return options, config, texts, start


def mixture_of(options: Options, texts: Texts) -> Mixture | None:
    """The order of several sources' chunks with --data_weights."""
    return Mixture(texts.train, options.data_weights) if options.data_weights else None


def plan_sizes(options: Options, config: LlamaConfig, texts: Texts) -> dict[str, Any]:
    """What the plan of a pretraining has to know of its model and text."""
    sequences, sources, mixture = len(texts.train), (), mixture_of(options, texts)
    if mixture is not None:
        rows = zip(texts.train.sources.items(), mixture.weights, options.data_weights, strict=True)
        sources = tuple(PlannedSource(*size, float(share), weight) for size, share, weight in rows)
        sequences = mixture.epoch_chunks
    return {
        "config": config,
        "trainable_parameters": config.parameters,
        "muon_parameters": options.muon_parameters(config),
        "sequences": sequences,
        "tokens": len(texts.train.stream),
        "sequence_length": options.max_seq_len,
        "logits_width": config.vocab_size,
        "sources": sources,
        "vocabulary_bytes": len(texts.tokenizer.model_bytes),
    }


def plan_for_gpus(options: Options, stop: StopRequest) -> None:
    """Print what a run would need and take on `--world_size` GPUs of the kind `--gpu`."""
    options, ranks = options.with_global_batch(options.world_size), Ranks()
    device = torch.device("cpu")
    options, config, texts, _ = prepare_pretraining(
        options, None, device, torch.float32, stop, ranks
    )
    gpu = GPUS[options.gpu.upper()]
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    sizes = plan_sizes(options, config, texts)
    plan = TrainingPlan(options, options.world_size, "cuda", dtype, **sizes)
    memory = int(gpu.memory_gb * 1e9)
    say(*plan.lines(memory), *Cluster(gpu).lines(plan))
    warn_of_plan(plan, memory)


def check_read_back(path: Path, weights: dict[str, Tensor]) -> None:
    """Read a run's model as any later command does; RunFailed unless it has these weights."""
    try:
        stored = read_model(path)
        want = {name: tensor.float() for name, tensor in weights.items()}
        stored.check_read_back(path, want, outcome="")
    except UsageError as error:
        raise RunFailed(f"{error}; the same command with --resume auto writes it again") from None


def fits_reviews(tokenizer: Tokenizer) -> bool:
    """Whether a model with this vocabulary can learn from the reviews, the default of --train."""
    reviews = DATA_DIR / "reviews-train.txt"
    if not reviews.is_file():
        return False
    return misfit(tokenizer, sampled(reviews.read_text(encoding="utf-8").splitlines())) <= MISFIT


class Pretraining(NextTokenTask):
    """Next-token prediction on chunks of text, in the order of (seed, epoch)."""

    def __init__(self, run: Run) -> None:
        """Load the text and find the model to begin with. Raises UsageError."""
        self.run = run
        run.options, self.config, self.texts, self.start = prepare_pretraining(
            run.options, run.checkpoint, run.device, run.dtype, run.stop, run.ranks
        )
        options, texts = run.options, self.texts
        self.train_set, self.val_set = texts.train, texts.val
        self.opening, val = texts.opening(), texts.val
        self.held_out = val and f"{len(val.stream)} tokens, {val.utf8_bytes} bytes"
        self.old_text = find_old_text(run, texts) if self.start else None
        self.old_set = self.old_text and self.old_text.dataset(texts)
        if self.old_set is not None:
            tokens = f"{len(self.old_set.stream):,} tokens held out of {self.old_text.name}"
            say(f"old text     {tokens} are measured, too: it may forget it")
        documents = texts.cache.document_bytes
        self.data = {
            "text": f"{documents.sum():,} bytes in {len(documents):,} documents",
            "held_out": val and f"{val.utf8_bytes:,} bytes",
            HELD_OUT_KEY: held_out_key(val),
            "vocabulary": texts.tokenizer.fingerprint,
        }
        # A run that keeps to a time is evaluated at steps: its epochs may be seconds or hours.
        self.best_interval = 0 if options.minutes is not None else options.best_model_interval
        self.eval_interval = options.eval_interval
        self.identity = {
            TEXT: texts.key,
            TEXT_TOKENS: len(texts.train.stream),
            "model shape": self.config.to_model_args() | {"dropout": 0.0},
            "--max_seq_len": options.max_seq_len,
            STARTING_WEIGHTS: self.start and self.start.weights,
            CHUNK_ORDER: ORDER_VERSION,
        }
        self.mixture = mixture_of(options, texts)
        if self.mixture is not None:
            self.identity[DATA_WEIGHTS] = " ".join(map(repr, options.data_weights))
            self.identity[TEXT_TOKENS] = [*texts.train.sources.values()]
        self.sizes = plan_sizes(options, self.config, texts)

    def build(self) -> None:
        run, texts = self.run, self.texts
        given = self.start and self.start.model
        sharded = run.plan.shards > 1
        if given is None or sharded:  # sharded it gets its weights block by block
            with torch.device("meta" if sharded else "cpu"):
                self.llama = Llama(self.config)
        else:  # DDP gives the other ranks rank 0's weights
            self.llama = given if run.ranks.is_main else given.to_empty(device="cpu")
        self.llama.vocabulary = texts.tokenizer.model_bytes
        bos_id = texts.tokenizer.bos_id if run.options.document_mask else None
        self.set_llama(dynamic=False, bos_id=bos_id)
        if run.options.sample_tokens and is_sharded(self.model):
            say("samples      after the run alone: of a sharded model no process has the whole")
        if given is not None and sharded:
            load_state(self.llama, given.state_dict())
            self.llama.chat_template = given.chat_template
        self.start = self.start and self.start._replace(model=None)  # no rank keeps the whole

    def describe_start(self) -> str | None:
        progress = self.run.progress
        if progress.step or progress.first is None or self.start is None:
            return None
        old = ""
        if progress.first_old is not None:
            old = f"; of the old text val perplexity {perplexity(progress.first_old):,.4f}"
        return (
            f"before the first step: val loss {progress.first:.4f}, val perplexity "
            f"{perplexity(progress.first):,.4f}{old}"
        )

    def sequences(self, epoch: int, index: int) -> np.ndarray:
        options, mixture = self.run.options, self.mixture
        chunks = len(self.train_set) if mixture is None else mixture.epoch_chunks
        if mixture is None:
            return batch_indices(chunks, options.global_batch_size, options.seed, epoch, index)
        positions = batch_positions(chunks, options.global_batch_size, index) + epoch * chunks
        return mixture.chunks_at(positions, options.seed)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        # An epoch's short last batch is not worth another half minute of compiling; parts of a
        # micro-batch that did not fit the memory are, since all that follow are trained on so.
        options = self.run.options
        whole = tokens.shape == (-(-options.pretrain_batch_size // self.split), options.max_seq_len)
        return (self.compiled if whole else self.parallel)(tokens, targets)[0]

    def evaluate(self) -> dict[str, Any]:
        metrics = super().evaluate()
        if self.old_set is not None:
            loss = score_tokens(self.next_token_loss, self.old_set, self.run).loss
            metrics |= {OLD_LOSS: loss, OLD_PERPLEXITY: perplexity(loss)}
            progress = self.run.progress
            if progress.step == 0:
                progress.first_old, progress.old_text = finite_or_none(loss), self.old_text.key
        return metrics

    def sample(self) -> str | None:
        options, stop = self.run.options, self.run.stop
        if not options.sample_tokens or is_sharded(self.model):  # no rank has a sharded one whole
            return None
        prompt = self.opening if options.sample_prompt is None else options.sample_prompt

        def write() -> str | None:
            text = None
            self.model.eval()
            with contextlib.suppress(UsageError):  # logits that are not numbers
                text = sample_text(
                    self.model,
                    self.texts.tokenizer,
                    prompt,
                    tokens=options.sample_tokens,
                    should_stop=lambda: stop.requested,
                )
            self.model.train()
            stop.check()
            return text

        return self.run.ranks.on_main(write)

    def locate(self, number: int) -> str:
        return self.texts.locate(number)

    def finish(self) -> None:
        """Write the model, show a sample, say what there is and what is next."""
        run, folder, progress = self.run, self.run.folder, self.run.progress
        records = deque(read_records(folder.file("metrics.jsonl")), maxlen=RECENT_STEPS)
        val_loss = records[-1].get("val_loss") if records else None
        overfitted = None not in (val_loss, progress.best) and val_loss > OVERFITTED * progress.best
        result = "best-model.pt" if overfitted else "final-model.pt"
        chosen, steps = folder.file(result), progress.pace.end or run.plan.schedule_steps
        run.checkpoints.save_file(
            folder.file("run.json"), lambda: folder.name_result(result, steps)
        )
        weights = self.weights()
        run.checkpoints.save_weights("final-model.pt", weights)
        run.checkpoints.finish()
        if not run.ranks.is_main:
            return
        check_read_back(folder.file("final-model.pt"), weights["model"])
        if overfitted:
            print()
            say(
                f"overfitted from step {progress.best_step:,} on: the validation loss was best "
                f"then and rose since. {chosen} is the model of that step"
            )
        in_memory = not overfitted and not is_sharded(self.model)
        model = self.llama.eval() if in_memory else load_pretrained(chosen)
        # Where documents are few, hardly anything was learnt of how one begins.
        prompt = self.opening if len(self.texts.cache.document_starts) < FEW_DOCUMENTS else ""
        print()
        say("a sample of what it writes:")
        print(f"{sample_text(model, self.texts.tokenizer, prompt)}\n")
        copies, repeats = self.read_what_it_writes(model)
        findings = self.print_summary(records, overfitted=overfitted, copies=copies) | repeats
        train = [] if fits_reviews(self.texts.tokenizer) else ["--train", NEW_DIALOGUES]
        options = ("generate", "finetune")
        uses = print_results(folder, chosen, *options, prompt=self.opening, train=train)
        findings[WHAT_NEXT] = [*findings.pop(WHAT_NEXT, []), *uses]  # last
        add_findings(folder, findings, copies, last_step=run.last_step)
        if run.plan.is_timed:
            again = folder.repeating_command()
            say_command("the same run again, by its steps instead of the clock:", again)

    def read_what_it_writes(self, model: Llama) -> tuple[Copies | None, Findings]:
        """How much of its text the model writes word for word, and whether it repeats itself."""
        run, texts = self.run, self.texts
        if is_sharded(self.model):  # a model that large writes slowly on one process's CPU
            return None, {}
        stream, minutes = self.train_set.stream, run.options.minutes
        most = most_looked_at(minutes)
        original = Original(texts.cache, texts.files, stream, texts.tokenizer, most=most)
        held_out = self.val_set and self.val_set.stream
        what = (model, texts.tokenizer, original, held_out)
        copies, written = measure_copies(*what, run.stop.check)
        after = " after held-out openings" if copies.held_out else ""
        say(*copies.lines(f"20 texts that it wrote{after}"))
        repeats = measure_repeats(*what, written, run.stop.check)
        if not repeats:
            return copies, {}
        say(repeat_line(repeats, original.unit))
        return copies, {f"does it repeat itself: 4 {original.unit} again in one text": repeats}

    def print_summary(
        self, records: Sequence[dict[str, Any]], *, overfitted: bool, copies: Copies | None
    ) -> Findings:
        """Print what was reached, by the last `records` of the run, and what would help most.

        Returns the same for the page.
        """
        if not records:
            return {}
        findings: Findings = {}
        progress, val_loss = self.run.progress, records[-1].get("val_loss")
        if None not in (val_loss, progress.first, progress.best):
            last = f", {perplexity(val_loss):,.2f} after {progress.step:,}" if overfitted else ""
            say(
                f"validation perplexity {perplexity(progress.first):,.1f} before training, "
                f"{perplexity(progress.best):,.2f} after {progress.best_step:,} steps{last}"
            )
            if progress.best > progress.first and self.run.options.pretrained_model_path is None:
                why = "the text is likely too short to learn from: more of it helps"
                if self.run.options.val_data:
                    why = "--val_data is likely of another kind than the text"
                say(f"note: the held-out text is predicted worse than before training: {why}")
        findings |= self.say_what_became_of_old_text(overfitted=overfitted)
        bits = records[-1].get("bits_per_byte")
        if overfitted and bits:  # of the result, which is the best model: they go with the loss
            bits *= progress.best / val_loss
        if bits and (rows := compare_with_compressors(bits, self.val_set)):
            findings["how good"] = rows
            say(verdict_line(rows))
        losses = [record["loss"] for record in records if record.get("loss") is not None]
        outcome = Outcome(
            parameters=self.config.parameters,
            tokens=progress.tokens,
            distinct=self.run.plan.tokens,
            train_loss=sum(losses) / max(1, len(losses)),
            val_loss=val_loss,
            dropout=self.run.options.dropout,
            copies=copies,
            is_timed=self.run.plan.is_timed,
            is_cut=self.run.plan.last_step < self.run.plan.schedule_steps,
            is_rate_typed=self.run.options.is_adamw_by_rate,
        )
        rose = overfitted or self.run.out_of_patience()
        advice = advise(outcome, rose=rose)
        say(*advice)
        remedy, _ = find_remedy(outcome, rose=rose)
        changes = remedied(remedy, self.run.plan)
        findings[WHAT_NEXT] = [[*line.split(": ", 1)] for line in advice]
        if changes and (again := self.run.folder.repeating_command(changes)):
            name = "the same run with that"
            if "pretrain_data" in changes:
                name += f" ({MORE_TEXT}: the text that you add)"
            say_command(f"{name}:", again)
            findings[WHAT_NEXT].append([name, again])
        return findings

    def say_what_became_of_old_text(self, *, overfitted: bool) -> Findings:
        """Say whether the run's result forgets what it was trained on before; the same in rows."""
        run, progress = self.run, self.run.progress
        result = progress.best_step if overfitted else progress.step
        records = read_records(run.folder.file("metrics.jsonl"))
        now = next((r.get(OLD_LOSS) for r in records if r["step"] == result), None)
        if self.old_text is None or None in (now, progress.first_old):
            return {}
        verdict, forgets = verdict_on_old_text(progress.first_old, now)
        say(f"old text     its held-out part: {verdict}")
        rows = [["held-out part", verdict]]
        changes = mixed_in(self.old_text.options, run.options) if forgets else None
        if changes and (again := run.folder.repeating_command(changes)):
            name = "the same run with the old text mixed in"
            say_command(f"{name}:", again)
            rows.append([name, again])
        return {"the old text": rows}
