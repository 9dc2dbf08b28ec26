"""The whole list of names a weight file's pickle may mention, and what persona makes of each (dialects.md §10.3).

Sources: torch/_utils.py, torch/_weights_only_unpickler.py, numpy's ndarray.__reduce__, and the exhaustive list of
Paddle's in stacks/paddle.md §4.2. Anything else is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from persona.core.adapters.tensor import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2
from persona.formats.containers.byte_ranges import is_possible
from persona.formats.containers.pickle_values import (
    BytesInFile,
    NumpyArray,
    NumpyScalar,
    NumpyType,
    Opaque,
    Storage,
    Symbol,
    TextInFile,
    TorchTensor,
)

STORAGES: dict[str, np.dtype[Any] | None] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype("<f8"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "UntypedStorage": None,
}

TORCH_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "half": np.dtype("<f2"),
    "bfloat16": BFLOAT16,
    "float64": np.dtype("<f8"),
    "double": np.dtype("<f8"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "int16": np.dtype("<i2"),
    "uint16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
    "uint32": np.dtype("<u4"),
    "int64": np.dtype("<i8"),
    "uint64": np.dtype("<u8"),
    "bool": np.dtype("?"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "float8_e4m3fn": FLOAT8_E4M3,
    "float8_e5m2": FLOAT8_E5M2,
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}

NDARRAY = Symbol("numpy", "ndarray")
NUMPY_CODES = {"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"}
MOST_AXES = 8


class Malformed(ValueError):
    """A known name was used in a way it never is; the reader adds the file and the byte offset."""


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MOST_AXES:
        raise Malformed(f"{what} is not a list of at most {MOST_AXES} numbers")
    if not all(type(item) is int and 0 <= item < 2**56 for item in value):
        raise Malformed(f"{what} {str(value)[:80]} is not made of sizes")
    if "shape" in what and not is_possible(tuple(value)):
        raise Malformed(f"{what} {str(value)[:80]} is not possible")
    return tuple(value)


def _ordered_dict(*pairs: Any) -> dict[Any, Any]:
    if len(pairs) > 1:
        raise Malformed("OrderedDict takes one list of pairs")
    found: dict[Any, Any] = {}
    for pair in pairs[0] if pairs else ():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not is_key(pair[0]):
            raise Malformed("OrderedDict takes pairs of a name and a value")
        found[pair[0]] = pair[1]
    return found


def is_key(value: Any) -> bool:
    """Whether a value may be a dictionary's key here: plain and cheap to hash (a tuple of tuples is not)."""
    if isinstance(value, tuple):
        return len(value) <= MOST_AXES and all(isinstance(item, (str, int, bool)) for item in value)
    if isinstance(value, int):
        return abs(value) < 2**60
    return value is None or isinstance(value, (str, float, bytes, Symbol))


def _tensor(dtype: np.dtype[Any] | None, storage: Any, offset: Any, shape: Any, strides: Any) -> TorchTensor:
    if not isinstance(storage, Storage):
        raise Malformed("a tensor is made of something that is not a storage")
    dtype = dtype or storage.dtype
    if dtype is None:
        raise Malformed("a tensor of an untyped storage does not say its dtype")
    (offset,) = _sizes((offset,), "a tensor's offset")
    shape, strides = _sizes(shape, "a tensor's shape"), _sizes(strides, "a tensor's strides")
    if len(shape) != len(strides):
        raise Malformed("a tensor has not as many strides as axes")
    available = storage.count // (dtype.itemsize if storage.dtype is None else 1)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= available:
        raise Malformed(f"a tensor reaches item {last} of a storage that has {available}")
    return TorchTensor(storage, dtype, offset, shape, strides)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
    return _tensor(None, storage, offset, shape, strides)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, kind: Any, *_: Any
) -> TorchTensor:
    dtype = TORCH_DTYPES.get(kind.name) if isinstance(kind, Symbol) and kind.module == "torch" else None
    if dtype is None:
        raise Malformed(f"a tensor has the unknown dtype {str(kind)[:60]}")
    return _tensor(dtype, storage, offset, shape, strides)


def _rebuild_parameter(data: Any = None, *_: Any) -> Any:
    return data


def _reconstruct(kind: Any, *_: Any) -> NumpyArray:
    if kind != NDARRAY:
        raise Malformed("_reconstruct is used for something that is not an array")
    return NumpyArray()


def _numpy_dtype(code: Any, *_: Any) -> NumpyType:
    if not isinstance(code, str) or code.lstrip("<|") not in NUMPY_CODES:
        raise Malformed(f"arrays of dtype {str(code)[:40]!r} are not weights")
    return NumpyType(code.lstrip("<|"))


def finished_dtype(value: Any) -> np.dtype[Any]:
    """The numpy dtype a NumpyType stands for."""
    if not isinstance(value, NumpyType):
        raise Malformed("an array's dtype is not a dtype")
    return np.dtype(value.code if value.code[1:] == "1" else value.order + value.code)


def _numpy_scalar(kind: Any, data: Any = b"") -> NumpyScalar:
    dtype = finished_dtype(kind)
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise Malformed("a numpy scalar has not as many bytes as its dtype")
    return NumpyScalar(dtype, data)


def _encode(text: Any, encoding: Any = None) -> bytes | BytesInFile:
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise Malformed(f"_codecs.encode is used with {str(encoding)[:40]!r}, which is not how bytes are kept")
    if isinstance(text, TextInFile):
        return BytesInFile(text.offset, text.length, utf8=True)
    if not isinstance(text, str):
        raise Malformed("_codecs.encode is used on something that is not text")
    return text.encode("latin-1")


def _size(*values: Any) -> tuple[int, ...]:
    return _sizes(values[0] if values else (), "torch.Size")


def _sequence(make: Callable[..., Any]) -> Callable[..., Any]:
    def build(*values: Any) -> Any:
        if len(values) > 1 or (values and not isinstance(values[0], (list, tuple, dict, set, bytes))):
            raise Malformed("a container is made of something that is not a list")
        items = values[0] if values else ()
        if make in (set, frozenset) and not all(is_key(item) for item in items):
            raise Malformed("a set holds something that is not plain")
        if make is dict:
            return _ordered_dict(*values)
        return make(items)

    return build


_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": _sequence(set),
    "frozenset": _sequence(frozenset),
    "list": _sequence(list),
    "dict": _sequence(dict),
    "bytes": _sequence(bytes),
}


def _pair_of_name_and_array(*values: Any) -> tuple[Any, ...]:
    """Paddle writes a tensor outside a plain state dict as builtins.tuple((name, array)), or with two arguments."""
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        return tuple(values[0])
    raise Malformed("tuple is made of something that is not a list")


CALLABLE: dict[Symbol, Callable[..., Any]] = {
    Symbol("collections", "OrderedDict"): _ordered_dict,
    Symbol("_codecs", "encode"): _encode,
    Symbol("torch", "Size"): _size,
    Symbol("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Symbol("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Symbol("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    # Ascend: the bytes are a copy in plain order; the last argument only says how the device should lay them out
    # (torch_npu/utils/storage.py of Ascend/pytorch)
    Symbol("torch_npu.utils.storage", "_rebuild_npu_tensor"): _rebuild_tensor,
    Symbol("torch_npu.npu._format", "Format"): _rebuild_parameter,
    Symbol("torch._utils", "_rebuild_device_tensor_from_numpy"): _rebuild_parameter,  # of accelerators; an array
    Symbol("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Symbol("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    Symbol("torch.nn.parameter", "Parameter"): _rebuild_parameter,
    Symbol("numpy", "dtype"): _numpy_dtype,
    **{
        Symbol(f"numpy.{core}.multiarray", name): build
        for core in ("core", "_core")
        for name, build in (("_reconstruct", _reconstruct), ("scalar", _numpy_scalar))
    },
    **{Symbol(module, name): build for module in ("builtins", "__builtin__") for name, build in _BUILTINS.items()},
    **{Symbol(module, "tuple"): _pair_of_name_and_array for module in ("builtins", "__builtin__")},
}

# Named, never called: the types that others are made of.
NAMED = {
    NDARRAY,
    *(Symbol(module, name) for module in ("torch", "torch.storage") for name in STORAGES),
    *(Symbol("torch", name) for name in TORCH_DTYPES),
    # Original Stable Diffusion checkpoints have this class as a key under "callbacks" (pytorch-lightning 1.4).
    Symbol("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
}

# Objects that are attributes and nothing else; they are built as Opaque and never looked into beyond their state.
OBJECTS = {
    Symbol("torch.nn.modules.container", "ParameterDict"),
    Symbol("torch", "device"),
    Symbol("argparse", "Namespace"),
    Symbol("pytorch_lightning.utilities.parsing", "AttributeDict"),
    Symbol("lightning_fabric.utilities.data", "AttributeDict"),
    Symbol("lightning.fabric.utilities.data", "AttributeDict"),
}

ALLOWED = CALLABLE.keys() | NAMED | OBJECTS


def call(symbol: Symbol, arguments: tuple[Any, ...]) -> Any:
    """What `symbol(*arguments)` stands for. Raises Malformed."""
    build = CALLABLE.get(symbol)
    if build is None:
        if symbol in OBJECTS:
            return Opaque(symbol, arguments)
        raise Malformed(f"{symbol} is called, which no weight file does")
    try:
        return build(*arguments)
    except (TypeError, UnicodeError) as error:
        raise Malformed(f"{symbol} is called in a way it never is") from error


def set_state(target: Any, state: Any) -> None:
    """What BUILD does to one of our own objects. Raises Malformed."""
    if isinstance(target, NumpyType):
        _set_dtype_state(target, state)
    elif isinstance(target, NumpyArray):
        _set_array_state(target, state)
    elif isinstance(target, Opaque):
        target.state = state
    elif isinstance(target, dict):
        if not isinstance(state, dict) or not state.keys() <= {"_metadata"}:  # torch keeps module versions there
            raise Malformed("a dictionary is given attributes that no state dict has")
    else:
        raise Malformed("an object is given a state that no weight file gives")


def _set_dtype_state(target: NumpyType, state: Any) -> None:
    if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
        raise Malformed("a dtype has an unknown state")
    if len(state) > 4 and any(item is not None for item in state[2:5]):
        raise Malformed("a dtype has fields or a shape of its own; arrays of records are not weights")
    target.order = ">" if state[1] == ">" else "<"


def _set_array_state(target: NumpyArray, state: Any) -> None:
    if target.dtype is not None:
        raise Malformed("an array is filled twice")
    if not isinstance(state, tuple) or len(state) != 5:
        raise Malformed("an array has an unknown state")
    _, shape, kind, fortran, data = state
    shape, dtype = _sizes(shape, "an array's shape"), finished_dtype(kind)
    if not isinstance(data, (bytes, BytesInFile)):
        raise Malformed("an array's values are not bytes")
    wanted, length = math.prod(shape) * dtype.itemsize, data.length if isinstance(data, BytesInFile) else len(data)
    utf8 = isinstance(data, BytesInFile) and data.utf8
    if not (wanted <= length <= 2 * wanted if utf8 else length == wanted):
        raise Malformed(f"an array of shape {list(shape)} and {dtype} has {length} bytes instead of {wanted}")
    target.dtype, target.shape, target.fortran, target.data = dtype, shape, bool(fortran), data
