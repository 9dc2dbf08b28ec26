"""The MindSpore backend as the host sees it. Importing this file imports no framework."""

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
    from persona.plugins.backends.mindspore.session import MindSporeSession

PACKAGES = ("mindspore", "mindone", "transformers")
INSTALL = "persona backends setup mindspore"


class MindSporeBackend:
    """MindSpore with mindone's models."""

    name = "mindspore"
    summary = "MindSpore with mindone on cpu or Ascend"

    def availability(self) -> Availability:
        """Looks for the packages without importing one of them."""
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            return Availability(False, reason=f"not installed: {', '.join(missing)}", hint=INSTALL)
        major = importlib.metadata.version("transformers").partition(".")[0]
        if int(major) >= 5:
            return Availability(False, reason=f"mindone cannot be imported beside transformers {major}", hint=INSTALL)
        return Availability(True, version=importlib.metadata.version("mindspore"))

    def capabilities(self, device: str) -> Mapping[str, bool]:
        """What works on `device`, which may be "auto". Raises BackendMissing or UsageError when it is not there."""
        self._require()
        from persona.plugins.backends.mindspore.libraries import quiet_imports

        with quiet_imports():
            from persona.plugins.backends.mindspore.device import capabilities, find_device

        return capabilities(find_device(device))

    def free_memory(self, device: str) -> int:
        """Bytes that are free on `device`, which may be "auto"; 0 where it cannot be asked."""
        self._require()
        from persona.plugins.backends.mindspore.libraries import quiet_imports

        with quiet_imports():
            from persona.plugins.backends.mindspore.device import find_device, free_memory

        return free_memory(find_device(device))

    def open(self, base: Base, plan: TrainingPlan | None, runtime: Runtime) -> MindSporeSession:
        """Load `base` onto the runtime's device and attach what `plan` trains. Missing or unknown weights are a
        BaseModelError, unknown targets a UsageError, a device that is not there a BackendMissing."""
        self._require()
        from persona.plugins.backends.mindspore.libraries import quiet_imports

        with quiet_imports():
            from persona.plugins.backends.mindspore.session import MindSporeSession

        return MindSporeSession(base, plan, runtime)

    def _require(self) -> None:
        found = self.availability()
        if not found.available:
            raise BackendMissing(f"The MindSpore backend cannot be used: {found.reason}.", hint=found.hint)
