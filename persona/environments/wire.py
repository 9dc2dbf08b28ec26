"""What two processes say to each other: messages of plain values and arrays over a pipe. No pickle, nothing executed.

    u32 length of the text · text (JSON) · the bytes of every array, one after the other

The text is {"value": …, "arrays": [[dtype, shape], …]}. In `value` whatever JSON has no word for is a mapping with one
key: {"array": 3} is the third array, {"tuple": [...]}, {"map": [[key, value], ...]}, {"set": [...]}, {"path": "..."},
{"class": "Entry", "fields": {...}} for the classes of `CLASSES`, and no other."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import ml_dtypes
import numpy as np

from persona.core.adapters.entry import Adapter, Checkpoint, Embedding, Entry, Leftover, Magnitude, Scale, Source
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import Availability, Runtime, SampleRequest
from persona.core.training import plan
from persona.core.training.base import Base, ParameterShape
from persona.core.training.batch import Batch


@dataclass(frozen=True)
class Lent:
    """A tensor that stays where it is until it is asked for by its number."""

    number: int
    dtype: str
    shape: tuple[int, ...]


Array = np.ndarray[Any, np.dtype[Any]]

_PLAN = tuple(cls for cls in vars(plan).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls))
CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Adapter, Checkpoint, Embedding, Entry, Leftover, Magnitude, Scale, Source,
        Availability, Runtime, SampleRequest, Base, ParameterShape, Batch, Lent, *_PLAN,
    )
}  # fmt: skip
"""The only classes that can travel: data without behaviour of their own."""

_LENGTH = struct.Struct("<I")
_LONGEST = 1 << 30  # of the text; arrays are not in it


def send(stream: IO[bytes], value: Any) -> None:
    """Write one message."""
    arrays: list[Array] = []
    told = _packed(value, arrays)
    text = json.dumps({"value": told, "arrays": [[name_of(a.dtype), list(a.shape)] for a in arrays]}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for array in arrays:
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message. Raises EOFError when the other side is gone, in the middle of one too."""
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length > _LONGEST:
        raise ValueError(f"a message of {length} bytes of text")
    document = json.loads(_exactly(stream, length))
    arrays = [_array(stream, dtype, tuple(shape)) for dtype, shape in document["arrays"]]
    return _unpacked(document["value"], arrays)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _array(stream: IO[bytes], name: str, shape: tuple[int, ...]) -> Array:
    dtype = dtype_called(name)
    values = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    place = values.data
    while len(place):
        count = stream.readinto(place)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        place = place[count:]
    return values.view(dtype).reshape(shape)


def name_of(dtype: np.dtype[Any]) -> str:
    """`<f4`, `<U8`, `bfloat16`: what `dtype_called` turns back. Objects do not travel."""
    if dtype.hasobject:
        raise TypeError("an array of objects cannot be sent")
    return dtype.name if hasattr(ml_dtypes, dtype.name) else dtype.str


def dtype_called(name: str) -> np.dtype[Any]:
    """Inverse of `name_of`."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def _packed(value: Any, arrays: list[Array]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, np.generic):
        return _packed(value.item(), arrays)
    if isinstance(value, TensorRef):
        return {"tensor": _packed(value.read(), arrays), "python": _packed(value.python, arrays)}
    if isinstance(value, PurePath):
        return {"path": str(value)}
    if isinstance(value, list):
        return [_packed(item, arrays) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_packed(item, arrays) for item in value]}
    if isinstance(value, set | frozenset):
        return {"set": [_packed(item, arrays) for item in sorted(value)]}
    if isinstance(value, Mapping):
        return {"map": [[_packed(key, arrays), _packed(item, arrays)] for key, item in value.items()]}
    kind = type(value).__name__
    if kind in CLASSES and isinstance(value, CLASSES[kind]):
        names = [field.name for field in dataclasses.fields(CLASSES[kind])]
        return {"class": kind, "fields": {name: _packed(getattr(value, name), arrays) for name in names}}
    raise TypeError(f"a {kind} cannot be sent")


def _unpacked(told: Any, arrays: list[Array]) -> Any:
    if isinstance(told, list):
        return [_unpacked(item, arrays) for item in told]
    if not isinstance(told, dict):
        return told
    if "array" in told:
        return arrays[told["array"]]
    if "tensor" in told:
        return dataclasses.replace(
            in_memory(_unpacked(told["tensor"], arrays)), python=_unpacked(told["python"], arrays)
        )
    if "path" in told:
        return Path(told["path"])
    if "tuple" in told:
        return tuple(_unpacked(item, arrays) for item in told["tuple"])
    if "set" in told:
        return frozenset(_unpacked(item, arrays) for item in told["set"])
    if "map" in told:
        return {_unpacked(key, arrays): _unpacked(item, arrays) for key, item in told["map"]}
    fields = {name: _unpacked(item, arrays) for name, item in told["fields"].items()}
    return CLASSES[told["class"]](**fields)
