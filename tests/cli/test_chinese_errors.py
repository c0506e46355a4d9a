"""What is refused or warned of, in Chinese: flags, files, models, texts, memory."""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from in_chinese import PLAN, ZH, answer
from running import ROOT, pretrain, write_labelled, write_model, write_stories

import minllama.training.setup as setups
from config import LlamaConfig, parse_options
from llama import Llama, model_payload
from minllama.cli.chinese import language
from minllama.cli.command_line import parse_or_exit
from minllama.formats.pt_file import save_pt
from minllama.training import pretraining
from tokenizer import Tokenizer, train_vocabulary

pytestmark = pytest.mark.usefixtures("own_folder_and_language")


def refused(line: str, capsys: pytest.CaptureFixture) -> list[str]:
    """What a command line is refused with, before anything runs."""
    with pytest.raises(SystemExit) as ended:
        parse_or_exit(parse_options, "run_llama.py", ["--lang", "zh", *line.split()])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()


FLAGS_MISUSED = {
    "--foo": "--foo：没有这个参数；--help 列出全部参数",
    "--option pretrain --learning-rate 3": "--learning_rate：没有这个参数；是不是 --pretrain_lr？",
    "pretrain": "pretrain：不属于任何参数；是不是 --option pretrain？",
    "novel.txt": "novel.txt：不属于任何参数；参数以 -- 开头",
    "--epochs x": "--epochs：'x' 不是整数",
    "--lr x": "--lr：'x' 不是数字",
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
