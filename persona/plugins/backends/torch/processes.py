"""Several processes on torch: who is there, and how gradients become one sum."""

from __future__ import annotations

import datetime
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from persona.plugins.backends.shared.meeting import peers_lost

_LIBRARIES = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
_GONE = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe", re.IGNORECASE)
PATIENCE = datetime.timedelta(days=1)
"""How long a process waits for the others: while the first samples pictures they all do. One that dies is noticed at
once, by its launcher and by its closed connections."""
AT_ONCE = 64 << 20
"""Bytes of gradients that are summed together."""


class TorchProcesses:
    """`persona.core.training.processes.Processes` over torch.distributed, from the variables that torchrun sets."""

    def __init__(self, kind: str) -> None:
        if "lo" in (name for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine; its name need not lead anywhere
        library = _LIBRARIES[kind]
        if kind == "cuda" and not dist.is_nccl_available():
            library = "gloo"
        with peers_lost(RuntimeError):
            dist.init_process_group(library, timeout=PATIENCE)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of everybody's `values`, float64."""
        tensor = torch.from_numpy(np.array(values, np.float64))
        with peers_lost(RuntimeError):
            dist.all_reduce(tensor)
        summed: np.ndarray = tensor.numpy()
        return summed

    def barrier(self) -> None:
        """Wait until everybody is here."""
        self.sum(np.zeros(1))  # dist.barrier would need to know the device

    def leave(self) -> None:
        """Part from the others."""
        dist.destroy_process_group()

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by the sum over all processes; one that only others have counts as zero here, and one
        that nobody has stays none. The loss's weights hold 1 / samples already, so a sum it is and not a mean."""
        present = self.sum(np.array([parameter.grad is not None for parameter in parameters], np.float64))
        gradients: list[Tensor] = []
        for parameter, owners in zip(parameters, present.tolist(), strict=True):
            if owners:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for group in _groups(gradients):
            flat = torch.cat([gradient.flatten() for gradient in group])
            with peers_lost(RuntimeError):
                dist.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in group])
            for gradient, part in zip(group, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


@contextmanager
def peers_noticed() -> Iterator[None]:
    """Turn what a library says of a process that is gone, in the middle of a computation, into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        if not _GONE.search(str(error)):
            raise
        with peers_lost(RuntimeError):
            raise


def _groups(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in their order, as many together as AT_ONCE allows, each group of one dtype."""
    group: list[Tensor] = []
    held = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        if group and (held + size > AT_ONCE or gradient.dtype != group[0].dtype):
            yield group
            group, held = [], 0
        group.append(gradient)
        held += size
    if group:
        yield group
