"""persona: personalise text-to-image diffusion models with any method on any framework, and take the result anywhere.

The public names are imported when they are first used, so that `import persona` costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # so that type checkers see through the lazy names
    from persona.api import convert, generate, inspect, load, read_state, resume, save, train
    from persona.core.adapters.entry import Adapter, Checkpoint
    from persona.core.host.descriptor import Descriptor
    from persona.core.host.errors import PersonaError
    from persona.core.host.hooks import hookimpl

__version__ = "0.1.0"

_PUBLIC = {
    "load": "persona.api",
    "save": "persona.api",
    "read_state": "persona.api",
    "convert": "persona.api",
    "inspect": "persona.api",
    "train": "persona.api",
    "resume": "persona.api",
    "generate": "persona.api",
    "hookimpl": "persona.core.host.hooks",
    "Descriptor": "persona.core.host.descriptor",
    "PersonaError": "persona.core.host.errors",
    "Adapter": "persona.core.adapters.entry",
    "Checkpoint": "persona.core.adapters.entry",
}
__all__ = [
    "Adapter",
    "Checkpoint",
    "Descriptor",
    "PersonaError",
    "__version__",
    "convert",
    "generate",
    "hookimpl",
    "inspect",
    "load",
    "read_state",
    "resume",
    "save",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'persona' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
