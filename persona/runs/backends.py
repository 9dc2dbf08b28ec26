"""Which backend executes a run: the one asked for, else the first that can be used here."""

from __future__ import annotations

from typing import Any

from persona.core.host.errors import BackendMissing
from persona.core.host.host import Host


def choose_backend(host: Host, name: str | None) -> Any:
    """A backend that is available. Raises BackendMissing with the line that installs one."""
    if name is not None:
        backend = host.load("backend", name)()
        found = backend.availability()
        if not found.available:
            raise BackendMissing(f"The backend {name} cannot be used here: {found.reason}", hint=found.hint)
        return backend
    reasons = []
    for known in host.provided("backend"):
        backend = host.load("backend", known)()
        found = backend.availability()
        if found.available:
            return backend
        reasons.append(f"{known}: {found.reason}")
    raise BackendMissing(
        f"No backend can be used here ({'; '.join(reasons)}).", hint='Install one: pip install "persona[torch]"'
    )
