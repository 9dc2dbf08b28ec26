"""A zip archive of stored members, written front to back, their bytes aligned so that they can be mapped."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO

ALIGNMENT = 64


class ZipWriter:
    """Writes members under `folder`; 64-bit fields only where they are needed (APPNOTE 4.3.7 to 4.3.16)."""

    def __init__(self, out: BinaryIO, folder: str = "") -> None:
        self._out, self._folder = out, folder
        self._directory: list[bytes] = []
        self._position = 0

    def _write(self, data: bytes | memoryview) -> None:
        self._out.write(data)
        self._position += len(data)

    def add(self, name: str, size: int, pieces: Iterable[bytes | memoryview]) -> None:
        """One member of `size` bytes. The checksum goes into the header when the bytes have passed."""
        raw = f"{self._folder}{name}".encode()
        header_at = self._position
        wide = b"" if size < 0xFFFFFFFF else struct.pack("<2H2Q", 1, 16, size, size)
        gap = -(header_at + 30 + len(raw) + len(wide) + 4) % ALIGNMENT
        extra = wide + struct.pack("<2H", 0x4246, gap) + b"Z" * gap  # "FB", torch's own padding field
        self._write(_local(raw, extra, size))
        checksum = 0
        for piece in pieces:
            self._write(piece)
            checksum = zlib.crc32(piece, checksum)
        self._out.seek(header_at + 14)
        self._out.write(struct.pack("<L", checksum))
        self._out.seek(self._position)
        self._directory.append(_central(raw, size, checksum, header_at))

    def finish(self) -> None:
        """The central directory."""
        start, data = self._position, b"".join(self._directory)
        self._write(data)
        count = len(self._directory)
        if count >= 0xFFFF or start >= 0xFFFFFFFF or len(data) >= 0xFFFFFFFF:
            record_at = self._position
            record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(data), start)
            self._write(record + struct.pack("<4sLQL", b"PK\6\7", 0, record_at, 1))
        short = min(count, 0xFFFF)
        length, begin = min(len(data), 0xFFFFFFFF), min(start, 0xFFFFFFFF)
        self._write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, short, short, length, begin, 0))


def _local(name: bytes, extra: bytes, size: int) -> bytes:
    short = min(size, 0xFFFFFFFF)
    fields = (b"PK\3\4", 45 if short != size else 20, 0x800, 0, 0, 0x21, 0, short, short, len(name), len(extra))
    return struct.pack("<4s5H3L2H", *fields) + name + extra


def _central(name: bytes, size: int, checksum: int, header_at: int) -> bytes:
    sizes = [size, size] if size >= 0xFFFFFFFF else []
    values = sizes + ([header_at] if header_at >= 0xFFFFFFFF else [])
    extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    short, begin = min(size, 0xFFFFFFFF), min(header_at, 0xFFFFFFFF)
    version = 45 if extra else 20
    head = (b"PK\1\2", version, version, 0x800, 0, 0, 0x21, checksum, short, short)
    return struct.pack("<4s6H3L5H2L", *head, len(name), len(extra), 0, 0, 0, 0, begin) + name + extra
