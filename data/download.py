"""Downloads the public sets: SST-5, CFIMDB, the Llama-2 vocabulary, and stories42M.pt.

A file appears under its name only when it is whole and verified; until then it is NAME.part, and
the same command continues where it stopped. It knows nothing of what the files are used for.

    python data/download.py sst cfimdb       # into data/
    python data/download.py tokenizer stories42M   # into the root of the repository
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import queue
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).resolve().parent
ROOT = DATA.parent
sys.path.insert(0, str(ROOT))  # minllama is in the root of the repository

from minllama.cli.command_line import print_error, protect_output, read_path  # noqa: E402

# The course repository at commit 2951cdd; a file's path below is the path in it.
COURSE_URL = (
    "https://raw.githubusercontent.com/neubig/minllama-assignment/"
    "2951cddba218b7ddfe69295b77ad51a05107d384"
)
STORIES_URL = "https://www.cs.cmu.edu/~vijayv/stories42M.pt"

ATTEMPTS = 5  # without a block in between
PAUSE = 1.0  # seconds before the second attempt, doubled for each one after
TIMEOUT = 30.0  # seconds for an answer, and for each block after it
BLOCK = 1 << 16  # bytes read at a time
REASON_CHARS = 200  # of a server's words that are shown
NETWORK_ERRORS = (  # not OSError as a whole: a full disk is one, too
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


class DownloadError(Exception):
    """A download that did not work; the message names the URL, what happened and the remedy."""


LARGEST = 1 << 30  # bytes of a download: the largest of the files has a quarter of that


class _Again(Exception):
    """This attempt failed, another one may not."""


# ---------------------------------------------------------------------------- what there is


class Shape(NamedTuple):
    """What a model file must hold, where its sha256 is not known."""

    tensors: int
    dim: int
    n_layers: int
    vocab_size: int


class PublicFile(NamedTuple):
    """A file of a set: its path at the source, how it is verified, and where it belongs."""

    path: str
    sha256: str | None = None
    in_root: bool = False
    url: str | None = None  # None: the course repository
    shape: Shape | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


SETS: dict[str, tuple[PublicFile, ...]] = {
    "sst": (
        PublicFile(
            "data/sst-train.txt",
            "7aeac81f2a387f2ce7fab98ed8f40ef85cc9c8ad11bcbb63b122e95665cb1f35",
        ),
        PublicFile(
            "data/sst-dev.txt",
            "11963c76cd073e68006da0390620aadf5a4b8f775e2f900e92a50b3002e39b9b",
        ),
        PublicFile(
            "data/sst-test.txt",
            "bdcc8352d37bdc82113e4a4dd887b824144201539d5a1e49be566232d306a4ba",
        ),
        PublicFile(
            "data/sst-label-mapping.json",
            "831e6914e25d9b9eb56ff9095b3f035bdaf1b9568d385a70ef481c82af0382b3",
        ),
    ),
    "cfimdb": (
        PublicFile(
            "data/cfimdb-train.txt",
            "278e200499d1d68a1a9d80e3947a2203cc97130632d8a53f2b9c11de9cb6c699",
        ),
        PublicFile(
            "data/cfimdb-dev.txt",
            "b38f0c095c4624e85927116728140e96d0221969b34146f65eae5b5bb24752b8",
        ),
        PublicFile(
            "data/cfimdb-test.txt",
            "8ad2f6da7bfb0e8fc36cf89eda47c574cc9c35d6347e665f31bc904d9ecfe0a7",
        ),
        PublicFile(
            "data/cfimdb-label-mapping.json",
            "afeac43f5a5fe8758469078418519df4c8503c2e30e2fcf6c61464fce3d44a36",
        ),
    ),
    "tokenizer": (
        PublicFile(
            "tokenizer.model",
            "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
            in_root=True,
        ),
    ),
    "stories42M": (
        PublicFile(
            "stories42M.pt",
            in_root=True,
            url=STORIES_URL,
            shape=Shape(tensors=75, dim=512, n_layers=8, vocab_size=32000),
        ),
    ),
}


def download_hint(path: Path) -> str | None:
    """The command that downloads a missing file of this name; None when it is no public file."""
    for set_name, files in SETS.items():
        if any(file.name == path.name for file in files):
            return f"python data/download.py {set_name}"
    return None


# ---------------------------------------------------------------------------- verifying


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_fault(file: PublicFile, path: Path) -> str | None:
    """What is wrong with `path` as a copy of `file`; None when it is right."""
    if file.sha256 is not None:
        found = sha256_of(path)
        return None if found == file.sha256 else f"sha256 {found} instead of {file.sha256}"
    assert file.shape is not None
    return find_shape_fault(path, file.shape)


def find_shape_fault(path: Path, shape: Shape) -> str | None:
    """What keeps `path` from being a float32 Llama of this shape; runs no code from the file."""
    import torch  # only here: the hint and the other files need no torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {_plain_name(name): tensor for name, tensor in loaded["model"].items()}
    except Exception as error:  # torch raises many kinds for a file that is no model
        return f"not a model file ({type(error).__name__})"
    # Tables of rotary angles are computed by whoever loads the file.
    state = {name: tensor for name, tensor in state.items() if "freqs" not in name}
    layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    embedding = state.get("tok_embeddings.weight")
    found = {
        "tensors": len(state),
        "layers": len(layers),
        "embedding": None if embedding is None else tuple(embedding.shape),
        "dtypes": sorted({str(tensor.dtype) for tensor in state.values()}),
    }
    wanted: dict[str, Any] = {
        "tensors": shape.tensors,
        "layers": shape.n_layers,
        "embedding": (shape.vocab_size, shape.dim),
        "dtypes": ["torch.float32"],
    }
    faults = [
        f"{key} {found[key]} instead of {wanted[key]}"
        for key in wanted
        if found[key] != wanted[key]
    ]
    return "; ".join(faults) or None


def _plain_name(name: str) -> str:
    return name.removeprefix("_orig_mod.")  # torch.compile's prefix


# ---------------------------------------------------------------------------- one file


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Reads nothing of what comes with a redirect; urllib reads it whole, even without an end."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def download(
    file: PublicFile, folder: Path, *, base_url: str | None = None, overwrite: bool = False
) -> bool:
    """Bring `file` into `folder`; returns False when it was there already.

    Raises DownloadError. An interrupted download leaves NAME.part, which the next one continues.
    """
    url = file.url or f"{COURSE_URL}/{file.path}"
    if base_url is not None:
        url = f"{base_url.rstrip('/')}/{file.path}"
    target = folder / file.name
    part = folder / (file.name + ".part")
    if target.exists():
        fault = find_fault(file, target)
        if fault is None:
            return False
        if not overwrite:
            raise DownloadError(
                f"{target}: is there, but is not the public file ({fault}); "
                "--overwrite replaces it, --output writes elsewhere"
            )
    folder.mkdir(parents=True, exist_ok=True)
    resumed = part.exists()
    fault = find_fault(file, part) if resumed else "nothing yet"
    if fault:  # a part can be whole: stopped between its last byte and its new name
        _fetch(url, part)
        fault = find_fault(file, part)
    if fault and resumed:  # the old part may have been another file's: once more, from the start
        part.unlink()
        _fetch(url, part)
        fault = find_fault(file, part)
    if fault:
        part.unlink()
        raise DownloadError(
            f"{url}: what came is not the file expected ({fault}); nothing was kept; "
            "try again later or another --base_url"
        )
    os.replace(part, target)
    return True


def _fetch(url: str, part: Path) -> None:
    """Download `url` into `part`, trying again while that may help."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _fetch_once(url, part)
        except _Again as failure:
            failures = 1 if _size(part) >= before + BLOCK else failures + 1
            if failures >= ATTEMPTS:
                raise DownloadError(
                    f"{url}: {failure} ({ATTEMPTS} attempts); check the network and run the same "
                    "command again: it continues where it stopped; or name a mirror by --base_url"
                ) from None
        time.sleep(PAUSE * 2 ** (failures - 1))


def _fetch_once(url: str, part: Path) -> None:
    """One request; raises _Again where another one may help, else DownloadError."""
    have = _size(part)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "minllama"})
        if have:
            request.add_header("Range", f"bytes={have}-")
        opener = urllib.request.build_opener(_Redirect)
        response = _in_time(opener.open, request, timeout=TIMEOUT)
        _receive(response, part, have)
        response.close()
    except (ValueError, http.client.InvalidURL) as error:
        raise DownloadError(
            f"{url}: {error}; --base_url must be like https://host/folder"
        ) from None
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # more there than the server has, or all of it: start over
            part.unlink(missing_ok=True)
            raise _Again("the server has no such range") from None
        if error.code in (408, 429) or error.code >= 500:
            raise _Again(f"HTTP {error.code} {_words(error.reason)}") from None
        raise DownloadError(
            f"{url}: HTTP {error.code} {_words(error.reason)}; the file is not (or no longer) "
            "there; name a mirror by --base_url"
        ) from None
    except NETWORK_ERRORS as error:
        reason = _words(getattr(error, "reason", error))
        raise _Again(reason or type(error).__name__) from None


def _words(reason: object) -> str:
    """What a server said, on one line, if it said much its beginning."""
    return " ".join(str(reason)[:REASON_CHARS].split())


def _in_time(call: Callable, *args: Any, **settings: Any) -> Any:
    """What the call returns or raises; TimeoutError where it takes longer than TIMEOUT.

    A socket's own limit begins again with every byte, so a server that sends one now and then held
    the program for ever. The thread that waits for it is left behind, and ends with the program.
    """
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(*args, **settings), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = outcome.get(timeout=TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"slower than {BLOCK:,} bytes in {TIMEOUT:g} s") from None
    if error is not None:
        raise error
    return result


def _receive(response: Any, part: Path, have: int) -> None:
    """Append the body to `part`, or write it from the start where the server ignored the range."""
    starts_at = have
    content_range = response.headers.get("Content-Range", "")
    if response.status != 206 or not content_range.startswith(f"bytes {have}-"):
        if response.status == 206:  # another range than asked for: its bytes belong elsewhere
            part.unlink(missing_ok=True)
            raise _Again(f"the server sent {_words(content_range) or 'an unknown range'}")
        starts_at = 0
    length = response.headers.get("Content-Length") or ""
    total = starts_at + int(length) if re.fullmatch("[0-9]{1,18}", length) else None
    size = starts_at
    with part.open("ab" if starts_at else "wb") as out, _progress(part, starts_at, total) as bar:
        while block := _in_time(response.read, BLOCK):
            size += len(block)
            if max(size, total or 0) > LARGEST:
                part.unlink(missing_ok=True)
                raise DownloadError(f"{part}: more than {LARGEST:,} bytes came: not the file")
            out.write(block)
            bar.update(len(block))
        out.flush()
        os.fsync(out.fileno())
    if total is not None and _size(part) < total:
        raise _Again(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _progress(part: Path, done: int, total: int | None) -> Any:
    from minllama.cli.console import progress_bar  # here: download_hint works without packages

    units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    return progress_bar(desc=part.name.removesuffix(".part"), initial=done, total=total, **units)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---------------------------------------------------------------------------- the command line


def main(argv: Sequence[str] | None = None, *, say: Callable[[str], None] = print) -> int:
    """Exit status: 0 all there, 1 a download failed, 2 bad arguments, 130 interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="+", choices=[*SETS, "all"], metavar="SET",
                        help=f"{', '.join(SETS)}, or all")  # fmt: skip
    parser.add_argument(
        "--output", type=read_path, help="folder for all files (data/, and the root)"
    )
    parser.add_argument("--base_url", "--base-url", help="a mirror, laid out like the repository")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ")
    args = parser.parse_args(argv)

    names = SETS if "all" in args.sets else dict.fromkeys(args.sets)
    try:
        for file in (file for name in names for file in SETS[name]):
            folder = args.output or (ROOT if file.in_root else DATA)
            new = download(file, folder, base_url=args.base_url, overwrite=args.overwrite)
            how = "downloaded" if new else "already there"
            checked = "verified" if file.sha256 else "of the shape expected; its SHA-256 is unknown"
            say(f"{folder / file.name}: {how}, {checked}")
    except DownloadError as error:
        print_error("download.py", error)
        return 1
    except OSError as error:
        where = error.filename or args.output or ROOT
        print_error("download.py", f"{where}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    protect_output()
    sys.exit(main())
