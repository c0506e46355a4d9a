"""minllama/text/find_files.py: which files of a folder are read, and what is said of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minllama.system.errors import UsageError
from minllama.text.find_files import find_text_files


def made(folder: Path, **sizes: int) -> Path:
    """A folder with files of so many letters; `__` in a name is a `/`, `_` before its end a `.`."""
    for name, size in sizes.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a" * size, encoding="utf-8")
    return folder


def names(*patterns: object) -> list[str]:
    return [path.name for path in find_text_files([str(pattern) for pattern in patterns])]


def test_a_folder_s_tables_and_packed_texts_are_found(tmp_path: Path, capsys) -> None:
    """Also in folders of it; a .csv is often a list of the others, and is read if it is named."""
    sizes = dict.fromkeys(
        "a_txt b_jsonl_zst c_txt_xz d_parquet sub__e_arrow f_feather g_jsonl_bz2 H_TXT_GZ".split(),
        9,
    )
    folder = made(tmp_path / "x", **sizes, z_csv=1)
    expected = "H.TXT.GZ a.txt b.jsonl.zst c.txt.xz d.parquet f.feather g.jsonl.bz2 e.arrow"
    assert names(folder) == expected.split()
    assert "1 .csv skipped" in capsys.readouterr().out
    assert names(folder / "*.csv", folder / "**" / "*.arrow") == ["z.csv", "e.arrow"]


@pytest.mark.parametrize(
    ("sizes", "pattern"),
    [
        ({"a_md": 99, "sub__b_md": 99, "c_txt": 9}, "**/*.md"),
        ({"a_md": 99, "b_md": 99, "c_txt": 9}, "*.md"),
        ({f"AA__wiki{n:02}": 99 for n in range(50)} | {"README_txt": 9}, "**/wiki*"),
        ({"one": 500, "two": 500, "c_txt": 9}, "*"),
        ({"a_csv": 500, "c_txt": 9, "d_png_gz": 9}, "*.csv"),
    ],
)
def test_a_folder_whose_text_would_be_skipped_stops(sizes, pattern, tmp_path: Path) -> None:
    """502 files without a suffix were skipped for the README beside them; the glob matches them."""
    folder = made(tmp_path / "x[1]", **sizes)
    with pytest.raises(
        UsageError, match="bytes of text in the folder, and would be skip"
    ) as raised:
        names(folder)
    shown = str(raised.value).split("'")[1]
    assert shown.endswith(f"/{pattern}") or "\\" in shown
    kind = next(iter(sizes)).rpartition("__")[2].replace("_", ".")
    assert kind in names(shown) and len(names(shown)) >= len([s for s in sizes.values() if s > 9])


def test_text_that_is_skipped_is_named_by_the_pattern_that_reads_it(tmp_path: Path, capsys) -> None:
    """Notes in .md were counted beside pictures; named, too, they were still said to be skipped."""
    folder = made(tmp_path / "x", a_txt=99, notes__b_md=9, notes__c_md=9)
    (folder / "d.png").write_bytes(b"\x89PNG\r\n" + bytes(100))
    assert names(folder) == ["a.txt"]
    line = capsys.readouterr().out.replace("\n", " ")
    assert "2 .md, 1 .png skipped" in line and "/**/*.md'" in line
    assert names(folder, folder / "**" / "*.md") == ["a.txt", "b.md", "c.md"]
    line = capsys.readouterr().out
    assert "1 .png skipped" in line and ".md" not in line


def test_pictures_are_no_text_that_is_skipped(tmp_path: Path, capsys) -> None:
    folder = made(tmp_path / "x", a_txt=9)
    (folder / "a.png").write_bytes(b"\x89PNG\r\n" + bytes(10**5))
    (folder / "b.bin").write_bytes(bytes(range(256)) * 1000)
    assert names(folder) == ["a.txt"]
    assert "1 .png, 1 .bin skipped" in capsys.readouterr().out


def test_a_folder_of_save_to_disk(tmp_path: Path, capsys) -> None:
    """What `datasets` keeps of earlier work is no data; all splits are read, and said."""
    folder = made(tmp_path / "x", **{"train__data-0-of-1_arrow": 9, "train__cache-12_arrow": 9})
    made(folder, test__data_arrow=9, train__state_json=1, train__dataset_info_json=1)
    assert names(folder / "train") == ["cache-12.arrow", "data-0-of-1.arrow"]
    (folder / "train" / "dataset.info.json").rename(folder / "train" / "dataset_info.json")
    assert names(folder / "train") == ["data-0-of-1.arrow"]
    splits = json.dumps({"splits": ["train", "test"]})
    (folder / "dataset_dict.json").write_text(splits, encoding="utf-8")
    assert names(folder) == ["data.arrow", "data-0-of-1.arrow"]
    assert "all of its splits are read (train, test)" in capsys.readouterr().out
