"""Nested data of a pickle as one level of names: keys joined by dots, lists counted from 0.

`{"a": {"b": x}, "c": [y, z]}` becomes `a.b`, `c.0`, `c.1`; a single value without a name becomes `0`. Objects that are
only attributes count as their attributes: a ParameterDict as its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import UnreadableFile
from persona.formats.containers.byte_ranges import read_range
from persona.formats.containers.pickle_values import NumpyScalar, Opaque, Symbol, TextInFile

DEEPEST = 100
MOST_VALUES = 300_000
LONGEST_NAME = 4_096
LONGEST_TEXT = 1 << 20


@dataclass
class Flat:
    """Named lazy tensors, and notes about values that are none."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def flatten(path: Path, value: Any, to_tensor: Callable[[Any], TensorRef | None]) -> Flat:
    """Name every value; `to_tensor` makes a TensorRef of a tensor and None of anything else.

    Raises UnreadableFile when two values get one name, or the data is deeper or larger than weights are."""
    flat = Flat()
    unread: list[str] = []
    for name, leaf in _leaves(path, value):
        ref = to_tensor(leaf) or _scalar(path, leaf)
        if ref is None:
            unread.append(name)
            continue
        name = name or "0"
        if name in flat.tensors:
            raise UnreadableFile(f"{path} has two values called {name!r}.")
        if len(name) > LONGEST_NAME:
            raise UnreadableFile(f"{path} has a name of {len(name)} letters.")
        flat.tensors[name] = ref
    if unread:
        flat.notes.append(f"not tensors, numbers or text, so not read: {shortened(unread)}")
    return flat


def shortened(names: list[str], most: int = 8) -> str:
    """A list of names for a note: the first few, and how many more."""
    shown = ", ".join(name[:60] or "(the whole)" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _leaves(path: Path, value: Any) -> Iterator[tuple[str, Any]]:
    """Depth first, in order. Counts what it visits, so that shared parts cannot multiply without end."""
    visited = 0
    waiting: list[Iterator[tuple[str, Any]]] = [iter([("", value)])]
    while waiting:
        found = next(waiting[-1], None)
        if found is None:
            waiting.pop()
            continue
        visited += 1
        if visited > MOST_VALUES:
            raise UnreadableFile(f"{path} holds more than {MOST_VALUES} values.")
        name, part = found
        children = _children(name, part)
        if children is None:
            yield found
        elif len(waiting) > DEEPEST or len(name) > LONGEST_NAME:
            raise UnreadableFile(f"{path} holds data nested more than {DEEPEST} deep, or with names too long.")
        else:
            waiting.append(children)


def _children(name: str, value: Any) -> Iterator[tuple[str, Any]] | None:
    """The named parts of a container, None for a leaf."""
    prefix = f"{name}." if name else ""
    if isinstance(value, dict):
        return ((f"{prefix}{key}", child) for key, child in value.items())
    if isinstance(value, list) or (isinstance(value, tuple) and not _is_named_pair(value)):
        return ((f"{prefix}{index}", child) for index, child in enumerate(value))
    if isinstance(value, Opaque) and value.symbol.name == "ParameterDict":
        return ((f"{prefix}{key}", child) for key, child in _parameters(value).items())
    return None


def _is_named_pair(value: tuple[Any, ...]) -> bool:
    return len(value) == 2 and isinstance(value[0], str) and not isinstance(value[1], (str, tuple, list, dict))


def _parameters(value: Opaque) -> dict[Any, Any]:
    """torch keeps a ParameterDict's content in `_parameters` (older ones) or among its attributes (newer ones)."""
    state = value.state if isinstance(value.state, dict) else {}
    held = state.get("_parameters")
    found = dict(held) if isinstance(held, dict) else {}
    for key, child in state.items():
        if (
            isinstance(key, str)
            and not key.startswith("_")
            and key != "training"
            and not isinstance(child, (dict, set))
        ):
            found.setdefault(key, child)
    return found


def _scalar(path: Path, value: Any) -> TensorRef | None:
    """Numbers and text a file holds in place of tensors."""
    if isinstance(value, NumpyScalar):
        array = np.frombuffer(value.data, value.dtype).reshape(())
        return TensorRef(array.dtype, (), lambda: array, python=array.item())
    if isinstance(value, TextInFile) and value.length <= LONGEST_TEXT:
        try:
            value = read_range(path, value.offset, value.length).decode()
        except UnicodeDecodeError as error:
            raise UnreadableFile(f"{path} has text that is not UTF-8 at byte {value.offset}.") from error
    if isinstance(value, Symbol) and value.module == "torch":
        value = str(value)
    if isinstance(value, (bool, float, str)) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return python_scalar(value)
    return None


def python_scalar(value: bool | int | float | str) -> TensorRef:
    """A TensorRef that holds a Python number or text."""
    array = np.asarray(value)
    return TensorRef(array.dtype, (), lambda: array, python=value)
