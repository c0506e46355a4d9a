"""data/download.py against a server on loopback that misbehaves in the ways real ones do."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import download  # noqa: E402  (a script of data/, found by the line above)

BODY = bytes(range(256)) * 1000  # 256 kB: several blocks
FILE = download.PublicFile("data/sample.txt", hashlib.sha256(BODY).hexdigest())


class Server:
    """What the server will do, and what it was asked."""

    def __init__(self) -> None:
        self.files = {"/data/sample.txt": BODY}
        self.heeds_range = True
        self.cut_after: list[int] = []  # one entry per request: bytes before the connection ends
        self.errors: list[int] = []  # one entry per request: HTTP status instead of the file
        self.lies_about_range = 0  # so many times another range than asked for
        self.ranges: list[str | None] = []
        self.says_length = True
        self.reason: str | None = None  # of an error's status line
        self.drips: tuple[int, float] | None = None  # from this byte of the answer, seconds each
        self.base_url = ""
        self.closing = threading.Event()


@pytest.fixture
def server(monkeypatch):
    state = Server()

    def drip(out, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the other side gave up
            for byte in data:
                if state.closing.wait(state.drips[1]):
                    return
                out.write(bytes([byte]))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            body = state.files.get(self.path)
            if state.errors or body is None:
                self.send_error(state.errors.pop(0) if state.errors else 404, state.reason)
                return
            start, status = 0, 200
            if wanted and state.heeds_range:
                start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
                if start >= len(body):
                    self.send_error(416)
                    return
                if state.lies_about_range:
                    state.lies_about_range -= 1
                    start = 0
            if state.drips is not None and state.drips[0] == 0:
                drip(self.wfile, b"HTTP/1.1 200 OK\r\nX-Header: " + b"x" * 10_000)
                return
            self.send_response(status)
            length = str(len(body) - start) if state.says_length else "unknown"
            self.send_header("Content-Length", length)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            end = start + state.cut_after.pop(0) if state.cut_after else len(body)
            if state.drips is not None and state.drips[0] > 0:
                self.wfile.write(body[start : start + state.drips[0]])
                drip(self.wfile, body[start + state.drips[0] : end])
                return
            self.wfile.write(body[start:end])

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.base_url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.001)
    yield state
    state.closing.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def fetch(server: Server, folder: Path, file=FILE, **options: bool) -> bool:
    return download.download(file, folder, base_url=server.base_url, **options)


def assert_whole(folder: Path) -> None:
    assert [p.name for p in folder.iterdir()] == ["sample.txt"]
    assert (folder / "sample.txt").read_bytes() == BODY


# ---------------------------------------------------------------------------- what goes well


def test_whole_file_into_a_new_folder(server, tmp_path):
    assert fetch(server, tmp_path / "new")
    assert_whole(tmp_path / "new")


def test_existing_right_file_is_not_fetched(server, tmp_path):
    (tmp_path / "sample.txt").write_bytes(BODY)
    assert not fetch(server, tmp_path)
    assert not fetch(server, tmp_path, overwrite=True)
    assert server.ranges == []


def test_resumes_from_the_part(server, tmp_path):
    (tmp_path / "sample.txt.part").write_bytes(BODY[:100_000])
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert server.ranges == ["bytes=100000-"]


def test_whole_part_needs_no_request(server, tmp_path):
    """Stopped between the last byte and the rename, a plain resume would ask past the end (416)."""
    (tmp_path / "sample.txt.part").write_bytes(BODY)
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert server.ranges == []


def test_server_that_ignores_range_restarts_cleanly(server, tmp_path):
    """Appending a whole body to a part gives a file with its beginning twice."""
    server.heeds_range = False
    (tmp_path / "sample.txt.part").write_bytes(BODY[:100_000])
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)


def test_part_longer_than_the_file_restarts(server, tmp_path):
    (tmp_path / "sample.txt.part").write_bytes(BODY + b"more")  # the server answers 416
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)


def test_part_of_another_file_restarts(server, tmp_path):
    (tmp_path / "sample.txt.part").write_bytes(b"x" * 5000)
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert server.ranges == ["bytes=5000-", None]


def test_another_range_than_asked_for_is_not_appended(server, tmp_path):
    server.lies_about_range = 1
    (tmp_path / "sample.txt.part").write_bytes(BODY[:100_000])
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("cuts", [[50_000], [0, 50_000, 1, 70_000, 3, 1, 1]])
def test_truncated_connection_goes_on(server, tmp_path, cuts):
    """Attempts are counted without progress: seven cuts are more than ATTEMPTS, yet it arrives."""
    server.cut_after = list(cuts)
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert len(server.ranges) == len(cuts) + 1


def test_server_errors_that_pass_are_retried(server, tmp_path):
    server.errors = [503, 429, 500]
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)


# ---------------------------------------------------------------------------- what goes wrong


def test_wrong_hash_leaves_nothing(server, tmp_path):
    server.files["/data/sample.txt"] = b"something else"
    with pytest.raises(
        download.DownloadError, match=r"sample.txt: what came .*sha256 .* instead of"
    ):
        fetch(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_404_is_one_request_and_names_the_url(server, tmp_path):
    server.files.clear()
    with pytest.raises(download.DownloadError, match=r"/data/sample.txt: HTTP 404 .*--base_url"):
        fetch(server, tmp_path)
    assert len(server.ranges) == 1
    assert list(tmp_path.iterdir()) == []


def test_gives_up_after_attempts_without_progress_and_keeps_the_part(server, tmp_path):
    server.cut_after = [1000] + [0] * download.ATTEMPTS
    with pytest.raises(download.DownloadError, match=r"ended after 1,000 of 256,000 bytes .*again"):
        fetch(server, tmp_path)
    assert (tmp_path / "sample.txt.part").read_bytes() == BODY[:1000]
    assert not (tmp_path / "sample.txt").exists()


@pytest.mark.parametrize("first", [0, 1000])
def test_a_server_that_drips_is_given_up(server, tmp_path, monkeypatch, first):
    """A byte now and then, of its headers or the file, held the program for ever.

    A socket's time limit begins again with each of them.
    """
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.drips = (first, 0.05)
    began = time.monotonic()
    with pytest.raises(download.DownloadError, match=r"slower than 65,536 bytes in 0.2 s .*again"):
        fetch(server, tmp_path)
    assert time.monotonic() - began < 10 and len(server.ranges) == download.ATTEMPTS


def test_what_comes_in_blocks_arrives_though_each_connection_ends_in_a_drip(
    server, tmp_path, monkeypatch
):
    """A block is progress: 256,000 bytes are three and a rest, which comes whole."""
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    server.drips = (70_000, 0.05)
    assert fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert len(server.ranges) == 4


def test_a_byte_a_connection_is_no_progress(server, tmp_path):
    """Each byte began the count of attempts anew: 42M of them take a year of pauses."""
    server.cut_after = [1] * len(BODY)
    with pytest.raises(
        download.DownloadError, match=r"ended after 5 of 256,000 bytes \(5 attempts"
    ):
        fetch(server, tmp_path)
    assert len(server.ranges) == download.ATTEMPTS
    assert (tmp_path / "sample.txt.part").read_bytes() == BODY[: download.ATTEMPTS]


@pytest.mark.parametrize("length", [b"", b"Content-Length: %d\r\n" % 10**30])
def test_what_comes_with_a_redirect_is_not_read(length, tmp_path, monkeypatch):
    """urllib reads it whole: one without an end filled the memory, a length of 10**30 was a
    traceback."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    asked, sent = [], []

    def redirect(listener: socket.socket) -> None:
        client, _ = listener.accept()
        asked.append(client.recv(1000))
        with client, contextlib.suppress(OSError):  # the other side gave up
            client.sendall(b"HTTP/1.1 302 Found\r\nLocation: /same\r\n" + length + b"\r\n")
            while len(sent) < 1000:
                client.sendall(bytes(1 << 16))
                sent.append(1 << 16)
        listener.close()

    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=redirect, args=(listener,))
    thread.start()
    with pytest.raises(download.DownloadError, match="1 attempts"):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        download.download(FILE, tmp_path, base_url=url)
    thread.join()
    assert asked and sum(sent) < 10_000_000  # what the kernel holds, of 65 MB


def test_a_servers_words_are_shown_and_not_obeyed(server, tmp_path):
    """They cleared the screen and set the terminal's title."""
    server.errors, server.reason = [404], "\x1b[2J\x1b]0;owned\x07\x1b[A\rverified" + "x" * 9000
    words = ["sst", "--output", str(tmp_path), "--base_url", server.base_url]
    done = subprocess.run(
        [sys.executable, ROOT / "data" / "download.py", *words], capture_output=True
    )
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"download.py: error: http://127.0.0.1:")
    assert b"HTTP 404 \\x1b[2J\\x1b]0;owned\\x07\\x1b[A" in done.stderr
    line = done.stderr.rstrip(b"\r\n")
    assert len(line) < 600 and not [byte for byte in line if byte < 32]


def test_existing_wrong_file_is_kept_unless_told(server, tmp_path):
    (tmp_path / "sample.txt").write_bytes(b"mine")
    with pytest.raises(download.DownloadError, match="--overwrite"):
        fetch(server, tmp_path)
    assert (tmp_path / "sample.txt").read_bytes() == b"mine"
    assert fetch(server, tmp_path, overwrite=True)
    assert_whole(tmp_path)


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://127.0.0.1:1 /"])
def test_malformed_base_url_is_one_clear_error(tmp_path, url, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.001)
    with pytest.raises(download.DownloadError, match="base_url"):
        download.download(FILE, tmp_path, base_url=url)


def test_command_line_without_network(tmp_path, monkeypatch, capsys):
    """A network failure is one line with the URL, no traceback, exit 1."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.001)
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert download.main(["sst", "--output", str(tmp_path), "--base_url", url]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{url}/data/sst-train.txt" in error and "run the same command again" in error
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_the_part_and_exits_130(server, tmp_path, monkeypatch, capsys):
    def interrupted(response, part, have):
        part.write_bytes(BODY[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "SETS", {"sst": (FILE,)})
    monkeypatch.setattr(download, "_receive", interrupted)
    options = ["sst", "--output", str(tmp_path), "--base_url", server.base_url]
    assert download.main(options) == 130
    assert (tmp_path / "sample.txt.part").read_bytes() == BODY[:10]


# ---------------------------------------------------------------------------- the sets


def test_command_line_downloads_and_says_what_is_there(server, tmp_path, real_data, capsys):
    """The committed hashes are those of the real files."""
    for file in (*download.SETS["sst"], *download.SETS["cfimdb"], *download.SETS["tokenizer"]):
        server.files[f"/{file.path}"] = (real_data / file.name).read_bytes()
    options = [
        "sst",
        "cfimdb",
        "tokenizer",
        "--output",
        str(tmp_path),
        "--base_url",
        server.base_url,
    ]
    assert download.main(options) == 0
    assert capsys.readouterr().out.count("downloaded, verified") == 9
    assert download.main(options) == 0
    assert capsys.readouterr().out.count("already there, verified") == 9


def save_model(path: Path, *, layers: int = 2, prefix: str = "", dtype: str = "float32") -> None:
    import torch

    names = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm"]
    names += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "ffn_norm"]
    weight = torch.zeros(4, 4, dtype=getattr(torch, dtype))
    state = {f"{prefix}layers.{i}.{name}.weight": weight for i in range(layers) for name in names}
    embedding = torch.zeros(16, 4, dtype=weight.dtype)
    state |= {f"{prefix}tok_embeddings.weight": embedding, f"{prefix}output.weight": embedding}
    state |= {f"{prefix}norm.weight": weight, f"{prefix}freqs_cos": weight.double()}
    torch.save({"model": state, "model_args": {"dim": 4}}, path)


TINY = download.Shape(tensors=21, dim=4, n_layers=2, vocab_size=16)


@pytest.mark.parametrize("length", [True, False])
def test_a_file_without_an_end_is_given_up(server, tmp_path, monkeypatch, length):
    """A server that sends for ever, or announces too much, filled the disk."""
    monkeypatch.setattr(download, "LARGEST", len(BODY) - 1)
    server.says_length = length
    with pytest.raises(download.DownloadError, match="bytes came: not the file"):
        fetch(server, tmp_path / "out", FILE)
    assert not [*(tmp_path / "out").glob("*")]


def test_model_without_known_hash_is_verified_by_content(server, tmp_path):
    save_model(tmp_path / "source.pt", prefix="_orig_mod.")
    server.files["/stories42M.pt"] = (tmp_path / "source.pt").read_bytes()
    file = download.SETS["stories42M"][0]._replace(shape=TINY)
    assert fetch(server, tmp_path / "out", file)
    assert not fetch(server, tmp_path / "out", file)  # verified again, not fetched
    assert len(server.ranges) == 1


def test_model_of_another_shape_is_refused(server, tmp_path):
    save_model(tmp_path / "source.pt", layers=3, dtype="float16")
    server.files["/stories42M.pt"] = (tmp_path / "source.pt").read_bytes()
    file = download.SETS["stories42M"][0]._replace(shape=TINY)
    with pytest.raises(download.DownloadError, match=r"tensors 30 .*layers 3 .*float16"):
        fetch(server, tmp_path / "out", file)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"<html>moved</html>", b"PK\x03\x04 cut short"])
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "stories42M.pt"
    path.write_bytes(content)
    assert "not a model file" in download.find_shape_fault(path, TINY)


def test_shape_of_the_real_model():
    """8 layers of 9 tensors, the embedding, the output and the last norm."""
    shape = download.SETS["stories42M"][0].shape
    assert shape == download.Shape(tensors=8 * 9 + 3, dim=512, n_layers=8, vocab_size=32000)


def test_hint_names_the_command():
    assert download.download_hint(Path("data/sst-train.txt")) == "python data/download.py sst"
    assert download.download_hint(Path("x/cfimdb-dev.txt")) == "python data/download.py cfimdb"
    assert download.download_hint(Path("stories42M.pt")) == "python data/download.py stories42M"
    assert download.download_hint(Path("my.txt")) is None


def test_hint_imports_neither_torch_nor_tqdm_and_needs_no_entry_in_sys_modules():
    """tokenizer.py loads the script by its path, and a dataclass here would break that."""
    code = (
        "import importlib.util, pathlib, sys\n"
        "spec = importlib.util.spec_from_file_location('d', 'data/download.py')\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert module.download_hint(pathlib.Path('tokenizer.model'))\n"
        "assert 'torch' not in sys.modules and 'tqdm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
