"""The opcode interpreter: what it accepts, and that nothing it refuses ever runs."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona.core.host.errors import UnreadableFile
from persona.formats.containers.open import read_state
from persona.formats.containers.pickle_reader import read_pickle


def written(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_back_as_it_was(tmp_path: Path, protocol: int) -> None:
    value = {
        "text": "héllo 中", "int": 7, "big": 2**70, "negative": -3, "long": 70_000, "float": 2.5, "none": None,
        "yes": True, "no": False, "list": [1, [2, []]], "tuple": (1, (2,), (), (1, 2, 3, 4)), "set": {1, 2},
        "bytes": b"\x00\xff", "ordered": collections.OrderedDict([("b", 1), ("a", 2)]), 3: "int key", (1, 2): "pair",
    }  # fmt: skip
    found = read_pickle(written(tmp_path / "f", value, protocol)).value
    assert found == value
    assert list(found["ordered"]) == ["b", "a"]


def test_shared_values_stay_shared(tmp_path: Path) -> None:
    shared: list[int] = [1]
    found = read_pickle(written(tmp_path / "f", {"a": shared, "b": shared})).value
    assert found["a"] is found["b"]


class Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_pickle_that_would_run_a_command_is_refused_at_its_byte(tmp_path: Path, protocol: int) -> None:
    trap = tmp_path / "trap"
    path = written(tmp_path / "f.pdparams", {"w": Runs(os.system, (f"touch {trap}",))}, protocol)
    data = path.read_bytes()
    offset = data.index(b"\x93") if protocol == 4 else data.index(b"cposix\nsystem")
    with pytest.raises(UnreadableFile, match=rf"posix\.system' at byte {offset},.*Nothing of the file was run"):
        read_state(path)
    assert not trap.exists()


SYMBOLS = [
    "os system", "posix system", "nt system", "builtins eval", "__builtin__ eval", "builtins exec",
    "builtins getattr",
    "builtins __import__", "builtins open", "builtins object", "builtins type", "builtins print", "subprocess Popen",
    "pkgutil resolve_name", "importlib import_module", "operator attrgetter", "runpy _run_code", "pickle loads",
    "torch load", "torch.hub load", "torch.serialization load", "torch._utils _rebuild_sparse_tensor",
    "torch.storage _load_from_bytes", "numpy.testing._private.utils runstring", "numpy load",
    "numpy.f2py.crackfortran f",
    "functools partial", "copyreg _reconstructor", "collections OrderedDict.__init__", "collections defaultdict",
    "webbrowser open", "http.client HTTPSConnection", "asyncio.unix_events f", "code InteractiveInterpreter",
    "_io FileIO",
    "torch nn.Module", "numpy core.multiarray._reconstruct", "sys modules", " ", "builtins eval\x00", "типы eval",
]  # fmt: skip


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_name_outside_the_list_is_refused_by_name(tmp_path: Path, symbol: str) -> None:
    module, name = symbol.split(" ", 1)
    by_line = b"\x80\x02}c" + f"{module}\n{name}\n".encode() + b")R."
    by_stack = (
        b"\x80\x04}" + b"".join(b"\x8c" + bytes([len(x.encode())]) + x.encode() for x in (module, name)) + b"\x93)R."
    )
    for data in (by_line, by_stack):
        (tmp_path / "f").write_bytes(data)
        with pytest.raises(UnreadableFile, match="asks for"):
            read_pickle(tmp_path / "f")


@pytest.mark.parametrize(
    "code",
    [b"i", b"o", b"\x92", b"\x82", b"\x83", b"\x84", b"P", b"p", b"g", b"S'x'\n", b"V", b"I1\n", b"L1L\n", b"F1\n",
    b"\x97",
     b"\x98", b"\x96", b"2", b"\xff", b"\x00"],
)  # fmt: skip
def test_opcodes_that_no_weight_file_has_are_refused(tmp_path: Path, code: bytes) -> None:
    (tmp_path / "f").write_bytes(b"\x80\x02}" + code + b"1" * 20 + b".")
    with pytest.raises(UnreadableFile, match="opcode"):
        read_pickle(tmp_path / "f")


def symbol(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",  # nothing at all
        b"0",  # pop from nothing
        b"(",  # a mark that is never closed
        b"1", b"t", b"u", b"e", b"a", b"s", b"b", b"R", b"\x81", b"\x85", b"\x93", b"\x90", b"Q", b"q\0", b"h\0",
        b"\x94",
        b"}]]s",  # a list as a name
        b"}K\1", b"](K\1K\2.",  # values left over
        b"}(K\1u",  # a name without value
        b"K\1K\2a", b"K\1K\2K\3s",  # a number that is filled
        b"}((((K\1tttt" + b"K\1s",  # a name made of tuples of tuples
        b"}X\1\0\0\0a" + b"\x8a\xff" + b"\x01" * 255 + b"s" + b"K\1" * 3,
        symbol("torch._utils", "_rebuild_tensor_v2") + b")R",
        symbol("torch._utils", "_rebuild_tensor_v2") + b"(K\1K\1K\1K\1tR",
        symbol("numpy.core.multiarray", "_reconstruct") + b"(K\1tR",
        symbol("numpy", "dtype") + b"(X\2\0\0\0O8tR",
        symbol("numpy", "dtype") + b"(X\4\0\0\0S100tR",
        symbol("numpy", "dtype") + b"(X\2\0\0\0f4tR(K\3K\4tb",
        symbol("numpy", "dtype") + b"(X\2\0\0\0f4tR}b",
        symbol("numpy", "ndarray") + b")R",
        symbol("torch", "FloatStorage") + b")R",
        symbol("_codecs", "encode") + b"(X\1\0\0\0aX\3\0\0\0hextR",
        symbol("_codecs", "encode") + b"(X\3\0\0\0\xe4\xb8\xadX\6\0\0\0latin1tR",
        symbol("collections", "OrderedDict") + b"(K\1tR",
        symbol("collections", "OrderedDict") + b"(]tR}b0" + b"}X\1\0\0\0ab",
        symbol("builtins", "list") + b"(M\xff\xfftR",
        symbol("builtins", "bytes") + b"(J\xff\xff\xff\x7ftR",
        symbol("builtins", "set") + b"(](((K\1ttteatR",
        b"X\5\0\0\0\xff\xff\xff\xff\xff",  # text that is not UTF-8
        b"\x8b\xff\xff\xff\x7f", b"\x8a\xff", b"B\xff\xff\xff\xffabc", b"X\xff\xff\xff\xffabc", b"\x8e" + b"\xff" * 8,
        b"\x95" + b"\xff" * 8,
        b"(X\7\0\0\0storageK\1X\1\0\0\0aX\1\0\0\0bK\1tQ",
        b"(X\7\0\0\0storage" + symbol("torch", "FloatStorage") + b"X\1\0\0\0aX\1\0\0\0bJ\xff\xff\xff\xfftQ",
        b"(X\7\0\0\0storage" + symbol("torch", "FloatStorage") + b"X\1\0\0\0aX\1\0\0\0bK\1K\1tQ",
        b"(X\6\0\0\0modulestQ",
        b"c" + b"a" * 10_000, b"ctorch\n" + b"a" * 10_000, b"c\xff\n\xff\n",
        b"}\x8c\1a}\x93",
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_words(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "f").write_bytes(b"\x80\x04" + body + b".")
    with pytest.raises(UnreadableFile) as caught:
        read_pickle(tmp_path / "f")
    assert "\n" not in str(caught.value)


def test_data_that_shares_itself_without_end_is_refused_quickly(tmp_path: Path) -> None:
    """Thirty lists, each twice in the next, are 2^30 values when they are walked."""
    value: Any = {"x": 1}
    for _ in range(60):
        value = {"a": value, "b": value}
    started = time.process_time()
    with pytest.raises(UnreadableFile, match="more than"):
        read_state(written(tmp_path / "f.pdparams", value))
    circle: dict[str, Any] = {}
    circle["again"] = circle
    with pytest.raises(UnreadableFile, match="deep"):
        read_state(written(tmp_path / "g.pdparams", circle))
    assert time.process_time() - started < 10


def test_copies_that_multiply_are_refused(tmp_path: Path) -> None:
    """A list of 100,000 items copied a thousand times by `list(x)` would be 10^8 items in memory."""
    stream = io.BytesIO()
    stream.write(b"\x80\x02](" + b"K\1" * 100_000 + b"eq\x00")
    for _ in range(1000):
        stream.write(symbol("builtins", "list") + b"h\x00\x85R")
    stream.write(b".")
    (tmp_path / "f").write_bytes(stream.getvalue())
    with pytest.raises(UnreadableFile, match="copies more than"):
        read_pickle(tmp_path / "f")


def test_too_many_opcodes_and_too_much_depth_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\x80\x02" + b"N0" * 1_600_000 + b".")
    with pytest.raises(UnreadableFile, match="more than 3000000 opcodes"):
        read_pickle(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"\x80\x02" + b"(" * 100_000 + b".")
    with pytest.raises(UnreadableFile, match="nested"):
        read_pickle(tmp_path / "f")


def test_long_bytes_stay_in_the_file(tmp_path: Path) -> None:
    array = np.arange(100_000, dtype=np.float32)
    path = written(tmp_path / "f", {"w": array})
    found = read_pickle(path).value["w"]
    begin = path.read_bytes().index(array.tobytes())
    assert (found.data.offset, found.data.length) == (begin, array.nbytes)


def test_a_pickle_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"w": np.arange(300.0), "n": 3, "t": "text"}, 4)
    for length in range(0, len(data), 9):
        (tmp_path / "f").write_bytes(data[:length])
        with pytest.raises(UnreadableFile):
            read_pickle(tmp_path / "f")


def test_the_end_that_was_given_is_kept_to(tmp_path: Path) -> None:
    """A pickle inside an archive must not read on into the next member."""
    data = pickle.dumps({"name": "x" * 50}, 2)
    (tmp_path / "f").write_bytes(b"??" + data)
    assert read_pickle(tmp_path / "f", 2, 2 + len(data)).end == 2 + len(data)
    for end in range(2, 2 + len(data) - 1):
        with pytest.raises(UnreadableFile):
            read_pickle(tmp_path / "f", 2, end)


def test_numbers_are_read_little_endian(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\x80\x02J" + struct.pack("<i", -70_000) + b".")
    assert read_pickle(tmp_path / "f").value == -70_000
