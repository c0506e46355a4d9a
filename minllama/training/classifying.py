"""A classifier on labelled files: the files encoded, batches of them, and its predictions.

Knows nothing of how a classifier is trained.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from config import Options
from llama import LlamaEmbeddingClassifier
from minllama.cli.console import progress_bar
from minllama.machine.sharding import no_gradients
from minllama.text.labelled import report_predictions
from minllama.text.splits import SplitFiles
from minllama.training.session import Session
from minllama.training.task import Batch
from tokenizer import Tokenizer
from utils import LlamaDataset


def load_splits(
    files: SplitFiles,
    options: Options,
    tokenizer: Tokenizer,
    *,
    context: int,
    plain: bool = False,
) -> dict[str, LlamaDataset]:
    """The encoded sentences of each file, labelled or, `plain`, not; says what was loaded."""
    room = min(options.max_sentence_len or context, context - 1)
    n_labels = len(files.label_names)
    splits = {
        split: LlamaDataset(
            path,
            tokenizer,
            n_labels=n_labels,
            max_sentence_len=room,
            encoding=options.encoding,
            plain=plain,
        )
        for split, path in files.paths.items()
    }
    for split, dataset in splits.items():
        cut = f", {dataset.cut} of them cut to {room} tokens" if dataset.cut else ""
        print(f"Loaded {len(dataset)} sentences from {dataset.path} ({split}){cut}")
    return splits


def predict(model: LlamaEmbeddingClassifier, dataset: LlamaDataset, session: Session) -> list[int]:
    """The likeliest label of each sentence, in the file's order. Every rank must call this.

    In float32 whatever the training's dtype: bfloat16 rounds differently at another batch size,
    and a prediction must not depend on its batch. Raises Interrupted when asked to stop.
    """
    ranks = session.ranks
    predictions = np.zeros(len(dataset), np.int64)
    model.eval()
    with no_gradients(model):
        batches = dataset.length_sorted_batches(session.options.batch_size)
        numbers = list(ranks.split_evenly(len(batches)))
        found = []  # stays on the device, which none of the batches waits for
        for number, counts in progress_bar(numbers, desc="predicting", leave=False, disable=None):
            ranks.check_stop(session.stop)
            batch = Batch(dataset.collate(batches[number])).to(session.device)
            found.append(counts * model(*batch.inputs[:2]).argmax(dim=-1))
        if found:
            places = np.concatenate([batches[number] for number, _ in numbers])
            predictions[places] = torch.cat(found).cpu().numpy()
    model.train()
    return ranks.sum_array(predictions).tolist()


def predict_files(
    model: LlamaEmbeddingClassifier,
    files: SplitFiles,
    splits: dict[str, LlamaDataset],
    session: Session,
) -> None:
    """Report and write the predictions on each file that has a place for them."""
    for split, out in files.outs.items():
        predictions = predict(model, splits[split], session)
        report = (split, splits[split].examples, predictions, files.label_names, out)
        keep = f"{split}_out" not in session.options.given
        session.ranks.on_main(functools.partial(report_predictions, *report, keep=keep))
