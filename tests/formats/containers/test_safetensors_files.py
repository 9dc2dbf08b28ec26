"""safetensors, against the safetensors package and against files made wrong on purpose."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.open import read_state
from persona.formats.containers.safetensors import Safetensors

TORCH_TYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu,
]  # fmt: skip


def file_of(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_every_dtype_comes_from_and_goes_to_torch_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(0, 2 * dtype.itemsize * 3, dtype=torch.uint8)
    tensor = (raw % 2).bool()[:6].reshape(2, 3) if dtype == torch.bool else raw.view(dtype).reshape(2, 3)
    safetensors.torch.save_file({"x": tensor}, tmp_path / "theirs")
    state = read_state(tmp_path / "theirs")
    assert np.asarray(state.tensors["x"]).tobytes() == bits(tensor)
    for number, refs in enumerate((state.tensors, {"x": in_memory(np.asarray(state.tensors["x"]))})):
        Safetensors().write(tmp_path / f"ours{number}", refs, {})
        loaded = safetensors.torch.load_file(tmp_path / f"ours{number}")["x"]
        assert loaded.dtype == dtype
        assert loaded.shape == (2, 3)
        assert bits(loaded) == bits(tensor)


def test_names_order_and_metadata_are_kept(tmp_path: Path) -> None:
    arrays = {name: np.full((n,), n, np.float32) for n, name in enumerate(["z", "ä.中", "", "a b"], 1)}
    Safetensors().write(tmp_path / "f", {k: in_memory(v) for k, v in arrays.items()}, {"format": "pt", "备注": "é\n"})
    with safetensors.safe_open(tmp_path / "f", "numpy") as file:
        assert file.metadata() == {"format": "pt", "备注": "é\n"}
        assert set(file.keys()) == set(arrays)
    state = read_state(tmp_path / "f")
    assert list(state.tensors) == list(arrays)
    assert state.metadata == {"format": "pt", "备注": "é\n"}
    assert (tmp_path / "f").read_bytes()[:8] == struct.pack(
        "<Q", int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")
    )
    assert int.from_bytes((tmp_path / "f").read_bytes()[:8], "little") % 8 == 0


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    arrays = {"alpha": np.float32(4).reshape(()), "none": np.empty((0, 3), np.float16)}
    Safetensors().write(tmp_path / "f", {k: in_memory(v) for k, v in arrays.items()}, {})
    loaded = safetensors.numpy.load_file(tmp_path / "f")
    assert loaded["alpha"].shape == () and loaded["alpha"] == 4
    assert loaded["none"].shape == (0, 3)
    state = read_state(tmp_path / "f")
    assert state.tensors["alpha"].shape == () and float(np.asarray(state.tensors["alpha"])) == 4


def test_a_tensor_never_begins_off_its_alignment(tmp_path: Path) -> None:
    """torch views the mapped bytes in place and refuses a float32 at an odd byte."""
    arrays = {"odd": np.zeros(3, np.uint8), "wide": np.arange(2, dtype=np.float64), "half": np.ones(5, np.float16)}
    Safetensors().write(tmp_path / "f", {k: in_memory(v) for k, v in arrays.items()}, {})
    loaded = safetensors.torch.load_file(tmp_path / "f")
    for name, array in arrays.items():
        assert np.array_equal(loaded[name].numpy(), array)


def test_bytes_that_do_not_change_are_copied_and_not_read(tmp_path: Path) -> None:
    big = np.arange(300_000, dtype=np.float32)
    safetensors.numpy.save_file({"a": big, "b": big + 1, "c": big[:7]}, tmp_path / "f")
    refs = read_state(tmp_path / "f").tensors

    def never() -> Any:
        raise AssertionError("read")

    lazy = {f"new.{k}": TensorRef(r.dtype, r.shape, never, r.span) for k, r in reversed(list(refs.items()))}
    Safetensors().write(tmp_path / "g", lazy, {})
    loaded = safetensors.numpy.load_file(tmp_path / "g")
    assert np.array_equal(loaded["new.a"], big)
    assert np.array_equal(loaded["new.b"], big + 1)
    assert np.array_equal(loaded["new.c"], big[:7])


def test_a_source_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": np.zeros(100_000, np.float32)}, tmp_path / "f")
    ref = read_state(tmp_path / "f").tensors["a"]
    with (tmp_path / "f").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UnreadableFile):
        ref.read()
    with pytest.raises(UnreadableFile):
        Safetensors().write(tmp_path / "g", {"a": ref}, {})


def test_a_tensor_that_is_not_what_it_says_is_not_written(tmp_path: Path) -> None:
    """A mistake of a dialect must not become a file whose header lies."""
    values = np.zeros(10, np.float32)
    safetensors.numpy.save_file({"a": values}, tmp_path / "f")
    span = read_state(tmp_path / "f").tensors["a"].span
    for ref in (
        TensorRef(values.dtype, (4,), lambda: values),
        TensorRef(np.dtype(np.float16), (10,), lambda: values),
        TensorRef(np.dtype(np.float16), (10,), lambda: values, span),
    ):
        with pytest.raises(ConversionError, match="tensor of"):
            Safetensors().write(tmp_path / "g", {"a": ref}, {})


def test_strings_and_unknown_dtypes_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="word"):
        Safetensors().write(tmp_path / "f", {"word": in_memory("text")}, {})
    with pytest.raises(ConversionError, match="complex128"):
        Safetensors().write(tmp_path / "f", {"c": in_memory(np.zeros(2, np.complex128))}, {})


def test_paddle_says_u16_and_means_bfloat16(tmp_path: Path) -> None:
    values = np.array([1.5, -2], ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"w": values.view(np.uint16)}, tmp_path / "f", {"format": "pd"})
    state = read_state(tmp_path / "f")
    assert np.array_equal(np.asarray(state.tensors["w"]), values)
    assert "bfloat16" in state.notes[0]
    safetensors.numpy.save_file({"w": values.view(np.uint16)}, tmp_path / "g", {"format": "pt"})
    assert read_state(tmp_path / "g").tensors["w"].dtype == np.uint16


WRONG: dict[str, tuple[Any, bytes]] = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "same place twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "hole at the start": ({"a": entry(4, 8)}, bytes(8)),
    "bytes behind": ({"a": entry(0, 4)}, bytes(9)),
    "nothing but bytes": ({}, bytes(4)),
    "past the end": ({"a": entry(0, 16)}, bytes(8)),
    "backwards": ({"a": entry(8, 4, [1])}, bytes(8)),
    "shape and bytes differ": ({"a": entry(0, 8, [3])}, bytes(8)),
    "negative size": ({"a": entry(0, 8, [-2, -1])}, bytes(8)),
    "a size that overflows 64 bits": ({"a": entry(0, 0, [2**63, 0])}, b""),
    "product that overflows to the right number": ({"a": entry(0, 4, [2**32, 2**32, 1])}, bytes(4)),
    "true is not 1": (b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', bytes(1)),
    "zero among sizes that are not possible": ({"a": entry(0, 0, [0, 2**62, 2**62])}, b""),
    "forty axes": ({"a": entry(0, 4, [1] * 40)}, bytes(4)),
    "half a number": (b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', bytes(1)),
    "unknown dtype": ({"a": entry(0, 4, [1], "F33")}, bytes(4)),
    "dtype that is no text": (b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "missing field": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "extra field": ({"a": {**entry(0, 4), "x": 1}}, bytes(4)),
    "three offsets": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', bytes(1)),
    "entry that is no object": ({"a": 4}, b""),
    "the same name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        bytes(2),
    ),
    "the same field twice": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "metadata twice": (b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}', b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "metadata of lists": ({"__metadata__": ["a"]}, b""),
    "list in place of the header": (b"[1,2]   ", b""),
    "not JSON": (b"{nonsense}", b""),
    "not UTF-8": (b'{"\xff\xfe":1}', b""),
    "half a character in a name": (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
    "NaN as a number": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', bytes(1)),
    "ten thousand braces": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b""),
    "ten thousand brackets": (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", b""),
    "a number of ten thousand digits": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}',
        b"",
    ),
    "packed four-bit values": ({"a": entry(0, 4, [8], "F4")}, bytes(4)),
    "text after the header": (b'{} {"a":1}', b""),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_format_forbids_is_refused(tmp_path: Path, case: str) -> None:
    header, data = WRONG[case]
    path = file_of(tmp_path / "wrong.safetensors", header, data)
    with pytest.raises(UnreadableFile) as caught:
        Safetensors().read(path)
    assert "wrong.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_header_bombs_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    for length in (2**64 - 1, 2**63, 100_000_001, 0, 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}" * 8)
        with pytest.raises(UnreadableFile):
            Safetensors().read(path)
    path.write_bytes(struct.pack("<Q", 99_999_999) + b'{"a":')
    with pytest.raises(UnreadableFile, match="cut short"):
        read_state(path)


def test_the_header_may_end_in_spaces_and_need_not_be_aligned(tmp_path: Path) -> None:
    path = file_of(tmp_path / "f", json.dumps({"a": entry(0, 4)}).encode() + b"   ", struct.pack("<f", 2.5))
    assert np.asarray(Safetensors().read(path).tensors["a"]).tolist() == [2.5]
