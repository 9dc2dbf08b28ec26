"""A place in a file that is read in small pieces, most of it passed over: heads of tensors between their bytes."""

from __future__ import annotations

from typing import Any

PIECE = 4096
"""Bytes that are fetched at a time: a tensor's head, and not much of what follows it."""


class CutShort(Exception):
    """There are fewer bytes than were asked for."""


class Cursor:
    """What lies at `position` of a file that was opened without buffering, up to `end` and not further.

    `position` may be moved on by whoever reads. A buffered file does the same, but a jump empties its buffer, it fills
    the whole of it again, and it has to be asked where it is."""

    __slots__ = ("_file", "_piece", "_start", "end", "position")

    def __init__(self, file: Any, position: int, end: int) -> None:
        self._file, self.position, self.end = file, position, end
        self._piece, self._start = b"", position

    def byte(self) -> int:
        """The next byte. Raises CutShort."""
        try:
            value = self._piece[self.position - self._start]
        except IndexError:
            if not self.ahead(1):
                raise CutShort from None
            value = self._piece[0]
        self.position += 1
        return value

    def take(self, length: int) -> bytes:
        """The next `length` bytes. Raises CutShort."""
        place = self.position - self._start
        found = self._piece[place : place + length]
        if len(found) < length:
            found = self.ahead(length)
            if len(found) < length:
                raise CutShort
        self.position += length
        return found

    def ahead(self, length: int) -> bytes:
        """The next `length` bytes without moving on, fewer where the file ends before."""
        place = self.position - self._start
        if place + length > len(self._piece):
            self._fetch(length)
            place = 0
        return self._piece[place : place + length]

    def _fetch(self, length: int) -> None:
        """Hold the piece that begins at `position`, of at least `length` bytes where there are as many."""
        self._start = self.position
        wanted = min(max(length, PIECE), max(self.end - self.position, 0))
        self._file.seek(self.position)
        self._piece = self._file.read(wanted) or b""
        while len(self._piece) < wanted:
            more = self._file.read(wanted - len(self._piece))
            if not more:
                break
            self._piece += more
