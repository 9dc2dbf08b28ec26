"""Which backend executes a run: the one asked for, else the first that can be used here; in this process where its
framework is installed here, else by a worker in the framework's own environment."""

from __future__ import annotations

from typing import Any

from persona.core.host.errors import BackendMissing
from persona.core.host.host import Host


def choose_backend(host: Host, name: str | None) -> Any:
    """A backend that is available. Raises BackendMissing with the line that installs one."""
    if name is not None:
        found, reason, hint = usable(host, name)
        if found is None:
            raise BackendMissing(f"The backend {name} cannot be used here: {reason}.", hint=hint)
        return found
    reasons = []
    for known in host.provided("backend"):
        found, reason, _ = usable(host, known)
        if found is not None:
            return found
        reasons.append(f"{known}: {reason}")
    raise BackendMissing(
        f"No backend can be used here ({'; '.join(reasons)}).", hint='Install one: pip install "persona[torch]"'
    )


def usable(host: Host, name: str) -> tuple[Any, str, str]:
    """(the backend called `name`, "", ""), or (None, why not, the line to type)."""
    from persona.environments.places import own_python
    from persona.environments.state import find_for

    backend = host.load("backend", name)()
    here = backend.availability()
    if here.available and own_python(name) is None:
        return backend, "", ""
    elsewhere = find_for(name)
    if elsewhere is None:
        return None, here.reason, here.hint
    if not elsewhere.is_usable:
        return None, elsewhere.reason, elsewhere.hint
    from persona.environments.remote import RemoteBackend

    return RemoteBackend(name, backend.summary, elsewhere.python, elsewhere.told), "", ""
