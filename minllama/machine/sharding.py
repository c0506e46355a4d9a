"""Training one model on several processes: DDP and FSDP2, and tensors that are sharded by FSDP2.

FSDP2 shards every parameter's first dimension: rank r holds the r-th of world_size chunks, which,
concatenated in the order of the ranks, are the whole tensor.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minllama.machine.ranks import Ranks


def distribute(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    ranks: Ranks,
    parallel: str,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """The module to call in training, whose gradients are means over the ranks.

    ddp: a wrapper around it. fsdp: itself, changed so that each rank keeps its shard of weights,
    gradients and optimizer state; `blocks` are all-gathered one at a time, in `dtype`, the rest
    (embedding, head, last norm) in float32, as under autocast.
    """
    if ranks.world_size == 1:
        return module.to(device)
    if parallel == "ddp":
        module = module.to(device)
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            # The argument that torch 2.13 recommends instead does not exist in earlier versions.
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            return DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh)


def no_gradient_sync(module: nn.Module) -> contextlib.AbstractContextManager:
    """Accumulate gradients on each rank within the block.

    Those of FSDP are reduced each time: unreduced they would take the memory of the whole model.
    """
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def no_gradients(module: nn.Module) -> Iterator[None]:
    """Evaluate within the block; after it a sharded module holds its shards alone."""
    if not is_sharded(module):
        with torch.inference_mode():
            yield
        return
    try:
        # FSDP reuses the buffers it gathers into, and cannot train on inference tensors.
        with torch.no_grad():
            yield
    finally:
        for part in module.modules():
            if hasattr(part, "reshard"):
                part.reshard()


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this rank holds only its shard; without importing DTensor, which takes a second."""
    return hasattr(tensor, "full_tensor")


def is_sharded(module: nn.Module) -> bool:
    """Whether each rank holds only its shard of the module."""
    return any(is_dtensor(parameter) for parameter in module.parameters())


def full_state_dict(module: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The state dict of whole tensors on rank 0, empty elsewhere. Every rank must call this."""
    if not is_sharded(module):
        return module.state_dict() if ranks.is_main else {}
    gathered: dict[int, Tensor] = {}  # by parameter: tied ones are gathered once
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            whole = tensor.detach().full_tensor() if is_dtensor(tensor) else tensor
            gathered[id(tensor)] = whole.cpu() if ranks.is_main else whole.new_empty(0)
        state[name] = gathered[id(tensor)]
    return state if ranks.is_main else {}


def local_shards(node: Any) -> Any:
    """Nested dicts and lists with this rank's shard of every tensor in them, on the CPU."""
    return _map_tensors(node, lambda t: (t.to_local() if is_dtensor(t) else t).cpu())


def to_meta(node: Any) -> Any:
    """Nested dicts and lists with every tensor on `meta`: what other ranks need of rank 0's."""
    return _map_tensors(node, lambda t: t.to("meta"))


def _map_tensors(node: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if torch.is_tensor(node):
        return function(node.detach())
    if isinstance(node, dict):
        return {key: _map_tensors(value, function) for key, value in node.items()}
    return [_map_tensors(value, function) for value in node] if isinstance(node, list) else node


def join_shards(value: Tensor | list[Tensor]) -> Tensor:
    """The whole tensor of all ranks' shards, in the order of the ranks; of a tensor, itself."""
    return torch.cat(value) if isinstance(value, list) else value


def broadcast_or_shard(value: Tensor | list[Tensor], like: Tensor) -> Tensor:
    """A copy of rank 0's tensor on the device of `like`; each rank's shard where that is sharded.

    `value` is the whole or its shards, on the other ranks of the same shape on `meta`. Raises
    ValueError for another shape than that of `like`. Every rank must call this.
    """
    whole = join_shards(value)
    if whole.shape != like.shape:
        raise ValueError(f"a tensor of shape {(*whole.shape,)} where {(*like.shape,)} is asked for")
    if not dist.is_initialized():
        return whole.clone() if whole is value else whole
    if whole.is_meta:
        own = torch.empty_like(whole, device=like.device)
    else:
        own = whole.to(like.device, copy=True)
    if is_dtensor(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(own, like.device_mesh, like.placements)
    dist.broadcast(own, src=0)
    return own


def load_state(module: nn.Module, state: dict[str, Tensor | list[Tensor]]) -> None:
    """`load_state_dict` of rank 0's tensors, whole or in shards: see `broadcast_or_shard`.

    Every rank must call this. Raises RuntimeError or ValueError for other names or shapes.
    """
    own = module.state_dict()
    mismatched = sorted(own.keys() ^ state.keys())
    if mismatched:
        raise ValueError(f"tensor {mismatched[0]} is missing or not of this model")
    with torch.no_grad():
        for name, like in own.items():  # one at a time: the whole model may not fit
            like.copy_(broadcast_or_shard(state[name], like))


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load rank 0's moments, whole or in shards: see `broadcast_or_shard`.

    Learning rate, decay and the like stay those of the optimizer, not the checkpoint's. Every rank
    must call this. Raises LookupError, TypeError, ValueError or AttributeError for a state that is
    not this optimizer's.
    """
    groups = optimizer.param_groups
    settings = [{key: group[key] for key in group if key != "params"} for group in groups]
    parts = getattr(optimizer, "parts", None)  # Muon has AdamW beside it
    if parts is None:
        state = _own_moments(optimizer, state)
    else:
        state = {name: _own_moments(part, state[name]) for name, part in parts.items()}
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)


def _own_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with rank 0's moments, or this rank's shards of them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {index: dict(values) for index, values in state["state"].items()}
    for index, values in moments.items():
        for name, value in values.items():
            if isinstance(value, Tensor | list):  # a step may be a plain number
                values[name] = broadcast_or_shard(value, parameters[index])
    return state | {"state": moments}
