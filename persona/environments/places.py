"""Where the environments of frameworks lie, and which Python a backend's worker is started with."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def data_folder() -> Path:
    """The user's data folder for persona: $PERSONA_DATA, else where this system keeps such things."""
    own = os.environ.get("PERSONA_DATA")
    if own:
        return Path(own).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "persona"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "persona"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "persona"


def environment_folder(name: str) -> Path:
    """Where the environment of a backend lies, or will."""
    return data_folder() / "environments" / name


def python_in(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python"


def packages_in(folder: Path) -> Path | None:
    """The site-packages of a virtual environment, if there are any."""
    if sys.platform == "win32":
        return folder / "Lib" / "site-packages"
    return next(iter(sorted(folder.glob("lib/python3*/site-packages"))), None)


def variable_of(name: str) -> str:
    """The environment variable that names a Python of the user's own for a backend: PERSONA_PADDLE_PYTHON."""
    return f"PERSONA_{name.upper().replace('-', '_')}_PYTHON"


def own_python(name: str) -> Path | None:
    """The Python that the user has named for a backend."""
    told = os.environ.get(variable_of(name))
    return Path(told).expanduser().absolute() if told else None
