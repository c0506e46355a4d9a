"""Unknown flags on a command line: what each may have meant, ours or another program's flag."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from minllama.cli.command_line import OneLineParser, with_underscores
from minllama.system.errors import UsageError

MOST = 3  # suggestions in one message

# Our flags, and what nanoGPT, llama2.c, minimind, transformers and llama.cpp call them. A name of
# theirs may stand for several of ours: then the one that the --option reads is meant.
FOREIGN_NAMES = {
    "save_dir": "out_dir output_dir out output outdir save_path checkpoint_dir log_dir",
    "max_seq_len": "block_size context_length context n_ctx ctx ctx_size seq_len seq_length "
    "max_length sequence_length max_position_embeddings",
    "dim": "n_embd n_embed hidden_size d_model embed_dim embedding_dim embedding_size",
    "n_layers": "n_layer num_layers num_hidden_layers layers depth",
    "n_heads": "n_head num_heads num_attention_heads heads",
    "n_kv_heads": "num_key_value_heads num_kv_heads n_kv_head",
    "hidden_dim": "intermediate_size ffn_dim d_ff",
    "pretrain_batch_size": "batch bs micro_batch_size device_batch_size train_batch_size "
    "per_device_train_batch_size",
    "batch_size": "batch bs eval_batch_size train_batch_size per_device_train_batch_size",
    "global_batch_size": "total_batch_size effective_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps accumulation_steps accum_steps",
    "use_gpu": "device cuda use_cuda n_gpu_layers ngl",
    "max_steps": "max_iters max_iterations iters iterations num_iters num_iterations steps "
    "num_steps max_train_steps train_steps",
    "epochs": "epoch num_epochs n_epochs num_train_epochs max_epochs",
    "resume": "resume_from_checkpoint from_resume load_checkpoint ckpt checkpoint ckpt_path "
    "checkpoint_path init_from",
    "pretrained_model_path": "model model_path model_name_or_path m load load_from weight ckpt "
    "checkpoint ckpt_path checkpoint_path init_from",
    "model_size": "model model_name model_type",
    "pretrain_data": "data data_path dataset datasets data_dir train_data train_file train_files "
    "input input_file corpus text file",
    "train": "data data_path dataset train_data train_file train_files input",
    "val_data": "valid validation val val_file validation_file eval_data dev_data",
    "dev": "valid validation val val_file validation_file eval_data",
    "val_fraction": "val_split validation_split val_ratio",
    "pretrain_lr": "learning_rate max_lr peak_lr",
    "lr": "learning_rate max_lr peak_lr",
    "min_lr": "min_learning_rate lr_min",
    "warmup_steps": "warmup_iters num_warmup_steps lr_warmup_steps",
    "lr_scheduler": "scheduler lr_scheduler_type lr_schedule schedule lr_decay_style",
    "weight_decay": "wd decay",
    "grad_clip": "max_grad_norm clip clip_grad clip_grad_norm gradient_clipping",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing",
    "checkpoint_interval": "save_steps save_every save_freq ckpt_interval",
    "eval_interval": "eval_steps eval_every val_interval val_every",
    "keep_last": "save_total_limit",
    "early_stopping": "patience",
    "tokenizer_model": "tokenizer tokenizer_path tokenizer_name vocab vocab_file spm",
    "dtype": "precision amp mixed_precision fp16 bf16",
    "parallel": "ddp fsdp strategy",
    "label_names": "labels label_map label_mapping",
    "lora_rank": "lora lora_r",
    "prompt": "start text input",
    "num_samples": "n_samples num_return_sequences",
    "max_new_tokens": "max_tokens n_predict num_tokens n_tokens length max_length",
    "repetition_penalty": "repeat_penalty frequency_penalty",
    "encoding_errors": "errors",
}


def suggest(name: str, readers: Mapping[str, Sequence[str]], option: str) -> list[str]:
    """Our flags that the unknown `name` may have meant, likeliest first, at most MOST.

    `readers` has each flag's options. Flags that `option` does not read are named only where it
    reads none of those that fit.
    """
    theirs = {ours: names.split() for ours, names in FOREIGN_NAMES.items() if ours in readers}
    foreign = [ours for ours in theirs if name in theirs[ours]]
    longer = [ours for ours in readers if len(name) > 1 and ours.startswith(name)]
    similar = difflib.get_close_matches(name, readers, n=MOST, cutoff=0.7)
    for names, most in ((foreign, MOST), (longer, MOST), (similar, 1)):
        read = [ours for ours in names if option in readers[ours]]
        if names:
            return (read or names)[:most]
    misspelled = difflib.get_close_matches(name, sum(theirs.values(), []), n=1, cutoff=0.8)
    return suggest(misspelled[0], readers, option) if misspelled else []


def describe_unknown(
    words: Sequence[str], unknown: Sequence[str], readers: Mapping[str, Sequence[str]], option: str
) -> list[str]:
    """A line for each mistake among the `unknown` words of a command line.

    An unknown flag and the values that follow it are one mistake.
    """
    lines, place, end = [], -1, -1  # of this word, and of the last unknown flag with its values
    for word in unknown:
        place = words.index(word, place + 1)
        if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            end = place
            names = suggest(word.partition("=")[0].lstrip("-"), readers, option)
            question = f"did you mean {' or '.join(f'--{name}' for name in names)}?"
            remedy = question if names else "--help lists the options"
            lines.append(f"{word}: no such option; {remedy}")
        elif end >= 0 and place == end + 1:
            end = place
        elif word in readers.get("option", ()):
            lines.append(f"{word}: belongs to no option; did you mean --option {word}?")
        else:
            lines.append(f"{word}: belongs to no option; a flag begins with --")
    return lines


class WholeLineParser(OneLineParser):
    """Of a program without --option: a word that it does not know is an error."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            flags = {flag.lstrip("-"): () for flag in self._option_string_actions}
            self.error("\n".join(describe_unknown(words, unknown, flags, "")))
        return namespace, unknown


def parse_words(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    readers: Mapping[str, Sequence[str]],
    namespace: argparse.Namespace | None = None,
    *,
    where: str = "",
) -> argparse.Namespace:
    """The flags in `words`, which replace those in `namespace`.

    Raises UsageError with a line for each mistake, each after the prefix `where`.
    """
    words = [with_underscores(word) for word in words]  # as the parser spells them in `unknown`
    try:
        namespace, unknown = parser.parse_known_args(words, namespace)
        if unknown:
            lines = describe_unknown(words, unknown, readers, namespace.option)
            raise UsageError("\n".join(lines))
    except UsageError as error:
        raise UsageError("\n".join(where + line for line in str(error).splitlines())) from None
    return namespace
