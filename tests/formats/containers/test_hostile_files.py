"""Whatever the bytes are: persona's own error or a state, in bounded time and memory."""

from __future__ import annotations

import io
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from persona.core.host.errors import PersonaError, UnreadableFile
from persona.formats.containers.open import read_state
from persona.formats.dialects.embeddings import recognise

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
SEEDS = [
    "torch/ti_sd15/learned_embeds_multi.safetensors",
    "torch/ti_sd15/learned_embeds_multi.bin",
    "torch/ti_sd15/a1111_parameterdict.pt",
    "paddle/ti-multi3/learned_embeds.pdparams",
    "paddle/formats-pd33/state_bigparam_split_protocol2.pdparams",
    "paddle/formats-pd26/nested.pdparams",
    "mindspore/dtypes/dtypes.ckpt",
    "mindspore/mindone_sdv2_textual_inversion/weights_ti.ckpt",
    "paddle/ti-multi3/expected.npz",
]
CONTENT = {name: (FIXTURES / name).read_bytes() for name in SEEDS}
EXAMPLES = int(os.environ.get("PERSONA_FUZZ_EXAMPLES", "250"))  # a longer hunt: PERSONA_FUZZ_EXAMPLES=20000 pytest …
MANY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def survives(data: bytes) -> None:
    """Reads everything that can be read; anything but a PersonaError fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.ckpt"
        path.write_bytes(data)
        started = time.process_time()
        try:
            state = read_state(path)
            for ref in state.tensors.values():
                assert ref.read().shape == ref.shape
            recognise(state, file_stem="file")
        except PersonaError as error:
            assert "\n" not in str(error), error
            assert len(str(error)) < 2_000
        assert time.process_time() - started < 5


@MANY
@given(st.binary(max_size=400))
@example(b"\x80\x04")
@example(b"PK\x03\x04" + bytes(40))
@example(b"\x0a\x02\x0a\x00")
@example(bytes(8) + b"{")
def test_arbitrary_bytes(data: bytes) -> None:
    survives(data)


@MANY
@given(st.sampled_from([b"\x80\x02", b"\x80\x04", b"PK\3\4", b"\x93NUMPY\1\0", b"\x0a\x10\x0a\x01w",
b"\x89PNG\r\n\x1a\n"]),
       st.binary(max_size=300))  # fmt: skip
def test_arbitrary_bytes_behind_a_right_beginning(head: bytes, data: bytes) -> None:
    survives(head + data)


@MANY
@given(st.lists(st.sampled_from([
    b"(", b")", b"}", b"]", b"t", b"u", b"s", b"a", b"e", b"R", b"b", b"Q", b"N", b"\x88", b"\x85", b"\x86",
    b"\x87", b"\x94",
    b"h\0", b"h\1", b"K\1", b"K\0", b"X\1\0\0\0w", b"X\7\0\0\0storage", b"X\2\0\0\0f4", b"C\4abcd",
    b"J\xff\xff\xff\x7f",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n",
    b"\x81",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"ccollections\nOrderedDict\n", b"cbuiltins\nlist\n",
    b"cbuiltins\nset\n",
    b"ctorch.nn.modules.container\nParameterDict\n", b"c_codecs\nencode\n", b"X\6\0\0\0latin1", b"cbuiltins\nbytes\n",
    b"cnumpy.core.multiarray\nscalar\n", b"cbuiltins\ndict\n", b"cbuiltins\ntuple\n", b"X\x0a\0\0\0state_dict",
]), max_size=40))  # fmt: skip
def test_arbitrary_programs_of_known_opcodes(opcodes: list[bytes]) -> None:
    survives(b"\x80\x02" + b"".join(opcodes) + b".")


@MANY
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6))
def test_real_files_with_bytes_changed(name: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(CONTENT[name])
    for place, byte in changes:
        data[int(place * len(data))] = byte
    survives(bytes(data))


@MANY
@given(st.sampled_from(SEEDS), st.floats(0, 1), st.floats(0, 1), st.binary(max_size=20))
def test_real_files_with_a_part_replaced(name: str, start: float, end: float, middle: bytes) -> None:
    data = CONTENT[name]
    first, last = sorted((int(start * len(data)), int(end * len(data))))
    survives(data[:first] + middle + data[last:])


def bomb_nested_pickle() -> bytes:
    return b"\x80\x02" + b"]" * 500_000 + b"a" * 499_999 + b"."


def bomb_shared_pickle() -> bytes:
    value: object = []
    for _ in range(90):
        value = [value] * 20
    return pickle.dumps({"w": value}, 4)


def bomb_declared_array() -> bytes:
    data = pickle.dumps({"w": np.zeros(300, np.float32)}, 4)
    return data.replace(b"M,\x01\x85", b"J\xff\xff\xff\x7f\x85")


def bomb_header() -> bytes:
    text = b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"
    return len(text).to_bytes(8, "little") + text


def bomb_zip_directory() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"{number}.npy", b"")
    return stream.getvalue()


def bomb_protobuf() -> bytes:
    return b"\x0a\x08\x0a\x01w\x12\x03\x12\x01x" * 500_000


@pytest.mark.parametrize(
    "bomb",
    [bomb_nested_pickle, bomb_shared_pickle, bomb_declared_array, bomb_header, bomb_zip_directory, bomb_protobuf],
)
def test_bombs_are_refused_within_memory_and_time(tmp_path: Path, bomb: object) -> None:
    """In a process of its own that may have 1 GiB of address space beyond what it starts with."""
    path = tmp_path / "bomb.ckpt"
    path.write_bytes(bomb())  # type: ignore[operator]
    script = (
        "import resource, sys\nfrom persona.core.host.errors import UnreadableFile\n"
        "from persona.formats.containers import mindspore, npz, paddle, safetensors, torch_pickle\n"
        "from persona.formats.containers.open import read_state\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30),) * 2)\n"
        "try:\n    read_state(sys.argv[1])\nexcept UnreadableFile as error:\n    print('refused:', error)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("refused:"), done.stdout + done.stderr[-500:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1_500_000


def test_an_unreadable_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="not a regular file"):
        read_state("/dev/null")
