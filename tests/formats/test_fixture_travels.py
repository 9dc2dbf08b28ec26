"""Every peer-made adapter through every dialect that is written, against the ΔW its own program computed (P4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import persona
from persona.core.adapters.conversion import Plan, plan
from persona.core.adapters.entry import Adapter
from persona.core.host.contracts import State, Told
from persona.core.host.errors import ConversionError
from persona.formats.dialects.recognise import DIALECTS

FIXTURES = Path(__file__).parent.parent / "fixtures"
ROWS = [row for row in json.loads((FIXTURES / "index.json").read_text()) if row["kind"] == "lora"]
FILES = {row["file"]: row for row in ROWS if not row.get("base_weights") and row["expected_names"] == "diffusers"}
TARGETS = [name for name in DIALECTS if name not in ("xlabs", "cloneofsimo", "peft")]


def planned(adapter: Adapter, target: str) -> Plan:
    dialect = DIALECTS[target]
    slots = dialect.slots.within(dialect.slots.containers[0])
    return plan(adapter, slots, target, fused_path=dialect.joined(adapter))


@pytest.mark.parametrize("file", FILES)
def test_the_peers_delta_is_what_arrives_in_every_dialect(file: str) -> None:
    row: dict[str, Any] = FILES[file]
    adapter = persona.load(FIXTURES / file, alpha=row["alpha"], family=row["family"])
    arrived = 0
    with np.load(FIXTURES / row["expected"]) as archive:
        prefix = row.get("expected_prefix") or ""
        expected = {prefix + name: row["expected_factor"] * archive[name] for name in archive.files}
    for target in TARGETS:
        made = planned(adapter, target)
        if made.refusals:
            continue
        dialect = DIALECTS[target]
        (output,) = dialect.write(made.adapter)
        state = State(output.tensors, output.metadata, (), dialect.slots.containers[0])
        again = dialect.read(state, Told(family=row["family"])).deltas()
        common = expected.keys() & adapter.deltas().keys()
        assert common
        for name in common:
            got = again[name].reshape(expected[name].shape)
            np.testing.assert_allclose(
                got, expected[name], rtol=1e-5, atol=max(row["atol"], 1e-6), err_msg=f"{target} {name}"
            )
        arrived += 1
    assert arrived >= 4  # kohya, comfy, diffusers and ppdiffusers at least hold everything a peer wrote


def test_dora_stays_where_there_is_a_place_for_it_and_is_refused_elsewhere() -> None:
    adapter = persona.load(FIXTURES / "torch/peft_dora")
    base = dict(np.load(FIXTURES / "torch/peft_dora/base.npz"))
    before = adapter.deltas(base)
    for target in ("kohya", "comfy", "diffusers"):
        (output,) = DIALECTS[target].write(planned(adapter, target).adapter)
        after = DIALECTS[target].read(State(output.tensors, output.metadata), Told(family="sd1")).deltas(base)
        for name in before:
            np.testing.assert_array_equal(after[name], before[name])
    for target in ("diffusers-legacy", "ppdiffusers", "mindone", "mindpet", "diffsynth"):
        with pytest.raises(ConversionError):
            planned(adapter, target).demand()
