"""A session whose model is in parts, one in each of two processes, is the session with the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.backends.torch.in_parts import JOBS, found, work
from tests.forked import together

pytestmark = pytest.mark.slow  # all of it in one fixture

Found = dict[str, Any]
Apart = tuple[Found, Found, Found]
"""What one process found, and what the first and the second of two did."""


@pytest.fixture(scope="module")
def apart(narrow: Any) -> dict[str, Apart]:
    folders = {kind: str(narrow(kind).path) for kind in {job.kind for job in JOBS.values()}}
    alone = {name: found(folders[job.kind], name, None) for name, job in JOBS.items()}
    for name, job in JOBS.items():
        save_file(alone[name]["state"], Path(folders[job.kind]) / f"{name}.safetensors")
    two = together(2, work, folders, list(JOBS))
    return {name: (alone[name], two[0][name], two[1][name]) for name in JOBS}


def norm(arrays: dict[str, Any]) -> float:
    return float(np.linalg.norm([np.linalg.norm(array) for array in arrays.values()]))


def relative(arrays: dict[str, Any], others: dict[str, Any]) -> float:
    """The largest relative Frobenius norm of the difference, of a kind of array (values, moments, averages)."""
    assert arrays.keys() == others.keys()
    kinds = {name.partition("/")[0] for name in arrays}
    return max(
        norm({name: arrays[name] - others[name] for name in arrays if name.startswith(kind)})
        / max(norm({name: others[name] for name in others if name.startswith(kind)}), 1e-30)
        for kind in kinds
    )


@pytest.mark.parametrize("name", JOBS)
def test_losses_norms_and_state_are_those_of_one_process(name: str, apart: dict[str, Apart]) -> None:
    alone, first, second = apart[name]
    together = [np.concatenate(both) for both in zip(first["losses"], second["losses"], strict=True)]
    close = {"rtol": 2e-3} if name == "fp16" else {"rtol": 1e-5}
    np.testing.assert_allclose(np.stack(together), np.stack(alone["losses"]), **close)
    np.testing.assert_allclose(first["norms"], alone["norms"], **close)
    np.testing.assert_array_equal(first["norms"], second["norms"])
    assert relative(first["state"], alone["state"]) < (2e-2 if name == "fp16" else 1e-5)


def test_a_gradient_that_overflows_in_one_process_is_skipped_in_both(apart: dict[str, Apart]) -> None:
    for who in apart["fp16"]:
        assert who["skipped"] == [False, True, False]


@pytest.mark.parametrize("name", JOBS)
def test_a_state_is_cut_and_put_together_again_bit_by_bit(name: str, apart: dict[str, Apart]) -> None:
    alone, first, _ = apart[name]
    assert first["again"].keys() == alone["state"].keys()
    assert all(np.array_equal(first["again"][key], value) for key, value in alone["state"].items())


@pytest.mark.parametrize(("name", "spread"), [("lora", ["unet"]), ("sdxl", ["unet", "text_encoder", "text_encoder_2"])])
def test_a_process_holds_half_of_what_is_spread(name: str, spread: list[str], apart: dict[str, Apart]) -> None:
    alone, first, second = apart[name]
    for component, whole in alone["held"].items():
        both = first["held"][component] + second["held"][component]
        assert both == (whole if component in spread else 2 * whole)
        if component in spread:
            assert 0.49 < first["held"][component] / whole < 0.52


def test_what_is_looked_at_between_steps_is_of_the_averages(apart: dict[str, Apart]) -> None:
    alone, first, second = apart["weights"]
    for who in (first, second):
        np.testing.assert_allclose(who["validation"], alone["validation"], rtol=1e-5)
        assert np.abs(who["pictures"].astype(int) - alone["pictures"]).max() <= 1
    both = np.concatenate([first["losses"][-1], second["losses"][-1]])
    np.testing.assert_allclose(both, alone["losses"][-1], rtol=1e-5, err_msg="trained on with old weights")


def test_the_product_is_whole_in_the_first_process(apart: dict[str, Apart]) -> None:
    alone, first, _ = apart["weights"]
    whole, expected = ({f"value/{name}": array for name, array in who["product"].items()} for who in (first, alone))
    assert relative(whole, expected) < 1e-5
    frozen = [name for name in alone["product"] if name.startswith("unet.") and ".mid_block." not in name]
    assert frozen and all(np.array_equal(first["product"][name], alone["product"][name]) for name in frozen[:50])
