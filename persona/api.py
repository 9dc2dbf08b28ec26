"""What programs call. Every function imports what it needs when it is called, so that importing this costs nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from persona.core.adapters.entry import Adapter, Checkpoint
    from persona.core.adapters.tensor import TensorRef
    from persona.core.host.host import Host
    from persona.core.training.events import Emit
    from persona.core.training.run import RunFolder
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
) -> Adapter | Checkpoint:
    """What an adapter file or folder means: `deltas()`, `embeddings`, `notes`, `leftovers`. A whole model is a
    `Checkpoint`: `components[name][parameter]` under diffusers' names, lazily.

    `alpha` fills what the file leaves open (`override_alpha` lets it replace what the file says); `family`, or the
    family of the model `base`, settles what the names leave open. Raises PersonaError."""
    from persona.core.host.errors import UnreadableFile
    from persona.exchange.load import load_adapter

    if base is not None and family is None:
        from persona.hub.bases import open_base

        family = open_base(str(base)).family
    try:
        return load_adapter(Path(path), host(), alpha=alpha, override_alpha=override_alpha, family=family)
    except UnreadableFile as problem:
        from persona.exchange.models import load_model

        return load_model(Path(path), host(), problem, family=family)


def read_state(path: str | os.PathLike[str]) -> Mapping[str, TensorRef]:
    """Names to lazy tensors exactly as the file has them, from any container; scalars and strings too.
    `numpy.asarray(ref)` reads one. Raises PersonaError."""
    from persona.exchange.load import open_state

    return open_state(Path(path), host())[1].tensors


def save(
    obj: Adapter | Checkpoint,
    path: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write an adapter in the dialect `to` (default: that of the path's ending), its weights in `dtype` ("float16",
    "bfloat16", "float32"; default: as they are); a whole model in the form `to` (ldm, diffusers, ppdiffusers,
    mindspore, wukong). Nothing is overwritten unless `force`. Raises PersonaError."""
    from persona.core.adapters.entry import Checkpoint
    from persona.exchange.save import save_adapter

    if isinstance(obj, Checkpoint):
        from persona.exchange.convert import Wish
        from persona.exchange.models import converted_model

        converted_model(obj, Path(path), Wish(to=to, dtype=dtype, force=force), host())
        return Path(path)
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


def train(
    method: str,
    data: str | os.PathLike[str] | None,
    *,
    base: str | os.PathLike[str] = "mini",
    backend: str | None = None,
    emit: Emit | None = None,
    **options: Any,
) -> RunFolder:
    """Train `method` on the folder of pictures `data` (None: the shipped example) and return the finished run, whose
    `product` is the adapter file or the folder of changed weights.

    `options` are the keys of a recipe: the method's options and the settings every method shares, `output`, `device`.
    `emit` is called with every event (persona.core.training.events). Raises PersonaError."""
    from persona.runs.assemble import assemble
    from persona.runs.training import start

    typed = {"method": method, "data": data, "base": base, "backend": backend, **options}
    wanted = assemble(host(), [], _given(typed), default_recipe=None)
    for note in wanted.notes:
        _hear(emit, note)
    return start(wanted.recipe, host(), emit=emit or _quiet, stop=_never)


def resume(
    run: str | os.PathLike[str] | RunFolder,
    *,
    allow_change: bool = False,
    emit: Emit | None = None,
    **options: Any,
) -> RunFolder:
    """Go on with a run exactly where its last checkpoint is, with what `options` change (`steps=500` trains further).

    Raises ResumeError when data, base or options are not what they were, unless `allow_change`."""
    from persona.runs.assemble import assemble
    from persona.runs.training import resume as go_on

    folder = Path(run) if isinstance(run, (str, os.PathLike)) else run.path
    wanted = assemble(host(), [], _given({"resume_path": str(folder), **options}), default_recipe=None)
    assert wanted.run is not None
    return go_on(wanted.run, wanted.recipe, host(), allow_change=allow_change, emit=emit or _quiet, stop=_never)


def generate(
    prompts: str | Sequence[str],
    *,
    base: str | os.PathLike[str] = "mini",
    adapters: Iterable[str | os.PathLike[str] | tuple[str | os.PathLike[str], float]] = (),
    seed: int = 0,
    **options: Any,
) -> list[Image]:
    """Pillow pictures: prompt by prompt, `count` of each, with seeds `seed`, `seed` + 1, …

    `adapters` are files of any format, each with its strength as ("cat.safetensors", 0.8) or alone for 1. `options` are
    the fields of persona.runs.generate.Wish: count, negative_prompt, width, height, steps, guidance_scale, sampler,
    backend, device, precision, batch. Raises PersonaError."""
    from persona.core.host.errors import UsageError, did_you_mean
    from persona.runs.generate import Wish, make_pictures, parse_adapter

    for name in options:
        if name not in Wish.__dataclass_fields__:
            raise UsageError(f"There is no option {name}. {did_you_mean(name, Wish.__dataclass_fields__)}")
    pairs = tuple(
        (str(found[0]), float(found[1])) if isinstance(found, tuple) else parse_adapter(str(found))
        for found in adapters
    )
    listed = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    wish = Wish(prompts=listed, base=str(base), adapters=pairs, seed=seed, **options)
    return make_pictures(wish, host())


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    paths = {name: str(value) for name, value in values.items() if isinstance(value, os.PathLike)}
    return {name: value for name, value in values.items() if value is not None} | paths


def _hear(emit: Emit | None, text: str) -> None:
    from persona.core.training.events import Note

    if emit is not None:
        emit(Note(text))


def _quiet(event: object) -> None:
    """Nobody listens."""


def _never() -> bool:
    return False
