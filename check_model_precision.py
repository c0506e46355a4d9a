"""What is in a model file: precision, size by part, tied or not; verified, compared, converted.

    python check_model_precision.py                        # stories42M.pt, or the newest model
    python check_model_precision.py a.pt model.bin folder
    python check_model_precision.py a.pt --verify
    python check_model_precision.py a.pt --compare b.pt
    python check_model_precision.py a.pt --convert hf --output folder

Reads every format that llama.load_pretrained reads and writes them too. Knows files only: it
trains nothing, generates nothing and downloads nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from config import (
    DTYPE_BYTES,
    OneLineParser,
    UsageError,
    parse_or_exit,
    report_usage_error,
    with_underscores,
)

PROGRAM = "check_model_precision.py"
FORMATS = ("pt", *(f"pt-{name}" for name in DTYPE_BYTES), "bin", "bin-int8", "hf")

# ---------------------------------------------------------------------------- command line


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM,
        description="What is in a model file; verify, compare and convert it.",
        epilog="Every option is accepted with _ and with -. Exit status: 0, 1 when --verify finds "
        "damage, 2 on bad input.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="model files or Hugging Face folders")
    add("--verify", action="store_true", help="read every byte; count NaN and Inf per tensor")
    add("--compare", type=Path, metavar="OTHER", help="largest difference per tensor and of logits")
    add("--json", action="store_true", help="machine-readable output, and nothing else on stdout")
    add("--convert", choices=FORMATS, metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    add("--output", type=Path, metavar="PATH", help="where --convert writes")
    add("--save_dtype", choices=DTYPE_BYTES, help="precision of pt and hf (default: float32)")
    add("--tokenizer_model", type=Path, metavar="PATH", help="vocabulary for a file without one")
    add("--overwrite", action="store_true", help="let --convert replace what is there")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read and check the command line. Raises UsageError."""
    words = [with_underscores(word) for word in arguments]
    for i, word in enumerate(words):  # the formats, too, in both spellings
        if i and words[i - 1] == "--convert" or word.startswith("--convert="):
            words[i] = word.replace("_", "-")
    args = build_parser().parse_args(words)
    if len(args.files) > 1 and (args.convert or args.compare):
        raise UsageError("--convert and --compare take one FILE; several were given")
    if bool(args.convert) != bool(args.output):
        raise UsageError("--convert FORMAT and --output PATH need each other: give both")
    if args.convert and args.compare:
        raise UsageError("--convert and --compare exclude each other: give one")
    if args.convert and args.convert.startswith("bin") and args.output.name == "tokenizer.bin":
        raise UsageError(f"--output {args.output}: is the vocabulary's name; give another")
    if args.convert and args.convert.startswith("pt-"):
        args.convert, named = args.convert.split("-")
        if args.save_dtype not in (None, named):
            raise UsageError(f"--save_dtype {args.save_dtype}: --convert pt-{named} says otherwise")
        args.save_dtype = named
    if args.save_dtype and args.convert not in ("pt", "hf"):
        raise UsageError("--save_dtype is for --convert pt and --convert hf")
    args.save_dtype = args.save_dtype or "float32"
    return args


if __name__ == "__main__":  # --help and bad flags are answered before torch, which takes seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback till then
    parse_or_exit(parse, PROGRAM, sys.argv[1:])

import json
import os
import shutil
import struct
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor

from config import SHIPPED_MODEL, LlamaConfig, human_size
from llama import (
    LLAMA2C_MAGIC,
    Llama,
    hugging_face_name,
    llama2c_order,
    load_payload,
    load_pretrained,
    model_payload,
    read_safetensors,
    to_half_split,
)
from tokenizer import Tokenizer, atomic_write, export_tokenizer_bin, vocabulary_remedy
from utils import check_runs_alone, write_sealed

DTYPES = {name: getattr(torch, name) for name in DTYPE_BYTES}

# ---------------------------------------------------------------------------- what is in a file


@dataclass
class Report:
    """The facts of one model file; sizes in bytes, `nan` and `inf` filled in by --verify."""

    path: str
    format: str
    size: int
    parts: dict[str, int]  # weights, optimizer, other: together the size
    tensors: list[dict[str, Any]]  # name, dtype, shape
    dtypes: dict[str, int]  # tensors by dtype
    parameters: int  # a tied table counted once
    embedding: str
    vocabulary: str | None = None  # fingerprint
    nan: dict[str, int] = field(default_factory=dict)
    inf: dict[str, int] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """False once --verify has found anything."""
        return not (self.nan or self.inf or self.damage)


def default_file() -> Path:
    """stories42M.pt, else the newest model in ./checkpoints, else the shipped one."""
    if Path("stories42M.pt").is_file():
        return Path("stories42M.pt")
    saved = [path for path in Path("checkpoints").glob("*.pt") if path.is_file()]
    return max(saved, key=lambda path: path.stat().st_mtime) if saved else SHIPPED_MODEL


def tensors_in(node: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and lists, by its dotted name."""
    if isinstance(node, Tensor):
        yield name, node
    children = node.items() if isinstance(node, dict) else ()
    if isinstance(node, list | tuple):
        children = enumerate(node)
    for key, child in children:
        yield from tensors_in(child, f"{name}.{key}" if name else str(key))


def stored_bytes(tensors: Iterator[tuple[str, Tensor]]) -> int:
    """Bytes of the storages under tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors}
    return sum(storages.values())


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def read_stored(path: Path) -> tuple[str, dict[str, Tensor], dict[str, Any], str | None]:
    """Format, the model's tensors as stored, all that a .pt file holds, a dtype torch has not."""
    if path.is_dir():
        return "Hugging Face folder", read_safetensors(path), {}, None
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(8).ljust(8, b"\0")
    if head[:2] == b"PK" or head[:2] == b"\x80\x02":
        payload = load_payload(path, verify=False)
        kind = "resumable checkpoint" if "optimizer" in payload else "weights file"
        return kind, payload["model"], payload, None
    state = load_pretrained(path).state_dict()
    magic, version = struct.unpack("<Ii", head)
    version = version if magic == LLAMA2C_MAGIC else 0
    return f"llama2.c version {version}", state, {}, "int8" if version == 2 else None


def inspect(path: Path, *, verify: bool = False) -> Report:
    """Read the facts of a model file; with verify every byte of it."""
    kind, weights, payload, packed = read_stored(path)
    size = size_on_disk(path)
    optimizer = stored_bytes(tensors_in({k: payload.get(k) for k in ("optimizer", "scaler")}))
    held = stored_bytes(iter(weights.items()))
    if packed:  # int8 in groups: read as float32, so what it takes is not in the tensors
        held = size - 256
    tensors = [
        {
            "name": name,
            "dtype": packed if packed and tensor.dim() == 2 else str(tensor.dtype)[6:],
            "shape": list(tensor.shape),
        }
        for name, tensor in weights.items()
    ]
    unique = {(t.data_ptr(), t.shape): t.numel() for t in weights.values()}
    report = Report(
        path=str(path),
        format=kind,
        size=size,
        parts={"weights": held, "optimizer": optimizer, "other": size - held - optimizer},
        tensors=tensors,
        dtypes=dict(Counter(tensor["dtype"] for tensor in tensors)),
        parameters=sum(unique.values()),
        embedding=describe_embedding(weights),
        vocabulary=payload.get("vocabulary_fingerprint"),
    )
    if verify:
        verify_file(path, report, weights, payload)
    return report


def describe_embedding(weights: dict[str, Tensor]) -> str:
    """Whether embedding and head are one table, and whether that is stored once."""

    names = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}
    table = names.get("tok_embeddings.weight", names.get("model.embed_tokens.weight"))
    head = names.get("output.weight", names.get("lm_head.weight"))
    if table is None:
        return "none found"
    if head is None:
        return "tied: one tensor under one name"
    if table.data_ptr() == head.data_ptr():
        return "tied: one tensor under two names"
    return "tied, but stored twice" if torch.equal(table, head) else "not tied"


def verify_file(path: Path, report: Report, weights: dict[str, Tensor], payload: dict) -> None:
    """Read every byte: checksums where the format has them, each number, and the model's shape."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            report.damage.append(f"checksum of {broken} is wrong")
    rest = {key: value for key, value in payload.items() if key != "model"}
    for name, tensor in (*weights.items(), *tensors_in(rest)):
        if tensor.is_floating_point():
            for kind, count in (("nan", tensor.isnan().sum()), ("inf", tensor.isinf().sum())):
                if count:
                    getattr(report, kind)[name] = int(count)
    try:
        load_pretrained(path)
    except UsageError as error:
        report.damage.append(str(error))


def print_report(report: Report, *, verified: bool) -> None:
    print(f"{report.path}: {report.format}")
    for tensor in report.tensors[:5]:
        print(f"  {tensor['name']:<44} {tensor['dtype']:<9} {tuple(tensor['shape'])}")
    if len(report.tensors) > 5:
        print(f"  and {len(report.tensors) - 5} more tensors")
    by_dtype = ", ".join(f"{count} {dtype}" for dtype, count in report.dtypes.items())
    parts = ", ".join(f"{name} {human_size(size)}" for name, size in report.parts.items())
    print(f"  tensors by dtype: {by_dtype}")
    print(f"  parameters: {report.parameters:,}")
    print(f"  size on disk: {human_size(report.size)} ({report.size:,} bytes): {parts}")
    print(f"  embedding and output: {report.embedding}")
    if report.vocabulary:
        print(f"  vocabulary: {report.vocabulary}")
    if verified:
        print_findings(report)


def print_findings(report: Report) -> None:
    for kind, found in (("NaN", report.nan), ("Inf", report.inf)):
        for name, count in found.items():
            print(f"  BAD {name}: {count:,} {kind}")
    for text in report.damage:
        print(f"  BAD {text}")
    if report.sound:
        print("  verified: every byte read, no NaN, no Inf, tensors as the shape asks")


# ---------------------------------------------------------------------------- comparing two


@torch.inference_mode()
def compare(path: Path, other: Path) -> dict[str, Any]:
    """Largest absolute difference of each tensor, and of the logits on a fixed batch."""
    one, two = load_pretrained(path), load_pretrained(other)
    ours, theirs = one.state_dict(), two.state_dict()
    differences = {
        name: None  # other shapes have no difference
        if name not in theirs or theirs[name].shape != tensor.shape
        else plain_number((tensor - theirs[name]).abs().max())
        for name, tensor in ours.items()
    }
    differences |= {name: None for name in theirs if name not in ours}
    logits = None
    if None not in differences.values():
        width = min(64, one.config.max_seq_len, two.config.max_seq_len)
        generator = torch.Generator().manual_seed(0)
        batch = torch.randint(one.config.vocab_size, (2, width), generator=generator)
        logits = plain_number((one(batch, batch)[0] - two(batch, batch)[0]).abs().max())
    return {"other": str(other), "tensors": differences, "logits": logits}


def plain_number(value: Tensor) -> float | str:
    """A number that JSON has: NaN and infinity by name."""
    return value.item() if value.isfinite() else str(value.item())


def print_comparison(path: Path, result: dict[str, Any]) -> None:
    print(f"{path} and {result['other']}: largest difference")
    for name, difference in (*result["tensors"].items(), ("logits", result["logits"])):
        text = "other shape" if difference is None else difference
        text = f"{text:.3g}" if isinstance(text, float) else text
        print(f"  {name:<44} {text}")


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


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary in the `tokenizers` library's own format.

    Not left to transformers' reading of tokenizer.model, which drops a leading space.
    """
    sp = tokenizer.sp_model
    names = [sp.id_to_piece(i) for i in range(tokenizer.n_words)]
    normal = {
        names[i]: sp.get_score(i)
        for i in range(tokenizer.n_words)
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))
    }
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
            "merges": merges(normal),
        },
    }


def require_plain_bpe(tokenizer: Tokenizer) -> None:
    """The exported rules are those of Llama vocabularies: BPE over text as it stands."""
    sp = tokenizer.sp_model
    as_it_stands = sp.normalize(" a  ﬁ ") == "▁▁a▁▁ﬁ▁"
    ranks = all(sp.get_score(i).is_integer() for i in range(tokenizer.n_words))
    if not (as_it_stands and ranks):
        raise UsageError(
            f"vocabulary {tokenizer.fingerprint}: only BPE vocabularies that leave the text as it "
            "is, as tokenizer.py trains them, can be exported for transformers"
        )


SAMPLES = (
    *(
        "Once upon a time, there was a girl.",
        "",
        " ",
        "  two leading",
        "trailing  ",
        "a\nb\n\n c\t",
    ),
    *(
        "naïve café",
        "你好，世界",
        "👩‍👩‍👧 🙂",
        "<s> </s> <unk>",
        "▁",
        "aaaaaaaaaaa",
        "x" + " " * 9 + "y",
        "<0x0A>",
    ),
)


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
            state[hugging_face_name(name)] = tensor.to(DTYPES[dtype]).contiguous()
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
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "<s>" in a text is text, as SentencePiece reads it
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------- converting


def convert(path: Path, target: str, output: Path, args: argparse.Namespace) -> list[Path]:
    """Write the model in another format, read that back, and only then publish it.

    Returns what was written. Raises UsageError for what the format cannot hold, for an output
    that is there already, and if what was read back is not what was written.
    """
    model = load_pretrained(path)
    tokenizer = find_tokenizer(model, args.tokenizer_model)
    outputs = [output]
    if target.startswith("bin") and tokenizer is not None:
        outputs.append(output.with_name("tokenizer.bin"))
        check_output(path, target, outputs[1], args.overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    if target == "hf":
        publish_folder(
            output, lambda folder: fill_folder(model, folder, args.save_dtype, tokenizer)
        )
    elif target == "pt":
        payload = model_payload(model, DTYPES[args.save_dtype]) | classifier_parts(path)
        want = expected(model, args.save_dtype)
        publish(output, lambda file: write_sealed(file, payload), want)
    else:
        require_llama2c(model.config)
        write, want = (write_bin, model.state_dict())
        if target == "bin-int8":
            write, want = write_bin_int8, dequantized(model)
        publish(output, lambda file: write(model, file), want)
        if tokenizer is not None:
            export_tokenizer_bin(tokenizer, outputs[1])
    if tokenizer is None:
        print(
            f"{PROGRAM}: warning: {path} has no vocabulary, so {output} has none either: "
            f"{vocabulary_remedy(model.config.vocab_size)}",
            file=sys.stderr,
        )
    return outputs


def check_output(path: Path, target: str, output: Path, overwrite: bool) -> None:
    """Raise UsageError where `output` is not to be written; needs no look into any model."""
    if output.resolve() == path.resolve():
        raise UsageError(f"--output {output}: is the file to convert; give another name")
    if output.exists() and not overwrite:
        raise UsageError(f"--output {output}: is there already; --overwrite replaces it")
    if output.exists() and output.is_dir() != (target == "hf"):
        raise UsageError(f"--output {output}: a folder and a file cannot replace each other")
    if output.is_dir() and not (output / "config.json").is_file() and any(output.iterdir()):
        raise UsageError(f"--output {output}: holds other things than a model; name another")


def classifier_parts(path: Path) -> dict[str, Any]:
    """What a fine-tuned .pt file has beside the Llama: its head and its labels' names."""
    payload = read_stored(path)[2]
    return {key: payload[key] for key in ("classifier_head", "label_names") if key in payload}


def find_tokenizer(model: Llama, given: Path | None) -> Tokenizer | None:
    """The vocabulary to travel with the model: the one named, else the file's own."""
    if given is None and model.vocabulary is None:
        return None
    tokenizer = Tokenizer(tokenizer_model=model.vocabulary if given is None else given)
    if tokenizer.n_words != model.config.vocab_size:
        raise UsageError(
            f"--tokenizer_model {given or 'of the file'}: {tokenizer.n_words:,} tokens, but the "
            f"model has {model.config.vocab_size:,}"
        )
    if model.vocabulary is not None and model.vocabulary != tokenizer.model_bytes:
        own = Tokenizer(tokenizer_model=model.vocabulary).fingerprint
        raise UsageError(
            f"--tokenizer_model {given}: fingerprint {tokenizer.fingerprint}, but the model was "
            f"trained with {own}; leave the option out"
        )
    model.vocabulary = tokenizer.model_bytes
    return tokenizer


def expected(model: Llama, dtype: str) -> dict[str, Tensor]:
    """The model's tensors after a passage through dtype."""
    return {name: t.to(DTYPES[dtype]).float() for name, t in model.state_dict().items()}


def check_read_back(path: Path, want: dict[str, Tensor]) -> None:
    """UsageError unless load_pretrained finds exactly these tensors."""
    found = load_pretrained(path).state_dict()
    for name, tensor in want.items():
        if not torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)):  # NaN too
            raise UsageError(f"self-check: {name} read back from {path} differs; nothing written")


def publish(output: Path, write: Callable[[BinaryIO], object], want: dict[str, Tensor]) -> None:
    def write_and_check(file: BinaryIO) -> None:
        write(file)
        file.flush()
        check_read_back(Path(file.name), want)

    atomic_write(output, write_and_check)


def fill_folder(model: Llama, folder: Path, dtype: str, tokenizer: Tokenizer | None) -> None:
    write_hugging_face(model, folder, dtype, tokenizer)
    check_read_back(folder, expected(model, dtype))
    if tokenizer is not None:
        check_token_ids(tokenizer, folder)


def publish_folder(output: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside output and give it the name once it is whole."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    try:
        temporary.mkdir()
        fill(temporary)
        if output.exists():
            os.replace(output, old)
        os.replace(temporary, output)
    finally:
        if old.exists() and not output.exists():  # the second rename failed
            os.replace(old, output)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------- entry


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit status."""
    files = args.files or [default_file()]
    if not args.files and not args.json:
        print(f"no file named: looking at {files[0]}")
    if args.compare and not args.compare.exists():
        raise UsageError(f"--compare {args.compare}: no such file")
    if args.convert:
        check_output(files[0], args.convert, args.output, args.overwrite)
    reports = [inspect(path, verify=args.verify) for path in files]
    results: list[dict[str, Any]] = [asdict(report) for report in reports]
    for report in reports if not args.json else ():
        print_report(report, verified=args.verify)
    sound = all(report.sound for report in reports)
    if args.compare:
        results[0]["compared"] = compare(files[0], args.compare)
        if not args.json:
            print_comparison(files[0], results[0]["compared"])
    if args.convert and not sound:
        print(f"{PROGRAM}: damaged, so nothing was converted", file=sys.stderr)
    if args.convert and sound:
        written = convert(files[0], args.convert, args.output, args)
        results[0]["written"] = [{"path": str(p), "size": size_on_disk(p)} for p in written]
        for path in written if not args.json else ():
            print(f"wrote {path}: {human_size(size_on_disk(path))}, read back and equal")
    if args.json:
        print(json.dumps(results, indent=2, allow_nan=False))
    return 0 if sound else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 when damage was found, 2 after one line about bad input."""
    try:
        check_runs_alone(PROGRAM)
        return run(parse(sys.argv[1:] if arguments is None else arguments))
    except UsageError as error:
        report_usage_error(PROGRAM, error)
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}"
        report_usage_error(PROGRAM, UsageError(message))
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
