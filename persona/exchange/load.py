"""From a path to its meaning: container by bytes, spelling by grammar, family by evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona.core.adapters.entry import Adapter, Source
from persona.core.host.contracts import State, Told
from persona.core.host.errors import UnreadableFile
from persona.core.host.host import Host
from persona.exchange.choices import containers
from persona.formats.containers.open import identify
from persona.formats.dialects.embeddings.read import recognise, split_bundle


def open_state(path: Path, host: Host) -> tuple[str, State]:
    """(container's name, what is in the file)."""
    if not path.exists():
        raise UnreadableFile(f"There is no file {path}.", hint=f"See what is there: ls {path.parent}")
    container = identify(path, containers(host))
    return container.name, container.read(path)


def load_adapter(
    path: Path, host: Host, *, alpha: float | None = None, override_alpha: bool = False, family: str | None = None
) -> Adapter:
    """The adapter or embedding in a file. Raises UnreadableFile when no spelling explains it."""
    container, state = open_state(path, host)
    told = Told(
        alpha,
        override_alpha,
        family,
        str(path),
        tuple(sorted(beside.name for beside in path.parent.iterdir())),
        configs_beside(path),
    )
    reading = recognise(state, file_stem=path.stem)
    if reading is not None:
        return Adapter(
            family,
            {},
            list(reading.embeddings),
            dict(state.metadata),
            Source(str(path), container, reading.form),
            [*state.notes, *reading.notes],
            list(reading.leftovers),
        )
    bundled, rest = split_bundle(state, file_stem=path.stem)
    adapter = best_dialect(path, rest, told, host).read(rest, told)
    adapter.embeddings = [*adapter.embeddings, *bundled]
    source = adapter.source
    adapter.source = Source(str(path), container, source.dialect if source else "")
    adapter.notes = [*state.notes, *(note for note in adapter.notes if note not in state.notes)]
    return adapter


def best_dialect(path: Path, state: State, told: Told, host: Host) -> Any:
    """The dialect that explains most keys. Raises UnreadableFile when none explains one."""
    found = []
    for name in host.provided("dialect"):
        dialect = host.load("dialect", name)
        evidence = dialect.detect(state, told.siblings)
        if evidence.score > 0:
            found.append((evidence.score, getattr(dialect, "priority", 0), dialect))
    if not found:
        keys = list(state.tensors)
        raise UnreadableFile(
            f"{path} is no adapter that persona knows: none of its {len(keys)} keys is named like one "
            f"(such as {', '.join(keys[:3])}).",
            hint=f"Look into it: persona inspect {path}",
        )
    return max(found, key=lambda item: item[:2])[2]


def configs_beside(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The small JSON files next to an adapter that say something about it (PEFT's adapter_config.json)."""
    file = path.parent / "adapter_config.json"
    if not file.is_file() or file.stat().st_size > 1 << 20:
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return {file.name: document} if isinstance(document, dict) else {}
