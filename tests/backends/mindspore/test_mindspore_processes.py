"""Two processes of a MindSpore cluster on the CPU."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

pytest.importorskip("mindone", reason="the MindSpore environment is not here: persona backends setup mindspore")

from persona.core.host.errors import BackendMissing
from persona.plugins.backends.mindspore import MindSporeBackend, launcher
from tests.several import what_two_found


@pytest.mark.slow
def test_figures_and_gradients_of_two_processes_become_one_sum(tmp_path: Path) -> None:
    found = what_two_found(MindSporeBackend(), Path(__file__).parent, tmp_path)
    both, one = [[3.0] * 2] * 3, [[5.0] * 2] * 3
    assert found == {"count": 2, "sum": [[3.0, 30.0, 2e-17]], "both": both, "one": one, "none": True}


def test_devices_that_are_not_there_are_refused() -> None:
    assert MindSporeBackend().devices("cpu", 2) == ("cpu", "cpu")
    with pytest.raises(BackendMissing, match="only cpu"):
        MindSporeBackend().devices("npu", 2)


def test_the_schedulers_port_is_nobodys_and_not_one_that_is_given_to_whoever_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = launcher.free_port()
    assert 20000 <= free < 32768
    with socket.create_server(("127.0.0.1", free)):
        monkeypatch.setattr(launcher.random, "sample", lambda *_: [free])
        with pytest.raises(OSError, match="no port between"):
            launcher.free_port()
    assert launcher.free_port() == free
