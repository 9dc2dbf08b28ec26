"""What is there of an environment: nothing, a half-built one, one for other pins, or one that is ready."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from persona.environments.frameworks import FRAMEWORKS, Framework
from persona.environments.places import environment_folder, own_python, python_in, variable_of

READY = "ready.json"
"""Written last, in one piece: without it an environment is half built."""


@dataclass(frozen=True)
class Found:
    """The state of a framework's environment. `told` is what setting it up has found out: versions, capabilities by
    device, size; `reason` says in words why it cannot be used, `hint` is the line to type."""

    state: Literal["missing", "half built", "outdated", "ready", "own", "own missing"]
    python: Path
    reason: str = ""
    hint: str = ""
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """Whether a worker can be started in it."""
        return self.state in ("ready", "own")


def find(framework: Framework) -> Found:
    """What is there of `framework`. Starts nothing and imports nothing."""
    name = framework.name
    own = own_python(name)
    if own is not None:
        return find_own(name, own)
    folder, line = environment_folder(name), f"persona backends setup {name}"
    python = python_in(folder)
    if not folder.is_dir():
        return Found("missing", python, "its environment is not set up", line)
    told = read_ready(folder)
    if told is None or not python.exists():
        return Found("half built", python, f"its environment is half built ({folder})", line)
    if told.get("pins") != framework.digest:
        reason = "its environment was set up with other versions than this persona was tested with"
        return Found("outdated", python, reason, line, told)
    if told.get("source") != source_digest(name):
        told.pop("capabilities", None)  # persona's own part has changed since: it has to be asked again
    return Found("ready", python, told=told)


def source_digest(name: str) -> str:
    """Of the source of a backend in this persona, which decides what it can do in the same environment."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parents[1] / "plugins" / "backends" / name).glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def find_own(name: str, python: Path) -> Found:
    """The state of an environment that the user has named himself."""
    if not python.is_file():
        reason = f"{variable_of(name)} names {python}, which is not there"
        return Found("own missing", python, reason, f"Name a Python: {variable_of(name)}=/path/to/bin/python")
    return Found("own", python)


def find_for(backend: str) -> Found | None:
    """The environment of a backend by its name; None when it has none and needs none."""
    if backend in FRAMEWORKS:
        return find(FRAMEWORKS[backend])
    own = own_python(backend)
    return find_own(backend, own) if own is not None else None


def read_ready(folder: Path) -> dict[str, Any] | None:
    """What setting up has written at its end; None when it never came to that."""
    try:
        told = json.loads((folder / READY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) else None
