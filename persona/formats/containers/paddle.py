"""Paddle's `.pdparams`: a pickled dictionary of numpy arrays (measured facts: stacks/paddle.md §4; paddle.save is
python/paddle/framework/io.py of PaddlePaddle/Paddle)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.tensor import BFLOAT16, TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers import pickle_writer as opcodes
from persona.formats.containers.byte_ranges import WRITE_BUFFER, SpanCopier, file_size, is_possible, tensor_in_file
from persona.formats.containers.flatten import flatten
from persona.formats.containers.pickle_arrays import numpy_tensor
from persona.formats.containers.pickle_reader import read_pickle
from persona.formats.containers.pickle_values import NumpyArray

NAME_TABLE = "StructuredToParameterName@@"
BIG_TABLE = "UnpackBigParamInfor@@"
TORCH_LEGACY_HEAD = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."

# dtype -> numpy's code in the pickle; bfloat16 goes as uint16, which paddle.load turns back (stacks/paddle.md §4.4)
CODES = {
    np.dtype(np.float32): "f4",
    np.dtype(np.float16): "f2",
    np.dtype(np.float64): "f8",
    BFLOAT16: "u2",
    np.dtype(np.int8): "i1",
    np.dtype(np.uint8): "u1",
    np.dtype(np.int16): "i2",
    np.dtype(np.int32): "i4",
    np.dtype(np.int64): "i8",
    np.dtype(np.bool_): "b1",
    np.dtype(np.complex64): "c8",
    np.dtype(np.complex128): "c16",
}


class Paddle:
    """The `.pdparams` container."""

    name = "paddle"
    suffixes = (".pdparams", ".pdopt")

    def sniff(self, head: bytes, path: Path) -> bool:
        """A bare pickle of protocol 2 to 5 that is not torch's old format."""
        return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and head[2:15] != TORCH_LEGACY_HEAD

    def read(self, path: Path) -> State:
        """Arrays lazy, read by byte range. Raises UnreadableFile."""
        pickled = read_pickle(path)
        if pickled.end != file_size(path):
            raise UnreadableFile(f"{path} has {file_size(path) - pickled.end} bytes after its pickle.")
        value, notes = pickled.value, []
        if isinstance(value, dict):
            value = dict(value)
            if isinstance(value.pop(NAME_TABLE, None), dict):
                notes.append(f"{NAME_TABLE} (Paddle's own variable names) was dropped")
            value = _join_big_arrays(path, value)
        elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):  # a tensor saved by itself
            value = {value[0]: value[1]}
        flat = flatten(path, value, lambda leaf: _tensor(path, leaf))
        bfloat16 = sum(ref.dtype == BFLOAT16 for ref in flat.tensors.values())
        if bfloat16:
            notes.append(f"{bfloat16} arrays of uint16 were read as bfloat16: Paddle writes it so")
        return State(flat.tensors, {}, (*notes, *flat.notes))

    def write(self, path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> None:
        """Write `path` as paddle.save would (protocol 4), readable under numpy 1 and 2; there is no place for
        metadata. Raises ConversionError for a dtype that Paddle's files do not have."""
        heads = {name: _head(name, ref) for name, ref in tensors.items()}
        with path.open("wb", buffering=WRITE_BUFFER) as out, SpanCopier(out) as copier:
            out.write(opcodes.protocol(4) + opcodes.EMPTY_DICT + opcodes.MARK)
            for name, ref in tensors.items():
                out.write(opcodes.text(name) + heads[name])
                if ref.python is None:
                    copier.append(ref)
                    out.write(opcodes.TUPLE + opcodes.BUILD)
            table = [name for name, ref in tensors.items() if ref.python is None]
            if table:  # an empty table would make paddle.load give arrays in place of tensors
                names = b"".join(opcodes.text(name) * 2 for name in table)
                out.write(opcodes.text(NAME_TABLE) + opcodes.EMPTY_DICT + opcodes.MARK + names + opcodes.SET_ITEMS)
            out.write(opcodes.SET_ITEMS + opcodes.STOP)


def _tensor(path: Path, leaf: Any) -> TensorRef | None:
    """An array, or the pair (variable name, array) that Paddle writes outside a plain state dict."""
    if isinstance(leaf, TensorRef):
        return leaf
    if isinstance(leaf, tuple) and len(leaf) == 2:
        leaf = leaf[1]
    if not isinstance(leaf, NumpyArray):
        return None
    return _as_bfloat16(numpy_tensor(path, leaf))


def _as_bfloat16(ref: TensorRef) -> TensorRef:
    """Paddle has no uint16: such an array holds bfloat16 bits (stacks/paddle.md §4.4)."""
    if ref.dtype != np.uint16:
        return ref
    if ref.span is not None:
        return tensor_in_file(ref.span.path, ref.span.offset, BFLOAT16, ref.shape)
    return TensorRef(BFLOAT16, ref.shape, lambda: ref.read().view(BFLOAT16))


def _join_big_arrays(path: Path, value: dict[Any, Any]) -> dict[Any, Any]:
    """Protocols 2 and 3 cannot hold 4 GiB: paddle.save cuts larger arrays into flat slices and lists them. Each takes
    the place of its first slice here."""
    table = value.pop(BIG_TABLE, None)
    if table is None:
        return value
    joined: dict[str, tuple[str, TensorRef]] = {}
    for name, entry in table.items() if isinstance(table, dict) else [("", None)]:
        entry = entry if isinstance(entry, dict) else {}
        shape: Any = entry.get("OriginShape")
        keys: Any = entry.get("slices")
        if not _is_shape(shape) or not isinstance(keys, (tuple, list)) or not keys or not isinstance(name, str):
            raise UnreadableFile(f"{path} has a damaged list of large arrays.")
        slices = [value.get(key) if isinstance(key, str) else None for key in keys]
        arrays = [piece for piece in slices if isinstance(piece, NumpyArray)]
        if len(arrays) != len(keys) or len(set(keys)) != len(keys) or name in value:
            raise UnreadableFile(f"{path} lacks a slice of the large array {name[:80]!r}.")
        joined[keys[0]] = name, _joined(path, name, [numpy_tensor(path, piece) for piece in arrays], tuple(shape))
        for key in keys[1:]:
            del value[key]
    return dict(joined.get(key, (key, part)) for key, part in value.items())


def _is_shape(value: Any) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) > 8:
        return False
    return all(type(size) is int and size >= 0 for size in value) and is_possible(tuple(value))


def _joined(path: Path, name: str, slices: list[TensorRef], shape: tuple[int, ...]) -> TensorRef:
    if len({ref.dtype for ref in slices}) != 1 or sum(math.prod(ref.shape) for ref in slices) != math.prod(shape):
        raise UnreadableFile(f"{path} has slices of {name[:80]!r} that do not make its shape {list(shape)}.")
    dtype = slices[0].dtype

    def load() -> np.ndarray[Any, Any]:
        whole, done = np.empty(math.prod(shape), dtype), 0
        for ref in slices:
            piece = ref.read().reshape(-1)
            whole[done : done + piece.size] = piece
            done += piece.size
        return whole.reshape(shape)

    return _as_bfloat16(TensorRef(dtype, shape, load))


def _head(name: str, ref: TensorRef) -> bytes:
    """Everything of an array but its bytes and the two opcodes behind them; of a scalar, all."""
    if isinstance(ref.python, (bool, int, float, str)):
        return opcodes.scalar(ref.python)
    code = CODES.get(ref.dtype)
    if code is None:
        raise ConversionError(
            f"{name} is {ref.dtype}, which Paddle's .pdparams cannot hold.", hint="Convert it with --dtype float16."
        )
    order = opcodes.text("|" if code[1] == "1" else "<")
    rest = [opcodes.NONE] * 3 + [opcodes.integer(-1), opcodes.integer(-1), opcodes.integer(0)]
    dtype = (
        opcodes.name_of("numpy", "dtype")
        + opcodes.tuple_of([opcodes.text(code), opcodes.FALSE, opcodes.TRUE])
        + opcodes.REDUCE
        + opcodes.tuple_of([opcodes.integer(3), order, *rest])
        + opcodes.BUILD
    )
    # numpy 2 still finds its old module name; numpy 1.24 does not know the new one (stacks/paddle.md §4.7)
    array = (
        opcodes.name_of("numpy.core.multiarray", "_reconstruct")
        + opcodes.tuple_of([opcodes.name_of("numpy", "ndarray"), opcodes.sizes([0]), opcodes.bytes_head(1) + b"b"])
        + opcodes.REDUCE
    )
    state = opcodes.MARK + opcodes.integer(1) + opcodes.sizes(ref.shape) + dtype + opcodes.FALSE
    return array + state + opcodes.bytes_head(ref.nbytes)
