"""Files with adapter-like names and any shapes: read and converted, or refused with persona's own error (P7)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import persona
from persona.api import host
from persona.exchange.choices import suffix_for
from tools.fuzz.targets import from_names
from tools.fuzz.vocabulary import PAIRS, PATHS, PREFIXES, SUFFIXES

DTYPES = [np.float16, np.float32, np.int32, np.bool_]
sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 12]), max_size=4).map(tuple)
dtypes = st.sampled_from(DTYPES)
single = st.tuples(st.sampled_from(PREFIXES), st.sampled_from(PATHS), st.sampled_from(SUFFIXES), sizes, dtypes).map(
    lambda parts: [("".join(parts[:3]).strip("."), parts[3], parts[4])]
)


@st.composite
def module(draw):
    """The keys of one module, mostly in shapes that fit."""
    stem = draw(st.sampled_from(PREFIXES)).removeprefix(".") + draw(st.sampled_from(PATHS))
    suffixes = draw(st.sampled_from(PAIRS))
    width, rank, out = draw(st.tuples(*[st.sampled_from([1, 2, 4, 12])] * 3))
    fitting = [(rank, width), (out, rank), (rank, width), (out, rank), (), (out,), (out, 1)]
    found = []
    for number, suffix in enumerate(suffixes):
        shape = draw(sizes) if draw(st.integers(0, 7)) == 0 else fitting[number]
        shape = () if suffix == ".alpha" and len(shape) == 2 else shape
        found.append((stem + suffix, shape, draw(dtypes) if draw(st.integers(0, 9)) == 0 else np.float32))
    return found


files = st.lists(st.one_of(module(), module(), single), min_size=1, max_size=4).map(
    lambda parts: [key for part in parts for key in part]
)
metadata = st.dictionaries(
    st.sampled_from(["lora_adapter_metadata", "ss_network_dim", "ss_network_args", "ss_base_model_version", "format"]),
    st.sampled_from(['{"unet.r": 4, "unet.lora_alpha": 2}', "{}", "[]", "{", "None", "4", "sdxl_base", "pd", "np", ""]),
    max_size=2,
)


def values(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    counted = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return np.asarray((counted % 7 / 8 - 0.25).astype(dtype))


@given(files, metadata)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_only_personas_own_error_comes_out(keys, words):
    dialects = list(host().provided("dialect"))
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in.safetensors"
        save_file({key: values(shape, dtype) for key, shape, dtype in keys if key}, source, metadata=words or None)
        try:
            adapter = persona.load(source)
        except persona.PersonaError as error:
            assert "\n" not in error.message
            return
        persona.inspect(source)
        for number, dialect in enumerate(dialects):
            spoken = host().load("dialect", dialect)
            ending = "" if spoken.slots.folder else suffix_for(spoken, host())
            try:
                persona.convert(source, Path(name) / f"out{number}{ending}", to=dialect, allow_leftovers=True)
                persona.load(Path(name) / f"out{number}{ending}")
            except persona.PersonaError as error:
                assert "\n" not in error.message
        for module_name in getattr(adapter, "deltas", dict)():
            try:
                adapter.deltas()[module_name]
            except persona.PersonaError:
                continue


@pytest.mark.parametrize(
    "choices",
    [
        bytes.fromhex("007e32277e275d7e322424"),  # LoKr on a 3x3 convolution whose second half has 12 columns
        bytes.fromhex("98007ed1b0818198007ed1b081db2d"),  # Flux' joined q, k, v with nothing but diff_b
        bytes.fromhex("007e26a7810100000010242424"),  # and a bias alone where a target holds LoRA only
    ],
    ids=[
        "a kernel that does not divide LoKr's second half",
        "a joined module that changes a bias alone",
        "a bias alone as LoRA",
    ],
)
def test_what_atheris_found_stays_mended(choices):
    from_names(choices)
