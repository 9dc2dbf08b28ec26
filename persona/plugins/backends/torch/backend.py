"""The torch backend as the host sees it. Importing this file imports no framework."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from persona.core.host.contracts import Availability, Runtime
from persona.core.host.errors import BackendMissing

if TYPE_CHECKING:
    from persona.core.training.base import Base
    from persona.core.training.plan import TrainingPlan
    from persona.plugins.backends.torch.processes import TorchProcesses
    from persona.plugins.backends.torch.session import TorchSession

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
INSTALL = "pip install 'persona[torch]'"


class TorchBackend:
    """PyTorch with diffusers' models."""

    name = "torch"
    summary = "PyTorch with diffusers on cpu, cuda, mps or npu"

    def availability(self) -> Availability:
        """Looks for the packages without importing one of them."""
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", hint=INSTALL)
        return Availability(True, version=importlib.metadata.version("torch"))

    def capabilities(self, device: str) -> Mapping[str, bool]:
        """What works on `device`, which may be "auto". Raises BackendMissing or UsageError when it is not there."""
        self._require()
        from persona.plugins.backends.torch.device import capabilities, find_device

        return capabilities(find_device(device))

    def free_memory(self, device: str) -> int:
        """Bytes that are free on `device`, which may be "auto"; 0 where it cannot be asked."""
        self._require()
        from persona.plugins.backends.torch.device import find_device, free_memory

        return free_memory(find_device(device))

    def devices(self, device: str, count: int) -> tuple[str, ...]:
        """The devices of `count` processes. Raises BackendMissing when they are not there, UsageError for a name that
        means one device."""
        self._require()
        from persona.plugins.backends.torch.launch import devices_for

        return devices_for(device, count)

    def launch_line(self, count: int, boot: str, module: str, logs: Path) -> list[str]:
        """torchrun with `count` processes on this machine, each running `module` by the file `boot`."""
        from persona.plugins.backends.torch.launch import launch_line

        return launch_line(count, boot, module)

    def join(self, device: str) -> TorchProcesses:
        """Meet the other processes that torchrun started."""
        from persona.plugins.backends.torch.libraries import quiet_imports

        with quiet_imports():
            from persona.plugins.backends.torch.device import find_device
            from persona.plugins.backends.torch.processes import TorchProcesses

        return TorchProcesses(find_device(device).kind)

    def open(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> TorchSession:
        """Load `base` onto the runtime's device and attach what `plan` trains. Missing or unknown weights are a
        BaseModelError, unknown targets a UsageError, a device that is not there a BackendMissing."""
        self._require()
        from persona.plugins.backends.torch.libraries import quiet_imports

        with quiet_imports():
            from persona.plugins.backends.torch.session import TorchSession

        return TorchSession(base, plan, runtime)

    def _require(self) -> None:
        found = self.availability()
        if not found.available:
            raise BackendMissing(f"The torch backend cannot be used: {found.reason}.", hint=found.hint)
