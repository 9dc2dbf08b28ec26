"""torch's format before 1.6: five things one after the other in one file (torch/serialization.py, `_legacy_save`).

A magic number, a protocol version, facts about the machine, the object, the list of storage keys: each its own
pickle; and then for every key the number of items and their bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from persona.core.host.errors import UnreadableFile
from persona.formats.containers.byte_ranges import file_size, read_range
from persona.formats.containers.pickle_reader import read_pickle
from persona.formats.containers.pickle_values import Opaque, Storage, TorchTensor

MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_HEAD = b"\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."
VERSION = 1001
MOST_STORAGES = 1_000_000


def read_legacy(path: Path) -> tuple[Any, Callable[[Storage], int]]:
    """The unpickled value, and where each storage's bytes are. Raises UnreadableFile."""
    magic = read_pickle(path)
    version = read_pickle(path, magic.end)
    machine = read_pickle(path, version.end)
    if magic.value != MAGIC or version.value != VERSION or not isinstance(machine.value, dict):
        raise UnreadableFile(f"{path} is not a torch file of the kind before 1.6, though it begins like one.")
    if machine.value.get("little_endian") is not True:
        raise UnreadableFile(f"{path} was written on a big-endian machine, which is not supported.")
    content = read_pickle(path, machine.end)
    keys = read_pickle(path, content.end)
    places = _places(path, keys.value, _storages(content.value), keys.end)

    def storage_at(storage: Storage) -> int:
        if storage.key not in places:
            raise UnreadableFile(f"{path} lacks the storage {storage.key[:40]!r}.")
        return places[storage.key]

    return content.value, storage_at


def _storages(value: Any) -> dict[str, Storage]:
    """Every storage the value mentions, by key."""
    found: dict[str, Storage] = {}
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, TorchTensor):
            found[part.storage.key] = part.storage
        elif isinstance(part, Storage):
            found[part.key] = part
        elif isinstance(part, (dict, list, tuple, Opaque)) and id(part) not in seen:
            seen.add(id(part))
            if isinstance(part, Opaque):
                waiting += [part.state, part.arguments, part.items]
            else:
                waiting.extend(part.values() if isinstance(part, dict) else part)
    return found


def _places(path: Path, keys: Any, storages: dict[str, Storage], position: int) -> dict[str, int]:
    """Where the bytes of every storage begin: they follow in the order of the keys, each after its count."""
    if not isinstance(keys, list) or len(keys) > MOST_STORAGES:
        raise UnreadableFile(f"{path} has no list of storages.")
    size = file_size(path)
    places: dict[str, int] = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            raise UnreadableFile(f"{path} has a storage that nothing uses, or that is listed twice.")
        count = int.from_bytes(read_range(path, position, 8), "little", signed=True)
        length = storage.count * (storage.dtype.itemsize if storage.dtype is not None else 1)
        if count != storage.count or position + 8 + length > size:
            raise UnreadableFile(
                f"{path} is cut short: storage {key!r} needs {length} bytes at byte {position + 8}.",
                hint="Fetch the file again.",
            )
        places[key] = position + 8
        position += 8 + length
    if position != size:
        raise UnreadableFile(f"{path} has {size - position} bytes after its last storage.")
    return places
