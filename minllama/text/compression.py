"""What file compressors need for a text: what a model's bits per byte stand beside."""

from __future__ import annotations

import gzip
import lzma

from minllama.text.spelling import Spelling
from utils import PretrainDataset

MOST_BYTES = 1 << 19  # of a text
SECONDS_PER_BYTE = 1e-6  # of both, on a core
COMPRESSORS = {
    "gzip": lambda text: gzip.compress(text, compresslevel=9, mtime=0),
    "xz": lzma.compress,  # preset 6, as the command
}


def compressed_bits(text: bytes) -> dict[str, float]:
    """Bits per byte of a text, which is not empty, by the name of each compressor."""
    return {name: 8 * len(pack(text)) / len(text) for name, pack in COMPRESSORS.items()}


def compressing_seconds(dataset: PretrainDataset | None) -> float:
    """About how long `compare_with_compressors` takes."""
    size = (dataset.utf8_bytes or 0) if dataset else 0
    return SECONDS_PER_BYTE * min(MOST_BYTES, size)


def text_of(dataset: PretrainDataset, most: int = MOST_BYTES) -> bytes:
    """The text of a data set; where it has more bytes than `most`, of each source its beginning."""
    stream = dataset.stream
    per_token = max(1.0, (dataset.utf8_bytes or 0) / len(stream))
    if len(stream) * per_token > most:
        stream = dataset.cut(dataset.chunk_length, int(most / per_token)).stream
    ids = stream.read(0, min(len(stream), most))
    return Spelling(dataset.tokenizer, spaces=True).spell(ids)[0].tobytes()[:most]


def compare_with_compressors(bits_per_byte: float, dataset: PretrainDataset) -> list[list[str]]:
    """How good a model's bits per byte of a data set are, in rows of a name and what it is."""
    text = text_of(dataset)
    if not text:
        return []
    alone = f"on {len(text):,} bytes of that text alone, without the training text"
    return [
        ["this model", f"{bits_per_byte:.4f} bits per byte of the held-out text (lower is better)"],
        *([name, f"{bits:.4f} {alone}"] for name, bits in compressed_bits(text).items()),
    ]


def verdict_line(rows: list[list[str]]) -> str:
    """The same rows in a line for the terminal."""
    (_, model), *others = rows
    numbers = " and ".join(f"{name} {text.split()[0]}" for name, text in others)
    return f"verdict      {model}; {numbers} {others[-1][1].partition(' ')[2]}"
