"""AdamW, alone or beside Muon, the groups they decay, and the learning rate of each step.

The update is the assignment's: "efficient" bias correction, and decoupled weight decay times the
learning rate after the update. Knows nothing of models beyond their parameters' names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

BETAS, EPS = (0.9, 0.95), 1e-8  # AdamW's, as Llama was pretrained (arXiv:2307.09288)
WARMUP_START = 0.01  # of the peak: where linear warmup begins
DECAYED_INSIDE = ("cuda",)  # where the fused kernel decays, too; a CPU keeps the rounding it had
EMBEDDING_RATE = 4.0  # beside Muon, of the matrices' learning rate: 4 to 8 were best of 1/2 to 16
WSD_DECAY = 0.2  # of the run: the last part of the warmup-stable-decay schedule


# ---------------------------------------------------------------------------- AdamW


class AdamW(torch.optim.Optimizer):
    """Adam (arXiv:1412.6980) with decoupled weight decay (arXiv:1711.05101).

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        w = w - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)
        w = w - lr weight_decay w

    torch.optim.AdamW differs: its eps is added to the corrected sqrt(v), and it decays first.
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
            # One call for all parameters of one step count, which share their bias correction. A
            # parameter without a gradient is left out and keeps its own count.
            batches: dict[tuple, list[nn.Parameter]] = {}
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
                batches.setdefault(key, []).append(parameter)
            for (step, *_), parameters in batches.items():
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
        # Both moments start at 0, and after t steps are still too small by 1 - beta^t. "Efficient"
        # is to correct the step size, a number, in place of two tensors (Kingma & Ba, section 2).
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
            # Decoupled: as an L2 term of the gradient it would be divided by sqrt(v), and weights
            # with large gradients would hardly decay. After the update, as the assignment has it.
            # Added, since in float32 a factor of 1 - 1e-6 has lost most digits of the 1e-6.
            torch._foreach_add_(weights, weights, alpha=-decay)


def local(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of tensors that FSDP2 shards this rank's shards, sharing their memory; others as they are."""
    # An update goes number by number, so each rank updates its shard and no one else's.
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def is_fused(parameters: list[nn.Parameter], *lists: list[torch.Tensor]) -> bool:
    """Whether torch's fused kernel takes these: it reads the tensors of a parameter, one from each
    of the lists, in the order of their memory, and on the CPU and on CUDA alone."""
    plain = all(type(p) is nn.Parameter or hasattr(p, "to_local") for p in parameters)
    per_parameter = zip(*lists, strict=True)
    one_layout = all(len({t.stride() for t in tensors}) == 1 for tensors in per_parameter)
    return plain and one_layout and lists[0][0].device.type in ("cpu", "cuda")


def check_moments(optimizer: torch.optim.Optimizer, state: dict, *, names: set[str]) -> None:
    """Raise ValueError unless a state dict has exactly these moments of the optimizer's parameters.

    A moment is `step`, a count, or a tensor of its parameter's shape and dtype.
    """
    # A checkpoint is a file that anyone may have written, and the fused kernel checks no shape.
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    if not isinstance(state.get("state"), dict) or not state["state"].keys() <= parameters.keys():
        raise ValueError("the optimizer's state is of other parameters")
    for index, moments in state["state"].items():
        if not isinstance(moments, dict) or moments.keys() != names:
            raise ValueError(f"the optimizer's state of parameter {index} is incomplete")
        like = parameters[index]
        for name, value in moments.items():
            if name == "step":
                fits = isinstance(value, int) and value >= 1
            else:
                fits = torch.is_tensor(value) and value.shape == like.shape
                fits = fits and value.dtype == like.dtype
            if not fits:
                raise ValueError(f"the optimizer's {name} of parameter {index} does not fit it")


def parameter_groups(
    model: nn.Module, weight_decay: float, *, without: Iterable[nn.Parameter] = ()
) -> list[dict]:
    """Two groups of the trainable parameters: matrices decay, gains and biases do not."""
    # Decay keeps small the many weights that a product sums up; a norm's gain belongs near 1.
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


# Numbers in the matrices of one shape that Muon works on at once; elsewhere one matrix at a time.
STACKED = {"cuda": 2**26, "cpu": 2**18}


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
            self._init_group(group, parameters, gradients, moments)  # torch's: fills these lists
            torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
            for stack in stacks(parameters, gradients, moments):
                weights, grads, momenta = (list(tensors) for tensors in zip(*stack, strict=True))
                # Nesterov's: the gradient once more on top of the moment that it is part of.
                nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
                updates = orthogonalize(torch.stack(nesterov), self.dtype).unbind()
                # An orthogonal matrix has a root mean square of 1 / sqrt(its longer side). This
                # makes it 0.2, about that of AdamW's updates: one learning rate fits both.
                step_size = group["lr"] * 0.2 * math.sqrt(max(weights[0].shape))
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates, alpha=-step_size)


def stacks(*lists: list[torch.Tensor]) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """One from each of the lists, and with it those of the same shape, as many as STACKED allows.

    Products of small matrices one by one leave a GPU waiting for the next launch, and a CPU in what
    is around them.
    """
    by_shape: dict[torch.Size, list[tuple[torch.Tensor, ...]]] = {}
    for one_of_each in zip(*lists, strict=True):
        by_shape.setdefault(one_of_each[0].shape, []).append(one_of_each)
    for shape, alike in by_shape.items():
        count = max(1, STACKED.get(alike[0][0].device.type, 0) // shape.numel())
        for start in range(0, len(alike), count):
            yield alike[start : start + count]


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About the closest orthogonal matrix to each of (n, rows, columns): Newton-Schulz iterations.

    Of U S V^T that is U V^T; here the singular values come out between 0.5 and 1.5 instead of at 1
    (Jordan 2024, kellerjordan.github.io/posts/muon). The products are in `dtype`.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)  # wide: the smaller of the gram matrices
    # The Frobenius norm is at least the largest singular value: now they are all in [0, 1], where
    # the iteration converges.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # Each step maps a singular value s to a s + b s^3 + c s^5, with nothing but matrix products:
    # x x^T has the same U as x. The coefficients make small s grow fastest, at the price of never
    # settling at 1, which an update does not need.
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


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
        # Orthogonal updates suit maps between vectors; the embedding is a table of rows.
        named = model.named_parameters()
        embedding = [p for name, p in named if p.requires_grad and "tok_embeddings" in name]
        groups = parameter_groups(model, weight_decay, without=[*matrices, *embedding])
        if embedding:
            faster = {"lr": lr * EMBEDDING_RATE, "lr_scale": EMBEDDING_RATE}
            groups.append({"params": embedding, "weight_decay": weight_decay} | faster)
        self.parts: dict[str, torch.optim.Optimizer] = {"muon": muon}
        if groups:  # none of LoRA's adapters, which are all matrices inside the layers
            self.parts["adamw"] = AdamW(groups, lr=lr, betas=BETAS, eps=EPS)

    @property
    def param_groups(self) -> list[dict]:
        """The groups of both, in which a train loop sets the learning rate."""
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
    # Warmup: the first steps follow second moments of a few batches, and would be too long.
    if step < warmup_steps:
        return peak_lr * (WARMUP_START + (1 - WARMUP_START) * step / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))  # 0 to 1
    shares = {  # of the way from min_lr up to peak_lr
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),  # half a period (arXiv:1608.03983)
        "wsd": min(1.0, (1 - progress) / WSD_DECAY),  # the peak, then linear (arXiv:2404.06395)
    }
    return min_lr + (peak_lr - min_lr) * shares[scheduler]
