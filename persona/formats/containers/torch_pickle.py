"""torch's pickles, `.pt .pth .bin .ckpt`: the zip form (torch 1.6 and later) and the older one.

The zip form is caffe2/serialize/inline_container.cc of pytorch/pytorch: a stored archive with one `…/data.pkl` and a
member `…/data/<key>` for each storage. Names of nested data are joined by dots (`flatten`); of a checkpoint with a
`state_dict` (Lightning, CompVis) only that is read, and the rest is bookkeeping told in the notes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import UnreadableFile
from persona.formats.containers.byte_ranges import file_size, read_range
from persona.formats.containers.flatten import flatten, shortened
from persona.formats.containers.pickle_arrays import numpy_tensor, torch_tensor
from persona.formats.containers.pickle_reader import read_pickle
from persona.formats.containers.pickle_values import NumpyArray, Storage, TorchTensor
from persona.formats.containers.torch_legacy import LEGACY_HEAD, read_legacy
from persona.formats.containers.torch_write import write_torch
from persona.formats.containers.zip_directory import STORED, Member, read_directory, read_member

LARGEST_PICKLE = 256 << 20


class TorchPickle:
    """The torch container."""

    name = "torch"
    suffixes = (".pt", ".pth", ".bin", ".ckpt")

    def sniff(self, head: bytes, path: Path) -> bool:
        """The old format's magic number, or a zip archive with a data.pkl in it."""
        if head.startswith(LEGACY_HEAD, 2) and head[:1] == b"\x80":
            return True
        return head.startswith(b"PK\x03\x04") and _names_pickle(head, path)

    def read(self, path: Path) -> State:
        """Tensors lazy, read by byte range. Raises UnreadableFile."""
        is_zip = read_range(path, 0, min(2, file_size(path))) == b"PK"
        value, storage_at = _read_zip(path) if is_zip else read_legacy(path)
        value, notes = _weights_of(value)
        flat = flatten(path, value, lambda leaf: _tensor(path, leaf, storage_at))
        return State(flat.tensors, {}, (*notes, *flat.notes))

    def write(self, path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> None:
        """Write `path` so that torch.load(weights_only=True) reads it; there is no place for metadata. Names under
        `string_to_param` and `string_to_token` become the dictionaries that A1111 reads."""
        write_torch(path, tensors)


def _names_pickle(head: bytes, path: Path) -> bool:
    """torch writes data.pkl first; others that rewrite the archive may not, so the directory decides in the end."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b"/data.pkl") or name == b"data.pkl":
        return True
    try:
        return any(member.endswith("data.pkl") for member in read_directory(path))
    except UnreadableFile:
        return False


def _read_zip(path: Path) -> tuple[Any, Callable[[Storage], int]]:
    """The unpickled value, and where each storage's bytes are."""
    members = read_directory(path)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UnreadableFile(f"{path} has {len(pickles)} members called data.pkl; a torch file has one.")
    folder = pickles[0].removesuffix("data.pkl")
    if any(name.startswith(f"{folder}code/") or name == f"{folder}constants.pkl" for name in members):
        raise UnreadableFile(f"{path} is a TorchScript program, not weights.", hint="Save its state_dict() instead.")
    stored = [member for member in members.values() if member.method != STORED]
    if stored:
        raise UnreadableFile(f"{path} is a compressed archive; torch never compresses ({stored[0].name!r}).")
    order = members.get(f"{folder}byteorder")
    if order is not None and read_member(path, order, at_most=16) != b"little":
        raise UnreadableFile(f"{path} was written on a big-endian machine, which is not supported.")
    pickle = members[pickles[0]]
    if pickle.size > LARGEST_PICKLE:
        raise UnreadableFile(f"{path} has a pickle of {pickle.size} bytes; {LARGEST_PICKLE} are the most.")
    found = read_pickle(path, pickle.offset, pickle.offset + pickle.size)
    if found.end != pickle.offset + pickle.size:
        raise UnreadableFile(f"{path} has bytes after the pickle in data.pkl.")
    return found.value, lambda storage: _storage(path, members, folder, storage)


def _storage(path: Path, members: Mapping[str, Member], folder: str, storage: Storage) -> int:
    member = members.get(f"{folder}data/{storage.key}")
    if member is None:
        raise UnreadableFile(f"{path} lacks the storage {storage.key[:40]!r}.")
    wanted = storage.count * (storage.dtype.itemsize if storage.dtype is not None else 1)
    if member.size != wanted:
        raise UnreadableFile(f"{path}: storage {storage.key!r} has {member.size} bytes and should have {wanted}.")
    return member.offset


def _tensor(path: Path, leaf: Any, storage_at: Callable[[Storage], int]) -> TensorRef | None:
    if isinstance(leaf, TorchTensor):
        return torch_tensor(path, leaf, storage_at(leaf.storage))
    return numpy_tensor(path, leaf) if isinstance(leaf, NumpyArray) else None


def _weights_of(value: Any) -> tuple[Any, list[str]]:
    """The `state_dict` of a training checkpoint, and notes about everything beside it."""
    if not isinstance(value, dict) or not isinstance(value.get("state_dict"), dict):
        return value, []
    plain = {k: v for k, v in value.items() if isinstance(v, (bool, int, float, str)) and isinstance(k, str)}
    notes = [f"{key[:60]} = {str(found)[:200]}" for key, found in plain.items()]
    rest = [str(key) for key in value if key not in plain and key != "state_dict" and value[key]]
    if rest:
        notes.append(f"bookkeeping beside state_dict, not read: {shortened(rest)}")
    return value["state_dict"], notes
