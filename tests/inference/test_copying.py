"""minllama/inference/copying.py: what a model copies, counted again from the text that it wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from brute_force import check, texts_of
from running import SMALL, command, write_model, write_stories

import run_llama
from config import SHIPPED_MODEL, parse_options
from llama import load_pretrained
from minllama.inference import copying
from minllama.inference.copying import Original, find_openings, marked, spread_out, whole_words
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import Interrupted
from minllama.text.copies import LENGTHS
from minllama.text.reading import Reading
from minllama.text.stream import TokenStream, whole_stream
from minllama.text.token_cache import build_or_load
from minllama.training.pretraining import Pretraining
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("empty_folder")


def stream_of(tokens: list[int]) -> TokenStream:
    return TokenStream(np.array(tokens, np.int32), np.array([0]), np.array([len(tokens)]))


def test_the_shares_that_a_run_prints_are_those_of_its_texts(monkeypatch, capsys):
    """What is printed, recorded and on the page: counted from what was written, by brute force."""
    write_stories(Path.cwd(), 300)
    write_after, read = copying.write_after, Pretraining.read_what_it_writes
    kept = {}

    def keep_written(*arguments):
        written = write_after(*arguments)
        kept.setdefault("written", written)  # others are written at temperature 0
        return written

    def keep_streams(task, model):
        kept["train"], kept["val"] = task.train_set.stream, task.val_set.stream
        return read(task, model)

    monkeypatch.setattr(copying, "write_after", keep_written)
    monkeypatch.setattr(Pretraining, "read_what_it_writes", keep_streams)
    # The shipped model, which knows some of these stories by heart.
    words = f"--option pretrain --pretrain_data text.jsonl --pretrained_model_path {SHIPPED_MODEL}"
    words += " --max_steps 1 --pretrain_lr 1e-6 --cache_dir cache --save_dir run"
    assert run_llama.main(parse_options(words.split())) == 0
    printed, page = capsys.readouterr().out, Path("run/report.html").read_text(encoding="utf-8")
    copies = RunFolder(Path("run"), "pretrain").copies()
    written = [text.decode("utf-8", "replace") for text in kept["written"]]
    check(written, texts_of(kept["val"]), texts_of(kept["train"]), copies, spaced=True)
    assert len(written) == 20 and copies.written[8][0] > 10
    for length in LENGTHS:
        (one, total), (base, base_total) = copies.written[length], copies.held_out[length]
        share, base_share = one / total, base / base_total
        line = f"{share:.1%} ({one:,} of {total:,}); of the held-out text {base_share:.1%} ("
        assert f"             {length} words in a row: {line}" in printed and line in page
    assert f"longest: {copies.longest} words" in printed
    assert "repeats      4 words again in the same text: " in printed
    assert "does it repeat itself" in page and "--temperature 0" in page


def test_a_run_that_goes_on_forgets_what_it_copied():
    """The page of a resumed run showed the figures of the model before."""
    write_stories(Path.cwd())
    words = ["--option", "pretrain", "--pretrain_data", "text.jsonl", *SMALL]
    assert command([*words, "--max_steps", "1"]).status == 0
    folder = RunFolder(Path("run"), "pretrain")
    assert folder.copies() and "copies" in json.loads(Path("run/run.json").read_text("utf-8"))
    folder.add_start({})
    assert folder.copies() is None and folder.starts()[-1] == {}


def test_openings_are_beginnings_of_documents_from_all_over():
    """Of a text that is one document, parts of it; of next to none, whatever there is."""
    tokenizer = Tokenizer()
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    document = [bos, *range(300, 340), eos]
    openings = find_openings(stream_of(document * 100), tokenizer, 256)
    assert openings == [document[:16]] * 20
    openings = find_openings(stream_of([bos, *range(300, 1300), eos]), tokenizer, 256)
    assert openings[0][0] == bos and len({opening[0] for opening in openings}) > 15
    for tokens in ([bos, eos], [bos, 300, eos], document):
        openings = find_openings(stream_of(tokens), tokenizer, 16)
        assert len(openings) == 20 and all(openings) and not any(eos in o[1:] for o in openings)


def test_the_base_rate_is_of_text_from_all_over(monkeypatch):
    """Its first part may be another author's."""
    monkeypatch.setattr(copying, "HELD_OUT_TOKENS", 320)
    stream = stream_of(list(range(10_000)))
    spread = spread_out(stream)
    tokens = spread.read(0, len(spread))
    assert len(tokens) == 320 and tokens[0] == 0 and tokens[-1] == 9_999
    assert spread_out(stream_of([1] * 320)).stops.tolist() == [320]


@pytest.mark.parametrize(
    "text, spaced, ended, kept",
    [
        ("ing a wor", True, False, "a"),
        (" go there", True, True, "go there"),
        (" a b ", True, False, "a b"),
        ("ing", True, False, ""),
        ("很好".encode()[1:-1], False, False, ""),
        ("很好吗".encode()[1:], False, True, "好吗"),
    ],
)
def test_what_is_counted_are_whole_words(text, spaced, ended, kept):
    """Half a word is in no text, and would hide that the rest is copied."""
    data = text if isinstance(text, bytes) else text.encode()
    assert whole_words(data, spaced=spaced, ended=ended).decode() == kept


def test_a_model_that_recites_is_found_out():
    """--check_copies marks what stands in the text; a prompt does not count."""
    write_stories(Path.cwd())
    cache = build_or_load([Path("text.jsonl")], Tokenizer(), Reading(), Path("cache"))
    original = Original(cache, [Path("text.jsonl")], whole_stream(cache), Tokenizer())
    story = json.loads(Path("text.jsonl").read_text("utf-8").splitlines()[1])["text"]
    words = story.split()
    nine, rest = " ".join(words[2:11]), " ".join(words[20:40])
    text = f"I said: {nine} !\n And é {rest}"
    search, found = original.search([original.words(text.encode())])
    assert found.longest == 20 and found.is_recited is (found.share(16) >= 0.2)
    assert marked(text, original, search) == f"I said: [[{nine}]] !\n And é [[{rest}]]"


def test_generate_marks_what_it_copied():
    """What is marked is what was written, and the prompt is not."""
    write_stories(Path.cwd())
    model = write_model(Path.cwd(), dim=16, n_layers=1)
    words = ["--option", "generate", "--pretrained_model_path", str(model), "--cache_dir", "cache"]
    words += ["--prompt", "One day", "--prompt", "Two", "--max_new_tokens", "20"]
    plain = command([*words, "--num_samples", "2"])
    done = command([*words, "--num_samples", "2", "--check_copies", "text.jsonl"])
    assert done.status == 0 and done.out.startswith(plain.out)
    said = done.out[len(plain.out) :]
    assert "copies       of 4 texts" in said and "8 words in a row: 0.0%" in said
    marked_texts = said.partition("words in a row or more\n")[2]
    texts = re.sub(r"(?m)^--- \d of 4\n", "", plain.out)
    assert marked_texts.replace("[[", "").replace("]]", "") == texts
    done = command([*words, "--check_copies", "none.txt"])
    assert done.status == 2 and "--check_copies none.txt: no such file" in done.error
    with pytest.raises(Exception, match="leave --interactive out"):
        parse_options("--interactive --check_copies text.jsonl".split())


def test_it_can_be_interrupted():
    """Of a large model it takes a while."""
    write_stories(Path.cwd())
    model = load_pretrained(write_model(Path.cwd(), dim=16, n_layers=1))
    cache = build_or_load([Path("text.jsonl")], Tokenizer(), Reading(), Path("cache"))
    stream = whole_stream(cache)
    original = Original(cache, [Path("text.jsonl")], stream, Tokenizer())

    def stop() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        copying.measure_copies(model, Tokenizer(), original, stream, stop)
    copies, _ = copying.measure_copies(model, Tokenizer(), original, stream)
    assert copies.share(32, held_out=True) == 1.0
    assert not copying.measure_copies(model, Tokenizer(), original, None)[0].held_out
