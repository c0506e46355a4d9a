"""Model files of this and other programs, read into tensors under our names: format by content.

.pt files of this program, the original and llama2.c; llama2.c's .bin (versions 0 and 1, and 2,
whose int8 is widened); GGUF; Hugging Face folders with safetensors. A file is untrusted: no code
from it runs, and what it claims is compared with its size before anything is made of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig, fingerprint
from minllama.formats.gguf import GGUF_MAGIC, read_gguf, rebuilt_vocabulary
from minllama.formats.pt_file import STATE_FILE, is_pt, load_pt
from minllama.system.errors import UsageError
from minllama.system.files import check_regular, read_json_object
from minllama.text.chat import ChatTemplate

LLAMA2C_MAGIC = 0x616B3432  # "ak42": llama2.c's versions 1 and 2; version 0 has no magic
LLAMA2C_NAMES = {  # llama2.c's and Meta's names of what the original renamed
    "attention.wq": "attention.compute_query",
    "attention.wk": "attention.compute_key",
    "attention.wv": "attention.compute_value",
    "attention.wo": "attention.compute_output",
}
LLAMA2C_SHAPE = (
    "dim",
    "hidden_dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "max_seq_len",
)
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.compute_query": "self_attn.q_proj",
    "attention.compute_key": "self_attn.k_proj",
    "attention.compute_value": "self_attn.v_proj",
    "attention.compute_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
HUGGING_FACE_CONFIG = {  # a config.json's keys, in the order they are written in, and ours
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
LLAMA_ALONE = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}  # else another model
GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "attention.compute_query": "attn_q",
    "attention.compute_key": "attn_k",
    "attention.compute_value": "attn_v",
    "attention.compute_output": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
GGUF_CONFIG = {  # keys that begin with `llama.`, and ours
    "vocab_size": "vocab_size",
    "context_length": "max_seq_len",
    "embedding_length": "dim",
    "block_count": "n_layers",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.layer_norm_rms_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
}
GGUF_HEAD_DIM = ("rope.dimension_count", "attention.key_length", "attention.value_length")


# ---------------------------------------------------------------------------- any format


class StoredModel(NamedTuple):
    """A model as a file holds it: exactly the tensors of its config, under our names."""

    config: LlamaConfig
    weights: dict[str, Tensor]  # in any floating dtype
    vocabulary: bytes | None  # the SentencePiece model, where the file carries one
    chat_template: ChatTemplate | None = None


def read_model(path: Path, *, adapters: bool = False) -> StoredModel:
    """Read a model of any of the formats; UsageError, naming file and tensor, for anything else.

    `adapters` passes over those of a LoRA finetuning's checkpoint: what is left is the model that
    it began with.
    """
    if path.is_dir():
        return _read_hugging_face(path)
    if path.name in (SAFETENSORS, SAFETENSORS_INDEX) and path.exists():
        return _read_hugging_face(path.parent)  # its shape is in the file beside it
    check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    if is_pt(head):
        return _read_pt(path, adapters)
    return _read_gguf(path) if head == GGUF_MAGIC else _read_llama2c(path)


def _checked(
    path: Path,
    config: LlamaConfig,
    weights: dict[str, Tensor],
    vocabulary: bytes | None = None,
    *,
    spell: Callable[[str], str] = str,
) -> StoredModel:
    """UsageError, naming file and tensor, if these are not the tensors of the config."""
    shapes = parameter_shapes(config)
    missing = [spell(name) for name in shapes if name not in weights]
    surplus = [name for name in weights if name not in shapes]
    for what, names in (("missing", missing), ("not of a Llama of this shape", surplus)):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(f"{path}: tensor {names[0]}{others} {what}")
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            got = f"{tuple(tensor.shape)} where its config asks for {shape}"
            raise UsageError(f"{path}: tensor {spell(name)} has the shape {got}")
        if not tensor.is_floating_point():
            raise UsageError(f"{path}: tensor {spell(name)} holds {tensor.dtype}, not real numbers")
    embedding, head = weights["tok_embeddings.weight"], weights["output.weight"]
    same = embedding.dtype == head.dtype and torch.equal(embedding, head)
    if config.tie_word_embeddings and not same:
        raise UsageError(f"{path}: says that embedding and output are tied, but they differ")
    return StoredModel(config, weights, vocabulary)


def _renamed(name: str, names: dict[str, str], layers: str) -> str:
    """Another program's name of our tensor, by its names of the parts and of their list."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{names[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"{layers}.{layer}.{names[part]}.weight"


def read_shape(path: Path, args: Any, **defaults: Any) -> LlamaConfig:
    """The shape that a file's `model_args` ask for; `defaults` for what they leave out.

    Raises UsageError, naming the file, for an invalid one.
    """
    if not isinstance(args, dict):
        raise UsageError(f"{path}: no dict 'model_args', which gives the shape of the model")
    missing = {name: value for name, value in defaults.items() if args.get(name) is None}
    try:
        return LlamaConfig.from_model_args(args | missing)
    except (TypeError, ValueError) as error:  # UsageError is a ValueError
        raise UsageError(f"{path}: invalid Llama shape: {error}") from None


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a weights file, a tied head under both names."""
    dim, hidden, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    in_layer = {
        "attention_norm": (dim,),
        "attention.compute_query": (dim, dim),
        "attention.compute_key": (kv_dim, dim),
        "attention.compute_value": (kv_dim, dim),
        "attention.compute_output": (dim, dim),
        "ffn_norm": (dim,),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
    }
    shapes = {"tok_embeddings.weight": (config.vocab_size, dim)}
    for layer in range(config.n_layers):
        for name, shape in in_layer.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
    return shapes | {"norm.weight": (dim,), "output.weight": (config.vocab_size, dim)}


# ---------------------------------------------------------------------------- .pt files


def own_name(name: str) -> str:
    """Our name of a .pt file's tensor: wrappers' prefixes dropped, llama2.c's names translated."""
    name = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("llama.")
    for other, ours in LLAMA2C_NAMES.items():
        name = name.replace(f".{other}.", f".{ours}.")
    return name


def _read_pt(path: Path, adapters: bool) -> StoredModel:
    payload = load_pt(path)
    weights = {
        own_name(name): tensor
        for name, tensor in payload["model"].items()
        if not (adapters and ".lora_" in name)
    }
    # llama2.c's rotary tables are computed here; a classifier's head is not the Llama's.
    for name in ("freqs_cos", "freqs_sin", "classifier_head.weight", "classifier_head.bias"):
        weights.pop(name, None)
    defaults: dict[str, Any] = {}
    gate = weights.get("layers.0.feed_forward.w1.weight")
    if gate is not None and gate.dim() == 2:
        defaults["hidden_dim"] = gate.shape[0]
    table, head = weights.get("tok_embeddings.weight"), weights.get("output.weight")
    if table is not None and head is not None:
        defaults["tie_word_embeddings"] = torch.equal(table, head)
    config = read_shape(path, payload.get("model_args"), **defaults)
    model = _checked(path, config, weights, read_vocabulary(path, payload))
    if "chat_template" not in payload:
        return model
    return model._replace(chat_template=ChatTemplate.from_stored(payload["chat_template"], path))


def read_vocabulary(path: Path, payload: dict[str, Any]) -> bytes | None:
    """The vocabulary that a .pt file carries, if any; UsageError for one that is damaged."""
    vocabulary = payload.get("vocabulary")
    if vocabulary is None:
        return None
    if not isinstance(vocabulary, Tensor) or vocabulary.dtype != torch.uint8:
        raise UsageError(f"{path}: 'vocabulary' is not a tensor of bytes")
    content = vocabulary.numpy().tobytes()
    found, said = fingerprint(content), payload.get("vocabulary_fingerprint")
    if found != said:
        raise UsageError(
            f"{path}: its vocabulary has the fingerprint {found} where it says {str(said)[:40]}: "
            "the file is damaged; copy it again"
        )
    return content


# ---------------------------------------------------------------------------- llama2.c's .bin files


def llama2c_order(n_layers: int, *, version: int, tied: bool) -> list[str]:
    """The tensors of a llama2.c .bin file, in the file's order."""

    def each(*names: str) -> list[str]:
        return [f"layers.{i}.{name}.weight" for name in names for i in range(n_layers)]

    attention = each(*LLAMA2C_NAMES.values())
    feed_forward = each("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    table, norm, head = "tok_embeddings.weight", "norm.weight", [] if tied else ["output.weight"]
    if version == 0:
        layers = [*each("attention_norm"), *attention, *each("ffn_norm"), *feed_forward]
        return [table, *layers, norm, "freqs_cos", "freqs_sin", *head]
    norms = [*each("attention_norm", "ffn_norm"), norm]
    return [*norms, table, *attention, *feed_forward, *head]


def _read_llama2c(path: Path) -> StoredModel:
    with path.open("rb") as file:
        header = file.read(256).ljust(256, b"\0")
        magic, version = struct.unpack_from("<Ii", header)
        start, version = (256, version) if magic == LLAMA2C_MAGIC else (28, 0)
        numbers = struct.unpack_from("<7i", header, 8 if version else 0)
        tied = header[36] == 1 if version else numbers[5] > 0  # version 0: the vocabulary's sign
        group = struct.unpack_from("<i", header, 37)[0] if version == 2 else 0
        known = version in (0, 1) or (version == 2 and group > 0 == numbers[0] % group)
        if not known or 0 in numbers or max(map(abs, numbers)) >= 2**26:  # text looks like that
            raise UsageError(
                f"{path}: not a model file: neither .pt nor GGUF nor llama2.c's .bin; a model of "
                "Hugging Face is a folder"
            )
        args = dict(zip(LLAMA2C_SHAPE, numbers, strict=True))
        args |= {"vocab_size": abs(args["vocab_size"]), "tie_word_embeddings": tied}
        config = read_shape(path, args)
        shapes = parameter_shapes(config)
        shapes["freqs_cos"] = shapes["freqs_sin"] = (config.max_seq_len, config.head_dim // 2)
        order = llama2c_order(config.n_layers, version=version, tied=tied)
        want, size = start, path.stat().st_size
        for shape in map(shapes.get, order):
            count = math.prod(shape)
            want += count + 4 * (count // group) if group and len(shape) == 2 else 4 * count
        if size != want:  # found before anything of the claimed size is made
            raise UsageError(
                f"{path}: {size:,} bytes where a llama2.c file with this header has {want:,}: "
                "it is cut off or no model file"
            )
        file.seek(start)
        weights = {name: _read_tensor(file, shapes[name], group) for name in order}
    for name in ("freqs_cos", "freqs_sin"):  # computed here
        weights.pop(name, None)
    weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    return _checked(path, config, weights)


def _read_tensor(file: BinaryIO, shape: tuple[int, ...], group: int) -> Tensor:
    count = math.prod(shape)
    if not group or len(shape) == 1:
        return torch.from_numpy(np.fromfile(file, "<f4", count)).view(shape)
    quantized = torch.from_numpy(np.fromfile(file, "i1", count)).view(-1, group)
    scales = torch.from_numpy(np.fromfile(file, "<f4", count // group))
    return (quantized * scales[:, None]).view(shape)


# ---------------------------------------------------------------------------- GGUF


def gguf_name(name: str) -> str:
    """What llama.cpp calls our tensor of this name."""
    return _renamed(name, GGUF_NAMES, "blk")


def _gguf_config(path: Path, values: dict[str, Any], vocab_size: int, tied: bool) -> LlamaConfig:
    """The shape that the values of a GGUF file give; UsageError for what is not computed here."""
    if values.get("general.architecture") != "llama":
        found = str(values.get("general.architecture"))[:40]
        raise UsageError(f"{path}: general.architecture {found!r} is not supported, only 'llama'")
    said = {"rope.freq_base": 10000.0, "vocab_size": vocab_size}
    for key, value in values.items():
        if key.startswith("llama."):  # 1e-05, not the 9.999999747e-06 that float32 makes of it
            value = float(str(np.float32(value))) if isinstance(value, float) else value
            said[key.removeprefix("llama.")] = value
    for key in GGUF_CONFIG:
        if not isinstance(said.get(key, 0), int | float):
            raise UsageError(f"{path}: llama.{key} {str(said[key])[:40]!r} is no number")
    args = {ours: said.get(key) for key, ours in GGUF_CONFIG.items()}
    config = read_shape(path, args | {"tie_word_embeddings": tied})
    for key, value in said.items():
        must_be = (config.head_dim,) if key in GGUF_HEAD_DIM else (0, "none")
        known = key in GGUF_CONFIG or key == "tensor_data_layout"
        if not known and (not isinstance(value, int | float | str) or value not in must_be):
            raise UsageError(f"{path}: llama.{key} {str(value)[:40]!r} is not supported")
    return config


def _read_gguf(path: Path) -> StoredModel:
    values, tensors, *_ = read_gguf(path)
    table = tensors.get("token_embd.weight", torch.empty(0))
    config = _gguf_config(path, values, len(table), tied="output.weight" not in tensors)
    ours = {gguf_name(name): name for name in parameter_shapes(config)}
    weights = {ours.get(name, name): tensor for name, tensor in tensors.items()}
    weights.setdefault("output.weight", table)
    vocabulary = rebuilt_vocabulary(path, values)
    model = _checked(path, config, weights, vocabulary, spell=gguf_name)
    template = ChatTemplate.from_jinja(values.get("tokenizer.chat_template"))
    return model._replace(chat_template=template)


# ---------------------------------------------------------------------------- Hugging Face folders


def hugging_face_name(name: str) -> str:
    """What `transformers` calls our tensor of this name."""
    return _renamed(name, HUGGING_FACE_NAMES, "model.layers")


def to_half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key matrix as `transformers` rotates them: i paired with i + D/2."""
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_adjacent_pairs(weight: Tensor, n_heads: int) -> Tensor:
    """The inverse of to_half_split: 2i paired with 2i + 1."""
    return weight.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rope(file: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of rotary positions, in transformers 5's place, 4's, or both."""
    theta = theirs.get("rope_theta")
    found: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    for key in ("rope_parameters", "rope_scaling"):
        said = theirs.get(key) or {}
        if not isinstance(said, dict):
            raise UsageError(f"{file}: {key} {str(said)[:40]!r} is not an object")
        for name, value in said.items():
            name = "rope_type" if name == "type" else name  # its older name
            if found.setdefault(name, value) != value:
                raise UsageError(
                    f"{file}: {name} is given twice, as {found[name]} and as {value}: leave one"
                )
    return found


def _hugging_face_config(path: Path) -> LlamaConfig:
    file, theirs = path / "config.json", read_json_object(path / "config.json")
    rope = _rope(file, theirs)
    asked = {  # what would compute something else than Llama here does, and what it must be
        "model_type": (theirs.get("model_type"), "llama"),
        **{key: (theirs.get(key, only), only) for key, only in LLAMA_ALONE.items()},
        "quantization_config": (theirs.get("quantization_config"), None),
        "rope_scaling": (rope.get("rope_type", "default"), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    for key, (value, must_be) in asked.items():
        if value != must_be:
            raise UsageError(f"{file}: {key} {value!r} is not supported, only {must_be!r}")
    theirs = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6} | theirs  # their defaults
    args = {ours: theirs.get(key) for key, ours in HUGGING_FACE_CONFIG.items()}
    args["rope_theta"] = rope.get("rope_theta", 10000.0)
    args["tie_word_embeddings"] = theirs.get("tie_word_embeddings", False)
    config = read_shape(file, args)
    if theirs.get("head_dim") not in (None, config.head_dim):
        raise UsageError(
            f"{file}: head_dim {theirs['head_dim']} is not supported, only hidden_size / "
            f"num_attention_heads = {config.head_dim}"
        )
    return config


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder as they are stored, from one file or from shards.

    Raises UsageError for a missing or damaged file, and where `safetensors` is not installed.
    """
    if (folder / STATE_FILE).is_file():
        raise UsageError(
            f"{folder}: is a sharded checkpoint: resume it (--resume {folder}, one process is "
            "enough) to get final-model.pt"
        )
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UsageError(f"{folder}: reading it needs `pip install safetensors`") from None
    files = [SAFETENSORS]
    index = folder / SAFETENSORS_INDEX
    if index.is_file():
        shards = read_json_object(index).get("weight_map")
        if not isinstance(shards, dict):
            raise UsageError(f"{index}: has no object 'weight_map'")
        files = sorted({Path(str(name)).name for name in shards.values()})
    elif not (folder / files[0]).is_file() and (folder / "pytorch_model.bin").is_file():
        raise UsageError(
            f"{folder}: holds pytorch_model.bin, a pickle: load it with transformers, then "
            "model.save_pretrained(folder) writes safetensors"
        )
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise UsageError(f"{folder}: no {name} in this folder") from None
        except Exception as error:  # safetensors' own class, or what the damage happens to hit
            raise UsageError(f"{folder / name}: damaged: {error}") from None
    return tensors


def _read_hugging_face(path: Path) -> StoredModel:
    config = _hugging_face_config(path)
    ours = {hugging_face_name(name): name for name in parameter_shapes(config)}
    weights = {
        ours.get(name, name): tensor
        for name, tensor in read_safetensors(path).items()
        if not name.endswith("rotary_emb.inv_freq")  # computed here
    }
    if config.tie_word_embeddings and "tok_embeddings.weight" in weights:
        weights.setdefault("output.weight", weights["tok_embeddings.weight"])
    vocabulary = path / "tokenizer.model"
    vocabulary = vocabulary.read_bytes() if vocabulary.is_file() else None
    model = _checked(path, config, weights, vocabulary, spell=hugging_face_name)
    for i in range(config.n_layers):
        for kind, heads in (("query", config.n_heads), ("key", config.n_kv_heads)):
            name = f"layers.{i}.attention.compute_{kind}.weight"
            weights[name] = to_adjacent_pairs(weights[name], heads)
    settings = path / "tokenizer_config.json"
    template = read_json_object(settings).get("chat_template") if settings.is_file() else None
    return model._replace(chat_template=ChatTemplate.from_jinja(template))
