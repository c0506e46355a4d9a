"""minllama/text/token_cache.py: a cache is checked, rebuilt, and never believed while wrong."""

from __future__ import annotations

import builtins
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from vocabularies import corpus_lines, vocabulary

from minllama.system.errors import Interrupted, TextLost, UsageError
from minllama.system.locks import hold
from minllama.text import token_cache
from minllama.text.encoder import DocumentEncoder
from minllama.text.reading import Reading
from minllama.text.token_cache import BadCache, TokenCache, build_or_load

ROOT = Path(__file__).resolve().parents[2]

STORY = "the cat sat on the mat .\nit ran home with two dogs .\n"
LINES = Reading(document_per_line=True)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Three files, one of them blank; as new as text can be."""
    contents = {"a.txt": STORY * 3, "b.txt": "\n", "c.txt": "two dogs\n\nsat ﬁ\n"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return [tmp_path / name for name in contents]


def build(files: list[Path], folder: Path, reading: Reading = LINES, **options) -> TokenCache:
    tokenizer = options.pop("tokenizer", vocabulary("ours"))
    return build_or_load(files, tokenizer, reading, folder, **options)


def text_of(cache: TokenCache) -> str:
    return vocabulary("ours").decode(cache.tokens[:])


def refuse(*_: object) -> None:
    raise AssertionError("the text was tokenized again")


def test_a_cache_holds_every_document(corpus: list[Path], tmp_path: Path) -> None:
    """BOS, ids, EOS for each document, in order, with the counts by file that are printed."""
    cache = build(corpus, tmp_path / "cache")
    lines = [line for path in corpus for line in path.read_text("utf-8").split("\n") if line]
    expected = [vocabulary("ours").encode(line, True, True) for line in lines]
    assert cache.tokens[:].tolist() == sum(expected, [])
    assert cache.tokens.dtype == np.uint16 and len(cache) == sum(map(len, expected))
    assert cache.document_bytes.tolist() == [len(line.encode()) for line in lines]
    stops = np.cumsum([0, *map(len, expected)])
    assert cache.document_starts.tolist() == stops[:-1].tolist()
    assert cache.document_stops().tolist() == stops[1:].tolist()
    assert cache.file_documents.tolist() == [6, 0, 2]
    first, last = sum(map(len, expected[:6])), sum(map(len, expected[6:]))
    assert cache.file_tokens.tolist() == [first, 0, last]
    assert cache.place(0) == (0, 0) and cache.place(first - 1) == (0, first - 1)
    assert cache.place(first) == (2, 0) and cache.place(len(cache) - 1) == (2, last - 1)


def test_a_document_of_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file as one document is one document in the cache, however often it was cut."""
    small = functools.partial(DocumentEncoder, part_chars=50, batch_chars=400)
    monkeypatch.setattr(token_cache, "DocumentEncoder", small)
    text = "\n".join(corpus_lines())
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    cache = build([tmp_path / "a.txt"], tmp_path / "cache", Reading(), threads=2)
    assert cache.tokens[:].tolist() == vocabulary("ours").encode(text, True, True)
    assert cache.document_bytes.tolist() == [len(text.encode())]


def test_unchanged_text_is_not_tokenized_twice(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start finds the tokens; another way of reading has a cache of its own."""
    folder = tmp_path / "cache"
    assert build(corpus, folder).rebuilt_because == "there was none"
    assert build(corpus, folder, Reading()).rebuilt_because == "there was none"
    monkeypatch.setattr(DocumentEncoder, "encode", refuse)
    for reading, documents in ((LINES, 8), (Reading(), 2)):
        again = build(corpus, folder, reading)
        assert again.rebuilt_because is None and len(again.document_starts) == documents
    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.startswith(".") or name.endswith(".tmp")]


def test_unchanged_text_is_not_even_read(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus of 10 GB must not be read at each start."""
    build(corpus, tmp_path / "cache")
    opened: list[str] = []
    for module in (builtins, io):
        real = module.open

        def noted(file, *args, real=real, **options):
            opened.append(str(file))
            return real(file, *args, **options)

        monkeypatch.setattr(module, "open", noted)
    cache = build(corpus, tmp_path / "cache")
    assert cache.rebuilt_because is None
    assert str(cache.path) in opened and not {str(path) for path in corpus} & set(opened)


def test_changed_text_is_tokenized_again(corpus: list[Path], tmp_path: Path) -> None:
    """What changed is said, the stale cache makes way, and a touched file keeps its tokens."""
    folder = tmp_path / "cache"
    first = build(corpus, folder)
    key, text = first.key, text_of(first)
    os.utime(corpus[0], (1e9, 1e9))
    touched = build(corpus, folder)
    assert touched.key == key and text_of(touched) == text
    del first, touched  # Windows replaces no file that is mapped
    corpus[0].write_text("two dogs .\n", encoding="utf-8")
    again = build(corpus, folder)
    assert "changed" in again.rebuilt_because and again.file_documents.tolist() == [1, 0, 2]
    assert again.key != key and len(list(folder.glob("*.tokens"))) == 1


def test_text_changed_at_once_behind_the_same_size(tmp_path: Path) -> None:
    """A second write within the grain of the clock leaves size and times alike: that is outwaited.

    Text that had just been written was once tokenized again at the next start.
    """
    path = tmp_path / "a.txt"
    for text in ("two dogs", "two cats", "ten cats") * 7:
        path.write_text(text, encoding="utf-8")
        assert text_of(build([path], tmp_path / "cache")) == text


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell of a change of times")
def test_text_changed_behind_the_same_size_and_time(tmp_path: Path) -> None:
    """By a tool that restores times, such as rsync or tar."""
    path = tmp_path / "a.txt"
    for text in ("two dogs", "two cats", "ten cats"):
        path.write_text(text, encoding="utf-8")
        os.utime(path, (1e9, 1e9))
        time.sleep(0.05)
        assert text_of(build([path], tmp_path / "cache")) == text


@pytest.mark.skipif(os.name == "nt", reason="there only the time of writing tells of a change")
def test_text_dated_in_the_future(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an archive of another time zone: tokenized once like any other."""
    later = time.time() + 86400
    os.utime(corpus[0], (later, later))
    time.sleep(0.05)
    build(corpus, tmp_path / "cache")
    monkeypatch.setattr(DocumentEncoder, "encode", refuse)
    assert build(corpus, tmp_path / "cache").rebuilt_because is None


def test_the_key_is_of_all_that_the_tokens_depend_on(corpus: list[Path], tmp_path: Path) -> None:
    """A run is resumed by it: the same text in another place is the same, nothing else is."""
    moved = tmp_path / "moved" / "other.txt"
    moved.parent.mkdir()
    moved.write_bytes(corpus[0].read_bytes())
    keys = {
        name: build(files, tmp_path / name, reading, **options).key
        for name, files, reading, options in (
            ("this", corpus[:1], LINES, {}),
            ("moved", [moved], LINES, {"threads": 2}),
            ("whole", corpus[:1], Reading(), {}),
            ("more", [corpus[0], corpus[2]], LINES, {}),
            ("turned", [corpus[2], corpus[0]], LINES, {}),
            ("vocabulary", corpus[:1], LINES, {"tokenizer": vocabulary("embedded")}),
        )
    }
    moved.write_text(STORY * 3 + "!", encoding="utf-8")
    keys["changed"] = build([moved], tmp_path / "changed").key
    assert keys.pop("moved") == keys["this"]
    assert len(set(keys.values())) == len(keys)


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    """Damaged tokens would train a damaged model in silence."""
    (tmp_path / "a.txt").write_text("two dogs\nsat\n", encoding="utf-8")
    cache = build([tmp_path / "a.txt"], tmp_path / "cache")
    content = cache.path.read_bytes()
    (tmp_path / "copy.tokens").write_bytes(content)
    assert TokenCache(tmp_path / "copy.tokens").tokens[:].tolist() == cache.tokens[:].tolist()
    damaged = [content[:size] for size in range(len(content))] + [content + b"\0"]
    for at in range(len(content)):
        for bits in (0x01, 0xFF):
            damaged.append(content[:at] + bytes([content[at] ^ bits]) + content[at + 1 :])
    for data in damaged:
        (tmp_path / "damaged.tokens").write_bytes(data)
        with pytest.raises(BadCache):
            TokenCache(tmp_path / "damaged.tokens")


def test_a_cache_that_was_just_verified_is_not_read_again(corpus, tmp_path, monkeypatch) -> None:
    """Of eight processes of a machine each read all of it before the first step."""
    tokenizer = vocabulary("embedded")
    first = build_or_load(corpus, tokenizer, Reading(), tmp_path)
    monkeypatch.setattr(token_cache, "_digests", lambda *_: pytest.fail("read again"))
    again = build_or_load(corpus, tokenizer, Reading(), tmp_path, is_verified=True)
    assert again.key == first.key and again.rebuilt_because is None


def test_a_damaged_cache_is_rebuilt(corpus: list[Path], tmp_path: Path) -> None:
    """A flipped bit, a lost end, nothing left: the tokens come back, and why is said."""
    path = build(corpus, tmp_path / "cache").path
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (flipped, content[:-1], b""):
        path.write_bytes(damaged)
        assert "damaged" in build(corpus, tmp_path / "cache").rebuilt_because
        assert path.read_bytes() == content


def test_interrupted_tokenizing_leaves_nothing(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: no half cache under the real name, no temporary file."""
    real, started = DocumentEncoder.encode, []

    def encode_and_note(self, blocks):
        for batch in real(self, blocks):
            started.append(True)
            yield batch

    monkeypatch.setattr(DocumentEncoder, "encode", encode_and_note)
    for when in (lambda: True, lambda: bool(started)):

        def check_stop(when=when) -> None:
            if when():
                raise Interrupted

        with pytest.raises(Interrupted):
            build(corpus, tmp_path / "cache", check_stop=check_stop)
        assert not list((tmp_path / "cache").glob("*tokens*"))
    assert started
    assert build(corpus, tmp_path / "cache").rebuilt_because == "there was none"


def test_text_that_changes_while_it_is_tokenized(
    corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old tokens would pass for the new text's."""
    real = DocumentEncoder.encode

    def encode_and_change(self, blocks):
        yield from real(self, blocks)
        corpus[0].write_text("other\n", encoding="utf-8")

    with monkeypatch.context() as patch:
        patch.setattr(DocumentEncoder, "encode", encode_and_change)
        with pytest.raises(UsageError, match="a.txt.* changed while it was read"):
            build(corpus[:1], tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*tokens*"))
    assert text_of(build(corpus[:1], tmp_path / "cache")) == "other"


def test_text_that_cannot_be_tokenized(corpus: list[Path], tmp_path: Path) -> None:
    """Nothing but blank files, no such file, and a cache folder that is a file."""
    with pytest.raises(UsageError, match="b.txt: empty"):
        build(corpus[1:2], tmp_path / "cache")
    with pytest.raises(UsageError, match="absent.txt: cannot be read"):
        build([tmp_path / "absent.txt"], tmp_path / "cache")
    with pytest.raises(UsageError, match="--cache_dir .*a.txt"):
        build(corpus, corpus[0] / "cache")


def test_two_processes_build_the_same_cache(corpus: list[Path], tmp_path: Path) -> None:
    """One does, the other waits and reads it: machines that share a folder each tokenized."""
    code = (
        "import sys; from pathlib import Path\n"
        "from minllama.text.token_cache import build_or_load\n"
        "from minllama.text.reading import Reading\n"
        "from tokenizer import Tokenizer\n"
        "cache = build_or_load([Path(sys.argv[1])], Tokenizer(), Reading(), Path(sys.argv[2]))\n"
        "print(cache.tokens[:].tolist())"
    )
    command = [sys.executable, "-c", code, str(corpus[0]), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    found = {process.communicate()[0].splitlines()[-1] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(found) == 1
    cache = build(corpus[:1], tmp_path / "cache", Reading(), tokenizer=vocabulary("embedded"))
    assert cache.rebuilt_because is None and str(cache.tokens[:].tolist()).encode() in found.pop()


@pytest.mark.parametrize("ends", ["built", "gave up", "interrupted"])
def test_who_finds_a_cache_being_made_waits_for_it(ends, corpus, tmp_path, capsys) -> None:
    """It says for whom; where that one gives up it makes the cache itself."""
    made = build(corpus, tmp_path / "elsewhere").path
    path = tmp_path / "cache" / made.name
    path.parent.mkdir()
    polls = iter(range(9))

    def check_stop() -> None:
        if next(polls) == 1:
            if ends == "built":
                path.write_bytes(made.read_bytes())
            held.close()
        if ends == "interrupted":
            raise Interrupted

    with contextlib.ExitStack() as held:
        held.enter_context(hold(path.with_name(f"{path.name}.lock")))
        if ends == "interrupted":
            with pytest.raises(Interrupted):
                build(corpus, path.parent, check_stop=check_stop)
        else:
            cache = build(corpus, path.parent, check_stop=check_stop)
            assert (cache.rebuilt_because is None) == (ends == "built")
            assert cache.tokens[:].tolist() == build(corpus, path.parent).tokens[:].tolist()
            assert [file.name for file in path.parent.iterdir()] == [path.name]
    said = f"waiting for process {os.getpid()} on {platform.node()}, which makes the same {path}"
    assert capsys.readouterr().out.count(said) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has other modes")
def test_others_can_read_the_cache(corpus, tmp_path) -> None:
    """Its mode was 0600, so another user of the same folder tokenized again, in vain."""
    before = os.umask(0o022)
    try:
        path = build(corpus, tmp_path / "cache").path
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("hurt", ["cut off", "written over"])
def test_a_cache_that_is_hurt_while_it_is_read(hurt, corpus, tmp_path) -> None:
    """Cut off it was a SIGBUS without a word, written over an IndexError or silently other text."""
    cache = build(corpus, tmp_path / "cache")
    before = cache.tokens[3:9].tolist()
    content = cache.path.read_bytes()
    if hurt == "cut off":
        os.truncate(cache.path, 200)
    else:
        cache.path.write_bytes(b"\xff" * len(content))
        os.utime(cache.path, (1, 1))  # whatever time the file system's clock gave it
    with pytest.raises(TextLost, match=f"{cache.path.name} was cut off or written over while"):
        cache.tokens[3:9]
    cache.path.with_name("new").write_bytes(content)
    os.replace(cache.path.with_name("new"), cache.path)
    assert build(corpus, tmp_path / "cache").tokens[3:9].tolist() == before


def test_two_threads_read_one_cache(corpus, tmp_path) -> None:
    """A batch is read ahead while a validation reads: one moved the other's place in the file."""
    tokens = build(corpus, tmp_path / "cache").tokens
    whole, file, others = tokens[:].tolist(), tokens.file, []

    class SlowFile:
        fileno, read = file.fileno, file.read

        def seek(self, place: int) -> None:
            file.seek(place)
            if not others:  # between place and reading another thread comes
                others.append(pool.submit(lambda: tokens[:3].tolist()))
                concurrent.futures.wait(others, timeout=0.2)

    tokens.file = SlowFile()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert tokens[5:9].tolist() == whole[5:9] and others[0].result() == whole[:3]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace a file that is open")
def test_a_cache_that_is_replaced_is_read_on(corpus, tmp_path) -> None:
    """A run goes on with the text that it began with when another one tokenizes again."""
    cache = build(corpus, tmp_path / "cache")
    before = cache.tokens[:].tolist()
    corpus[0].write_text("Something else.", encoding="utf-8")
    assert build(corpus, tmp_path / "cache").tokens[:].tolist() != before
    assert cache.tokens[:].tolist() == before


def test_a_real_file_is_never_cut_short(real_data: Path, tmp_path: Path) -> None:
    """It was once tokenized with max_len=1024, so that any file gave "1 chunk"."""
    path = real_data / "sst-train.txt"
    cache = build([path], tmp_path, Reading(), tokenizer=vocabulary("llama-2"))
    assert len(cache) == 254_453 + 2  # BOS and EOS


def test_fingerprints_are_alike_where_documents_are(tmp_path, monkeypatch) -> None:
    """Whatever parts a document was encoded in, and in whatever file and corpus it stands."""
    lines = [*corpus_lines()[:20], STORY.replace("\n", " ") * 20]
    (tmp_path / "a.txt").write_text("\n".join([*lines, lines[3]]), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join([lines[-1], lines[-1] + "!"]), encoding="utf-8")
    small = functools.partial(DocumentEncoder, part_chars=50, batch_chars=400)
    a = build([tmp_path / "a.txt"], tmp_path / "cache")
    monkeypatch.setattr(token_cache, "DocumentEncoder", small)
    b = build([tmp_path / "b.txt"], tmp_path / "cache")
    for cache in (a, b):
        starts, stops = cache.document_starts.tolist(), cache.document_stops().tolist()
        for start, stop, found in zip(starts, stops, cache.fingerprints, strict=True):
            ids = cache.tokens[start + 1 : stop - 1].tobytes()
            assert found.tobytes() == hashlib.blake2b(ids, digest_size=16).digest()
    assert a.fingerprints[20].tolist() == b.fingerprints[0].tolist() != b.fingerprints[1].tolist()


def test_the_key_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """A run of before there were fingerprints is resumed by it: of tokens, documents and files."""
    (tmp_path / "a.txt").write_text("two dogs\nsat\n", encoding="utf-8")
    cache = build([tmp_path / "a.txt"], tmp_path / "cache")
    ids = cache.tokens[:].tobytes()
    documents = np.stack([cache.document_starts, cache.document_bytes], axis=1).tobytes()
    files = np.array([[len(cache), 2]], "<i8").tobytes()
    padding = bytes(-(token_cache.HEADER.size + len(ids)) % 8)
    assert cache.key == hashlib.sha256(ids + padding + documents + files).digest()


def test_a_cache_of_another_version_is_rebuilt(corpus, tmp_path, monkeypatch) -> None:
    """Such as one without fingerprints."""
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "CACHE_VERSION", token_cache.CACHE_VERSION - 1)
        build(corpus, tmp_path / "cache")
    again = build(corpus, tmp_path / "cache")
    assert again.rebuilt_because == "it is not a token cache of this version"
    assert build(corpus, tmp_path / "cache").rebuilt_because is None


def test_a_cache_that_is_cut_off_while_it_is_opened_is_built_again(corpus, tmp_path, monkeypatch):
    """Its tables were mapped: touching a page beyond the file's new end killed the process."""
    cache, real = build(corpus, tmp_path / "cache"), token_cache._digests

    def cut_off(*arguments) -> list[bytes]:
        digests = real(*arguments)
        os.truncate(cache.path, token_cache.HEADER.size)
        return digests

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_digests", cut_off)
        with pytest.raises(BadCache, match="cut off while it was read"):
            TokenCache(cache.path)
    assert len(build(corpus, tmp_path / "cache")) == len(cache)
