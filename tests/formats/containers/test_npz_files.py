"""numpy's files, against numpy."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.npz import Npz
from persona.formats.containers.open import read_state

ARRAYS = {
    "f4": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "big": np.arange(5, dtype=">i4"),
    "bool": np.array([True, False]),
    "scalar": np.float16(2).reshape(()),
    "empty": np.empty((0, 3), np.int8),
    "unet.a/b:c": np.ones((1, 2, 3, 4), np.complex64),
    "中": np.array([1], np.uint64),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_read_as_numpy_reads_them(tmp_path: Path, save: object) -> None:
    save(tmp_path / "f.npz", **ARRAYS)  # type: ignore[operator]
    tensors = read_state(tmp_path / "f.npz").tensors
    assert list(tensors) == list(ARRAYS)
    for name, array in ARRAYS.items():
        found = np.asarray(tensors[name])
        assert found.shape == array.shape == tensors[name].shape
        assert found.dtype == array.dtype.newbyteorder("<") == tensors[name].dtype
        assert np.array_equal(found, array)
    if save is np.savez:
        assert tensors["f4"].span is not None


def test_a_single_array_and_a_text(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", ARRAYS["f4"])
    assert np.array_equal(np.asarray(read_state(tmp_path / "vectors.npy").tensors["vectors"]), ARRAYS["f4"])
    np.savez(tmp_path / "f.npz", name=np.array("héllo 中"))
    assert read_state(tmp_path / "f.npz").tensors["name"].python == "héllo 中"


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    Npz().write(tmp_path / "f.npz", {name: in_memory(array) for name, array in ARRAYS.items()}, {})
    with np.load(tmp_path / "f.npz", allow_pickle=False) as loaded:
        assert loaded.files == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert loaded[name].dtype == array.dtype.newbyteorder("<")
            assert np.array_equal(loaded[name], array)


def test_bfloat16_has_no_place_there(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="bfloat16"):
        Npz().write(tmp_path / "f.npz", {"w": in_memory(np.zeros(2, ml_dtypes.bfloat16))}, {})


def npy(header: bytes, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n."),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(4)),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", bytes(8)),
        npy(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", bytes(4)),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }"),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').getpid(),), }"),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", bytes(4)),
        npy(b"{'descr': '<U5', 'fortran_order': False, 'shape': (2,), }", bytes(40)),
        npy(b"{'descr': '<U1', 'fortran_order': False, 'shape': (), }", b"\xff\xff\xff\xff"),
        npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", bytes(4), b"\x09\0"),
        npy(b"(" * 9_000),
        b"\x93NUMPY\1\0\xff\xff",
        b"\x93NUMPY\1",
    ],
)
def test_arrays_that_are_no_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.npy").write_bytes(content)
    with pytest.raises(UnreadableFile):
        read_state(tmp_path / "f.npy")
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", content)
    with pytest.raises(UnreadableFile):
        read_state(tmp_path / "f.npz")


def test_a_bomb_is_refused_before_it_inflates(tmp_path: Path) -> None:
    """Zeros deflate a thousandfold: 200 MB from 200 kB."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (200000000,), }"
    archive = zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("w.npy", "w") as member:
        member.write(npy(header))
        for _ in range(200):
            member.write(bytes(1_000_000))
    assert (tmp_path / "f.npz").stat().st_size < 2_000_000
    with pytest.raises(UnreadableFile, match="would inflate"):
        read_state(tmp_path / "f.npz")


def test_a_member_that_inflates_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, w=np.arange(1000.0))
    data = bytearray(stream.getvalue())
    for at in (data.index(b"PK\1\2") + 24, 22):  # sizes in the directory and in the member's own header
        data[at : at + 4] = (8 * 500 + 128).to_bytes(4, "little")
    (tmp_path / "f.npz").write_bytes(bytes(data))
    with pytest.raises(UnreadableFile):
        np.asarray(read_state(tmp_path / "f.npz").tensors["w"])


def test_damaged_members_are_refused_when_they_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "f.npz", w=np.random.default_rng(0).normal(size=1000))
    data = bytearray((tmp_path / "f.npz").read_bytes())
    data[len(data) // 2] ^= 0x55
    (tmp_path / "f.npz").write_bytes(bytes(data))
    with pytest.raises(UnreadableFile):
        np.asarray(read_state(tmp_path / "f.npz").tensors["w"])


def test_an_archive_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", w=np.ones(2))
    with zipfile.ZipFile(tmp_path / "f.npz", "a") as archive:
        archive.writestr("run.sh", "rm -rf /")
    with pytest.raises(UnreadableFile, match=r"run\.sh"):
        read_state(tmp_path / "f.npz")
