"""What programs call. Every function imports what it needs when it is called, so that importing this costs nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persona.core.adapters.entry import Adapter
    from persona.core.adapters.tensor import TensorRef
    from persona.core.host.host import Host


@functools.lru_cache(maxsize=8)
def host(without: tuple[str, ...] = ()) -> Host:
    """The plugin host: persona's own plugins, then the installed ones (PERSONA_PLUGINS names those to take)."""
    from persona.core.host.host import Host
    from persona.plugins import builtin

    wanted = os.environ.get("PERSONA_PLUGINS")
    only = None if wanted is None else [name.strip() for name in wanted.split(",") if name.strip()]
    return Host([("persona", builtin)], only=only, without=without)


def load(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    override_alpha: bool = False,
    family: str | None = None,
) -> Adapter:
    """What an adapter file means: `deltas()`, `embeddings`, `notes`. `alpha` fills what the file leaves open."""
    from persona.exchange.load import load_adapter

    return load_adapter(Path(path), host(), alpha=alpha, override_alpha=override_alpha, family=family)


def read_state(path: str | os.PathLike[str]) -> Mapping[str, TensorRef]:
    """Names to lazy tensors exactly as the file has them, from any container; scalars and strings too."""
    from persona.exchange.load import open_state

    return open_state(Path(path), host())[1].tensors


def save(obj: Adapter, path: str | os.PathLike[str], *, to: str | None = None) -> Path:
    """Write an adapter in the dialect `to` (default: that of the file's ending). Nothing is overwritten."""
    from persona.exchange.save import save_adapter

    save_adapter(obj, Path(path), host(), to=to)
    return Path(path)
