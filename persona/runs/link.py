"""What a launched process and the command that launched it say to each other: JSON lines over a local socket. The first
line shows the token that only the launched processes were given."""

from __future__ import annotations

import json
import socket
from typing import Any

from persona.core.host import errors
from persona.core.host.errors import PersonaError
from persona.core.training import events
from persona.core.training.events import Event

VARIABLE = "PERSONA_LAUNCHED_BY"
"""In a launched process: PORT:TOKEN of the command that launched it."""


class Lines:
    """JSON objects in and out of a connected socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._held = b""

    def send(self, **message: Any) -> None:
        """Say something. Raises OSError when nobody is there any more."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def take(self) -> list[dict[str, Any]] | None:
        """Wait for something and return all that has come; None when the other end is gone."""
        try:
            found = self.connection.recv(1 << 16)
        except (ConnectionError, TimeoutError):
            return None
        if not found:
            return None
        *whole, self._held = (self._held + found).split(b"\n")
        return [json.loads(line) for line in whole]


def event_in_words(event: Event) -> dict[str, Any]:
    """An event as plain values."""
    return {"event": type(event).__name__, "values": dict(vars(event))}


def event_from(message: dict[str, Any]) -> Event:
    """Inverse of `event_in_words`."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in message["values"].items()}
    made: Event = getattr(events, message["event"])(**values)
    return made


def error_in_words(error: PersonaError) -> dict[str, Any]:
    """An error as plain values."""
    return {"error": type(error).__name__, "message": error.message, "hint": error.hint}


def error_from(message: dict[str, Any]) -> PersonaError:
    """Inverse of `error_in_words`, for the classes of persona.core.host.errors."""
    cls = getattr(errors, message["error"], errors.TrainingError)
    made: PersonaError = cls(message["message"], hint=message["hint"])
    return made
