"""safetensors: a JSON header that tells dtype, shape and place of every tensor, and then their bytes.

The format is huggingface/safetensors' README ("Format"); the rules checked here are those of its Rust reader
(safetensors/src/tensor.rs), and dialects.md §10.3 rule 4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from persona.core.adapters.tensor import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.byte_ranges import (
    WRITE_BUFFER,
    file_size,
    is_possible,
    read_range,
    tensor_in_file,
    write_tensors,
)

LARGEST_HEADER = 100_000_000
MOST_TENSORS = 1_000_000

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": FLOAT8_E4M3,
    "F8_E5M2": FLOAT8_E5M2,
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PACKED = {"F4", "F6_E2M3", "F6_E3M2"}  # several values in a byte: known to the format, not to numpy


class Safetensors:
    """The safetensors container."""

    name = "safetensors"
    suffixes = (".safetensors",)

    def sniff(self, head: bytes, path: Path) -> bool:
        """A plausible header length and an opening brace."""
        return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= LARGEST_HEADER

    def read(self, path: Path) -> State:
        """Header checked as the format demands; tensors lazy. Raises UnreadableFile."""
        size = file_size(path)
        length = int.from_bytes(read_range(path, 0, 8), "little") if size >= 8 else 0
        if not 2 <= length <= LARGEST_HEADER:
            raise UnreadableFile(f"{path} is not a safetensors file: a header of {length} bytes is not possible.")
        if 8 + length > size:
            raise UnreadableFile(
                f"{path} is cut short: its header needs {8 + length} bytes and the file has {size}.",
                hint="Fetch the file again.",
            )
        header = _parse_header(path, read_range(path, 8, length))
        metadata = _metadata(path, header.pop("__metadata__", None))
        tensors = _tensors(path, header, 8 + length, size - 8 - length)
        notes = _paddle_bfloat16(tensors, metadata)
        return State(tensors, metadata, notes)

    def write(self, path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> None:
        """Write `path`; order as given, unless a tensor would not be aligned to its type. Raises ConversionError for
        a dtype that the format does not have."""
        names = _aligned_order(tensors)
        header: dict[str, object] = {}
        if metadata:
            header["__metadata__"] = dict(metadata)
        offset = 0
        for name in names:
            ref = tensors[name]
            end = offset + ref.nbytes
            header[name] = {
                "dtype": _dtype_name(name, ref),
                "shape": list(ref.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > LARGEST_HEADER:
            raise ConversionError(f"The header would have {len(text)} bytes; safetensors allows {LARGEST_HEADER}.")
        with path.open("wb", buffering=WRITE_BUFFER) as out:
            out.write(len(text).to_bytes(8, "little") + text)
            write_tensors(out, (tensors[name] for name in names))


def _dtype_name(name: str, ref: TensorRef) -> str:
    if name == "__metadata__":
        raise ConversionError("A tensor cannot be called __metadata__ in a safetensors file.")
    if ref.dtype not in NAMES:
        raise ConversionError(
            f"{name} cannot go into a safetensors file: it holds {ref.dtype}, the format knows tensors of numbers only."
        )
    return NAMES[ref.dtype]


def _aligned_order(tensors: Mapping[str, TensorRef]) -> Sequence[str]:
    """The given order when every tensor then begins at a multiple of its item size (torch maps them in place), else
    wide types first."""
    offset = 0
    for ref in tensors.values():
        if offset % ref.dtype.itemsize:
            return sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        offset += ref.nbytes
    return list(tensors)


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UnreadableFile(f"{path} names {twice!r} twice in its header.")
        return found

    def no_constants(word: str) -> object:
        raise UnreadableFile(f"{path} has {word} in its header, which is not JSON.")

    try:
        decoded = text.decode("utf-8")
        if text.startswith(b"{") and text.count(b"[") > 4 * MOST_TENSORS:
            raise UnreadableFile(f"{path} has more than {MOST_TENSORS} tensors in its header.")
        header = json.loads(decoded.rstrip(" "), object_pairs_hook=no_duplicates, parse_constant=no_constants)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UnreadableFile(f"{path} has a header that is not JSON: {reason}.") from error
    if not isinstance(header, dict):
        raise UnreadableFile(f"{path} has a header that is not a JSON object.")
    if len(header) > MOST_TENSORS:
        raise UnreadableFile(f"{path} has more than {MOST_TENSORS} tensors in its header.")
    return header


def _metadata(path: Path, found: object) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UnreadableFile(f"{path} has a __metadata__ that is not text by text.")
    for pair in found.items():
        _require_unicode(path, "".join(pair))
    return found


def _require_unicode(path: Path, text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UnreadableFile(f"{path} has half a Unicode character in its header: {text[:60]!r}.")


def _tensors(path: Path, header: dict[str, Any], start: int, available: int) -> dict[str, TensorRef]:
    """Check every entry and that together they cover the data exactly: no overlap, no hole, nothing behind."""
    tensors: dict[str, TensorRef] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        _require_unicode(path, name)
        dtype, shape, begin, end = _entry(path, name, entry)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UnreadableFile(
                f"{path}: tensor {name!r} has {end - begin} bytes where {list(shape)} of {NAMES[dtype]} needs "
                f"{math.prod(shape) * dtype.itemsize}."
            )
        if end > available:
            raise UnreadableFile(
                f"{path} is cut short: tensor {name!r} ends at byte {start + end} and the file at {start + available}.",
                hint="Fetch the file again.",
            )
        places.append((begin, end, name))
        tensors[name] = tensor_in_file(path, start + begin, dtype, shape)
    _require_tiling(path, places, available)
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UnreadableFile(f"{path}: the header's entry {name!r} is not dtype, shape and data_offsets.")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(kind, str) and kind in PACKED:
        raise UnreadableFile(f"{path}: tensor {name!r} is {kind}, values packed into part of a byte: not supported.")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise UnreadableFile(f"{path}: tensor {name!r} has the unknown dtype {str(kind)[:40]!r}.")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or not is_possible(tuple(shape)):
        raise UnreadableFile(f"{path}: tensor {name!r} has a shape or place that is not possible.")
    if offsets[0] > offsets[1]:
        raise UnreadableFile(f"{path}: tensor {name!r} ends before it begins.")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _require_tiling(path: Path, places: list[tuple[int, int, str]], available: int) -> None:
    places.sort()
    position = 0
    for begin, end, name in places:
        if begin < position:
            raise UnreadableFile(f"{path}: tensor {name!r} overlaps the one before it.")
        if begin > position:
            raise UnreadableFile(f"{path}: {begin - position} bytes before tensor {name!r} belong to no tensor.")
        position = end
    if position != available:
        raise UnreadableFile(f"{path}: {available - position} bytes after the last tensor belong to no tensor.")


def _paddle_bfloat16(tensors: dict[str, TensorRef], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Paddle has no uint16: a file that says "pd" and U16 means bfloat16 (dialects.md §5.9). Replaces in place."""
    if metadata.get("format") != "pd":
        return ()
    found = [name for name, ref in tensors.items() if ref.dtype == np.uint16 and ref.span is not None]
    for name in found:
        span = tensors[name].span
        assert span is not None
        tensors[name] = tensor_in_file(span.path, span.offset, BFLOAT16, tensors[name].shape)
    return (f"{len(found)} tensors declared U16 were read as bfloat16: Paddle writes it so",) if found else ()
