"""Training in several processes, as torchrun starts them; alone, everything here does nothing.

On CPU cores that other programs also use, one process a core beats one process with as many threads: threads wait
for the slowest of them hundreds of times a step, processes once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch import Tensor


def join(device: str) -> tuple[int, int]:
    """Joins the processes that torchrun started; this one's rank and their number ((0, 1) without torchrun)."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return 0, 1
    if not distributed.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=1))  # the first process may train for hours
    return distributed.get_rank(), count


def average_gradients(parameters: Sequence[Tensor], seconds: float) -> float:
    """Gives every process the mean gradient; returns the mean of their seconds, so that all end at the same step."""
    if not distributed.is_initialized():
        return seconds
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor([seconds])])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    torch._foreach_copy_(
        gradients,
        [
            part.view_as(gradient)
            for part, gradient in zip(flat[:-1].split([value.numel() for value in gradients]), gradients, strict=True)
        ],
    )
    return float(flat[-1])


def wait() -> None:
    """Waits until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()
