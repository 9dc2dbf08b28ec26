"""A run in two processes on the CPU is the run in one, and ends cleanly when one is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ppdiffusers", reason="the Paddle environment is not here: persona backends setup paddle")

from tests.several import two_processes_and_one_again


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_until_one_is_killed(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_processes_and_one_again("paddle", toys, tmp_path, monkeypatch)
