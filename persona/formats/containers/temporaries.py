"""Temporary files and folders beside what is being written, and those of processes that were killed.

Whoever writes one holds a lock on it. The system lets go of the lock when the process ends, however it ends: so a
temporary that can be locked is nobody's, and the next process that writes into the folder removes it. Only names that
persona gives are looked at, only the user's own, and only those untouched for a while, because there are network file
systems that do not tell one machine of another's locks. Where locks do not exist (Windows) they stay.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNTOUCHED = 600.0
"""Seconds since the last write after which a temporary that nobody holds is removed."""
_NAME = re.compile(r"\.persona-[0-9a-f]{16}\.tmp")
_looked_at: set[Path] = set()


@contextlib.contextmanager
def temporary(destination: Path, *, folder: bool = False) -> Iterator[Path]:
    """An empty file of mode 0644 less the umask, or an empty folder, beside `destination`, held until the block ends;
    what is left of it then is removed. Raises OSError where none can be made."""
    try:
        _look_at(destination.parent)
        path, held = _made(destination.parent, folder=folder)
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from error
    try:
        yield path
    finally:
        _remove(path, folder=folder)
        if held is not None:
            os.close(held)


def remove_abandoned(folder: Path, *, untouched: float = UNTOUCHED) -> None:
    """Remove the temporaries in `folder` that no process holds and that nobody wrote to for `untouched` seconds. What
    cannot be removed stays."""
    with contextlib.suppress(OSError), os.scandir(folder) as found:
        for one in found:
            if _NAME.fullmatch(one.name):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(Path(one.path), one.stat(follow_symlinks=False), untouched)


def _remove_if_abandoned(path: Path, state: os.stat_result, untouched: float) -> None:
    if fcntl is None or state.st_uid != os.getuid() or time.time() - state.st_mtime < untouched:
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path, folder=path.is_dir())
    finally:
        os.close(descriptor)


def _look_at(folder: Path) -> None:
    """Once for a folder and process: a batch writes thousands of files into one."""
    known = folder.absolute()
    if known not in _looked_at:
        _looked_at.add(known)
        remove_abandoned(folder)


def _made(parent: Path, *, folder: bool) -> tuple[Path, int | None]:
    """A new temporary and the descriptor that holds its lock, None where there are no locks."""
    while True:
        path = parent / f".persona-{os.urandom(8).hex()}.tmp"
        if folder:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))  # the kernel takes the umask off
        if fcntl is None:
            return path, None
        with contextlib.suppress(FileNotFoundError):  # another process found it before it was held
            held = os.open(path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            if path.exists():
                return path, held
            os.close(held)


def _remove(path: Path, *, folder: bool) -> None:
    if folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
