"""Every adapter that another program wrote, against the ΔW that program computes (tests/fixtures/index.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import persona
from persona.formats.models import ldm_unet

FIXTURES = Path(__file__).parent.parent / "fixtures"
ROWS = [row for row in json.loads((FIXTURES / "index.json").read_text()) if row["kind"] == "lora"]


def canonical(name: str, row: dict[str, Any]) -> str:
    """The fixture's name for a module as `component.diffusers path`."""
    if row["expected_names"] == "ldm":
        path = ldm_unet.to_diffusers(name.removeprefix("model.diffusion_model."))
        assert path is not None, name
        return f"unet.{path}"
    return (row.get("expected_prefix") or "") + name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['file']}@{row['alpha']}")
def test_the_peers_own_delta_comes_out(row: dict[str, Any]) -> None:
    adapter = persona.load(FIXTURES / row["file"], alpha=row["alpha"])
    assert adapter.leftovers == []
    assert adapter.family == row["family"] or row["family"] in adapter.families, (adapter.family, adapter.families)
    base = dict(np.load(FIXTURES / row["base_weights"])) if row.get("base_weights") else None
    deltas = adapter.deltas(base)
    with np.load(FIXTURES / row["expected"]) as expected:
        names = [name for name in expected.files if name.startswith(row.get("expected_only") or "")]
        assert names
        for name in names:
            made = deltas[canonical(name, row)]
            assert made.dtype == np.float32 and made.shape == expected[name].shape, name
            np.testing.assert_allclose(
                made, row["expected_factor"] * expected[name], rtol=1e-5, atol=row["atol"], err_msg=name
            )
