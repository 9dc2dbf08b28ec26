"""Paddle's files, against pickle itself and the files that Paddle wrote."""

from __future__ import annotations

import pickle
import pickletools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.flatten import python_scalar
from persona.formats.containers.open import read_state
from persona.formats.containers.paddle import Paddle

FIXTURES = Path(__file__).parent.parent.parent / "fixtures" / "paddle"


def written(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def mentioned(path: Path) -> set[str]:
    return {str(argument) for code, argument, _ in pickletools.genops(path.read_bytes()) if code.name == "GLOBAL"}


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i8", "i4", "i2", "i1", "u1", "?", "c8", "c16"])
def test_arrays_of_every_dtype_and_protocol_are_read_lazily(tmp_path: Path, dtype: str, protocol: int) -> None:
    arrays = {
        "big": np.arange(24_000).reshape(40, 600).astype(dtype),
        "small": np.arange(3).astype(dtype),
        "scalar": np.ones((), dtype),
        "empty": np.empty((0, 4), dtype),
    }
    tensors = read_state(written(tmp_path / "f", arrays, protocol)).tensors
    for name, array in arrays.items():
        found = np.asarray(tensors[name])
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)
    assert (tensors["big"].span is not None) == (protocol > 2)


@pytest.mark.parametrize("protocol", [2, 4])
def test_fortran_order_and_big_endian_arrays_are_turned(tmp_path: Path, protocol: int) -> None:
    arrays = {
        "fortran": np.asfortranarray(np.arange(600, dtype=np.float32).reshape(20, 30)),
        "big-endian": np.arange(300, dtype=">f4"),
        "fortran vector": np.asfortranarray(np.arange(300, dtype=np.float32)),
    }
    tensors = read_state(written(tmp_path / "f", arrays, protocol)).tensors
    for name, array in arrays.items():
        assert np.array_equal(np.asarray(tensors[name]), array)
        assert tensors[name].dtype == np.dtype("<f4")


def test_what_is_written_is_a_pickle_for_numpy_1_and_2(tmp_path: Path) -> None:
    arrays = {
        "w.中": np.arange(70_000, dtype=np.float32).reshape(7, -1),
        "s": np.float64(2).reshape(()),
        "b": np.ones(3, "?"),
    }
    Paddle().write(tmp_path / "f", {name: in_memory(array) for name, array in arrays.items()}, {"format": "pt"})
    loaded = pickle.loads((tmp_path / "f").read_bytes())
    assert loaded.pop("StructuredToParameterName@@") == {name: name for name in arrays}
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
    assert mentioned(tmp_path / "f") == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


def test_bfloat16_travels_as_uint16(tmp_path: Path) -> None:
    values = np.array([[1.5, -2, 3e38]], ml_dtypes.bfloat16)
    Paddle().write(tmp_path / "f", {"w": in_memory(values)}, {})
    loaded = pickle.loads((tmp_path / "f").read_bytes())
    assert loaded["w"].dtype == np.uint16
    assert np.array_equal(loaded["w"].view(ml_dtypes.bfloat16), values)
    state = read_state(tmp_path / "f")
    assert np.array_equal(np.asarray(state.tensors["w"]), values)
    assert any("bfloat16" in note for note in state.notes)


def test_numbers_and_texts_are_written_without_a_name_in_the_table(tmp_path: Path) -> None:
    tensors = {"w": in_memory(np.ones(2, np.float32)), "step": python_scalar(7), "note": python_scalar("é" * 300)}
    Paddle().write(tmp_path / "f", tensors, {})
    loaded = pickle.loads((tmp_path / "f").read_bytes())
    assert (loaded["step"], loaded["note"]) == (7, "é" * 300)
    assert loaded["StructuredToParameterName@@"] == {"w": "w"}
    assert read_state(tmp_path / "f").tensors["note"].python == "é" * 300
    Paddle().write(tmp_path / "g", {"step": python_scalar(7)}, {})
    assert pickle.loads((tmp_path / "g").read_bytes()) == {"step": 7}  # an empty table would spoil paddle.load


def test_uint16_and_float8_have_no_place_there(tmp_path: Path) -> None:
    for dtype in (np.uint16, np.uint32, ml_dtypes.float8_e4m3fn):
        with pytest.raises(ConversionError, match="cannot hold"):
            Paddle().write(tmp_path / "f", {"w": in_memory(np.zeros(2, dtype))}, {})


def test_paddles_own_files_come_out_with_the_same_values_and_names(tmp_path: Path) -> None:
    for path in FIXTURES.rglob("state*.pdparams"):
        ours, theirs = tmp_path / "ours", read_state(path)
        Paddle().write(ours, theirs.tensors, {})
        again = read_state(ours)
        assert list(again.tensors) == list(theirs.tensors)
        for name, ref in theirs.tensors.items():
            assert again.tensors[name].dtype == ref.dtype
            assert np.asarray(again.tensors[name]).tobytes() == np.asarray(ref).tobytes()


def test_slices_of_large_arrays_are_joined_in_place(tmp_path: Path) -> None:
    """The layout of paddle.save for protocols 2 and 3, with short slices."""
    whole = np.arange(60, dtype=np.float32).reshape(6, 10)
    flat = whole.reshape(-1)
    value = {
        "first": np.ones(2, np.float32),
        "w@@.0": flat[:25], "w@@.1": flat[25:50], "w@@.2": flat[50:],
        "last": np.zeros(2, np.float32),
        "UnpackBigParamInfor@@": {"w": {"OriginShape": (6, 10), "slices": ["w@@.0", "w@@.1", "w@@.2"]}},
    }  # fmt: skip
    for protocol in (2, 3):
        tensors = read_state(written(tmp_path / "f", value, protocol)).tensors
        assert list(tensors) == ["first", "w", "last"]
        assert np.array_equal(np.asarray(tensors["w"]), whole)


@pytest.mark.parametrize(
    "table",
    [
        3,
        {"w": None},
        {"w": {"OriginShape": (6,), "slices": []}},
        {"w": {"OriginShape": (6,), "slices": ["absent"]}},
        {"w": {"OriginShape": (7,), "slices": ["a"]}},
        {"w": {"OriginShape": (3,), "slices": ["a", "a"]}},
        {"w": {"OriginShape": (-1,), "slices": ["a"]}},
        {"w": {"OriginShape": "33", "slices": ["a"]}},
        {"w": {"OriginShape": (6,), "slices": [["a"]]}},
        {"a": {"OriginShape": (6,), "slices": ["a"]}},
        {4: {"OriginShape": (6,), "slices": ["a"]}},
    ],
)
def test_damaged_lists_of_slices_are_refused(tmp_path: Path, table: Any) -> None:
    value = {"a": np.zeros(6, np.float32), "UnpackBigParamInfor@@": table}
    with pytest.raises(UnreadableFile):
        read_state(written(tmp_path / "f.pdparams", value))


@pytest.mark.parametrize(
    "value",
    [
        np.array([{}, None]),
        np.array(["text"]),
        np.zeros(2, [("a", "f4")]),
        np.datetime64("2020-01-01"),
        np.ma.masked_array([1.0, 2.0], [True, False]),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_arrays_that_are_no_weights_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UnreadableFile):
        read_state(written(tmp_path / "f.pdparams", {"w": value}))


def test_an_array_with_fewer_bytes_than_its_shape_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.zeros((5, 100), np.float32)}, 4)
    for old, new in ((b"K\x05Kd", b"K\x06Kd"), (b"K\x05Kd", b"K\x04Kd")):
        assert old in data
        (tmp_path / "f").write_bytes(data.replace(old, new))
        with pytest.raises(UnreadableFile, match="instead of"):
            read_state(tmp_path / "f")


def test_bytes_behind_the_pickle_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "f", {"w": np.zeros(3, np.float32)})
    path.write_bytes(path.read_bytes() + b"cos\nsystem\n")
    with pytest.raises(UnreadableFile, match="11 bytes after its pickle"):
        read_state(path)
