"""Files for other programs: exact, read back before they get their names, and read by those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_model

import minllama.formats.export as E
from check_model_precision import inspect
from llama import Llama, load_pretrained
from minllama.formats.export import export
from minllama.system.errors import UsageError
from tokenizer import Tokenizer


def write(model: Llama, target: str, output: Path, *, dtype: str = "float32", tokenizer=None):
    return export(model, target, output, dtype=dtype, tokenizer=tokenizer, extra={})


def assert_holds(path: Path, want: dict[str, torch.Tensor]) -> None:
    got = load_pretrained(path).state_dict()
    assert {*got} == {*want}
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


# ---------------------------------------------------------------------------- any format


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["bin", "hf", "pt"])
def test_float32_is_written_exactly(tmp_path: Path, tied: bool, target: str):
    if target == "hf":
        pytest.importorskip("safetensors")
    model = make_model(tie_word_embeddings=tied)
    assert write(model, target, tmp_path / "there") == [tmp_path / "there"]
    assert_holds(tmp_path / "there", model.state_dict())
    assert load_pretrained(tmp_path / "there").config.tie_word_embeddings == tied


@pytest.mark.parametrize("target", ["pt", "hf"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_precision_of_what_is_written(tmp_path: Path, tokenizer: Tokenizer, name: str, target: str):
    """Half the bytes for half the bits; the vocabulary comes along."""
    if target == "hf":
        pytest.importorskip("safetensors")
    model = make_model(tokenizer)
    write(model, target, tmp_path / "it", dtype=name, tokenizer=tokenizer)
    report = inspect(tmp_path / "it", verify=True)
    assert report.dtypes == {name: 21 if target == "pt" else 20} and report.sound
    assert report.parts["weights"] == report.parameters * (4 if name == "float32" else 2)
    dtype = getattr(torch, name)
    assert_holds(
        tmp_path / "it", {key: w.to(dtype).float() for key, w in model.state_dict().items()}
    )
    assert load_pretrained(tmp_path / "it").vocabulary == model.vocabulary


def test_a_failing_self_check_publishes_nothing(tmp_path: Path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(E, "write_bin", lambda model, file, group: file.write(b"half a file"))
    with pytest.raises(UsageError, match="not a model file"):
        write(model, "bin", tmp_path / "a.bin")
    real = E.to_half_split
    monkeypatch.setattr(E, "to_half_split", lambda weight, heads: -real(weight, heads))
    with pytest.raises(UsageError, match="self-check: layers.0.attention.compute_"):
        write(model, "hf", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_kept_where_its_replacement_fails(tmp_path: Path, monkeypatch):
    """It is moved aside only when the new one is whole, and back if that cannot take its name."""
    model, folder = make_model(), tmp_path / "hf"
    write(model, "hf", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(E, "check_read_back", lambda path, want: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(make_model(rope_theta=7.0), "hf", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


# ---------------------------------------------------------------------------- llama2.c


def test_llama2cs_own_file_is_written_byte_for_byte(real_data: Path, tmp_path: Path):
    source = real_data / "stories260K.bin"
    model = load_pretrained(source)
    write(model, "pt", tmp_path / "a.pt")
    write(load_pretrained(tmp_path / "a.pt"), "bin", tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == source.read_bytes()


def test_tokenizer_bin_is_beside_the_bin(tmp_path: Path, tokenizer: Tokenizer):
    """run.c reads it: uint32 longest token, then for each float32 score, int32 length, bytes."""
    paths = write(make_model(tokenizer), "bin", tmp_path / "model.bin", tokenizer=tokenizer)
    assert paths == [tmp_path / "model.bin", tmp_path / "tokenizer.bin"]
    assert len(paths[1].read_bytes()) > 9 * tokenizer.n_words


@pytest.mark.parametrize("hidden_dim, group", [(192, 16), (172, 4), (128, 16)])
def test_int8_groups_divide_every_row(tmp_path: Path, hidden_dim: int, group: int):
    """runq reads w2 in rows of hidden_dim; groups that divide only dim gave it garbage."""
    model = make_model(hidden_dim=hidden_dim)
    with torch.no_grad():
        model.layers[0].feed_forward.w2.weight[3] = 0  # a scale of zero must not make NaN
    write(model, "bin-int8", tmp_path / "a.bin")
    assert E.group_size(model.config) == group
    assert inspect(tmp_path / "a.bin", verify=True).dtypes == {"int8": 16, "float32": 5}
    got = load_pretrained(tmp_path / "a.bin").state_dict()
    for name, tensor in model.state_dict().items():
        error = (got[name] - tensor).abs()
        if tensor.dim() == 1:
            assert not error.any()
        else:
            largest = tensor.reshape(-1, group).abs().amax(1, keepdim=True)
            assert (error.reshape(-1, group) <= largest / 254 * 1.001).all(), name


@pytest.mark.parametrize("target", ["bin", "bin-int8"])
def test_llama2c_cannot_hold_another_theta(tmp_path: Path, target: str):
    with pytest.raises(UsageError, match="rope_theta 10000, not 500"):
        write(make_model(rope_theta=500.0), target, tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------- transformers


def test_transformers_loads_the_folder_with_equal_logits(tmp_path: Path, tokenizer: Tokenizer):
    transformers = pytest.importorskip("transformers")
    model = make_model(tokenizer, rope_theta=777.0)
    write(model, "hf", tmp_path / "hf", tokenizer=tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(model.config.vocab_size, (2, 40))
    with torch.no_grad():
        logits = theirs(tokens).logits
        torch.testing.assert_close(model(tokens, tokens)[0], logits, rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    same = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in E.SAMPLES:
        assert same(text)["input_ids"] == tokenizer.encode(text, bos=True, eos=False), text
        plain = tokenizer.encode(text, bos=False, eos=False)
        assert same(text, add_special_tokens=False)["input_ids"] == plain
        assert same.decode(plain) == tokenizer.decode(plain)
    assert (same.bos_token_id, same.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


ALPHABET = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t▁aetho<s>/0x.,!'🙂世é")
)


def exported(ours: Tokenizer):
    """Our vocabulary in the `tokenizers` library, which takes special names in a text as text."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(E.tokenizer_json(ours)))
    theirs.encode_special_tokens = True
    return theirs


@pytest.fixture(scope="module")
def exported_tokenizer(tokenizer: Tokenizer):
    return exported(tokenizer)


@given(text=st.text(ALPHABET, max_size=60))
@settings(max_examples=300, deadline=None)
def test_exported_tokenizer_gives_our_ids_for_any_text(tokenizer, exported_tokenizer, text: str):
    """Leading spaces, newlines, emoji, special names in the text: the ids SentencePiece gives."""
    ids = tokenizer.encode(text, bos=True, eos=False)
    assert exported_tokenizer.encode(text).ids == ids


def test_exported_llama2_vocabulary_gives_our_ids_on_reviews(real_data: Path):
    ours = Tokenizer(tokenizer_model=real_data / "tokenizer.model")
    theirs = exported(ours)
    lines = (real_data / "sst-dev.txt").read_text(encoding="utf-8").splitlines()[:100]
    for text in (*E.SAMPLES, *lines, "\n".join(lines)):
        assert theirs.encode(text).ids == ours.encode(text, bos=True, eos=False)


def test_another_tokenizer_json_than_ours_is_found_before_it_is_published(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch
):
    pytest.importorskip("tokenizers")
    content = E.tokenizer_json(tokenizer)
    content["model"]["merges"] = content["model"]["merges"][:100]
    monkeypatch.setattr(E, "tokenizer_json", lambda tokenizer: content)
    with pytest.raises(UsageError, match="self-check: tokenizer.json gives other ids for 'Once"):
        write(make_model(tokenizer), "hf", tmp_path / "hf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
