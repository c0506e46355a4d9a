"""Model files looked at, verified, compared and converted, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import check_model_precision as C
from config import LlamaConfig
from llama import Llama, load_pretrained, model_payload
from tokenizer import EMBEDDED_VOCABULARY, Tokenizer
from utils import save_checkpoint

TIED = {"vocab_size": 2048, "dim": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer()


def make_model(tokenizer: Tokenizer | None, **changes) -> Llama:
    torch.manual_seed(0)
    words = tokenizer.n_words if tokenizer else 300
    model = Llama(LlamaConfig(**(TIED | {"vocab_size": words, "max_seq_len": 40} | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.01 * torch.randn_like(parameter))
    model.vocabulary = tokenizer.model_bytes if tokenizer else None
    return model.eval()


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


# ---------------------------------------------------------------------------- looking


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
    save_checkpoint(tmp_path / "a.pt", payload | {"optimizer": {"state": state}})
    report = C.inspect(tmp_path / "a.pt", verify=True)
    assert report.format == "resumable checkpoint" and report.sound
    assert report.parts["optimizer"] == 3 * 2 * 4000
    assert report.parts["weights"] == 4 * report.parameters
    assert sum(report.parts.values()) == report.size == (tmp_path / "a.pt").stat().st_size


@pytest.mark.parametrize("copies", ["tied, but stored twice", "not tied"])
def test_embeddings_that_are_not_one_tensor(tmp_path: Path, copies: str):
    payload = model_payload(make_model(None, tie_word_embeddings=False))
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


# ---------------------------------------------------------------------------- verifying, comparing


def test_verify_counts_what_is_no_number(tmp_path: Path, capsys):
    payload = model_payload(make_model(None))
    payload["model"]["norm.weight"][:3] = float("nan")
    payload["model"]["layers.0.feed_forward.w1.weight"][1, :2] = float("inf")
    torch.save(payload, tmp_path / "a.pt")
    assert C.main([str(tmp_path / "a.pt"), "--verify"]) == 1
    out = capsys.readouterr().out
    assert "BAD norm.weight: 3 NaN" in out and "BAD layers.0.feed_forward.w1.weight: 2 Inf" in out
    assert C.main([str(tmp_path / "a.pt")]) == 0  # unasked, nothing is read through
    assert convert(tmp_path / "a.pt", "pt", tmp_path / "b.pt", "--verify") == 1
    assert not (tmp_path / "b.pt").exists()


def test_verify_finds_one_flipped_bit(saved: Path, capsys):
    """Still a number, still a zip file: only the checksum tells."""
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    assert C.main([str(saved)]) == 0
    assert C.main([str(saved), "--verify"]) == 1
    assert "checksum" in capsys.readouterr().out


def test_verify_of_a_file_that_would_not_load(tmp_path: Path, capsys):
    payload = model_payload(make_model(None))
    del payload["model"]["norm.weight"]
    torch.save(payload, tmp_path / "a.pt")
    assert C.main([str(tmp_path / "a.pt"), "--verify"]) == 1
    assert "tensor norm.weight missing" in capsys.readouterr().out


def test_compare_finds_the_largest_difference(saved: Path, tmp_path: Path, capsys):
    payload = model_payload(make_model(Tokenizer()))
    payload["model"]["norm.weight"][5] += 0.5
    torch.save(payload, tmp_path / "b.pt")
    result = C.compare(saved, tmp_path / "b.pt")
    assert result["tensors"].pop("norm.weight") == pytest.approx(0.5)
    assert set(result["tensors"].values()) == {0.0} and result["logits"] > 0.01
    torch.save(model_payload(make_model(None)), tmp_path / "c.pt")
    assert C.main([str(saved), "--compare", str(tmp_path / "c.pt")]) == 0
    out = capsys.readouterr().out
    assert "tok_embeddings.weight                        other shape" in out


# ---------------------------------------------------------------------------- converting


def assert_same(got: Llama, want: dict[str, torch.Tensor]) -> None:
    assert {*got.state_dict()} == {*want}
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["bin", "hf", "pt"])
def test_round_trips_are_exact_in_float32(tmp_path: Path, tied: bool, target: str):
    pytest.importorskip("safetensors")
    model = make_model(None, tie_word_embeddings=tied)
    torch.save(model_payload(model), tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", target, tmp_path / "there") == 0
    assert convert(tmp_path / "there", "pt", tmp_path / "back.pt") == 0
    back = load_pretrained(tmp_path / "back.pt")
    assert_same(back, model.state_dict())
    assert back.config.tie_word_embeddings == tied


def test_llama2cs_own_file_is_written_byte_for_byte(real_data: Path, tmp_path: Path):
    source = real_data / "stories260K.bin"
    assert convert(source, "bin", tmp_path / "a.bin") == 0
    assert (tmp_path / "a.bin").read_bytes() == source.read_bytes()
    assert convert(source, "pt", tmp_path / "a.pt") == 0
    assert convert(tmp_path / "a.pt", "bin", tmp_path / "b.bin") == 0
    assert (tmp_path / "b.bin").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_precision_of_what_is_written(saved: Path, tmp_path: Path, name: str):
    """Half the bytes for half the bits; the vocabulary comes along."""
    assert convert(saved, f"pt_{name}", tmp_path / "b.pt") == 0
    report = C.inspect(tmp_path / "b.pt", verify=True)
    assert report.dtypes == {name: 21} and report.sound
    assert report.parts["weights"] == report.parameters * (4 if name == "float32" else 2)
    model = load_pretrained(saved)
    assert_same(load_pretrained(tmp_path / "b.pt"), C.expected(model, name))
    assert load_pretrained(tmp_path / "b.pt").vocabulary == model.vocabulary


def test_tokenizer_bin_stands_beside_the_bin(
    saved: Path, tmp_path: Path, tokenizer: Tokenizer, capsys
):
    """run.c reads it: uint32 longest token, then for each float32 score, int32 length, bytes."""
    out = tmp_path / "export"
    assert convert(saved, "bin", out / "model.bin") == 0
    assert {path.name for path in out.iterdir()} == {"model.bin", "tokenizer.bin"}
    content = (out / "tokenizer.bin").read_bytes()
    assert len(content) > 9 * tokenizer.n_words
    (out / "model.bin").unlink()
    arguments = (saved, "--convert", "bin", "--output", out / "model.bin")
    assert_refused(capsys, "tokenizer.bin: is there already; --overwrite", *arguments)
    assert not (out / "model.bin").exists()


@pytest.mark.parametrize("hidden_dim, group", [(192, 16), (172, 4), (128, 16)])
def test_int8_groups_divide_every_row(tmp_path: Path, hidden_dim: int, group: int):
    """runq reads w2 in rows of hidden_dim; groups that divide only dim gave it garbage."""
    model = make_model(None, hidden_dim=hidden_dim)
    with torch.no_grad():
        model.layers[0].feed_forward.w2.weight[3] = 0  # a scale of zero must not make NaN
    torch.save(model_payload(model), tmp_path / "a.pt")
    assert convert(tmp_path / "a.pt", "bin-int8", tmp_path / "a.bin") == 0
    assert C.group_size(model.config) == group
    assert C.inspect(tmp_path / "a.bin", verify=True).dtypes == {"int8": 16, "float32": 5}
    got = load_pretrained(tmp_path / "a.bin").state_dict()
    for name, tensor in model.state_dict().items():
        error = (got[name] - tensor).abs()
        if tensor.dim() == 1:
            assert not error.any()
        else:
            largest = tensor.reshape(-1, group).abs().amax(1, keepdim=True)
            assert (error.reshape(-1, group) <= largest / 254 * 1.001).all(), name


def test_another_vocabulary_than_the_models_own_is_refused(saved: Path, tmp_path: Path, capsys):
    """Same size, other pieces: both fingerprints are named."""
    payload = torch.load(saved, weights_only=True)
    other = tmp_path / "other.model"
    other.write_bytes(payload["vocabulary"].numpy().tobytes() + b"\xf8\x07\x01")  # a field unknown
    arguments = (saved, "--convert", "bin", "--output", tmp_path / "a.bin")
    message = f"but the model was trained with {payload['vocabulary_fingerprint']}"
    assert_refused(capsys, message, *arguments, "--tokenizer_model", other)


def test_llama2c_cannot_hold_another_theta(tmp_path: Path, capsys):
    torch.save(model_payload(make_model(None, rope_theta=500.0)), tmp_path / "a.pt")
    arguments = (tmp_path / "a.pt", "--convert", "bin", "--output", tmp_path / "a.bin")
    assert_refused(capsys, "rope_theta 10000, not 500", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_failing_self_check_publishes_nothing(saved: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(C, "write_bin", lambda model, file: file.write(b"half a file"))
    arguments = (saved, "--convert", "bin", "--output", tmp_path / "out" / "a.bin")
    assert_refused(capsys, "not a model file", *arguments)
    real = C.to_half_split
    monkeypatch.setattr(C, "to_half_split", lambda weight, heads: -real(weight, heads))
    arguments = (saved, "--convert", "hf", "--output", tmp_path / "out" / "hf")
    assert_refused(capsys, "self-check: layers.0.attention.compute_", *arguments)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("target", ["pt", "bin", "bin-int8", "hf"])
def test_nothing_is_replaced_without_overwrite(saved: Path, tmp_path: Path, capsys, target: str):
    output = tmp_path / "out" / "it"
    arguments = (saved, "--convert", target, "--output", output)
    assert C.main([str(argument) for argument in arguments]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert_refused(capsys, "is there already; --overwrite replaces it", *arguments)
    assert C.main([str(argument) for argument in (*arguments, "--overwrite")]) == 0
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_a_folder_of_other_things_is_never_replaced(saved: Path, tmp_path: Path, capsys):
    """--overwrite is for models: a home folder named by mistake must survive it."""
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    arguments = (saved, "--convert", "hf", "--overwrite", "--output", tmp_path / "papers")
    assert_refused(capsys, "holds other things than a model", *arguments)
    arguments = (saved, "--convert", "bin", "--overwrite", "--output", tmp_path / "papers")
    assert_refused(capsys, "cannot replace each other", *arguments)
    assert (tmp_path / "papers" / "thesis.txt").read_text() == "years of work"


# ---------------------------------------------------------------------------- transformers


def test_transformers_loads_the_folder_with_equal_logits(saved: Path, tmp_path: Path, tokenizer):
    transformers = pytest.importorskip("transformers")
    assert convert(saved, "hf", tmp_path / "hf") == 0
    model = load_pretrained(saved)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(model.config.vocab_size, (2, 40))
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(model(tokens, tokens)[0], logits, rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in C.SAMPLES:
        assert same(text)["input_ids"] == tokenizer.encode(text, bos=True, eos=False), text
        plain = tokenizer.encode(text, bos=False, eos=False)
        assert same(text, add_special_tokens=False)["input_ids"] == plain
        assert same.decode(plain) == tokenizer.decode(plain)
    assert (same.bos_token_id, same.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


ALPHABET = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t▁aetho<s>/0x.,!'🙂世é")
)


@given(st.text(ALPHABET, max_size=60))
@settings(max_examples=300, deadline=None)
def test_exported_tokenizer_gives_our_ids_for_any_text(text: str):
    """Leading spaces, newlines, emoji, special names in the text: the ids SentencePiece gives."""
    ours, theirs = both_tokenizers()
    assert theirs.encode(text).ids == ours.encode(text, bos=True, eos=False)


def both_tokenizers(cache: list = []):  # noqa: B006 (made once for all examples)
    if not cache:
        tokenizers = pytest.importorskip("tokenizers")
        ours = Tokenizer()
        theirs = tokenizers.Tokenizer.from_str(json.dumps(C.tokenizer_json(ours)))
        theirs.encode_special_tokens = True
        cache.extend((ours, theirs))
    return cache


def test_exported_llama2_vocabulary_gives_our_ids_on_reviews(real_data: Path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer(tokenizer_model=real_data / "tokenizer.model")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(C.tokenizer_json(ours)))
    theirs.encode_special_tokens = True
    lines = (real_data / "sst-dev.txt").read_text(encoding="utf-8").splitlines()[:300]
    for text in (*C.SAMPLES, *lines, "\n".join(lines)):
        assert theirs.encode(text).ids == ours.encode(text, bos=True, eos=False)


# ---------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line_each(saved: Path, tmp_path: Path, capsys):
    bare = tmp_path / "bare.pt"
    torch.save(model_payload(make_model(None)), bare)
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time there was no model in this file at all.\n")
    out = ("--output", tmp_path / "x")
    for message, *arguments in (
        ("no such file", tmp_path / "none.pt"),
        ("not a model file", text),
        ("no model.safetensors in this folder", tmp_path),
        ("need each other", saved, "--convert", "bin"),
        ("need each other", saved, *out),
        ("invalid choice: 'gguf'", saved, "--convert", "gguf", *out),
        ("take one FILE", saved, saved, "--convert", "bin", *out),
        ("--save_dtype is for", saved, "--convert", "bin", "--save-dtype", "float16", *out),
        ("says otherwise", saved, "--convert", "pt-float32", "--save_dtype", "float16", *out),
        ("exclude each other", saved, "--compare", saved, "--convert", "bin", *out),
        ("no such file", saved, "--compare", tmp_path / "none.pt"),
        ("2,048 tokens, but the model has 300", bare, "--convert", "hf", *out)
        + ("--tokenizer-model", EMBEDDED_VOCABULARY),
        ("not a SentencePiece model", bare, "--convert", "hf", *out, "--tokenizer-model", text),
        ("unrecognized arguments: --bogus", saved, "--bogus"),
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
    torch.save(model_payload(make_model(None, vocab_size=words)), tmp_path / "a.pt")
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
