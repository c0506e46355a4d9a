"""Command lines, files and servers that nobody means well with, of `attacker`, `hostile_texts`.

A review's own attack ended in 22 tracebacks of 943 calls, ran code from a checkpoint, wrote beyond
a tensor's end and filled the memory from a file of 6 kB.
"""

from __future__ import annotations

import os

import attacker
import hostile_texts
import pytest
from survivor import Tally

pytestmark = pytest.mark.skipif(os.name == "nt", reason="its attacks are made of links and pipes")


def assert_all_held(tally: Tally) -> None:
    assert not tally.failures, "\n".join(tally.failures[:3])


def test_some_random_command_lines(tmp_path):
    """Each ends as it should and says why."""
    assert_all_held(attacker.command_lines(tmp_path, 20))


def test_some_hostile_files(tmp_path):
    """One of each kind."""
    assert_all_held(attacker.hostile_files(tmp_path, 20))


def test_some_hostile_texts(tmp_path):
    """Three of each kind: JSON, dialogues, labels, TOML, names, a server."""
    assert_all_held(hostile_texts.hostile_texts(tmp_path, 27))


@pytest.mark.soak
def test_a_thousand_random_command_lines(tmp_path):
    """The same, with flags and values of all kinds."""
    assert_all_held(attacker.command_lines(tmp_path, 1000, seed=1))


@pytest.mark.soak
def test_five_hundred_hostile_files(tmp_path):
    """The same, every node and byte of them hurt in turn."""
    assert_all_held(attacker.hostile_files(tmp_path, 500, seed=1))


@pytest.mark.soak
def test_nine_hundred_hostile_texts(tmp_path):
    """The same, a hundred of each kind."""
    assert_all_held(hostile_texts.hostile_texts(tmp_path, 900, seed=1))


FOUND = (
    "--option prompt --train ",  # "PosixPath('.') has an empty name"
    "--option prompt --train toy-train.txt --dev toy-train.txt --dev_out link",  # a circle
    "--option finetune --train toy-train.txt --dev toy-train.txt --lora_rank 100000000",
)


def test_what_the_attack_found(tmp_path):
    """Each ended in a traceback, the last one because Linux words a lack of memory otherwise."""
    attacker.write_place(tmp_path / "place")
    lines = [["--pretrained_model_path", "model.pt", *words.split(" ")] for words in FOUND]
    tally = attacker.run_task(
        attacker.Attack("found", attacker.copy_of(tmp_path, number), "run_llama.py", line)
        for number, line in enumerate(lines)
    )
    assert_all_held(tally)
    assert tally.tried.total() == len(FOUND)


def test_the_judge_sees_what_went_wrong(tmp_path):
    """A test that cannot fail would prove nothing."""
    one = attacker.Attack("any", tmp_path, "run_llama.py", [], True, (("mine", b"x"),))
    (tmp_path / "mine").write_bytes(b"x")
    output = tmp_path / "output.txt"
    for status, text, said in (
        (0, "fine", None),
        (2, "run_llama.py: error: --x", None),
        (2, "", "says nothing"),
        (1, "Traceback (most recent call last)", "exit 1"),
        (-11, "", "exit -11"),
        (None, "", "did not end"),
        (0, "\x1b[31m", "raw control characters"),
        (0, "\x9b31m", "raw control characters"),
        (0, f"a\n{attacker.FORGED}", "lets a line be forged"),
        (0, f"a\r{attacker.FORGED}", "lets a line be forged"),
        (0, f"a\\n{attacker.FORGED}", None),
        (130, "interrupted", "works for more than"),
    ):
        output.write_text(text, encoding="utf-8")
        found = attacker.judge(one, status)
        assert (found is None) == (said is None) and (said or "") in (found or "")
    (tmp_path / "mine").write_bytes(b"y")
    assert "costs mine" in attacker.judge(one, 0)
    (tmp_path / attacker.MARKER).touch()
    assert "executed code" in attacker.judge(one, 0)
