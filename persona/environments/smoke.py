"""The proof that an environment works: its versions are the pinned ones, its framework and no other is loaded, and its
backend makes a picture from the embedded base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.host.errors import BackendMissing, PersonaError, UsageError
from persona.environments.frameworks import Framework, untested
from persona.environments.remote import RemoteBackend

DEVICES = ("cpu", "cuda", "gpu", "npu", "ascend", "mps")
"""Names of devices that a backend is asked for; it refuses those it does not know or that are not there."""


def smoke_run(framework: Framework, python: Path, log: Path) -> dict[str, Any]:
    """What the environment says of itself: Python, packages, capabilities by device. Raises BackendMissing when it does
    not do what it should."""
    from persona.hub.bases import open_base

    base = open_base("mini")
    backend = RemoteBackend(framework.name, framework.title, python)
    try:
        able = capabilities_of(backend)
        session = backend.open(base, None, Runtime("cpu", log=log))
        try:
            told = dict(session.surroundings)
            side = base.native_size
            pictures = session.sample(SampleRequest(("a red apple",), (0,), width=side, height=side, steps=1))
            shape = tuple(pictures.shape)
        finally:
            session.close()
    except PersonaError as error:
        raise BackendMissing(
            f"The environment of {framework.name} was built, and does not work: {error.message}",
            hint=f"All it said is in {log}. What may be wrong: persona doctor",
        ) from error
    finally:
        backend.close()
    check_versions(framework, told["packages"])
    if shape != (1, side, side, 3):
        raise BackendMissing(f"The environment of {framework.name} made no picture, but something of shape {shape}.")
    return told | {"version": told["packages"][next(iter(framework.packages))], "capabilities": able}


def check_versions(framework: Framework, found: dict[str, str]) -> None:
    """Raises BackendMissing when a package is not of the version it was pinned to."""
    wrong = [f"{name} {found.get(name, 'missing')}, not {want}" for name, want in framework.packages.items()
             if found.get(name, "").partition("+")[0] != want]  # fmt: skip
    if wrong:
        raise BackendMissing(
            f"The environment of {framework.name} has {' and '.join(wrong)}.",
            hint=f"Build it again: persona backends remove {framework.name}; persona backends setup {framework.name}",
        )


def told_untested(backend: str, session: Any) -> list[str]:
    """A note for the user when an open session's packages are not of the tested versions."""
    from persona.environments.worker import versions

    found = getattr(session, "surroundings", {}).get("packages") or versions()
    note = untested(backend, found)
    return [note] if note else []


def capabilities_of(backend: Any) -> dict[str, dict[str, bool]]:
    """What a backend can do on each device that is there."""
    able = {}
    for device in DEVICES:
        try:
            able[device] = dict(backend.capabilities(device))
        except (BackendMissing, UsageError):
            continue
    return able
