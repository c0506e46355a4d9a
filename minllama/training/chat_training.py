"""Training on dialogues: `--option finetune --train NAME.jsonl`, the loss on the answers only."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import Options, check_options, fingerprint
from llama import Llama, load_pretrained
from minllama.cli.console import progress_bar, say
from minllama.formats.models import load_model
from minllama.machine.device import keep_freed_memory
from minllama.machine.ranks import Ranks
from minllama.model.generation import Sampling, generate_tokens
from minllama.model.lora import add_lora
from minllama.system.errors import Interrupted, UsageError
from minllama.system.files import write_text
from minllama.system.signals import StopRequest
from minllama.text.chat import ChatTemplate, read_dialogues
from minllama.text.reading import Reading, byte_bar
from minllama.text.splits import SplitFiles, find_dialogue_files
from minllama.training.next_token import NextTokenTask
from minllama.training.run import Run
from minllama.training.session import Session, open_session, print_results, say_interrupted
from minllama.training.training import train
from optimizer import layer_matrices
from tokenizer import Tokenizer
from utils import ChatDataset, batches_by_length

# Where --lr is not typed: 3e-3 for a width of 128, 4e-4 for 512, 5e-5 for 2,048; and more for
# adapters, which begin at zero.
LR, WIDTH, LORA_TIMES = 3e-3, 128, 3
SHOWN_ANSWERS = 3
ANSWER_TOKENS = 200  # at most, of an answer at the end of a run

# ---------------------------------------------------------------------------- before the loop


def with_chat_lr(session: Session, width: int) -> Options:
    """The options with a learning rate that suits a model of this width, where none is typed."""
    options = session.options
    if session.checkpoint is not None or "lr" in options.given:  # it has that of the run's start
        return options
    lr = LR * (WIDTH / width) ** 1.5 * (LORA_TIMES if options.lora_rank else 1)
    options = dataclasses.replace(options, lr=float(f"{lr:.2g}"))
    print(f"lr           {options.lr:g}, for dialogues with a model of width {width} (--lr)")
    check_options(options)
    return options


def load_dialogues(
    files: SplitFiles, options: Options, llama: Llama, tokenizer: Tokenizer
) -> tuple[ChatDataset, ChatDataset | None]:
    """The dialogues to train on, and those to choose the best model by; says what was loaded."""

    def load(path: Path, split: str) -> ChatDataset:
        with byte_bar(f"reading {path.name}", path.stat().st_size) as bar:
            dialogues = read_dialogues(path, Reading(encoding=options.encoding), bar.update)
            found = ChatDataset(dialogues, tokenizer, llama.chat_template, llama.config.max_seq_len)
        if not len(found):
            raise UsageError(f"--{split} {path}: holds no dialogue that can be learnt from")
        count = len(np.unique(found.lines))
        say(f"Loaded {count:,} dialogues from {path} ({split})", *found.cuts.lines())
        return found

    train_set = load(files.paths["train"], "train")
    if "dev" in files.paths:
        return train_set, load(files.paths["dev"], "dev")
    train_set, val_set = train_set.split(options.val_fraction)
    if val_set is not None:
        print(f"validation   {len(np.unique(val_set.lines)):,} of the dialogues held out")
    return train_set, val_set


class Question(NamedTuple):
    """A question of --test behind what was said before it, as ids, and the answer expected."""

    ids: list[int]
    text: str
    answer: str


def read_questions(
    path: Path | None, options: Options, template: ChatTemplate, tokenizer: Tokenizer
) -> list[Question]:
    """Every question of the dialogues in a file, in order; none without a file."""
    if path is None:
        return []
    questions = []
    for dialogue in read_dialogues(path, Reading(encoding=options.encoding)):
        for number, (text, answer) in enumerate(dialogue.exchanges):
            before = dialogue.exchanges[:number]
            ids = template.prompt_ids(tokenizer, text, before, dialogue.system)
            questions.append(Question(ids, text, answer))
    return questions


# ---------------------------------------------------------------------------- the task


class ChatTuning(NextTokenTask):
    """Next-token prediction of answers, in batches of similar length, by (seed, epoch)."""

    def __init__(
        self,
        session: Session,
        path: Path,
        model: Llama,
        train_set: ChatDataset,
        val_set: ChatDataset | None,
    ) -> None:
        super().__init__(session, model, train_set, val_set, dynamic=True)
        self.path = path
        options = session.options
        self.order = batches_by_length(train_set.lengths, options.global_batch_size, options.seed)

    def sequences(self, epoch: int, index: int) -> np.ndarray:
        return self.order(epoch, index)

    def count(self, numbers: np.ndarray) -> tuple[int, int]:
        tokens = int(self.train_set.lengths[numbers].sum())  # the questions' are read, too
        return self.train_set.count_targets(numbers), tokens

    def locate(self, number: int) -> str:
        return f"{self.path}:{self.train_set.lines[number]}"


def finetune_chat(options: Options, stop: StopRequest, ranks: Ranks) -> int:
    """Train a model to answer as in the dialogues of --train; returns the exit status."""
    if options.freeze_backbone:
        raise UsageError(
            "--freeze_backbone is for labelled sentences: dialogues have no linear head to train"
        )
    files = find_dialogue_files(options)
    train_file = files.paths["train"]
    with open_session(options, f"finetune-{files.name}", ranks=ranks, stop=stop) as session:
        keep_freed_memory()
        llama, tokenizer = load_model(session.options, session.device)
        llama.chat_template = llama.chat_template or ChatTemplate()
        session.options = options = with_chat_lr(session, llama.config.dim)
        train_set, val_set = load_dialogues(files, options, llama, tokenizer)
        questions = read_questions(files.paths.get("test"), options, llama.chat_template, tokenizer)
        if options.lora_rank:
            add_lora(llama, rank=options.lora_rank, alpha=2 * options.lora_rank)
        identity = {
            "--train": fingerprint(train_file.read_bytes()),
            "dialogues to train on (--dev, --val_fraction)": len(train_set),
            "model shape": llama.config.to_model_args(),
            "--tokenizer_model": tokenizer.fingerprint,
            "--lora_rank": options.lora_rank,
        }
        muon = layer_matrices(llama) if options.optimizer == "muon" else []
        session.settle(
            identity,
            config=llama.config,
            trainable_parameters=sum(p.numel() for p in llama.parameters() if p.requires_grad),
            muon_parameters=sum(p.numel() for p in muon),
            sequences=len(train_set),
            tokens=int(train_set.lengths.sum()),
            sequence_length=int(train_set.lengths.max()),
            logits_width=llama.config.vocab_size,
        )
        if options.plan:
            return 0
        run = Run(session, ChatTuning(session, train_file, llama, train_set, val_set))
        run.start()
        if train(run):
            return say_interrupted(session, run.progress.step)
        try:
            return finish(run, files, questions, tokenizer)
        except Interrupted:
            return say_interrupted(session, run.progress.step)


# ---------------------------------------------------------------------------- the end


def finish(run: Run, files: SplitFiles, questions: list[Question], tokenizer: Tokenizer) -> int:
    """Show what the best model answers, and how often rightly; returns the exit status.

    Raises Interrupted when asked to stop.
    """
    run.checkpoints.finish()
    if not run.ranks.is_main:
        return 0
    best = run.folder.file("best-model.pt")
    epoch = run.progress.best_step / run.plan.steps_per_epoch
    print(f"\nbest model: {best}, after step {run.progress.best_step:,} (epoch {epoch:.3g})")
    model = load_pretrained(best).to(run.device)
    shown = run.task.val_set or run.task.train_set
    prompts = [shown.first_question(i) for i in range(min(SHOWN_ANSWERS, len(shown)))]
    print("what it answers:")
    for prompt, answer in zip(prompts, answers_to(prompts, model, tokenizer), strict=True):
        print(f"  {tokenizer.decode(prompt)} {answer}".replace("\n", "\n  "))
    if questions:
        report_answers(questions, files, model, tokenizer, run)
    print_results(run.folder, best, None, "generate")
    return 0


def answers_to(prompts: list[list[int]], model: Llama, tokenizer: Tokenizer) -> list[str]:
    """The likeliest answer to each prompt's last question."""
    ids: list[list[int]] = [[] for _ in prompts]
    for step in generate_tokens(
        model,
        prompts,
        max_new_tokens=ANSWER_TOKENS,
        sampling=Sampling(temperature=0),
        stop_ids=[tokenizer.eos_id],
    ):
        for row, token in zip(ids, step, strict=True):
            row += [] if token is None else [token]
    return [tokenizer.decode(row).strip() for row in ids]


def report_answers(
    questions: list[Question], files: SplitFiles, model: Llama, tokenizer: Tokenizer, run: Run
) -> None:
    """Answer the questions and say how many of the answers are those of the file word for word.

    The others are for a reader of --test_out to judge.
    """
    lines, right, size = [], 0, run.options.batch_size
    parts = [questions[start : start + size] for start in range(0, len(questions), size)]
    for part in progress_bar(parts, desc="answering", leave=False, disable=None):
        run.stop.check()
        found = answers_to([question.ids for question in part], model, tokenizer)
        for question, answer in zip(part, found, strict=True):
            right += answer == question.answer
            record = {"prompt": question.text, "response": answer, "expected": question.answer}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(files.outs["test"], "".join(lines))
    print(
        f"test: {right:,} of {len(questions):,} answers are those of {files.paths['test']} word "
        f"for word ({right / len(questions):.1%})"
    )
    print(f"wrote {files.outs['test']}")
