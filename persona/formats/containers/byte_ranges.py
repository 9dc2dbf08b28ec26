"""Reading tensors by byte range, and writing them: in the kernel where the bytes stay as they are."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from persona.core.adapters.tensor import Span, TensorRef
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.open_files import kept_open, opened

CHUNK = 1 << 20
WRITE_BUFFER = 1 << 20
"""For files that are written: pieces that begin and end inside a page cost the kernel half as much again."""


def file_size(path: Path) -> int:
    """Size in bytes of a regular file. Raises UnreadableFile when there is none."""
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise UnreadableFile(f"{path} is {kind}." if path.exists() else f"There is no file {path}.")
        return path.stat().st_size
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


@contextlib.contextmanager
def reading(path: Path, buffering: int = 0) -> Iterator[Any]:
    """The file opened for reading bytes; whatever the system says against it becomes an UnreadableFile."""
    try:
        with path.open("rb", buffering=buffering) as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UnreadableFile:
    return UnreadableFile(f"{path} cannot be read: {error.strerror or error}.")


def read_range(path: Path, offset: int, length: int) -> bytes:
    """Exactly `length` bytes at `offset`. Raises UnreadableFile when the file is shorter or cannot be opened."""
    try:
        with opened(path) as file:
            file.seek(offset)
            data = _read_fully(file, length)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) != length:
        raise UnreadableFile(f"{path} ends before byte {offset + length}.")
    return data


def _read_fully(file: Any, length: int) -> bytes:
    data: bytes = file.read(length) or b""
    while len(data) < length:  # one read gives at most 2 GiB on Linux
        more = file.read(length - len(data))
        if not more:
            break
        data += more
    return data


def read_array(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An array from little-endian C-order bytes, read straight into its memory (no second copy)."""
    array = np.empty(shape, dtype)
    if array.nbytes == 0:
        return array
    view = array.reshape(-1).view(np.uint8).data
    done = 0
    try:
        with opened(path) as file:
            file.seek(offset)
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise UnreadableFile(f"{path} ends before byte {offset + array.nbytes}: it changed while in use.")
                done += count
    except OSError as error:
        raise _unreadable(path, error) from error
    return array


def is_possible(shape: tuple[int, ...]) -> bool:
    """Whether an array of that shape can exist: at most 32 axes, and sizes whose product is a sane number even where
    a zero among them makes it empty."""
    return len(shape) <= 32 and math.prod(size for size in shape if size) < 1 << 56


def tensor_in_file(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> TensorRef:
    """A lazy tensor whose little-endian C-order bytes lie in one piece at `offset`."""
    length = math.prod(shape) * dtype.itemsize
    return TensorRef(dtype, shape, lambda: read_array(path, offset, dtype, shape), Span(path, offset, length))


def _bytes_of(ref: TensorRef) -> memoryview:
    """The bytes of a tensor that is read, checked to be as many as its header will say."""
    data = little_endian_bytes(ref.read())
    if len(data) != ref.nbytes:
        raise ConversionError(f"A tensor of {ref.dtype} {list(ref.shape)} came as {len(data)} bytes.")
    return data


def little_endian_bytes(array: np.ndarray[Any, Any]) -> memoryview:
    """The array's bytes as every container stores them: little endian, C order."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def iterate_bytes(ref: TensorRef) -> Iterator[bytes | memoryview]:
    """A tensor's bytes in pieces of at most 1 MiB, without holding it whole when it lies in a file."""
    if ref.span is None:
        data = _bytes_of(ref)
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]
        return
    _require_length(ref)
    with reading(ref.span.path) as file:
        file.seek(ref.span.offset)
        for start in range(0, ref.nbytes, CHUNK):
            piece = _read_fully(file, min(CHUNK, ref.nbytes - start))
            if len(piece) < min(CHUNK, ref.nbytes - start):
                raise UnreadableFile(f"{ref.span.path} is shorter than it was: it changed while in use.")
            yield piece


def _require_length(ref: TensorRef) -> None:
    if ref.span is not None and ref.span.length != ref.nbytes:
        raise ConversionError(f"A tensor of {ref.dtype} {list(ref.shape)} lies in {ref.span.length} bytes.")


def write_tensors(out: BinaryIO, tensors: Iterable[TensorRef]) -> None:
    """Append the tensors' bytes to `out`, one after the other.

    Bytes that lie in a file are copied by the kernel; neighbours there become one copy. The others pass through
    memory one tensor at a time.
    """
    with SpanCopier(out) as copier:
        pending: Span | None = None
        for ref in tensors:
            span = ref.span
            _require_length(ref)
            if span is not None and pending is not None and _follows(span, pending):
                pending = Span(pending.path, pending.offset, pending.length + span.length)
                continue
            if pending is not None:
                copier.copy(pending)
            pending = span
            if span is None:
                out.write(_bytes_of(ref))
        if pending is not None:
            copier.copy(pending)


def _follows(span: Span, before: Span) -> bool:
    return span.offset == before.offset + before.length and span.path == before.path


class SpanCopier:
    """Copies byte ranges of files to the end of `out`; files that are read meanwhile stay open to its end."""

    small = WRITE_BUFFER  # below this a read and a buffered write cost less than a flush and a copy in the kernel

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._keeping = kept_open()

    def __enter__(self) -> SpanCopier:
        self._keeping.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._keeping.__exit__(*error)

    def append(self, ref: TensorRef) -> None:
        """Append a tensor's bytes, wherever they are."""
        if ref.span is None:
            self._out.write(_bytes_of(ref))
        else:
            _require_length(ref)
            self.copy(ref.span)

    def copy(self, span: Span) -> None:
        """Append the bytes of `span`. Raises UnreadableFile when the file no longer holds them."""
        try:
            source = opened(span.path)
        except OSError as error:
            raise _unreadable(span.path, error) from error
        with source as file:
            done = 0
            if span.length > self.small:
                self._out.flush()
                done = _copy_in_kernel(file.fileno(), span, self._out.fileno())
                self._out.seek(0, os.SEEK_END)
            file.seek(span.offset + done)
            while done < span.length:
                piece = file.read(min(CHUNK, span.length - done))
                if not piece:
                    raise UnreadableFile(f"{span.path} ends before byte {span.offset + span.length}: it changed.")
                self._out.write(piece)
                done += len(piece)


def _copy_in_kernel(source: int, span: Span, target: int) -> int:
    """How many bytes the kernel copied; fewer than asked where it cannot (other file system, other system)."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < span.length:
        try:
            count = os.copy_file_range(source, target, span.length - done, offset_src=span.offset + done)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            return done
        if count == 0:
            return done
        done += count
    return done
