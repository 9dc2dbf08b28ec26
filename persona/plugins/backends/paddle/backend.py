"""The Paddle backend as the host sees it. Importing this file imports no framework."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        module = self._imported("device")
        found: Mapping[str, bool] = module.capabilities(module.find_device(device))
        return found

    def free_memory(self, device: str) -> int:
        """Bytes that are free on `device`, which may be "auto"; 0 where it cannot be asked."""
        module = self._imported("device")
        return int(module.free_memory(module.find_device(device)))

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
        found: tuple[str, ...] = self._imported("processes").devices_for(device, count)
        return found

    def launch_line(self, count: int, boot: str, module: str, logs: Path) -> list[str]:
        """paddle.distributed.launch with `count` processes on this machine, each running `module` by the file `boot`;
        what they print goes to the folder `logs`."""
        words: list[str] = self._imported("processes").launch_line(count, boot, module, logs)
        return words

    def join(self, device: str) -> PaddleProcesses:
        """Meet the other processes that the launcher started."""
        module = self._imported("processes")
        found: PaddleProcesses = module.PaddleProcesses(module.find_device(device))
        return found

    def _imported(self, name: str) -> Any:
        """A module of this package that needs Paddle and nothing else of it."""
        self._require()
        from persona.plugins.backends.paddle.libraries import quiet_paddle

        with quiet_paddle():
            return importlib.import_module(f"persona.plugins.backends.paddle.{name}")

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
