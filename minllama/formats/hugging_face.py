"""Folders of Hugging Face's `transformers`: config.json, safetensors, the tokenizer's files.

Llama and those of its relatives that compute the same but for what `LlamaConfig` has: Mistral in a
context no longer than its window, Qwen2, Qwen3.

A folder is untrusted: a pickle in it runs no code, and an index names files of its own folder only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from config import LlamaConfig
from minllama.formats.hugging_face_vocabulary import (
    check_token_ids,
    padding_id,
    read_template,
    read_vocabulary,
    write_json,
    write_vocabulary,
)
from minllama.formats.pt_file import load_pt
from minllama.formats.pt_model import Classifier
from minllama.formats.stored_model import (
    Contents,
    StoredModel,
    architecture_for,
    as_stored,
    read_shape,
    reorder_heads,
    to_adjacent_pairs,
    to_half_split,
    translate,
)
from minllama.model.shape import SCALING_BOUNDS
from minllama.system.errors import UsageError
from minllama.system.files import atomic_folder, check_regular, is_text, read_json_object
from minllama.system.packages import import_optional
from minllama.text.find_files import SHOWN_FILES
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from llama import Llama

PACKAGE, BESIDE = "safetensors", None
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"  # PEFT's, beside a whole model
PICKLED = "pytorch_model"  # begins the names of older folders' files, which are pickles
FILES = {  # what `write` makes
    WEIGHTS,
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
}
NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.compute_query": "self_attn.q_proj",
    "attention.compute_key": "self_attn.k_proj",
    "attention.compute_value": "self_attn.v_proj",
    "attention.compute_output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
CONFIG = {  # config.json's keys, in the order they are written in, and ours
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "layer_norm_eps",
}
# The architectures by model_type, and what they have where config.json does not say: values of
# theirs, and, by our names, what all models of it have.
LLAMA_2 = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
QWEN = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "num_key_value_heads": 32}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "llama": (LLAMA_2, {}),
    "mistral": (LLAMA_2 | {"num_key_value_heads": 8, "sliding_window": 4096}, {}),
    "qwen2": (QWEN, {"attention_bias": True}),
    "qwen3": (QWEN | {"head_dim": 128}, {"qk_norm": True}),
}
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # of those that are written
# What would compute something else than the Llama here does, unless it is this. A bias of their
# attention is one of its output, too; Qwen2's, which it has without a word, is not.
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def tensor_name(name: str) -> str:
    """What `transformers` calls our tensor of this name."""
    return translate(name, NAMES, "model.layers")


# ---------------------------------------------------------------------------- reading


def recognizes(path: Path, head: bytes) -> bool:
    """Whether it is a folder, or the file of one that its weights are in."""
    return path.is_dir() or path.name in (WEIGHTS, INDEX) or path.name.startswith(PICKLED)


def _folder(path: Path) -> Path:
    """The folder that is meant by its path or that of its weights; UsageError where it is none."""
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).exists() for name in ("config.json", WEIGHTS, INDEX)):
        if files := sorted(folder.glob("*-model.pt")) or sorted(folder.glob("*.pt")):
            named = ", ".join(map(str, files[:SHOWN_FILES]))
            raise UsageError(f"{folder}: is a folder; name one of its files, such as {named}")
        raise UsageError(
            f"{folder}: the folder holds no model: neither a .pt file, nor config.json with "
            f"{WEIGHTS} (Hugging Face), nor consolidated.00.pth with params.json (Meta), nor "
            "lit_model.pth with model_config.yaml (litgpt), nor adapter_config.json (PEFT)"
        )
    return folder


def _rope(file: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of rotary positions, in transformers 5's place, 4's, or both."""
    names = ("rope_theta", "partial_rotary_factor")
    settings = {name: theirs[name] for name in names if theirs.get(name) is not None}
    for key in ("rope_parameters", "rope_scaling"):
        section = theirs.get(key) or {}
        if not isinstance(section, dict):
            raise UsageError(f"{file}: {key} {str(section)[:40]!r} is not an object")
        for name, value in section.items():
            if isinstance(value, dict):
                raise UsageError(f"{file}: {key} has positions of {name[:40]!r} alone: no Llama")
            name = "rope_type" if name == "type" else name  # its older name
            if settings.setdefault(name, value) != value:
                first = settings[name]
                raise UsageError(
                    f"{file}: {name} is given twice, as {first} and as {value}: leave one"
                )
    return settings


def _read_config(path: Path) -> LlamaConfig:
    file, theirs = path / "config.json", read_json_object(path / "config.json")
    kind = theirs.get("model_type")
    if kind not in [*ARCHITECTURES]:  # a list: what a file has may have no hash
        raise UsageError(
            f"{file}: model_type {kind!r} is another architecture than the Llama here; these are "
            f"read: {', '.join(ARCHITECTURES)}"
        )
    defaults, has = ARCHITECTURES[kind]
    theirs, rope = defaults | theirs, _rope(file, theirs)
    required = {  # else the model would compute something else than the Llama here: value, only
        **{key: (theirs.get(key, only), only) for key, only in ONLY.items()},
        "quantization_config": (theirs.get("quantization_config"), None),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    for key, (value, must_be) in required.items():
        if value != must_be:
            raise UsageError(f"{file}: {key} {value!r} is not supported, only {must_be!r}")
    args = has | {ours: theirs.get(key) for key, ours in CONFIG.items()}
    args["rope_theta"] = rope.get("rope_theta", 10000.0)
    args["rope_scaling"] = _rope_scaling(rope)
    args["tie_word_embeddings"] = theirs.get("tie_word_embeddings", False)
    args["max_seq_len"] = _context(file, kind, theirs)
    return read_shape(file, args)


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """What of the settings scales positions; LlamaConfig refuses kinds that it does not know."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    names = ("factor", *(SCALING_BOUNDS if kind == "llama3" else ()))
    return {"rope_type": kind} | {name: rope.get(name) for name in names}


def _context(file: Path, kind: str, theirs: dict[str, Any]) -> Any:
    """The context; within a sliding window attention is the plain one, so it ends there."""
    context, window = theirs["max_position_embeddings"], theirs.get("sliding_window")
    types, known = theirs.get("layer_types") or [], ("full_attention", "sliding_attention")
    if not isinstance(types, list) or any(name not in known for name in types):
        raise UsageError(f"{file}: layer_types {str(types)[:80]} are not supported")
    slides = kind == "mistral" or (kind != "llama" and theirs.get("use_sliding_window"))
    if not (slides and isinstance(window, int) and isinstance(context, int) and window < context):
        return context
    print(
        f"note: {file}: the context is cut from {context:,} to {window:,} tokens, its sliding "
        "window, within which the model is a Llama",
        file=sys.stderr,
    )
    return window


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold a folder's weights, as `transformers` looks for them.

    A single file counts more than an index, which may be left from a larger save.
    """
    for single, index in ((WEIGHTS, INDEX), (f"{PICKLED}.bin", f"{PICKLED}.bin.index.json")):
        if (folder / single).exists():
            return [single]
        if (folder / index).exists():
            shards = read_json_object(folder / index).get("weight_map")
            if not isinstance(shards, dict):
                raise UsageError(f"{folder / index}: has no object 'weight_map'")
            return sorted({Path(str(name)).name for name in shards.values()})
    return [WEIGHTS]


def load_tensors(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a folder's files as they are stored; of pickles without running code.

    Raises UsageError for a missing or damaged file, and where `safetensors` is not installed.
    """
    missing = next((name for name in names if not (folder / name).exists()), None)
    if missing:
        raise UsageError(f"{folder}: no {missing} in this folder")
    if all(name.startswith(PICKLED) for name in names):
        parts = [load_pt(folder / name)["model"] for name in names]
        return {name: tensor for part in parts for name, tensor in part.items()}
    if not is_text(folder):
        raise UsageError(f"{folder}: safetensors needs a name that is UTF-8: rename the folder")
    load_file = import_optional("safetensors.torch", f"{folder}: reading it").load_file
    tensors: dict[str, Tensor] = {}
    for name in names:
        check_regular(folder / name)
        try:
            tensors |= load_file(folder / name)
        except Exception as error:  # safetensors' own class, or what the damage happens to hit
            raise UsageError(f"{folder / name}: damaged: {error}") from None
    return tensors


def read(path: Path, *, low_rank: dict[str, tuple[Tensor, Tensor]] | None = None) -> StoredModel:
    """Read a folder; UsageError for what is no Llama, or would compute something else here.

    `low_rank` are products to add to the matrices that they are named after.
    """
    path = _folder(path)
    if low_rank is None and (path / ADAPTER).exists():
        remedy = "name that file to merge it into its model"
        print(f"note: {path}: {ADAPTER} in it is left out: {remedy}", file=sys.stderr)
    config, weights = _with_head(path, _read_config(path), _causal_lm_weights(path))
    for name, (b, a) in (low_rank or {}).items():
        if name not in weights or weights[name].shape != (len(b), a.shape[1]):
            raise UsageError(f"{path}: has no matrix {name[:80]} for the adapter to add to")
        weights[name] = weights[name].float() + b @ a
    vocabulary, template = read_vocabulary(path), read_template(path)
    model = StoredModel(config, weights, vocabulary, template).checked(path, tensor_name)
    return model._replace(weights=reorder_heads(model.weights, config, to_adjacent_pairs))


def _causal_lm_weights(path: Path) -> dict[str, Tensor]:
    """The tensors by the names that a LlamaForCausalLM gives them; a classifier's head left out."""
    weights = {
        name: tensor
        for name, tensor in load_tensors(path, weight_files(path)).items()
        if not name.endswith("rotary_emb.inv_freq") and name != "score.weight"  # computed here
    }
    if "embed_tokens.weight" in weights:  # of a LlamaModel, which is what is below the head
        weights = {f"model.{name}": tensor for name, tensor in weights.items()}
    return weights


def _with_head(
    path: Path, config: LlamaConfig, weights: dict[str, Tensor]
) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Shape and tensors with an output head, where a model that has one of its own left it out.

    One of a class that predicts no tokens has none: then the embedding serves.
    """
    table, head = tensor_name("tok_embeddings.weight"), tensor_name("output.weight")
    classes = read_json_object(path / "config.json").get("architectures")
    if table not in weights or head in weights:
        return config, weights
    if not config.tie_word_embeddings:
        if not isinstance(classes, list) or any("CausalLM" in str(each) for each in classes):
            return config, weights  # it is missing, and its reader says so
        print(
            f"note: {path}: a {str(classes[0])[:40] if classes else 'model'} has no output head, "
            "so the embedding serves as one: finetune it before it writes text",
            file=sys.stderr,
        )
        config = dataclasses.replace(config, tie_word_embeddings=True)
    return config, weights | {head: weights[table]}


def contents(path: Path) -> Contents:
    """The tensors as they are stored, by their names in the files."""
    path = _folder(path)
    return Contents("Hugging Face folder", {"model": load_tensors(path, weight_files(path))})


# ---------------------------------------------------------------------------- writing


def write(
    model: Llama,
    output: Path,
    *,
    dtype: str,
    tokenizer: Tokenizer | None,
    classifier: Classifier | None = None,
) -> list[Path]:
    """Write a folder that `transformers` loads, with the vocabulary where there is one.

    Of a fine-tuned classifier a ForSequenceClassification, which has no output head. Raises
    UsageError for one that computes something else.
    """
    want = as_stored(model, dtype)
    if classifier is not None:
        check_sequence_classifier(classifier)
        want["output.weight"] = want["tok_embeddings.weight"]
    with atomic_folder(output) as folder:
        write_files(model, folder, dtype, tokenizer, classifier)
        read(folder).check_read_back(folder, want)
        if tokenizer is not None:
            check_token_ids(tokenizer, folder)
    return [output]


def check_sequence_classifier(classifier: Classifier) -> None:
    """UsageError for a head that is not what a LlamaForSequenceClassification has.

    That one reads the last token's state and has no bias; one that is the same for all labels
    changes no probability.
    """
    weight, bias = classifier.head["weight"], classifier.head["bias"]
    problem = None
    if classifier.pooling != "last":
        problem = f"the {classifier.pooling} of the states, and that the last one alone"
    elif not torch.equal(bias, bias[:1].expand_as(bias)):
        problem = "a weight and a bias, and that has no bias"
    elif not (weight.isfinite().all() and bias.isfinite().all()):
        problem = "numbers that are not finite"
    if problem is not None:
        raise UsageError(
            f"--convert hf: the classifier's head is not that of a LlamaForSequenceClassification: "
            f"it reads {problem}, so its predictions would be others; --convert pt keeps it"
        )


def write_files(
    model: Llama,
    folder: Path,
    dtype: str,
    tokenizer: Tokenizer | None,
    classifier: Classifier | None = None,
) -> None:
    """Fill an existing empty folder."""
    save_file = import_optional("safetensors.torch", "--convert hf").save_file
    config, state = model.config, {}
    if classifier is not None:
        config = dataclasses.replace(config, tie_word_embeddings=True)  # of two, one is left
        state["score.weight"] = classifier.head["weight"].to(getattr(torch, dtype)).contiguous()
    for name, tensor in reorder_heads(model.state_dict(), config, to_half_split).items():
        if name != "output.weight" or not config.tie_word_embeddings:
            state[tensor_name(name)] = tensor.to(getattr(torch, dtype)).contiguous()
    path = folder / WEIGHTS
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(state, path, metadata={"format": "pt"})
    except Exception as error:  # safetensors' own class, which has the system's number in its text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else error from None
    path.chmod(mode)  # safetensors' own is 0600, which other users cannot read
    described = config_json(config, dtype, tokenizer, classifier)
    write_json(folder / "config.json", described)
    ends = tokenizer.vocabulary.end_ids if tokenizer else [described["eos_token_id"]]
    ids = {key: described[key] for key in ("bos_token_id", "eos_token_id")}
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(folder / "generation_config.json", ids)
    if tokenizer is not None:
        write_vocabulary(tokenizer, model, folder)


def config_json(
    config: LlamaConfig,
    dtype: str,
    tokenizer: Tokenizer | None,
    classifier: Classifier | None = None,
) -> dict[str, Any]:
    bos, eos = tokenizer.vocabulary.stated_marks if tokenizer else (1, 2)
    kind = architecture_for(config, "hf")
    scaling = {} if config.rope_scaling is None else config.rope_scaling.to_plain()
    rope = {"rope_type": "default", **scaling, "rope_theta": config.rope_theta}
    task, labels = "ForCausalLM", {}
    if classifier is not None:
        task, names = "ForSequenceClassification", dict(enumerate(classifier.label_names))
        labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        if tokenizer is not None:  # without it they refuse more than one text at once
            labels["pad_token_id"] = padding_id(tokenizer)
    return {
        "architectures": [CLASSES[kind] + task],
        **labels,
        "model_type": kind,
        **ONLY,
        **{key: getattr(config, ours) for key, ours in CONFIG.items()},
        "rope_theta": config.rope_theta,  # where transformers 4 looks, and at rope_scaling
        **({"rope_scaling": scaling} if scaling else {}),
        "rope_parameters": rope,  # where transformers 5 looks
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }
