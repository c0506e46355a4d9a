"""Packed weights against their values."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import runpy

import pytest
import torch
import torch.nn.functional as F
from oracles import make_llama

import minllama.model.packing as P
from config import DATA_DIR, SHIPPED_MODEL, LlamaConfig
from llama import load_pretrained
from tokenizer import Tokenizer


@pytest.mark.parametrize("width", [6, 40, 50, 64])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int8_products_of_any_width(width: int, rows: int):
    """torch's kernel is wrong for, or crashes on, rows that are no multiple of 16 wide."""
    x, weight = torch.randn(rows, width), torch.randn(11, width)
    packed = P.PackedLinear(weight, torch.int8)
    want = x @ (packed.weight * packed.scale[:, None]).t()
    assert (packed(x) - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("private", [True, False], ids=["torch's own operators", "plain"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_packed_weights_compute_what_their_values_say(
    tiny_config: LlamaConfig, dtype: torch.dtype, tied: bool, rows: int, private: bool, monkeypatch
):
    """The oracle is a plain model whose weights were rounded by the definition and put back.

    One row, a few, and many are multiplied differently; bfloat16 also rounds the other factor.
    """
    if not private:
        monkeypatch.setattr(P, "ONEDNN", False)
        monkeypatch.setattr(P, "INT8_WIDTH", 1 << 20)
    model = make_llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    packed = copy.deepcopy(model)
    P.pack_weights(packed, dtype, rows=rows)
    with torch.inference_mode():
        for weight in model.parameters():
            if weight.dim() == 2 and dtype == torch.int8:
                scale = weight.abs().max(dim=1, keepdim=True).values / 127
                weight.copy_((weight / scale).round().clamp(-127, 127) * scale)
            elif weight.dim() == 2:
                weight.copy_(weight.to(dtype))
        assert torch.equal(packed.tok_embeddings(torch.arange(64)), model.tok_embeddings.weight)
        bound = 1e-4 if dtype == torch.float32 else 0.05
        for shape in ((1, 1), (2, 7), (5, 9)):
            tokens = torch.randint(64, shape)
            want = model.output(model.hidden_states(tokens))
            got = packed.output(packed.hidden_states(tokens))
            assert (got - want).norm() <= bound * want.norm()


def test_onednns_product_is_left_alone_where_torch_has_no_onednn(monkeypatch):
    """Such a torch may have the operator's name, and raises when it is called."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert runpy.run_path(P.__file__)["ONEDNN"] is False


@pytest.mark.parametrize("dtype, percent", [(torch.bfloat16, 0.1), (torch.int8, 0.5)])
def test_packed_weights_cost_little_perplexity(dtype: torch.dtype, percent: float):
    """A trained model on stories it has not seen: what they cost is told, and stays small."""
    stories = (DATA_DIR / "stories-val.jsonl").read_text(encoding="utf-8").splitlines()
    model = load_pretrained(SHIPPED_MODEL)
    tokenizer = Tokenizer(tokenizer_model=None)
    rows = [tokenizer.encode(json.loads(line)["text"], True, False)[:257] for line in stories[:8]]
    losses = []
    for packed in (False, True):
        if packed:
            P.pack_weights(model, dtype)
        with torch.inference_mode():
            hidden = [model.hidden_states(torch.tensor([row[:-1]]))[0] for row in rows]
            targets = torch.tensor([token for row in rows for token in row[1:]])
            losses.append(F.cross_entropy(model.output(torch.cat(hidden)), targets).item())
    assert abs(math.expm1(losses[1] - losses[0])) <= percent / 100
