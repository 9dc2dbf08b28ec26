"""Several processes on MindSpore: who is there, and how gradients become one sum."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, communication, ops

from persona.plugins.backends.mindspore.device import Device, find_device, present_devices
from persona.plugins.backends.shared.devices import one_each
from persona.plugins.backends.shared.meeting import Seated, peers_lost

Array = np.ndarray[Any, np.dtype[Any]]
LOST = (RuntimeError, OSError, ValueError)
"""What AllReduce and its set-up raise when another process is gone."""
LAUNCHER = __name__.replace("processes", "launcher")
AT_ONCE = 16 << 20
"""Numbers that are summed together."""


class MindSporeProcesses(Seated):
    """`persona.core.training.processes.Processes` over a MindSpore cluster, from the variables its launcher sets.

    Gradients go through AllReduce. Figures, and waiting, go over a socket: AllReduce on a cpu knows float32 alone, and
    gives up when another process lets it wait for 30 seconds, which it does while the first one samples."""

    def __init__(self, device: Device) -> None:
        device.make_current()
        with peers_lost(*LOST):
            communication.init()
        super().__init__(communication.get_rank(), communication.get_group_size())
        self._all_reduce = ops.AllReduce()

    def leave(self) -> None:
        """Part from the others."""
        self.meeting.leave()
        communication.release()

    def sum_gradients(self, gradients: MutableMapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Replace every gradient by the sum over all processes; one that only others have counts as zero here, and one
        that nobody has stays away. The loss's weights hold 1 / samples already, so a sum it is and not a mean."""
        present = self.sum(np.array([name in gradients for name in shapes], np.float64))
        names = [name for name, owners in zip(shapes, present.tolist(), strict=True) if owners]
        own = [gradients.get(name, np.zeros(shapes[name], np.float32)).ravel() for name in names]
        flat = np.concatenate([np.zeros(0, np.float32), *own])
        parts = [self._summed(flat[start : start + AT_ONCE]) for start in range(0, len(flat), AT_ONCE)]
        flat, start = np.concatenate(parts) if parts else flat, 0
        for name in names:
            size = int(np.prod(shapes[name]))
            gradients[name] = flat[start : start + size].reshape(shapes[name])
            start += size

    def _summed(self, values: Array) -> Array:
        self.barrier()
        with peers_lost(*LOST):
            summed: Array = self._all_reduce(Tensor(values, ms.float32)).asnumpy().copy()
        return summed


def devices_for(name: str, count: int) -> tuple[str, ...]:
    """The device of each of `count` processes for --device `name`."""
    return one_each(name, find_device(name).kind, present_devices(), count)


def device_of(name: str, is_one_of_many: bool) -> Device:
    """The device of this process: the one called `name`, or of several processes the one of its rank."""
    found = find_device(name)
    if not is_one_of_many or found.kind == "cpu":
        return found
    return find_device(f"{found.kind}:{os.environ['MS_NODE_ID']}")


def launch_line(count: int, boot: str, module: str) -> list[str]:
    """persona's launcher of a MindSpore cluster, for this machine alone."""
    return [sys.executable, boot, LAUNCHER, str(count), boot, module]
