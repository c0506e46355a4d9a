"""Byte-level vocabularies in a pretraining: what is counted, marked, scored and shown."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from byte_vocabularies import KINDS, byte_vocabulary, hostile_strings
from oracles import make_model
from running import command

from config import IGNORE_INDEX
from llama import NextTokenLoss
from minllama.inference.evaluation import score_text
from minllama.inference.streaming import Continuation
from minllama.text.reading import Reading
from minllama.text.stream import whole_stream
from minllama.text.token_cache import build_or_load
from utils import PretrainDataset

# With the newlines that a text file's reader makes of all kinds of them.
DOCUMENTS = [
    text.replace("\r\n", "\n").replace("\r", "\n")
    for text in hostile_strings(200, seed=7)
    if text.strip()
]
ONE_MARK = [kind for kind in KINDS if kind != "llama-bpe"]


def write_documents(path: Path, documents: list[str] = DOCUMENTS) -> Path:
    lines = (json.dumps({"text": text}) + "\n" for text in documents)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def dataset(kind: str, folder: Path, length: int = 7) -> PretrainDataset:
    tokenizer, files = byte_vocabulary(kind), [write_documents(folder / "texts.jsonl")]
    cache = build_or_load(files, tokenizer, Reading(), folder / "cache")
    return PretrainDataset(whole_stream(cache), length, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_documents_and_what_of_it_is_learnt(tmp_path: Path, kind: str):
    """Against ids put together by hand: where one token is BOS and EOS it stands once between two
    documents and is learnt, as what ends one; else BOS behind EOS is not."""
    tokenizer, data = byte_vocabulary(kind), dataset(kind, tmp_path)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    wanted = []
    for text in DOCUMENTS:
        ids = tokenizer.vocabulary.engine.encode(text, add_special_tokens=False).ids
        wanted += [bos, *ids] if kind in ONE_MARK else [bos, *ids, eos]
    stream = data.stream.read(0, len(data.stream))
    assert (bos == eos) == (kind in ONE_MARK) and stream.tolist() == wanted
    assert data.utf8_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    learnt: list[int] = []
    for index in range(len(data)):
        targets = data.batch([index])[1]
        learnt += targets[targets != IGNORE_INDEX].tolist()
        assert data.count_targets([index]) == int((targets != IGNORE_INDEX).sum())
    ignored = set() if kind in ONE_MARK else {bos}
    assert learnt == [token for token in wanted[1:] if token not in ignored]
    spelt = [tokenizer.vocabulary.token_texts[token] for token in stream.tolist()]
    parts = [text for text in spelt if "\ufffd" in text.decode("utf-8", "replace")]
    share = sum(map(len, parts)) / sum(map(len, spelt))
    assert tokenizer.byte_fallback_share(stream) == pytest.approx(share, abs=1e-12)
    assert tokenizer.token_byte_lengths()[stream].sum() == data.utf8_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_scored_as_one_token_after_the_other(tmp_path: Path, kind: str):
    """Loss and bytes of whole documents, each chunk by itself, counted with plain logits."""
    documents = DOCUMENTS[:3]
    tokenizer = byte_vocabulary(kind)
    model = make_model(tokenizer, max_seq_len=16)
    file = write_documents(tmp_path / "a.jsonl", documents)
    score = score_text(model, tokenizer, [file], Reading())
    one = kind in ONE_MARK
    stream = []
    for text in documents:
        ids = tokenizer.vocabulary.encode(text)
        stream += [tokenizer.bos_id, *ids, *([] if one else [tokenizer.eos_id])]
    loss, count = 0.0, 0
    for start in range(0, len(stream) - 1, 16):
        chunk = torch.tensor([stream[start : start + 17]])
        logits = model(chunk[:, :-1], targets=chunk[:, 1:])[0][0]
        for place, target in enumerate(chunk[0, 1:].tolist()):
            if one or target != tokenizer.bos_id:
                loss -= logits[place].log_softmax(-1)[target].item()
                count += 1
    assert score.tokens == count
    assert score.loss_sum == pytest.approx(loss, rel=1e-4)
    size = sum(len(text.encode()) for text in documents)
    assert score.utf8_bytes == size
    assert score.bits_per_byte == pytest.approx(loss / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_characters_are_shown_whole(kind: str):
    """Of several tokens of one character the last shows it; nothing shown is taken back. At the end
    an unfinished one is left out, and what is written so: it ended generated texts in one."""
    tokenizer = byte_vocabulary(kind)
    prompt = tokenizer.encode("Hi", bos=True, eos=False)
    for text in hostile_strings(100, seed=3):
        row, shown = Continuation(prompt, tokenizer, []), ""
        ids = tokenizer.vocabulary.encode(text)
        for count, token in enumerate(ids, start=1):
            shown += row.add(token)
            spelt = b"".join(tokenizer.vocabulary.token_texts[i] for i in ids[:count])
            whole = spelt.decode("utf-8", "ignore")
            assert shown == whole.rstrip("\ufffd")
        shown += row.add(None)
        assert shown == row.text == text.rstrip("\ufffd")


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe"])
def test_a_pretraining_with_such_a_vocabulary(tmp_path: Path, monkeypatch, kind: str):
    """From a folder and from a file; with documents masked; kept in the model file and the cache;
    duplicates are found; a text continues."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    file = byte_vocabulary(kind).vocabulary.file
    (folder / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    config = json.dumps(KINDS[kind][2])
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    write_documents(tmp_path / "a.jsonl", [*DOCUMENTS, *DOCUMENTS[:50]])
    run = (
        "--option pretrain --dim 16 --n_layers 1 --n_heads 2 --n_kv_heads 1 --max_seq_len 16 "
        "--pretrain_batch_size 4 --dtype float32 --save_dir run --cache_dir cache --max_steps 2 "
        "--sample_tokens 4 --pretrain_data a.jsonl --document_mask --overwrite"
    )
    for given in (folder, folder / "tokenizer.json"):
        done = command([*run.split(), "--tokenizer_model", str(given)])
        assert done.status == 0, done.error
        size = byte_vocabulary(kind).n_words
        assert f"vocabulary   {size:,} pieces" in done.out
    assert len([*Path("cache").glob("*.tokens")]) == 1, "it is the same vocabulary"
    done = command("--pretrained_model_path run/final-model.pt --prompt Hello --max_new_tokens 5")
    assert done.status == 0 and "Hello" in done.out


def test_the_mask_of_documents_with_one_mark():
    """Each token sees those of its document alone: the same logits as each document by itself."""
    tokenizer = byte_vocabulary("qwen2")
    bos = tokenizer.bos_id
    documents = [[bos, *tokenizer.vocabulary.encode(text)] for text in ("Hello world", "a b", "x")]
    ids = list(itertools.chain.from_iterable(documents))
    model = make_model(tokenizer, max_seq_len=64)
    tokens, targets = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
    masked, count = NextTokenLoss(model, bos)(tokens, targets)
    expected = 0.0
    for document, following in itertools.pairwise([*documents, []]):
        behind = [*document[1:], *following[:1]]
        logits = model(torch.tensor([document]), targets=torch.tensor([document]))[0][0]
        for place, target in enumerate(behind):
            expected -= logits[place].log_softmax(-1)[target].item()
    assert masked.item() == pytest.approx(expected, rel=1e-5) and count == len(ids) - 1
