"""The few opcodes that a weight file needs, as bytes (CPython's Lib/pickletools.py)."""

from __future__ import annotations

import struct
from collections.abc import Iterable

MARK, EMPTY_DICT, SET_ITEMS, EMPTY_TUPLE, TUPLE, REDUCE, BUILD, STOP = (
    b"(",
    b"}",
    b"u",
    b")",
    b"t",
    b"R",
    b"b",
    b".",
)
TRUE, FALSE, NONE, PERSISTENT_ID = b"\x88", b"\x89", b"N", b"Q"


def protocol(version: int) -> bytes:
    """The first two bytes."""
    return b"\x80" + bytes([version])


def text(value: str) -> bytes:
    """A text of any length (opcode of protocol 1)."""
    data = value.encode("utf-8")
    return b"X" + struct.pack("<L", len(data)) + data


def integer(value: int) -> bytes:
    """A whole number."""
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<l", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def scalar(value: bool | int | float | str) -> bytes:
    """A Python number or text."""
    if isinstance(value, bool):
        return TRUE if value else FALSE
    if isinstance(value, int):
        return integer(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return text(value)


def name_of(module: str, name: str) -> bytes:
    """A global, in the spelling that every protocol reads."""
    return f"c{module}\n{name}\n".encode("ascii")


def tuple_of(items: Iterable[bytes]) -> bytes:
    """A tuple of values that are opcodes already."""
    return MARK + b"".join(items) + TUPLE


def sizes(values: Iterable[int]) -> bytes:
    """A tuple of whole numbers."""
    return tuple_of(integer(value) for value in values)


def bytes_head(length: int) -> bytes:
    """What comes before `length` raw bytes (protocol 3; 4 from 4 GiB)."""
    if length < 1 << 8:
        return b"C" + bytes([length])
    if length < 1 << 32:
        return b"B" + struct.pack("<L", length)
    return b"\x8e" + struct.pack("<Q", length)
