"""What a pickle's opcodes build here: inert values that say what a weight file holds. Nothing of it can run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Symbol:
    """A name the pickle mentions, such as torch._utils._rebuild_tensor_v2. It is a word, not the thing."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class BytesInFile:
    """A byte string left in the file: `length` bytes at `offset`. `utf8` when it is stored as the UTF-8 of its
    Latin-1 text, the way protocol 2 keeps bytes (each byte from 128 up then takes two)."""

    offset: int
    length: int
    utf8: bool = False


@dataclass(frozen=True)
class TextInFile:
    """A text too long to be a name, left in the file: `length` bytes of UTF-8 at `offset`."""

    offset: int
    length: int


@dataclass(frozen=True)
class Storage:
    """A torch storage by its key: `count` items of `dtype` (None for an untyped one, counted in bytes)."""

    key: str
    dtype: np.dtype[Any] | None
    count: int


@dataclass(frozen=True)
class TorchTensor:
    """A view of a storage; offset and strides in items."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class NumpyType:
    """A numpy.dtype being built: its code, and the byte order its state gave."""

    code: str
    order: str = "<"


@dataclass
class NumpyArray:
    """A numpy.ndarray being built: BUILD fills it in."""

    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()
    fortran: bool = False
    data: BytesInFile | bytes = b""


@dataclass(frozen=True)
class NumpyScalar:
    """A numpy scalar with its bytes."""

    dtype: np.dtype[Any]
    data: bytes


@dataclass
class Opaque:
    """An object of a known class whose attributes are plain data: ParameterDict, AttributeDict, Namespace, …"""

    symbol: Symbol
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
