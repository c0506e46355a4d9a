"""Writing models for other programs: llama2.c's .bin, Hugging Face folders. The inverse of formats.

Everything written is read back and compared before it gets its name.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from config import LlamaConfig
from llama import Llama, load_pretrained, model_payload
from minllama.errors import UsageError
from minllama.files import atomic_folder, atomic_write
from minllama.formats import (
    LLAMA2C_MAGIC,
    hugging_face_name,
    llama2c_order,
    to_half_split,
)
from minllama.pt_file import write_sealed
from tokenizer import Tokenizer, export_tokenizer_bin

TOKENIZER_BIN = "tokenizer.bin"  # llama2.c's vocabulary, beside its model
HUGGING_FACE_FILES = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
}

# ---------------------------------------------------------------------------- any format


def export(
    model: Llama,
    target: str,
    output: Path,
    *,
    dtype: str,
    tokenizer: Tokenizer | None,
    extra: dict[str, Any],
) -> list[Path]:
    """Write a model as `target`: pt, bin, bin-int8 or hf; returns the paths that were written.

    `extra` is put into a .pt file beside the model. Raises UsageError for what the format cannot
    hold, and if what was read back is not what was written.
    """
    if target == "hf":
        with atomic_folder(output) as folder:
            write_hugging_face(model, folder, dtype, tokenizer)
            check_read_back(folder, as_stored(model, dtype))
            if tokenizer is not None:
                check_token_ids(tokenizer, folder)
        return [output]
    if target == "pt":
        payload = model_payload(model, getattr(torch, dtype)) | extra
        want = as_stored(model, dtype)
        write: Callable[[BinaryIO], None] = functools.partial(write_sealed, payload=payload)
    else:
        require_llama2c(model.config)
        write, want = functools.partial(write_bin, model), model.state_dict()
        if target == "bin-int8":
            write, want = functools.partial(write_bin_int8, model), dequantized(model)
    with atomic_write(output, verify=lambda path: check_read_back(path, want)) as file:
        write(file)
    if target == "pt" or tokenizer is None:
        return [output]
    vocabulary = output.with_name(TOKENIZER_BIN)
    export_tokenizer_bin(tokenizer, vocabulary)
    return [output, vocabulary]


def as_stored(model: Llama, dtype: str) -> dict[str, Tensor]:
    """The model's tensors after a passage through dtype."""
    stored = getattr(torch, dtype)
    return {name: tensor.to(stored).float() for name, tensor in model.state_dict().items()}


def check_read_back(path: Path, want: dict[str, Tensor]) -> None:
    """UsageError unless load_pretrained finds exactly these tensors."""
    found = load_pretrained(path).state_dict()
    for name, tensor in want.items():
        if not torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)):  # NaN too
            raise UsageError(f"self-check: {name} read back from {path} differs; nothing written")


# ---------------------------------------------------------------------------- llama2.c's files


def header(config: LlamaConfig, *, signed: bool) -> bytes:
    """The seven int32 of a .bin file; version 0 signs an untied head in the vocabulary size."""
    sign = -1 if signed and not config.tie_word_embeddings else 1
    return struct.pack(
        "<7i",
        *(config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads),
        *(sign * config.vocab_size, config.max_seq_len),
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().numpy()).cast("B")


def write_bin(model: Llama, file: BinaryIO) -> None:
    """llama2.c's version 0, for run.c: float32, rotary tables included."""
    file.write(header(model.config, signed=True))
    cos, sin = model.rotary[:, 0].unbind(-1)
    state = {**model.state_dict(), "freqs_cos": cos, "freqs_sin": sin}
    tied = model.config.tie_word_embeddings
    for name in llama2c_order(model.config.n_layers, version=0, tied=tied):
        file.write(tensor_bytes(state[name]))


def group_size(config: LlamaConfig) -> int:
    """Numbers that share a scale: 64, halved until rows of dim and hidden_dim divide into groups.

    llama2.c's exporter looks at dim alone, but runq reads w2 by rows of hidden_dim.
    """
    group = 64
    while config.dim % group or config.hidden_dim % group:
        group //= 2
    return group


def quantize(tensor: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """int8 numbers and a float32 scale for each group of them, symmetric about zero."""
    grouped = tensor.detach().float().reshape(-1, group)
    scales = grouped.abs().amax(dim=1) / 127
    divisors = torch.where(scales > 0, scales, 1.0)  # a group of zeros stays one
    return torch.round(grouped / divisors[:, None]).to(torch.int8), scales


def write_bin_int8(model: Llama, file: BinaryIO) -> None:
    """llama2.c's version 2, for runq: matrices in int8 groups, norms in float32."""
    config, group = model.config, group_size(model.config)
    head = struct.pack("<Ii", LLAMA2C_MAGIC, 2) + header(config, signed=False)
    head += struct.pack("<Bi", config.tie_word_embeddings, group)
    file.write(head.ljust(256, b"\0"))
    state = model.state_dict()
    for name in llama2c_order(config.n_layers, version=2, tied=config.tie_word_embeddings):
        parts = (state[name],) if state[name].dim() == 1 else quantize(state[name], group)
        for part in parts:
            file.write(tensor_bytes(part))


def dequantized(model: Llama) -> dict[str, Tensor]:
    """What a reader of the int8 file must find."""
    group = group_size(model.config)
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            numbers, scales = quantize(tensor, group)
            tensor = (numbers * scales[:, None]).view(tensor.shape)
        found[name] = tensor
    return found


def require_llama2c(config: LlamaConfig) -> None:
    """run.c has its epsilon and theta built in: other ones would compute something else."""
    for name, only in (("layer_norm_eps", 1e-5), ("rope_theta", 10000.0)):
        if getattr(config, name) != only:
            raise UsageError(f"llama2.c knows only {name} {only:g}, not {getattr(config, name):g}")


# ---------------------------------------------------------------------------- Hugging Face folders


def hugging_face_config(config: LlamaConfig, dtype: str, tokenizer: Tokenizer | None) -> dict:
    bos, eos = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (1, 2)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,  # where transformers 4 looks; 5 looks one line below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def merges(pieces: dict[str, float]) -> list[list[str]]:
    """The pairs that make each piece, best pieces first: what `tokenizers` calls BPE merges."""
    ranked = sorted(pieces, key=lambda piece: -pieces[piece])
    return [
        [piece[:cut], piece[cut:]]
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def normal_pieces(tokenizer: Tokenizer) -> dict[str, float]:
    """The pieces that text is made of, and their scores."""
    sp = tokenizer.sp_model
    return {
        sp.id_to_piece(i): sp.get_score(i)
        for i in range(tokenizer.n_words)
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary in the `tokenizers` library's own format.

    Not left to transformers' reading of tokenizer.model, which drops a leading space.
    """
    sp = tokenizer.sp_model
    names = [sp.id_to_piece(i) for i in range(tokenizer.n_words)]
    bos = names[tokenizer.bos_id]
    special = sorted({tokenizer.bos_id, tokenizer.eos_id, sp.unk_id()})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    piece = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], **flags, "special": True} for i in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [piece, *({"Sequence": {"id": which, "type_id": 0}} for which in "AB")],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[sp.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges(normal_pieces(tokenizer)),
        },
    }


def require_plain_bpe(tokenizer: Tokenizer) -> None:
    """The exported rules are those of Llama vocabularies: BPE over unchanged text."""
    if not tokenizer.is_plain_bpe:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: only BPE vocabularies that leave the text as it "
            "is, as tokenizer.py trains them, can be exported for transformers"
        )
    made = {"".join(pair) for pair in merges(normal_pieces(tokenizer))}
    unmade = [p for p in normal_pieces(tokenizer) if len(p) > 1 and p not in made]
    if unmade:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: no merge makes its piece {unmade[0]!r}, a symbol "
            "that its maker defined, so it cannot be exported for transformers"
        )


SAMPLES = [
    "Once upon a time, there was a girl.",
    "",
    " ",
    "  two leading",
    "trailing  ",
    "a\nb\n\n c\t",
    "naïve café",
    "你好，世界",
    "👩‍👩‍👧 🙂",
    "<s> </s> <unk>",
    "▁",
    "aaaaaaaaaaa",
    "x" + " " * 9 + "y",
    "<0x0A>",
]


def check_token_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Where `tokenizers` is installed, its ids of difficult texts must be ours."""
    try:
        from tokenizers import Tokenizer as TheirTokenizer
    except ImportError:
        return
    theirs = TheirTokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in SAMPLES:
        ours = tokenizer.encode(text, bos=True, eos=False)
        if theirs.encode(text).ids != ours:
            raise UsageError(f"self-check: tokenizer.json gives other ids for {text!r}")


def write_hugging_face(model: Llama, folder: Path, dtype: str, tokenizer: Tokenizer | None) -> None:
    """A folder that `transformers` loads, in an existing empty folder."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UsageError("--convert hf needs `pip install safetensors`") from None
    config, state = model.config, {}
    heads = {"query": config.n_heads, "key": config.n_kv_heads}
    for name, tensor in model.state_dict().items():
        kind = name.split(".")[-2].removeprefix("compute_")
        tensor = to_half_split(tensor, heads[kind]) if kind in heads else tensor
        if name != "output.weight" or not config.tie_word_embeddings:
            state[hugging_face_name(name)] = tensor.to(getattr(torch, dtype)).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    described = hugging_face_config(config, dtype, tokenizer)
    write_json(folder / "config.json", described)
    ids = {key: described[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", ids)
    if tokenizer is not None:
        require_plain_bpe(tokenizer)
        (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, config))


def tokenizer_config(tokenizer: Tokenizer, config: LlamaConfig) -> dict[str, Any]:
    piece = tokenizer.sp_model.id_to_piece
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "bos_token": piece(tokenizer.bos_id),
        "eos_token": piece(tokenizer.eos_id),
        "unk_token": piece(tokenizer.sp_model.unk_id()),
        "model_max_length": config.max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],  # generate() takes no others
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<s>" in a text is text, as SentencePiece reads it
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
