"""The Paddle backend as the host sees it. Importing this file imports no framework."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

from persona.core.host.contracts import Availability, Runtime
from persona.core.host.errors import BackendMissing

if TYPE_CHECKING:
    from persona.core.training.base import Base
    from persona.core.training.plan import TrainingPlan
    from persona.plugins.backends.paddle.processes import PaddleProcesses
    from persona.plugins.backends.paddle.session import PaddleSession

PACKAGES = ("paddle", "ppdiffusers", "paddlenlp")
INSTALL = "persona backends setup paddle"


class PaddleBackend:
    """PaddlePaddle with ppdiffusers' models and paddlenlp's text encoders."""

    name = "paddle"
    summary = "PaddlePaddle with ppdiffusers on cpu or gpu"

    def availability(self) -> Availability:
        """Looks for the packages without importing one of them."""
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", hint=INSTALL)
        return Availability(True, version=_version())

    def capabilities(self, device: str) -> Mapping[str, bool]:
        """What works on `device`, which may be "auto". Raises BackendMissing or UsageError when it is not there."""
        self._require()
        from persona.plugins.backends.paddle.device import capabilities, find_device

        return capabilities(find_device(device))

    def free_memory(self, device: str) -> int:
        """Bytes that are free on `device`, which may be "auto"; 0 where it cannot be asked."""
        self._require()
        from persona.plugins.backends.paddle.device import find_device, free_memory

        return free_memory(find_device(device))

    def open(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> PaddleSession:
        """Load `base` onto the runtime's device and attach what `plan` trains. Missing or unknown weights are a
        BaseModelError, unknown targets a UsageError, a device that is not there a BackendMissing."""
        self._require()
        from persona.plugins.backends.paddle.libraries import quiet_imports

        with quiet_imports():
            from persona.plugins.backends.paddle.session import PaddleSession

        return PaddleSession(base, plan, runtime)

    def devices(self, device: str, count: int) -> tuple[str, ...]:
        """The devices of `count` processes. Raises BackendMissing when they are not there, UsageError for a name that
        means one device."""
        self._require()
        from persona.plugins.backends.paddle.processes import devices_for

        return devices_for(device, count)

    def launch_line(self, count: int, module: str) -> list[str]:
        """paddle.distributed.launch with `count` processes on this machine, each running the Python module `module`."""
        from persona.plugins.backends.paddle.processes import launch_line

        return launch_line(count, module)

    def join(self, device: str) -> PaddleProcesses:
        """Meet the other processes that the launcher started."""
        from persona.plugins.backends.paddle.libraries import quiet_imports

        with quiet_imports():
            from persona.plugins.backends.paddle.processes import PaddleProcesses, find_device

        return PaddleProcesses(find_device(device))

    def _require(self) -> None:
        found = self.availability()
        if not found.available:
            raise BackendMissing(f"The paddle backend cannot be used: {found.reason}.", hint=found.hint)


def _version() -> str:
    for package in ("paddlepaddle-gpu", "paddlepaddle"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
