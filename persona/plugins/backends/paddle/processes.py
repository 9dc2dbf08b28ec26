"""Several processes on Paddle: who is there, and how gradients become one sum."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist

from persona.plugins.backends.paddle.device import Device, find_device, present_devices
from persona.plugins.backends.paddle.layout import Parameter
from persona.plugins.backends.shared.devices import one_each
from persona.plugins.backends.shared.meeting import Seated, peers_lost

LOST = (RuntimeError, OSError, ValueError)
"""What all_reduce and its set-up raise when another process is gone."""
LAUNCHER = __name__.replace("processes", "launcher")


class PaddleProcesses(Seated):
    """`persona.core.training.processes.Processes` over paddle.distributed, from the variables its launcher sets.

    Gradients go through all_reduce. Figures, and waiting, go over a socket: gloo gives up when another process lets it
    wait for 30 seconds, which it does while the first one samples."""

    def __init__(self, device: Device) -> None:
        device.make_current()
        with peers_lost(*LOST):
            dist.init_parallel_env()
        super().__init__(dist.get_rank(), dist.get_world_size())

    def leave(self) -> None:
        """Part from the others."""
        self.meeting.leave()
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
                with peers_lost(*LOST):
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
