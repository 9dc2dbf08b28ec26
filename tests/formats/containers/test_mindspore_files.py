"""MindSpore's files: byte for byte as MindSpore wrote them, and the parts of the format no fixture has."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers import mindspore
from persona.formats.containers.flatten import python_scalar
from persona.formats.containers.mindspore import MindSpore
from persona.formats.containers.open import read_state

FIXTURES = Path(__file__).parent.parent.parent / "fixtures" / "mindspore"
WRITTEN_BY_MINDSPORE = sorted(path for path in FIXTURES.rglob("*.ckpt") if "encrypted" not in path.parts)


@pytest.mark.parametrize("path", WRITTEN_BY_MINDSPORE, ids=lambda path: path.name)
@pytest.mark.parametrize("in_one_piece", [True, False], ids=["copied", "from memory"])
def test_what_is_read_is_written_byte_for_byte(tmp_path: Path, path: Path, in_one_piece: bool) -> None:
    tensors = dict(read_state(path).tensors)
    if not in_one_piece:
        tensors = {k: v if v.python is not None else in_memory(np.asarray(v)) for k, v in tensors.items()}
    MindSpore().write(tmp_path / "out.ckpt", tensors, {})
    assert (tmp_path / "out.ckpt").read_bytes() == path.read_bytes()


def field(number: int, payload: bytes | int) -> bytes:
    """One protobuf field, by the encoding page of the protobuf documentation."""

    def varint(value: int) -> bytes:
        low, rest = value & 127, value >> 7
        return bytes([low | 128]) + varint(rest) if rest else bytes([low])

    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def value(tag: str, kind: str, dims: list[int], content: bytes, *, packed: bool = False) -> bytes:
    sizes = field(1, bytes(dims)) if packed else b"".join(field(1, size) for size in dims)
    tensor = sizes + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, tag.encode()) + field(2, tensor))


def state_of(tmp_path: Path, data: bytes) -> dict[str, TensorRef]:
    (tmp_path / "f.ckpt").write_bytes(data)
    return dict(read_state(tmp_path / "f.ckpt").tensors)


def test_packed_sizes_are_read_too(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = state_of(tmp_path, value("w", "Float32", [2, 3], array.tobytes(), packed=True))
    assert np.array_equal(np.asarray(found["w"]), array)


def test_slices_of_one_name_are_joined(tmp_path: Path) -> None:
    raw = np.arange(12, dtype=np.float32).tobytes()
    data = b"".join(value("w", "Float32", [3, 4], piece) for piece in (raw[:20], raw[20:40], raw[40:]))
    found = state_of(tmp_path, value("a", "Bool", [1], b"\1") + data + value("b", "Bool", [1], b"\1"))
    assert list(found) == ["a", "w", "b"]
    assert np.array_equal(np.asarray(found["w"]), np.arange(12, dtype=np.float32).reshape(3, 4))


@pytest.mark.parametrize("in_one_piece", [True, False])
def test_large_tensors_are_written_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_piece: bool
) -> None:
    """MindSpore cuts at 512 MiB; at 20 bytes here. Each slice has the full sizes."""
    raw = np.arange(12, dtype=np.float32).tobytes()
    expected = b"".join(value("w", "Float32", [3, 4], piece) for piece in (raw[:20], raw[20:40], raw[40:]))
    ref = state_of(tmp_path, value("w", "Float32", [3, 4], raw))["w"]
    assert mindspore.SLICE == 512 * 1024 * 1024
    monkeypatch.setattr(mindspore, "SLICE", 20)
    MindSpore().write(tmp_path / "out.ckpt", {"w": ref if in_one_piece else in_memory(np.asarray(ref))}, {})
    assert (tmp_path / "out.ckpt").read_bytes() == expected


def test_the_checksum_is_written_checked_and_cut_off(tmp_path: Path) -> None:
    """17 bytes: the word, and zlib's crc32 of everything before as ten bytes, big-endian (stacks/mindspore.md §3)."""
    tensors = {"w": in_memory(np.arange(5, dtype=np.float32))}
    MindSpore().write(tmp_path / "plain.ckpt", tensors, {})
    MindSpore(checksum=True).write(tmp_path / "checked.ckpt", tensors, {})
    plain, checked = (tmp_path / "plain.ckpt").read_bytes(), (tmp_path / "checked.ckpt").read_bytes()
    assert checked == plain + b"crc_num" + zlib.crc32(plain).to_bytes(10, "big")
    assert np.asarray(read_state(tmp_path / "checked.ckpt").tensors["w"]).tolist() == [0, 1, 2, 3, 4]
    damaged = bytearray(checked)
    damaged[30] ^= 1
    with pytest.raises(UnreadableFile, match="checksum"):
        state_of(tmp_path, bytes(damaged))


def test_python_values_are_written_as_append_dict_does(tmp_path: Path) -> None:
    """The fixture dtypes.ckpt has epoch=7, lr=0.5, note='hé 你好', flag=True, written by MindSpore."""
    values = {"epoch": 7, "lr": 0.5, "note": "hé 你好", "flag": True}
    MindSpore().write(tmp_path / "f.ckpt", {k: python_scalar(v) for k, v in values.items()}, {})
    assert (FIXTURES / "dtypes" / "dtypes.ckpt").read_bytes().endswith((tmp_path / "f.ckpt").read_bytes())
    found = read_state(tmp_path / "f.ckpt").tensors
    assert found["note"].python == "hé 你好"
    assert int(np.asarray(found["epoch"])) == 7


def test_sizes_of_zero_mean_a_scalar_when_there_is_one_value(tmp_path: Path) -> None:
    found = state_of(tmp_path, value("s", "Float32", [0], np.float32(3).tobytes()))
    assert found["s"].shape == ()
    assert float(np.asarray(found["s"])) == 3


def test_an_empty_tensor_leaves_nothing_as_with_mindspore(tmp_path: Path) -> None:
    MindSpore().write(tmp_path / "f.ckpt", {"none": in_memory(np.empty((0, 3), np.float32))}, {})
    assert (tmp_path / "f.ckpt").read_bytes() == b""


def test_every_dtype_goes_and_comes(tmp_path: Path) -> None:
    for name, dtype in mindspore.DTYPES.items():
        array = np.arange(6).reshape(2, 3).astype(dtype)
        MindSpore().write(tmp_path / "f.ckpt", {"w": in_memory(array)}, {})
        assert (tmp_path / "f.ckpt").read_bytes() == value("w", name, [2, 3], array.tobytes())
        found = np.asarray(read_state(tmp_path / "f.ckpt").tensors["w"])
        assert found.dtype == dtype
        assert found.tobytes() == array.tobytes()


def test_what_mindspore_cannot_hold_is_refused(tmp_path: Path) -> None:
    for dtype in (np.complex64, ml_dtypes.float8_e4m3fn):
        with pytest.raises(ConversionError, match="cannot hold"):
            MindSpore().write(tmp_path / "f.ckpt", {"w": in_memory(np.zeros(2, dtype))}, {})


GOOD = value("w", "Float32", [2], bytes(8))
WRONG: dict[str, Any] = {
    "fewer bytes than the shape": value("w", "Float32", [3], bytes(8)),
    "more bytes than the shape": value("w", "Float32", [1], bytes(8)),
    "unknown type": value("w", "Int4", [2], bytes(1)),
    "type that is no word": value("w", "\0\n", [2], bytes(8)),
    "hash table": field(1, field(1, b"w") + field(3, b"")),
    "no tensor": field(1, field(1, b"w")),
    "no name": field(1, field(1, b"") + field(1, b"x")),
    "no content": field(1, field(1, b"w") + field(2, field(2, b"Float32"))),
    "an unknown field": GOOD + field(2, b"x"),
    "an unknown field inside": field(1, field(1, b"w") + field(2, field(9, 1))),
    "a negative size": value("w", "Float32", [2**64 - 1], bytes(8)),
    "a name twice": GOOD + value("v", "Float32", [2], bytes(8)) + GOOD,
    "slices that differ": GOOD + value("w", "Float16", [4], bytes(8)),
    "slices too many": GOOD + GOOD,
    "a length past the end": b"\x0a\xff\xff\xff\x7f\x0a\x01w",
    "a number without end": b"\x0a\x0a\x0a\x01w\x12" + b"\xff" * 30,
    "a name that is not UTF-8": field(1, field(1, b"\xff\xfe") + field(2, b"")),
    "a name of a megabyte": value("w" * 2**20, "Float32", [2], bytes(8)),
    "a text that is not UTF-32": value("t", "str", [0], b"\xff\xff\xff\xff"),
    "a text of half a character": value("t", "str", [0], b"ab"),
    "twenty axes": value("w", "Float32", [1] * 20, bytes(4)),
    "two contents": field(1, field(1, b"w") + field(2, field(2, b"Bool") + field(3, b"\1") + field(3, b"\1"))),
    "a checksum alone": b"\x0a\x02\x0a\x00" + b"crc_num" + bytes(10),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_checkpoints_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(UnreadableFile) as caught:
        (tmp_path / "f.ckpt").write_bytes(WRONG[case])
        MindSpore().read(tmp_path / "f.ckpt")
    assert "f.ckpt" in str(caught.value)
    assert "\n" not in str(caught.value)
