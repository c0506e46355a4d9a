"""What a run says in Chinese, from its plan to its end, and what can be done then."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from in_chinese import ZH, answer
from running import (
    assert_same_run,
    command,
    evaluate_as,
    pretrain,
    stop_after,
    write_dialogues,
    write_labelled,
    write_model,
    write_stories,
)

import minllama.runs.plan as plans
import minllama.training.setup as setups
from minllama.cli.chinese import LABEL_COLUMNS, columns_of, read_language, translate
from minllama.cli.console import say
from minllama.inference.repeating import repeat_line
from minllama.machine.ranks import Ranks
from minllama.runs.advice import Outcome, advise
from minllama.runs.run_folder import RunFolder
from minllama.text.copies import Copies
from minllama.training.deadline import Deadline

pytestmark = pytest.mark.usefixtures("own_folder_and_language")


def test_a_run_from_its_plan_to_its_end_and_after():
    """Labels are aligned; what is resumed wrongly is said with the flag that helps."""
    write_stories(Path())
    done = pretrain("--epochs 2 --optimizer adamw --lang zh")
    assert done.status == 0
    plan, _, end = done.out.partition("\n模型写的一段文字：\n")
    labelled = re.findall(r"(?m)^((\w+) {2,})\S", plan)
    assert {columns_of(start) for start, _ in labelled} == {LABEL_COLUMNS}
    names = "设备 词表 文本 验证集 模型 数据 步数 学习率 内存 文件 磁盘 时间 编译".split()
    assert [name for _, name in labelled] == names
    assert re.search(r"\n文本         [\d,]+ 个 token，平均每个 \d\.\d\d 字节\n", plan)
    assert re.search(r"\n验证集       留出 [\d,]+ 个 token（占 \d\.\d%）\n", plan)
    assert re.search(
        r"\n时间         训练大约 \d+ s，每秒 [\d,]+ 个 token（按实测的几步推算）\n", plan
    )
    assert re.search(r"\n验证集困惑度：训练前 [\d,.]+，30 步后 [\d.]+\n", end)
    assert re.search(
        r"\n评价         验证集每字节 [\d.]+ 比特（越低越好）；gzip [\d.]+，xz [\d.]+"
        r"（只压缩这 [\d,]+ 字节，没见过训练文本）\n",
        end,
    )
    assert re.search(r"\n照抄         of 20 texts", end)
    assert "\n写得不通时：调 --temperature 和 --top_p（越低越稳，越高越多样）\n" in end
    assert re.search(
        r"\n共训练 [\d.]+k? 个 token，相当于把 [\d.]+k? 个 token 的文本读了 [\d.]+ 遍，"
        r"平均每个参数 [\d.]+ 个；最后训练集 loss \d\.\d\d，验证集 loss \d\.\d\d\n"
        r"最有帮助的是：.*[一-鿿].*\n",
        end,
    )
    assert re.search(r"\n文件：\n +[\d.]+ kB  run.final-model.pt\n", end)
    assert "\n接下来：\n  python " in end and "--option generate" in end
    assert "\n照这样再训练一次：\n  python " in end and "--epochs 4" in end
    said = pretrain("--epochs 5 --save_dir more --lang zh").out
    assert "\n照这样再训练一次（MORE.txt：你要加的文本）：\n  python " in said

    again = pretrain("--lang zh").error
    assert again == (
        "run_llama.py: 错误：--save_dir run 里已经有一次训练（final-model.pt）：加 --resume auto "
        "继续训练，加 --overwrite 删除它的文件，或者换一个文件夹\n"
    )
    ended = pretrain("--resume auto --epochs 2 --lang zh").out
    assert re.search(r"^继续训练     run.pretrain-epoch-2.pt, made after step 30\n", ended)
    assert (
        "\n没有剩下的步数，只重新写出最后的文件：训练已在第 30 步结束；"
        "把 --epochs 调大可以继续训练\n"
    ) in ended
    with RunFolder(Path("run"), "pretrain").locked(Ranks()):
        busy = pretrain("--resume auto --lang zh").error
    assert re.fullmatch(
        rf"run_llama.py: 错误：--save_dir run：process {os.getpid()} on \S+ 正在这里训练："
        "等它结束，或者换一个文件夹\n",
        busy,
    )
    write_stories(Path(), count=8)
    changed = pretrain("--resume auto --epochs 3 --lang zh").error
    assert re.fullmatch(
        r"run_llama.py: 错误：训练文本与开始训练时不同"
        r" \([\d,]+ tokens to train on now, [\d,]+ then\)："
        r"继续训练只能用原来的数据。要用现在的数据接着训练它的模型：python \S+ --option pretrain "
        r"--pretrained_model_path run.final-model.pt .*\n",
        changed,
    )


def test_a_chinese_text_from_its_plan_to_a_chat():
    """Nothing that a reader of Chinese has to decide by is left in English."""
    Path("小说").mkdir()
    lines = [
        f"第{i}天，{name}去了{place}。" for i in range(9) for name in "甲乙丙" for place in "山水"
    ]
    Path("小说/一.txt").write_text("\n".join(lines * 40), encoding="gb18030")
    Path("小说/二.txt").write_text(ZH * 60, encoding="utf-8")
    line = "--option pretrain --pretrain_data 小说 --encoding gb18030 --cache_dir cache"
    done = command(f"{line} --minutes 0.1 --save_dir model --max_seq_len 32 --lang zh")
    assert done.status == 0
    for said in (
        r"设备         CPU，\d+ 个线程",
        r"词表         没有用 --tokenizer_model 指定，在这些文本上训练一个",
        r"词表         [\d,]+ 个 token，由这些文本训练，保存在 cache.+\.model",
        r"编码         1 as gb18030 .+ 1 as utf-8 .+：先看 BOM，再试 UTF-8，最后按 --encoding",
        r"时限         一共 0.1 分钟，其中训练 \d+ s；据此选择了下面各项（写了参数的除外）：",
        r"批次         --max_seq_len .+：每秒 [\d.]+k? 个 token，[\d,]+ 步训练 [\d.]+\w? 个，"
        r"共 [\d.]+ 轮",
        r"模型         [\d,]+ 个参数：embedding .+",
        r"数据         [\d,]+ 个 token，分成 [\d,]+ 条，每条最多 32 个",
        r"步数         每轮 \d+ 步 x [\d.]+ 轮 = [\d,]+ 步，每步 \d+ 条（\d+ x \d+）；预热 \d+ 步",
        r"学习率       最高 [\d.]+，按 linear 降到 0；muon .+，weight decay [\d.]+，适合这么多"
        r"文本（否则用 --weight_decay 0.1）",
        r"训练安排     --schedule_steps .+；速度变化时，步数随之增减",
        r"正则化       --dropout .+，共 [\d.]+ 轮；--early_stopping 3",
        r"内存         \w+，共 [\d.]+ MB：weights .+；可用 .+",
        r"文件         权重 [\d.]+ [kM]B（float32），用于继续训练的检查点 [\d.]+ [kM]B"
        r"（float32 权重和优化器状态）",
        r"磁盘         最多 [\d.]+ [kM]B：.+",
        r"编译         不编译：大约能省 \d+ s，编译却要 35 s",
        r"时间         一共 0.1 分钟，不论多少步（--minutes）",
        r"最有帮助的是：.*[一-鿿].*",
        r"    DIALOGUES.jsonl：每行写一个 \{.+\}",
    ):
        assert re.search(f"(?m)^{said}$", done.out), (said, done.out)
    turns = [
        {"prompt": f"{name}去了哪里？", "response": f"{name}去了山。"} for name in "甲乙丙" * 8
    ]
    Path("对话.jsonl").write_text("\n".join(map(json.dumps, turns)), encoding="utf-8")
    line = "--option finetune --pretrained_model_path model --train 对话.jsonl --test 对话.jsonl"
    tuned = answer(f"{line} --epochs 2 --save_dir chat")
    for said in (
        r"--pretrained_model_path model 是文件夹：使用其中的 model.(best|final)-model.pt",
        r"学习率       [\d.]+，适合微调宽度 \d+ 的模型（--lr）",
        r"验证集       留出 1 段对话",
        r"数据         \d+ 个 token，分成 \d+ 条，每条最多 \d+ 个",
        r"步数         每轮 3 步 x 2 轮 = 6 步，每步 8 条（8 x 1）；预热 \d+ 步",
        r"提示：6 步太少，学不会回答：--epochs \d+ 有 [\d,]+ 步",
        r"它的回答：",
        r"测试：24 个回答中有 \d+ 个与 对话.jsonl 逐字相同（[\d.]+%）",
    ):
        assert re.search(f"(?m)^{said}$", tuned), (said, tuned)
    said = answer("--option generate --save_dir model --prompt 今天 --max_new_tokens 2")
    assert re.search(
        "没有写 --pretrained_model_path：使用 --save_dir 里的 model.\\w+-model.pt", said
    )
    line = (
        "error: the text has changed since the run was started: a run is resumed with the data "
        "that it was started with. This trains its model on with what there is now: python run.py"
    )
    assert translate(line, sys.stdout) == (
        "错误：训练文本与开始训练时不同：继续训练只能用原来的数据。"
        "要用现在的数据接着训练它的模型：python run.py"
    )


def test_that_a_run_is_compiled_is_said(monkeypatch):
    """With the time that it saves and takes; here torch's compiler itself is left out."""
    write_stories(Path(), count=8)
    monkeypatch.setattr(plans, "COMPILED_SAVES", {"cpu": 1e6})
    monkeypatch.setattr(setups, "compiler_problem", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)
    done = pretrain("--max_steps 1 --lang zh")
    assert re.search(r"(?m)^编译         先编译：大约能省 .+，编译要 35 s$", done.out)


def advised(outcome: Outcome, *, rose: bool = False) -> str:
    """What would help most, in Chinese."""
    return translate(advise(outcome, rose=rose)[1], sys.stdout)


def test_what_would_help_most():
    """Each remedy that there is."""
    read_language(["--lang", "zh"])
    usual = Outcome(parameters=100, tokens=2000, distinct=2000, train_loss=2.0, val_loss=2.0)

    def other(**changes) -> Outcome:
        return dataclasses.replace(usual, **changes)

    own = Copies("words", {16: (9, 10)}, {16: (0, 10)})
    for outcome, rose, said in (
        (other(tokens=100, is_timed=True), False, "增大 --minutes：以模型的大小，读过的还太少"),
        (other(tokens=100, is_cut=True), False, "增大 --max_steps：以模型的大小，读过的还太少"),
        (
            other(tokens=100),
            False,
            "训练更久（--epochs 或 --minutes）：以模型的大小，读过的还太少",
        ),
        (
            other(tokens=8000, train_loss=1.0),
            False,
            "增加文本：模型对现有文本过拟合了；其次是 --dropout 0.2",
        ),
        (
            other(tokens=8000, train_loss=1.0, dropout=0.2),
            False,
            "增加文本：模型对现有文本过拟合了",
        ),
        (other(copies=own), False, "增加文本：它写的大部分是原文照抄"),
        (other(tokens=20000), False, "增加文本：现有文本已经读了 10 遍"),
        (other(is_timed=True), True, "增加文本；否则用更小的模型，或 --dropout 0.2"),
        (usual, True, "增加文本；否则减少轮数或用更小的模型，或 --dropout 0.2"),
        (other(is_timed=True, dropout=0.2), True, "增加文本；否则用更小的模型"),
        (other(dropout=0.2), True, "增加文本；否则减少轮数或用更小的模型"),
        (
            other(tokens=20000, distinct=20000),
            False,
            "更大的模型（--dim、--n_layers）：以现在的大小，已经读得很多",
        ),
        (usual, False, "同时增加文本和训练"),
    ):
        assert advised(outcome, rose=rose) == f"最有帮助的是：{said}"


def test_a_run_that_is_overfitted(monkeypatch):
    """From which step on, and which model is the result; of a chat what would help.

    Its perplexities were left in English: the row had no place for the one at the end.
    """
    write_stories(Path())
    evaluate_as(monkeypatch, 9, 3, 2, 2.5, 2.6, 2.7, 2.8)
    said = pretrain("--eval_interval 2 --early_stopping 3 --lang zh").out
    assert re.search(
        r"\n从第 4 步起过拟合：验证集 loss 那时最低，之后上升。run.best-model.pt 是那一步的模型\n",
        said,
    )
    assert "提前结束：连续 3 次验证，验证集 loss 没有变好\n" in said
    assert re.search(r"\n验证集困惑度：训练前 [\d,.]+，4 步后 7.39，10 步后 14.88\n", said)
    write_dialogues(Path())
    write_model(Path())
    line = "--option finetune --pretrained_model_path model.pt --train chat.jsonl --epochs 4"
    for more, advice in (
        (
            "--save_dir a",
            "增加对话，同一件事换几种问法；"
            "如果每段对话讲的事各不相同，用 --val_fraction 0 全部训练",
        ),
        ("--save_dir b --dev chat.jsonl", "增加对话，同一件事换几种问法"),
    ):
        evaluate_as(monkeypatch, 9, 3, 2, 2.5, 2.6)
        assert f"\n从第 4 步起过拟合：{advice}\n" in answer(f"{line} {more}")


@pytest.mark.parametrize("noun", ["chunks", "dialogues", "sentences"])
def test_steps_that_are_cut_short(noun):
    """`--max_steps` stood in the middle of the row: `预热 20, ended after 60 by --max_steps 步`."""
    read_language(["--lang", "zh"])
    line = f"81 per epoch x 5 epochs = 405, of 8 {noun} (8 x 1 accumulated); warmup 20"
    assert translate(f"steps        {line}, ended after 60 by --max_steps", sys.stdout) == (
        "步数         每轮 81 步 x 5 轮 = 405 步，每步 8 条（8 x 1）；预热 20 步；"
        "--max_steps：60 步后结束"
    )


def test_a_machine_that_changes_its_speed_and_texts_that_repeat(capsys):
    """Said where they are found."""
    read_language(["--lang", "zh"])
    say("             more than 20 epochs teach a text by heart: the run ends before its time")
    assert capsys.readouterr().out == f"{' ' * 13}超过 20 轮只会把原文背下来，所以提前结束\n"
    say("shape        --dim 64: of 2 timed here the least loss expected")
    assert capsys.readouterr().out == "模型大小     --dim 64：实测了 2 种，预计它的 loss 最低\n"
    say(
        "note: 9 steps are few to learn in: more come from --minutes, a smaller "
        "--pretrain_batch_size and a shorter --max_seq_len"
    )
    assert capsys.readouterr().out == (
        "提示：9 步太少，学不到多少：增大 --minutes，减小 --pretrain_batch_size 和 --max_seq_len "
        "可以增加步数\n"
    )
    Deadline(60, 0.0).note_end(10, 100, 200)
    assert capsys.readouterr().out == (
        "速度变了：改为 200 步（原来 100 步），按时结束，学习率随之调整\n"
    )
    counts = {length: (0, 1567) for length in (8, 16, 32)}
    copies = Copies("characters", counts, counts, 10, "什么？”袭人", "小说/一.txt, document 1")
    say(*copies.lines("20 texts that it wrote after held-out openings"))
    head, *_, row, longest = capsys.readouterr().out.splitlines()
    assert head == "照抄         它接着验证集的开头写了 20 段文字，其中与原文逐字相同的："
    assert row == f"{' ' * 13}连续 32 个字：0.0% (0 of 1,567)；验证集本身 0.0% (0 of 1,567)"
    assert longest == f'{" " * 13}最长：10 个字："什么？”袭人"（小说/一.txt, document 1）'
    rows = [("--temperature 0.8", "0.1% (2 of 1,647)")]
    for why, said in (
        (
            "it does where always the likeliest word is taken, and not at --temperature 0.8",
            "：总取最可能的字时会重复，用 --temperature 0.8 时不会",
        ),
        (
            "it does where always the likeliest word is taken, and not at --temperature 0.8, nor "
            "with --repetition_penalty 1.1",
            "：总取最可能的字时会重复，用 --temperature 0.8 或 --repetition_penalty 1.1 时不会",
        ),
        ("it does not", "：没有重复自己"),
    ):
        say(repeat_line([("in short", why), *rows], "characters"))
        assert capsys.readouterr().out == (
            f"重复         同一段里重复出现的 4 个字：0.1% --temperature 0.8{said}\n"
        )


def test_a_chat(monkeypatch):
    """Its model, and how one talks with it."""
    write_dialogues(Path())
    write_model(Path())
    train = "--option finetune --pretrained_model_path model.pt --train chat.jsonl --epochs 1"
    assert command(f"{train} --save_dir chat").status == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    said = answer("--option generate --save_dir chat --interactive")
    assert re.search(
        "没有写 --pretrained_model_path：使用对话模型 chat.finetune-chat-best-model.pt\n", said
    )
    assert "请提问。Ctrl-C 中止回答，Ctrl-D 结束对话；/help 列出命令。\n" in said


def test_a_run_that_is_stopped_and_one_of_minutes(monkeypatch):
    """The commands that go on and repeat have --lang where it was typed, and not by the locale."""
    write_stories(Path())
    for lang in ("--lang zh", ""):
        monkeypatch.setenv("LC_MESSAGES", "zh_CN.UTF-8")
        read_language(["--lang="])
        with monkeypatch.context() as patch:
            stopped = pretrain(f"--overwrite {lang}", stop=stop_after(2, patch)).out
        head, command_line = stopped.splitlines()[-2:]
        assert head == "已在第 2 步停止并保存；继续训练："
        assert ("--lang" in command_line) == bool(lang)
    line = "--option pretrain --pretrain_data text.jsonl --cache_dir cache --minutes 0.1"
    done = command(f"{line} --save_dir timed --sample_tokens 0")
    assert done.status == 0
    labels = re.findall(r"(?m)^(时限|批次|学习率|训练安排|正则化) +", done.out)
    assert labels[:5] == ["时限", "批次", "学习率", "训练安排", "正则化"]
    again = done.out.partition("\n重复这次训练（按步数，不按时间）：\n  python ")[2]
    assert "--schedule_steps" in again and "--lang" not in again


def test_the_best_model_of_a_finetuning():
    write_model(Path())
    line = f"{write_labelled(Path())} --option finetune --pretrained_model_path model.pt"
    said = answer(f"{line} --epochs 1 --save_dir tuned")
    best = re.escape(str(Path("tuned", "finetune-toy-best-model.pt")))
    assert re.search(rf"\n\n最好的模型：{best}，第 \d+ 步（第 1 轮）\n", said)


def test_the_language_changes_no_result():
    """The same weights and records bit for bit; files are English; it is no part of a run."""
    write_stories(Path())
    assert pretrain("--max_steps 4").status == 0
    assert pretrain("--max_steps 4 --save_dir zh --lang zh").status == 0
    assert_same_run("run", "zh", "pretrain-step-4.pt")
    for name in ("run.json", "metrics.jsonl", "report.html"):
        text = Path("zh", name).read_text(encoding="utf-8")
        assert not re.search("[一-鿿]", text), name
    assert pretrain("--save_dir zh --resume auto --max_steps 5 --lang en").status == 0
