"""A model in parts (torch's FSDP 2): every process has a share of each weight, of its gradient and its moments, and
gets the rest of a block when that computes.

    weight [out, …] ─┬─ its first rows ──► process 0      as torch.chunk cuts the first axis;
                     └─ its last rows ───► process 1      of few rows some have none

A value in parts is a DTensor. Optimizer, clipping and averages treat it as any tensor; here is what does not: cutting,
and what comes from numpy or goes there. All processes have to call `whole` alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from persona.core.host.contracts import Sharding
from persona.core.host.errors import BackendMissing

Array = np.ndarray[Any, np.dtype[Any]]
BLOCKS = (
    *("BasicTransformerBlock", "Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
    *("CLIPEncoderLayer", "CLIPTextEmbeddings"),
)
"""Classes whose weights are gathered together; what is in none of them is gathered with the whole model."""


def spread(model: nn.Module, device: str, count: int, sharding: Sharding) -> None:
    """Cut the weights of a model in main memory into `count` parts, block by block, so that the device never holds all
    of them. Raises BackendMissing for a torch that is too old."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
    except ImportError as error:
        raise BackendMissing("This torch has no FSDP 2.", hint="pip install 'torch>=2.8'") from error
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise BackendMissing("FSDP 2 of this torch can only average gradients.", hint="pip install 'torch>=2.8'")
    told: dict[str, Any] = {
        "mesh": init_device_mesh(device, (count,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if sharding.offload else OffloadPolicy(),
    }
    kind = type(model)
    for module in reversed([module for module in model.modules() if type(module).__name__ in BLOCKS]):
        if next(module.parameters(), None) is not None:
            fully_shard(module, reshard_after_forward=sharding.reshard_after_forward, **told)
    fully_shard(model, reshard_after_forward=True, **told)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum: the loss's weights hold 1 / samples already
            module.set_force_sum_reduction_for_comms(True)  # or else it multiplies on the way, which gloo cannot
    model.__class__ = kind  # transformers looks up by a model's class which states it can give


def give_back(models: Iterable[nn.Module]) -> None:
    """Give back what a forward without a backward has gathered: the next one would compute with old values."""
    for model in models:
        for module in model.modules():
            cut: Any = module
            if hasattr(module, "reshard"):
                cut.reshard()


def in_parts(tensor: Tensor) -> bool:
    """Whether a tensor is one of parts."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any, *, is_kept: bool = True) -> Array:
    """A copy, float32; of one in parts gathered from all processes, and zeros that take no memory where it is not
    kept."""
    if not in_parts(tensor):
        return np.array(tensor.detach().float().cpu().numpy())
    with torch.no_grad():
        full = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
        return np.array(full.float().cpu().numpy()) if is_kept else np.broadcast_to(np.float32(0), tensor.shape)


def like(tensor: Any, values: Array) -> Tensor:
    """A new tensor with these values, as the given one lies: its dtype, its device, its parts. Nothing travels."""
    full = torch.from_numpy(np.asarray(values, np.float32))
    if not in_parts(tensor):
        return full.to(tensor.device, tensor.dtype, copy=True)
    from torch.distributed.tensor import DTensor

    mesh, own = tensor.device_mesh, tensor.to_local()
    parts = full.chunk(mesh.size())
    rank = mesh.get_local_rank()
    mine = (parts[rank] if rank < len(parts) else full[:0]).to(own.device, own.dtype, copy=True)
    made: Tensor = DTensor.from_local(
        mine, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made
