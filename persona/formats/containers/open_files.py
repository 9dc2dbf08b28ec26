"""Files that are read thousands of times, opened once: for as long as somebody in this thread keeps them open."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_OPEN = 32


class _OpenFiles(threading.local):
    def __init__(self) -> None:
        self.files: dict[Path, Any] = {}
        self.keepers = 0


_open = _OpenFiles()


@contextlib.contextmanager
def kept_open() -> Iterator[None]:
    """What is read by `opened` within stays open to the end of the outermost such block."""
    _open.keepers += 1
    try:
        yield
    finally:
        _open.keepers -= 1
        if not _open.keepers:
            _close()


def opened(path: Path) -> contextlib.AbstractContextManager[Any]:
    """The file, opened for reading without buffering; kept open where somebody keeps files. Where it stands is up to
    whoever read before: seek first, and read before anything else does. Raises OSError."""
    if not _open.keepers:
        return path.open("rb", buffering=0)
    if path not in _open.files:
        if len(_open.files) >= MOST_OPEN:
            _close()
        _open.files[path] = path.open("rb", buffering=0)
    return contextlib.nullcontext(_open.files[path])


def _close() -> None:
    for file in _open.files.values():
        file.close()
    _open.files.clear()
