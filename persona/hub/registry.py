"""Reads registry.yaml: base models by short name, and the shipped example subjects."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent


@functools.lru_cache(maxsize=1)
def registry() -> dict[str, Any]:
    """The registry as plain data."""
    import yaml

    document: dict[str, Any] = yaml.safe_load((PACKAGE / "registry.yaml").read_text(encoding="utf-8"))
    return document


def packaged(folder: str) -> Path:
    """The absolute path of a folder inside the package."""
    return PACKAGE / folder
