"""A table of every flag of `run_llama.py`, and the presets of the model's shape.

Imports neither torch nor numpy, so that `--help` and bad flags are answered at once. Knows nothing
of tensors, files' contents or devices; what only they can tell is checked where it is first known.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minllama.cli.command_line import (
    OneLineParser,
    add_flag,
    flags_of,
    read_path,
    read_stored,
    section,
    with_underscores,
)
from minllama.cli.config_file import check_harmless, toml_words
from minllama.cli.console import say
from minllama.cli.contradictions import EXCLUSIVE, LENGTHS, find_problems
from minllama.cli.suggestions import parse_words
from minllama.model.shape import LlamaConfig
from minllama.system.errors import UsageError
from minllama.system.peek import first_object, is_json_name

DATA_DIR = Path(__file__).resolve().parent / "data"
SHIPPED_MODEL = DATA_DIR / "stories-tiny.pt"
IGNORE_INDEX = -100  # a target that no loss counts: of padding, or of a dialogue's questions
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def fingerprint(content: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of a vocabulary, or of other content."""
    return hashlib.sha256(content).hexdigest()[:16]


# ---------------------------------------------------------------------------- presets of the shape


@dataclass(frozen=True)
class Preset:
    """A named model size: its shape, and a good peak learning rate to pretrain it with AdamW."""

    shape: dict[str, Any]
    pretrain_lr: float


UNTIED = {"tie_word_embeddings": False}
PRESETS: dict[str, Preset] = {
    "tiny": Preset(dict(dim=128, n_layers=4, n_heads=2), pretrain_lr=5e-3),
    "stories15M": Preset(dict(dim=288, n_layers=6, n_heads=6), pretrain_lr=1e-3),
    "stories42M": Preset(dict(dim=512, n_layers=8, n_heads=8), pretrain_lr=5e-4),
    "stories110M": Preset(dict(dim=768, n_layers=12, n_heads=12), pretrain_lr=5e-4),
    "1.1B": Preset(  # TinyLlama
        dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632) | UNTIED,
        pretrain_lr=4e-4,
    ),
    "7B": Preset(  # Llama-2-7B
        dict(dim=4096, n_layers=32, n_heads=32, hidden_dim=11008) | UNTIED, pretrain_lr=3e-4
    ),
}

# The share of the rate from scratch with which trained weights are trained further: enough to learn
# another text, too little to forget the first before it is learnt.
CONTINUED_LR = 0.2
# The share of a weight that decays in an epoch, while the learning rate is at its peak: so much for
# each epoch of the run, up to so many.
EPOCH_DECAY, MOST_EPOCHS = 0.05, 10


def recommended_lr(config: LlamaConfig, optimizer: str) -> float:
    """A good peak learning rate from scratch: Muon's by width, AdamW's of the nearest preset."""
    if optimizer == "muon":
        return float(f"{0.01 * (128 / config.dim) ** 0.75:.2g}")
    size = sum(config.block_parameters())

    def distance(preset: Preset) -> float:
        shape = LlamaConfig(vocab_size=config.vocab_size, **preset.shape)
        return abs(math.log(sum(shape.block_parameters()) / size))

    return min(PRESETS.values(), key=distance).pretrain_lr


def recommended_decay(lr: float, *, tokens: int, distinct: int, batch: int) -> float:
    """A weight decay that suits Muon from scratch, for `tokens` read of a text of `distinct` ones.

    A text that is read often is learnt by heart, unless weights forget what is some epochs old. A
    step of `batch` tokens takes lr x decay of them away; by what was best in benchmarks/README.md.
    """
    share = EPOCH_DECAY * min(MOST_EPOCHS, tokens / distinct)
    return float(f"{min(3.0, max(0.1, share * batch / (lr * distinct))):.2g}")


def finetuning_lr(config: LlamaConfig, *, chat: bool, lora: bool, head_alone: bool) -> float:
    """A good peak learning rate to finetune a model with, on dialogues or labelled sentences.

    On dialogues proportional to width^-1.5, 3e-3 at 128, so 4e-4 at 512; on sentences that to go on
    from trained weights, and from the assignment's size on its own 2e-5. Three times that for LoRA,
    whose second matrix starts at zero, and ten times for a linear head alone.
    """
    factor = 3 if lora else 10 if head_alone else 1
    if chat:
        return float(f"{factor * 3e-3 * (128 / config.dim) ** 1.5:.2g}")
    course = LlamaConfig(**PRESETS["stories42M"].shape)
    if config.block_parameters()[0] >= course.block_parameters()[0]:
        return 2e-5
    return float(f"{factor * CONTINUED_LR * recommended_lr(config, 'adamw'):.2g}")


# ---------------------------------------------------------------------------- the table of flags

SHAPE_FLAGS = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")  # beside --model_size
USUAL_DECAY = 0.1  # of a pretraining's weights
MAX_CONTEXT = 1024  # where --max_seq_len is not given, as in the original
TRAINING = ("pretrain", "finetune")
LABELLED = ("finetune", "prompt")
DIALOGUE_FIELDS = {"conversations", "messages", "conversation", "chosen", "message_id"}  # of tables
DIALOGUE_FIELDS |= {"prompt", "instruction", "question", "input"}
EVERY = ("pretrain", "finetune", "prompt", "generate")


@dataclass(frozen=True)
class Options:
    """Every flag's value. A flag is a field here, and its help, checks and readers are too."""

    flag = section("the run", *EVERY)
    seed: int = flag(1337, "of every random number", at_least=0, below=2**63)
    encoding: str = flag("utf-8", "of text files: gb18030, big5, utf-16, or any that Python knows")
    flag = section("the run", *EVERY, on_resume="typed")
    lang: Literal["en", "zh"] | None = flag(
        None,
        "zh: the plan's labels, the results and the commonest errors in Chinese; files stay "
        "English; unset: by the locale",
    )
    option: Literal["pretrain", "finetune", "prompt", "generate"] = flag("generate", "what to do")
    config: Path | None = flag(
        None,
        "TOML file of flags, such as: epochs = 3; one that is typed counts more; --overwrite, and "
        "outputs outside --save_dir, are typed",
    )
    use_gpu: bool = flag(False, "train or run on CUDA or Apple's MPS where there is one")
    save_dir: Path = flag(
        Path("checkpoints"),
        "folder of the run's checkpoints and records; typed without --pretrained_model_path, its "
        "model is the one to finetune, prompt or generate with",
    )
    flag = section("the run", *TRAINING, on_resume="typed")
    plan: bool = flag(False, "print the plan of the run (sizes, steps, memory) and stop")
    resume: str | None = flag(
        None,
        "continue from this checkpoint, or the newest in this folder; alone or auto: the newest "
        "in --save_dir",
        metavar="FILE|auto",
        alone="auto",
    )
    overwrite: bool = flag(False, "remove the files of an earlier run in --save_dir first")
    max_steps: int | None = flag(None, "end after this many optimizer steps in all", at_least=1)
    profile: bool = flag(False, "show where a few steps' time goes; a trace in profile.json.gz")
    tensorboard: bool = flag(False, "write event files for TensorBoard, too, into --save_dir")

    flag = section("arithmetic", *TRAINING)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "compute dtype; auto: bfloat16 where the device multiplies it fast"
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] = flag(
        "float32", "dtype of the weights in final-model.pt and best-model.pt"
    )
    deterministic: bool = flag(
        False, "on CUDA, slower: bit-identical every time; on a CPU it is so in any case"
    )
    flag = section("arithmetic", "pretrain", "finetune", "generate")
    compile: Literal["auto", "on", "off"] = flag(
        "auto",
        "torch.compile the model, which takes half a minute; auto: to pretrain, where the plan "
        "says that it pays; --compile alone: on",
        alone="on",
    )

    flag = section("the model", "pretrain")
    model_size: Literal["tiny", "stories15M", "stories42M", "stories110M", "1.1B", "7B"] = flag(
        "tiny", "preset of the shape to pretrain; the flags below change it"
    )
    dim: int | None = flag(None, "width of the model", at_least=1)
    n_layers: int | None = flag(None, "number of layers", at_least=1)
    n_heads: int | None = flag(None, "attention heads per layer", at_least=1)
    n_kv_heads: int | None = flag(None, "key/value heads; fewer than --n_heads: GQA", at_least=1)
    hidden_dim: int | None = flag(None, "width of the feed-forward network", at_least=1)
    max_seq_len: int | None = flag(
        None,
        "context in tokens; text is cut into chunks of it; unset: 1024, halved down to 128 until "
        "the schedule has about a thousand steps",
        at_least=1,
    )
    dropout: float = flag(0.0, "dropout of the model while training", at_least=0, below=1)
    flag = section("the model", *EVERY)
    tokenizer_model: Path | None = flag(
        None,
        "vocabulary: a SentencePiece model, a tokenizer.json, or a folder of one; unset: the model "
        "file's own; to pretrain: one trained on your text, the embedded one for the stories",
    )
    pretrained_model_path: Path | None = flag(
        None,
        "model file or folder to start from, of this or another program; unset: to pretrain from "
        "scratch, else that of a --save_dir typed, else the result of the last pretraining in this "
        "folder, else ./stories42M.pt, else the shipped model",
    )

    flag = section("text to pretrain on", "pretrain")
    pretrain_data: tuple[str, ...] = flag(
        (), "files, folders, globs: .txt, .jsonl, .csv, .parquet, ...; unset: embedded", many=True
    )
    data_weights: tuple[float, ...] = flag(
        (), "weight of each of these in the tokens read: 3 1", many=True, metavar="X", above=0
    )
    val_data: tuple[str, ...] = flag((), "the same, held out for validation", many=True)
    flag = section("text to pretrain on", "pretrain", "finetune")
    val_fraction: float = flag(
        0.05,
        "share of the text, or of --train where there is no --dev, held out; 0: none",
        at_least=0,
        at_most=0.5,
    )
    flag = section("text to pretrain on", "pretrain")
    val_tokens: int = flag(10**7, "of the held-out text, to measure on at most", at_least=2)
    document_per_line: bool = flag(False, "every line of a text file is a document of its own")
    document_separator: str | None = flag(
        None,
        "what stands between the documents of a text file, such as <|endoftext|>; or the two words "
        "'blank line'",
    )
    sentences_only: bool = flag(False, "of `label ||| sentence` files read only the sentences")
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "bytes that are not in --encoding: stop and name the line, or put U+FFFD"
    )
    dedup: bool = flag(
        False, "train on the first of documents that are exactly alike, on none that is held out"
    )
    document_mask: bool = flag(
        False, "where a chunk holds several documents, attend to the token's own alone"
    )
    flag = section("text to pretrain on", "pretrain", *LABELLED)
    text_field: str = flag(
        "text", "field of a .jsonl line, or column of a table, that is the text; a.b goes deeper"
    )
    flag = section("text to pretrain on", "pretrain", "generate", on_resume="typed")
    cache_dir: Path = flag(Path("token_cache"), "folder of the tokenized text")

    flag = section("training", *TRAINING)
    epochs: int = flag(5, "passes over the data", at_least=1)
    schedule_steps: int | None = flag(
        None, "optimizer steps of the whole schedule, instead of --epochs", at_least=1
    )
    gradient_accumulation_steps: int = flag(
        1, "micro-batches per optimizer step; equals one big batch", at_least=1
    )
    optimizer: Literal["auto", "adamw", "muon"] = flag(
        "auto",
        "muon: Muon on the matrices inside the layers, AdamW on the rest, with the same schedule "
        "and decay, the embedding at 4 times the learning rate; auto: muon to pretrain from "
        "scratch, adamw otherwise, where --pretrain_lr is typed, and with --parallel fsdp",
    )
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = flag(
        "cosine", "what follows the warmup; wsd: constant, then linear over the last fifth"
    )
    warmup_steps: int | None = flag(None, "of linear warmup; unset: 5 %% of the run", at_least=0)
    min_lr: float = flag(0.0, "learning rate at the end of the schedule", at_least=0)
    weight_decay: float | None = flag(
        None,
        "decay of the matrices; unset: 0 to finetune, 0.1 to pretrain, and with Muon from scratch "
        "up to 3, the more the shorter the text and the more often it is read",
        at_least=0,
        below=1e6,
    )
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0: never clipped", at_least=0)
    activation_checkpointing: bool = flag(
        False, "recompute each layer in the backward pass: less memory, a third slower"
    )
    checkpoint_interval: int = flag(
        1000, "optimizer steps between resumable checkpoints; 0: none", at_least=0
    )
    early_stopping: int | None = flag(
        None,
        "stop after this many evaluations in a row without a better dev accuracy, or validation "
        "loss; unset: never, with --minutes 3",
        at_least=1,
    )
    save_interval: int = flag(50, "epochs between the checkpoints that are kept", at_least=1)
    keep_last: int = flag(2, "step checkpoints to keep; 0: all", at_least=0)
    on_nonfinite: Literal["rollback", "stop"] = flag(
        "rollback",
        "after 10 steps in a row whose loss or gradients are not finite: return to the last good "
        "checkpoint with half the learning rate, or stop",
    )

    flag = section("several processes (torchrun)", *TRAINING)
    global_batch_size: int | None = flag(
        None,
        "sequences per optimizer step over all processes; given: the accumulation follows from it",
        at_least=1,
    )
    parallel: Literal["ddp", "fsdp"] = flag(
        "ddp", "each process holds the whole model, or its shard of every block (FSDP2)"
    )
    flag = section("several processes (torchrun)", *TRAINING, on_resume="typed")
    dist_timeout: int = flag(
        600, "seconds that the processes wait for one that lags before all of them end", at_least=1
    )

    flag = section("--option pretrain", "pretrain")
    minutes: float | None = flag(
        None,
        "pretrain for this long in all, from the command to the last file; shape, context, batch, "
        "learning rate and the like are chosen for it, each unless its flag is typed",
        above=0,
        below=1e6,
    )
    pretrain_batch_size: int = flag(8, "chunks per micro-batch", at_least=1, instead="batch_size")
    pretrain_lr: float | None = flag(
        None,
        "peak learning rate; unset: what suits --model_size, or to continue from a model's weights",
        above=0,
        below=1e6,
        instead="lr",
    )
    eval_interval: int = flag(0, "steps between validations; 0: each epoch's end", at_least=0)
    best_model_interval: int = flag(1, "epochs between looks for a new best-model.pt", at_least=1)
    sample_prompt: str | None = flag(
        None, "what a sample after each validation continues; unset: the text's own first words"
    )
    sample_tokens: int = flag(40, "tokens of that sample; 0: none", at_least=0)
    world_size: int | None = flag(
        None, "with --plan: what the run would need and take on this many GPUs", at_least=1
    )
    gpu: Literal["h100", "h200", "b200", "a100", "l40s", "4090"] = flag(
        "h100", "with --plan --world_size: their kind, eight to a machine"
    )

    flag = section("labelled data (finetune, prompt)", *LABELLED, on_resume="typed")
    train: Path | None = flag(
        None, "`label ||| sentence`, .csv, .jsonl or .parquet; or chats; unset: reviews"
    )
    dev: Path | None = flag(
        None, "the same, to choose the best epoch by; unset: --val_fraction of --train"
    )
    test: Path | None = flag(None, "the same, for the last figures")
    label_names: Path | None = flag(
        None,
        "JSON list of the labels' names, or an object: how files write each, and its name; unset: "
        "NAME-label-mapping.json beside --train",
    )
    dev_out: Path | None = flag(
        None,
        "predictions on --dev; .csv or .jsonl: a table with each class's probability; unset: in "
        "--save_dir, by data set and option",
    )
    test_out: Path | None = flag(None, "predictions on --test, or a table of --pairs; likewise")
    flag = section("labelled data (finetune, prompt)", *LABELLED)
    label_field: str = flag(
        "label", "field or column that is the label, a number or a name; --text_field the sentence"
    )
    flag = section("labelled data (finetune, prompt)", *LABELLED, "generate")
    batch_size: int = flag(
        8, "sentences or prompts per batch", at_least=1, instead="pretrain_batch_size"
    )
    flag = section("labelled data (finetune, prompt)", *LABELLED)
    max_sentence_len: int | None = flag(None, "tokens of a sentence to read", at_least=1)

    flag = section("--option finetune", "finetune")
    lr: float = flag(
        2e-5,
        "peak learning rate; unset: what suits dialogues, or a model smaller than the assignment's",
        above=0,
        below=1e6,
        instead="pretrain_lr",
    )
    hidden_dropout_prob: float = flag(0.3, "dropout before the linear head", at_least=0, below=1)
    pooling: Literal["last", "mean"] = flag(
        "last",
        "what the head reads of a sentence: the state after its last token, as the assignment, or "
        "the mean over its tokens",
    )
    skip_bad_lines: bool = flag(False, "of dialogues: leave those out that cannot be read")
    freeze_backbone: bool = flag(False, "train the linear head alone")
    lora_rank: int | None = flag(
        None,
        "train adapters of this rank (LoRA) instead of the full weights",
        at_least=1,
        at_most=65536,
    )

    flag = section("--option prompt", "prompt")
    prompt_template: str = flag(
        "{sentence} Is this movie {labels}? This movie is",
        "text before the label; {sentence} and {labels} are filled in, \\n is a newline",
    )
    label_norm: Literal["sum", "token", "byte", "pmi"] = flag(
        "pmi",
        "score of a label: its log-probability (sum), per token, per byte, or less the one it has "
        "without the sentence (pmi), so that a word that is always likely does not always win",
    )
    shots: int = flag(0, "labelled examples from --train to put before each prompt", at_least=0)

    pairs: tuple[str, ...] = flag(
        (),
        "instead of labels: files of lines `good<TAB>bad`, or BLiMP's .jsonl; how often the good "
        "sentence is the likelier one",
        many=True,
    )

    flag = section("--option generate", "generate")
    prompt: tuple[str, ...] = flag((), "text to continue; repeatable", metavar="TEXT")
    prompt_file: Path | None = flag(
        None, "continue every line of this file, or of a folder or glob"
    )
    interactive: bool = flag(False, "hold a conversation, or continue what is typed; Ctrl-D ends")
    weights: Literal["float32", "bfloat16", "int8"] = flag(
        "float32",
        "what the weights are rounded to: fewer bytes are read, and text comes, faster; int8: on "
        "the CPU",
    )
    max_new_tokens: int = flag(75, "tokens to add", at_least=1)
    num_samples: int = flag(1, "continuations of each prompt", at_least=1, at_most=10_000)
    temperature: float | None = flag(
        None,
        "0: the likeliest token; 1: as the model says; unset: 0.8, of a chat 0.2, and without a "
        "prompt both 0 and 1, as the original",
        at_least=0,
    )
    top_k: int | None = flag(None, "sample among this many likeliest tokens", at_least=1)
    top_p: float | None = flag(
        None, "sample among the likeliest that make up this probability", above=0, at_most=1
    )
    min_p: float | None = flag(
        None,
        "drop tokens below this share of the likeliest; unset: 0.01 where a prompt is continued at "
        "the temperature that is so, too",
        at_least=0,
        below=1,
    )
    repetition_penalty: float = flag(1.0, "above 1: avoid what was said before", above=0)
    stop: tuple[str, ...] = flag((), "end before this text; repeatable", metavar="TEXT")
    check_copies: tuple[str, ...] = flag(
        (),
        "text files, such as those it was trained on: mark what of the output stands in them word "
        "for word",
        many=True,
        metavar="TEXT",
    )
    generated_sentence_low_temp_out: Path = flag(
        Path("generated-sentence-temp-0.txt"), "the original's file at temperature 0"
    )
    generated_sentence_high_temp_out: Path = flag(
        Path("generated-sentence-temp-1.txt"), "the original's file at temperature 1"
    )
    del flag

    given: frozenset[str] = frozenset()  # names of the flags typed, or in the --config file
    started: float = dataclasses.field(default_factory=time.monotonic)  # when the command began

    def to_plain(self) -> dict[str, Any]:
        """The options as in JSON and checkpoints: strings, numbers, lists, None."""
        plain = {}
        for name in FLAGS:
            value = getattr(self, name)
            if isinstance(value, Path):
                value = value.as_posix()
            plain[name] = list(value) if isinstance(value, tuple) else value
        return plain

    def resumed(self, stored: dict[str, Any]) -> Options:
        """These options with a checkpoint's value of every flag that was not typed.

        Never the checkpoint's: where the run writes, what it computes on, when it ends early. Its
        global batch is kept, whatever the micro-batch and the number of processes; a typed
        accumulation that makes another one is refused later. Raises UsageError for a stored value
        that the flag could not have, and for another length of the run.
        """
        typed = self.given | TYPED_ON_RESUME
        for name, other in LENGTHS:
            if stored.get(name) is not None and other in self.given and name not in self.given:
                raise UsageError(
                    f"--{other} {getattr(self, other)}: the run to resume is as long as its "
                    f"--{name} {stored[name]} says: leave --{other} out"
                )
        name = "gradient_accumulation_steps"
        if name in self.given and getattr(self, name) != stored.get(name):
            typed |= {"global_batch_size"}
        taken = [n for n in FLAGS if n in stored and n not in typed]
        changes = {n: read_stored(FLAGS[n], stored[n]) for n in taken}
        return dataclasses.replace(self, **changes)

    def choose(self, values: dict[str, Any]) -> Options:
        """These options with the values given, but for flags that were typed."""
        untyped = {name: value for name, value in values.items() if name not in self.given}
        return dataclasses.replace(self, **untyped)

    @property
    def is_from_scratch(self) -> bool:
        """Whether this pretrains a model that begins with random weights."""
        return self.option == "pretrain" and self.pretrained_model_path is None

    def resolve_optimizer(self) -> Options:
        """These options with --optimizer auto decided.

        Muon is the better one from scratch; a typed rate is AdamW's, as before there was a choice.
        """
        if self.optimizer != "auto":
            return self
        muon = self.is_from_scratch and self.parallel == "ddp" and self.pretrain_lr is None
        return dataclasses.replace(self, optimizer="muon" if muon else "adamw")

    def optimizer_reason(self) -> str:
        """What decided a pretraining's optimizer where the user did not, and how to undo it."""
        if self.option != "pretrain" or "optimizer" in self.given:
            return ""
        if self.optimizer == "muon":
            return " from scratch (else --optimizer adamw)"
        if self.parallel == "fsdp":
            return " with --parallel fsdp"
        if self.pretrained_model_path is not None:
            return " since it goes on from a model (else --optimizer muon)"
        typed = " since --pretrain_lr is typed (else --optimizer muon, and a rate of its own)"
        return typed * self.is_adamw_by_rate

    @property
    def is_adamw_by_rate(self) -> bool:
        """Whether a pretraining would have Muon, but for a rate that was typed."""
        by_rate = self.optimizer == "adamw" and {"pretrain_lr", "optimizer"} & self.given
        return self.is_from_scratch and self.parallel == "ddp" and by_rate == {"pretrain_lr"}

    def llama_config(self, vocab_size: int) -> LlamaConfig:
        """The shape to pretrain: the preset's, changed by the flags of the shape."""
        shape = dict(PRESETS[self.model_size].shape)
        for name in SHAPE_FLAGS:
            if getattr(self, name) is not None:
                shape[name] = getattr(self, name)
        if self.dim is not None and self.hidden_dim is None:
            shape.pop("hidden_dim", None)  # derived from the new width
        if self.n_heads is not None and self.n_kv_heads is None:
            shape.pop("n_kv_heads", None)
        return LlamaConfig(
            vocab_size=vocab_size,
            max_seq_len=self.max_seq_len or MAX_CONTEXT,
            dropout=self.dropout,
            **shape,
        )

    def check_shape(self, path: Path, config: LlamaConfig) -> None:
        """Raise UsageError where a typed flag of the shape differs from the model file's."""
        typed = {n: getattr(self, n) for n in self.given.intersection(SHAPE_FLAGS)}
        if "model_size" in self.given:
            preset = LlamaConfig(vocab_size=config.vocab_size, **PRESETS[self.model_size].shape)
            typed = {n: getattr(preset, n) for n in SHAPE_FLAGS} | typed
        other = [n for n in SHAPE_FLAGS if typed.get(n, getattr(config, n)) != getattr(config, n)]
        if other:
            has = ", ".join(f"{name} {getattr(config, name)} (not {typed[name]})" for name in other)
            raise UsageError(
                f"--pretrained_model_path {path} has {has}: a model keeps its shape, so leave "
                "--model_size, --dim and the like out"
            )

    def with_recommended_lr(self, config: LlamaConfig, *, continued: bool) -> Options:
        """These options with a learning rate to pretrain this model, where none was typed.

        Raises UsageError where --min_lr is above it.
        """
        if self.pretrain_lr is not None:
            return self
        lr = recommended_lr(config, self.optimizer) * (CONTINUED_LR if continued else 1)
        options = dataclasses.replace(self, pretrain_lr=lr)
        check_options(options)
        return options

    def with_finetuning_lr(self, config: LlamaConfig) -> Options:
        """These options with a learning rate to finetune this model with, where none was typed.

        Says which. Raises UsageError where --min_lr is above it.
        """
        if "lr" in self.given:
            return self
        ways = {"lora": bool(self.lora_rank), "head_alone": self.freeze_backbone}
        lr = finetuning_lr(config, chat=self.is_chat, **ways)
        options = dataclasses.replace(self, lr=lr)
        what = "dialogues" if self.is_chat else "sentences"
        say(f"lr           {lr:g}, for {what} with a model of width {config.dim} (--lr)")
        check_options(options)
        return options

    def muon_parameters(self, config: LlamaConfig) -> int:
        """How many parameters Muon updates in pretraining: those of the layers' matrices."""
        counts = config.parameter_counts()
        return counts["attention"] + counts["feed_forward"] if self.optimizer == "muon" else 0

    @property
    def micro_batch_size(self) -> int:
        """Sequences in one forward and backward pass of a process."""
        return self.pretrain_batch_size if self.option == "pretrain" else self.batch_size

    def with_global_batch(self, world_size: int) -> Options:
        """These options with the global batch as given, else as the accumulation makes it.

        Raises UsageError for one that is no multiple of the processes' micro-batches.
        """
        micro_batch, batch = self.micro_batch_size, self.global_batch_size
        if batch is None:
            batch = micro_batch * world_size * self.gradient_accumulation_steps
            return dataclasses.replace(self, global_batch_size=batch)
        if batch % (micro_batch * world_size):
            name = "--pretrain_batch_size" if self.option == "pretrain" else "--batch_size"
            share, rest = divmod(batch, world_size)
            smaller = f", or {name} {math.gcd(share, micro_batch)}" if not rest else ""
            raise UsageError(
                f"--global_batch_size {batch} is not divisible by {name} {micro_batch} times the "
                f"number of processes, {world_size}: give a multiple of "
                f"{micro_batch * world_size}{smaller}"
            )
        return self

    @property
    def is_chat(self) -> bool:
        """Whether this finetunes on dialogues, and not on labelled sentences."""
        if self.option != "finetune" or self.train is None or "label_field" in self.given:
            return False
        fields = first_object(self.train).keys()
        if not is_json_name(self.train) and not fields & DIALOGUE_FIELDS:
            return False
        return not ("label" in fields and {"text", "sentence", self.text_field} & fields)

    def decay(self) -> float:
        """The weight decay: as given, else 0.1 to pretrain and 0 to finetune."""
        if self.weight_decay is not None:
            return self.weight_decay
        return USUAL_DECAY if self.option == "pretrain" else 0.0

    def peak_lr(self) -> float:
        """The learning rate after warmup."""
        if self.option != "pretrain":
            return self.lr
        return self.pretrain_lr or math.inf  # until the model is known


FLAGS = flags_of(Options)
TYPED_ON_RESUME = {n for n, field in FLAGS.items() if field.metadata["on_resume"] == "typed"}
READERS: dict[str, tuple[str, ...]] = {n: f.metadata["read_by"] for n, f in FLAGS.items()}


# How text files are read: of every program that reads them as a pretraining does.
READING_FLAGS = (
    *("document_per_line", "document_separator", "text_field", "sentences_only"),
    *("encoding", "encoding_errors"),
)


def add_reading_flags(parser: argparse.ArgumentParser) -> None:
    """Let another program's command line have the flags of `minllama.text.reading.Reading`."""
    for name in READING_FLAGS:
        add_flag(parser, FLAGS[name])


# ---------------------------------------------------------------------------- reading them


def build_parser(option: str | None = None) -> argparse.ArgumentParser:
    """The command line of run_llama.py; its help shows what `option` reads, by default all."""
    parser = OneLineParser(
        prog="run_llama.py",
        usage="python run_llama.py --option {pretrain,finetune,prompt,generate} [options]",
        description="Pretrain a small Llama from scratch; finetune, prompt and generate with it.",
        epilog="Every option is accepted with _ and with -, e.g. --save_dir and --save-dir. "
        "`--option pretrain --help` lists what pretraining reads, and likewise the others.",
        allow_abbrev=False,
    )
    titles = dict.fromkeys(field.metadata["section"] for field in FLAGS.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    for field in FLAGS.values():
        shown = option is None or option in field.metadata["read_by"]
        add_flag(groups[field.metadata["section"]], field, shown=shown)
    return parser


def parse_options(arguments: Sequence[str]) -> Options:
    """Read and check the command line.

    Raises UsageError with every problem found, a line each; exits 0 after `--help`.
    """
    words = [with_underscores(word) for word in arguments]
    typed = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    first = OneLineParser(add_help=False, allow_abbrev=False)
    first.add_argument("--option")
    first.add_argument("--config", type=read_path)
    known, _ = first.parse_known_args(words)
    parser = build_parser(known.option if known.option in EVERY else None)
    namespace, in_file = None, []
    if known.config is not None:
        without = typed.union(*(names for names in EXCLUSIVE if typed & names))
        in_file = toml_words(known.config, FLAGS, without=without)
        namespace = parse_words(parser, in_file, READERS, where=f"--config {known.config}: ")
        typed |= {word[2:].partition("=")[0] for word in in_file if word.startswith("--")}
    namespace = parse_words(parser, words, READERS, namespace)
    check_harmless(in_file, known.config, namespace)
    values = vars(namespace)
    for name, field in FLAGS.items():
        if isinstance(field.default, tuple):  # argparse has a list, or None
            values[name] = tuple(values[name] or ())
    options = Options(**values, given=frozenset(typed & {*values})).resolve_optimizer()
    check_options(options)
    return options


# ---------------------------------------------------------------------------- checking them


def find_idle_flags(options: Options) -> list[str]:
    """A note for each typed flag that this --option does not read."""
    notes = []
    for name, field in FLAGS.items():
        if name in options.given and options.option not in READERS[name]:
            instead = field.metadata["instead"]
            remedy = f": --{instead} has" if options.option in READERS.get(instead, ()) else ""
            notes.append(f"note: --{name} has no effect on --option {options.option}{remedy}")
    if options.option == "finetune":
        labels = {"label_names", "dev_out", "max_sentence_len", "hidden_dropout_prob", "pooling"}
        chat = {"skip_bad_lines"}
        idle, what = (labels, "dialogues") if options.is_chat else (chat, "sentences")
        for name in sorted(idle & options.given):
            notes.append(f"note: --{name} has no effect on --option finetune of {what}")
        if "val_fraction" in options.given and (options.dev or not options.train):
            notes.append("note: --val_fraction has no effect on --option finetune beside --dev")
    return notes


def check_options(options: Options) -> None:
    """Raise UsageError where options contradict each other, a line each."""
    problems = [*find_problems(options)]
    if problems:
        raise UsageError("\n".join(problems))
