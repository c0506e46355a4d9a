"""Pretrain a small Llama from scratch, then finetune, prompt and generate with it.

What each `--option` does, read from top to bottom; the parts are in the other modules.
"""

from __future__ import annotations

import signal
import sys

from config import parse_options
from minllama.cli.command_line import parse_or_exit

if __name__ == "__main__":  # --help and bad flags are answered before torch, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until then Ctrl-C ends it without a traceback
    OPTIONS_GIVEN = parse_or_exit(parse_options, "run_llama.py", sys.argv[1:])

import contextlib
import dataclasses
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import MAX_CONTEXT, LlamaConfig, Options, find_idle_flags, fingerprint
from llama import (
    Llama,
    LlamaEmbeddingClassifier,
    LlamaZeroShotClassifier,
    load_pretrained,
)
from minllama.cli.command_line import print_error, protect_output
from minllama.cli.console import progress_bar, say
from minllama.formats.formats import read_vocabulary
from minllama.formats.models import (
    STARTING_WEIGHTS,
    Classifier,
    Start,
    find_model,
    find_start_model,
    load_model,
    read_classifier,
)
from minllama.formats.pt_file import load_pt
from minllama.inference.conversation import converse
from minllama.inference.evaluation import compare_pairs, pair_report, perplexity, read_pairs
from minllama.inference.prompting import Prompts, score_labels
from minllama.inference.streaming import CHAT_TEMPERATURE, PROMPT_TEMPERATURE, Writer, sample_text
from minllama.machine.device import (
    check_compiler,
    choose_device,
    is_out_of_memory,
    keep_freed_memory,
)
from minllama.machine.gpus import GPUS
from minllama.machine.ranks import Ranks, check_runs_alone, exit_at_once, is_lost_peer
from minllama.machine.sharding import full_state_dict, is_sharded, load_state
from minllama.model.generation import compile_step, pack_weights
from minllama.model.lora import add_lora, merge_lora
from minllama.runs.advice import Outcome, advise
from minllama.runs.metrics import read_records
from minllama.runs.plan import Cluster, TrainingPlan, warn_of_plan
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import Interrupted, RunFailed, UsageError
from minllama.system.files import check_writable_file, write_text
from minllama.system.signals import LAUNCHER_REPEATS, StopRequest
from minllama.text.corpus import Texts, find_texts, load_texts
from minllama.text.labelled import (
    LabelledFiles,
    Scores,
    find_labelled_files,
    find_sentences,
    is_unlabelled,
    labels_of,
    read_labelled,
    report_predictions,
)
from minllama.text.reading import Reading, find_text_files, first_words, read_lines
from minllama.text.vocabulary import choose_vocabulary
from minllama.training.chat_training import finetune_chat
from minllama.training.classifying import load_splits, predict, predict_files
from minllama.training.fitting import TIMED_CONTEXT, fit_to_time
from minllama.training.next_token import NextTokenTask
from minllama.training.run import Run
from minllama.training.session import (
    CHUNK_ORDER,
    Session,
    open_session,
    print_results,
    say_interrupted,
)
from minllama.training.task import Batch, Task
from minllama.training.training import train
from optimizer import layer_matrices
from tokenizer import Tokenizer
from utils import ORDER_VERSION, LlamaDataset, batch_indices, batches_by_length

WORSE = 1.005  # than its best: a validation loss that has risen

# ---------------------------------------------------------------------------- pretrain


def pretrain(options: Options, stop: StopRequest, ranks: Ranks) -> int:
    """Train a Llama on text files, from scratch or from given weights; returns the exit status."""
    if options.plan and options.world_size:
        return plan_for_gpus(options, stop)
    with open_session(options, "pretrain", ranks=ranks, stop=stop) as session:
        options, config, texts, start = prepare_pretraining(
            session.options, session.checkpoint, session.device, session.dtype, stop, ranks
        )
        session.options = options
        identity = {
            "--pretrain_data, --tokenizer_model or how the text is read: key": texts.key,
            "training tokens (--val_fraction, --val_data)": len(texts.train.stream),
            "model shape": config.to_model_args() | {"dropout": 0.0},
            "--max_seq_len": options.max_seq_len,
            STARTING_WEIGHTS: start and start.weights,
            CHUNK_ORDER: ORDER_VERSION,
        }
        session.settle(identity, **pretraining_sizes(options, config, texts))
        if options.plan:
            return 0
        keep_freed_memory()
        given = start and start.model
        sharded = session.plan.shards > 1
        if given is None or sharded:  # sharded it gets its weights block by block
            with torch.device("meta" if sharded else "cpu"):
                model = Llama(config)
        else:  # DDP gives the other ranks rank 0's weights
            model = given if ranks.is_main else given.to_empty(device="cpu")
        model.vocabulary = texts.tokenizer.model_bytes
        task = Pretraining(session, texts, model)
        if given is not None and sharded:
            load_state(model, given.state_dict())
            model.chat_template = given.chat_template
        start, given = start and start._replace(model=None), None  # no rank keeps the whole
        run = Run(session, task)
        run.start()
        if run.progress.step == 0 and start is not None and run.progress.first is not None:
            print(
                f"before the first step: val loss {run.progress.first:.4f}, val perplexity "
                f"{perplexity(run.progress.first):,.4f}"
            )
        if train(run):
            return say_interrupted(session, run.progress.step)
        return finish_pretraining(run, texts.tokenizer)


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
        tokenizer = choose_vocabulary(options, files, stored=stored, ranks=ranks)
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
    options = options.suited_to(config, continued=False)
    return options, config, texts, start


class Pretraining(NextTokenTask):
    """Next-token prediction on chunks of text, in the order of (seed, epoch)."""

    def __init__(self, session: Session, texts: Texts, model: Llama) -> None:
        bos_id = texts.tokenizer.bos_id if session.options.document_mask else None
        super().__init__(session, model, texts.train, texts.val, dynamic=False, bos_id=bos_id)
        self.texts, self.opening = texts, texts.opening()
        if session.options.sample_tokens and is_sharded(model):
            say("samples      after the run alone: of a sharded model no process has the whole")
        # A run that keeps to a time is evaluated at steps: its epochs may be seconds or hours.
        timed = session.options.minutes is not None
        self.best_interval = 0 if timed else session.options.best_model_interval
        self.eval_interval = session.options.eval_interval

    def sequences(self, epoch: int, index: int) -> np.ndarray:
        options, chunks = self.session.options, len(self.texts.train)
        return batch_indices(chunks, options.global_batch_size, options.seed, epoch, index)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        # An epoch's short last batch is not worth another half minute of compiling; parts of a
        # micro-batch that did not fit the memory are, since all that follow are trained on so.
        options = self.session.options
        whole = tokens.shape == (-(-options.pretrain_batch_size // self.split), options.max_seq_len)
        return (self.compiled if whole else self.parallel)(tokens, targets)[0]

    def sample(self) -> str | None:
        options, ranks, stop = self.session.options, self.session.ranks, self.session.stop
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

        return ranks.on_main(write)

    def locate(self, number: int) -> str:
        return self.texts.locate(number)


def finish_pretraining(run: Run, tokenizer: Tokenizer) -> int:
    """Write the model, show a sample, and say what there is and what is next."""
    folder, progress, checkpoints = run.folder, run.progress, run.checkpoints
    final = folder.file("final-model.pt")
    checkpoints.save_weights("final-model.pt", run.task.weights())
    checkpoints.finish()
    if not run.ranks.is_main:
        return 0
    records = deque(read_records(folder.file("metrics.jsonl")), maxlen=20)  # the last ones
    val_loss = records[-1].get("val_loss") if records else None
    chosen = final
    if val_loss is not None and progress.best is not None and val_loss > WORSE * progress.best:
        chosen = folder.file("best-model.pt")
        print(
            f"\nthe validation loss was best at step {progress.best_step:,} and rose since: from "
            f"then on the text was learnt by heart. {chosen} is the model of that step"
        )
    in_memory = chosen is final and not is_sharded(run.task.model)
    model = run.task.llama.eval() if in_memory else load_pretrained(chosen)
    print("\na sample of what it writes:")
    print(f"{sample_text(model, tokenizer)}\n")
    if val_loss is not None and progress.first is not None and progress.best is not None:
        rose = "" if chosen is final else f", {perplexity(val_loss):.2f} after {progress.step:,}"
        print(
            f"validation perplexity {perplexity(progress.first):,.1f} before training, "
            f"{perplexity(progress.best):.2f} after {progress.best_step:,} steps{rose}"
        )
    if records:
        recent = [record["loss"] for record in records if record["loss"] is not None]
        outcome = Outcome(
            parameters=sum(run.plan.config.parameter_counts().values()),
            tokens=progress.tokens,
            distinct=run.plan.tokens,
            train_loss=sum(recent) / max(1, len(recent)),
            val_loss=val_loss,
        )
        say(*advise(outcome, rose=chosen is not final))
    print_results(folder, chosen, run.task.opening, "generate", "finetune")
    return 0


def pretraining_sizes(options: Options, config: LlamaConfig, texts: Texts) -> dict[str, Any]:
    """What the plan of a pretraining has to know of its model and text."""
    return {
        "config": config,
        "trainable_parameters": sum(config.parameter_counts().values()),
        "muon_parameters": options.muon_parameters(config),
        "sequences": len(texts.train),
        "tokens": len(texts.train.stream),
        "sequence_length": options.max_seq_len,
        "logits_width": config.vocab_size,
    }


def plan_for_gpus(options: Options, stop: StopRequest) -> int:
    """Print what a run would need and take on `--world_size` GPUs of the kind `--gpu`."""
    options, ranks = options.with_global_batch(options.world_size), Ranks()
    device = torch.device("cpu")
    options, config, texts, _ = prepare_pretraining(
        options, None, device, torch.float32, stop, ranks
    )
    gpu = GPUS[options.gpu.upper()]
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype
    sizes = pretraining_sizes(options, config, texts)
    plan = TrainingPlan(options, options.world_size, "cuda", dtype, **sizes)
    memory = int(gpu.memory_gb * 1e9)
    say(*plan.lines(memory), *Cluster(gpu).lines(plan))
    warn_of_plan(plan, memory)
    return 0


# ---------------------------------------------------------------------------- finetune


POOLED = {"last": "the state after the last token", "mean": "the mean over the tokens"}


def finetune(options: Options, stop: StopRequest, ranks: Ranks) -> int:
    """Train a classifier on top of a pretrained Llama, or a chat; returns the exit status."""
    if options.is_chat:
        return finetune_chat(options, stop, ranks)
    files = find_labelled_files(options, "finetuning")
    with open_session(options, f"finetune-{files.name}", ranks=ranks, stop=stop) as session:
        options = session.options
        keep_freed_memory()
        llama, tokenizer = load_model(options, session.device)
        llama.chat_template = None  # a classifier answers no questions
        splits = load_splits(files, options, tokenizer, context=llama.config.max_seq_len)
        if options.lora_rank:
            add_lora(llama, rank=options.lora_rank, alpha=2 * options.lora_rank)
        model = LlamaEmbeddingClassifier(
            llama,
            num_labels=len(files.label_names),
            hidden_dropout_prob=options.hidden_dropout_prob,
            freeze_backbone=options.freeze_backbone,
            pooling=options.pooling,
        ).to(session.device)
        say(f"pooling      {options.pooling}: the head reads {POOLED[options.pooling]} (--pooling)")
        identity = {
            "--train": fingerprint(files.paths["train"].read_bytes()),
            "model shape": llama.config.to_model_args(),
            "--tokenizer_model": tokenizer.fingerprint,
            "--max_sentence_len": options.max_sentence_len,
            "--freeze_backbone": options.freeze_backbone,
            "--lora_rank": options.lora_rank,
            "--pooling": options.pooling,
        }
        muon = layer_matrices(model) if options.optimizer == "muon" else []
        lengths = splits["train"].lengths
        session.settle(
            identity,
            config=llama.config,
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            muon_parameters=sum(p.numel() for p in muon),
            sequences=len(lengths),
            tokens=int(lengths.sum()),
            sequence_length=int(lengths.max()),
            logits_width=len(files.label_names),
        )
        if options.plan:
            return 0
        run = Run(session, Finetuning(session, files, splits, model))
        run.start()
        if train(run):
            return say_interrupted(session, run.progress.step)
        return finish_finetuning(run, files, splits)


class Finetuning(Task):
    """Classification of sentences, in batches of similar length in the order of (seed, epoch)."""

    def __init__(
        self,
        session: Session,
        files: LabelledFiles,
        splits: dict[str, LlamaDataset],
        model: LlamaEmbeddingClassifier,
    ) -> None:
        # Predictions are made in float32; training's dtype is autocast's.
        super().__init__(
            session, model.llama, model, module=model, dtype=torch.float32, dynamic=True
        )
        self.files, self.train_set, self.dev_set = files, splits["train"], splits["dev"]
        self.higher_is_better = not is_unlabelled(self.dev_set.examples)
        self.goal = "dev_accuracy" if self.higher_is_better else "loss"
        options = session.options
        self.order = batches_by_length(
            self.train_set.lengths, options.global_batch_size, options.seed
        )

    def sequences(self, epoch: int, index: int) -> np.ndarray:
        return self.order(epoch, index)

    def batch(self, numbers: np.ndarray) -> Batch:
        return Batch(self.train_set.collate(numbers))

    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        return len(numbers), int(self.train_set.lengths[numbers].sum())

    def loss(self, tokens: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.nll_loss(self.compiled(tokens, lengths), labels, reduction="sum")

    def evaluate(self) -> dict[str, float]:
        if not self.higher_is_better:
            return {}
        predictions = predict(self.model, self.dev_set, self.session)
        labels = labels_of(self.dev_set.examples)
        scores = Scores.of(labels, predictions, len(self.files.label_names))
        return {"dev_accuracy": scores.accuracy, "dev_f1": scores.macro_f1}

    def weights(self) -> dict[str, Any]:
        """Those of the Llama, and the classifier's head."""
        head = full_state_dict(self.model.classifier_head, self.session.ranks)
        return super().weights() | {
            "classifier_head": {name: tensor.cpu() for name, tensor in head.items()},
            "label_names": self.files.label_names,
            "pooling": self.model.pooling,
        }

    def load_weights(self, path: Path) -> None:
        """Put what `weights` returned back into the classifier, its adapters merged."""
        payload = load_pt(path)
        if self.session.options.lora_rank:
            merge_lora(self.llama)
        load_state(self.llama, payload["model"])
        load_state(self.model.classifier_head, payload["classifier_head"])

    def locate(self, number: int) -> str:
        return f"{self.train_set.path}, sentence {number + 1:,}"


def finish_finetuning(run: Run, files: LabelledFiles, splits: dict[str, LlamaDataset]) -> int:
    """Report and write the best model's predictions on dev and test."""
    run.checkpoints.finish()
    best = run.folder.file("best-model.pt")
    run.task.load_weights(best)
    epoch = run.progress.best_step / run.plan.steps_per_epoch
    print(f"\nbest model: {best}, after step {run.progress.best_step:,} (epoch {epoch:.3g})")
    try:
        predict_files(run.task.model, files, splits, run.session)
    except Interrupted:
        return say_interrupted(run.session, run.progress.step)
    opening = first_words(splits["dev"].examples[0].sentence)
    dev = files.paths["dev"]
    print_results(run.folder, best, opening, "prompt", "generate", test=dev)
    return 0


# ---------------------------------------------------------------------------- prompt


def prompt(options: Options, stop: StopRequest, ranks: Ranks) -> int:
    """Classify sentences by the label that the model finds likeliest after a question.

    A fine-tuned model has a head for that, which is used unless a flag of prompting was typed.
    """
    if options.pairs:
        return judge_pairs(options, stop)
    with contextlib.redirect_stdout(sys.stderr):
        path = find_model(options)
    options = dataclasses.replace(options, pretrained_model_path=path)
    classifier = read_classifier(path)
    if classifier is not None and not options.given & {"prompt_template", "label_norm", "shots"}:
        return classify(options, classifier, stop, ranks)
    files = find_labelled_files(options, "prompting")
    train = files.paths["train"]
    examples = read_labelled(train, encoding=options.encoding) if options.shots else []
    if options.shots > len(examples):
        raise UsageError(
            f"--shots {options.shots}: --train {train} has {len(examples)} examples to show"
        )
    with contextlib.redirect_stdout(sys.stderr):  # what is found is the result
        device, note = choose_device(options.use_gpu)
        say(f"device       {note}")
        llama, tokenizer = load_model(options, device)
    model = LlamaZeroShotClassifier(llama)
    prompts = Prompts(
        tokenizer,
        options.prompt_template.replace("\\n", "\n"),
        files.label_names,
        llama.config.max_seq_len,
        options.max_sentence_len,
    ).with_shots(examples, options.shots, options.seed)
    # Without any sentence: what `pmi` subtracts; and a question that is too long shows at once.
    base = score_labels(model, prompts, [""], "sum")
    for split, out in files.outs.items():
        dataset = LlamaDataset(
            files.paths[split],
            tokenizer,
            n_labels=len(files.label_names),
            encoding=options.encoding,
        )
        predictions = np.zeros(len(dataset), np.int64)
        batches = dataset.length_sorted_batches(options.batch_size)
        for indices in progress_bar(batches, desc=f"prompting {split}"):
            stop.check()
            sentences = [dataset.examples[index].sentence for index in indices]
            scores = score_labels(model, prompts, sentences, options.label_norm)
            if options.label_norm == "pmi":
                scores = scores - base
            predictions[indices] = scores.argmax(dim=-1).cpu().numpy()
        cut = sum(example.sentence in prompts.cut for example in dataset.examples)
        if cut:
            print(
                f"{split}: {cut} of {len(dataset)} sentences were cut to fit with the question",
                file=sys.stderr,
            )
        report_predictions(
            split,
            dataset.examples,
            predictions.tolist(),
            files.label_names,
            out,
            keep=f"{split}_out" not in options.given,
        )
    return 0


def classify(options: Options, classifier: Classifier, stop: StopRequest, ranks: Ranks) -> int:
    """Apply a fine-tuned classifier to sentences, labelled or not."""
    names = classifier.label_names
    files = find_sentences(options, names)
    with contextlib.redirect_stdout(sys.stderr):
        device, note = choose_device(options.use_gpu)
        say(
            f"device       {note}",
            f"classifier   fine-tuned to tell {', '.join(names)} from {POOLED[classifier.pooling]}",
        )
        llama, tokenizer = load_model(options, device)
        context = llama.config.max_seq_len
        splits = load_splits(files, options, tokenizer, context=context, plain=True)
    model = LlamaEmbeddingClassifier(llama, num_labels=len(names), pooling=classifier.pooling).to(
        device
    )
    load_state(model.classifier_head, classifier.head)
    folder = RunFolder(options.save_dir, "prompt")  # nothing is written there
    session = Session(options, folder, ranks, stop, device, torch.float32, None)
    predict_files(model, files, splits, session)
    return 0


def judge_pairs(options: Options, stop: StopRequest) -> int:
    """Say how often the good sentence of a pair is the likelier one."""
    reading = Reading(encoding=options.encoding)
    pairs = read_pairs(find_text_files(options.pairs, flag="--pairs"), reading)
    device, note = choose_device(options.use_gpu)
    print(f"device       {note}")
    llama, tokenizer = load_model(options, device)
    model = LlamaZeroShotClassifier(llama)
    found = compare_pairs(model, tokenizer, pairs, batch_size=options.batch_size, stop=stop)
    print("\n".join(pair_report(pairs, found)))
    return 0


# ---------------------------------------------------------------------------- generate

# The assignment's test sentence, continued when no prompt is given.
PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. Keanu Reeves, "
    "playing the hero John Wick, is"
)


def generate(options: Options, stop: StopRequest, ranks: Ranks) -> int:
    """Continue prompts; without any, the assignment's sentence at temperature 0 and 1."""
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        path = find_text_files([options.prompt_file], flag="--prompt_file")[0]
        lines = read_lines(path, Reading(encoding=options.encoding))
        prompts += [line for _, line in lines if line.strip()]
        if not prompts:
            raise UsageError(f"--prompt_file {path}: is empty; it takes a prompt a line")
    outputs = []
    if not prompts and not options.interactive and options.temperature is None:
        outputs = [
            (0.0, options.generated_sentence_low_temp_out),
            (1.0, options.generated_sentence_high_temp_out),
        ]
        for name, (_, path) in zip(("low", "high"), outputs, strict=True):
            check_writable_file(path, f"--generated_sentence_{name}_temp_out")
    device, note = choose_device(options.use_gpu)
    if options.weights == "int8" and device.type != "cpu":
        raise UsageError(
            "--weights int8 is faster on the CPU alone: with --use_gpu give --weights bfloat16"
        )
    if options.compile == "on":
        check_compiler(device)
    with contextlib.redirect_stdout(sys.stderr):  # the text is the result
        say(f"device       {note}")
        llama, tokenizer = load_model(options, device)
    template = llama.chat_template if prompts or options.interactive else None
    step = compile_step(device.type) if options.compile == "on" else None
    size = max(1, options.batch_size // options.num_samples)  # prompts continued at once
    if device.type == "cpu" or options.weights != "float32":
        rows = 1 if options.interactive else min(size, max(1, len(prompts))) * options.num_samples
        dtype, compiled = getattr(torch, options.weights), step is not None
        pack_weights(llama, dtype, rows=rows, compiled=compiled)
    writer = Writer(llama, tokenizer, options, stop, step, template)
    for temperature, path in outputs:
        print(f"Temperature is {temperature:g}", file=sys.stderr)
        texts = writer.continue_texts([PREFIX], temperature)
        print("---------------", file=sys.stderr)
        stop.check()
        write_text(path, "\n\n".join(texts))
        print(f"Wrote generated sentence to {path}.", file=sys.stderr)
    temperature = options.temperature
    if temperature is None:
        temperature = PROMPT_TEMPERATURE if template is None else CHAT_TEMPERATURE
    if options.interactive:
        return converse(writer, temperature)
    if template is not None:
        print("chat         each prompt is a question, which the model answers", file=sys.stderr)
    if not outputs:
        prompts = prompts or [PREFIX]
        for start in range(0, len(prompts), size):
            if stop.requested:
                break
            chosen = prompts[start : start + size]
            writer.continue_texts(chosen, temperature, first=start, of=len(prompts))
    return stop.exit_status if stop.requested else 0


# ---------------------------------------------------------------------------- entry


RUN_OPTION = {"pretrain": pretrain, "finetune": finetune, "prompt": prompt, "generate": generate}


def main(options: Options, stop: StopRequest | None = None) -> int:
    """Run one option; returns the exit status.

    2 for bad input, 130 or 143 when interrupted, 1 where the run failed or a file was not written.
    """
    stop, ranks = stop or StopRequest(), Ranks()

    def fail(error: Exception | str, status: int) -> int:
        if ranks.is_to_say(str(error)):
            print_error("run_llama.py", error)
        return status

    with stop.listening():
        try:
            ranks = Ranks.from_environment(timeout=options.dist_timeout)
            if ranks.world_size > 1:
                stop.repeats, stop.silent = LAUNCHER_REPEATS, not ranks.is_main
            if options.option not in ("pretrain", "finetune"):
                check_runs_alone(f"--option {options.option}")
            with ranks.connected(use_gpu=options.use_gpu):
                for note in find_idle_flags(options):
                    print(note, file=sys.stderr)
                return RUN_OPTION[options.option](options, stop, ranks)
        except UsageError as error:
            return fail(error, 2)
        except RunFailed as error:
            return fail(error, 1)
        except OSError as error:  # a disk that is full or fails, beside what is tried again
            where = f"{error.filename}: " if error.filename else ""
            return fail(f"{where}{error.strerror or error}", 1)
        except Interrupted:
            if ranks.is_main:
                print("stopped; there was nothing to save yet", file=sys.stderr)
            return stop.exit_status
        except (MemoryError, RuntimeError) as error:
            if ranks.world_size > 1 and is_lost_peer(error):
                said = ranks.lost_peer()
                return fail(said, 1) if said else 1
            if is_out_of_memory(error):
                return fail("out of memory: give a smaller batch or a smaller model", 1)
            raise
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    protect_output()
    status = main(OPTIONS_GIVEN)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        exit_at_once(status)
    sys.exit(status)
