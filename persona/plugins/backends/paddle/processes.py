"""Several processes on Paddle: who is there, and how gradients become one sum."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from persona.core.training.processes import PeerLost
from persona.plugins.backends.paddle.device import Device, find_device, present_devices
from persona.plugins.backends.paddle.layout import Array, Parameter
from persona.plugins.backends.shared.devices import one_each
from persona.plugins.backends.shared.meeting import Meeting

LAUNCHER = __name__.replace("processes", "launcher")


class PaddleProcesses:
    """`persona.core.training.processes.Processes` over paddle.distributed, from the variables its launcher sets.

    Gradients go through all_reduce. Figures, and waiting, go over a socket: gloo gives up when another process lets it
    wait for 30 seconds, which it does while the first one samples."""

    def __init__(self, device: Device) -> None:
        device.make_current()
        with _peers():
            dist.init_parallel_env()
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._meeting = Meeting(self.rank)

    def sum(self, values: Array) -> Array:
        """The sum of everybody's `values`, float64."""
        return self._meeting.sum(values)

    def barrier(self) -> None:
        """Wait until everybody is here."""
        self.sum(np.zeros(1))

    def leave(self) -> None:
        """Part from the others."""
        self._meeting.leave()
        dist.destroy_process_group()

    @paddle.no_grad()
    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replace every gradient by the sum over all processes; one that only others have counts as zero here, and one
        that nobody has stays none. The loss's weights hold 1 / samples already, so a sum it is and not a mean."""
        present = self.sum(np.array([parameter.tensor.grad is not None for parameter in parameters], np.float64))
        for parameter, owners in zip(parameters, present.tolist(), strict=True):
            if owners:
                tensor = parameter.tensor
                gradient = paddle.zeros_like(tensor) if tensor.grad is None else tensor.grad
                with _peers():
                    dist.all_reduce(gradient)
                tensor.grad = gradient


def devices_for(name: str, count: int) -> tuple[str, ...]:
    """The device of each of `count` processes for --device `name`."""
    return one_each(name, find_device(name).kind, present_devices(), count)


def device_of(name: str, processes: PaddleProcesses | None) -> Device:
    """The device of this process: the one called `name`, or of several processes the one of its rank."""
    found = find_device(name)
    if processes is None or found.kind == "cpu":
        return found
    return find_device(f"{found.kind}:{os.environ.get('PADDLE_RANK_IN_NODE', processes.rank)}")


def launch_line(count: int, boot: str, module: str, logs: Path) -> list[str]:
    """paddle.distributed.launch, for this machine alone, with gloo where Paddle is built without CUDA, else NCCL."""
    library = () if paddle.is_compiled_with_cuda() else ("--backend", "gloo")
    return [
        sys.executable,
        *(boot, LAUNCHER, str(count), "--nproc_per_node", str(count), *library),
        *("--log_dir", str(logs / "processes"), boot, module),
    ]


@contextmanager
def _peers() -> Iterator[Any]:
    """Turn what the libraries say when somebody is gone into PeerLost."""
    try:
        yield
    except (RuntimeError, OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PeerLost(f"Another process of the run is gone: {first}") from error
