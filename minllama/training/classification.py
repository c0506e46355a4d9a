"""Classifying sentences: loading them, training a classifier on them, and what it predicts."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import Options, fingerprint
from llama import LlamaEmbeddingClassifier
from minllama.cli.console import progress_bar, say
from minllama.formats.find_model import load_model
from minllama.formats.pt_file import load_pt
from minllama.formats.vocabulary_fit import check_vocabulary
from minllama.machine.ranks import Ranks
from minllama.machine.sharding import full_state_dict, load_state, no_gradients
from minllama.model.generation import NOT_NUMBERS
from minllama.model.lora import add_lora, merge_lora
from minllama.runs.metrics import add_findings
from minllama.runs.run_folder import Findings
from minllama.system.errors import UsageError
from minllama.system.signals import StopRequest
from minllama.text.labelled import (
    SHOWN_LABELS,
    Scores,
    is_unlabelled,
    labels_of,
    report_predictions,
    write_result,
)
from minllama.text.reading import Reading
from minllama.text.splits import SplitFiles
from minllama.training.identity import LABELLED, SENTENCES_HELD_OUT
from minllama.training.results import NEW_SENTENCES, WHAT_NEXT, print_best, print_results
from minllama.training.run import Run
from minllama.training.task import Batch, Task, trained_sizes
from tokenizer import Tokenizer
from utils import LlamaDataset, batches_by_length

POOLING_DESCRIPTION = {"last": "the state after the last token", "mean": "the mean over the tokens"}


def load_splits(
    files: SplitFiles,
    options: Options,
    tokenizer: Tokenizer,
    *,
    context: int,
    plain: bool = False,
) -> dict[str, LlamaDataset]:
    """The encoded sentences of each file, labelled or, `plain`, not; says what was loaded.

    Where there is train and no dev, a share of train is held out as such.
    """
    max_tokens = min(options.max_sentence_len or context, context - 1)  # and BOS
    splits = {
        split: LlamaDataset(
            path,
            tokenizer,
            labels=files.labels.texts,
            max_sentence_len=max_tokens,
            reading=Reading.of_records(options),
            plain=plain,
        )
        for split, path in files.paths.items()
    }
    first, dataset = next(iter(splits.items()))
    sentences = [example.sentence for example in dataset.examples]
    check_vocabulary(tokenizer, sentences, options, flag=f"--{first} {dataset.path}")
    for split, dataset in splits.items():
        cut = f", {dataset.cut} of them cut to {max_tokens} tokens" if dataset.cut else ""
        print(f"Loaded {len(dataset)} sentences from {dataset.path} ({split}){cut}")
    if "train" in splits and "dev" not in splits:
        splits["train"], splits["dev"] = splits["train"].split(options.val_fraction)
        say(f"validation   {len(splits['dev']):,} of the sentences held out (--val_fraction)")
    return splits


def predict(
    model: LlamaEmbeddingClassifier,
    dataset: LlamaDataset,
    *,
    options: Options,
    ranks: Ranks,
    stop: StopRequest,
) -> np.ndarray:
    """Each label's log-probability, (n, labels) float32, of the sentences in the file's order.

    Every rank must call this.

    In float32 whatever the training's dtype: bfloat16 rounds differently at another batch size,
    and a prediction must not depend on its batch. Raises Interrupted when asked to stop, and
    UsageError where the scores are NaN.
    """
    device = next(model.parameters()).device
    scores = np.zeros((len(dataset), model.classifier_head.out_features), np.float32)
    model.eval()
    with no_gradients(model):
        batches = dataset.length_sorted_batches(options.batch_size)
        numbers = list(ranks.split_evenly(len(batches)))
        predicted = []  # stay on the device, which none of the batches waits for
        for number, is_own in progress_bar(numbers, desc="predicting", leave=False, disable=None):
            ranks.check_stop(stop)
            batch = Batch(dataset.collate(batches[number])).to(device)
            log_probs = model(*batch.inputs[:2])  # (B, labels)
            predicted.append(log_probs if is_own else torch.zeros_like(log_probs))
        if predicted:  # of what another rank counts there are zeros
            places = np.concatenate([batches[number] for number, _ in numbers])
            scores[places] = torch.cat(predicted).cpu().numpy()
    model.train()
    scores = ranks.sum_array(scores)
    if np.isnan(scores).any():  # the first of them would be the largest
        raise UsageError(NOT_NUMBERS)
    return scores


def predict_files(
    model: LlamaEmbeddingClassifier,
    files: SplitFiles,
    splits: dict[str, LlamaDataset],
    *,
    options: Options,
    ranks: Ranks,
    stop: StopRequest,
) -> Findings:
    """Report and write the predictions on each file that has a place for them.

    Returns the figures by split, as a page has them.
    """
    findings = {}
    for split, out in files.outs.items():
        scores = predict(model, splits[split], options=options, ranks=ranks, stop=stop)
        report = (split, splits[split].examples, scores, files.labels, out)
        keep = f"{split}_out" not in options.given
        rows = ranks.on_main(functools.partial(report_predictions, *report, keep=keep))
        findings |= {f"predictions on {split}": rows} if rows else {}
    return findings


class Classification(Task):
    """Classification of sentences, in batches of similar length in the order of (seed, epoch)."""

    def __init__(self, run: Run, files: SplitFiles) -> None:
        """Load the model and the sentences. Raises UsageError."""
        self.run, self.files = run, files
        self.llama, tokenizer = load_model(run.options, run.device)
        self.llama.chat_template = None  # a classifier answers no questions
        config = self.llama.config
        if run.checkpoint is None:  # which has that of the run's start
            run.options = run.options.with_finetuning_lr(config)
        options = run.options
        self.splits = load_splits(files, options, tokenizer, context=config.max_seq_len)
        self.train_set, self.dev_set = self.splits["train"], self.splits["dev"]
        if files.mapping:
            counts = Counter(labels_of(self.train_set.examples))
            words = enumerate(files.labels.texts[:SHOWN_LABELS])
            shown = ", ".join(f"{text} ({counts[number]:,})" for number, text in words)
            say(f"labels       words of --train, by the alphabet: {shown}")
        if options.lora_rank:
            add_lora(self.llama, rank=options.lora_rank)
        self.model = LlamaEmbeddingClassifier(
            self.llama,
            num_labels=len(files.labels.names),
            hidden_dropout_prob=options.hidden_dropout_prob,
            freeze_backbone=options.freeze_backbone,
            pooling=options.pooling,
        ).to(run.device)
        pooled = POOLING_DESCRIPTION[options.pooling]
        say(f"pooling      {options.pooling}: the head reads {pooled} (--pooling)")
        self.higher_is_better = not is_unlabelled(self.dev_set.examples)
        self.goal = "dev_accuracy" if self.higher_is_better else "loss"
        dev = files.paths.get("dev")  # else a share of --train, which is the same file on resume
        self.held_out = dev and fingerprint(dev.read_bytes())
        lengths = self.train_set.lengths
        self.order = batches_by_length(lengths, options.global_batch_size, options.seed)
        self.identity = {
            LABELLED: fingerprint(files.paths["train"].read_bytes()),
            SENTENCES_HELD_OUT: 0 if dev else len(self.dev_set),
            "model shape": config.to_model_args(),
            "--tokenizer_model": tokenizer.fingerprint,
            "--max_sentence_len": options.max_sentence_len,
            "--freeze_backbone": options.freeze_backbone,
            "--lora_rank": options.lora_rank,
            "--pooling": options.pooling,
        }
        if not files.labels.is_counted:
            self.identity["--label_names"] = files.labels.texts
        text = self.identity[LABELLED]
        self.data = {
            "text": text,
            "held_out": self.held_out or f"{len(self.dev_set):,} of {text}",
            "vocabulary": tokenizer.fingerprint,
        }
        self.sizes = trained_sizes(self.model, options) | {
            "config": config,
            "sequences": len(lengths),
            "tokens": int(lengths.sum()),
            "sequence_length": int(lengths.max()),
            "logits_width": len(files.labels.names),
            "vocabulary_bytes": len(tokenizer.model_bytes),
        }

    def build(self) -> None:
        # Predictions are made in float32; training's dtype is autocast's.
        self.set_model(self.model, self.model, dtype=torch.float32, dynamic=True)

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
        run = self.run
        predictions = predict(
            self.model, self.dev_set, options=run.options, ranks=run.ranks, stop=run.stop
        ).argmax(axis=1)
        labels = labels_of(self.dev_set.examples)
        scores = Scores.of(labels, predictions.tolist(), len(self.files.labels.names))
        return {"dev_accuracy": scores.accuracy, "dev_f1": scores.macro_f1}

    def weights(self) -> dict[str, Any]:
        """Those of the Llama, and the classifier's head."""
        head = full_state_dict(self.model.classifier_head, self.run.ranks)
        labels = self.files.labels
        texts = {} if labels.is_counted else {"label_texts": labels.texts}
        return super().weights() | {
            "classifier_head": {name: tensor.cpu() for name, tensor in head.items()},
            "label_names": labels.names,
            **texts,
            "pooling": self.model.pooling,
        }

    def load_weights(self, path: Path) -> None:
        """Put what `weights` returned back into the classifier, its adapters merged."""
        payload = load_pt(path)
        if self.run.options.lora_rank:
            merge_lora(self.llama)
        load_state(self.llama, payload["model"])
        load_state(self.model.classifier_head, payload["classifier_head"])

    def locate(self, number: int) -> str:
        return f"{self.train_set.path}, sentence {number + 1:,}"

    def finish(self) -> None:
        """Report and write the best model's predictions on dev and test."""
        run, files = self.run, self.files
        run.checkpoints.finish()
        best = print_best(run)
        self.load_weights(best)
        findings = predict_files(
            self.model, files, self.splits, options=run.options, ranks=run.ranks, stop=run.stop
        )
        if files.mapping:
            pairs = dict(zip(files.labels.texts, files.labels.names, strict=True))
            text = json.dumps(pairs, ensure_ascii=False, indent=1) + "\n"
            run.ranks.on_main(
                functools.partial(write_result, files.mapping, text, "labels", keep=True)
            )
        # Never on --train, of which it has learnt the answers.
        others = {split: path for split, path in files.paths.items() if not files.is_train(split)}
        known = others.get("test") or others.get("dev")
        test: list[str | Path] = ["--test", known or NEW_SENTENCES]
        for name in ("text_field", "label_field"):  # of a table, whose columns have own names
            if known and getattr(run.options, name) != getattr(Reading, name):
                test += [f"--{name}", getattr(run.options, name)]
        findings[WHAT_NEXT] = print_results(run.folder, best, "prompt", test=test)
        run.ranks.on_main(lambda: add_findings(run.folder, findings, last_step=run.last_step))
