"""Model files looked at, verified, compared and converted, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import make_model, to_hugging_face, write

import check_model_precision as C
from config import parse_options
from llama import LlamaEmbeddingClassifier, load_pretrained, model_payload
from minllama.formats import pt_model
from minllama.formats.pt_file import save_pt
from minllama.model.lora import add_lora
from minllama.runs.run_folder import RunFolder
from tokenizer import EMBEDDED_VOCABULARY, Tokenizer


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "model.pt"
    torch.save(model_payload(make_model(tokenizer)), path)
    return path


def convert(path: Path, target: str, output: Path, *more: str) -> int:
    return C.main([str(path), "--convert", target, "--output", str(output), *more])


def assert_refused(capsys, message: str, *arguments) -> None:
    """Exit 2 and exactly one line, with the message in it, and nothing but it."""
    capsys.readouterr()
    assert C.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("check_model_precision.py: error: ")
    assert captured.err.count("\n") == 1 and message in captured.err


def test_report_says_what_a_weights_file_holds(saved: Path, capsys):
    assert C.main([str(saved)]) == 0
    out = capsys.readouterr().out
    assert f"{saved}: weights file" in out
    assert "tok_embeddings.weight                        float32   (2048, 48)" in out
    assert "tensors by dtype: 21 float32" in out and "and 16 more tensors" in out
    assert "tied: one tensor under two names" in out and "optimizer 0 B" in out


def test_sizes_by_part_add_up(tmp_path: Path, tokenizer: Tokenizer):
    """226 MB against 1.17 GB: the report must say where the difference lies."""
    payload = model_payload(make_model(tokenizer))
    state = {i: {"exp_avg": torch.ones(1000), "exp_avg_sq": torch.ones(1000)} for i in range(3)}
    save_pt(tmp_path / "a.pt", payload | {"optimizer": {"state": state}})
    report = C.inspect(tmp_path / "a.pt", verify=True)
    assert report.format == "resumable checkpoint" and report.sound
    assert report.parts["optimizer"] == 3 * 2 * 4000
    assert report.parts["weights"] == 4 * report.parameters
    assert sum(report.parts.values()) == report.size == (tmp_path / "a.pt").stat().st_size


def test_a_file_of_a_folder_has_the_size_of_what_is_read(tmp_path: Path):
    """An index, and a part of several, had `other` of less than nothing."""
    model = make_model()
    write(model, "hf", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    tensors, index = to_hugging_face(model), {}
    for number, names in enumerate((list(tensors)[:9], list(tensors)[9:])):
        index |= dict.fromkeys(names, f"pytorch_model-{number}.bin")
        part = tmp_path / "hf" / f"pytorch_model-{number}.bin"
        torch.save({name: tensors[name].clone() for name in names}, part)
    named = tmp_path / "hf" / "pytorch_model.bin.index.json"
    named.write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    sizes = {json.dumps(C.inspect(path).parts) for path in (named, part, named.parent)}
    assert len(sizes) == 1 and "-" not in sizes.pop()


@pytest.mark.parametrize("copies", ["tied, but stored twice", "not tied"])
def test_embeddings_that_are_not_one_tensor(tmp_path: Path, copies: str):
    payload = model_payload(make_model(tie_word_embeddings=False))
    if copies != "not tied":
        payload["model"]["output.weight"] = payload["model"]["tok_embeddings.weight"].clone()
    torch.save(payload, tmp_path / "a.pt")
    assert C.inspect(tmp_path / "a.pt").embedding == copies


def test_without_arguments_the_newest_checkpoint_else_the_shipped_model(
    saved: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert C.default_file() == C.SHIPPED_MODEL
    (tmp_path / "checkpoints").mkdir()
    for age, name in ((100, "pretrain-epoch-1.pt"), (50, "final-model.pt")):
        path = tmp_path / "checkpoints" / name
        path.write_bytes(saved.read_bytes())
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert C.main([]) == 0
    newest = Path("checkpoints") / "final-model.pt"
    assert f"no file named: looking at {newest}" in capsys.readouterr().out
    (tmp_path / "stories42M.pt").write_bytes(saved.read_bytes())
    assert C.default_file() == Path("stories42M.pt")


def test_json_is_json_and_nothing_else(saved: Path, capsys):
    arguments = [str(saved), "--json", "--verify", "--compare", str(saved)]
    assert C.main(arguments) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["dtypes"] == {"float32": 21} and len(report["tensors"]) == 21
    assert report["nan"] == {} and report["compared"]["logits"] == 0
    assert sum(report["parts"].values()) == report["size"]


def test_notes_on_a_text_do_not_stand_before_the_json(tmp_path: Path, tokenizer: Tokenizer, capsys):
    """A hidden file beside it, and a program that read stdout met a line that was no JSON."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", ".hidden.txt"):
        (folder / name).write_text("One day.", encoding="utf-8")
    save_pt(tmp_path / "a.pt", model_payload(make_model(tokenizer)))
    assert C.main([str(tmp_path / "a.pt"), "--text", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["text"]["tokens"] > 0 and "hidden" in printed.err


def test_a_model_of_nans_scores_a_text_in_json(tmp_path: Path, tokenizer: Tokenizer, capsys):
    """JSON has no NaN: the figures are named, where they ended in a ValueError."""
    payload = model_payload(make_model(tokenizer))
    payload["model"]["norm.weight"].fill_(float("nan"))
    torch.save(payload, tmp_path / "a.pt")
    model = load_pretrained(tmp_path / "a.pt")
    model.vocabulary = tokenizer.model_bytes
    save_pt(tmp_path / "a.pt", model_payload(model))
    (tmp_path / "a.txt").write_text("One day a fox went out.", encoding="utf-8")
    assert C.main([str(tmp_path / "a.pt"), "--json", "--text", str(tmp_path / "a.txt")]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["text"]["loss"] == report["text"]["bits_per_byte"] == "nan"
    assert report["text"]["tokens"] == len(tokenizer.encode("One day a fox went out.", False, True))


def test_verify_counts_what_is_no_number(tmp_path: Path, capsys):
    payload = model_payload(make_model())
    payload["model"]["norm.weight"][:3] = float("nan")
    payload["model"]["layers.0.feed_forward.w1.weight"][1, :2] = float("inf")
    torch.save(payload, tmp_path / "a.pt")
    assert C.main([str(tmp_path / "a.pt"), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "BAD norm.weight: 3 NaN" in out and "BAD layers.0.feed_forward.w1.weight: 2 Inf" in out
    assert C.main([str(tmp_path / "a.pt")]) == 0  # unasked, nothing is read through
    assert convert(tmp_path / "a.pt", "pt", tmp_path / "b.pt", "--verify") == 1
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("sealed", [True, False])
def test_verify_finds_one_flipped_bit(saved: Path, capsys, sealed: bool):
    """Still a number, still a zip file: only the checksum tells, ours or the zip file's own."""
    if sealed:
        save_pt(saved, model_payload(load_pretrained(saved)))
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    assert C.main([str(saved)]) == 0
    assert C.main([str(saved), "--verify"]) == 1
    assert capsys.readouterr().out.count("BAD") == 1


def test_verify_of_a_file_that_would_not_load(tmp_path: Path, capsys):
    payload = model_payload(make_model())
    del payload["model"]["norm.weight"]
    torch.save(payload, tmp_path / "a.pt")
    assert C.main([str(tmp_path / "a.pt"), "--verify"]) == 1
    assert "tensor norm.weight missing" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [None, "layers.1.attention.compute_key.weight", "lora_b"])
def test_verify_of_a_lora_finetunings_checkpoint(tmp_path: Path, capsys, damage: str | None):
    """Adapters are part of it, and were once called damage; what is damaged is still found."""
    model = make_model()
    add_lora(model, rank=2, alpha=4.0)
    state = LlamaEmbeddingClassifier(model, num_labels=3).state_dict()
    payload = model_payload(model, state=state) | {"optimizer": {}}
    if damage == "lora_b":
        payload["model"]["llama.layers.0.attention.compute_key.lora_b"][0] = float("nan")
    elif damage:
        del payload["model"][f"llama.{damage}"]
    save_pt(tmp_path / "a.pt", payload)
    assert C.main([str(tmp_path / "a.pt"), "--verify"]) == bool(damage)
    out = capsys.readouterr().out
    assert "a.pt: resumable checkpoint with adapters\n" in out
    assert "tied: one tensor under two names" in out
    assert ("verified: " in out) == (damage is None) and ("BAD" in out) == bool(damage)
    assert damage is None or damage in out
    del payload["optimizer"]  # of a file that is to be used as a model, nobody would merge them
    save_pt(tmp_path / "a.pt", payload)
    assert C.main([str(tmp_path / "a.pt"), "--verify"]) == 1


def test_compare_finds_the_largest_difference(
    saved: Path, tmp_path: Path, tokenizer: Tokenizer, capsys
):
    payload = model_payload(make_model(tokenizer))
    payload["model"]["norm.weight"][5] += 0.5
    torch.save(payload, tmp_path / "b.pt")
    result = C.compare(saved, tmp_path / "b.pt")
    assert result["tensors"].pop("norm.weight") == pytest.approx(0.5)
    assert set(result["tensors"].values()) == {0.0} and result["logits"] > 0.01
    torch.save(model_payload(make_model()), tmp_path / "c.pt")
    assert C.main([str(saved), "--compare", str(tmp_path / "c.pt")]) == 0
    out = capsys.readouterr().out
    assert "tok_embeddings.weight                        other shape" in out


# ---------------------------------------------------------------------------- converting


@pytest.mark.parametrize("target", ["bin", "hf", "pt"])
def test_there_and_back_is_exact(tmp_path: Path, target: str):
    if target == "hf":
        pytest.importorskip("safetensors")
    model = make_model(tie_word_embeddings=False)
    torch.save(model_payload(model), tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", target, tmp_path / "there") == 0
    assert convert(tmp_path / "there", "pt", tmp_path / "back.pt") == 0
    back = load_pretrained(tmp_path / "back.pt")
    assert not back.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("words", [("pt_bfloat16",), ("pt", "--save-dtype", "bfloat16")])
def test_the_precision_is_part_of_the_format_or_a_flag(saved: Path, tmp_path: Path, words):
    assert convert(saved, words[0], tmp_path / "b.pt", *words[1:]) == 0
    assert C.inspect(tmp_path / "b.pt", verify=True).dtypes == {"bfloat16": 21}


def test_a_fine_tuned_file_keeps_its_head_and_its_labels(tmp_path: Path):
    """Converted to half the size it must still be a classifier."""
    head = {"weight": torch.randn(2, 48), "bias": torch.randn(2)}
    payload = model_payload(make_model())
    payload |= {"classifier_head": head, "label_names": ["bad", "good"], "pooling": "mean"}
    save_pt(tmp_path / "a.pt", payload)
    assert convert(tmp_path / "a.pt", "pt-bfloat16", tmp_path / "b.pt") == 0
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert (found["label_names"], found["pooling"]) == (["bad", "good"], "mean")
    assert all(torch.equal(found["classifier_head"][name], head[name]) for name in head)


def classifier_file(folder: Path, *, pooling: str = "last", bias: float = 0.0) -> Path:
    head = {"weight": torch.randn(3, 48), "bias": torch.tensor([0.25, 0.25, 0.25 + bias])}
    payload = model_payload(make_model(tie_word_embeddings=False))
    names = ["bad", "neither", "good"]
    payload |= {"classifier_head": head, "label_names": names, "pooling": pooling}
    save_pt(folder / "a.pt", payload)
    return folder / "a.pt"


def test_a_classifier_is_one_for_transformers(tmp_path: Path):
    """The head was left out without a word. Their class gives the same probabilities."""
    transformers = pytest.importorskip("transformers")
    path = classifier_file(tmp_path)
    assert convert(path, "hf", tmp_path / "hf") == 0
    kind = transformers.AutoModelForSequenceClassification
    theirs = kind.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.id2label == {0: "bad", 1: "neither", 2: "good"}
    assert theirs.config.architectures == ["LlamaForSequenceClassification"]
    found = pt_model.read_classifier(path)
    ours = LlamaEmbeddingClassifier(load_pretrained(path), num_labels=3).eval()
    ours.classifier_head.load_state_dict(found.head)
    for width in (1, 7, 40):
        tokens = torch.randint(300, (1, width))
        with torch.no_grad():
            want = theirs(tokens).logits.log_softmax(-1)
            got = ours(tokens, torch.tensor([width]))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_transformers_classifies_several_texts_at_once(tmp_path: Path, tokenizer: Tokenizer):
    """The folder named no token to pad with, and their class refuses a batch without one."""
    transformers = pytest.importorskip("transformers")
    head = {"weight": torch.randn(3, 48), "bias": torch.zeros(3)}
    payload = model_payload(make_model(tokenizer))
    save_pt(tmp_path / "a.pt", payload | {"classifier_head": head, "label_names": ["a", "b", "c"]})
    assert convert(tmp_path / "a.pt", "hf", tmp_path / "hf") == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    texts = ["A dog", "One day a bird sat in a tree"]
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = fast(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        together = theirs(**batch).logits
        for text, got in zip(texts, together, strict=True):
            alone = theirs(torch.tensor([tokenizer.encode(text, True, False)])).logits[0]
            torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "target, what, message",
    [
        ("hf", {"pooling": "mean"}, "it reads the mean of the states, and that the last one alone"),
        ("hf", {"bias": 1.0}, "it reads a weight and a bias, and that has no bias"),
        ("hf", {"bias": float("nan")}, "it reads a weight and a bias"),
        ("bin", {}, "--convert bin: the model is a classifier, and this format has no place for"),
        ("gguf", {}, "--convert gguf: the model is a classifier"),
    ],
)
def test_a_classifiers_head_is_not_left_out(tmp_path: Path, capsys, target, what, message):
    path = classifier_file(tmp_path, **what)
    arguments = (path, "--convert", target, "--output", tmp_path / "out")
    assert_refused(capsys, message, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_bin_in_the_way_is_found_before_anything_is_written(
    saved: Path, tmp_path: Path, capsys
):
    """run.c reads it beside the model: the two are replaced together, or not at all."""
    out = tmp_path / "export"
    assert convert(saved, "bin", out / "model.bin") == 0
    assert {path.name for path in out.iterdir()} == {"model.bin", "tokenizer.bin"}
    (out / "model.bin").unlink()
    (out / "tokenizer.bin").write_bytes(b"another")
    arguments = (saved, "--convert", "bin", "--output", out / "model.bin")
    assert_refused(capsys, "tokenizer.bin: is there already; --overwrite", *arguments)
    assert not (out / "model.bin").exists()


@pytest.mark.parametrize("target", ["bin", "bin-int8"])
def test_its_own_tokenizer_bin_is_not_in_the_way(saved: Path, tmp_path: Path, target: str):
    """The second --convert into a folder refused over the very file that the first had written."""
    assert convert(saved, "bin", tmp_path / "one.bin") == 0
    assert convert(saved, target, tmp_path / "two.bin") == 0


@pytest.mark.parametrize("target, package", [("hf", "safetensors"), ("gguf", "gguf")])
def test_the_package_that_is_needed_is_named_before_anything_else(
    saved: Path, tmp_path: Path, capsys, monkeypatch, target: str, package: str
):
    """After ten lines of inspection, and after the model was read."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(C, "inspect", None)
    arguments = (saved, "--convert", target, "--output", tmp_path / "it")
    message = f"--convert {target} needs another package: pip install {package}"
    assert_refused(capsys, message, *arguments)


def test_an_error_of_converting_stands_alone(saved: Path, tmp_path: Path, capsys):
    """Ten lines about the model stood before it."""
    (tmp_path / "tokenizer.bin").write_bytes(b"another")
    assert C.main([str(saved), "--convert", "bin", "--output", str(tmp_path / "a.bin")]) == 2
    assert not capsys.readouterr().out


def test_another_vocabulary_than_the_models_own_is_refused(saved: Path, tmp_path: Path, capsys):
    """Same size, other pieces: both fingerprints are named."""
    payload = torch.load(saved, weights_only=True)
    other = tmp_path / "other.model"
    other.write_bytes(payload["vocabulary"].numpy().tobytes() + b"\xf8\x07\x01")  # a field unknown
    arguments = (saved, "--convert", "bin", "--output", tmp_path / "a.bin")
    message = f"was trained with {payload['vocabulary_fingerprint']}"
    assert_refused(capsys, message, *arguments, "--tokenizer_model", other)


@pytest.mark.parametrize("target", ["pt", "bin", "bin-int8", "gguf", "hf"])
def test_nothing_is_replaced_without_overwrite(saved: Path, tmp_path: Path, capsys, target: str):
    output = tmp_path / "out" / "it"
    arguments = (saved, "--convert", target, "--output", output)
    assert C.main([str(argument) for argument in arguments]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert_refused(capsys, "is there already; --overwrite replaces it", *arguments)
    assert C.main([str(argument) for argument in (*arguments, "--overwrite")]) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("output", [".", "/"])
def test_the_current_folder_is_no_output(saved: Path, capsys, output: str):
    """A ValueError of pathlib: the likeliest thing to type for a Hugging Face folder."""
    for target in ("hf", "gguf", "pt"):
        message = f"--output {Path(output)}: name a file or folder to write"
        assert_refused(capsys, message, saved, "--convert", target, "--output", output)


def test_a_folder_is_not_replaced_by_its_own_model(saved: Path, tmp_path: Path, capsys):
    """Named by its weights it was, while they were read."""
    pytest.importorskip("safetensors")
    folder = tmp_path / "hf"
    assert convert(saved, "hf", folder) == 0
    arguments = ("--convert", "hf", "--overwrite", "--output", folder)
    for path in (folder, folder / "model.safetensors"):
        assert_refused(capsys, "is the file to convert", path, *arguments)


@pytest.mark.parametrize("stated", [torch.ones(3), ["a"], 3])
def test_a_fingerprint_that_is_none(tmp_path: Path, tokenizer: Tokenizer, capsys, stated):
    """A tensor in its place ended in a traceback; --verify says what it is."""
    payload = model_payload(make_model(tokenizer)) | {"vocabulary_fingerprint": stated}
    torch.save(payload, tmp_path / "a.pt")
    assert C.main([str(tmp_path / "a.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["vocabulary"] is None
    assert C.main([str(tmp_path / "a.pt"), "--verify"]) == 1
    assert f"where it says {type(stated).__name__}:" in capsys.readouterr().out


def test_a_folder_of_other_things_is_never_replaced(saved: Path, tmp_path: Path, capsys):
    """--overwrite is for models: a home folder named by mistake must survive it."""
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    arguments = (saved, "--convert", "hf", "--overwrite", "--output", tmp_path / "papers")
    assert_refused(capsys, "holds thesis.txt, which is no part of a model", *arguments)
    arguments = (saved, "--convert", "bin", "--overwrite", "--output", tmp_path / "papers")
    assert_refused(capsys, "cannot replace each other", *arguments)
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("beside", ["notes.md", "pytorch_model.bin", "checkpoint-500/optimizer.pt"])
def test_a_models_folder_with_a_file_of_the_users_is_not_replaced(
    saved: Path, tmp_path: Path, capsys, beside: str
):
    """What was beside the model was once deleted with it."""
    pytest.importorskip("safetensors")
    folder = tmp_path / "hf"
    assert convert(saved, "hf", folder) == 0
    (folder / beside).parent.mkdir(exist_ok=True)
    (folder / beside).write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments = (saved, "--convert", "hf", "--overwrite", "--output", folder)
    assert_refused(capsys, f"holds {Path(beside).parts[0]}, which is no part", *arguments)
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_replacement_that_was_killed_is_undone_first(
    saved: Path, tmp_path: Path, capsys, overwrite: bool
):
    """Killed between its two renames, it left the old folder under another name, and none here."""
    pytest.importorskip("safetensors")
    folder = tmp_path / "hf"
    assert convert(saved, "hf", folder) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    folder.rename(tmp_path / ".hf.replaced")
    if overwrite:
        assert convert(saved, "hf", folder, "--overwrite") == 0
    else:
        arguments = (saved, "--convert", "hf", "--output", folder)
        assert_refused(capsys, "is there already; --overwrite replaces it", *arguments)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"hf", saved.name}


def test_a_replacement_that_was_killed_at_its_very_end_is_no_obstacle(saved: Path, tmp_path: Path):
    """The new folder is in place; the old one, still there under another name, was in the way."""
    pytest.importorskip("safetensors")
    folder = tmp_path / "hf"
    assert convert(saved, "hf", folder) == 0
    assert convert(saved, "hf", tmp_path / ".hf.replaced") == 0
    assert convert(saved, "hf", folder, "--overwrite") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"hf", saved.name}


# ---------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line_each(saved: Path, tmp_path: Path, capsys):
    bare = tmp_path / "bare.pt"
    torch.save(model_payload(make_model()), bare)
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time there was no model in this file at all.\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    out = ("--output", tmp_path / "x")
    for message, *arguments in (
        ("no such file", tmp_path / "none.pt"),
        ("not a model file", text),
        ("the folder holds no model", folder),
        (
            "is the name of a file beside the model",
            saved,
            "--convert",
            "bin",
            "--output",
            tmp_path / "tokenizer.bin",
        ),
        ("need each other", saved, "--convert", "bin"),
        ("need each other", saved, *out),
        ("invalid choice: 'onnx'", saved, "--convert", "onnx", *out),
        ("take one FILE", saved, saved, "--convert", "bin", *out),
        ("--save_dtype is for", saved, "--convert", "bin", "--save-dtype", "float16", *out),
        ("says otherwise", saved, "--convert", "pt-float32", "--save_dtype", "float16", *out),
        ("exclude each other", saved, "--compare", saved, "--convert", "bin", *out),
        ("no such file", saved, "--compare", tmp_path / "none.pt"),
        ("has 2,048 pieces", bare, "--convert", "hf", *out)
        + ("--tokenizer-model", EMBEDDED_VOCABULARY),
        ("not a SentencePiece model", bare, "--convert", "hf", *out, "--tokenizer-model", text),
        ("--bogus: no such option; --help lists the options", saved, "--bogus", "x"),
        ("did you mean --tokenizer_model?", saved, "--tokenizr", "x"),
    ):
        assert_refused(capsys, message, *arguments)
    assert not (tmp_path / "x").exists()


def test_it_runs_as_a_script(saved: Path):
    script = Path(C.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(saved), "--json"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)[0]["path"] == str(saved)


@pytest.mark.parametrize(("words", "says"), [(300, "of 300 pieces"), (32000, "download.py")])
def test_a_lost_vocabulary_is_told(tmp_path: Path, capsys, words: int, says: str):
    """A .bin names none that is its own; a .pt was once made of it without a word."""
    torch.save(model_payload(make_model(vocab_size=words)), tmp_path / "a.pt")
    for source, target in (("a.pt", "bin"), ("a.bin", "pt")):
        assert convert(tmp_path / source, target, tmp_path / f"a2.{target}") == 0
        error = capsys.readouterr().err
        assert "has no vocabulary" in error and "--tokenizer_model" in error and says in error
        (tmp_path / f"a2.{target}").rename(tmp_path / f"a.{target}")
    assert error.count("\n") == 1 and ("download.py" in error) == (words == 32000)


def test_paths_are_checked_before_the_report(saved: Path, tmp_path: Path, capsys):
    """A folder in the way, or no file to compare with, was once found after reading everything."""
    (tmp_path / "there.pt").write_text("a", encoding="utf-8")
    for words in (
        ["--compare", tmp_path / "none.pt"],
        ["--convert", "pt", "--output", tmp_path / "there.pt"],
        ["--convert", "pt", "--output", saved],
    ):
        assert C.main([str(saved), *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert not captured.out and captured.err.count("\n") == 1


def test_a_runs_folder_is_its_model_and_how_to_repeat_it(saved: Path, tmp_path: Path, capsys):
    """A folder of checkpoints was "no such file" of Hugging Face's config.json."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(saved, run / "final-model.pt")
    options = parse_options(["--option", "pretrain", "--epochs", "3"]).to_plain()
    RunFolder(run, "pretrain").add_start({"options": options, "processes": 1})
    assert C.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{run / 'final-model.pt'}: weights file" in out
    assert "to repeat the run in another folder\n  python " in out and "--epochs 3" in out
