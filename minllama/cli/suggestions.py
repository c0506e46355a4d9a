"""A command line with unknown flags: what each may have meant, ours or another program's name.

Pure Python, like the parser.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence

from minllama.system.errors import UsageError

MOST = 3  # suggestions in one message

# What nanoGPT, llama2.c, minimind, transformers and llama.cpp call ours, by our name. A name may
# stand for several of ours: the one that the option at hand reads is meant.
NEIGHBOURS = {
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
    """Our names that the unknown `name` may have meant, likeliest first, at most MOST.

    `readers` has the options that read each of ours: where `option` reads some of what fits, only
    those are named.
    """
    others = [ours for ours, theirs in NEIGHBOURS.items() if name in theirs.split()]
    begun = [ours for ours in readers if len(name) > 1 and ours.startswith(name)]
    alike = difflib.get_close_matches(name, readers, n=MOST, cutoff=0.7)
    for found in (others, begun, alike):
        read = [ours for ours in found if option in readers.get(ours, ())]
        if found:
            return (read or found)[: 1 if found is alike else MOST]
    return []


def describe_unknown(
    words: Sequence[str], unknown: Sequence[str], readers: Mapping[str, Sequence[str]], option: str
) -> list[str]:
    """A line for each mistake among the `unknown` words of a command line.

    An unknown flag and the value that follows it are one mistake.
    """
    lines, place, strange = [], -1, -1  # the last unknown word; the last of an unknown flag's
    for word in unknown:
        place = words.index(word, place + 1)
        if word.startswith("-") and len(word) > 1 and not word[1].isdigit():
            strange = place
            near = suggest(word.partition("=")[0].lstrip("-"), readers, option)
            ask = f"did you mean {' or '.join(f'--{name}' for name in near)}?"
            lines.append(f"{word}: no such option; {ask if near else '--help lists the options'}")
        elif strange >= 0 and place == strange + 1:
            strange = place
        else:
            values = readers.get("option", ())
            remedy = f"did you mean --option {word}?" if word in values else "a flag begins with --"
            lines.append(f"{word}: belongs to no option; {remedy}")
    return lines


def parse_words(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    readers: Mapping[str, Sequence[str]],
    namespace: argparse.Namespace | None = None,
    *,
    where: str = "",
) -> argparse.Namespace:
    """The flags in `words`, over those in `namespace`.

    Raises UsageError with a line for each mistake, each of which begins with `where`.
    """
    try:
        namespace, unknown = parser.parse_known_args(words, namespace)
        if unknown:
            lines = describe_unknown(words, unknown, readers, namespace.option)
            raise UsageError("\n".join(lines))
    except UsageError as error:
        raise UsageError("\n".join(where + line for line in str(error).splitlines())) from None
    return namespace
