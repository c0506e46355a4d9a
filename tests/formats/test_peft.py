"""Adapter folders of PEFT: merged into the model that they name, or refused in one line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from chat_templates import CHATML
from oracles import make_llama, write, write_adapter

from check_model_precision import inspect
from config import LlamaConfig
from llama import Llama, load_pretrained
from minllama.formats.find_model import model_in
from minllama.formats.model_file import read_model
from minllama.system.errors import UsageError
from minllama.text.jinja_template import JinjaTemplate

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def model(tiny_config: LlamaConfig) -> Llama:
    return make_llama(tiny_config)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("stabilised", [True, False])
def test_an_adapter_is_merged_into_the_model_that_it_names(
    model: Llama, tmp_path: Path, beside: bool, stabilised: bool
):
    """alpha / r times B A, or with rsLoRA alpha / sqrt(r); the folder by its path, or beside."""
    write(model, "hf", tmp_path / "base")
    named = "../base" if beside else str(tmp_path / "base")
    added = write_adapter(tmp_path / "adapter", named, use_rslora=stabilised)
    scaling = 12 / (math.sqrt(3) if stabilised else 3)
    assert model_in(tmp_path / "adapter", "FILE") == tmp_path / "adapter"
    write(load_pretrained(tmp_path / "adapter"), "hf", tmp_path / "merged")
    before = safetensors.load_file(tmp_path / "base" / "model.safetensors")
    merged = safetensors.load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == merged.keys()
    for name, tensor in merged.items():
        want = before[name] + scaling * added.get(name, torch.zeros(()))
        torch.testing.assert_close(tensor, want, rtol=1e-5, atol=1e-5)
    assert inspect(tmp_path / "adapter").format == "PEFT adapter"


def test_an_adapter_beside_a_config_or_a_whole_model(model: Llama, tmp_path: Path, capsys):
    """Some trainers put the model's config.json there: "no model.safetensors in this folder". And
    beside a model it was left out without a word."""
    folder = tmp_path / "adapter"
    write(model, "hf", tmp_path / "base")
    write_adapter(folder, "../base")
    merged = load_pretrained(folder).state_dict()
    for name in ("config.json", "model.safetensors"):
        assert not capsys.readouterr().err
        (folder / name).write_bytes((tmp_path / "base" / name).read_bytes())
        for path in (folder / "adapter_model.safetensors", folder):
            got = load_pretrained(path).state_dict()
            want = model.state_dict() if (path / "model.safetensors").exists() else merged
            assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())
    assert "adapter_model.safetensors in it is left out" in capsys.readouterr().err


def test_an_adapter_has_the_chat_template_that_it_was_trained_with(model: Llama, tmp_path: Path):
    """TRL saves it beside the adapter to a model that may have none, and it was not read."""
    write(model, "hf", tmp_path / "base")
    write_adapter(tmp_path / "adapter", "../base")
    assert load_pretrained(tmp_path / "adapter").chat_template is None
    (tmp_path / "adapter" / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert load_pretrained(tmp_path / "adapter").chat_template == JinjaTemplate(CHATML)


@pytest.mark.filterwarnings("ignore")  # of theirs, about theirs
def test_pefts_own_adapter_gives_pefts_own_logits(model: Llama, tmp_path: Path):
    """Written, and computed with, by PEFT itself."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    write(model, "hf", tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").float()
    settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)
    theirs = peft.get_peft_model(theirs, settings).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = torch.randint(64, (2, 20))
    with torch.no_grad():
        got = load_pretrained(tmp_path / "adapter")(tokens, tokens)[0]
        assert (got - theirs(tokens).logits).abs().max() < 1e-4


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.score.weight"] = tensors.popitem()[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base": "meta-llama/Llama-3.2-1B"}, "'meta-llama/Llama-3.2-1B', which is no folder of a"),
        ({"base_model_name_or_path": None}, "is an adapter to 'None', which is no folder"),
        ({"base_model_name_or_path": "a\0b"}, "which is no folder"),
        ({"base_model_name_or_path": "x" * 5000}, "which is no folder"),
        ({"base_model_name_or_path": "\ud800"}, "which is no folder"),
        ({"base_model_name_or_path": ["base"]}, "which is no folder"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported: merge it with PEFT"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is not supported"),
        ({"modules_to_save": ["score"]}, "modules_to_save is not supported"),
        ({"r": 0}, "r '0' and lora_alpha '12' are no numbers"),
        ({"r": "3"}, "r '3' and"),
        ({"r": 4}, "is no part of a pair of rank 4"),
        ({"lora_alpha": float("nan")}, "lora_alpha 'nan' are no numbers"),
    ],
)
def test_an_adapter_that_is_more_or_less_is_refused(
    model: Llama, tmp_path: Path, changes: dict, message: str
):
    write(model, "hf", tmp_path / "base")
    write_adapter(tmp_path / "adapter", changes.pop("base", "../base"), **({"rank": 3} | changes))
    with pytest.raises(UsageError, match=message) as raised:
        read_model(tmp_path / "adapter")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (rename, "is no part of a pair of rank 3"),
        (lambda t: t.popitem(), "is no part of a pair"),
        (lambda t: t.update({k: v[:1] for k, v in t.items() if "lora_B" in k}), "has no matrix"),
        (
            lambda t: t.update({k.replace("layers.0", "layers.9"): t.pop(k) for k in [*t]}),
            "has no matrix model.layers.9.*for the adapter to add to",
        ),
    ],
)
def test_matrices_that_do_not_fit_are_refused(model: Llama, tmp_path: Path, change, message: str):
    write(model, "hf", tmp_path / "base")
    write_adapter(tmp_path / "adapter", "../base")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(UsageError, match=message):
        read_model(tmp_path / "adapter")
