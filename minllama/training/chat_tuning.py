"""Training on dialogues: `--option finetune --train NAME.jsonl`, the loss on the answers only."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import Options, fingerprint
from llama import Llama, load_pretrained
from minllama.cli.console import progress_bar, say
from minllama.formats.find_model import load_model
from minllama.formats.vocabulary_fit import SAMPLED_TEXTS, check_vocabulary
from minllama.model.generation import Sampling, generate_tokens
from minllama.model.lora import add_lora
from minllama.runs.metrics import add_findings, read_records
from minllama.runs.run_folder import Findings
from minllama.system.errors import UsageError
from minllama.text.chat import ChatTemplate, Template
from minllama.text.dialogues import Intake, read_dialogues
from minllama.text.labelled import write_result
from minllama.text.reading import Reading, byte_bar
from minllama.text.records import places
from minllama.text.splits import SplitFiles
from minllama.training.identity import DIALOGUES, LABELLED
from minllama.training.results import WHAT_NEXT, print_best, print_results
from minllama.training.run import Run
from minllama.training.task import NextTokenTask, trained_sizes
from tokenizer import Tokenizer
from utils import ChatDataset, batches_by_length

SHOWN_ANSWERS, ANSWERS_ON_PAGE = 3, 50
RISEN = 1.05  # times its best: a validation loss that has risen, where it did for half the run
ANSWER_TOKENS = 200  # at most, of an answer at the end of a run

# ---------------------------------------------------------------------------- before the loop


def load_dialogues(
    files: SplitFiles, options: Options, llama: Llama, tokenizer: Tokenizer
) -> tuple[ChatDataset, ChatDataset | None]:
    """The dialogues to train on, and those to choose the best model by; says what was loaded."""

    def load(path: Path, split: str) -> ChatDataset:
        with byte_bar(f"reading {path.name}", path.stat().st_size) as bar:
            intake = Intake(options.skip_bad_lines)
            reading = Reading(encoding=options.encoding)
            dialogues = read_dialogues(path, reading, bar.update, intake)
            if split == "train":
                first = [*itertools.islice(dialogues, SAMPLED_TEXTS)]
                texts = [" ".join(map(" ".join, dialogue.exchanges)) for dialogue in first]
                check_vocabulary(tokenizer, texts, options, flag=f"--{split} {path}")
                dialogues = itertools.chain(first, dialogues)
            how = (tokenizer, llama.chat_template, llama.config.max_seq_len, places(path))
            dataset = ChatDataset(dialogues, *how)
        left_out = [*intake.lines(), *dataset.cuts.lines()]
        if not len(dataset):
            why = "; ".join(line.strip() for line in left_out) or "the file is empty"
            raise UsageError(f"--{split} {path}: holds no dialogue that can be learnt from: {why}")
        say(f"Loaded {dataset.dialogues:,} dialogues from {path} ({split})", *left_out)
        return dataset

    train_set = load(files.paths["train"], "train")
    if "dev" in files.paths:
        return train_set, load(files.paths["dev"], "dev")
    train_set, val_set = train_set.split(options.val_fraction)
    if val_set is not None:
        say(f"validation   {val_set.dialogues:,} of the dialogues held out")
    return train_set, val_set


class Question(NamedTuple):
    """A question of --test behind what was said before it, as ids, and the answer expected."""

    ids: list[int]
    text: str
    answer: str


def read_questions(
    path: Path | None, options: Options, template: Template, tokenizer: Tokenizer
) -> list[Question]:
    """Every question of the dialogues in a file, in order; none without a file."""
    if path is None:
        return []
    questions = []
    intake = Intake(options.skip_bad_lines)
    reading = Reading(encoding=options.encoding)
    for dialogue in read_dialogues(path, reading, intake=intake):
        for number, (text, answer) in enumerate(dialogue.exchanges):
            before = dialogue.exchanges[:number]
            try:
                ids = template.prompt_ids(tokenizer, text, before, dialogue.system)
            except UsageError as error:
                raise UsageError(f"{places(path)(dialogue.line)}: {error}") from None
            questions.append(Question(ids, text, answer))
    say(*(f"{line} ({path})" for line in intake.lines()))
    return questions


# ---------------------------------------------------------------------------- the task


class ChatTuning(NextTokenTask):
    """Next-token prediction of answers, in batches of similar length, by (seed, epoch)."""

    def __init__(self, run: Run, files: SplitFiles) -> None:
        """Load the model, the dialogues and the questions. Raises UsageError."""
        self.run, self.files = run, files
        self.llama, self.tokenizer = load_model(run.options, run.device)
        llama, tokenizer = self.llama, self.tokenizer
        llama.chat_template = llama.chat_template or ChatTemplate()
        if run.checkpoint is None:  # which has that of the run's start
            run.options = run.options.with_finetuning_lr(llama.config)
        options = run.options
        self.train_set, self.val_set = load_dialogues(files, options, llama, tokenizer)
        self.questions = read_questions(
            files.paths.get("test"), options, llama.chat_template, tokenizer
        )
        if options.lora_rank:
            add_lora(llama, rank=options.lora_rank)
        dev = files.paths.get("dev")  # else a share of --train, which is the same file on resume
        self.held_out = dev and fingerprint(dev.read_bytes())
        lengths = self.train_set.lengths
        self.order = batches_by_length(lengths, options.global_batch_size, options.seed)
        self.identity = {
            LABELLED: fingerprint(files.paths["train"].read_bytes()),
            DIALOGUES: len(self.train_set),
            "model shape": llama.config.to_model_args(),
            "--tokenizer_model": tokenizer.fingerprint,
            "--lora_rank": options.lora_rank,
        }
        text, val = self.identity[LABELLED], self.val_set
        self.data = {
            "text": text,
            "held_out": self.held_out or (val and f"{len(val):,} of {text}"),
            "vocabulary": tokenizer.fingerprint,
        }
        self.sizes = trained_sizes(llama, options) | {
            "config": llama.config,
            "sequences": len(self.train_set),
            "tokens": int(lengths.sum()),
            "sequence_length": int(lengths.max()),
            "logits_width": llama.config.vocab_size,
            "vocabulary_bytes": len(tokenizer.model_bytes),
        }

    def build(self) -> None:
        self.set_llama(dynamic=True)

    def sequences(self, epoch: int, index: int) -> np.ndarray:
        return self.order(epoch, index)

    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        tokens = int(self.train_set.lengths[numbers].sum())  # the questions' are read, too
        return self.train_set.count_targets(numbers), tokens

    def locate(self, number: int) -> str:
        line, dialogue = self.train_set.lines[number], self.train_set.numbers[number]
        return f"{places(self.files.paths['train'])(line)} (dialogue {dialogue:,})"

    def finish(self) -> None:
        """Show what the best model answers, and how many of its answers match exactly."""
        run, tokenizer = self.run, self.tokenizer
        run.checkpoints.finish()
        if not run.ranks.is_main:
            return
        best = print_best(run)
        advice = self.advise() if self.val_set is not None else None
        if advice is not None:
            say(advice)
        model = load_pretrained(best).to(run.device)
        shown = self.val_set or self.train_set
        prompts = [shown.first_question(i) for i in range(min(SHOWN_ANSWERS, len(shown)))]
        say("what it answers:")
        asked = [tokenizer.decode(prompt) for prompt in prompts]
        answers = answers_to(prompts, model, tokenizer)
        for prompt, answer in zip(asked, answers, strict=True):
            print(f"  {prompt} {answer}".replace("\n", "\n  "))
        findings: Findings = {"what it answers": numbered(zip(asked, answers, strict=True))}
        if self.questions:
            rows = report_answers(self.questions, self.files, model, tokenizer, run)
            findings["answers to --test"] = rows
        findings[WHAT_NEXT] = print_results(run.folder, best, "generate")
        if advice is not None:
            findings[WHAT_NEXT].insert(0, advice.split(": ", 1))
        add_findings(run.folder, findings, last_step=run.last_step)

    def advise(self) -> str | None:
        """What to do where the loss of the held-out dialogues rose after the best model's step."""
        run, progress = self.run, self.run.progress
        losses = [r.get("val_loss") for r in read_records(run.folder.file("metrics.jsonl"))]
        last = next((loss for loss in reversed(losses) if loss is not None), None)
        if None in (last, progress.best) or 2 * progress.best_step > progress.step:
            return None
        if last <= RISEN * progress.best:
            return None
        remedy = "more dialogues, which ask the same in other words"
        if "dev" not in self.files.paths:
            remedy += "; where each has a fact of its own, --val_fraction 0 trains on all"
        return f"overfitted from step {progress.best_step:,} on: {remedy}"


# ---------------------------------------------------------------------------- the answers


def answers_to(prompts: list[list[int]], model: Llama, tokenizer: Tokenizer) -> list[str]:
    """The likeliest answer to each prompt's last question."""
    ids: list[list[int]] = [[] for _ in prompts]
    for step in generate_tokens(
        model,
        prompts,
        max_new_tokens=ANSWER_TOKENS,
        sampling=Sampling(temperature=0),
        stop_ids=tokenizer.vocabulary.end_ids,
    ):
        for row, token in zip(ids, step, strict=True):
            row += [] if token is None else [token]
    return [tokenizer.decode(row).strip() for row in ids]


def report_answers(
    questions: list[Question], files: SplitFiles, model: Llama, tokenizer: Tokenizer, run: Run
) -> list[list[str]]:
    """Answer the questions and say how many of the answers are those of the file word for word.

    The others are for a reader of --test_out to judge. Returns this and the first answers in rows.
    """
    rows: list[tuple[str, str]] = []
    lines, exact_matches, size = [], 0, run.options.batch_size
    parts = [questions[start : start + size] for start in range(0, len(questions), size)]
    for part in progress_bar(parts, desc="answering", leave=False, disable=None):
        run.stop.check()
        answers = answers_to([question.ids for question in part], model, tokenizer)
        for question, answer in zip(part, answers, strict=True):
            exact_matches += answer == question.answer
            record = {"prompt": question.text, "response": answer, "expected": question.answer}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            shown = answer + f" (expected: {question.answer})" * (answer != question.answer)
            rows.append((question.text, shown))
    score = (
        f"{exact_matches:,} of {len(questions):,} answers are those of "
        f"{files.paths['test']} word for word ({exact_matches / len(questions):.1%})"
    )
    say(f"test: {score}")
    keep = "test_out" not in run.options.given
    write_result(files.outs["test"], "".join(lines), "answers", keep=keep)
    return [["score", score], *numbered(rows[:ANSWERS_ON_PAGE])]


def numbered(rows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Questions and answers as rows of a page, which tells them apart by their names."""
    return [[f"{number}. {name}", text] for number, (name, text) in enumerate(rows, start=1)]
