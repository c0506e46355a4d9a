"""AdamW, alone or beside Muon, the groups they decay, and the learning rate of each step.

The update is the assignment's: "efficient" bias correction, and decoupled weight decay times the
learning rate after the update. Knows nothing of models beyond their parameters' names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

BETAS, EPS = (0.9, 0.95), 1e-8  # AdamW's, as Llama was pretrained
WARMUP_START = 0.01  # of the peak: where linear warmup begins
# Where the fused kernel decays, too, in the same pass; a CPU keeps the rounding that it had.
DECAYED_INSIDE = ("cuda",)
EMBEDDING_RATE = 4.0  # beside Muon, of the matrices' learning rate: 4 to 8 were best of 1/2 to 16
WSD_DECAY = 0.2  # of the run: the last part of the warmup-stable-decay schedule


# ---------------------------------------------------------------------------- AdamW


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Kingma & Ba 2015, section 2; Loshchilov & Hutter 2019).

    With `correct_bias` the step size is lr * sqrt(1 - b2^t) / (1 - b1^t), and `eps` is added to the
    uncorrected sqrt(v): not quite torch.optim.AdamW, whose eps is added after the correction.
    Raises ValueError for hyperparameters out of range and for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr} or eps {eps} below 0, or betas {betas} not in [0, 1)")
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, settings | {"correct_bias": correct_bias})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update every parameter that has a gradient; returns the loss of the closure, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # What shares step count and device shares its bias correction, so one fused call each.
            alike: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ValueError("AdamW does not take sparse gradients")
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                key = (state["step"], parameter.device, parameter.dtype)
                alike.setdefault(key, []).append(parameter)
            for (step, *_), parameters in alike.items():
                self._update(parameters, group, step)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a state; raises ValueError unless its moments have their parameters' shapes.

        The fused update trusts these shapes: it would read and write past a smaller tensor.
        """
        check_moments(self, state_dict, names={"step", "exp_avg", "exp_avg_sq"})
        super().load_state_dict(state_dict)

    def _update(self, parameters: list[nn.Parameter], group: dict, step: int) -> None:
        beta1, beta2 = group["betas"]
        weights, gradients = local(parameters), local([p.grad for p in parameters])
        moments = [local([self.state[p][m] for p in parameters]) for m in ("exp_avg", "exp_avg_sq")]
        correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
        step_size, decay = group["lr"], group["lr"] * group["weight_decay"]
        if group["correct_bias"]:
            step_size *= correction2 / correction1
        if is_fused(parameters, weights, gradients, *moments):
            # One pass over memory instead of seven. torch divides sqrt(v) by its correction before
            # it adds eps, so it gets the lr and eps that make this equal to the update below.
            lr, eps, decay_before = step_size * correction1 / correction2, group["eps"], 0.0
            if weights[0].device.type in DECAYED_INSIDE and 0 < decay < 1:
                # Its decay comes before its update u: (1 - d) w - (1 - d) u is (1 - d) (w - u).
                lr *= 1 - decay
                decay_before, decay = decay / lr, 0.0
            torch._fused_adamw_(
                weights,
                gradients,
                *moments,
                [],
                # One count for all, filled in on the device: nothing waits.
                [torch.full((), float(step), device=weights[0].device)] * len(weights),
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=decay_before,
                eps=eps / correction2,
                amsgrad=False,
                maximize=False,
            )
        else:
            exp_avg, exp_avg_sq = moments
            torch._foreach_lerp_(exp_avg, gradients, 1 - beta1)
            torch._foreach_mul_(exp_avg_sq, beta2)
            torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - beta2)
            denominator = torch._foreach_sqrt(exp_avg_sq)
            torch._foreach_add_(denominator, group["eps"])
            torch._foreach_addcdiv_(weights, exp_avg, denominator, -step_size)
        if decay:
            # Added, since in float32 a factor of 1 - 1e-6 has lost most digits of the 1e-6.
            torch._foreach_add_(weights, weights, alpha=-decay)


def local(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of tensors that FSDP2 shards this rank's shards, sharing their memory; others as they are."""
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def is_fused(parameters: list[nn.Parameter], *lists: list[torch.Tensor]) -> bool:
    """Whether torch's fused kernel takes these: it reads the tensors of a parameter, one from each
    of the lists, in the order of their memory, and on the CPU and on CUDA alone."""
    plain = all(type(p) is nn.Parameter or hasattr(p, "to_local") for p in parameters)
    one_layout = all(len({t.stride() for t in of_one}) == 1 for of_one in zip(*lists, strict=True))
    return plain and one_layout and lists[0][0].device.type in ("cpu", "cuda")


def check_moments(optimizer: torch.optim.Optimizer, state: dict, *, names: set[str]) -> None:
    """Raise ValueError unless a state dict has exactly these moments of the optimizer's parameters.

    A moment is `step`, a count, or a tensor of its parameter's shape and dtype.
    """
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    if not isinstance(state.get("state"), dict) or not state["state"].keys() <= parameters.keys():
        raise ValueError("the optimizer's state is of other parameters")
    for index, moments in state["state"].items():
        if not isinstance(moments, dict) or moments.keys() != names:
            raise ValueError(f"the optimizer's state of parameter {index} is incomplete")
        like = parameters[index]
        for name, value in moments.items():
            if name == "step":
                sound = isinstance(value, int) and value >= 1
            else:
                sound = torch.is_tensor(value) and value.shape == like.shape
                sound = sound and value.dtype == like.dtype
            if not sound:
                raise ValueError(f"the optimizer's {name} of parameter {index} does not fit it")


def parameter_groups(
    model: nn.Module, weight_decay: float, *, without: Iterable[nn.Parameter] = ()
) -> list[dict]:
    """Two groups of the trainable parameters: matrices decay, gains and biases do not."""
    excluded = set(map(id, without))
    trainable = [p for p in model.parameters() if p.requires_grad and id(p) not in excluded]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# ---------------------------------------------------------------------------- Muon


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices inside the layers: not the embedding, nor any head."""
    named = model.named_parameters()
    return [p for name, p in named if p.requires_grad and p.ndim == 2 and "layers." in name]


STACKED = {"cuda": 2**26}  # numbers of matrices alike that Muon works on at once; a CPU on one


class Muon(torch.optim.Muon):
    """torch's Muon, with its matrix products in `dtype`.

    torch's are in bfloat16, which a CPU without instructions for it multiplies ten times slower
    than float32.
    """

    def __init__(self, params: Iterable[nn.Parameter], *, dtype: torch.dtype, **settings) -> None:
        super().__init__(params, **settings, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters: list[nn.Parameter] = []
            gradients: list[torch.Tensor] = []
            moments: list[torch.Tensor] = []
            self._init_group(group, parameters, gradients, moments)
            torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
            for stack in stacks(parameters, gradients, moments):
                weights, of_step, of_all = (list(tensors) for tensors in zip(*stack, strict=True))
                ahead = torch._foreach_lerp(of_step, of_all, group["momentum"])
                if len(ahead) == 1:
                    updates = [orthogonal(ahead[0], self.dtype)]
                else:
                    updates = list(orthogonal(torch.stack(ahead), self.dtype).unbind())
                step_size = group["lr"] * 0.2 * math.sqrt(max(weights[0].shape))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-step_size)


def stacks(*lists: list[torch.Tensor]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """One from each of the lists, and with it those of the same shape, as many as STACKED allows.

    Products of small matrices one by one leave a GPU waiting for the next launch.
    """
    alike: dict[torch.Size, list[tuple[torch.Tensor, ...]]] = {}
    for one_of_each in zip(*lists, strict=True):
        alike.setdefault(one_of_each[0].shape, []).append(one_of_each)
    for shape, found in alike.items():
        count = max(1, STACKED.get(found[0][0].device.type, 0) // shape.numel())
        for start in range(0, len(found), count):
            yield found[start : start + count]


def orthogonal(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Near the orthogonal matrix closest to `matrix`, by Newton-Schulz iterations in `dtype`.

    Its singular values come out between 0.5 and 1.5 (Jordan 2024). Of a stack (n, rows, columns)
    each matrix by itself.
    """
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    x = wide.to(dtype)
    single = x.ndim == 2
    size = x.norm() if single else x.norm(dim=(1, 2), keepdim=True)
    add_product = torch.addmm if single else torch.baddbmm
    x = x / size.clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide is matrix else x.mT).to(matrix.dtype)


class MuonAndAdamW:
    """Muon on the matrices inside the layers, AdamW on everything else.

    Muon makes each matrix's update orthogonal (Jordan 2024), in bfloat16 where `dtype`, the
    training's, is that; scaled to the root mean square of AdamW's updates (arXiv:2502.16982), both
    share one learning rate, schedule and weight decay, but that the embedding, of whose rows a
    batch has few, learns at EMBEDDING_RATE times that rate. It has what a train loop uses of
    torch.optim.Optimizer.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        matrices = layer_matrices(model)
        products = dtype if dtype == torch.bfloat16 else torch.float32
        muon = Muon(matrices, lr=lr, weight_decay=weight_decay, dtype=products)
        named = model.named_parameters()
        embedding = [p for name, p in named if p.requires_grad and "tok_embeddings" in name]
        groups = parameter_groups(model, weight_decay, without=[*matrices, *embedding])
        if embedding:
            faster = {"lr": lr * EMBEDDING_RATE, "lr_scale": EMBEDDING_RATE}
            groups.append({"params": embedding, "weight_decay": weight_decay} | faster)
        self.parts = {"muon": muon, "adamw": AdamW(groups, lr=lr, betas=BETAS, eps=EPS)}

    @property
    def param_groups(self) -> list[dict]:
        """The groups of both."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to zero."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict:
        """The states of both, by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what state_dict gave; raises KeyError for another optimizer's."""
        check_moments(self.parts["muon"], state["muon"], names={"momentum_buffer"})
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def make_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
) -> AdamW | MuonAndAdamW:
    """The optimizer of a model's trainable parameters: `name` is adamw or muon.

    `dtype` is what the training computes in.
    """
    if name == "muon":
        return MuonAndAdamW(model, lr=lr, weight_decay=weight_decay, dtype=dtype)
    return AdamW(parameter_groups(model, weight_decay), lr=lr, betas=BETAS, eps=EPS)


# ---------------------------------------------------------------------------- learning rate


def set_learning_rate(optimizer: AdamW | MuonAndAdamW, lr: float) -> None:
    """Give each group of parameters its share of a step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def learning_rate(
    step: float,
    *,
    peak_lr: float,
    min_lr: float,
    warmup_steps: int,
    total_steps: int,
    scheduler: str = "cosine",
) -> float:
    """The learning rate of optimizer step `step`, counted from 0: a pure function, nothing to save.

    Linear from 0.01 x peak_lr to peak_lr over `warmup_steps`, then by `scheduler` to `min_lr` at
    `total_steps`: what SequentialLR(LinearLR, CosineAnnealingLR) gives, and beyond the end min_lr.
    """
    if step < warmup_steps:
        return peak_lr * (WARMUP_START + (1 - WARMUP_START) * step / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    shares = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "wsd": min(1.0, (1 - progress) / WSD_DECAY),
    }
    return min_lr + (peak_lr - min_lr) * shares[scheduler]
