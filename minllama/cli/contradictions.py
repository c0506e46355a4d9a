"""Flags that contradict each other, found before any model, data or GPU work."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minllama.system.encodings import check_encoding
from minllama.system.errors import UsageError
from minllama.system.files import is_text

if TYPE_CHECKING:
    from config import Options

# Flags that say how long to train, of which a run has one.
LENGTHS = (("minutes", "epochs"), ("minutes", "schedule_steps"), ("schedule_steps", "epochs"))
# A typed one of these takes the place of the others in a --config file.
EXCLUSIVE = (
    *({"resume", "overwrite"}, {name for pair in LENGTHS for name in pair}),
    *({"global_batch_size", "gradient_accumulation_steps"}, {"freeze_backbone", "lora_rank"}),
)
PAIRS_EXCLUDE = (
    *("train", "dev", "test", "label_names", "dev_out"),
    *("prompt_template", "label_norm", "shots", "max_sentence_len"),
)


def find_problems(options: Options) -> Iterator[str]:
    """A line for each contradiction: the flags with their values, and the remedy."""
    finetune = options.option == "finetune"
    trains = finetune or options.option == "pretrain"
    checks = [lambda: check_encoding(options.encoding)]
    if options.option == "pretrain" and not options.pretrained_model_path:
        checks.append(lambda: options.llama_config(vocab_size=32000))  # as if: none is known yet
    for check in checks:
        try:
            check()
        except UsageError as error:
            yield str(error)
    if options.min_lr > options.peak_lr():
        name = "--pretrain_lr" if options.option == "pretrain" else "--lr"
        yield f"--min_lr {options.min_lr:g} is above {name} {options.peak_lr():g}: give a lower one"
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        yield "--tensorboard needs another package: pip install tensorboard"
    if options.tensorboard and not is_text(options.save_dir):
        yield f"--tensorboard: --save_dir {options.save_dir} is no UTF-8, which TensorBoard needs"
    if options.option == "pretrain" and options.data_weights:
        weights, sources = options.data_weights, len(options.pretrain_data)
        # On a resume the checkpoint has the sources, where they are not typed.
        if len(weights) != sources and (sources or not options.resume):
            yield (
                f"--data_weights {' '.join(map('{:g}'.format, weights))}: the number of weights is "
                f"{len(weights)} and --pretrain_data names {sources or 'no'} sources: give each "
                "file, folder or glob there its weight"
            )
    for name in ("plan", "resume", "profile"):
        if name in options.given and not trains:
            yield f"--{name} is for --option pretrain and finetune, which train; leave it out"
    for name in ("world_size", "gpu"):
        if name in options.given and not (options.plan and options.world_size):
            yield f"--{name} is for --plan --world_size N, a plan for other machines; leave it out"
    if options.minutes is not None and options.world_size:
        yield "--minutes times steps on this machine, --world_size plans for others: give one"
    for name, other in LENGTHS:
        if {name, other} <= options.given:
            yield f"--{name} and --{other} both say how long to train: give one"
    if options.is_chat and options.freeze_backbone:
        yield "--freeze_backbone is for labelled sentences: dialogues have no linear head to train"
    if finetune and options.freeze_backbone and options.lora_rank:
        yield "--freeze_backbone and --lora_rank exclude each other: give one"
    if finetune and options.freeze_backbone and options.optimizer == "muon":
        yield "--freeze_backbone trains no matrices, which --optimizer muon is for: give one"
    if {"global_batch_size", "gradient_accumulation_steps"} <= options.given:
        yield "--gradient_accumulation_steps follows from --global_batch_size: give one of the two"
    if options.parallel == "fsdp" and options.optimizer == "muon":
        yield "--optimizer muon needs whole matrices, and --parallel fsdp shards them: give one"
    if finetune and options.parallel == "fsdp" and options.lora_rank:
        yield "--lora_rank leaves --parallel fsdp little to shard: leave --parallel out"
    if options.interactive and (options.prompt or options.prompt_file):
        yield "--interactive asks for prompts: leave --prompt and --prompt_file out"
    if options.interactive and options.check_copies:
        yield "--check_copies is for --prompt and --prompt_file: leave --interactive out"
    if "" in options.stop:
        yield "--stop '': every text has this in it and would end at once; leave it out"
    if options.resume and options.overwrite:
        yield "--resume continues a run, --overwrite removes it: give one"
    fields = {*re.findall(r"\{\w*\}", options.prompt_template)}
    for field in sorted(fields - {"{sentence}", "{labels}"}):
        yield f"--prompt_template: {field} is not filled in; {{sentence}} and {{labels}} are"
    if "{sentence}" not in fields:
        yield f"--prompt_template {options.prompt_template!r}: lacks {{sentence}}, its place"
    for name in PAIRS_EXCLUDE if options.pairs else ():
        if name in options.given:
            yield f"--pairs compares whole sentences, without --{name}: leave it out"
    if finetune and options.train is None and (options.dev or options.test):
        yield "--dev and --test need --train: the labels are learnt from it"
