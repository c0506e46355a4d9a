"""GGUF, the model files of llama.cpp and Ollama, by way of llama.cpp's own package `gguf`.

Every precision that the package widens is read; float32, float16, bfloat16 and Q8_0 are written,
with the vocabulary in the file and Ollama's recipe beside it. The package believes what a file says
of itself, so every size is compared with the file's before it is used. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig
from minllama.formats.gguf_vocabulary import rebuilt_vocabulary, vocabulary_values
from minllama.formats.stored_model import (
    Contents,
    StoredModel,
    architecture_for,
    check_finite,
    read_shape,
    reorder_heads,
    to_adjacent_pairs,
    to_half_split,
    translate,
)
from minllama.formats.vocabularies import check_same_ids, require_exportable
from minllama.model.shape import RopeScaling
from minllama.system.errors import UsageError
from minllama.system.files import atomic_write, write_text
from minllama.system.packages import import_optional
from minllama.text.chat import ChatTemplate, template_of_jinja
from minllama.text.jinja_template import JinjaTemplate
from tokenizer import Tokenizer, vocabulary_remedy

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

    from llama import Llama

PACKAGE, BESIDE = "gguf", "Modelfile"  # Ollama's recipe
MOST_PARTS = 4_000_000  # of a header, 200 bytes of memory each: 256,000 tokens and merges are 1.5 M
RECIPE_LINE = 4096  # bytes read of a recipe's first line
NAME_CHARS = 256  # of a value or a tensor
REASON_CHARS = 200  # of what the package says of a file that it cannot read
WRITTEN = {  # precisions that are written: the package's names for tensors and for whole files
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),  # blocks of 32 int8 and a float16 scale
}
OUR_DTYPES = {"F64": "float64"} | {theirs: ours for ours, (theirs, _) in WRITTEN.items()}
NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "attention.compute_query": "attn_q",
    "attention.compute_key": "attn_k",
    "attention.compute_value": "attn_v",
    "attention.compute_output": "attn_output",
    "attention.query_norm": "attn_q_norm",
    "attention.key_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
CONFIG = {  # keys that begin with the architecture, and ours
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
PLAIN = re.compile(r"[^\s{}\"'\\\x00-\x1f\x7f-\x9f]+")  # in Ollama's recipe what needs no quotes
HEAD_DIM = ("attention.key_length", "attention.value_length", "rope.dimension_count")
ARCHITECTURES: dict[str, dict[str, bool]] = {  # and what, by our names, their models have
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}
ROPE_FREQS = "rope_freqs.weight"  # by how much each pair is slowed down, in Llama 3's files
OUR_SCALING = "minllama.rope_scaling"  # the numbers behind that, which llama.cpp has no keys for
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # those of all that Meta has published
LLAMA_3 |= {"original_max_position_embeddings": 8192}


def tensor_name(name: str) -> str:
    """What llama.cpp calls our tensor of this name."""
    return translate(name, NAMES, "blk")


# ---------------------------------------------------------------------------- reading


def recognizes(path: Path, head: bytes) -> bool:
    """Whether a file that begins so is of this format."""
    return head.startswith(b"GGUF")


def contents(path: Path) -> Contents:
    """The tensors by llama.cpp's names, and under 'metadata' the values before them.

    What torch has numbers for is mapped from the disk, all else is widened to float32. Raises
    UsageError for a damaged file; the tensors must lie one after the other, as llama.cpp asks.
    """
    package = import_optional(PACKAGE, "a GGUF file")
    try:
        with np.errstate(all="ignore"):  # sums of what a damaged file claims; NaN as a weight
            # Copy-on-write, though nothing is written: torch warns of memory that is read-only.
            reader = _checking_reader(package)(path, "c")
            alignment, end = int(reader.alignment), reader.data_offset
            if alignment % 8:
                raise ValueError(f"general.alignment {alignment} is no multiple of 8")
            for tensor in reader.tensors:
                if tensor.data_offset != end:
                    where = f"at byte {tensor.data_offset:,}, not where the one before it ends"
                    raise ValueError(f"tensor {tensor.name[:NAME_CHARS]} lies {where}")
                end = tensor.data_offset + tensor.n_bytes
                end += -end % alignment  # the next tensor begins at a multiple of it
            metadata = {key: field.contents() for key, field in reader.fields.items()}
            tensors = {t.name: _widened(package, t) for t in reader.tensors}
    except Exception as error:  # the package raises what the damage happens to hit
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:REASON_CHARS]
        raise UsageError(f"{path}: damaged or not read ({reason})") from None
    for name in (*metadata, *tensors):
        if len(name) > NAME_CHARS or not name.isprintable():
            raise UsageError(f"{path}: {name[:40]!r} in its header is no name")
    dtypes = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return Contents(
        "GGUF",
        {"model": tensors, "metadata": metadata},
        {name: OUR_DTYPES.get(dtype, dtype.lower()) for name, dtype in dtypes.items()},
        sum(tensor.n_bytes for tensor in reader.tensors),
    )


def _checking_reader(package: ModuleType) -> type[GGUFReader]:
    """The package's reader, which by itself takes a file's end for the end of what it reads."""

    class CheckingReader(package.GGUFReader):
        parts = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            """Numbers at an offset: all that is read of a header or a tensor passes here."""
            self.parts += 1
            if offset + int(count) * np.dtype(dtype).itemsize > self.data.size:
                raise ValueError("it claims more than the file has: cut off")
            if self.parts > MOST_PARTS:
                raise ValueError(f"its header has more than {MOST_PARTS:,} parts")
            self.data = np.asarray(self.data)  # a memmap takes four times as long to slice
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """An array of numbers in one part, where the package makes a part of each number."""
            if raw_type == package.GGUFValueType.ARRAY:
                kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
                if dtype := self.gguf_scalar_to_np.get(kind[0]):
                    numbers = self._get(orig_offs + 12, dtype, count[0])
                    types = [package.GGUFValueType.ARRAY, package.GGUFValueType(kind[0])]
                    return 12 + numbers.nbytes, [kind, count, numbers], [2], types
            return super()._get_field_parts(orig_offs, raw_type)

    return CheckingReader


def _widened(package: ModuleType, tensor: ReaderTensor) -> Tensor:
    if tensor.data.dtype.kind == "f":
        return torch.from_numpy(tensor.data)
    return torch.from_numpy(package.quants.dequantize(tensor.data, tensor.tensor_type))


def read(path: Path) -> StoredModel:
    """Read a Llama with its vocabulary; UsageError for anything else."""
    stored = contents(path).values
    tensors, metadata = stored["model"], stored["metadata"]
    table = tensors.get("token_embd.weight", torch.empty(0))
    config = _read_config(path, metadata, len(table), tied="output.weight" not in tensors)
    if config.rope_scaling is None and ROPE_FREQS in tensors:
        config = _with_rope_freqs(path, config, tensors.pop(ROPE_FREQS), metadata.get(OUR_SCALING))
    tensors.setdefault("output.weight", table)
    vocabulary = rebuilt_vocabulary(path, metadata)
    template = template_of_jinja(metadata.get("tokenizer.chat_template"))
    model = StoredModel(config, tensors, vocabulary, template).checked(path, tensor_name)
    if metadata["general.architecture"] == "llama":  # whose pairs are adjacent, as here
        return model
    return model._replace(weights=reorder_heads(model.weights, config, to_adjacent_pairs))


def _read_config(path: Path, values: dict[str, Any], vocab_size: int, tied: bool) -> LlamaConfig:
    """The shape that the values give; UsageError for what is not computed here."""
    kind = values.get("general.architecture")
    if kind not in [*ARCHITECTURES]:  # a list: what a file has may have no hash
        raise UsageError(
            f"{path}: general.architecture {str(kind)[:40]!r} is another architecture than the "
            f"Llama here; these are read: {', '.join(ARCHITECTURES)}"
        )
    settings = {"rope.freq_base": 10000.0, "vocab_size": vocab_size}
    for key, value in values.items():
        if key.startswith(f"{kind}."):  # 1e-05, not the 9.999999747e-06 that float32 makes of it
            value = float(str(np.float32(value))) if isinstance(value, float) else value
            settings[key.removeprefix(f"{kind}.")] = value
    for key in (*CONFIG, *HEAD_DIM):
        if not isinstance(settings.get(key, 0), int | float):
            raise UsageError(f"{path}: {kind}.{key} {str(settings[key])[:40]!r} is no number")
    args = ARCHITECTURES[kind] | {ours: settings.get(key) for key, ours in CONFIG.items()}
    args |= {"head_dim": settings.get(HEAD_DIM[0]), "tie_word_embeddings": tied}
    # As llama.cpp reads them: a factor is linear's unless a type says otherwise.
    scaling = settings.pop("rope.scaling.type", "linear")
    factor = settings.pop("rope.scaling.factor", 0) or settings.pop("rope.scale_linear", 0)
    settings.pop("rope.scaling.original_context_length", None)  # of other types than linear
    if scaling not in ("linear", "none"):
        raise UsageError(f"{path}: {kind}.rope.scaling.type {str(scaling)[:40]!r} is not supported")
    if scaling == "linear" and factor not in (0, 1):
        args["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    config = read_shape(path, args)
    for key, value in settings.items():
        must_be = (config.head_dim,) if key in HEAD_DIM else (0, "none")
        known = key in CONFIG or key == "tensor_data_layout"
        if not known and (not isinstance(value, int | float | str) or value not in must_be):
            raise UsageError(f"{path}: {kind}.{key} {str(value)[:40]!r} is not supported")
    return config


def _with_rope_freqs(path: Path, config: LlamaConfig, divisors: Tensor, ours: Any) -> LlamaConfig:
    """The shape with the scaling that gives these divisors: the file's own numbers, or Llama 3's.

    Raises UsageError where neither do.
    """
    slowest = max(divisors.flatten().tolist(), default=0.0)
    numbers = [{"rope_type": "llama3", "factor": slowest, **LLAMA_3}]
    if isinstance(ours, str):
        with contextlib.suppress(ValueError, RecursionError):  # JSON's errors are ValueErrors
            numbers.insert(0, json.loads(ours))
    for each in numbers:
        with contextlib.suppress(UsageError):
            scaled = dataclasses.replace(config, rope_scaling=RopeScaling.from_plain(each))
            want = rope_freqs(scaled)
            if want.shape == divisors.shape and torch.allclose(want, divisors.float(), rtol=1e-5):
                return scaled
    raise UsageError(f"{path}: its {ROPE_FREQS} are not those of Llama 3, and not supported")


def rope_freqs(config: LlamaConfig) -> Tensor:
    """By how much each pair of a scaled shape is slowed down, (D / 2), as llama.cpp has them."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return torch.tensor([config.rope_scaling.divisor(f) for f in frequencies.tolist()])


# ---------------------------------------------------------------------------- writing


def write(model: Llama, output: Path, *, dtype: str, tokenizer: Tokenizer | None) -> list[Path]:
    """Write the file, its vocabulary in it, and Ollama's Modelfile beside it; the paths of both."""
    package = import_optional(PACKAGE, "--convert gguf")
    config = model.config
    if tokenizer is None:
        remedy = vocabulary_remedy(config.vocab_size)
        raise UsageError(f"--convert gguf: llama.cpp needs a vocabulary in the file: {remedy}")
    require_exportable(tokenizer)
    if not output.name.isprintable() or {*output.name} & {*'"\\'}:
        raise UsageError(
            f"--output {output}: Ollama's {BESIDE} can hold no name with quotes, backslashes or "
            "control characters: give another"
        )
    kind, scaling = architecture_for(config, "gguf"), config.rope_scaling
    metadata = {
        "general.name": output.stem,  # without one transformers' gguf_file= fails
        "general.file_type": int(package.LlamaFileType[WRITTEN[dtype][1]]),
        "general.quantization_version": package.GGML_QUANT_VERSION,
        **{f"{kind}.{key}": getattr(config, ours) for key, ours in CONFIG.items()},
        **dict.fromkeys((f"{kind}.{key}" for key in HEAD_DIM), config.head_dim),
        **_scaling_values(kind, scaling),
        **vocabulary_values(tokenizer),
        **({"tokenizer.chat_template": model.chat_template.jinja()} if model.chat_template else {}),
    }
    state = model.state_dict()
    if kind != "llama":
        state = reorder_heads(state, config, to_half_split)
    with np.errstate(all="ignore"):  # check_finite refuses a number that is too large
        encoded = {name: encode(package, tensor, dtype) for name, tensor in state.items()}
        want = {
            name: torch.from_numpy(package.quants.dequantize(*part))
            for name, part in encoded.items()
        }
    if kind != "llama":
        want = reorder_heads(want, config, to_adjacent_pairs)
    check_finite(model, want, dtype)
    if config.tie_word_embeddings:
        del encoded["output.weight"]
    tensors = {tensor_name(name): part for name, part in encoded.items()}
    if scaling is not None and scaling.rope_type == "llama3":
        tensors[ROPE_FREQS] = encode(package, rope_freqs(config), dtype)

    def verify(path: Path) -> None:
        stored = read(path)
        stored.check_read_back(path, want)
        again = Tokenizer(tokenizer_model=stored.vocabulary)
        check_same_ids(tokenizer, again.vocabulary.encode, str(path))

    with atomic_write(output, verify=verify) as file:
        write_file(package, file, metadata, tensors, architecture=kind)
    recipe = recipe_beside(output)
    write_text(recipe, modelfile(output, model, tokenizer))
    return [output, recipe]


def _scaling_values(kind: str, scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if scaling.rope_type == "llama3":
        return {OUR_SCALING: json.dumps(scaling.to_plain())}
    return {
        f"{kind}.rope.scaling.type": "linear",
        f"{kind}.rope.scaling.factor": float(scaling.factor),
    }


def encode(package: ModuleType, tensor: Tensor, dtype: str) -> tuple[np.ndarray, Any]:
    """A tensor as a file of `dtype` holds it, and the package's name of that kind.

    As llama.cpp's converter chooses: vectors stay float32, and rows that are not whole blocks of
    Q8_0 are float16.
    """
    kind = package.GGMLQuantizationType["F32" if tensor.dim() == 1 else WRITTEN[dtype][0]]
    if tensor.shape[-1] % package.GGML_QUANT_SIZES[kind][0]:
        kind = package.GGMLQuantizationType.F16
    return package.quants.quantize(tensor.contiguous().numpy(), kind), kind


def write_file(
    package: ModuleType,
    file: BinaryIO,
    metadata: dict[str, Any],
    tensors: dict[str, tuple[np.ndarray, Any]],
    *,
    architecture: str = "llama",
) -> None:
    """Write values, ints as uint32 and floats as float32, and tensors as `encode` makes them."""
    types = package.GGUFValueType
    kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
    writer = package.GGUFWriter(None, architecture)
    for key, value in metadata.items():
        writer.add_key_value(key, value, kinds.get(type(value), types.ARRAY))
    for name, (data, kind) in tensors.items():
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
    # Into the file that is open; the tensors by its own write, which says why a disk takes no more.
    writer.fout, writer.state = [file], package.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data, _ in tensors.values():
        writer.write_padding(file, file.tell())
        file.write(np.ascontiguousarray(data))
    writer.write_padding(file, file.tell())


def recipe_beside(output: Path) -> Path:
    """The path of a model's recipe: Modelfile, but NAME.Modelfile where that is another model's."""
    recipe = output.with_name(BESIDE)
    if not recipe.is_file():
        return recipe
    with recipe.open("rb") as file:
        is_own = file.readline(RECIPE_LINE).strip() == _source(output).encode()
    return recipe if is_own else output.with_name(f"{output.name}.{BESIDE}")


def _source(output: Path) -> str:
    return f'FROM "./{output.name}"' if " " in output.name else f"FROM ./{output.name}"


def modelfile(output: Path, model: Llama, tokenizer: Tokenizer) -> str:
    """Ollama's recipe for the file: dialogues, or text in and its continuation out."""
    bos, eos = map(tokenizer.vocabulary.name, tokenizer.vocabulary.stated_marks)
    # The recipe knows no escapes, so a piece that could end a quote is left out: Ollama stops at
    # EOS by its id, too.
    template, stops = "{{ .Prompt }}", [eos] if PLAIN.fullmatch(eos) else []
    if isinstance(model.chat_template, ChatTemplate):
        bos, eos = map(_in_template, (bos, eos))
        first = "" if tokenizer.vocabulary.adds_bos else bos
        template = model.chat_template.ollama(bos, eos, first=first)
        stops.append(model.chat_template.user)
    lines = [
        _source(output),
        # Another program's template is in the file, where Ollama finds it.
        *([] if isinstance(model.chat_template, JinjaTemplate) else [f'TEMPLATE """{template}"""']),
        f"PARAMETER num_ctx {model.config.max_seq_len}",
        *(f'PARAMETER stop "{stop}"' for stop in stops),
    ]
    return "\n".join(lines) + "\n"


def _in_template(piece: str) -> str:
    """A piece of the vocabulary as Go's templates spell it."""
    quoted = json.dumps(piece, ensure_ascii=False)
    return piece if PLAIN.fullmatch(piece) else f"{{{{ {quoted} }}}}"
