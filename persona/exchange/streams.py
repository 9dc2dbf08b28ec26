"""`-` on the command line: a file from stdin, a file to stdout."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from persona.core.host.errors import PersonaError, UnreadableFile, UsageError

if TYPE_CHECKING:
    import tempfile


@contextlib.contextmanager
def standard_streams() -> Iterator[Streams]:
    """Gives the place where what stdin brings is kept for the time of the block, and where stdout is prepared."""
    streams = Streams()
    try:
        yield streams
    finally:
        streams.close()


class Streams:
    """Files in place of stdin and stdout, because tensors are read and written by place."""

    def __init__(self) -> None:
        self._made: tempfile.TemporaryDirectory[str] | None = None

    @property
    def _folder(self) -> Path:
        if self._made is None:
            import tempfile

            self._made = tempfile.TemporaryDirectory(prefix="persona-")
        return Path(self._made.name)

    def close(self) -> None:
        """Remove the files."""
        if self._made is not None:
            self._made.cleanup()

    def take_in(self) -> Path:
        """Everything stdin gives, as a file called stdin. Raises UnreadableFile when it gives nothing."""
        if sys.stdin.isatty():
            raise UsageError("Nothing is piped in for -.", hint="cat FILE | persona convert - OUT")
        path = self._folder / "stdin"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        if path.stat().st_size == 0:
            raise UnreadableFile("stdin (-) is empty.", hint="cat FILE | persona convert - OUT")
        return path

    def prepared(self, ending: str) -> Path:
        """Where to write what stdout shall get."""
        if sys.stdout.isatty():
            raise UsageError("Weights are not written to a terminal.", hint="persona convert FILE - > OUT")
        return self._folder / f"stdout{ending}"

    def readable(self, text: str) -> str:
        """`text` with the temporary files called stdin and stdout."""
        return text if self._made is None else text.replace(f"{self._folder}{os.sep}", "")

    def named(self, error: BaseException) -> BaseException:
        """An error whose message speaks of stdin and stdout in place of temporary files."""
        if isinstance(error, PersonaError):
            error.message, error.hint = self.readable(error.message), self.readable(error.hint)
        return error

    @staticmethod
    def give_out(path: Path) -> None:
        """Send a file to stdout."""
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
        sys.stdout.buffer.flush()
