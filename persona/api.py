"""What programs call. Every function imports what it needs when it is called, so that importing this costs nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona.core.adapters.entry import Adapter
    from persona.core.adapters.tensor import TensorRef
    from persona.core.host.host import Host
    from persona.exchange.report import Report


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
    base: str | os.PathLike[str] | None = None,
) -> Adapter:
    """What an adapter file or folder means: `deltas()`, `embeddings`, `notes`, `leftovers`.

    `alpha` fills what the file leaves open (`override_alpha` lets it replace what the file says); `family`, or the
    family of the model `base`, settles what the names leave open. Raises PersonaError."""
    from persona.exchange.load import load_adapter

    if base is not None and family is None:
        from persona.hub.bases import open_base

        family = open_base(str(base)).family
    return load_adapter(Path(path), host(), alpha=alpha, override_alpha=override_alpha, family=family)


def read_state(path: str | os.PathLike[str]) -> Mapping[str, TensorRef]:
    """Names to lazy tensors exactly as the file has them, from any container; scalars and strings too.
    `numpy.asarray(ref)` reads one. Raises PersonaError."""
    from persona.exchange.load import open_state

    return open_state(Path(path), host())[1].tensors


def save(
    obj: Adapter,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write an adapter in the dialect `to` (default: that of the path's ending), its weights in `dtype` ("float16",
    "bfloat16", "float32"; default: as they are). Nothing is overwritten unless `force`. Raises PersonaError."""
    from persona.exchange.save import save_adapter

    save_adapter(obj, Path(path), host(), to=to, dtype=dtype, force=force)
    return Path(path)


def convert(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    to: str | None = None,
    **options: Any,
) -> Report:
    """Convert one file (or several that are one adapter in parts) into `destination`; returns what was written, what
    happened to each module and the decisions. `options` are the fields of persona.exchange.convert.Wish: alpha,
    override_alpha, family, dtype, rank, fixes, allow_leftovers, force, dry_run, certificate. Raises PersonaError."""
    from persona.exchange.convert import Wish
    from persona.exchange.convert import convert as run

    listed = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    return run([Path(source) for source in listed], Path(destination), Wish(to=to, **options), host())


def inspect(path: str | os.PathLike[str], *, quick: bool = False) -> dict[str, Any]:
    """What `persona inspect --json` prints of one file or adapter folder. Raises PersonaError."""
    from persona.exchange.inspect import inspect_path

    return inspect_path(Path(path), host(), quick=quick)
