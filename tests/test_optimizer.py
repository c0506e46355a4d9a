"""AdamW against torch's and against its own equations; schedules against torch's."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from config import LlamaConfig
from llama import Llama
from optimizer import (
    AdamW,
    Muon,
    MuonAndAdamW,
    learning_rate,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
)


def adamw_by_hand(weight, gradients, *, lr, betas, eps, weight_decay, correct_bias):
    """The assignment's update, a number at a time in float64."""
    weight = weight.double().clone()
    m = torch.zeros_like(weight)
    v = torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        gradient = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        step_size = lr
        if correct_bias:
            step_size = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        weight = weight - step_size * m / (v.sqrt() + eps)
        weight = weight - lr * weight_decay * weight
    return weight


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 0.9])
@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("way", ["fused", "as on CUDA", "lists"])
def test_update_is_the_equations(way, correct_bias, weight_decay, scale, steps, monkeypatch):
    """Large decay, tiny gradients (where eps rules) and few steps tell apart near-miss updates:
    decay before the update, eps after the bias correction, decay not times lr. Parameters go
    through torch's fused kernel, which on CUDA decays as well; other tensors through its operations
    on lists."""
    kind = torch.clone if way == "lists" else nn.Parameter
    if way == "as on CUDA":
        monkeypatch.setattr("optimizer.DECAYED_INSIDE", ("cpu",))
    generator = torch.Generator().manual_seed(steps)
    start = torch.randn(5, 7, generator=generator)
    gradients = [scale * torch.randn(5, 7, generator=generator) for _ in range(steps)]
    settings = {
        "lr": 0.01,
        "betas": (0.9, 0.99),
        "eps": 1e-6,
        "weight_decay": weight_decay,
        "correct_bias": correct_bias,
    }
    parameter = kind(start.clone())
    optimizer = AdamW([parameter], **settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = adamw_by_hand(start, gradients, **settings)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=2e-5, atol=2e-6)


def test_without_decay_and_eps_it_is_torch_adamw():
    """With no eps to place and no decay to order, the two AdamWs are the same equations."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 4), nn.Linear(6, 4)
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-30, "weight_decay": 0.0}
    optimizers = [AdamW(ours.parameters(), **settings)]
    optimizers += [torch.optim.AdamW(theirs.parameters(), **settings)]
    for _ in range(30):
        x = torch.randn(8, 6)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) ** 2).sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_gradient_laid_out_otherwise_meets_its_own_weights():
    """torch's fused update reads memory in order: it once met a transposed gradient's elements."""
    values, gradient = torch.randn(3, 3), torch.randn(3, 3)
    updated = []
    for layout in (gradient, gradient.t().contiguous().t()):
        weight = nn.Parameter(values.clone())
        weight.grad = layout
        AdamW([weight], lr=0.1).step()
        updated.append(weight.detach())
    torch.testing.assert_close(*updated)


class Shard(torch.Tensor):
    """What FSDP2 makes of a parameter, as far as an optimizer sees it: its shard is another tensor,
    and to compute with the whole would need every rank."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def to_local(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("shape", [(6, 5), (0, 5)])
def test_shards_and_parameters_take_one_launch_a_group(shape, monkeypatch):
    """Each of a group's tensors once, with one count between them: plain parameters, and shards as
    the plain tensors that they are of; a rank may have none of a short tensor's rows."""
    real, calls = torch._fused_adamw_, []

    def fused(weights, *rest, **settings):
        calls.append((list(map(type, weights)), {id(step) for step in rest[4]}))
        real(weights, *rest, **settings)

    monkeypatch.setattr(torch, "_fused_adamw_", fused)
    start, gradient = torch.rand(shape), torch.rand(shape)
    plain = nn.Parameter(start.clone())
    sharded = start.clone().as_subclass(Shard)
    for parameter in (plain, sharded):
        parameter.grad = gradient.clone().as_subclass(type(parameter.data))
        other = nn.Parameter(torch.ones(3))
        other.grad = torch.ones(3)
        AdamW([parameter, other], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(plain.detach(), sharded.to_local())
    for types, counts in calls:
        assert len(types) == 2 and len(counts) == 1 and Shard not in types
    assert len(calls) == 2


def test_on_cuda_a_group_is_one_launch_and_nothing_waits(monkeypatch):
    """The count lies on the device, and the decay is in the kernel: no second pass, no copy."""
    real, settings = torch._fused_adamw_, []

    def fused(*lists, **rest):
        assert {tensor.device.type for of_one in lists for tensor in of_one} == {"cuda"}
        settings.append(rest)
        real(*lists, **rest)

    monkeypatch.setattr(torch, "_fused_adamw_", fused)
    monkeypatch.setattr(torch, "_foreach_add_", lambda *_: 1 / 0)
    monkeypatch.setattr("optimizer.is_fused", lambda parameters, *lists: True)
    with FakeTensorMode(allow_non_fake_inputs=True):  # without memory, on devices that are not here
        weights = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((4, 3), (0, 3))]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        AdamW(weights, lr=0.1, weight_decay=0.2).step()
    (found,) = settings
    assert found["lr"] == pytest.approx(0.1 * (1 - 0.02))
    assert found["lr"] * found["weight_decay"] == pytest.approx(0.02)


def test_parameters_without_gradient_keep_their_own_count():
    """A parameter that joins late gets the bias correction of its own first step."""
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([early, late], lr=0.1)
    early.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert torch.equal(late, torch.ones(3))
    early.grad, late.grad = torch.full((3,), 2.0), torch.full((3,), 2.0)
    optimizer.step()
    fresh = nn.Parameter(torch.ones(3))
    fresh.grad = torch.full((3,), 2.0)
    AdamW([fresh], lr=0.1).step()
    assert torch.equal(late, fresh)


def test_state_survives_saving(tmp_path):
    """A run resumed from the state dict is equal bit for bit, read back without running code."""

    def steps(parameter, optimizer, numbers):
        for number in numbers:
            parameter.grad = torch.full_like(parameter, float(number))
            optimizer.step()

    whole = nn.Parameter(torch.linspace(-1, 1, 12))
    steps(whole, AdamW([whole], lr=0.01, weight_decay=0.1), range(1, 7))
    halves = nn.Parameter(torch.linspace(-1, 1, 12))
    optimizer = AdamW([halves], lr=0.01, weight_decay=0.1)
    steps(halves, optimizer, range(1, 4))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = AdamW([halves], lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(halves, resumed, range(4, 7))
    assert torch.equal(whole, halves)


def moments_of(name: str, value: object) -> tuple[AdamW, dict]:
    """An optimizer of two parameters, and its state with one entry of the first one changed."""
    parameters = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
    optimizer = AdamW(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0][name] = value
    return optimizer, state


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exp_avg", torch.ones(2)),
        ("exp_avg_sq", torch.ones(3, 4)),
        ("exp_avg_sq", torch.ones(12)),
        ("exp_avg", torch.ones(4, 3, dtype=torch.float64)),
        ("exp_avg", 1.0),
        ("step", 0),
        ("step", -1),
    ],
)
def test_a_state_of_other_shapes_is_refused(name, value):
    """The fused update trusts the shapes: it read and wrote beyond the end of smaller moments."""
    optimizer, state = moments_of(name, value)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"the optimizer's {name} of parameter 0 does not fit"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert torch.equal(before["state"][0]["exp_avg"], after["state"][0]["exp_avg"])
    optimizer.load_state_dict(before)


@pytest.mark.parametrize("change", [{"state": {7: {}}}, {"state": [1]}, {"state": {"0": {}}}])
def test_a_state_of_other_parameters_is_refused(change):
    """One more than there are, or none that a number names."""
    optimizer, state = moments_of("step", 1)
    with pytest.raises(ValueError, match="of other parameters"):
        optimizer.load_state_dict(state | change)


def test_moments_that_are_missing_are_refused():
    """A state without them is no state that a step could have left."""
    optimizer, state = moments_of("step", 1)
    del state["state"][0]["exp_avg"]
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)


def test_closure_and_bad_settings():
    """The optimizer's usual contract: a closure is evaluated, nonsense is refused."""
    parameter = nn.Parameter(torch.ones(2))

    def closure():
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert AdamW([parameter]).step(closure).item() == 2.0
    for bad in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AdamW([parameter], **bad)


def test_only_matrices_decay():
    """Gains and biases are left alone by decay, frozen parameters by the optimizer."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    model[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in plain["params"]} == {1} and plain["weight_decay"] == 0.0


def muon_of(model: nn.Module) -> MuonAndAdamW:
    return MuonAndAdamW(model, lr=0.01, weight_decay=0.1, dtype=torch.float32)


def muon_steps(model: Llama, optimizer: MuonAndAdamW, seeds: range) -> None:
    for seed in seeds:
        tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(seed))
        model.loss(tokens, tokens)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest(tiny_config: LlamaConfig):
    """Every parameter once; a tied table, which is embedding and head, is AdamW's."""
    model = Llama(tiny_config)
    optimizer = muon_of(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    got = {
        part: {
            names[id(p)] for group in optimizer.parts[part].param_groups for p in group["params"]
        }
        for part in optimizer.parts
    }
    assert got["muon"] | got["adamw"] == set(names.values())
    assert got["muon"].isdisjoint(got["adamw"]) and len(got["muon"]) == 7 * tiny_config.n_layers
    assert all("layers." in name and "norm" not in name for name in got["muon"])
    decays = {group["weight_decay"] for group in optimizer.parts["adamw"].param_groups}
    assert decays == {0.1, 0.0}


@pytest.mark.parametrize("stacked", [0, 2 * 48 * 16])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-6), (torch.float32, 0.02)])
def test_muon_is_torchs(dtype: torch.dtype, tolerance: float, stacked: int, monkeypatch):
    """In bfloat16 the same numbers, in float32 the same but for bfloat16's rounding; also where
    matrices of one shape are worked on in stacks, here of up to two, as on a GPU.

    torch's own multiplies in bfloat16 on every device: on a CPU without it a step of Muon took
    ten times as long as the model's forward and backward pass.
    """
    monkeypatch.setattr("optimizer.STACKED", {"cpu": stacked})
    tolerance = max(tolerance, 1e-3) if stacked else tolerance  # bfloat16's sums in another order
    shapes = [(24, 24), (48, 16), (16, 48), (48, 16), (48, 16)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.05, "weight_decay": 0.1}
    both = (
        Muon(ours, **settings, dtype=dtype),
        torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(5):
        for parameters, optimizer in zip((ours, theirs), both, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_beside_muon_the_embedding_learns_faster(tiny_config: LlamaConfig, tied: bool):
    """At four times the rate, from the first update on and whatever the schedule says; alone so."""
    model = Llama(dataclasses.replace(tiny_config, tie_word_embeddings=tied))
    optimizer, rates = muon_of(model), {}
    for lr in (0.01, 0.002):
        for group in optimizer.param_groups:
            rates |= {id(p): group["lr"] / lr for p in group["params"]}
        for name, parameter in model.named_parameters():
            assert rates[id(parameter)] == (4 if name == "tok_embeddings.weight" else 1), name
        set_learning_rate(optimizer, 0.002)


def test_muon_updates_have_the_size_of_adamws(tiny_config: LlamaConfig):
    """One learning rate fits both: an update's root mean square is about 0.2 of it."""
    model = Llama(tiny_config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = MuonAndAdamW(model, lr=0.01, weight_decay=0.0, dtype=torch.float32)
    muon_steps(model, optimizer, range(1))
    for name, parameter in model.named_parameters():
        if "layers." in name and parameter.ndim == 2:
            size = (parameter - before[name]).detach().square().mean().sqrt().item()
            assert 0.5 < size / (0.2 * 0.01) < 1.5, name


def test_muon_resumes_bit_for_bit_from_its_state(tiny_config: LlamaConfig, tmp_path):
    """Both parts take over a copy of what they had."""
    torch.manual_seed(0)
    whole = Llama(tiny_config)
    halves = Llama(tiny_config)
    halves.load_state_dict(whole.state_dict())
    muon_steps(whole, muon_of(whole), range(6))
    optimizer = muon_of(halves)
    muon_steps(halves, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = muon_of(halves)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    muon_steps(halves, resumed, range(3, 6))
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_optimizer_refuses_the_others_state(tiny_config: LlamaConfig):
    """And Muon moments of other shapes, as AdamW."""
    model = Llama(tiny_config)
    both, alone = (
        make_optimizer(model, name=name, lr=0.01, weight_decay=0.1, dtype=torch.float32)
        for name in ("muon", "adamw")
    )
    muon_steps(model, both, range(1))
    state = copy.deepcopy(both.state_dict())
    with pytest.raises((KeyError, ValueError)):
        alone.load_state_dict(both.state_dict())
    with pytest.raises((KeyError, ValueError)):
        both.load_state_dict(alone.state_dict())
    state["muon"]["state"][0]["momentum_buffer"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="momentum_buffer of parameter 0"):
        both.load_state_dict(state)


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (1, 7), (50, 60)])
def test_cosine_is_torch_sequential_lr(warmup, total):
    """Linear warmup from 0.01 x lr, then cosine to min_lr, stepped per optimizer step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1e-4)
    schedulers = [
        LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
        CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=1e-7),
    ]
    scheduler = SequentialLR(optimizer, schedulers, milestones=[warmup])
    for step in range(total):
        ours = learning_rate(
            step, peak_lr=1e-4, min_lr=1e-7, warmup_steps=warmup, total_steps=total
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        if step == 0:
            assert ours == pytest.approx(1e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "wsd"])
def test_every_schedule_warms_up_peaks_and_ends(scheduler):
    """Whatever follows the warmup starts at the peak, never rises, and ends where it should."""

    def lr(step, warmup=10):
        return learning_rate(
            step, peak_lr=1.0, min_lr=0.1, warmup_steps=warmup, total_steps=100, scheduler=scheduler
        )

    assert lr(0) == pytest.approx(0.01) and lr(10) == 1.0 and lr(0, warmup=0) == 1.0
    after = [lr(step) for step in range(10, 120)]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False))
    assert lr(100) == lr(1000) == (1.0 if scheduler == "constant" else pytest.approx(0.1))
    if scheduler == "wsd":
        assert lr(80) == 1.0 and lr(95) < 1.0
