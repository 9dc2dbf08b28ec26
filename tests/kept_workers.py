"""For tests of one environment: the worker of a closed session is kept for the next one, because importing a framework
takes longer than a short run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from persona.core.host.errors import PersonaError
from persona.environments.remote import Process, RemoteBackend, RemoteSession


@contextlib.contextmanager
def kept_workers() -> Iterator[dict[tuple[Path, str], Process]]:
    """While this lasts, workers whose session has been closed wait for the next one, by Python and backend."""
    kept: dict[tuple[Path, str], Process] = {}

    def taken(backend: RemoteBackend) -> Process:
        if backend._ready is None:
            backend._ready = kept.pop((backend.python, backend.name), None) or Process(backend.python, backend.name)
        return backend._ready

    def keep(session: RemoteSession) -> None:
        process = session._process
        key = (process.python, process.backend)
        if process._is_waiting or process._process.poll() is not None or key in kept:
            process.close()
            return
        try:
            process.call("close")
        except PersonaError:
            process.close()
            raise
        kept[key] = process

    with patch.object(RemoteBackend, "_process", taken), patch.object(RemoteSession, "close", keep):
        try:
            yield kept
        finally:
            for process in kept.values():
                process.close()
