"""Lazy tensors over what a pickle says about arrays and storages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import UnreadableFile
from persona.formats.containers.byte_ranges import read_array, read_range, tensor_in_file
from persona.formats.containers.pickle_values import BytesInFile, NumpyArray, TorchTensor


def numpy_tensor(path: Path, array: NumpyArray) -> TensorRef:
    """A numpy array of a pickle: in one piece in the file, or held when it is only a few bytes."""
    if array.dtype is None:
        raise UnreadableFile(f"{path} has an array without values.")
    stored, shape = array.dtype, array.shape
    dtype = stored.newbyteorder("<")
    data = array.data
    if isinstance(data, BytesInFile) and not data.utf8 and stored == dtype and not (array.fortran and len(shape) > 1):
        return tensor_in_file(path, data.offset, dtype, shape)
    wanted = math.prod(shape) * stored.itemsize

    def load() -> np.ndarray[Any, Any]:
        raw = data if isinstance(data, bytes) else read_range(path, data.offset, data.length)
        if isinstance(data, BytesInFile) and data.utf8:
            raw = _from_latin1_text(path, raw, data.offset)
        if len(raw) != wanted:
            raise UnreadableFile(f"{path} has {len(raw)} bytes for an array that needs {wanted}.")
        values = np.frombuffer(raw, stored).reshape(shape, order="F" if array.fortran else "C")
        return np.ascontiguousarray(values, dtype).reshape(shape)

    return TensorRef(dtype, shape, load)


def _from_latin1_text(path: Path, raw: bytes, offset: int) -> bytes:
    try:
        return raw.decode("utf-8").encode("latin-1")
    except UnicodeError as error:
        raise UnreadableFile(f"{path} has an array at byte {offset} whose text is not Latin-1.") from error


def torch_tensor(path: Path, tensor: TorchTensor, storage_at: int) -> TensorRef:
    """A view of a storage whose bytes begin at `storage_at`; exact for any strides."""
    dtype, shape = tensor.dtype, tensor.shape
    start = storage_at + tensor.offset * dtype.itemsize
    if _is_contiguous(tensor):
        return tensor_in_file(path, start, dtype, shape)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, tensor.strides, strict=True))
    if math.prod(shape) > 16 * reach + (1 << 20):
        raise UnreadableFile(f"{path} has a tensor of shape {list(shape)} over only {reach} stored values.")

    def load() -> np.ndarray[Any, Any]:
        held = read_array(path, start, dtype, (reach,))
        steps = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(held, shape, steps).copy(order="C")

    return TensorRef(dtype, shape, load)


def _is_contiguous(tensor: TorchTensor) -> bool:
    if not math.prod(tensor.shape):
        return True
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
