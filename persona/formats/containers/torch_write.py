"""A torch zip pickle, made of the opcodes that torch.save uses for a dictionary of tensors.

Layout as torch 2's: `<stem>/data.pkl`, `byteorder`, `data/<n>`, `version`; members stored, storages aligned to 64
bytes (caffe2/serialize/inline_container.cc).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from persona.core.adapters.tensor import BFLOAT16, TensorRef
from persona.core.host.errors import ConversionError
from persona.formats.containers import pickle_writer as opcodes
from persona.formats.containers.byte_ranges import WRITE_BUFFER, iterate_bytes
from persona.formats.containers.zip_writer import ZipWriter

FOLDER = "archive/"
NESTED = ("string_to_token", "string_to_param")  # A1111 wants these as dictionaries

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    BFLOAT16: "BFloat16Storage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
    np.dtype(np.complex64): "ComplexFloatStorage",
    np.dtype(np.complex128): "ComplexDoubleStorage",
}
# torch gives these no storage class of their own: an untyped storage and the dtype beside it (_rebuild_tensor_v3)
UNTYPED = {
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "float8_e8m0fnu": "float8_e8m0fnu",
    "float8_e4m3fnuz": "float8_e4m3fnuz",
    "float8_e5m2fnuz": "float8_e5m2fnuz",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
}


def write_torch(path: Path, tensors: Mapping[str, TensorRef]) -> None:
    """Write the archive, one tensor at a time. Raises ConversionError for a dtype that torch does not have."""
    keys = {name: str(index) for index, name in enumerate(_names_of_tensors(tensors))}
    pickle = _pickle(tensors, keys)
    with path.open("wb", buffering=WRITE_BUFFER) as out:
        archive = ZipWriter(out, FOLDER)
        archive.add("data.pkl", len(pickle), [pickle])
        archive.add("byteorder", 6, [b"little"])
        for name, key in keys.items():
            ref = tensors[name]
            archive.add(f"data/{key}", ref.nbytes, iterate_bytes(ref))
        archive.add("version", 2, [b"3\n"])
        archive.finish()


def _names_of_tensors(tensors: Mapping[str, TensorRef]) -> list[str]:
    return [name for name, ref in tensors.items() if ref.python is None]


def _pickle(tensors: Mapping[str, TensorRef], keys: Mapping[str, str]) -> bytes:
    content: dict[str, bytes | dict[str, bytes]] = {}
    for name, ref in tensors.items():
        value = _scalar(name, ref) if ref.python is not None else _tensor(name, ref, keys[name])
        outer, _, inner = name.partition(".")
        if outer in NESTED and inner:
            group = content.setdefault(outer, {})
            assert isinstance(group, dict)
            group[inner] = value
        else:
            content[name] = value
    return opcodes.protocol(2) + _dictionary(content) + opcodes.STOP


def _dictionary(content: Mapping[str, bytes | dict[str, bytes]]) -> bytes:
    pairs = (
        opcodes.text(name) + (_dictionary(value) if isinstance(value, dict) else value)
        for name, value in content.items()
    )
    return opcodes.EMPTY_DICT + opcodes.MARK + b"".join(pairs) + opcodes.SET_ITEMS


def _scalar(name: str, ref: TensorRef) -> bytes:
    if not isinstance(ref.python, (bool, int, float, str)):
        raise ConversionError(f"{name} holds something that a torch file persona writes cannot hold.")
    return opcodes.scalar(ref.python)


def _tensor(name: str, ref: TensorRef, key: str) -> bytes:
    """`_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`, or `_v3` with a dtype behind it."""
    storage_class, untyped = STORAGES.get(ref.dtype), UNTYPED.get(str(ref.dtype))
    if storage_class is None and untyped is None:
        raise ConversionError(f"{name} is {ref.dtype}, which torch cannot hold.")
    count = ref.nbytes // ref.dtype.itemsize if storage_class else ref.nbytes
    kind = opcodes.name_of("torch", storage_class or "") if storage_class else _UNTYPED_STORAGE
    identity = [opcodes.text("storage"), kind, opcodes.text(key), opcodes.text("cpu"), opcodes.integer(count)]
    arguments = [
        opcodes.tuple_of(identity) + opcodes.PERSISTENT_ID,
        opcodes.integer(0),
        opcodes.sizes(ref.shape),
        opcodes.sizes(_strides(ref.shape)),
        opcodes.FALSE,
        opcodes.name_of("collections", "OrderedDict") + opcodes.EMPTY_TUPLE + opcodes.REDUCE,
    ]
    if untyped is not None:
        arguments.append(opcodes.name_of("torch", untyped))
    rebuild = "_rebuild_tensor_v2" if untyped is None else "_rebuild_tensor_v3"
    return opcodes.name_of("torch._utils", rebuild) + opcodes.tuple_of(arguments) + opcodes.REDUCE


_UNTYPED_STORAGE = opcodes.name_of("torch.storage", "UntypedStorage")


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Of a contiguous tensor, in items."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]
