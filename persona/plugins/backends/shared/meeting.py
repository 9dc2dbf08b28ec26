"""Where the processes of a run on one machine meet: bytes of everybody for everybody, over a local socket. For a
framework whose own collectives give up when one process lets the others wait, as the first does while it samples, or
know too few kinds of numbers."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from persona.core.training.processes import PeerLost

MEETING = "PERSONA_MEETING"
"""In a launched process: the port of the table."""
_LENGTH = struct.Struct("<I")

Array = np.ndarray[Any, np.dtype[Any]]


class Meeting:
    """One process's seat. Every one has to make the same calls in the same order."""

    def __init__(self, rank: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", int(os.environ[MEETING])))
        self._connection.sendall(_LENGTH.pack(rank))

    def sum(self, values: Array) -> Array:
        """The sum of everybody's `values`, float64 of one shape, added up in the order of the ranks. Waits as long as
        it takes. Raises PeerLost when a process is gone."""
        own = np.array(values, np.float64)
        try:
            _send(self._connection, own.tobytes())
            everybody = np.frombuffer(_receive(self._connection), np.float64)
        except (OSError, EOFError) as error:
            raise PeerLost("Another process of the run is gone.") from error
        total = np.zeros_like(own)
        for brought in everybody.reshape(-1, *own.shape):
            total += brought
        return total

    def leave(self) -> None:
        """Give the seat up."""
        self._connection.close()


class Seated:
    """What `persona.core.training.processes.Processes` asks of figures and of waiting, at a table."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self.meeting = Meeting(rank)

    def sum(self, values: Array) -> Array:
        """The sum of everybody's `values`, float64."""
        return self.meeting.sum(values)

    def barrier(self) -> None:
        """Wait until everybody is here."""
        self.sum(np.zeros(1))


@contextmanager
def peers_lost(*errors: type[Exception]) -> Iterator[None]:
    """Turn what a framework's own collectives raise when somebody is gone, one of `errors`, into PeerLost."""
    try:
        yield
    except errors as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PeerLost(f"Another process of the run is gone: {first}") from error


class Table:
    """What the processes are seated at, in the process that has launched them. `port` is where they meet."""

    def __init__(self, count: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._brought: list[bytes] = [b""] * count
        self._everybody = b""
        self._all_here = threading.Barrier(count, self._put_together)
        for _ in range(count):
            threading.Thread(target=self._serve, daemon=True).start()

    def _put_together(self) -> None:
        self._everybody = b"".join(self._brought)

    def _serve(self) -> None:
        """Serve one process to its end; when it goes, nobody else waits for it any more."""
        connection, _ = self._server.accept()
        with connection:
            try:
                (rank,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
                while True:
                    self._brought[rank] = _receive(connection)
                    self._all_here.wait()
                    _send(connection, self._everybody)
            except (OSError, EOFError, threading.BrokenBarrierError):
                self._all_here.abort()


def _send(connection: socket.socket, content: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(content)) + content)


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
