"""What a plugin registers: a light line of text about a thing, and where the thing itself can be imported from."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

API_VERSION = 1
"""Version of the contracts in `persona.core.host.contracts`. A descriptor made for another one is listed as broken."""


@dataclass(frozen=True)
class Descriptor:
    """`name` as typed by users (lower case, hyphens), one line of `summary`, and `target` as "module:attribute".

    Nothing is imported until `load` is called, so `persona --help` can list every method without a framework.
    `suffixes` are the file endings a container writes (reading goes by bytes).
    """

    name: str
    summary: str
    target: str
    suffixes: tuple[str, ...] = ()
    api: int = API_VERSION

    def load(self) -> Any:
        """Import and return the thing itself. Raises whatever its import raises; the registry turns that into words."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)
