"""Which model file is used, and that a model is never used with another vocabulary."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from oracles import write
from running import command, write_model

from config import SHIPPED_MODEL, parse_options
from llama import Llama, load_pretrained, model_payload
from minllama.formats.find_model import find_model, load_model
from minllama.formats.pt_file import STATE_FILE, save_pt
from minllama.runs.run_folder import RunFolder
from minllama.system.errors import UsageError
from tokenizer import Tokenizer, train_vocabulary

pytestmark = pytest.mark.usefixtures("empty_folder")


def load(line: str) -> tuple[Llama, Tokenizer]:
    return load_model(parse_options(line.split()), torch.device("cpu"))


def write_vocabulary(name: str, *, size: int) -> Path:
    """A vocabulary of its own."""
    words = [f"word{a}{b} " for a in "abcdefghij" for b in "klmnopqrst"]
    Path("words.txt").write_text("".join(words) * 3, encoding="utf-8")
    train_vocabulary([Path("words.txt")], Path(name), vocab_size=size)
    return Path(name)


def write_bare_model(vocab_size: int) -> Path:
    """A model file without a vocabulary, as other programs write them."""
    path = write_model(Path.cwd(), dim=16, n_layers=1)
    model = Llama(load_pretrained(path).config.from_model_args(
        load_pretrained(path).config.to_model_args() | {"vocab_size": vocab_size}))  # fmt: skip
    save_pt(Path("bare.pt"), model_payload(model))
    return Path("bare.pt")


# ---------------------------------------------------------------------------- which model


def test_the_default_is_the_newest_that_is_likely_meant(capsys):
    """The user's own run, else the assignment's file, else the shipped model; it is said."""
    options = parse_options([])
    assert find_model(options) == SHIPPED_MODEL
    Path("stories42M.pt").touch()
    assert find_model(options) == Path("stories42M.pt")
    Path("checkpoints").mkdir()
    Path("checkpoints/final-model.pt").touch()
    assert find_model(options) == Path("checkpoints/final-model.pt")
    said = f"--pretrained_model_path is not given: using {Path('checkpoints/final-model.pt')}"
    assert said in capsys.readouterr().out
    Path("x.pt").touch()
    assert find_model(parse_options(["--pretrained_model_path", "x.pt"])) == Path("x.pt")


def test_a_runs_folder_means_its_model(capsys):
    """`--pretrained_model_path checkpoints` once asked for a config.json of Hugging Face."""
    options = parse_options("--pretrained_model_path run".split())
    Path("run").mkdir()
    for name in ("final-model.pt", "best-model.pt", "pretrain-epoch-3.pt"):
        Path("run", name).touch()
    final = Path("run/final-model.pt")
    assert find_model(options) == final
    assert f"is a folder: using {final}" in capsys.readouterr().out
    final.rename("run/finetune-a-best-model.pt")
    with pytest.raises(UsageError, match="name one of") as raised:
        find_model(options)
    assert str(Path("run/finetune-a-best-model.pt")) in str(raised.value)
    assert "epoch" not in str(raised.value)
    Path("run/best-model.pt").unlink()
    assert find_model(options) == Path("run/finetune-a-best-model.pt")
    Path("run/finetune-a-best-model.pt").unlink()
    assert find_model(options) == Path("run/pretrain-epoch-3.pt")
    Path("run/pretrain-epoch-4.pt").touch()
    with pytest.raises(UsageError, match="name one of .*pretrain-epoch-3.pt"):
        find_model(options)


def end_pretraining(folder: str, result: str = "final-model.pt", *, at: int) -> Path:
    """What a pretraining that ended `at` this second leaves; returns its result."""
    run = RunFolder(Path(folder), "pretrain")
    run.add_start({})
    run.name_result(result, schedule_steps=9)
    for name in ("final-model.pt", "best-model.pt"):
        (run.path / name).touch()
        os.utime(run.path / name, (at, at))
    return run.path / result


@pytest.mark.parametrize("words", ["--save_dir run", "--pretrained_model_path run", ""])
def test_what_the_run_named_as_its_result_is_used(words, capsys):
    """Of an overfitted run `--save_dir run` took the model of perplexity 10,516, not 103.93."""
    best = end_pretraining("run", "best-model.pt", at=1)
    assert find_model(parse_options(words.split())) == best
    assert str(best) in capsys.readouterr().out
    Path("run/run.json").write_text('{"starts": [], "result": ["../secret.pt"]}', encoding="utf-8")
    assert find_model(parse_options(words.split())) == Path("run/final-model.pt")
    end_pretraining("run", "best-model.pt", at=1).unlink()
    assert find_model(parse_options(words.split())) == Path("run/final-model.pt")


def test_the_end_of_an_overfitted_run_may_be_named(capsys):
    """It is what was typed; that the run has a better one is said."""
    best = end_pretraining("run", "best-model.pt", at=1)
    final = Path("run/final-model.pt")
    assert find_model(parse_options(f"--pretrained_model_path {final}".split())) == final
    assert f"overfitted; its result is {best}" in capsys.readouterr().out
    assert find_model(parse_options(f"--pretrained_model_path {best}".split())) == best
    assert not capsys.readouterr().out


def test_the_last_pretraining_is_preferred(capsys):
    """120 dialogues were taught to an older English model, not to the Chinese one just made."""
    ended = [("zh", 20), ("checkpoints", 10), ("runs/a", 30), (".", 15), ("a/b/c", 99)]
    models = {folder: end_pretraining(folder, at=at) for folder, at in ended}
    Path("unfinished").mkdir()
    RunFolder(Path("unfinished"), "pretrain").add_start({})
    Path("unfinished/best-model.pt").touch()
    assert find_model(parse_options([])) == models["runs/a"]
    out = capsys.readouterr().out
    assert f"using {models['runs/a']}, of the last pretraining here; before it came" in out
    assert out.index(str(models["zh"])) < out.index(str(models["checkpoints"]))
    models["runs/a"].unlink()
    assert find_model(parse_options([])) == models["zh"]


@pytest.mark.parametrize("option", ["generate", "prompt", "finetune"])
def test_a_save_dir_that_is_typed_chooses_the_model(option, capsys):
    """`--option generate --save_dir run1` wrote with another run's model, and said only which."""
    for folder in ("checkpoints", "run1"):
        Path(folder).mkdir()
        Path(folder, "final-model.pt").touch()
    final = Path("run1/final-model.pt")
    words = ["--option", option, "--save_dir", "run1"]
    assert find_model(parse_options(words)) == final
    assert f"using --save_dir's {final}" in capsys.readouterr().out
    Path("x.pt").touch()
    assert find_model(parse_options([*words, "--pretrained_model_path", "x.pt"])) == Path("x.pt")
    final.rename("run1/best-model.pt")
    Path("run1/finetune-a-best-model.pt").touch()
    assert find_model(parse_options(words)) == Path("run1/best-model.pt")
    Path("run1/best-model.pt").unlink()
    if option == "finetune":  # its run is written there: the model comes from elsewhere
        assert find_model(parse_options(words)) == Path("checkpoints/final-model.pt")
    else:
        assert find_model(parse_options(words)) == Path("run1/finetune-a-best-model.pt")


def test_a_model_that_is_not_there_names_those_that_are():
    """`no such file` left the user to look for what the run had written, and where."""
    Path("run1").mkdir()
    for name in ("run1/final-model.pt", "run1/pretrain-step-2.pt"):
        Path(name).touch()
    final = Path("run1/final-model.pt")
    for missing in ("run1/pretrain-epoch-10.pt", "run2/final-model.pt", "nothing.pt"):
        done = command(f"--pretrained_model_path {missing}")
        assert f"--pretrained_model_path {Path(missing)}: no such file or folder; " in done.error
        assert f"there is {final}\n" in done.error
    Path("empty").mkdir()
    done = command("--option prompt --save_dir empty")
    assert f"--save_dir empty: the folder holds no model; there is {final}\n" in done.error
    assert "download.py stories42M" in command("--pretrained_model_path stories42M.pt").error


def test_a_folder_of_hugging_face_is_left_to_its_reader():
    """It has a config.json, whatever else lies in it."""
    Path("hf").mkdir()
    for name in ("config.json", "pytorch_model.pt"):
        Path("hf", name).touch()
    assert find_model(parse_options("--pretrained_model_path hf".split())) == Path("hf")


def test_a_sharded_checkpoint_is_not_a_model_yet():
    """It was said to be a folder with several models, and its shards were named to choose from."""
    folder = Path("run/pretrain-step-4-sharded")
    folder.mkdir(parents=True)
    for name in (STATE_FILE, "shard-0-ab.pt", "shard-1-cd.pt"):
        (folder / name).touch()
    done = command(f"--option generate --prompt a --pretrained_model_path {folder}")
    assert done.status == 2 and done.error.count("error: ") == 1
    assert f"{folder}: is a sharded checkpoint: resume it (--resume {folder}, one" in done.error
    assert "to get final-model.pt" in done.error and "shard-0" not in done.error


@pytest.mark.parametrize("name", ["missing.pt", "empty"])
def test_a_model_that_is_not_there_is_one_line(name):
    """Named as it was typed."""
    Path("empty").mkdir()
    done = command(f"--option generate --prompt a --pretrained_model_path {name}")
    assert done.status == 2 and name in done.error and done.error.count("error: ") == 1


# ---------------------------------------------------------------------------- its vocabulary


def test_a_model_comes_with_its_own_vocabulary():
    """In float32 and eval mode; naming the same vocabulary changes nothing."""
    path = write_model(Path.cwd(), dim=16, n_layers=1)
    llama, tokenizer = load(f"--pretrained_model_path {path}")
    assert not llama.training and llama.norm.weight.dtype == torch.float32
    assert llama.vocabulary == tokenizer.model_bytes
    assert tokenizer.fingerprint == Tokenizer().fingerprint
    Path("same.model").write_bytes(tokenizer.model_bytes)
    again = load(f"--pretrained_model_path {path} --tokenizer_model same.model")[1]
    assert again.fingerprint == tokenizer.fingerprint


def test_vocabularies_are_never_mixed_up():
    """A model file carries its vocabulary; another is refused with both fingerprints named."""
    path, other = write_model(Path.cwd()), write_vocabulary("other.model", size=300)
    done = command(
        f"--option generate --prompt a --pretrained_model_path {path} --tokenizer_model {other}"
    )
    assert done.status == 2 and "leave the flag out" in done.error
    for tokenizer in (Tokenizer(), Tokenizer(tokenizer_model=other)):
        assert tokenizer.fingerprint in done.error


def test_a_model_without_a_vocabulary_needs_one_of_its_size():
    """Named, or tokenizer.model beside; of another size it is refused with both sizes."""
    path = write_bare_model(300)
    with pytest.raises(UsageError, match=r"bare\.pt carries no vocabulary"):
        load(f"--pretrained_model_path {path}")
    with pytest.raises(UsageError, match="2,048 pieces .* 300"):
        Path("tokenizer.model").write_bytes(Tokenizer().model_bytes)
        load(f"--pretrained_model_path {path}")
    own = write_vocabulary("own.model", size=300)
    llama, tokenizer = load(f"--pretrained_model_path {path} --tokenizer_model {own}")
    assert tokenizer.n_words == 300 and llama.vocabulary == own.read_bytes()
    own.replace("tokenizer.model")
    assert load(f"--pretrained_model_path {path}")[1].n_words == 300


def test_an_embedding_with_padding_is_cut_to_its_vocabulary(capsys):
    """Rows that round a table up, which no id leads to, were "the file is damaged"."""
    vocabulary = write_vocabulary("own.model", size=300)
    model = load_pretrained(write_bare_model(320))
    model.vocabulary = vocabulary.read_bytes()
    save_pt(Path("padded.pt"), model_payload(model))
    llama, tokenizer = load("--pretrained_model_path padded.pt")
    assert llama.config.vocab_size == tokenizer.n_words == 300
    assert "padded.pt: 20 of the embedding's 320 rows are beyond" in capsys.readouterr().err
    for target in ("pt", "bin", "hf", "gguf"):  # written and read back it is of the same size
        pytest.importorskip({"hf": "safetensors", "gguf": "gguf"}.get(target, "torch"))
        write(llama, target, Path(f"cut.{target}"), tokenizer=tokenizer)
        assert load_pretrained(f"cut.{target}").config.vocab_size == tokenizer.n_words
    assert llama.output.weight is llama.tok_embeddings.weight
    tokens = torch.randint(300, (1, 16))
    assert torch.equal(llama(tokens, tokens)[0], model(tokens, tokens)[0][..., :300])


def test_a_vocabulary_in_the_file_that_is_not_the_models():
    """Ids beyond the embedding would be an index error in the middle of a text."""
    path = write_bare_model(300)
    model = load_pretrained(path)
    model.vocabulary = Tokenizer().model_bytes
    save_pt(path, model_payload(model))
    with pytest.raises(UsageError, match="do not belong together: the file is damaged"):
        load(f"--pretrained_model_path {path}")
