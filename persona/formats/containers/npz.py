"""numpy's `.npz` (a zip of .npy members) and `.npy` (numpy/lib/format.py: magic, version, a header, the bytes)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.byte_ranges import (
    WRITE_BUFFER,
    file_size,
    is_possible,
    iterate_bytes,
    read_range,
    tensor_in_file,
)
from persona.formats.containers.flatten import python_scalar
from persona.formats.containers.zip_directory import STORED, Member, read_directory, read_member, read_start
from persona.formats.containers.zip_writer import ZipWriter

MAGIC = b"\x93NUMPY"
LONGEST_HEADER = 10_000  # numpy's own limit for files it does not trust
LARGEST_INFLATED = 64 << 20  # beyond this, a member may be at most 200 times its compressed size
LARGEST_RATIO = 200
CODES = {"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"}
_HEADER = re.compile(
    r"\{'descr': '([<>|=]?)([a-zA-Z]\d*)', 'fortran_order': (True|False), 'shape': \(((?:\d+,? ?)*)\), ?\} *\n?"
)


class Npz:
    """The numpy container."""

    name = "npz"
    suffixes = (".npz", ".npy")

    def sniff(self, head: bytes, path: Path) -> bool:
        """A single array, or a zip archive whose members are arrays."""
        if head.startswith(MAGIC):
            return True
        if not head.startswith(b"PK\x03\x04"):
            return False
        try:
            return any(name.endswith(".npy") for name in read_directory(path))
        except UnreadableFile:
            return head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy")

    def read(self, path: Path) -> State:
        """Arrays lazy; those of a compressed archive are inflated when read. Raises UnreadableFile."""
        if read_range(path, 0, min(6, file_size(path))) == MAGIC:
            size = file_size(path)
            return State({path.stem: _array(path, Member(path.name, STORED, 0, size, size, 0))})
        tensors: dict[str, TensorRef] = {}
        for name, member in read_directory(path).items():
            if not name.endswith(".npy"):
                raise UnreadableFile(f"{path} has a member {name[:80]!r}, which is no array.")
            tensors[name.removesuffix(".npy")] = _array(path, member)
        return State(tensors)

    def write(self, path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> None:
        """Write `path` as np.savez does; there is no place for metadata. Raises ConversionError for dtypes that numpy
        has no word for (bfloat16, float8)."""
        heads = {name: _npy_header(name, ref) for name, ref in tensors.items()}
        with path.open("wb", buffering=WRITE_BUFFER) as out:
            archive = ZipWriter(out)
            for name, ref in tensors.items():
                archive.add(f"{name}.npy", len(heads[name]) + ref.nbytes, [heads[name], *iterate_bytes(ref)])
            archive.finish()


def _array(path: Path, member: Member) -> TensorRef:
    order, code, fortran, shape, start = _parse_header(path, member)
    if code.startswith("U"):
        return _text(path, member, order, code, shape, start)
    if code not in CODES:
        why = "it holds pickled objects" if code.startswith("O") else f"dtype {code!r} is not one of numbers"
        raise UnreadableFile(f"{path}: array {member.name[:80]!r} cannot be read: {why}.")
    stored = np.dtype(code if code[1:] == "1" else f"{order if order == '>' else '<'}{code}")
    dtype = stored.newbyteorder("<")
    wanted = math.prod(shape) * dtype.itemsize
    if member.size - start != wanted:
        raise UnreadableFile(
            f"{path}: array {member.name[:80]!r} has {member.size - start} bytes where {list(shape)} of {code} needs "
            f"{wanted}."
        )
    if member.method == STORED and stored == dtype and not (fortran and len(shape) > 1):
        return tensor_in_file(path, member.offset + start, dtype, shape)
    if member.size > max(LARGEST_INFLATED, LARGEST_RATIO * member.compressed):
        raise UnreadableFile(f"{path}: array {member.name[:80]!r} would inflate to {member.size} bytes.")

    def load() -> np.ndarray[Any, Any]:
        if member.method == STORED:
            raw = read_range(path, member.offset + start, wanted)
        else:
            raw = read_member(path, member, at_most=member.size)[start:]
        values = np.frombuffer(raw, stored).reshape(shape, order="F" if fortran else "C")
        return np.ascontiguousarray(values, dtype).reshape(shape)

    return TensorRef(dtype, shape, load)


def _parse_header(path: Path, member: Member) -> tuple[str, str, bool, tuple[int, ...], int]:
    """Byte order, type code, Fortran order, shape, and where the values begin."""
    head = read_start(path, member, LONGEST_HEADER + 12)
    version, width = head[6:7], 2 if head[6:7] == b"\1" else 4
    length = int.from_bytes(head[8 : 8 + width], "little")
    start = 8 + width + length
    if not head.startswith(MAGIC) or version not in (b"\1", b"\2", b"\3") or length > LONGEST_HEADER:
        raise UnreadableFile(f"{path}: {member.name[:80]!r} is not a numpy array.")
    found = _HEADER.fullmatch(head[8 + width : start].decode("latin-1"))
    if not found or len(head) < start:
        raise UnreadableFile(f"{path}: array {member.name[:80]!r} has a header that arrays of numbers do not have.")
    order, code, fortran, sizes = found.groups()
    shape = tuple(int(size) for size in re.findall(r"\d+", sizes)[:65])
    if not is_possible(shape):
        raise UnreadableFile(f"{path}: array {member.name[:80]!r} has a shape that is not possible.")
    return order, code, fortran == "True", shape, start


def _text(path: Path, member: Member, order: str, code: str, shape: tuple[int, ...], start: int) -> TensorRef:
    length = 4 * int(code[1:] or 0)
    if shape != () or not 0 < length <= LARGEST_INFLATED or member.size - start != length:
        raise UnreadableFile(f"{path}: array {member.name[:80]!r} holds texts, which is not supported.")
    raw = read_member(path, member, at_most=length + start)[start:] if member.crc else read_range(path, start, length)
    try:
        return python_scalar(raw.decode("utf-32-be" if order == ">" else "utf-32-le").rstrip("\0"))
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"{path}: the text {member.name[:80]!r} is not UTF-32.") from error


def _npy_header(name: str, ref: TensorRef) -> bytes:
    kind = ref.dtype.newbyteorder("<").str
    if kind[1:] not in CODES and ref.dtype.kind != "U":
        raise ConversionError(f"{name} is {ref.dtype}, which numpy's .npz cannot hold.", hint="Use --dtype float32.")
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {ref.shape!r}, }}"
    text += " " * (-(10 + len(text) + 1) % 64) + "\n"
    return MAGIC + b"\1\0" + len(text).to_bytes(2, "little") + text.encode("latin-1")
