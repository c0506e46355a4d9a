"""GGUF files: llama.cpp itself continues with our text, and what is no such file is refused."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_vocabularies import KINDS, byte_vocabulary, tokenizer_json
from llama_cpp_server import llama_cpp, our_tokens, their_ids, their_tokens
from oracles import assert_same_weights, make_model
from vocabularies import vocabulary

import check_model_precision as C
import minllama.formats.gguf
from config import SHIPPED_MODEL
from llama import Llama, load_pretrained, model_payload
from minllama.formats.export import export
from minllama.formats.gguf import tensor_name
from minllama.formats.model_file import read_contents
from minllama.formats.vocabularies import SAMPLES
from minllama.system.errors import UsageError
from minllama.text.chat import ChatTemplate
from minllama.vocabulary.byte_bpe import pack
from tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")


def write(model: Llama, path: Path, tokenizer: Tokenizer, dtype: str = "float32") -> Path:
    return export(model, "gguf", path, dtype=dtype, tokenizer=tokenizer, extra={})[0]


# ---------------------------------------------------------------------------- llama.cpp


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_llama_cpp_continues_with_our_very_tokens(tmp_path: Path, dtype: str):
    """The shipped model through the command line: same ids for odd strings, 100 greedy tokens."""
    path = tmp_path / "model.gguf"
    words = [str(SHIPPED_MODEL), "--convert", "gguf", "--output", str(path), "--save_dtype", dtype]
    assert C.main(words) == 0
    model = load_pretrained(path)
    tokenizer = Tokenizer(tokenizer_model=model.vocabulary)
    with llama_cpp(path) as ask:
        for text in filter(None, SAMPLES):  # it puts a space token before nothing
            assert their_ids(ask, text) == tokenizer.encode(text, bos=True, eos=False), text
        theirs = their_tokens(ask, "One day a fox", 100)
    if dtype == "float32":
        assert theirs == our_tokens(model, tokenizer, "One day a fox", 100)
    else:  # llama.cpp rounds what it multiplies them by, too: where two are nearly as likely
        ids = tokenizer.encode("One day a fox", bos=True, eos=False)
        every = torch.tensor([ids + theirs])
        logits = model(every, targets=every)[0][0, len(ids) - 1 : -1]
        behind = logits.amax(dim=-1) - logits.gather(1, torch.tensor(theirs)[:, None])[:, 0]
        assert behind.max() < 0.5 and (behind == 0).float().mean() > 0.9, behind


def test_llama_cpp_reads_grouped_queries_an_own_head_and_another_theta(tmp_path, tokenizer):
    """What the shipped model does not have. A theta without a point in its config.json, as
    SmolLM2's and Qwen3's, was written as a whole number, which llama.cpp does not load."""
    shape = {"dim": 64, "rope_theta": 500, "layer_norm_eps": 1e-4, "max_seq_len": 64}
    model = make_model(tokenizer, tie_word_embeddings=False, **shape)
    with llama_cpp(write(model, tmp_path / "model.gguf", tokenizer)) as ask:
        assert their_tokens(ask, "A bird", 16) == our_tokens(model, tokenizer, "A bird", 16)


PACKED = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 IQ1_S IQ1_M IQ2_XXS IQ2_XS"
PACKED += " IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS MXFP4 BF16 F16"


@pytest.mark.parametrize("kind", PACKED.split())
def test_every_type_that_the_package_widens_is_read(kind: str, tmp_path: Path):
    """Random blocks of it, as the package widens them."""
    kinds = gguf.GGMLQuantizationType
    if kind not in kinds.__members__:
        pytest.skip(f"this gguf has no {kind}")
    size, stored = gguf.GGML_QUANT_SIZES[kinds[kind]]
    random_bytes = np.random.default_rng(0).integers(0, 256, (256, 256 // size * stored), np.uint8)
    floats = {"F16": np.float16}.get(kind)
    packed = random_bytes if floats is None else random_bytes.view(floats)
    shape = {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 256, "n_layers": 1}
    state = make_model(vocab_size=256, **shape).state_dict()
    del state["output.weight"]
    encoded = {
        tensor_name(name): (t.numpy(), kinds.F32) if t.dim() == 1 else (packed, kinds[kind])
        for name, t in state.items()
    }
    values = {"context_length": 40, "embedding_length": 256, "block_count": 1}
    values |= {"feed_forward_length": 256, "attention.head_count": 4}
    values |= {"attention.layer_norm_rms_epsilon": 1e-5}
    with open(tmp_path / "a.gguf", "wb") as file:
        metadata = {f"llama.{key}": value for key, value in values.items()}
        minllama.formats.gguf.write_file(gguf, file, metadata, encoded)
    got = load_pretrained(tmp_path / "a.gguf").state_dict()
    with np.errstate(all="ignore"):
        want = torch.from_numpy(gguf.quants.dequantize(packed, kinds[kind])).float()
    for name, tensor in got.items():
        if tensor.dim() == 2:
            assert torch.equal(tensor.nan_to_num(), want.nan_to_num()), name


def test_llama_cpp_gives_our_ids_with_llama_2s_vocabulary(tmp_path: Path, real_data: Path):
    tokenizer = vocabulary("llama-2")
    model = make_model(tokenizer, dim=32, n_layers=1)
    lines = (real_data / "sst-dev.txt").read_text(encoding="utf-8").splitlines()[:20]
    with llama_cpp(write(model, tmp_path / "model.gguf", tokenizer)) as ask:
        for text in (*filter(None, SAMPLES), *lines):
            assert their_ids(ask, text) == tokenizer.encode(text, bos=True, eos=False), text


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_llama_cpp_holds_a_conversation_as_we_do(tmp_path: Path, tokenizer: Tokenizer, kind: str):
    """Its ids of a dialogue, by the template in the file, are those that were trained on."""
    tokenizer = byte_vocabulary(kind) if kind else tokenizer
    model = make_model(tokenizer, max_seq_len=256)
    model.chat_template = ChatTemplate()
    path = write(model, tmp_path / "model.gguf", tokenizer)
    said = ["Be brief.", "Where does a fox live?", "In a den.", "And a bear, 狐狸 ?"]
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": r, "content": text} for r, text in zip(roles, said, strict=True)]
    ours = ChatTemplate().prompt_ids(tokenizer, said[3], [(said[1], said[2])], said[0])
    with llama_cpp(path) as ask:
        text = ask("apply-template", messages=messages)["prompt"]
        bos = tokenizer.vocabulary.name(ours[0])
        special = {"add_special": not text.startswith(bos), "parse_special": True}
        assert ask("tokenize", content=text, **special)["tokens"] == ours
        options = {"temperature": 0, "max_tokens": 12, "return_tokens": True}
        answer = ask("v1/chat/completions", messages=messages, **options)
    assert answer["usage"]["prompt_tokens"] == len(ours)
    assert load_pretrained(path).chat_template == ChatTemplate()


def test_ollamas_recipe_has_the_chat_template(tmp_path: Path, tokenizer: Tokenizer):
    """Ollama begins with BOS by itself; between two questions the template has it."""
    model = make_model(tokenizer)
    model.chat_template = ChatTemplate()
    write(model, tmp_path / "a.gguf", tokenizer)
    recipe = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert 'PARAMETER stop "User:"' in recipe
    assert recipe.partition('"""')[2].partition('"""')[0] == (
        '{{ range .Messages }}{{ if eq .Role "system" }}System: {{ .Content }}\n'
        '{{ else if eq .Role "user" }}User: {{ .Content }}\n'
        "{{ else }}Assistant: {{ .Content }}</s><s>{{ end }}{{ end }}Assistant:"
    )


def test_ollamas_recipe_begins_with_bos_where_ollama_does_not(tmp_path: Path):
    """With a vocabulary whose prompts have none."""
    model = make_model(byte_vocabulary("smollm"))
    model.chat_template = ChatTemplate()
    recipe = minllama.formats.gguf.modelfile(tmp_path / "a.gguf", model, byte_vocabulary("smollm"))
    assert 'TEMPLATE """<|im_start|>{{ range .Messages }}' in recipe
    assert "{{ .Content }}<|im_end|><|im_start|>{{ end }}" in recipe


def directives(recipe: str) -> list[str]:
    """The first words of Ollama's lines: its parser ends a value at a line's end, if the value is
    not in quotes, or if these are closed there. It knows no escapes."""
    words, value = [], ""
    for line in recipe.splitlines(keepends=True):
        if not value:
            words.append(line.split()[0])
            line = line.split(maxsplit=2 if words[-1] == "PARAMETER" else 1)[-1]
        value += line.removesuffix("\n")
        quote = next((quote for quote in ('"""', '"') if value.startswith(quote)), "")
        if value.endswith(quote) and len(value) >= 2 * len(quote):
            value = ""
        else:
            value += "\n"
    assert not value
    return words


@pytest.mark.parametrize(
    "eos", ['</s>"\nADAPTER ./evil.bin\n#"', '"""\nADAPTER x\n', "{{ .Evil }}", " "]
)
@pytest.mark.parametrize("chat", [True, False])
def test_a_vocabulary_writes_no_directives_into_ollamas_recipe(
    tmp_path: Path, eos: str, chat: bool
):
    """An EOS piece that closes the quote and begins a line wrote `ADAPTER ...` into the Modelfile
    beside a converted model, which Ollama obeys."""
    named = SimpleNamespace(name=["<s>", eos].__getitem__, stated_marks=(0, 1), adds_bos=True)
    piece = SimpleNamespace(vocabulary=named)  # as far as a recipe asks it
    model = make_model()
    model.chat_template = ChatTemplate() if chat else None
    recipe = minllama.formats.gguf.modelfile(tmp_path / "a b.gguf", model, piece)
    stops = ["PARAMETER"] * chat  # the next question; a piece in need of quotes is none
    assert directives(recipe) == ["FROM", "TEMPLATE", "PARAMETER", *stops]
    assert recipe.startswith('FROM "./a b.gguf"\n')
    assert "{{ .Evil }}" not in recipe.replace('"{{ .Evil }}"', "")  # in Go's quotes


@pytest.mark.parametrize("name", ["a\nADAPTER x", 'a".gguf', "a\\b.gguf"])
def test_a_name_writes_no_directives_into_ollamas_recipe(tmp_path: Path, tokenizer, name: str):
    """A new line in --output began one of its own."""
    if os.name == "nt":
        pytest.skip("no file has such a name there")
    with pytest.raises(UsageError, match="Modelfile can hold no name"):
        write(make_model(tokenizer), tmp_path / name, tokenizer)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["Modelfile", "modelfile"])
def test_a_model_is_not_named_as_its_recipe(tmp_path: Path, capsys, name: str):
    """The recipe replaced the model, and "read back and equal" was said of both."""
    words = [str(SHIPPED_MODEL), "--convert", "gguf", "--output", str(tmp_path / name)]
    assert C.main(words) == 2
    assert f"{name}: is the name of a file beside the model" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_second_model_has_a_recipe_of_its_own(tmp_path: Path, capsys):
    """`--output b.gguf` beside a.gguf was refused: "Modelfile: is there already"."""
    for name, words in (("a", []), ("b c", []), ("a", ["--overwrite"]), ("b c", ["--overwrite"])):
        output = tmp_path / f"{name}.gguf"
        words = [str(SHIPPED_MODEL), "--convert", "gguf", "--output", str(output), *words]
        assert C.main(words) == 0, capsys.readouterr().err
    recipes = {path.name: path.read_text("utf-8") for path in tmp_path.glob("*Modelfile")}
    assert recipes.keys() == {"Modelfile", "b c.gguf.Modelfile"}
    assert recipes["Modelfile"].startswith("FROM ./a.gguf\n")
    assert recipes["b c.gguf.Modelfile"].startswith('FROM "./b c.gguf"\n')
    (tmp_path / "a.gguf").unlink()
    words = [str(SHIPPED_MODEL), "--convert", "gguf", "--output", str(tmp_path / "a.gguf")]
    assert C.main(words) == 2  # a recipe that may have been changed since is not replaced
    assert "Modelfile: is there already; --overwrite" in capsys.readouterr().err


# ---------------------------------------------------------------------------- written, read back


@pytest.mark.parametrize("tied", [True, False])
def test_float32_is_exact_and_every_setting_comes_back(tmp_path: Path, tokenizer, tied: bool):
    """A shape through GGUF and back is the same: float32 once made 9.999999747e-06 of 1e-05."""
    changes = {"rope_theta": 12345.0, "tie_word_embeddings": tied, "hidden_dim": 80}
    model = make_model(tokenizer, **changes)
    back = load_pretrained(write(model, tmp_path / "a.gguf", tokenizer))
    assert_same_weights(back, model)
    same = Tokenizer(tokenizer_model=back.vocabulary)
    assert [same.sp_model.get_score(i) for i in range(50)] == [
        tokenizer.sp_model.get_score(i) for i in range(50)
    ]
    assert same.vocabulary.is_plain_bpe and same.pad_id == tokenizer.pad_id
    text = "".join(random.Random(0).choices("abc the .,\n  \u2581é你🙂<s>0x", k=3000))
    assert same.encode(text, bos=True, eos=True) == tokenizer.encode(text, bos=True, eos=True)


def by_hand(tensor: torch.Tensor) -> torch.Tensor:
    """Q8_0 as ggml defines it, block by block: 32 whole numbers and a scale in float16."""
    found = []
    for block in tensor.numpy().reshape(-1, 32):
        scale = np.abs(block).max() / np.float32(127)
        steps = block * (np.float32(1) / scale) if scale else block
        whole = np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps)
        found.append(whole * np.float32(np.float16(scale)))
    return torch.from_numpy(np.stack(found)).view(tensor.shape)


def test_q8_0_is_ggmls(tmp_path: Path, tokenizer: Tokenizer, capsys):
    """Vectors stay float32; rows that are no whole blocks, here of w2, become float16."""
    model = make_model(tokenizer, dim=64, hidden_dim=80)
    with torch.no_grad():
        model.layers[1].feed_forward.w1.weight[3, :32] = 0
    path = write(model, tmp_path / "a.gguf", tokenizer, "q8_0")
    got, stored = load_pretrained(path).state_dict(), read_contents(path)
    for name, tensor in model.state_dict().items():
        want = tensor if tensor.dim() == 1 else by_hand(tensor)
        want = tensor.half().float() if name.endswith("w2.weight") else want
        assert torch.equal(got[name], want), name
    assert stored.dtypes[tensor_name("layers.0.feed_forward.w2.weight")] == "float16"
    assert C.main([str(path), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "a.gguf: GGUF" in out and "13 q8_0, 2 float16, 5 float32" in out and "verified" in out
    held = stored.packed_bytes
    assert C.inspect(path).parts["weights"] == held < 0.4 * 4 * sum(t.numel() for t in got.values())


@pytest.mark.parametrize("kind", ["F64", "BF16", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"])
def test_every_precision_that_llama_cpps_package_widens_is_read(tmp_path: Path, kind: str):
    """Only four used to be; the report names the file's own, and counts its bytes."""
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((3, 256 // block * size), np.uint8)
    data[:, ::3] = 7
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(64)
    for name in ("a", "b"):
        writer.add_tensor(name, data, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file):
        step()
    writer.write_tensors_to_file()
    writer.close()
    contents = read_contents(tmp_path / "a.gguf")
    want = data.view(np.float64) if kind.name == "F64" else gguf.dequantize(data, kind)
    assert contents.values["model"]["a"].shape == (3, 256) and np.isfinite(want).all()
    assert np.array_equal(contents.values["model"]["a"].numpy(), want)
    names = {"F64": "float64", "BF16": "bfloat16"}
    assert contents.dtypes == dict.fromkeys("ab", names.get(kind.name, kind.name.lower()))
    assert contents.packed_bytes == 2 * data.nbytes


@pytest.mark.parametrize("kind", ["qwen2", "llama-bpe"])
def test_what_a_vocabulary_loses_is_told(tmp_path: Path, kind: str, capsys):
    """Qwen's composes its text first, and a file could not say so: other ids, without a word."""
    file = json.loads(tokenizer_json(kind))
    write(make_model(byte_vocabulary(kind)), tmp_path / "a.gguf", byte_vocabulary(kind))
    assert not capsys.readouterr().err
    file["normalizer"] = {"type": "NFC"}
    file["model"]["ignore_merges"] = not file["model"]["ignore_merges"]
    changed = Tokenizer(tokenizer_model=pack(file, KINDS[kind][2], kind))
    write(make_model(changed), tmp_path / "b.gguf", changed)
    noted = capsys.readouterr().err
    assert noted.count("has no place in a GGUF file") == 2
    assert "normalizer NFC" in noted and f"ignore_merges {kind == 'qwen2'}" in noted


def test_without_the_package_the_remedy_is_named(tmp_path: Path, tokenizer: Tokenizer, monkeypatch):
    """Whatever is done with such a file."""
    path = write(make_model(tokenizer), tmp_path / "a.gguf", tokenizer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="needs another package: pip install gguf"):
        load_pretrained(path)
    with pytest.raises(UsageError, match="needs another package: pip install gguf"):
        write(make_model(tokenizer), tmp_path / "b.gguf", tokenizer)
    assert not (tmp_path / "b.gguf").exists()


def test_it_converts_from_and_to_gguf(tmp_path: Path, tokenizer: Tokenizer):
    """Half precision to GGUF and back to .pt loses nothing, and the vocabulary goes with it."""
    source, middle, back = (tmp_path / name for name in ("a.pt", "m/b.gguf", "c.pt"))
    torch.save(model_payload(make_model(tokenizer), torch.float16), source)
    for path, target, output in ((source, "gguf", middle), (middle, "pt", back)):
        words = [str(path), "--convert", target, "--output", str(output)]
        assert C.main([*words, "--save_dtype", "float16"]) == 0
    one, two = load_pretrained(source), load_pretrained(back)
    for name, tensor in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], tensor)
    assert Tokenizer(tokenizer_model=two.vocabulary).n_words == tokenizer.n_words
    recipe = (tmp_path / "m" / "Modelfile").read_text(encoding="utf-8")
    assert recipe.startswith("FROM ./b.gguf\n") and "num_ctx 40" in recipe
    assert 'PARAMETER stop "</s>"' in recipe and "{{ .Prompt }}" in recipe


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path, tokenizer: Tokenizer, capsys):
    """Before a file is there: no vocabulary, one that llama.cpp cuts otherwise, huge weights."""
    unigram = vocabulary("unigram-identity")
    for model, words, message in (
        (make_model(), None, "llama.cpp needs a vocabulary in the file: name its vocabulary"),
        (make_model(unigram), unigram, "only BPE vocabularies"),
    ):
        with pytest.raises(UsageError, match=message):
            write(model, tmp_path / "a.gguf", words)
    model = make_model(tokenizer)
    model.layers[0].feed_forward.w2.weight.data[0, 0] = 1e9
    for dtype in ("float16", "q8_0"):
        with pytest.raises(UsageError, match=f"w2.weight has numbers beyond {dtype}"):
            write(model, tmp_path / "a.gguf", tokenizer, dtype)
    assert list(tmp_path.iterdir()) == []
    words = [str(SHIPPED_MODEL), "--save_dtype", "q8_0", "--output", str(tmp_path / "a.pt")]
    assert C.main([*words, "--convert", "pt"]) == 2
    assert "--save_dtype q8_0 is for --convert gguf" in capsys.readouterr().err


# ---------------------------------------------------------------------------- hostile files


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, value) -> bytes:
    """A value of the header, written by the rules of the format and by no code of the program."""
    if isinstance(value, bytes):
        return text(key) + value
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        kind, code = (6, "f") if isinstance(value[0], float) else (5, "i")
        return text(key) + struct.pack(f"<IIQ{len(value)}{code}", 9, kind, len(value), *value)
    kind, code = (6, "<f") if isinstance(value, float) else (4, "<I")
    return text(key) + struct.pack("<I", kind) + struct.pack(code, value)


class Crafted:
    """A GGUF file of a tiny Llama, made here from nothing, to be changed before it is written."""

    def __init__(self) -> None:
        shape = {"token_embd": (270, 4), "output_norm": (4,)}
        shape |= {f"blk.0.{name}": (4,) for name in ("attn_norm", "ffn_norm")}
        shape |= {f"blk.0.attn_{name}": (4, 4) for name in ("q", "k", "v", "output")}
        shape |= {f"blk.0.ffn_{name}": (8, 4) for name in ("gate", "up")}
        shape |= {"blk.0.ffn_down": (4, 8)}
        self.values = {
            "general.architecture": "llama",
            "llama.context_length": 16,
            "llama.embedding_length": 4,
            "llama.block_count": 1,
            "llama.feed_forward_length": 8,
            "llama.attention.head_count": 2,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"]
            + [f"<0x{i:02X}>" for i in range(256)]
            + [chr(97 + i) for i in range(11)],
            "tokenizer.ggml.scores": [0.0] * 259 + [float(-i) for i in range(11)],
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 11,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
        self.tensors = {  # dimensions, the innermost first; type; bytes of zeros
            f"{name}.weight": [list(dims[::-1]), 0, 4 * int(np.prod(dims))]
            for name, dims in shape.items()
        }
        self.version, self.extra, self.tail = 3, b"", 0
        self.counts: dict[str, int] = {}
        self.offsets: dict[str, int] = {}

    def write(self, path: Path) -> Path:
        counts = {"tensors": len(self.tensors), "values": len(self.values)} | self.counts
        header = struct.pack("<4sIQQ", b"GGUF", self.version, counts["tensors"], counts["values"])
        header += b"".join(entry(key, value) for key, value in self.values.items()) + self.extra
        offset = 0
        for name, (dims, kind, size) in self.tensors.items():
            at = self.offsets.get(name, offset)
            header += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, at)
            offset += -(-size // 32) * 32
        path.write_bytes(
            header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(offset + self.tail)
        )
        return path


def test_a_file_made_by_hand_loads(tmp_path: Path):
    """With what it leaves out: grouped queries, theta, the head, the sizes of a head."""
    crafted = Crafted()
    crafted.values |= {"llama.rope.scaling.type": "none", "llama.expert_count": 0}
    crafted.values |= {"llama.tensor_data_layout": "Meta AI original pth", "general.name": "x"}
    model = load_pretrained(crafted.write(tmp_path / "a.gguf"))
    assert (model.config.n_kv_heads, model.config.rope_theta, model.config.max_seq_len) == (
        2,
        1e4,
        16,
    )
    assert (
        model.config.layer_norm_eps == 1e-5 and model.output.weight is model.tok_embeddings.weight
    )
    assert Tokenizer(tokenizer_model=model.vocabulary).decode([260, 261]) == "bc"
    crafted.values["tokenizer.ggml.model"] = "none"  # to be named by the user
    assert load_pretrained(crafted.write(tmp_path / "a.gguf")).vocabulary is None
    crafted.values["tokenizer.ggml.model"] = "bert"  # which no other may stand in for
    with pytest.raises(UsageError, match="its vocabulary is of the kind 'bert': llama and gpt2"):
        load_pretrained(crafted.write(tmp_path / "a.gguf"))


def value(key: str, content) -> Callable[[Crafted], object]:
    return lambda crafted: crafted.values.update({key: content})


def gone(key: str) -> Callable[[Crafted], object]:
    return lambda crafted: crafted.values.pop(key)


def tensor(name: str, *description) -> Callable[[Crafted], object]:
    return lambda crafted: crafted.tensors.update({name: [*description]})


def huge(n: int, kind: int) -> bytes:
    """An array that claims n items."""
    return struct.pack("<IIQ", 9, kind, n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "version", 1), "version 1 which we cannot handle"),
        (lambda c: setattr(c, "version", 3 << 24), "claims more than the file has"),
        (lambda c: c.counts.update(values=2**63), "is no name|a valid GGUFValueType|claims more"),
        (lambda c: c.counts.update(values=9000), "claims more|is no name|a valid GGUFValueType"),
        (lambda c: c.counts.update(tensors=2**63), "claims more than the file has"),
        (value("a\nb", 1), r"'a\\nb' in its header is no name"),
        (tensor("x" * 300, [1], 0, 4), "x' in its header is no name"),
        (value("a", struct.pack("<IQ", 8, 2**62)), "claims more than the file has"),
        (value("a", huge(2**62, 6)), "claims more than the file has"),
        (value("a", huge(2**62, 8)), "claims more than the file has"),
        (value("a", huge(2**40, 0)), "claims more than the file has"),
        (value("a", huge(1, 9) + huge(1, 9)), "is no name|not a valid GGUFValueType"),
        (value("a", struct.pack("<II", 99, 0)), "99. is not a valid GGUFValueType"),
        (value("a", struct.pack("<IQ", 8, 2) + b"\xff\xfe"), "can't decode byte 0xff"),
        (lambda c: (c.counts.update(values=14), setattr(c, "extra", entry("llama.block_count", 1))),
         "Duplicate llama.block_count"),
        (value("general.alignment", 7), "Invalid alignment"),
        (value("general.alignment", 4), "general.alignment 4 is no multiple of 8"),
        (value("general.alignment", 2**31), "claims more than the file has"),
        (value("general.alignment", [32, 32]), "general.alignment"),
        (value("general.alignment", 64), "lies at byte|claims more than the file has"),
        (value("general.architecture", "gemma"), "general.architecture 'gemma'"),
        (gone("general.architecture"), "general.architecture 'None'"),
        (gone("llama.embedding_length"), "--dim None"),
        (gone("llama.attention.layer_norm_rms_epsilon"), "--layer_norm_eps None"),
        (value("llama.embedding_length", "w" * 999), "embedding_length 'w{40}' is no number"),
        (value("llama.block_count", 900), "blk.1.attn_q.weight and 8090 more missing"),
        (value("llama.context_length", 2**31), "--max_seq_len"),
        (value("llama.vocab_size", 2**30), "--vocab_size"),
        (value("llama.vocab_size", 3000), r"token_embd.weight has the shape \(270, 4\)"),
        (value("llama.attention.head_count", [2] * 9999), "head_count '.2, 2, .*' is no number"),
        (value("llama.attention.key_length", 4), r"attn_q.weight has the shape \(4, 4\)"),
        (value("llama.attention.key_length", "4"), "key_length '4' is no number"),
        (value("llama.attention.value_length", 4), "llama.attention.value_length '4' is not supp"),
        (value("general.architecture", "gemma2"), "'gemma2' is another architecture"),
        (value("llama.rope.scaling.factor", -2.0), "rope_scaling's factor -2.0"),
        (value("llama.rope.dimension_count", 1), "llama.rope.dimension_count '1'"),
        (value("llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type 'yarn'"),
        (value("llama.expert_count", 8), "llama.expert_count '8'"),
        (value("llama.attention.sliding_window_pattern", [1, 0]), "sliding_window_pattern"),
        (tensor("rope_freqs.weight", [1], 0, 4), "its rope_freqs.weight are not those of Llama 3"),
        (tensor("rope_freqs.weight", [2**20], 0, 2**22), "rope_freqs.weight are not those"),
        (tensor("blk.0.attn_q.bias", [4], 0, 16), "blk.0.attn_q.bias not of a Llama"),
        (tensor("output_norm.weight", [5], 0, 20), r"output_norm.weight has the shape \(5,\)"),
        (tensor("blk.0.attn_q.weight", [4, 4], 24, 16), "Dequantization for I8 is not"),
        (tensor("blk.0.attn_q.weight", [4, 4], 12, 64), "is not a multiple of Q4_K block size"),
        (tensor("blk.0.attn_q.weight", [4, 4], 77, 64), "77. is not a valid GGMLQuantizationType"),
        (tensor("blk.0.attn_q.weight", [4, 4], 8, 64), "is not a multiple of Q8_0 block size"),
        (tensor("blk.0.attn_q.weight", [2**40, 2**40], 0, 64), "cannot reshape"),
        (tensor("z", [2**40, 2**40], 0, 64), "cannot reshape"),
        (tensor("z", [], 0, 0), "claims more than the file has"),
        (tensor("z", [1] * 9, 0, 4), "tensor z not of a Llama"),
        (lambda c: c.offsets.update({"output_norm.weight": 0}), "norm.weight lies at byte 7,104"),
        (lambda c: c.offsets.update({"output_norm.weight": 2**60}), "claims more than the file"),
        (lambda c: setattr(c, "tail", -64), "claims more than the file has"),
        (value("tokenizer.ggml.tokens", ["a", "b"]), "do not fit together"),
        (value("tokenizer.ggml.token_type", [9] * 270), "do not fit together"),
        (value("tokenizer.ggml.scores", "0"), "do not fit together"),
        (value("tokenizer.ggml.bos_token_id", 270), "do not fit together"),
        (gone("tokenizer.ggml.scores"), "do not fit together"),
        (value("tokenizer.ggml.scores", [float("nan")] * 270), "do not fit together"),
        (value("tokenizer.ggml.scores", struct.pack("<IIQ270d", 9, 12, 270, *[1e300] * 270)),
         "do not fit together"),  # once an OverflowError
        (tensor("z", [0, 2**60], 0, 0), "tensor z not of a Llama"),
        (value("tokenizer.ggml.tokens", ["a"] * 270), "not a SentencePiece model"),
        (value("tokenizer.ggml.token_type", [1] * 270), "not a SentencePiece|has no BOS"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_costs_nothing(tmp_path: Path, change, message: str):
    """A thousand bytes that claim billions: refused in no time, in one line with its name."""
    crafted = Crafted()
    change(crafted)
    path = crafted.write(tmp_path / "bad.gguf")
    start = time.process_time()
    with pytest.raises(UsageError, match=message) as caught:
        load_pretrained(path)
    assert time.process_time() - start < 1
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (huge(2**40, 8) + bytes(10**6), "more than 10,000 parts"),
        (huge(2**40, 0) + bytes(10**6), "claims more than the file has"),
        (struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10**5, "RecursionError"),
    ],
)
def test_a_large_header_takes_bounded_memory(tmp_path: Path, monkeypatch, claim, message):
    """An empty string of 8 bytes costs two hundred in memory: a great many of them are refused."""
    monkeypatch.setattr(minllama.formats.gguf, "MOST_PARTS", 10_000)
    crafted = Crafted()
    crafted.values["a"] = claim
    with pytest.raises(UsageError, match=message) as caught:
        load_pretrained(crafted.write(tmp_path / "a.gguf"))
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path: Path):
    """A byte changed anywhere in the header, or the file cut anywhere."""
    path, coin = Crafted().write(tmp_path / "a.gguf"), random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(coin.randint(1, 3)):
            data[coin.randrange(4, 900)] = coin.randrange(256)
        cut = len(whole) if coin.random() < 0.8 else coin.randrange(len(whole))
        path.write_bytes(data[:cut])
        try:
            load_pretrained(path)
        except UsageError as error:
            assert "a.gguf: " in str(error) and "\n" not in str(error)
