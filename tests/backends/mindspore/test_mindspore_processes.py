"""Two processes of a MindSpore cluster on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mindone", reason="the MindSpore environment is not here: persona backends setup mindspore")

from persona.core.host.errors import BackendMissing
from persona.environments.remote import BOOT
from persona.plugins.backends.mindspore import MindSporeBackend


@pytest.mark.slow
def test_figures_and_gradients_of_two_processes_become_one_sum(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here)]),
        "PERSONA_TEST_RESULT": str(tmp_path),
        "PERSONA_TEST_WAIT": "31",
        "OMP_NUM_THREADS": "1",
    }
    line = MindSporeBackend().launch_line(2, str(BOOT), "two_processes", tmp_path)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert found[0] == found[1]
    both, one = [[3.0] * 2] * 3, [[5.0] * 2] * 3
    assert found[0] == {"count": 2, "sum": [[3.0, 30.0, 2e-17]], "both": both, "one": one, "none": True}


def test_devices_that_are_not_there_are_refused() -> None:
    assert MindSporeBackend().devices("cpu", 2) == ("cpu", "cpu")
    with pytest.raises(BackendMissing, match="only cpu"):
        MindSporeBackend().devices("npu", 2)
