"""minllama/cli/console.py: bars and status lines, in a terminal of a given width and in a log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import pretrain, write_stories

from minllama.cli.console import TimedBar, human_size, human_time, say
from minllama.training import loop

ROOT = Path(__file__).resolve().parents[2]
RECORD = {"step": 7, "epoch": 1, "loss": 7.5184, "lr": 1.1e-3, "tokens_per_second": 14_831.0}
BAR = f"""
from minllama.cli.console import show_record, training_bar
bar = training_bar(0, 900)
for step in range(900):
    show_record(bar, {RECORD})
    tick()
bar.close()
"""
PROTECTED = "from minllama.cli.command_line import protect_output; protect_output()\nbar ="
LINES = """
from minllama.cli.console import say
say("model        1,066,112 parameters: embedding 262,144, attention 262,144, feed_forward 540,672",
    "             dim 128, 4 layers", "warning: " + "about 90 GB are needed " * 4)
"""


def in_terminal(columns: int, program: str) -> str:
    """What a Python program shows in a terminal of this many columns."""
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "TQDM_DISABLE")}
    streams = {"stdin": slave, "stdout": slave, "stderr": slave}
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, cwd=ROOT, env=environment, **streams):
        os.close(slave)
        shown = b""
        try:
            while data := os.read(master, 1 << 16):
                shown += data
        except OSError:  # how Linux says that the other side is closed
            pass
    os.close(master)
    return shown.decode().replace("\r\n", "\n")


def test_a_run_that_had_ended_has_no_bar():
    """Resumed, it showed one without any figures, twice: `? left |...| 383/383 steps`."""
    program = "from minllama.cli.console import training_bar; training_bar({}, 9).close()"
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    for step in (8, 9):
        words = [sys.executable, "-c", program.format(step)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=True)
        assert (b"left" in done.stderr) == (step < 9)


@pytest.mark.parametrize("left, said", [("lambda: 5.0", "00:05"), ("None", "1:55:30")])
def test_a_run_of_minutes_has_no_more_left_than_those(left, said):
    """Of 15 minutes it said 19:32 left, since its first steps had waited for the compiler."""
    program = (
        f"from minllama.cli.console import training_bar; bar = training_bar(0, 100, {left})\n"
        "bar.last_print_t -= 70; bar.update(); print(bar)"  # one step has taken 70 seconds
    )
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(f"{said} left") and done.returncode == 0


def test_the_first_step_is_not_in_the_speed_of_later_ones(tmp_path, monkeypatch):
    """It has compiled, or taken memory: the bar leaves it out, once a start."""
    monkeypatch.chdir(tmp_path)
    shown, left_out = [], []
    monkeypatch.setattr(TimedBar, "unpause", lambda bar: left_out.append(len(shown)))
    monkeypatch.setattr(loop, "show_record", lambda bar, record: shown.append(record["step"]))
    write_stories(Path(), count=8)
    assert pretrain("--max_steps 2").status == 0 and shown == [1, 2] and left_out == [0]
    assert pretrain("--max_steps 4 --resume auto").status == 0 and left_out == [0, 2]


needs_pty = pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are of Unix")


@needs_pty
@pytest.mark.parametrize("columns", [120, 80, 40])
def test_the_figures_of_a_run_are_seen_at_every_width(columns):
    """Behind tqdm's own figures the learning rate and the speed lay beyond the 80th column."""
    pause = "import time; tick = lambda: time.sleep(0.001)"
    pictures = re.split("[\r\n]", in_terminal(columns, pause + BAR))
    drawn = [picture for picture in pictures if "7.518" in picture]
    assert drawn and max(map(len, drawn)) <= columns
    for picture in drawn:
        assert re.match(r"\d\d:\d\d left,? loss 7\.518,? lr 1\.1e-3,? 14\.8k( tok)?/s", picture)
    assert columns == 40 or "900/900 steps" in drawn[-1]


def in_a_log(program: str) -> tuple[list[str], list[str]]:
    """The lines of stdout and stderr of a Python program, neither of which is a terminal."""
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert b"\r" not in done.stderr
    return done.stdout.decode().splitlines(), done.stderr.decode().splitlines()


def test_a_log_of_a_long_run_has_few_pictures_of_its_bar():
    """One in ten seconds made a megabyte of a day. Here a step takes a second, of a fake clock."""
    clock = """
import tqdm.std
now = [0]
tqdm.std.time = lambda: now[0]
def tick(): now[0] += 1
"""
    _, pictures = in_a_log(clock + BAR)
    assert 900 // 60 <= len(pictures) <= 900 // 60 + 2 and "900/900 steps" in pictures[-1]


def test_an_evaluation_has_lines_of_its_own():
    """In a log the bar was drawn twice more for each of them."""
    found = {"val_loss": 2.5, "val_perplexity": 12345.6, "sample": "One day\n\na fox"}
    lines, pictures = in_a_log(
        f"tick = lambda: 0\n{BAR.replace('900', '3')}".replace(str(RECORD), str(RECORD | found))
    )
    said = "epoch 1, step 7: val loss 2.5000, val perplexity 12,346"
    assert lines == [said, "  One day a fox"] * 3 and len(pictures) <= 2


def test_a_loss_of_zero_is_a_number():
    """It was shown as nan, which is what a loss that is not known is shown as."""
    tick = "tick = lambda: 0\n"
    for loss, shown in ((0.0, "loss 0.000,"), (None, "loss nan,")):
        record = str(RECORD | {"loss": loss})
        _, pictures = in_a_log(tick + BAR.replace("900", "3").replace(str(RECORD), record))
        assert shown in pictures[-1]


@needs_pty
def test_a_sample_draws_nothing_and_the_bar_still_does():
    """Models' text moved the cursor up and wrote over the lines there."""
    record = str(RECORD | {"val_loss": 2.5, "sample": "one\x1b[A\rforged"})
    program = BAR.replace("900", "3").replace(str(RECORD), record).replace("bar =", PROTECTED, 1)
    shown = in_terminal(80, "import time; tick = lambda: time.sleep(0.3)\n" + program)
    lines = shown.split("\n")
    assert sum(line.endswith("  one\\x1b[A forged") for line in lines) == 3
    # The bar is drawn, and cleared before each line.
    assert "\rone" not in shown and "\x1b[A" not in shown and "\\r0" not in shown
    assert all("\r  one" in line or line.startswith("  one") for line in lines if "forged" in line)
    assert "3/3 steps" in re.split("[\r\n]", shown.strip())[-1]


@needs_pty
def test_status_lines_wrap_between_words_and_hang_under_their_text():
    """A terminal breaks long lines in the middle of words, and begins the rest at its edge."""
    lines = in_terminal(60, LINES).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[:3] == [
        "model        1,066,112 parameters: embedding 262,144,",
        "             attention 262,144, feed_forward 540,672",
        "             dim 128, 4 layers",
    ]
    assert lines[4].startswith("  ") and not lines[4].startswith("   ")
    narrow = in_terminal(40, LINES).splitlines()
    assert narrow[1].startswith("  embedding") and max(map(len, narrow)) <= 40


def test_lines_that_a_program_reads_are_whole(capsys):
    """Wrapped ones could not be searched."""
    say("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"


def test_a_name_makes_no_line_of_its_own(capsys):
    """A file's name, or a label of a model, that holds a line's end could say what it liked."""
    say("Loaded 3 dialogues from a\nbest model: 1.0\r.jsonl")
    assert capsys.readouterr().out == "Loaded 3 dialogues from a\\nbest model: 1.0\\r.jsonl\n"


def test_sizes_and_times_as_people_read_them():
    """Three digits, decimal units."""
    assert [human_size(n) for n in (0, 999, 1000, 226e6, 1.17e9)] == [
        "0 B", "999 B", "1 kB", "226 MB", "1.17 GB",
    ]  # fmt: skip
    assert [human_time(s) for s in (45, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]
    assert human_time(98 * 86400 + 21 * 3600) == "98 days 21 h"
