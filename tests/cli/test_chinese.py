"""minllama/cli/chinese.py: each of its rows comes out of the error, or the run, that it is for."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import pytest
import torch
from running import (
    ROOT,
    SMALL,
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
from config import LlamaConfig, parse_options
from llama import Llama, model_payload
from minllama.cli.chinese import (
    LABEL_COLUMNS,
    LABELS,
    LINES,
    columns_of,
    language,
    read_language,
    translate,
)
from minllama.cli.command_line import parse_or_exit
from minllama.cli.console import say, wrapped
from minllama.formats.pt_file import save_pt
from minllama.inference.repeating import repeat_line
from minllama.machine.ranks import Ranks
from minllama.runs.advice import Outcome, advise
from minllama.runs.run_folder import RunFolder
from minllama.system.signals import StopRequest
from minllama.text.copies import Copies
from minllama.training import pretraining
from minllama.training.deadline import Deadline
from tokenizer import Tokenizer, train_vocabulary

ZH = "今天天气很好。我们去公园散步吧，看看花。\n"
PLAN = "--option pretrain --plan --save_dir x --cache_dir cache --pretrain_data"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, and leaves the language to the locale."""
    monkeypatch.chdir(tmp_path)
    yield
    read_language(["--lang="])


def refused(line: str, capsys: pytest.CaptureFixture) -> list[str]:
    """What a command line is refused with, before anything runs."""
    with pytest.raises(SystemExit) as ended:
        parse_or_exit(parse_options, "run_llama.py", ["--lang", "zh", *line.split()])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


def answer(line: str, *, stop: StopRequest | None = None) -> str:
    """All that a command prints in Chinese."""
    done = command(f"{line} --lang zh", stop=stop)
    return done.out + done.error


FLAGS_MISUSED = {
    "--foo": "--foo：没有这个参数；--help 列出全部参数",
    "--option pretrain --learning-rate 3": "--learning_rate：没有这个参数；是不是 --pretrain_lr？",
    "pretrain": "pretrain：不属于任何参数；是不是 --option pretrain？",
    "novel.txt": "novel.txt：不属于任何参数；参数以 -- 开头",
    "--epochs x": "--epochs：'x' 不是整数",
    "--lr x": "--lr：'x' 不是数",
    "--epochs 0": "--epochs：0 太小，至少为 1",
    "--lr 0": "--lr：0 太小，必须大于 0",
    "--epochs": "--epochs：后面缺少值",
    "--option train": "--option：不能是 'train'（可选：*）",
    "--encoding gb2313": "--encoding gb2313：没有这种文本编码；可用 gb18030, big5, utf-16, "
    "cp1252, ...",
    "--tensorboard": "--tensorboard 需要另装一个包：pip install tensorboard",
}


@pytest.mark.parametrize("line", FLAGS_MISUSED)
def test_flags_that_are_wrong(line, capsys, monkeypatch):
    """Said in Chinese though the command line cannot be read."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    beginning, _, end = f"run_llama.py: 错误：{FLAGS_MISUSED[line]}".partition("*")
    (said,) = refused(line, capsys)
    assert said.startswith(beginning) and said.endswith(end) and (end or said == beginning)


def test_two_problems_and_a_file_of_flags(capsys):
    """Each on a line of its own; --lang may stand in the file, and what is typed counts more."""
    assert refused("--foo 3 --bar", capsys) == [
        "run_llama.py: 错误：--foo：没有这个参数；--help 列出全部参数",
        "run_llama.py: 错误：--bar：没有这个参数；--help 列出全部参数",
    ]
    Path("flags.toml").write_text('lang = "zh"\n', encoding="utf-8")
    assert parse_options(["--config", "flags.toml"]).lang == "zh" and language() == "zh"
    words = ["--config", "flags.toml", "--lang=en"]
    assert parse_options(words).lang == "en" and language() == "en"


FILES = {
    "nothere.txt": "--pretrain_data nothere.txt：没有这个文件或文件夹",
    "*.md": "--pretrain_data *.md：没有匹配的文件",
    "zh.txt --tokenizer_model no.model": "--tokenizer_model no.model：没有这个文件",
    "gbk.txt": "gbk.txt:1：字节 0xbd 不是 UTF-8；很可能是 gb18030（'*'）："
    "加上 --encoding gb18030 即可读取",
    "utf16.txt": "utf16.txt：不是 UTF-8；很可能是 utf-16-le（'Hello there\\n'）："
    "加上 --encoding utf-16-le 即可读取",
    "gbk.txt --encoding ascii": "gbk.txt:1：字节 0xbd 不是 ascii；很可能是 gb18030（'*'）："
    "加上 --encoding gb18030 即可读取",
    "a.png": "a.png：是图片，不是文本：请去掉它",
    "a.docx": "a.docx：是 Word 文档（.docx），不是纯文本：请另存为 .txt",
    "a.pdf": "a.pdf：是 PDF，不是纯文本：用 pdftotext FILE FILE.txt 转换",
    "a.epub": "a.epub：是电子书（.epub），不是纯文本：请另存为 .txt",
    "a.zip": "a.zip：是 zip 压缩包，不是纯文本：先解压，再指定解压后的文件夹",
    "empty.txt": "empty.txt：没有可用来训练词表的文本",
    "a.jsonl": "a.jsonl:2：没有字段 'text'（有：content）；用 --text_field 指定文本所在的字段",
    "a.parquet": "a.parquet：读取它需要另装一个包：pip install pyarrow",
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_there_or_of_the_wrong_kind(name, monkeypatch):
    """Whether missing, in another encoding, no text at all, or without the field."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("zh.txt").write_text(ZH, encoding="utf-8")
    Path("gbk.txt").write_text(ZH * 20, encoding="gbk")
    Path("utf16.txt").write_bytes(("Hello there\n" * 20).encode("utf-16-le"))
    Path("a.pdf").write_bytes(b"%PDF-1.4\n\0\1\2\3" * 40)
    Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))
    Path("empty.txt").touch()
    Path("a.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n', encoding="utf-8")
    Path("a.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    for file, inside in (
        ("a.docx", "word/document.xml"),
        ("a.epub", "META-INF/container.xml"),
        ("a.zip", "a.txt"),
    ):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(inside, "words")
    beginning, _, end = f"run_llama.py: 错误：{FILES[name]}".partition("*")
    said = answer(f"{PLAN} {name}").splitlines()[-1]
    assert said.startswith(beginning) and said.endswith(end)


def test_models_and_labels():
    """What is there instead is named; labels have the file that makes them readable."""
    write_model(Path())
    missing = "--pretrained_model_path no.pt：没有这个文件或文件夹；现有的模型：model.pt\n"
    said = answer("--option generate --pretrained_model_path no.pt --prompt a")
    assert said.splitlines(keepends=True)[-1] == f"run_llama.py: 错误：{missing}"
    Path("none").mkdir()
    for name, said in (
        ("none", "--pretrained_model_path none：文件夹里没有模型；现有的模型：model.pt"),
        (
            "x.jsonl",
            "x.jsonl：不是模型文件（.pt、GGUF 或 llama2.c 的 .bin）；Hugging Face 的模型是文件夹",
        ),
    ):
        Path("x.jsonl").write_text("[]" * 300, encoding="utf-8")
        line = f"--option generate --pretrained_model_path {name} --prompt a"
        assert answer(line).endswith(f"run_llama.py: 错误：{said}\n")
    line = f"{write_labelled(Path())} --option finetune --pretrained_model_path model.pt --plan"
    text = Path("toy-train.txt").read_text(encoding="utf-8")
    Path("toy-train.txt").write_text("没有标签\n" + text, encoding="utf-8")
    assert "错误：toy-train.txt:1：没有 ` ||| `；每行应写成 `标签 ||| 句子`\n" in answer(line)
    for label in (2, 1, 0):
        text = text.replace(f"{label} |||", f"{label + 1} |||")
    Path("toy-train.txt").write_text(text, encoding="utf-8")
    assert re.search(
        "错误：--train toy-train.txt：标签是 1 到 3，而标签应从 0 开始：要读取它们，把 "
        r'\{"1": "awful", .+\} 写入 toy-label-mapping.json\n',
        answer(line),
    )


def save_zh_model() -> None:
    """A small model in the folder zh, whose vocabulary was trained on Chinese."""
    Path("zh").mkdir()
    Path("zh/text.txt").write_text(ZH * 50, encoding="utf-8")
    train_vocabulary([Path("zh/text.txt")], Path("zh/zh.model"), vocab_size=290)
    tokenizer = Tokenizer(tokenizer_model=Path("zh/zh.model"))
    model = Llama(LlamaConfig(vocab_size=tokenizer.n_words, dim=16, n_layers=1, n_heads=2))
    model.vocabulary = tokenizer.model_bytes
    save_pt(Path("zh/final-model.pt"), model_payload(model))


def test_vocabularies_that_do_not_fit():
    """The English stories' model on Chinese dialogues, with a better one at hand and without."""
    turn = {"prompt": "今天天气怎样？", "response": "今天天气很好。"}
    lines = [json.dumps(turn, ensure_ascii=False)] * 20
    Path("c.jsonl").write_text("\n".join(lines), encoding="utf-8")
    line = "--option finetune --train c.jsonl --plan --save_dir x"
    said = answer(line)
    problem = r"：--train c.jsonl：模型的词表来自别的文本，这些文本有 \d+% 不在词表里；"
    assert re.search(
        f"错误{problem}这里没有更合适的模型：请用含有这些字的文本预训练一个；"
        "仍要用这一个，就写上 --pretrained_model_path\n",
        said,
    )
    shipped = ROOT / "data" / "stories-tiny.pt"
    said = answer(f"{line} --pretrained_model_path {shipped}")
    assert re.search(f"警告{problem}这里没有更合适的模型：请用含有这些字的文本预训练一个\n", said)
    save_zh_model()
    assert re.search(
        rf"错误{problem}这里更合适的模型：--pretrained_model_path zh.final-model.pt \(\d+%\)；"
        "仍要用这一个，就写上 --pretrained_model_path\n",
        answer(line),
    )
    Path("zh.txt").write_text(ZH * 200, encoding="utf-8")
    said = answer(f"{PLAN} zh.txt --pretrained_model_path {shipped}")
    assert re.search(r"\n上下文       \d+ tokens, for", said)
    assert re.search(
        rf"\n警告：--pretrained_model_path {re.escape(str(shipped))} 的词表里没有这些字，"
        r"\d+% 的文本只能按字节编码，"
        "而模型不能换词表：改用同类文本的模型，或去掉这个参数，用这些文本训练新的词表\n",
        said,
    )


def test_a_text_that_is_too_short_and_a_machine_that_is_too_small(monkeypatch):
    """The plan's warnings, with what they count and the flags that help."""
    monkeypatch.setattr(setups, "available_memory", lambda device: 10**8)
    monkeypatch.setattr(setups, "free_disk", lambda folder: 10**5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    Path("short.txt").write_text("今天天气很好。", encoding="utf-8")
    said = answer(f"{PLAN} short.txt --max_seq_len 64 --use_gpu").splitlines()
    assert "没有验证集：文本太短，留不出一部分；可用 --val_data FILE 指定" in said
    assert "文本比 --max_seq_len 64 还短：只能在一个短块上训练" in said
    assert (
        "提示：5 步太少，学不到多少：增大 --epochs，减小 --pretrain_batch_size 和 --max_seq_len "
        "可以增加步数；写 --minutes 会自动选择它们"
    ) in said
    joined = "\n".join(said)
    assert re.search(
        r"\n警告：大约需要 \d+ MB 内存，而可用的只有 100 MB：试试 --activation_checkpointing，"
        "减小批大小并增大 --gradient_accumulation_steps，或用更小的模型\n",
        joined,
    )
    assert re.search(
        r"\n警告：--save_dir x：磁盘只剩 100 kB，而训练的文件还要占 [\d.]+ MB（.*3 models .*）；"
        "用 .*--save_dtype bfloat16.* 可以减少，或换到更大的磁盘\n",
        joined,
    )
    (device,) = [line for line in said if line.startswith("设备")]
    assert re.fullmatch(
        r"设备         CPU，\d+ 个线程；--use_gpu：没有 torch 能用的 GPU，改用 CPU", device
    )


def test_memory_and_disk_that_end(monkeypatch):
    """While a run is under way."""
    write_stories(Path())

    def fail(error):
        def load(*_, **__):
            raise error

        monkeypatch.setattr(pretraining, "load_texts", load)
        return pretrain("--lang zh").error

    full = OSError(28, os.strerror(28), "run/x")
    assert fail(full) == "run_llama.py: 错误：run/x：磁盘空间不足\n"
    words = "内存（显存）不足：请减小批大小，或用更小的模型"
    assert fail(MemoryError()) == f"run_llama.py: 错误：{words}\n"


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
        r"\n共训练 [\d.]+k? 个 token，是 [\d.]+k? 文本的 [\d.]+ 遍，平均每个参数 [\d.]+ 个；"
        r"最后训练集 loss \d\.\d\d，验证集 loss \d\.\d\d\n最有帮助的是：.*[一-鿿].*\n",
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
        r"（[\d,]+ tokens to train on now, [\d,]+ then）："
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
        r"数据         [\d,]+ 个 token，切成 [\d,]+ 块，每块最多 32 个",
        r"步数         每轮 \d+ 步 x [\d.]+ 轮 = [\d,]+ 步，每步 \d+ 块（\d+ x \d+）；预热 \d+ 步",
        r"学习率       最高 [\d.]+，按 linear 降到 0；muon .+，weight decay [\d.]+，适合这么多"
        r"文本（否则用 --weight_decay 0.1）",
        r"正则化       --dropout .+，共 [\d.]+ 轮；--early_stopping 3",
        r"内存         \w+，共 [\d.]+ MB：weights .+；可用 .+",
        r"文件         权重 [\d.]+ [kM]B（float32），用于继续训练的检查点 [\d.]+ [kM]B"
        r"（float32 权重和优化器状态）",
        r"磁盘         最多 [\d.]+ [kM]B：.+",
        r"编译         不编译：大约能省 \d+ s，编译却要 35 s",
        r"时间         一共 0.1 分钟，不论多少步（--minutes）",
        r"最有帮助的是：.*[一-鿿].*",
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
        r"学习率       [\d.]+，适合宽度 \d+ 的模型学对话（--lr）",
        r"验证集       留出 1 段对话",
        r"数据         \d+ 个 token，\d+ 段对话，每段最多 \d+ 个",
        r"步数         每轮 3 步 x 2 轮 = 6 步，每步 8 段对话（8 x 1）；预热 \d+ 步",
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
        (other(tokens=100, is_timed=True), False, "更大的 --minutes：相对它的大小，读得太少"),
        (other(tokens=100, is_cut=True), False, "更大的 --max_steps：相对它的大小，读得太少"),
        (other(tokens=100), False, "训练更久（--epochs 或 --minutes）：相对它的大小，读得太少"),
        (
            other(tokens=8000, train_loss=1.0),
            False,
            "增加文本：模型对现有的过拟合了；其次是 --dropout 0.2",
        ),
        (
            other(tokens=8000, train_loss=1.0, dropout=0.2),
            False,
            "增加文本：模型对现有的过拟合了",
        ),
        (other(copies=own), False, "增加文本：它写的大部分是原文照抄"),
        (other(tokens=20000), False, "增加文本：现有的已经读了 10 遍"),
        (other(is_timed=True), True, "增加文本；否则用更小的模型，或 --dropout 0.2"),
        (usual, True, "增加文本；否则减少轮数或用更小的模型，或 --dropout 0.2"),
        (other(is_timed=True, dropout=0.2), True, "增加文本；否则用更小的模型"),
        (other(dropout=0.2), True, "增加文本；否则减少轮数或用更小的模型"),
        (
            other(tokens=20000, distinct=20000),
            False,
            "更大的模型（--dim、--n_layers）：相对它的大小，已经读得很多",
        ),
        (usual, False, "同时增加文本和训练"),
    ):
        assert advised(outcome, rose=rose) == f"最有帮助的是：{said}"


def test_a_run_that_is_overfitted(monkeypatch):
    """From which step on, and which model is the result; of a chat what would help."""
    write_stories(Path())
    evaluate_as(monkeypatch, 9, 3, 2, 2.5, 2.6, 2.7, 2.8)
    said = pretrain("--eval_interval 2 --early_stopping 3 --lang zh").out
    assert re.search(
        r"\n从第 4 步起过拟合：验证集 loss 那时最低，之后上升。run.best-model.pt 是那一步的模型\n",
        said,
    )
    assert "提前结束：连续 3 次验证，验证集 loss 没有变好\n" in said
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


@pytest.mark.parametrize("noun, counted", [("chunks", "块"), ("dialogues", "段对话")])
def test_steps_that_are_cut_short(noun, counted):
    """`--max_steps` stood in the middle of the row: `预热 20, ended after 60 by --max_steps 步`."""
    read_language(["--lang", "zh"])
    line = f"81 per epoch x 5 epochs = 405, of 8 {noun} (8 x 1 accumulated); warmup 20"
    assert translate(f"steps        {line}, ended after 60 by --max_steps", sys.stdout) == (
        f"步数         每轮 81 步 x 5 轮 = 405 步，每步 8 {counted}（8 x 1）；预热 20 步；"
        "--max_steps：60 步后结束"
    )


def test_a_machine_that_changes_its_speed_and_texts_that_repeat(capsys):
    """Said where they are found."""
    read_language(["--lang", "zh"])
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


# ---------------------------------------------------------------------------- which language


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8", "LC_MESSAGES": "zh_CN"}, "en"),
        ({"LC_ALL": "", "LANG": "zh_CN"}, "zh"),
    ],
)
def test_the_language_by_locale(variables, expected, monkeypatch):
    """As the C library takes it: LC_ALL, else LC_MESSAGES, else LANG; what is typed counts more."""
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == expected
    for typed in ("en", "zh"):
        read_language(["--option", "generate", f"--lang={typed}"])
        assert language() == typed


@pytest.mark.parametrize(("number", "expected"), [(0x0804, "zh"), (0x0404, "zh"), (0x0409, "en")])
def test_the_language_of_windows(number, expected, monkeypatch):
    """Where no variable names one, that of its windows: Chinese, Taiwan's, English."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    kernel = types.SimpleNamespace(GetUserDefaultUILanguage=lambda: number)
    windows = types.SimpleNamespace(kernel32=kernel)
    monkeypatch.setattr(ctypes, "windll", windows, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert language() == expected


@pytest.mark.parametrize(
    ("encoding", "locale", "expected"),
    [
        ("utf-8", "C", "error: --foo: no such option; --help lists the options"),
        ("utf-8", "zh_CN.UTF-8", "错误：--foo：没有这个参数；--help 列出全部参数"),
        ("gbk", "zh_CN.GBK", "错误：--foo：没有这个参数；--help 列出全部参数"),
        ("cp1252", "zh_CN.UTF-8", "error: --foo: no such option; --help lists the options"),
        ("ascii", "zh_CN.UTF-8", "error: --foo: no such option; --help lists the options"),
    ],
)
def test_output_in_other_encodings(encoding, locale, expected):
    """English where the terminal's encoding has no Chinese, and never a traceback."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LC_")}
    environment |= {"LANG": locale, "PYTHONIOENCODING": encoding}
    words = [sys.executable, str(ROOT / "run_llama.py"), "--foo"]
    done = subprocess.run(words, env=environment, capture_output=True)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.decode(encoding).splitlines() == [f"run_llama.py: {expected}"]


@pytest.mark.parametrize(("encoding", "label"), [("gbk", "词表"), ("cp1252", "vocabulary")])
def test_a_plan_in_other_encodings(encoding, label):
    """The whole plan, of a text whose name the encoding may lack."""
    write_stories(Path()).rename("小说.jsonl")
    environment = os.environ | {"LC_MESSAGES": "zh_CN.UTF-8", "PYTHONIOENCODING": encoding}
    words = ["--option", "pretrain", "--plan", "--pretrain_data", "小说.jsonl", *SMALL]
    words = [sys.executable, str(ROOT / "run_llama.py"), *words]
    done = subprocess.run(words, env=environment, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert f"\n{label} " in done.stdout.decode(encoding)
    assert ("小说.jsonl" if encoding == "gbk" else "??.jsonl") in done.stdout.decode(encoding)


# ---------------------------------------------------------------------------- the table


def test_what_is_unknown_stays_english(capsys):
    """Also where a line only begins like a label, or contains one."""
    read_language(["--lang", "zh"])
    lines = ["models       of another kind", "the text     is long", "text: no label", "no row", ""]
    assert [translate(line, sys.stdout) for line in lines] == lines
    say("warning: of an unknown kind")
    assert capsys.readouterr().out == "警告：of an unknown kind\n"


def test_paths_and_values_stay_as_they_are():
    """Whatever stands in them: braces, words of the table, of another script."""
    read_language(["--lang", "zh"])
    for name in ("{flag}", "text: no such file.txt", "files:", "文件.txt"):
        line = f"error: --train {name}: no such file"
        assert translate(line, sys.stdout) == f"错误：--train {name}：没有这个文件"


def test_rows_are_sound():
    """Each row has the holes of its English; labels leave a gap; the first row hides no later."""
    for english, chinese in LINES.items():
        holes = [set(re.findall(r"\{\w+\}", text)) for text in (english, chinese)]
        assert holes[0] >= holes[1], english
        assert chinese.encode("gbk")  # that of Chinese Windows
    assert len(LABELS) + len(LINES) <= 150
    assert all(columns_of(label) <= LABEL_COLUMNS - 2 for label in LABELS.values())


def test_hostile_lines_take_no_time():
    """An error may quote a file's line; each hole ends where its literal first comes."""
    read_language(["--lang", "zh"])
    for text in (": ", "; ", " (", ": no such file", "{where}", " has no ", " tokens, "):
        start = time.perf_counter()
        translate("error: " + text * 5000 + "x", sys.stdout)
        assert time.perf_counter() - start < 1


def test_lines_wrap_by_columns():
    """A Chinese character takes two; lines break after its punctuation and not in a path."""
    text = "警告：" + "内存不足，请减小批大小，" * 6 + "--save_dir 我的，模型/很长的名字 结束"
    shown = wrapped(text, 40)
    assert all(columns_of(line) <= 40 for line in shown.splitlines())
    assert shown.count("\n") > 4 and "\n  " in shown and "\0" not in shown and "\1" not in shown
    assert re.sub("\n *", "", shown).replace(" ", "") == text.replace(" ", "")
    plan = wrapped("学习率       up to 0.01, then cosine to 0; muon from scratch, weight decay", 60)
    assert plan.splitlines()[1].startswith(" " * LABEL_COLUMNS + "scratch")


def test_that_a_run_is_compiled_is_said(monkeypatch):
    """With the time that it saves and takes; here torch's compiler itself is left out."""
    write_stories(Path(), count=8)
    monkeypatch.setattr(plans, "COMPILED_SAVES", {"cpu": 1e6})
    monkeypatch.setattr(setups, "compiler_problem", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)
    done = pretrain("--max_steps 1 --lang zh")
    assert re.search(r"(?m)^编译         先编译：大约能省 .+，编译要 35 s$", done.out)


def test_every_row_is_held_by_a_test():
    """Its Chinese stands in one of the tests above."""
    tests = Path(__file__).read_text(encoding="utf-8")
    tests = re.sub(r'"\n\s+(?:rf|r|f)?"', "", tests)  # literals in several lines
    for chinese in [*LABELS.values(), *LINES.values()]:
        for part in re.split(r"\{\w+\}", chinese):
            assert part in tests, chinese
