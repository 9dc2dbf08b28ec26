"""Two processes on the CPU, started by paddle.distributed.launch."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ppdiffusers", reason="the Paddle environment is not here: persona backends setup paddle")

from persona.core.host.errors import BackendMissing, UsageError
from persona.plugins.backends.paddle import PaddleBackend
from tests.several import what_two_found


@pytest.mark.slow
def test_figures_and_gradients_of_two_processes_become_one_sum(tmp_path: Path) -> None:
    found = what_two_found(PaddleBackend(), Path(__file__).parent, tmp_path)
    assert found == {"count": 2, "sum": [[3.0, 30.0]], "both": [[3.0] * 2] * 3, "one": [[5.0] * 2] * 3, "none": True}


def test_devices_that_are_not_there_are_refused() -> None:
    assert PaddleBackend().devices("cpu", 2) == ("cpu", "cpu")
    with pytest.raises(BackendMissing, match="only cpu"):
        PaddleBackend().devices("cuda", 2)
    with pytest.raises(UsageError, match="does not run on mps"):
        PaddleBackend().devices("mps", 2)
