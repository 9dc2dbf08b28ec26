"""Tiny bases and sessions of the Paddle backend; everything here is skipped where ppdiffusers is not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("ppdiffusers") is not None:
    # ppdiffusers installs a package of its own called "tests", which is found before our folder of that name
    ours = types.ModuleType("tests")
    ours.__path__ = [str(Path(__file__).parents[2])]
    sys.modules["tests"] = ours


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
    from persona.plugins.backends.paddle import PaddleBackend

    sessions = []

    def open_session(base: Any, plan: Any = None, **options: Any) -> Any:
        sessions.append(PaddleBackend().open(base, plan, Runtime("cpu", **options)))
        return sessions[-1]

    yield open_session
    for session in sessions:
        session.close()
