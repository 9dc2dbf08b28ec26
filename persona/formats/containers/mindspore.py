"""MindSpore's `.ckpt`: protobuf, read and written by hand (stacks/mindspore.md §3, measured).

    Checkpoint  { repeated Value value = 1 }
    Value       { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

A tensor over 512 MiB is several Values of one tag, each with the full dims; a text is UTF-32 of type "str" and dims
[0]; behind it all there may be `crc_num` and a checksum (mindspore/train/serialization.py).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from persona.core.adapters.tensor import BFLOAT16, Span, TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.byte_ranges import (
    CHUNK,
    WRITE_BUFFER,
    SpanCopier,
    file_size,
    is_possible,
    little_endian_bytes,
    read_range,
    reading,
    tensor_in_file,
)
from persona.formats.containers.cursor import Cursor, CutShort
from persona.formats.containers.flatten import python_scalar

DTYPES: dict[str, np.dtype[Any]] = {
    "Int8": np.dtype(np.int8),
    "UInt8": np.dtype(np.uint8),
    "Int16": np.dtype(np.int16),
    "UInt16": np.dtype(np.uint16),
    "Int32": np.dtype(np.int32),
    "UInt32": np.dtype(np.uint32),
    "Int64": np.dtype(np.int64),
    "UInt64": np.dtype(np.uint64),
    "Float16": np.dtype(np.float16),
    "Float32": np.dtype(np.float32),
    "Float64": np.dtype(np.float64),
    "Bool": np.dtype(np.bool_),
    "BFloat16": BFLOAT16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SLICE = 512 << 20
LONGEST_TAG = 4_096
LONGEST_TEXT = 4 << 20
MOST_VALUES = 1_000_000
MOST_AXES = 16
CHECKSUM_MARK, CHECKSUM_LENGTH = b"crc_num", 17


@dataclass(frozen=True)
class _Value:
    tag: str
    type: str
    dims: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class MindSpore:
    """The MindSpore checkpoint container. `checksum` writes the trailer of `crc_check=True`."""

    checksum: bool = False
    name = "mindspore"
    suffixes = (".ckpt",)

    def sniff(self, head: bytes, path: Path) -> bool:
        """A Checkpoint whose first Value begins with its tag."""
        if head[:1] != b"\x0a":
            return False
        position = 1
        while position < min(len(head), 11) and head[position] & 0x80:
            position += 1
        return head[position + 1 : position + 2] == b"\x0a"

    def read(self, path: Path) -> State:
        """Tensors lazy, read by byte range. Raises UnreadableFile."""
        size = file_size(path)
        notes: tuple[str, ...] = ()
        if size >= CHECKSUM_LENGTH and read_range(path, size - CHECKSUM_LENGTH, 7) == CHECKSUM_MARK:
            size -= CHECKSUM_LENGTH
            _require_checksum(path, size)
            notes = ("its checksum (crc_num) is right",)
        tensors: dict[str, TensorRef] = {}
        for slices in _group(path, _values(path, size)):
            if slices[0].tag in tensors:
                raise UnreadableFile(f"{path} has two tensors called {slices[0].tag!r}.")
            tensors[slices[0].tag] = _tensor(path, slices)
        return State(tensors, {}, notes)

    def write(self, path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> None:
        """Write `path` byte for byte as ms.save_checkpoint does; there is no place for metadata, and as with MindSpore
        an empty tensor leaves nothing. Raises ConversionError for a dtype that MindSpore's files do not have."""
        kinds = {name: _kind(name, ref) for name, ref in tensors.items()}
        with path.open("wb", buffering=WRITE_BUFFER) as out, SpanCopier(out) as copier:
            for name, ref in tensors.items():
                _write_value(out, copier, name, kinds[name], ref)
        if self.checksum:
            crc = _checksum(path, path.stat().st_size)
            with path.open("ab") as out:
                out.write(CHECKSUM_MARK + crc.to_bytes(10, "big"))


def _checksum(path: Path, size: int) -> int:
    crc = 0
    for start in range(0, size, CHUNK):
        crc = zlib.crc32(read_range(path, start, min(CHUNK, size - start)), crc)
    return crc


def _require_checksum(path: Path, size: int) -> None:
    stated = int.from_bytes(read_range(path, size + len(CHECKSUM_MARK), 10), "big")
    if _checksum(path, size) != stated:
        raise UnreadableFile(f"{path} is damaged: its checksum (crc_num) differs.", hint="Fetch the file again.")


class _Message:
    """Fields of one protobuf message, read from a file between two bytes."""

    __slots__ = ("cursor", "end", "path")

    def __init__(self, path: Path, cursor: Cursor, end: int) -> None:
        self.path, self.cursor, self.end = path, cursor, end

    def refuse(self, reason: str) -> NoReturn:
        raise UnreadableFile(
            f"{self.path} is not a whole MindSpore checkpoint: {reason} (near byte {self.cursor.position}).",
            hint="Fetch the file again.",
        )

    def more(self) -> bool:
        return self.cursor.position < self.end

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.cursor.byte()
            if self.cursor.position > self.end:
                self.refuse("it is cut short")
            if byte < 0x80:
                return value | byte << shift
            value |= (byte & 0x7F) << shift
        self.refuse("a number in it does not end")

    def length(self) -> int:
        length = self.varint()
        if length > self.end - self.cursor.position:
            self.refuse(f"{length} bytes should follow, and it is cut short")
        return length

    def message(self) -> _Message:
        length = self.length()
        return _Message(self.path, self.cursor, self.cursor.position + length)

    def text(self) -> str:
        length = self.length()
        if length > LONGEST_TAG:
            self.refuse(f"a name in it has {length} bytes")
        try:
            return self.cursor.take(length).decode("utf-8")
        except UnicodeDecodeError:
            self.refuse("a name in it is not UTF-8")

    def skip(self) -> tuple[int, int]:
        length = self.length()
        offset = self.cursor.position
        self.cursor.position += length
        return offset, length


def _values(path: Path, size: int) -> Iterator[_Value]:
    with reading(path) as file:
        whole = _Message(path, Cursor(file, 0, size), size)
        try:
            for _ in range(MOST_VALUES):
                if not whole.more():
                    return
                if whole.varint() != 0x0A:
                    whole.refuse("something that is not a tensor is in it")
                yield _value(whole.message())
        except CutShort:
            whole.refuse("it is cut short")
        whole.refuse(f"it has more than {MOST_VALUES} tensors")


def _value(message: _Message) -> _Value:
    tag: str | None = None
    tensor: tuple[str, tuple[int, ...], int, int] | None = None
    while message.more():
        field = message.varint()
        if field == 0x0A and tag is None:
            tag = message.text()
        elif field == 0x12 and tensor is None:
            tensor = _tensor_proto(message.message())
        elif field == 0x1A:
            message.refuse("it holds a hash table (MapTensor), which is not supported")
        else:
            message.refuse(f"an unknown field ({field}) is in it")
    if tag is None or tensor is None:
        message.refuse("a tensor has no name, or a name no tensor")
    return _Value(tag, *tensor)


def _tensor_proto(message: _Message) -> tuple[str, tuple[int, ...], int, int]:
    dims: list[int] = []
    kind: str | None = None
    content: tuple[int, int] | None = None
    while message.more():
        field = message.varint()
        if field == 0x08:
            dims.append(message.varint())
        elif field == 0x0A:  # the packed spelling
            packed = message.message()
            while packed.more() and len(dims) <= MOST_AXES:
                dims.append(packed.varint())
        elif field == 0x12 and kind is None:
            kind = message.text()
        elif field == 0x1A and content is None:
            content = message.skip()
        else:
            message.refuse(f"an unknown field ({field}) is in a tensor")
        if len(dims) > MOST_AXES:
            message.refuse(f"a tensor has more than {MOST_AXES} axes")
    if kind is None or content is None:
        message.refuse("a tensor has no type or no content")
    if not is_possible(tuple(dims)):
        message.refuse("a tensor has a size that is not possible")
    return kind, tuple(dims), *content


def _group(path: Path, values: Iterator[_Value]) -> Iterator[list[_Value]]:
    """Slices of one tensor follow one another under one tag."""
    group: list[_Value] = []
    for value in values:
        if group and value.tag != group[0].tag:
            yield group
            group = []
        if group and (value.type, value.dims) != (group[0].type, group[0].dims):
            raise UnreadableFile(f"{path} has slices of {value.tag!r} that do not belong together.")
        group.append(value)
    if group:
        yield group


def _tensor(path: Path, slices: list[_Value]) -> TensorRef:
    first = slices[0]
    if first.type == "str" and len(slices) == 1:
        return _text(path, first)
    dtype = DTYPES.get(first.type)
    if dtype is None:
        raise UnreadableFile(f"{path}: {first.tag!r} is of type {first.type[:40]!r}, which is not supported.")
    length = sum(piece.length for piece in slices)
    shape = () if first.dims == (0,) and length == dtype.itemsize else first.dims
    if length != math.prod(shape) * dtype.itemsize:
        raise UnreadableFile(
            f"{path}: {first.tag!r} has {length} bytes where {list(shape)} of {first.type} needs "
            f"{math.prod(shape) * dtype.itemsize}.",
            hint="Fetch the file again.",
        )
    if len(slices) == 1:
        return tensor_in_file(path, first.offset, dtype, shape)
    places = [(piece.offset, piece.length) for piece in slices]

    def load() -> np.ndarray[Any, Any]:
        whole, done = np.empty(length, np.uint8), 0
        for offset, count in places:
            whole[done : done + count] = np.frombuffer(read_range(path, offset, count), np.uint8)
            done += count
        return whole.view(dtype).reshape(shape)

    return TensorRef(dtype, shape, load)


def _text(path: Path, value: _Value) -> TensorRef:
    if value.length > LONGEST_TEXT:
        raise UnreadableFile(f"{path}: the text {value.tag!r} has {value.length} bytes.")
    try:
        return python_scalar(read_range(path, value.offset, value.length).decode("utf-32-le"))
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"{path}: the text {value.tag!r} is not UTF-32.") from error


def _kind(name: str, ref: TensorRef) -> str:
    """MindSpore's name of the dtype; Python numbers as `append_dict` stores them."""
    for kind, word in ((str, "str"), (bool, "Bool"), (int, "Int64"), (float, "Float32")):
        if isinstance(ref.python, kind):
            return word
    if ref.dtype not in NAMES:
        raise ConversionError(
            f"{name} is {ref.dtype}, which MindSpore's .ckpt cannot hold.", hint="Convert it with --dtype float16."
        )
    return NAMES[ref.dtype]


def _write_value(out: BinaryIO, copier: SpanCopier, name: str, kind: str, ref: TensorRef) -> None:
    if isinstance(ref.python, str):
        data = ref.python.encode("utf-32-le")
        out.write(_head(name, (0,), kind, len(data)) + data)
    elif ref.python is not None:
        data = np.asarray(ref.python, DTYPES[kind]).tobytes()
        out.write(_head(name, (), kind, len(data)) + data)
    elif ref.span is not None:
        for start in range(0, ref.nbytes, SLICE):
            length = min(SLICE, ref.nbytes - start)
            out.write(_head(name, ref.shape, kind, length))
            copier.copy(Span(ref.span.path, ref.span.offset + start, length))
    else:
        values = little_endian_bytes(ref.read())
        for start in range(0, len(values), SLICE):
            piece = values[start : start + SLICE]
            out.write(_head(name, ref.shape, kind, len(piece)))
            out.write(piece)


def _head(name: str, dims: tuple[int, ...], kind: str, length: int) -> bytes:
    """One Checkpoint message of one Value, up to the content's first byte."""
    tag, type_name = name.encode("utf-8"), kind.encode("ascii")
    inner = b"".join(b"\x08" + _varint(size) for size in dims)
    inner += b"\x12" + _varint(len(type_name)) + type_name + b"\x1a" + _varint(length)
    outer = b"\x0a" + _varint(len(tag)) + tag + b"\x12" + _varint(len(inner) + length) + inner
    return b"\x0a" + _varint(len(outer) + length) + outer


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
