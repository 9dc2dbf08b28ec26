"""A file or a folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from persona.core.host.errors import OutputExists, PersonaError, UnwritableOutput
from persona.formats.containers.temporaries import temporary

_LINKS_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@contextlib.contextmanager
def atomic_write(destination: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Give the name of an empty temporary file beside `destination`; when the block ends well, it gets that name.

    The file is flushed to disk before it is renamed, has mode 0644 less the umask, and replaces nothing unless
    `overwrite`. Whatever goes wrong, nothing is left behind. Raises OutputExists, or UnwritableOutput (no such folder,
    no permission, disk full); errors of persona from inside the block pass through.
    """
    destination = Path(destination)
    refuse_existing(destination, overwrite=overwrite)
    try:
        with temporary(destination) as path:
            yield path
            _flush_to_disk(path)
            _rename(path, destination, overwrite=overwrite)
    except PersonaError:
        raise
    except OSError as error:
        raise unwritable(destination, error) from error


@contextlib.contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """Give an empty folder beside `destination`; when the block ends well, it gets that name. Nothing is left behind
    otherwise. Raises OutputExists, or UnwritableOutput, which names `destination`."""
    refuse_existing(destination)
    try:
        with temporary(destination, folder=True) as building:
            try:
                yield building
            except UnwritableOutput as error:  # of a file inside: the folder's own name says where
                error.message = error.message.replace(str(building), str(destination))
                error.hint = error.hint.replace(str(building), str(destination))
                raise
            if os.path.lexists(destination):
                raise OutputExists(f"{destination} exists already: it appeared meanwhile.", hint="Choose another name.")
            building.rename(destination)
    except PersonaError:
        raise
    except OSError as error:
        raise unwritable(destination, error) from error


def refuse_existing(destination: Path, *, overwrite: bool = False) -> None:
    """Raise OutputExists when something is at `destination` already (a folder always; a file unless `overwrite`)."""
    if not os.path.lexists(destination):
        return
    if destination.is_dir():
        raise OutputExists(f"{destination} is a folder.", hint="Name a file in it.")
    if not overwrite:
        raise OutputExists(f"{destination} exists already.", hint="Choose another name, or allow it with --force.")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(written: Path, destination: Path, *, overwrite: bool) -> None:
    if overwrite:
        written.replace(destination)
    else:
        _rename_without_replacing(written, destination)
    if hasattr(os, "O_DIRECTORY"):  # the name itself has to reach the disk too
        with contextlib.suppress(OSError):
            folder = os.open(destination.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _rename_without_replacing(written: Path, destination: Path) -> None:
    """A hard link fails where a file appeared in the meantime, as a rename would not."""
    try:
        os.link(written, destination)
    except FileExistsError as error:
        raise OutputExists(
            f"{destination} exists already: it appeared meanwhile.",
            hint="Choose another name, or allow it with --force.",
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _LINKS_UNSUPPORTED:
            raise
        refuse_existing(destination)
        written.rename(destination)


def unwritable(destination: Path, error: OSError | ValueError) -> UnwritableOutput:
    """What stands in the way of writing `destination`, from what the system said."""
    folder = destination.parent
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return UnwritableOutput(
            f"{destination} was not written: the disk is full.",
            hint=f"Free some space in {folder}, or write elsewhere.",
        )
    if code == errno.ENOENT:
        return UnwritableOutput(f"There is no folder {folder}.", hint=f"mkdir -p {folder}")
    if code == errno.ENOTDIR:
        return UnwritableOutput(f"{folder} is not a folder.", hint="Choose another place for the output.")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UnwritableOutput(
            f"{folder} cannot be written: {os.strerror(code)}.", hint="Choose a folder of yours for the output."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UnwritableOutput(f"{destination} was not written: {reason}.", hint="Choose another place for the output.")
