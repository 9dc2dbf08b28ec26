"""What the MindSpore backend computes is what torch computed on the same bytes (tests/backends/golden)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindone", reason="the MindSpore environment is not here: persona backends setup mindspore")

from tests.backends.golden import cases as golden

KINDS = ("tiny", "tiny-sdxl")
CASES = ("low rank", "decomposed, with text encoder", "new tokens", "whole weights")


@pytest.fixture(scope="module")
def torchs() -> dict[str, np.ndarray]:
    with np.load(golden.FILE) as file:
        return dict(file)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_plan_moments_text_and_pictures_are_torchs(kind: str, tiny: Any, opened: Any, torchs: Any) -> None:
    session = opened(tiny(kind))
    mean, logvar = session.encode_pictures(golden.pictures())
    np.testing.assert_allclose(mean, torchs[f"{kind}/mean"], atol=2e-5)
    np.testing.assert_allclose(logvar, torchs[f"{kind}/logvar"], atol=2e-5)
    text = session.encode_text(golden.PROMPTS)
    assert {f"{kind}/text/{key}" for key in text} == {key for key in torchs if key.startswith(f"{kind}/text/")}
    for key, value in text.items():
        np.testing.assert_allclose(value[:, ::7], torchs[f"{kind}/text/{key}"], atol=2e-5)
    pictures, expected = session.sample(golden.REQUEST), torchs[f"{kind}/sample"]
    difference = np.abs(pictures.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and expected.std() > 5, f"{difference.max()} levels apart"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_torchs(kind: str, case: str, tiny: Any, opened: Any, torchs: Any) -> None:
    base = tiny(kind)
    session = opened(base, golden.cases(base)[case])
    session.load_state(golden.start_values(session.state()))
    losses = np.stack([session.accumulate(golden.batch_of(base, case, number=number)) for number in (0, 1)])
    np.testing.assert_allclose(losses, torchs[f"{kind}/{case}/losses"], rtol=2e-5)
    names, found = session._optimizer.names, session._optimizer.gradients  # where torch has none, neither is here
    gradients = {name: found.get(name, np.zeros(value.shape, np.float32)) for name, value in names.items()}
    norms = np.array([np.linalg.norm(gradients[name].ravel()) for name in sorted(gradients)])
    largest = float(torchs[f"{kind}/{case}/norms"].max())
    np.testing.assert_allclose(norms, torchs[f"{kind}/{case}/norms"], rtol=1e-4, atol=1e-5 * largest)
    kept = np.concatenate([gradients[name].ravel() for name in golden.kept_whole(case, gradients)])
    expected = torchs[f"{kind}/{case}/gradients"]
    np.testing.assert_allclose(kept, expected, rtol=1e-4, atol=2e-5 * float(np.abs(expected).max()))
