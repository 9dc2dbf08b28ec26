"""Several devices: which process takes which, and torchrun's line."""

from __future__ import annotations

import sys

from persona.plugins.backends.shared.devices import one_each
from persona.plugins.backends.torch.device import Device, find_device, present_devices
from persona.plugins.backends.torch.processes import TorchProcesses


def devices_for(name: str, count: int) -> tuple[str, ...]:
    """The device of each of `count` processes for --device `name`."""
    return one_each(name, find_device(name).kind, present_devices(), count)


def device_of(name: str, processes: TorchProcesses | None) -> Device:
    """The device of this process: the one called `name`, or of several processes the one of its rank."""
    found = find_device(name)
    if processes is None or found.kind == "cpu":
        return found
    own = find_device(f"{found.kind}:{processes.local_rank}")
    own.make_current()  # where a library's sums and a "cuda" without a number go
    return own


def launch_line(count: int, boot: str, module: str) -> list[str]:
    """torchrun, for this machine alone: its meeting point is on the loopback address, so that the machine's name need
    not lead anywhere."""
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--nproc-per-node", str(count)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *(boot, module),
    ]
