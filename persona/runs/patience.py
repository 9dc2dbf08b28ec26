"""A sign of life while something takes long that says nothing of itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from persona.core.training.events import Emit, Note


@contextlib.contextmanager
def told_while_waiting(emit: Emit, what: str, every: float = 10.0) -> Iterator[None]:
    """While this lasts, a note every so many seconds: "compiling … 12 s"."""
    begun, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(every):
            emit(Note(f"{what} … {time.monotonic() - begun:.0f} s"))

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()  # nothing is told afterwards
