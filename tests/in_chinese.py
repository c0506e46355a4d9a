"""The console in Chinese: what a command prints, and a text to train on."""

from __future__ import annotations

from running import command

from minllama.system.signals import StopRequest

ZH = "今天天气很好。我们去公园散步吧，看看花。\n"
PLAN = "--option pretrain --plan --save_dir x --cache_dir cache --pretrain_data"


def answer(line: str, *, stop: StopRequest | None = None) -> str:
    """All that a command prints in Chinese."""
    done = command(f"{line} --lang zh", stop=stop)
    return done.out + done.error
