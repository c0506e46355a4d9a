"""The text of a pretraining: what is found, held out, described, and said of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import pretrain, write_stories
from vocabularies import vocabulary

import check_model_precision
import tokenizer
from config import Options, parse_options
from minllama.cli.command_line import own_script, quoted
from minllama.machine.ranks import Ranks
from minllama.system.errors import Interrupted, UsageError
from minllama.system.signals import StopRequest
from minllama.text import corpus
from minllama.text.corpus import Texts, find_texts, load_texts
from minllama.text.labelled import read_labelled
from minllama.text.reading import Reading
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("empty_folder")


def load(line: str = "", *, stop: StopRequest | None = None) -> Texts:
    """The texts that flags mean, in chunks of 16 tokens unless the flags say otherwise."""
    words = f"--option pretrain --cache_dir cache --max_seq_len 16 {line}"
    options: Options = parse_options(words.split())
    files = find_texts(options)
    return load_texts(options, files, Tokenizer(), stop=stop or StopRequest(), ranks=Ranks())


def test_every_token_is_trained_on_or_held_out(capsys):
    """The default holds whole documents out; a share of 0, none."""
    write_stories(Path.cwd(), 10)
    texts, everything = load("--pretrain_data text.jsonl --val_fraction 0.3"), None
    out = capsys.readouterr().out
    everything = load("--pretrain_data text.jsonl --val_fraction 0")
    assert everything.val is None
    held, trained = len(texts.val.stream), len(texts.train.stream)
    assert held + trained == len(everything.train.stream)
    assert f"validation   {held:,} tokens held out ({held / (held + trained):.1%} of all)" in out
    assert texts.key == everything.key  # of the text, not of what is held out


def test_a_validation_file_is_read_as_it_is(capsys):
    """All of both files is used for what it was named for."""
    write_stories(Path.cwd(), 4)
    Path("val.txt").write_text("One day a fox met a bear. " * 5, encoding="utf-8")
    texts = load("--pretrain_data text.jsonl --val_data val.txt")
    whole = load("--pretrain_data text.jsonl --val_fraction 0")
    assert len(texts.train.stream) == len(whole.train.stream)
    assert "met a bear" in Tokenizer().decode(texts.val.stream.read(0, 20).tolist())
    assert "chunks from val.txt" in capsys.readouterr().out
    assert len(texts.cut(16, 10).val.stream) == 10 < len(texts.val.stream)


def test_the_stories_bring_their_own_validation():
    """Named or not: only the unnamed default has a file to measure on."""
    assert "stories-train.jsonl" in str(load().locate(0))
    texts = load("--val_fraction 0")
    assert texts.val is None


def test_a_chunk_is_located_in_its_file():
    """For the message about a step that was skipped."""
    Path("a.txt").write_text("The cat ran home.", encoding="utf-8")
    Path("b.txt").write_text("One day a dog met a little bear in the old forest. " * 4, "utf-8")
    texts = load("--pretrain_data a.txt b.txt --val_fraction 0 --max_seq_len 8")
    tokens = Tokenizer().encode("The cat ran home.", True, True)
    chunk = -(-len(tokens) // 8)
    assert texts.locate(0).startswith("a.txt, token 0 ('The cat ran")
    place = texts.locate(chunk)
    assert place.startswith(f"b.txt, token {chunk * 8 - len(tokens):,} (")
    assert place.split("'")[1] in Path("b.txt").read_text(encoding="utf-8")
    assert texts.locate(len(texts.train) - 1)  # once an IndexError, if it was short


def test_text_that_is_too_short_is_told(capsys):
    """For the hold-out, and for a whole chunk."""
    Path("short.txt").write_text("Once there was a fox.", encoding="utf-8")
    texts = load("--pretrain_data short.txt")
    out = capsys.readouterr().out
    assert texts.val is None and len(texts.train) == 1
    assert "no validation: the text is too short" in out and "--val_data FILE" in out
    assert "shorter than --max_seq_len 16: training on one short chunk" in out
    Path("empty.txt").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"empty\.txt"):
        load("--pretrain_data empty.txt")


def test_what_is_read_as_plain_text_is_told(capsys):
    """A .md was once read with its marks without a word, and a page that a download got as text."""
    for name in ("b.md", "c.txt"):
        Path(name).write_text("one, two\n" * 50, encoding="utf-8")
    Path("a.txt").write_text("\n<!DOCTYPE html><p>Not found" * 50, encoding="utf-8")
    load("--pretrain_data a.txt b.md c.txt")
    out = capsys.readouterr().out
    assert "from a.txt\n  a web page, read with its markup" in out
    assert "from b.md\n  read as plain text" in out
    assert "from c.txt\n  " not in out


def test_a_separator_is_named_before_the_run(capsys):
    """200 stories with <|endoftext|> between them were one document, of which EOS is not learnt."""
    stories = [f"One day fox {number} ran home." for number in range(200)]
    Path("a.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    Path("b.txt").write_text("\n\n".join(stories), encoding="utf-8")
    for name, mark in (("a.txt", "<|endoftext|>"), ("b.txt", "blank line")):
        texts = load(f"--pretrain_data {name}")
        flag = f"--document_separator '{mark}'"
        assert flag in capsys.readouterr().out and len(texts.cache.document_starts) == 1
        words = f"--option pretrain --cache_dir cache --pretrain_data {name}".split()
        options = parse_options([*words, "--document_separator", mark])
        files = find_texts(options)
        texts = load_texts(options, files, Tokenizer(), stop=StopRequest(), ranks=Ranks())
        assert "document_separator" not in capsys.readouterr().out
        assert texts.cache.document_bytes.tolist() == [len(story) for story in stories]


def test_labelled_lines_are_told(capsys):
    """Their labels would be learnt as text; the flag that reads the sentences is named."""
    lines = [f"{i % 2} ||| The film number {i} is good ." for i in range(30)]
    Path("reviews.txt").write_text("\n".join(lines), encoding="utf-8")
    labels = load("--pretrain_data reviews.txt --val_fraction 0")
    assert "labelled lines in it: --sentences_only" in capsys.readouterr().out
    sentences = load("--pretrain_data reviews.txt --val_fraction 0 --sentences_only")
    assert "labelled lines" not in capsys.readouterr().out
    assert len(sentences.train.stream) < len(labels.train.stream)
    assert sentences.key != labels.key


def test_a_vocabulary_for_another_language_is_told(capsys):
    """Chinese under the embedded English vocabulary is three byte tokens a character."""
    Path("zh.txt").write_text("从前有一个小女孩，她住在森林里。" * 40, encoding="utf-8")
    load("--pretrain_data zh.txt")
    out = capsys.readouterr().out
    assert "100% of the text is encoded byte by byte" in out
    # As it can be typed here: it was `tokenizer.py`, in whatever folder.
    script = quoted(own_script("tokenizer.py"))
    assert f"python {script} train --input zh.txt --vocab_size" in out
    write_stories(Path.cwd(), 2)
    load("--pretrain_data text.jsonl")
    assert "byte by byte" not in capsys.readouterr().out


def test_a_vocabulary_that_loses_text_is_told(capsys):
    """Before the run, and where a text is scored."""
    Path("lossy.model").write_bytes(vocabulary("no-byte-fallback").model_bytes)
    Path("a.txt").write_text("the cat sat\n" * 40, encoding="utf-8")
    words = "--tokenizer_model lossy.model --pretrain_data a.txt --max_steps 1 --val_fraction 0.3"
    done = pretrain(words)
    assert done.status == 0 and "do not come back ('\\n' 40, 'c' 40)" in done.out
    assert check_model_precision.main(["run/final-model.pt", "--text", "a.txt"]) == 0
    assert "do not come back ('\\n' 40, 'c' 40)" in capsys.readouterr().out
    assert check_model_precision.main("run/final-model.pt --text a.txt --json".split()) == 0
    scored = json.loads(capsys.readouterr().out)[0]["text"]
    assert scored["bits_per_byte_compare"] is False and scored["utf8_bytes"] == 40 * 10
    load("--pretrain_data a.txt")
    assert "come back" not in capsys.readouterr().out


def test_a_text_that_changed_is_tokenized_again_and_said(capsys):
    """Found as it was, it is not; the key names the content."""
    path = write_stories(Path.cwd(), 2)
    first = load("--pretrain_data text.jsonl")
    assert load("--pretrain_data text.jsonl").key == first.key
    assert "tokenized again" not in capsys.readouterr().out
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "One more."}) + "\n")
    changed = load("--pretrain_data text.jsonl")
    assert "tokenized again: the cache in cache" in capsys.readouterr().out
    assert changed.key != first.key


def test_many_files_are_one_line(capsys):
    """Ten lines `Loaded 2 chunks from` filled the screen; what is skipped was not said."""
    Path("texts").mkdir()
    for number in range(30):
        Path(f"texts/{number:02}.txt").write_text("One day. " * 10, encoding="utf-8")
    for name in ("a.md", "b.md", "c.json", "README", ".hidden"):
        Path("texts", name).touch()
    texts = load("--pretrain_data texts --val_fraction 0")
    out = capsys.readouterr().out
    first, last = Path("texts/00.txt"), Path("texts/29.txt")
    assert f"Loaded {len(texts.train)} chunks from 30 files, {first} to {last}\n" in out
    assert out.count("chunks from") == 1
    assert "texts: 2 .md, 1 without a suffix, 1 .json skipped; a file is read, whatever" in out
    load("--pretrain_data texts/00.txt texts/01.txt texts/02.txt")
    out = capsys.readouterr().out
    assert out.count("chunks from") == 3 and "skipped" not in out


def test_only_files_that_are_named_are_looked_at(monkeypatch, capsys):
    """Every file of a corpus was opened at each start, to see whether there is a remark to make.

    Remarks counted as files, too: of those with a remark each, only five were named.
    """
    looked, look = [], corpus.is_labelled
    monkeypatch.setattr(corpus, "is_labelled", lambda path, _: looked.append(path) or look(path))
    names = [f"{number:02}.md" for number in range(12)]
    for name in names:
        Path(name).write_text("One day. " * 10, encoding="utf-8")
    load(f"--val_fraction 0 --pretrain_data {' '.join(names)}")
    out = capsys.readouterr().out
    assert [path.name for path in looked] == names[:10]
    assert "chunks from 12 files" in out and "  10 of the first 10: read as plain text" in out


def test_ctrl_c_while_tokenizing_leaves_no_cache():
    """And nothing to save."""
    write_stories(Path.cwd(), 2)
    with pytest.raises(Interrupted):
        load("--pretrain_data text.jsonl", stop=StopRequest(signal_number=2))
    assert not [path for path in Path("cache").glob("*") if path.is_file()]


def test_chunks_are_counted_and_never_truncated(real_data):
    """sst-train.txt with the Llama-2 vocabulary is 249 chunks of 1,024.

    Read as one string and tokenized with max_len=1024 it gave "1 chunk".
    """
    path, vocabulary = real_data / "sst-train.txt", real_data / "tokenizer.model"
    words = f"--max_seq_len 1024 --tokenizer_model {vocabulary} --plan"
    done = pretrain(f"--pretrain_data {path} {words}")
    assert done.status == 0 and f"Loaded 249 chunks from {path}" in done.out


def test_a_text_in_another_encoding_is_the_same_text():
    """The tokens of a GBK file, a labelled one and a vocabulary's text are those of its UTF-8."""
    text = "从前有一座山，山里有一座庙。\n" * 40
    found = []
    for encoding in ("utf-8", "gb18030"):
        Path("a.txt").write_text(text, encoding=encoding)
        texts = load(f"--pretrain_data a.txt --encoding {encoding}")
        Path("l.txt").write_text("1 ||| 好看\n", encoding=encoding)
        words = f"train --input a.txt --vocab_size 280 --output {encoding} --encoding {encoding}"
        assert tokenizer.main(words.split()) == 0
        found.append((texts.key, read_labelled(Path("l.txt"), reading=Reading(encoding=encoding))))
    assert found[0] == found[1]
    assert Path("utf-8").read_bytes() == Path("gb18030").read_bytes()


@pytest.mark.parametrize("cut", range(1, 9))
def test_an_opening_begins_outside_of_a_marker(cut, monkeypatch):
    """Blocks held out of a long text begin anywhere, also within `<|user|>` and `</s>`.

    A sample's prompt was then `ser|> Where does`.
    """
    text = "<|user|> Where does the fox live in winter, and why there? </s> In its den, as ever."
    Path("a.txt").write_text(text * 9, encoding="utf-8")
    texts = load("--pretrain_data a.txt --val_fraction 0.3")
    ids = Tokenizer().encode(text[cut:].lstrip(), False, False)
    monkeypatch.setattr(type(texts.val.stream), "read", lambda *_: np.array(ids))
    monkeypatch.setattr(type(texts.val.stream), "__len__", lambda _: len(ids))
    assert texts.opening() == "Where does the fox"
