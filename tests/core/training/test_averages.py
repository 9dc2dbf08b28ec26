"""The decay of moving averages, against diffusers' EMAModel."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel

from persona.core.training.averages import average_decay


@pytest.mark.parametrize("limit", [0.5, 0.99, 0.9999])
@pytest.mark.parametrize("update", [1, 2, 3, 10, 500, 100_000])
def test_the_decay_rises_as_in_diffusers(limit: float, update: int) -> None:
    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=limit).get_decay(update)
    assert average_decay(limit, update) == pytest.approx(theirs, abs=1e-12)
