"""Writing models for other programs: llama2.c's .bin, GGUF, Hugging Face folders.

The inverse of formats. Everything written is read back and compared before it gets its name.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from config import LlamaConfig
from llama import Llama, load_pretrained, model_payload
from minllama.formats.formats import (
    GGUF_CONFIG,
    GGUF_HEAD_DIM,
    HUGGING_FACE_CONFIG,
    LLAMA2C_MAGIC,
    LLAMA2C_SHAPE,
    LLAMA_ALONE,
    gguf_name,
    hugging_face_name,
    llama2c_order,
    to_half_split,
)
from minllama.formats.gguf import FORMATS, rounded, vocabulary_values, write_gguf
from minllama.formats.pt_file import write_sealed
from minllama.system.errors import UsageError
from minllama.system.files import atomic_folder, atomic_write, write_text
from tokenizer import Tokenizer, export_tokenizer_bin, vocabulary_remedy

TOKENIZER_BIN = "tokenizer.bin"  # llama2.c's vocabulary, beside its model
MODELFILE = "Modelfile"  # Ollama's recipe, beside the GGUF file
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
    """Write a model as `target`: pt, bin, bin-int8, gguf or hf; returns the paths written.

    `extra` is put into a .pt file beside the model. Raises UsageError for what the format cannot
    hold, and if what was read back is not what was written.
    """
    if target == "hf":
        want = as_stored(model, dtype)
        with atomic_folder(output) as folder:
            write_hugging_face(model, folder, dtype, tokenizer)
            check_read_back(folder, want)
            if tokenizer is not None:
                check_token_ids(tokenizer, folder)
        return [output]
    if target == "gguf":
        return write_llama_cpp(model, output, dtype, tokenizer)
    if target == "pt":
        want = as_stored(model, dtype)
    else:
        require_llama2c(model.config)
        group = group_size(model.config) if target == "bin-int8" else None
        want = dequantized(model, group) if group else model.state_dict()
    with atomic_write(output, verify=lambda path: check_read_back(path, want)) as file:
        if target == "pt":
            write_sealed(file, model_payload(model, getattr(torch, dtype)) | extra)
        else:
            write_bin(model, file, group)
    if target == "pt" or tokenizer is None:
        return [output]
    vocabulary = output.with_name(TOKENIZER_BIN)
    export_tokenizer_bin(tokenizer, vocabulary)
    return [output, vocabulary]


def as_stored(model: Llama, dtype: str, *, gguf: bool = False) -> dict[str, Tensor]:
    """The model's tensors after a passage through dtype, as GGUF files or as others use it.

    Raises UsageError for a number that is too large for it.
    """
    want = {}
    for name, tensor in model.state_dict().items():
        want[name] = rounded(tensor, dtype) if gguf else tensor.to(getattr(torch, dtype)).float()
        if tensor.isfinite().all() and not want[name].isfinite().all():
            raise UsageError(f"{name} has numbers beyond {dtype}: --save_dtype float32 holds them")
    return want


def check_read_back(path: Path, want: dict[str, Tensor]) -> Llama:
    """The model that load_pretrained finds; UsageError unless its tensors are exactly these."""
    model = load_pretrained(path)
    found = model.state_dict()
    for name, tensor in want.items():
        if not torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)):  # NaN too
            raise UsageError(f"self-check: {name} read back from {path} differs; nothing written")
    return model


# ---------------------------------------------------------------------------- llama2.c's files


def write_bin(model: Llama, file: BinaryIO, group: int | None) -> None:
    """llama2.c's version 0, float32 for run.c; with a group size version 2, int8 for runq."""
    config, tied = model.config, model.config.tie_word_embeddings
    numbers = {name: getattr(config, name) for name in LLAMA2C_SHAPE}
    if group:
        head = struct.pack("<Ii7iBi", LLAMA2C_MAGIC, 2, *numbers.values(), tied, group)
        file.write(head.ljust(256, b"\0"))
    else:
        numbers["vocab_size"] *= 1 if tied else -1  # all that says so
        file.write(struct.pack("<7i", *numbers.values()))
    cos, sin = model.rotary[:, 0].unbind(-1)
    state = {**model.state_dict(), "freqs_cos": cos, "freqs_sin": sin}
    for name in llama2c_order(config.n_layers, version=2 if group else 0, tied=tied):
        in_int8 = group and state[name].dim() == 2
        for part in quantize(state[name], group) if in_int8 else (state[name],):
            file.write(part.contiguous().numpy())


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
    grouped = tensor.reshape(-1, group)
    scales = grouped.abs().amax(dim=1) / 127
    divisors = torch.where(scales > 0, scales, 1.0)  # a group of zeros stays one
    return torch.round(grouped / divisors[:, None]).to(torch.int8), scales


def dequantized(model: Llama, group: int) -> dict[str, Tensor]:
    """What a reader of the int8 file must find."""
    found = model.state_dict()
    for name, tensor in found.items():
        if tensor.dim() == 2:
            numbers, scales = quantize(tensor, group)
            found[name] = (numbers * scales[:, None]).view(tensor.shape)
    return found


def require_llama2c(config: LlamaConfig) -> None:
    """run.c has its epsilon and theta built in: other ones would compute something else."""
    for name, only in (("layer_norm_eps", 1e-5), ("rope_theta", 10000.0)):
        if getattr(config, name) != only:
            raise UsageError(f"llama2.c knows only {name} {only:g}, not {getattr(config, name):g}")


# ---------------------------------------------------------------------------- llama.cpp and Ollama


def write_llama_cpp(
    model: Llama, output: Path, dtype: str, tokenizer: Tokenizer | None
) -> list[Path]:
    """A GGUF file, its vocabulary in it, and Ollama's Modelfile beside it; the paths of both."""
    config = model.config
    if tokenizer is None:
        remedy = vocabulary_remedy(config.vocab_size)
        raise UsageError(f"--convert gguf: llama.cpp needs a vocabulary in the file: {remedy}")
    require_plain_bpe(tokenizer)
    values = {
        "general.architecture": "llama",
        "general.file_type": FORMATS[dtype].file_type,
        "general.quantization_version": 2,  # of ggml's blocks, Q8_0 among them
        **{f"llama.{key}": getattr(config, ours) for key, ours in GGUF_CONFIG.items()},
        **dict.fromkeys((f"llama.{key}" for key in GGUF_HEAD_DIM), config.head_dim),
        **vocabulary_values(tokenizer),
        **({"tokenizer.chat_template": model.chat_template.jinja()} if model.chat_template else {}),
    }
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["output.weight"]
    want = as_stored(model, dtype, gguf=True)

    def verify(path: Path) -> None:
        rebuilt = Tokenizer(tokenizer_model=check_read_back(path, want).vocabulary)
        for text in SAMPLES:
            if rebuilt.encode(text, bos=True, eos=True) != tokenizer.encode(text, True, True):
                raise UsageError(f"self-check: {path} gives other ids for {text!r}")

    with atomic_write(output, verify=verify) as file:
        write_gguf(file, values, {gguf_name(name): t for name, t in state.items()}, dtype)
    recipe = output.with_name(MODELFILE)
    write_text(recipe, modelfile(output, model, tokenizer))
    return [output, recipe]


def modelfile(output: Path, model: Llama, tokenizer: Tokenizer) -> str:
    """Ollama's recipe for the file: dialogues, or text in and its continuation out."""
    bos, eos = map(tokenizer.sp_model.id_to_piece, (tokenizer.bos_id, tokenizer.eos_id))
    template, stops = "{{ .Prompt }}", [eos]  # the text alone: the model only continues it
    if model.chat_template is not None:
        template = model.chat_template.ollama(bos, eos)
        stops.append(model.chat_template.user)
    lines = [
        f"FROM ./{output.name}",
        f'TEMPLATE """{template}"""',
        f"PARAMETER num_ctx {model.config.max_seq_len}",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------- Hugging Face folders


def hugging_face_config(config: LlamaConfig, dtype: str, tokenizer: Tokenizer | None) -> dict:
    bos, eos = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (1, 2)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **LLAMA_ALONE,
        **{key: getattr(config, ours) for key, ours in HUGGING_FACE_CONFIG.items()},
        "rope_theta": config.rope_theta,  # where transformers 4 looks; 5 looks one line below
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def merges(tokenizer: Tokenizer) -> list[list[str]]:
    """The pairs that make each piece, best pieces first: what `tokenizers` calls BPE merges."""
    pieces = normal_pieces(tokenizer)
    return [
        [piece[:cut], piece[cut:]]
        for piece in sorted(pieces, key=pieces.get, reverse=True)
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
            "merges": merges(tokenizer),
        },
    }


def require_plain_bpe(tokenizer: Tokenizer) -> None:
    """The exported rules are those of Llama vocabularies: BPE over unchanged text."""
    if not tokenizer.is_plain_bpe:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: only BPE vocabularies that leave the text as it "
            "is, as tokenizer.py trains them, can be exported"
        )
    made = {"".join(pair) for pair in merges(tokenizer)}
    unmade = [p for p in normal_pieces(tokenizer) if len(p) > 1 and p not in made]
    if unmade:
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: no merge makes its piece {unmade[0]!r}, a symbol "
            "that its maker defined, so it cannot be exported"
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
    # Not by its name, which their library looks for as UTF-8 whatever the locale.
    theirs = TheirTokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
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
    path = folder / "model.safetensors"
    path.touch()
    mode = path.stat().st_mode
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors' own is 0600, which other users cannot read
    described = hugging_face_config(config, dtype, tokenizer)
    write_json(folder / "config.json", described)
    ids = {key: described[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "generation_config.json", ids)
    if tokenizer is not None:
        require_plain_bpe(tokenizer)
        (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, model))


def tokenizer_config(tokenizer: Tokenizer, model: Llama) -> dict[str, Any]:
    piece, template = tokenizer.sp_model.id_to_piece, model.chat_template
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "bos_token": piece(tokenizer.bos_id),
        "eos_token": piece(tokenizer.eos_id),
        "unk_token": piece(tokenizer.sp_model.unk_id()),
        "model_max_length": model.config.max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],  # generate() takes no others
        "clean_up_tokenization_spaces": False,
        # "<s>" in a text is text, as SentencePiece reads it; but a chat template has to write it.
        "split_special_tokens": template is None,
        **({} if template is None else {"chat_template": template.jinja()}),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
