"""The plan's labels, the results and the commonest errors in Chinese: one table.

`say` and `print_error` ask `translate` for each line on its way out; nothing else knows of it. What
the table lacks stays English, and so does what is written into files.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

LABEL_COLUMNS = 13  # of the plan's lines: `text         588,127 tokens`
LABELS = {
    "device": "设备",
    "vocabulary": "词表",
    "context": "上下文",
    "text": "文本",
    "validation": "验证集",
    "minutes": "时限",
    "batch": "批次",
    "rate": "学习率",
    "schedule": "训练安排",
    "repetition": "正则化",
    "model": "模型",
    "data": "数据",
    "steps": "步数",
    "learning": "学习率",
    "memory": "内存",
    "files": "文件",
    "disk": "磁盘",
    "time": "时间",
    "compile": "编译",
    "resuming": "继续训练",
    "verdict": "评价",
    "copies": "照抄",
    "repeats": "重复",
    "shape": "模型大小",
    "encodings": "编码",
    "lr": "学习率",
}
# A hole {name} stays as it is; what stands at {line} is looked up in turn. The first row that fits
# is taken.
LINES = {
    "error: {line}": "错误：{line}",
    "warning: {line}": "警告：{line}",
    "note: {line}": "提示：{line}",
    # Flags.
    "{flag}: no such option; did you mean {ours}?": "{flag}：没有这个参数；是不是 {ours}？",
    "{flag}: no such option; --help lists the options": "{flag}：没有这个参数；--help 列出全部参数",
    "{word}: belongs to no option; did you mean {ours}?": "{word}：不属于任何参数；是不是 {ours}？",
    "{word}: belongs to no option; a flag begins with --": "{word}：不属于任何参数；参数以 -- 开头",
    "{flag}: {value} is not a whole number": "{flag}：{value} 不是整数",
    "{flag}: {value} is not a number": "{flag}：{value} 不是数字",
    "{flag}: {value} must be at least {bound}": "{flag}：{value} 太小，至少为 {bound}",
    "{flag}: {value} must be above {bound}": "{flag}：{value} 太小，必须大于 {bound}",
    "{flag}: expected {n} argument": "{flag}：后面缺少值",
    "{flag}: invalid choice: {value} (choose from {choices})": (
        "{flag}：不能是 {value}（可选：{choices}）"
    ),
    # Files.
    "{where}: no such file or folder; there is {models}": (
        "{where}：没有这个文件或文件夹；现有的模型：{models}"
    ),
    "{where}: no such file or folder": "{where}：没有这个文件或文件夹",
    "{where}: no such file": "{where}：没有这个文件",
    "{where}: matches no file": "{where}：没有匹配的文件",
    "{where}: not UTF-8; {line}": "{where}：不是 UTF-8；{line}",
    "{where}: byte {byte} is not {encoding}; {line}": (
        "{where}：字节 {byte} 不是 {encoding}；{line}"
    ),
    "it is likely {name} ({text}): --encoding {same} reads it": (
        "很可能是 {name}（{text}）：加上 --encoding {same} 即可读取"
    ),
    "--encoding {name}: no text encoding of that name; {names}": (
        "--encoding {name}：没有这种文本编码；可用 {names}"
    ),
    "{file}: is a Word document (.docx), no text: save its words as .txt": (
        "{file}：是 Word 文档（.docx），不是纯文本：请另存为 .txt"
    ),
    "{file}: is a PDF, no text: pdftotext FILE FILE.txt makes text of it": (
        "{file}：是 PDF，不是纯文本：用 pdftotext FILE FILE.txt 转换"
    ),
    "{file}: is an e-book (.epub), no text: save its words as .txt": (
        "{file}：是电子书（.epub），不是纯文本：请另存为 .txt"
    ),
    "{file}: is a zip archive, no text: unpack it, then name the folder": (
        "{file}：是 zip 压缩包，不是纯文本：先解压，再指定解压后的文件夹"
    ),
    "{file}: is an image, no text: leave it out": "{file}：是图片，不是文本：请去掉它",
    "{flag} {folder}: the folder holds no model; there is {models}": (
        "{flag} {folder}：文件夹里没有模型；现有的模型：{models}"
    ),
    "{file}: not a model file: neither .pt nor GGUF nor llama2.c's .bin; a model of Hugging Face "
    "is a folder": (
        "{file}：不是模型文件（.pt、GGUF 或 llama2.c 的 .bin）；Hugging Face 的模型是文件夹"
    ),
    "{file}: no text to train a vocabulary on": "{file}：没有可用来训练词表的文本",
    "{where}: no field {name} (has: {fields}); name it with --text_field": (
        "{where}：没有字段 {name}（有：{fields}）；用 --text_field 指定文本所在的字段"
    ),
    "{where}: no ` ||| `; a line reads `label ||| sentence`": (
        "{where}：没有 ` ||| `；每行应写成 `标签 ||| 句子`"
    ),
    "{where}: its labels count from {first} to {last}, and labels count from 0: to read these, "
    "write {example} into {file}": (
        "{where}：标签是 {first} 到 {last}，而标签应从 0 开始：要读取它们，把 {example} 写入 {file}"
    ),
    "{where}: reading it needs another package: pip install {name}": (
        "{where}：读取它需要另装一个包：pip install {name}"
    ),
    "{flag} needs another package: pip install {name}": "{flag} 需要另装一个包：pip install {name}",
    # The run's folder, the vocabulary, the machine.
    "--save_dir {folder} already holds a run ({file}): add --resume auto to continue it, "
    "--overwrite to remove its files, or name another folder": (
        "--save_dir {folder} 里已经有一次训练（{file}）：加 --resume auto 继续训练，"
        "加 --overwrite 删除它的文件，或者换一个文件夹"
    ),
    "--save_dir {folder}: {holder} is running in it: wait for it or name another folder": (
        "--save_dir {folder}：{holder} 正在这里训练：等它结束，或者换一个文件夹"
    ),
    "the text has changed since the run was started{how}: a run is resumed with the data that it "
    "was started with. This trains its model on with what there is now: {command}": (
        "训练文本与开始训练时不同{how}：继续训练只能用原来的数据。"
        "要用现在的数据接着训练它的模型：{command}"
    ),
    "nothing is left to train, and the last files are written again: the run ended after step "
    "{step}; a larger {flag} lets it continue": (
        "没有剩下的步数，只重新写出最后的文件：训练已在第 {step} 步结束；把 {flag} 调大可以继续训练"
    ),
    "{flag}: {share} of the text has no pieces in the model's vocabulary, which was made for other "
    "text; {line}": "{flag}：模型的词表来自别的文本，这些文本有 {share} 不在词表里；{line}",
    "{line}; to use this one all the same name it: {flag}": "{line}；仍要用这一个，就写上 {flag}",
    "better of those here: {models}": "这里更合适的模型：{models}",
    "no model here has a better one: pretrain one on text with such characters": (
        "这里没有更合适的模型：请用含有这些字的文本预训练一个"
    ),
    "{share} of the text is encoded byte by byte, since the vocabulary of --pretrained_model_path "
    "{model} has no pieces for its characters, and a model keeps its vocabulary: go on from a "
    "model of such text, or leave the flag out to begin with a vocabulary of this text": (
        "--pretrained_model_path {model} 的词表里没有这些字，{share} 的文本只能按字节编码，"
        "而模型不能换词表：改用同类文本的模型，或去掉这个参数，用这些文本训练新的词表"
    ),
    "no validation: the text is too short to hold some of it out; --val_data FILE": (
        "没有验证集：文本太短，留不出一部分；可用 --val_data FILE 指定"
    ),
    "the text is shorter than --max_seq_len {length}: training on one short chunk": (
        "文本比 --max_seq_len {length} 还短：只能在一个短块上训练"
    ),
    "{n} steps are few to learn in: more come from --epochs, a smaller --pretrain_batch_size and a "
    "shorter --max_seq_len; --minutes chooses them": (
        "{n} 步太少，学不到多少：增大 --epochs，减小 --pretrain_batch_size 和 --max_seq_len "
        "可以增加步数；写 --minutes 会自动选择它们"
    ),
    "{n} steps are few to learn in: more come from --minutes, a smaller --pretrain_batch_size and "
    "a shorter --max_seq_len": (
        "{n} 步太少，学不到多少：增大 --minutes，减小 --pretrain_batch_size 和 --max_seq_len "
        "可以增加步数"
    ),
    "{n} steps are few to learn answers in: {flag} makes {enough}": (
        "{n} 步太少，学不会回答：{flag} 有 {enough} 步"
    ),
    "about {needed} of memory are needed and {free} are free: try --activation_checkpointing{more}"
    ", a smaller batch with more --gradient_accumulation_steps, or a smaller model": (
        "大约需要 {needed} 内存，而可用的只有 {free}：试试 --activation_checkpointing{more}，"
        "减小批大小并增大 --gradient_accumulation_steps，或用更小的模型"
    ),
    "out of memory: give a smaller batch or a smaller model": (
        "内存（显存）不足：请减小批大小，或用更小的模型"
    ),
    "--save_dir {folder}: {free} are free on that disk and the run's files take {more} more "
    "({parts}); less with {flags} or a folder on a larger disk": (
        "--save_dir {folder}：磁盘只剩 {free}，而训练的文件还要占 {more}（{parts}）；"
        "用 {flags} 可以减少，或换到更大的磁盘"
    ),
    "{where}: No space left on device": "{where}：磁盘空间不足",
    # After the plan's labels.
    "CPU, {n} threads": "CPU，{n} 个线程",
    "training one on the text, since --tokenizer_model names none": (
        "没有用 --tokenizer_model 指定，在这些文本上训练一个"
    ),
    "{n} pieces: trained on the text, in {file}": "{n} 个 token，由这些文本训练，保存在 {file}",
    "{encodings}: by BOM, else UTF-8, else --encoding": (
        "{encodings}：先看 BOM，再试 UTF-8，最后按 --encoding"
    ),
    "{n} in all, {time} of them to train in; chosen for that, each unless its flag is typed:": (
        "一共 {n} 分钟，其中训练 {time}；据此选择了下面各项（写了参数的除外）："
    ),
    "{flags}: of {n} timed here the least loss expected": (
        "{flags}：实测了 {n} 种，预计它的 loss 最低"
    ),
    "{flags}: at {rate} tokens/s {tokens} tokens in {steps} steps, {epochs} epochs": (
        "{flags}：每秒 {rate} 个 token，{steps} 步训练 {tokens} 个，共 {epochs} 轮"
    ),
    "{n} parameters: {parts}": "{n} 个参数：{parts}",
    "{n} tokens in {sequences} {units} of up to {length}": (
        "{n} 个 token，分成 {sequences} 条，每条最多 {length} 个"
    ),
    "{line}, ended after {last} by --max_steps": "{line}；--max_steps：{last} 步后结束",
    "{n} per epoch x {epochs} epochs = {steps}, of {batch} {units} ({parts} accumulated); "
    "warmup {warmup}": (
        "每轮 {n} 步 x {epochs} 轮 = {steps} 步，每步 {batch} 条（{parts}）；预热 {warmup} 步"
    ),
    "{lr}, for {units} with a model of width {dim} (--lr)": (
        "{lr}，适合微调宽度 {dim} 的模型（--lr）"
    ),
    "{n} of the dialogues held out": "留出 {n} 段对话",
    "up to {lr}, then {schedule} to {low}; {optimizer}, weight decay {decay} for a text of this "
    "size (else {flag})": (
        "最高 {lr}，按 {schedule} 降到 {low}；{optimizer}，weight decay {decay}，"
        "适合这么多文本（否则用 {flag}）"
    ),
    "up to {lr}, then {schedule} to {low}; {optimizer}, weight decay {decay}": (
        "最高 {lr}，按 {schedule} 降到 {low}；{optimizer}，weight decay {decay}"
    ),
    "{flags}: more or fewer steps, where the speed changes": "{flags}；速度变化时，步数随之增减",
    "more than {n} epochs teach a text by heart: the run ends before its time": (
        "超过 {n} 轮只会把原文背下来，所以提前结束"
    ),
    "{flags} for {epochs} epochs; {stopping}": "{flags}，共 {epochs} 轮；{stopping}",
    "{size} in {dtype}: {parts}; {free} available": "{dtype}，共 {size}：{parts}；可用 {free}",
    "weights {weights} ({dtype}), resumable checkpoint {size} (float32 weights and the optimizer's "
    "{moments})": (
        "权重 {weights}（{dtype}），用于继续训练的检查点 {size}（float32 权重和优化器状态）"
    ),
    "{size} at most: {parts}": "最多 {size}：{parts}",
    "off: it would save about {saved} and takes about {time}": (
        "不编译：大约能省 {saved}，编译却要 {time}"
    ),
    "on: it would save about {saved} and takes about {time}": (
        "先编译：大约能省 {saved}，编译要 {time}"
    ),
    "{n} min in all, whatever the steps (--minutes)": "一共 {n} 分钟，不论多少步（--minutes）",
    "{n} tokens, {bytes} bytes per token": "{n} 个 token，平均每个 {bytes} 字节",
    "{n} tokens held out ({share} of all)": "留出 {n} 个 token（占 {share}）",
    "about {time} of training, at {rate} tokens/s (by steps timed here)": (
        "训练大约 {time}，每秒 {rate} 个 token（按实测的几步推算）"
    ),
    "CPU, {n} threads; --use_gpu: no GPU that torch can use was found, so the CPU is used": (
        "CPU，{n} 个线程；--use_gpu：没有 torch 能用的 GPU，改用 CPU"
    ),
    # Results.
    "the speed has changed: {n} steps instead of {before} end on time, and the learning rate's "
    "schedule with them": "速度变了：改为 {n} 步（原来 {before} 步），按时结束，学习率随之调整",
    "overfitted from step {n} on: the validation loss was best then and rose since. {file} is the "
    "model of that step": (
        "从第 {n} 步起过拟合：验证集 loss 那时最低，之后上升。{file} 是那一步的模型"
    ),
    "overfitted from step {n} on: {line}": "从第 {n} 步起过拟合：{line}",
    "more dialogues, which ask the same in other words; where each has a fact of its own, "
    "--val_fraction 0 trains on all": (
        "增加对话，同一件事换几种问法；如果每段对话讲的事各不相同，用 --val_fraction 0 全部训练"
    ),
    "more dialogues, which ask the same in other words": "增加对话，同一件事换几种问法",
    "stopped: no better val_loss in {n} evaluations in a row": (
        "提前结束：连续 {n} 次验证，验证集 loss 没有变好"
    ),
    "a sample of what it writes:": "模型写的一段文字：",
    "of {n} texts that it wrote after held-out openings, what stands in the text character for "
    "character (its script has no spaces):": (
        "它接着验证集的开头写了 {n} 段文字，其中与原文逐字相同的："
    ),
    "{n} characters in a row: {share}; of the held-out text {other}": (
        "连续 {n} 个字：{share}；验证集本身 {other}"
    ),
    "longest: {n} characters: {quote} ({place})": "最长：{n} 个字：{quote}（{place}）",
    "4 characters again in the same text: {figures}: it does where always the likeliest word is "
    "taken, and not at {usual}, nor with {penalty}": (
        "同一段里重复出现的 4 个字：{figures}：总取最可能的字时会重复，"
        "用 {usual} 或 {penalty} 时不会"
    ),
    "4 characters again in the same text: {figures}: it does where always the likeliest word is "
    "taken, and not at {usual}": (
        "同一段里重复出现的 4 个字：{figures}：总取最可能的字时会重复，用 {usual} 时不会"
    ),
    "4 characters again in the same text: {figures}: it does not": (
        "同一段里重复出现的 4 个字：{figures}：没有重复自己"
    ),
    "{bits} bits per byte of the held-out text (lower is better); gzip {gzip} and xz {xz} on {n} "
    "bytes of that text alone, without the training text": (
        "验证集每字节 {bits} 比特（越低越好）；"
        "gzip {gzip}，xz {xz}（只压缩这 {n} 字节，没见过训练文本）"
    ),
    "validation perplexity {before} before training, {best} after {n} steps": (
        "验证集困惑度：训练前 {before}，{n} 步后 {best}"
    ),
    "validation perplexity {before} before training, {best} after {n} steps, {last} after {end}": (
        "验证集困惑度：训练前 {before}，{n} 步后 {best}，{end} 步后 {last}"
    ),
    "it read {n} tokens, {epochs} times a text of {size}: {ratio} for each of its parameters; "
    "training loss {loss}, validation loss {val} at the end": (
        "共训练 {n} 个 token，相当于把 {size} 个 token 的文本读了 {epochs} 遍，"
        "平均每个参数 {ratio} 个；"
        "最后训练集 loss {loss}，验证集 loss {val}"
    ),
    "what would help most: {line}": "最有帮助的是：{line}",
    "more training (--epochs or --minutes): it has seen little for its size": (
        "训练更久（--epochs 或 --minutes）：以模型的大小，读过的还太少"
    ),
    "more {flag}: it has seen little for its size": "增大 {flag}：以模型的大小，读过的还太少",
    "more text: the model is overfitted to its own; then --dropout {p}": (
        "增加文本：模型对现有文本过拟合了；其次是 --dropout {p}"
    ),
    "more text: the model is overfitted to its own": "增加文本：模型对现有文本过拟合了",
    "more text: what it writes is in large part its own, word for word": (
        "增加文本：它写的大部分是原文照抄"
    ),
    "more text: it has read its own {n} times": "增加文本：现有文本已经读了 {n} 遍",
    "{line}, or --dropout {p}": "{line}，或 --dropout {p}",
    "more text; else a smaller model": "增加文本；否则用更小的模型",
    "more text; else fewer epochs or a smaller model": "增加文本；否则减少轮数或用更小的模型",
    "a larger model (--dim, --n_layers): this one has read much for its size": (
        "更大的模型（--dim、--n_layers）：以现在的大小，已经读得很多"
    ),
    "more text and more training together": "同时增加文本和训练",
    "where it makes no sense: --temperature and --top_p (lower: safer, higher: more varied)": (
        "写得不通时：调 --temperature 和 --top_p（越低越稳，越高越多样）"
    ),
    "the same run with that:": "照这样再训练一次：",
    "the same run with that ({file}: the text that you add):": (
        "照这样再训练一次（{file}：你要加的文本）："
    ),
    "the same run again, by its steps instead of the clock:": "重复这次训练（按步数，不按时间）：",
    "stopped after step {n}, and saved; continue with:": "已在第 {n} 步停止并保存；继续训练：",
    "best model: {file}, after step {n} (epoch {epoch})": (
        "最好的模型：{file}，第 {n} 步（第 {epoch} 轮）"
    ),
    "files:": "文件：",
    "what it answers:": "它的回答：",
    "test: {n} of {all} answers are those of {file} word for word ({share})": (
        "测试：{all} 个回答中有 {n} 个与 {file} 逐字相同（{share}）"
    ),
    "Ask something. Ctrl-C ends an answer, Ctrl-D the conversation; /help lists commands.": (
        "请提问。Ctrl-C 中止回答，Ctrl-D 结束对话；/help 列出命令。"
    ),
    "--pretrained_model_path is not given: using --save_dir's {file}": (
        "没有写 --pretrained_model_path：使用 --save_dir 里的 {file}"
    ),
    "--pretrained_model_path is not given: using {file}, which is for dialogues": (
        "没有写 --pretrained_model_path：使用对话模型 {file}"
    ),
    "--pretrained_model_path {folder} is a folder: using {file}": (
        "--pretrained_model_path {folder} 是文件夹：使用其中的 {file}"
    ),
    "next:": "接下来：",
    "    {file}: a {example} a line": "    {file}：每行写一个 {example}",
}

_typed: str | None = None  # the language that a command line names


def read_language(words: Sequence[str]) -> None:
    """Take the language from the words of a command line, before they are parsed."""
    global _typed
    for word, following in itertools.pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        if flag == "--lang":
            _typed = value if equals else following


def language() -> str:
    """The language of messages, en or zh: as typed, else by the locale."""
    if _typed in ("en", "zh"):
        return _typed
    names = map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))
    name = next(filter(None, names), None)
    if name is None and sys.platform == "win32":
        import ctypes

        is_chinese = ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF == 0x04
        return "zh" if is_chinese else "en"
    return "zh" if name and name.lower().startswith("zh") else "en"


def translate(line: str, stream: TextIO) -> str:
    """A line in the user's language; in English, too, where the stream's encoding has no other."""
    if language() == "en":
        return line
    translated = _in_chinese(line)
    try:
        translated.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return line
    return translated


def columns_of(text: str) -> int:
    """The columns that a terminal takes for a text: two for a Chinese character."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _in_chinese(line: str) -> str:
    english = line[:LABEL_COLUMNS].rstrip()
    label = LABELS.get(english) if english else ""  # "": a further line of the same label
    if label is not None and line[LABEL_COLUMNS - 1 : LABEL_COLUMNS] == " ":
        gap = " " * (LABEL_COLUMNS - columns_of(label))
        return label + gap + _in_chinese(line[LABEL_COLUMNS:])
    for pattern, chinese in _patterns():
        if match := pattern.fullmatch(line):
            holes = match.groupdict()
            if "line" in holes:
                holes["line"] = _in_chinese(holes["line"])
            return chinese.format(**holes)
    return line


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    return [(_pattern(english), chinese) for english, chinese in LINES.items()]


def _pattern(english: str) -> re.Pattern[str]:
    first, *rest = re.split(r"\{(\w+)\}", english)
    pattern = re.escape(first)
    for name, literal in zip(rest[::2], rest[1::2], strict=True):
        # Atomic: each hole ends where its literal first comes, so that no line takes long.
        pattern += f"(?>(?P<{name}>.*?){re.escape(literal)})"
    return re.compile(pattern.removesuffix(")") + "$)" if rest else pattern)
