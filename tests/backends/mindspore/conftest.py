"""Tiny bases and sessions of the MindSpore backend; everything here is skipped where mindone is not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def no_folder_is_torch() -> None:
    """pytest puts tests/backends on the path when it collects a file there. Where torch is not installed, the folder
    tests/backends/torch would then be it, and scipy, which mindone imports, stumbles over a torch without Tensor."""
    here = Path(__file__).parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").absolute() != here]
    if not hasattr(sys.modules.get("torch"), "__version__"):
        sys.modules.pop("torch", None)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`tiny("tiny")` is SD1.5 with few layers, `tiny("tiny-sdxl")` SDXL; the same bytes in every environment."""
    from tests.numpy_base import numpy_base

    made: dict[str, Any] = {}

    def base(kind: str = "tiny") -> Any:
        if kind not in made:
            made[kind] = numpy_base(kind, tmp_path_factory.mktemp("bases") / kind)
        return made[kind]

    return base


@pytest.fixture
def opened() -> Any:
    """Open sessions on the cpu, closed after the test."""
    from persona.core.host.contracts import Runtime
    from persona.plugins.backends.mindspore import MindSporeBackend

    sessions = []

    def open_session(base: Any, plan: Any = None, **options: Any) -> Any:
        sessions.append(MindSporeBackend().open(base, plan, Runtime("cpu", **options)))
        return sessions[-1]

    yield open_session
    for session in sessions:
        session.close()
