"""What is fuzzed: bytes go in, and only persona's own error may come out.

`from_bytes` takes the bytes as a file: its container, its dialect and every dialect's writer. `from_names` spends them
on names and shapes, so that the dialects are reached at once; the file around them is right."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import persona
from persona.api import host
from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import Output, State, Told
from persona.core.host.errors import PersonaError
from persona.exchange.load import meaning
from persona.exchange.planning import plan_for
from persona.exchange.save import Target
from persona.formats.checkpoint_outputs import outputs
from tools.fuzz.vocabulary import PAIRS, PATHS, PREFIXES, SUFFIXES

LARGEST = 1 << 20
"""Bytes of a tensor that is read: fuzzed files declare large ones, which is the containers' tests' matter."""
DTYPES = (np.float32, np.float16, np.int32, np.bool_)
SIZES = (0, 1, 2, 3, 4, 8, 12)
FORMS = ("ldm", "diffusers", "ppdiffusers", "mindspore", "wukong")


@functools.cache
def _file() -> Path:
    memory = Path("/dev/shm")  # a disk would be what takes the time
    folder = tempfile.mkdtemp(prefix="persona-fuzz-", dir=memory if os.access(memory, os.W_OK) else None)
    return Path(folder) / "file"


@functools.cache
def _dialects() -> dict[str, Any]:
    return {name: host().load("dialect", name) for name in host().provided("dialect")}


def from_bytes(data: bytes) -> None:
    """The bytes as a file. Raises whatever is not persona's own error."""
    path = _file()
    path.write_bytes(data)
    try:
        loaded = persona.load(path)
    except PersonaError as error:
        _said(error)
        return
    _everything(loaded)


def from_names(data: bytes) -> None:
    """The bytes as choices of names, shapes and text. Raises whatever is not persona's own error."""
    state = state_of(data)
    try:
        loaded = meaning(Path("file.safetensors"), "safetensors", state, Told(path="file.safetensors"), host())
    except PersonaError as error:
        _said(error)
        return
    _everything(loaded)


def state_of(data: bytes) -> State:
    """A file's content spelt by `data`: every byte is one choice."""
    bytes_left = iter(data)

    def choose(options: Any) -> Any:
        return options[next(bytes_left, 0) % len(options)]

    tensors: dict[str, TensorRef] = {}
    for _ in range(1 + choose(range(4))):
        stem = choose(PREFIXES).removeprefix(".") + choose(PATHS)
        suffixes = choose(PAIRS) if choose((True, True, False)) else (choose(SUFFIXES),)
        width, rank, out = (choose((1, 2, 4, 12, 24)) for _ in range(3))
        fitting = [(rank, width), (out, rank), (rank, width), (out, rank), (), (out,), (out, 1)]
        for number, suffix in enumerate(suffixes):
            odd = choose(range(8)) == 0
            shape = tuple(choose(SIZES) for _ in range(choose(range(5)))) if odd else fitting[number]
            dtype = choose(DTYPES) if odd else np.float32
            values = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape) % 7 / 8 - 0.25
            tensors[stem + suffix] = in_memory(values.astype(dtype))
    keys = ("lora_adapter_metadata", "ss_network_dim", "ss_network_args", "ss_base_model_version", "format")
    texts = ('{"unet.r": 4, "unet.lora_alpha": 2}', "{}", "[]", "{", "None", "4", "sdxl_base", "pd", "np", "")
    metadata = {choose(keys): choose(texts) for _ in range(choose(range(3)))}
    return State(tensors, metadata, (), "safetensors")


def _everything(loaded: Adapter | Checkpoint) -> None:
    """Its ΔW, and all that can be written of it."""
    if isinstance(loaded, Checkpoint):
        for form in FORMS:
            try:
                for output in outputs(loaded, form, []):  # type: ignore[arg-type]
                    _read(output)
            except PersonaError as error:
                _said(error)
            except (KeyError, IndexError):  # told as "not complete" by the conversion
                continue
        return
    for name, dialect in _dialects().items():
        target = Target(Path("out"), name, dialect)
        try:
            made = plan_for(loaded, target)
            made.demand()
            for output in dialect.write(made.adapter):
                _read(output)
        except PersonaError as error:
            _said(error)
    deltas = loaded.deltas()
    for module in deltas:
        try:
            deltas[module]
        except PersonaError as error:
            _said(error)


def _read(output: Output) -> None:
    for ref in output.tensors.values():
        if ref.nbytes <= LARGEST:
            assert ref.read().nbytes == ref.nbytes


def _said(error: PersonaError) -> None:
    assert error.message and "\n" not in error.message, repr(error.message)


TARGETS = {"bytes": from_bytes, "names": from_names}
