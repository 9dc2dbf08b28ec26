"""Everything a session does, on a simulated NPU: the results are the cpu's, and a tensor left behind is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(narrow: Any) -> Any:
    """What `npu_run.py` printed. A process of its own, since a device once registered stays."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE)])}
    command = [sys.executable, str(HERE / "npu_run.py"), str(narrow("sd1").path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["low rank", "decomposed", "whole weights", "new tokens"])
def test_npu_results_are_those_of_the_cpu(what: str, seen: Any) -> None:
    differences = seen["differences"][what]
    assert differences["losses"] < 1e-4 and differences["text"] < 1e-4 and differences["moments"] < 1e-4
    assert [value <= 1 for name, value in differences.items() if name.startswith("picture")] == [True], "levels of 255"
    assert max(value for name, value in differences.items() if name.startswith(("value/", "ema/"))) < 5e-4


def test_npu_refuses_a_tensor_left_on_the_cpu(seen: Any) -> None:
    assert "expected all tensors on npu:0" in seen["stray"] and "layer_norm" in seen["stray"]
