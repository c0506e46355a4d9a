"""Pretrain a small Llama from scratch, then finetune, prompt and generate with it.

A function for each `--option`, read from top to bottom; what they call is in `minllama/`.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it starts Ctrl-C ends it, and no traceback

from config import parse_options
from minllama.cli.command_line import parse_or_exit

if __name__ == "__main__":  # --help and bad flags are answered before torch, which takes seconds
    OPTIONS_GIVEN = parse_or_exit(parse_options, "run_llama.py", sys.argv[1:])

import contextlib
import dataclasses
import os

import numpy as np
import torch

from config import TRAINING, Options, find_idle_flags
from llama import LlamaEmbeddingClassifier, LlamaZeroShotClassifier
from minllama.cli.command_line import describe_os_error, print_error, protect_output
from minllama.cli.console import progress_bar, say
from minllama.formats.find_model import find_model, load_model
from minllama.formats.pt_model import Classifier, read_classifier
from minllama.formats.vocabulary_fit import check_vocabulary
from minllama.inference.conversation import converse
from minllama.inference.copying import report_copies
from minllama.inference.evaluation import compare_pairs, pair_report, pair_rows, read_pairs
from minllama.inference.prompting import Prompts, score_labels
from minllama.inference.streaming import CHAT_TEMPERATURE, PROMPT_TEMPERATURE, Writer
from minllama.machine.device import (
    check_compiler,
    choose_device,
    is_out_of_memory,
    keep_memory_low,
)
from minllama.machine.ranks import Ranks, check_runs_alone, exit_at_once, is_lost_peer
from minllama.machine.sharding import load_state
from minllama.model.generation import NOT_NUMBERS, compile_step
from minllama.model.packing import pack_weights
from minllama.system.errors import Interrupted, RunFailed, UsageError
from minllama.system.files import check_writable_file, real_path, write_text
from minllama.system.signals import LAUNCHER_REPEATS, StopRequest
from minllama.text.find_files import find_text_files
from minllama.text.labelled import (
    Labels,
    is_table_of_results,
    read_labelled,
    report_predictions,
    table_text,
    write_result,
)
from minllama.text.reading import Reading, read_lines
from minllama.text.splits import (
    data_set_name,
    find_dialogue_files,
    find_labelled_files,
    find_sentences,
)
from minllama.training.chat_tuning import ChatTuning
from minllama.training.classification import (
    POOLING_DESCRIPTION,
    Classification,
    load_splits,
    predict_files,
)
from minllama.training.loop import OnStep, train
from minllama.training.pretraining import Pretraining, plan_for_gpus
from minllama.training.results import say_interrupted
from minllama.training.run import Run
from minllama.training.setup import (
    make_plan,
    open_run,
    use_checkpoint_folder,
    use_recorded_reading,
)
from minllama.training.task import Task
from utils import LlamaDataset

# ---------------------------------------------------------------------------- pretrain, finetune


def pretrain(
    options: Options, stop: StopRequest, ranks: Ranks, on_step: OnStep | None = None
) -> int:
    """Train a Llama on text files, from scratch or from given weights; returns the exit status."""
    if options.plan and options.world_size:
        plan_for_gpus(options, stop)
        return 0
    with open_run(options, "pretrain", ranks=ranks, stop=stop) as run:
        return run_task(run, Pretraining(run), on_step)


def finetune(
    options: Options, stop: StopRequest, ranks: Ranks, on_step: OnStep | None = None
) -> int:
    """Train a pretrained model on dialogues, or a classifier on it; returns the exit status."""
    prefix = f"finetune-{data_set_name(options.train)}"
    options = use_checkpoint_folder(options, prefix)  # predictions go there, too
    options = use_recorded_reading(options, prefix)
    if options.is_chat:
        files, task_class = find_dialogue_files(options), ChatTuning
    else:
        files, task_class = find_labelled_files(options, "finetuning"), Classification
    with open_run(options, prefix, ranks=ranks, stop=stop) as run:
        return run_task(run, task_class(run, files), on_step)


def run_task(run: Run, task: Task, on_step: OnStep | None) -> int:
    """Plan, train and finish a task whose data is loaded; returns the exit status.

    Every rank must call this.
    """
    keep_memory_low()
    make_plan(run, task)  # printed; refuses what cannot be resumed or does not fit on the disk
    if run.options.plan:
        return 0
    run.start()  # builds model and optimizer; loads the checkpoint, or clears the folder
    if note := task.describe_start():
        print(note)
    stopped = train(run, on_step)
    if not stopped:
        try:
            task.finish()  # its files, its last figures, and what they are for
        except Interrupted:  # what was trained is saved
            stopped = True
    return say_interrupted(run) if stopped else 0


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
    train = files.paths.get("train")
    if options.shots and train is None:
        raise UsageError(f"--shots {options.shots} needs --train, whose examples are shown")
    texts, reading = files.labels.texts, Reading.of_records(options)
    examples = read_labelled(train, texts, reading=reading) if options.shots else []
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
        files.labels.names,
        llama.config.max_seq_len,
        options.max_sentence_len,
    ).with_shots(examples, options.shots, options.seed)
    # Without any sentence: what `pmi` subtracts; and a question that is too long shows at once.
    base = score_labels(model, prompts, [""], "sum")
    for split, out in files.outs.items():
        path, plain = files.paths[split], train is None
        dataset = LlamaDataset(path, tokenizer, labels=texts, reading=reading, plain=plain)
        if split == min(files.outs):
            sentences = [example.sentence for example in dataset.examples]
            with contextlib.redirect_stdout(sys.stderr):
                check_vocabulary(tokenizer, sentences, options, flag=f"--{split} {path}")
        all_scores = np.zeros((len(dataset), len(texts)))
        batches = dataset.length_sorted_batches(options.batch_size)
        for indices in progress_bar(batches, desc=f"prompting {split}"):
            stop.check()
            sentences = [dataset.examples[index].sentence for index in indices]
            scores = score_labels(model, prompts, sentences, options.label_norm)
            if options.label_norm == "pmi":
                scores = scores - base
            if scores.isnan().any():
                raise UsageError(NOT_NUMBERS)
            all_scores[indices] = scores.cpu().numpy()
        cut = sum(example.sentence in prompts.cut for example in dataset.examples)
        if cut:
            print(
                f"{split}: {cut} of {len(dataset)} sentences were cut to fit with the question",
                file=sys.stderr,
            )
        report_predictions(
            split,
            dataset.examples,
            all_scores,
            files.labels,
            out,
            keep=f"{split}_out" not in options.given,
        )
    return 0


def classify(options: Options, classifier: Classifier, stop: StopRequest, ranks: Ranks) -> int:
    """Apply a fine-tuned classifier to sentences, labelled or not."""
    names = classifier.label_names
    labels = Labels(names, classifier.label_texts or Labels.counted(names).texts)
    files = find_sentences(options, labels)
    with contextlib.redirect_stdout(sys.stderr):
        device, note = choose_device(options.use_gpu)
        pooled = POOLING_DESCRIPTION[classifier.pooling]
        say(
            f"device       {note}",
            f"classifier   fine-tuned to tell {', '.join(names)} from {pooled}",
        )
        llama, tokenizer = load_model(options, device)
        context = llama.config.max_seq_len
        splits = load_splits(files, options, tokenizer, context=context, plain=True)
    model = LlamaEmbeddingClassifier(llama, num_labels=len(names), pooling=classifier.pooling).to(
        device
    )
    load_state(model.classifier_head, classifier.head)
    predict_files(model, files, splits, options=options, ranks=ranks, stop=stop)
    return 0


def judge_pairs(options: Options, stop: StopRequest) -> int:
    """Say how often the good sentence of a pair is the likelier one."""
    out, paths = options.test_out, find_text_files(options.pairs, flag="--pairs")
    if out is not None:
        if not is_table_of_results(out):
            raise UsageError(f"--test_out {out}: of pairs it is a table; name it .csv or .jsonl")
        check_writable_file(out, "--test_out")
        if real_path(out) in map(real_path, paths):
            raise UsageError(f"--test_out {out}: is one of the files of --pairs; give a new one")
    pairs = read_pairs(paths, Reading(encoding=options.encoding))
    device, note = choose_device(options.use_gpu)
    print(f"device       {note}")
    llama, tokenizer = load_model(options, device)
    both = [text for pair in pairs for text in (pair.good, pair.bad)]
    check_vocabulary(tokenizer, both, options, flag=f"--pairs {' '.join(options.pairs)}")
    model = LlamaZeroShotClassifier(llama)
    found = compare_pairs(model, tokenizer, pairs, batch_size=options.batch_size, stop=stop)
    print("\n".join(pair_report(pairs, found)))
    if out is not None:
        write_result(out, table_text(pair_rows(pairs, found), out), "pairs", keep=False)
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
        for path in find_text_files([options.prompt_file], flag="--prompt_file"):
            lines = read_lines(path, Reading(encoding=options.encoding))
            prompts += [line for _, line in lines if line.strip()]
        if len(prompts) == len(options.prompt):
            raise UsageError(
                f"--prompt_file {options.prompt_file}: is empty; it takes a prompt a line"
            )
    outputs = []
    if not prompts and not options.interactive and options.temperature is None:
        outputs = [
            (0.0, options.generated_sentence_low_temp_out),
            (1.0, options.generated_sentence_high_temp_out),
        ]
        for name, (_, path) in zip(("low", "high"), outputs, strict=True):
            check_writable_file(path, f"--generated_sentence_{name}_temp_out")
        if len({real_path(path) for _, path in outputs}) < len(outputs):
            raise UsageError(
                f"--generated_sentence_high_temp_out {path}: is --generated_sentence_low_temp_out, "
                "too; give each its own file"
            )
    originals = options.check_copies and find_text_files(
        options.check_copies, flag="--check_copies"
    )
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
    written: list[tuple[str, str]] = []  # each text with the prompt that it begins with
    for temperature, path in outputs:
        print(f"Temperature is {temperature:g}", file=sys.stderr)
        texts = writer.continue_texts([PREFIX], temperature)
        print("---------------", file=sys.stderr)
        stop.check()
        written += [(PREFIX, text) for text in texts]
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
            texts = writer.continue_texts(chosen, temperature, first=start, total=len(prompts))
            written += [(chosen[i // options.num_samples], text) for i, text in enumerate(texts)]
    if originals and not stop.requested:
        print("\n".join(report_copies(written, originals, tokenizer, options, stop)))
    return stop.exit_status if stop.requested else 0


# ---------------------------------------------------------------------------- entry


RUN_OPTION = {"pretrain": pretrain, "finetune": finetune, "prompt": prompt, "generate": generate}


def main(
    options: Options, stop: StopRequest | None = None, *, on_step: OnStep | None = None
) -> int:
    """Run one option; returns the exit status.

    2 for bad input, 130 or 143 when interrupted, 1 where the run failed or a file was not written.
    What trains calls `on_step` after each step, with the record that metrics.jsonl has.
    """
    stop, ranks = stop or StopRequest(), Ranks()

    def fail(error: Exception | str, status: int) -> int:
        if ranks.should_report(str(error)):
            print_error("run_llama.py", error)
        return status

    with stop.listening():
        try:
            ranks = Ranks.from_environment(timeout=options.dist_timeout)
            if ranks.world_size > 1:
                stop.repeats, stop.silent = LAUNCHER_REPEATS, not ranks.is_main
            if options.option not in TRAINING:
                check_runs_alone(f"--option {options.option}")
            with ranks.connected(use_gpu=options.use_gpu) as ranks:
                for note in find_idle_flags(options):
                    print(note, file=sys.stderr)
                if options.option in TRAINING:
                    return RUN_OPTION[options.option](options, stop, ranks, on_step)
                return RUN_OPTION[options.option](options, stop, ranks)
        except UsageError as error:
            return fail(error, 2)
        except RunFailed as error:
            return fail(error, 1)
        except OSError as error:  # a disk that is full or fails, beside what is tried again
            return fail(describe_os_error(error), 1)
        except Interrupted:
            if ranks.is_main:
                print("stopped; there was nothing to save yet", file=sys.stderr)
            return stop.exit_status
        except (MemoryError, RuntimeError) as error:
            if ranks.world_size > 1 and is_lost_peer(error):
                message = ranks.lost_peer_message()
                return fail(message, 1) if message else 1
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
