"""What many tests need: the command line as a function, plugins for a while, a narrow base, a few pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two busy threads on shared cores are slower than one

import pytest

import persona.api
from persona.core.host import host as host_module
from persona.core.host.host import Candidate


@dataclass(frozen=True)
class Answer:
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the user's caches, environments or plugins, nor leaves a host with another test's plugins behind."""
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path_factory.getbasetemp() / "persona-cache"))
    monkeypatch.setenv("PERSONA_DATA", str(tmp_path_factory.getbasetemp() / "persona-data"))
    own = [name for name in os.environ if name.startswith("PERSONA_") and name.endswith("_PYTHON")]
    for name in ("PERSONA_PLUGINS", "PERSONA_STRICT_PLUGINS", "PERSONA_DEBUG", "PERSONA_TRACE", *own):
        monkeypatch.delenv(name, raising=False)
    persona.api.host.cache_clear()
    yield
    persona.api.host.cache_clear()


@pytest.fixture
def persona_(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`persona_("train", "--help")` runs the command line in this process."""
    from persona.cli import run

    def typed(*arguments: object) -> Answer:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return typed


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`plugged(name=plugin)`: installed plugins for this test. A function stands for an import: it is called for it."""

    def install(**plugins: Any) -> None:
        found = [
            Candidate(
                name, f"persona-plugin-{name}", "1.0", plugin if callable(plugin) else lambda plugin=plugin: plugin
            )
            for name, plugin in plugins.items()
        ]
        monkeypatch.setattr(host_module, "installed_candidates", lambda: found)
        persona.api.host.cache_clear()

    return install


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base shaped like SD1.5: 64x64 pictures, random weights, steps in hundredths of a second."""
    from tests.narrow_models import narrow_pipeline

    return narrow_pipeline("tiny", tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A folder of three pictures, 64x64."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "toys"
    folder.mkdir()
    for number in range(3):
        rows, columns = np.mgrid[:64, :64]
        drawn = np.stack([rows * 4, columns * 4, np.full((64, 64), 80 * number)], axis=-1)
        Image.fromarray(drawn.astype(np.uint8)).save(folder / f"toy-{number}.png")
    return folder
