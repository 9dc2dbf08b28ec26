"""torch's files, against torch itself."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.flatten import python_scalar
from persona.formats.containers.open import identify, read_state
from persona.formats.containers.torch_pickle import TorchPickle

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
    torch.uint32, torch.uint64,
]  # fmt: skip
LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(value: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@LEGACY
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_and_written_bit_for_bit(tmp_path: Path, dtype: torch.dtype, legacy: bool) -> None:
    raw = torch.arange(2 * 3 * dtype.itemsize, dtype=torch.uint8)
    tensor = (raw % 2).bool().reshape(2, 3) if dtype == torch.bool else raw.view(dtype).reshape(2, 3)
    state = read_state(save({"x": tensor}, tmp_path / "theirs.pt", legacy=legacy))
    assert np.asarray(state.tensors["x"]).tobytes() == bits(tensor)
    assert state.tensors["x"].span is not None
    TorchPickle().write(tmp_path / "ours.pt", state.tensors, {})
    for mapped in (False, True):
        loaded = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=mapped)["x"]
        assert (loaded.dtype, tuple(loaded.shape), bits(loaded)) == (dtype, (2, 3), bits(tensor))
    assert np.asarray(read_state(tmp_path / "ours.pt").tensors["x"]).tobytes() == bits(tensor)


VIEWS = {
    "transposed": lambda x: x.t(),
    "every second row": lambda x: x[::2],
    "a column": lambda x: x[:, 3],
    "a block": lambda x: x[1:4, 2:5],
    "offset but whole": lambda x: x[2:],
    "expanded": lambda x: x[:1].expand(4, 8),
    "permuted": lambda x: x.reshape(2, 3, 8).permute(2, 0, 1),
    "a value": lambda x: x[3, 4],
    "empty": lambda x: x[:0],
    "one row": lambda x: x[4:5],
}


@LEGACY
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_one_storage_are_exact(tmp_path: Path, view: str, legacy: bool) -> None:
    base = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    tensor = VIEWS[view](base)
    state = read_state(save({"base": base, "view": tensor}, tmp_path / "f.pt", legacy=legacy))
    found = np.asarray(state.tensors["view"])
    assert found.shape == tuple(tensor.shape)
    assert np.array_equal(found, tensor.numpy())
    TorchPickle().write(tmp_path / "g.pt", state.tensors, {})
    assert torch.equal(torch.load(tmp_path / "g.pt", weights_only=True)["view"], tensor)


@LEGACY
def test_parameters_modules_and_numpy_values(tmp_path: Path, legacy: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    value = {
        "module": module.state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.float64(2.5),
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
    }
    tensors = read_state(save(value, tmp_path / "f.pt", legacy=legacy)).tensors
    for name, tensor in module.state_dict().items():
        assert np.array_equal(np.asarray(tensors[f"module.{name}"]), tensor.numpy())
    assert np.array_equal(np.asarray(tensors["array"]), value["array"])
    assert np.asarray(tensors["parameter"]).tolist() == [1, 1, 1]
    assert tensors["scalar"].python == 2.5
    assert [tensors[f"size.{i}"].python for i in range(2)] == [2, 3]


def test_nested_data_gets_dotted_names_and_lists_are_counted(tmp_path: Path) -> None:
    """cloneofsimo/lora saves a bare list of factors; A1111's hypernetworks have whole numbers as keys."""
    one, two = torch.ones(2), torch.zeros(3)
    assert list(read_state(save([one, two], tmp_path / "a.pt")).tensors) == ["0", "1"]
    assert list(read_state(save(one, tmp_path / "b.pt")).tensors) == ["0"]
    value = {320: ({"linear.0.weight": one}, {"linear.0.weight": two}), "step": 3, "name": "x"}
    tensors = read_state(save(value, tmp_path / "c.pt")).tensors
    assert list(tensors) == ["320.0.linear.0.weight", "320.1.linear.0.weight", "step", "name"]
    assert tensors["step"].python == 3
    assert tensors["name"].python == "x"
    with pytest.raises(UnreadableFile, match=r"two values called 'a\.b'"):
        read_state(save({"a": {"b": one}, "a.b": two}, tmp_path / "d.pt"))


def test_of_a_training_checkpoint_the_weights_are_read_and_the_rest_is_told(tmp_path: Path) -> None:
    value = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": OrderedDict(w=torch.ones(2)),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}}],
        "callbacks": {},
    }
    state = read_state(save(value, tmp_path / "f.ckpt"))
    assert list(state.tensors) == ["w"]
    assert "epoch = 3" in state.notes
    assert any("optimizer_states" in note and "not read" in note for note in state.notes)


def test_what_is_no_tensor_is_told(tmp_path: Path) -> None:
    state = read_state(save({"w": torch.ones(1), "nothing": None, "raw": b"abc"}, tmp_path / "f.pt"))
    assert list(state.tensors) == ["w"]
    assert "nothing" in state.notes[-1]
    assert "raw" in state.notes[-1]


def test_a1111_dictionaries_are_nested_again(tmp_path: Path) -> None:
    tensors = {
        "string_to_token.*": python_scalar(265),
        "string_to_param.*": in_memory(np.ones((2, 4), np.float32)),
        "name": python_scalar("猫"),
        "step": python_scalar(70_000),
        "sd_checkpoint": python_scalar(1.5),
        "flag": python_scalar(True),
    }
    TorchPickle().write(tmp_path / "f.pt", tensors, {})
    loaded = torch.load(tmp_path / "f.pt", weights_only=True)
    assert loaded["string_to_token"] == {"*": 265}
    assert torch.equal(loaded["string_to_param"]["*"], torch.ones(2, 4))
    assert (loaded["name"], loaded["step"], loaded["sd_checkpoint"], loaded["flag"]) == ("猫", 70_000, 1.5, True)


def test_what_torch_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="word"):
        TorchPickle().write(tmp_path / "f.pt", {"word": in_memory(np.array(["a", "b"]))}, {})


@LEGACY
def test_a_command_inside_is_named_and_not_run(tmp_path: Path, legacy: bool) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'trap'}",)

    with pytest.raises(UnreadableFile, match=r"posix\.system' at byte \d+"):
        read_state(save({"w": torch.ones(2), "x": Runs()}, tmp_path / "f.pt", legacy=legacy))
    assert not (tmp_path / "trap").exists()


def rebuilt(source: Path, target: Path, change: Any, method: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with its members passed through `change(name, data) -> {name: data}`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            for other, data in change(name, old.read(name)).items():
                new.writestr(other, data)
    return target


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return save({"w": torch.arange(10.0)}, tmp_path / "good.pt")


def test_an_archive_that_was_packed_anew_is_read(tmp_path: Path, good: Path) -> None:
    state = read_state(rebuilt(good, tmp_path / "f.pt", lambda name, data: {name: data}))
    assert np.asarray(state.tensors["w"]).tolist() == list(range(10))


def test_tensors_saved_on_an_ascend_device_are_read(tmp_path: Path) -> None:
    """torch_npu writes its own rebuild function with a seventh argument, the layout on the device."""

    def as_torch_npu(name: str, data: bytes) -> dict[str, bytes]:
        if name.endswith("data.pkl"):
            data = data.replace(
                b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n"
            )
            layout = b"ctorch_npu.npu._format\nFormat\nK\x02\x85R"
            data = re.sub(rb"(OrderedDict\nq.\)Rq.)t", lambda found: found[1] + layout + b"t", data, flags=re.DOTALL)
            assert layout in data
        return {name: data}

    path = save({"w": torch.arange(6.0).reshape(2, 3).t()}, tmp_path / "cpu.pt")
    state = read_state(rebuilt(path, tmp_path / "npu.pt", as_torch_npu))
    assert np.asarray(state.tensors["w"]).tolist() == [[0, 3], [1, 4], [2, 5]]


TRICKS: dict[str, Any] = {
    "big-endian": lambda n, d: {n: b"big" if n.endswith("byteorder") else d},
    "no storage": lambda n, d: {} if n.endswith("data/0") else {n: d},
    "short storage": lambda n, d: {n: d[:-4] if n.endswith("data/0") else d},
    "long storage": lambda n, d: {n: d + b"1234" if n.endswith("data/0") else d},
    "two pickles": lambda n, d: {n: d, **({"other/data.pkl": d} if n.endswith("data.pkl") else {})},
    "script": lambda n, d: {n: d, **({n.replace("data.pkl", "constants.pkl"): d} if n.endswith("data.pkl") else {})},
    "climbing": lambda n, d: {n: d, **({"../../etc/passwd": d} if n.endswith("data.pkl") else {})},
    "absolute": lambda n, d: {n: d, **({"/etc/passwd": d} if n.endswith("data.pkl") else {})},
    "drive": lambda n, d: {n: d, **({"C:\\x": d} if n.endswith("data.pkl") else {})},
    "bytes behind the pickle": lambda n, d: {n: d + b"cos\nsystem\n" if n.endswith("data.pkl") else d},
    "cut pickle": lambda n, d: {n: d[:-1] if n.endswith("data.pkl") else d},
}


@pytest.mark.parametrize("trick", TRICKS)
def test_archives_with_tricks_are_refused(tmp_path: Path, good: Path, trick: str) -> None:
    with pytest.raises(UnreadableFile):
        read_state(rebuilt(good, tmp_path / "f.pt", TRICKS[trick]))


def test_a_compressed_archive_is_no_torch_file(tmp_path: Path, good: Path) -> None:
    with pytest.raises(UnreadableFile, match="never compresses"):
        read_state(rebuilt(good, tmp_path / "f.pt", lambda name, data: {name: data}, zipfile.ZIP_DEFLATED))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_names_are_refused(tmp_path: Path, good: Path) -> None:
    path = rebuilt(good, tmp_path / "f.pt", lambda name, data: {name: data})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("good/data.pkl", pickle.dumps({}))
    with pytest.raises(UnreadableFile, match="two members called"):
        read_state(path)


def patched(path: Path, old: bytes, new: bytes, *, last: bool = False) -> Path:
    data = path.read_bytes()
    at = data.rindex(old) if last else data.index(old)
    path.write_bytes(data[:at] + new + data[at + len(old) :])
    return path


def test_headers_that_disagree_are_refused(tmp_path: Path, good: Path) -> None:
    """A scanner that believes one header and a loader that believes the other see two files (CVE-2025-1944)."""
    data = good.read_bytes()
    central = data.index(b"PK\x01\x02")
    cases = {
        "name": data[:30] + b"gxxd" + data[34:],
        "encrypted": data[:6] + b"\x01" + data[7:],
        "encrypted in the directory": data[: central + 8] + b"\x01" + data[central + 9 :],
        "method": data[:8] + b"\x08" + data[9:],
        "unknown method": data[: central + 10] + b"\x63" + data[central + 11 :],
        "offset": data[: central + 42] + struct.pack("<L", 10) + data[central + 46 :],
        "directory elsewhere": data[:-6] + struct.pack("<L", central + 1) + data[-2:],
        "comment": data[:-2] + b"\x05\x00hello",
        "bytes behind": data + b"\0",
        "two disks": data[:-18] + b"\x01" + data[-17:],
        "more members than there are": data[:-14] + b"\x64\x00\x64\x00" + data[-10:],
        "bytes before": b"MZ" + data,
    }
    for name, content in cases.items():
        (tmp_path / "f.pt").write_bytes(content)
        with pytest.raises(UnreadableFile):
            read_state(tmp_path / "f.pt")
            pytest.fail(f"{name} was read")


def test_an_archive_that_says_it_holds_a_petabyte_is_refused(tmp_path: Path, good: Path) -> None:
    big = rebuilt(good, tmp_path / "f.pt", lambda name, data: {name: data})
    data = bytearray(big.read_bytes())
    at = data.index(b"good/data/0", data.index(b"PK\x01\x02")) - 46
    data[at + 20 : at + 28] = b"\xfe\xff\xff\xff" * 2
    big.write_bytes(bytes(data))
    with pytest.raises(UnreadableFile):
        read_state(big)


def test_a_tensor_that_claims_more_than_its_storage_is_refused(tmp_path: Path, good: Path) -> None:
    """The storage has ten items; a size of eleven must not read the next member."""
    path = rebuilt(good, tmp_path / "f.pt", lambda n, d: {n: d.replace(b"K\x0a\x85", b"K\x0b\x85", 1)})
    with pytest.raises(UnreadableFile, match="reaches item 10 of a storage that has 10"):
        read_state(path)


def test_a_tensor_that_expands_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="over only 1 stored values"):
        read_state(save({"w": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "f.pt"))


@LEGACY
def test_cut_anywhere_it_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = save({"a": torch.arange(30.0), "b": {"c": torch.ones(3, 3)}}, tmp_path / "f.pt", legacy=legacy)
    data = path.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 97)):
        path.write_bytes(data[:length])
        with pytest.raises(UnreadableFile):
            read_state(path)


def test_the_old_format_is_told_from_paddles_by_its_magic_number(tmp_path: Path) -> None:
    path = save({"a": torch.ones(2)}, tmp_path / "a", legacy=True)
    assert identify(path).name == "torch"
    (tmp_path / "b").write_bytes(pickle.dumps({"a": np.ones(2)}, 2))
    assert identify(tmp_path / "b").name == "paddle"


def test_the_old_format_with_bytes_behind_or_another_machine_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.ones(2)}, tmp_path / "a", legacy=True)
    data = path.read_bytes()
    for changed in (data + b"\0", data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")):
        assert changed != data
        path.write_bytes(changed)
        with pytest.raises(UnreadableFile):
            read_state(path)


def test_the_archive_is_one_that_zip_tools_accept(tmp_path: Path) -> None:
    arrays = {f"w{n}": np.full((n, 3), n, np.float16) for n in range(40)}
    TorchPickle().write(tmp_path / "f.pt", {name: in_memory(array) for name, array in arrays.items()}, {})
    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    data = (tmp_path / "f.pt").read_bytes()
    assert data.index(arrays["w7"].tobytes()) % 64 == 0
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert all(np.array_equal(loaded[name].numpy(), array) for name, array in arrays.items())


def test_an_original_stable_diffusion_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CompVis' sd-v1-4.ckpt has a class of pytorch-lightning as a key and numpy numbers beside its state_dict."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    made = type("ModelCheckpoint", (), {"__module__": module.__name__, "__qualname__": "ModelCheckpoint"})
    module.ModelCheckpoint = made  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    value = {
        "epoch": 0,
        "callbacks": {made: {"best_model_score": np.float64(0.3), "best_model_path": "x"}},
        "lr_schedulers": [{"base_lrs": [np.float32(1e-4)]}],
        "state_dict": {"model.diffusion_model.out.2.bias": torch.ones(4)},
    }
    state = read_state(save(value, tmp_path / "sd-v1-4.ckpt"))
    assert list(state.tensors) == ["model.diffusion_model.out.2.bias"]
    assert any("callbacks" in note for note in state.notes)
