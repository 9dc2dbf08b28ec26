"""From a path to its meaning: container by bytes, spelling by grammar, family by evidence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona.core.adapters.entry import Adapter, Source
from persona.core.host.contracts import Evidence, State, Told
from persona.core.host.errors import PersonaError, UnreadableFile
from persona.core.host.host import Host
from persona.exchange.choices import containers
from persona.exchange.places import adapter_files, passed_over
from persona.formats.containers.open import identify
from persona.formats.containers.open_files import kept_open
from persona.formats.dialects.peft_folder import check_config

LARGEST_CONFIG = 1 << 24


def open_state(path: Path, host: Host) -> tuple[str, State]:
    """(container's name, what is in the file). Raises UnreadableFile."""
    if not path.exists():
        raise UnreadableFile(f"There is no file {path}.", hint=f"See what is there: ls {path.parent}")
    container = identify(path, containers(host))
    return container.name, replace(container.read(path), container=container.name)


def load_adapter(
    path: Path, host: Host, *, alpha: float | None = None, override_alpha: bool = False, family: str | None = None
) -> Adapter:
    """The adapter or embeddings in a file or a folder (PEFT, diffusers). Raises UnreadableFile when no spelling
    explains it."""
    if path.is_dir():
        from persona.exchange.join import join

        files = adapter_files(path)
        adapters = [
            load_adapter(file, host, alpha=alpha, override_alpha=override_alpha, family=family) for file in files
        ]
        adapter = adapters[0] if len(adapters) == 1 else join(adapters, str(path))
        if others := passed_over(path, files):
            adapter.notes.append(
                f"of the folder, {', '.join(file.name for file in files)} was read; not {_few(others)}"
            )
        return adapter
    container, state = open_state(path, host)
    told = Told(alpha, override_alpha, family, str(path), _beside(path), configs_beside(path))
    try:
        with kept_open():  # the alphas
            return meaning(path, container, state, told, host)
    except PersonaError as error:
        if str(path) not in error.message:  # dialects see names and tensors, not where they come from
            error.message = f"{path}: {error.message}"
        raise


def meaning(path: Path, container: str, state: State, told: Told, host: Host) -> Adapter:
    """What an opened file says: embeddings alone, or an adapter with or without embeddings in it."""
    from persona.formats.dialects.embeddings.read import recognise, split_bundle

    _use_families(host)
    reading = recognise(state, file_stem=path.stem)
    if reading is not None:
        return Adapter(
            told.family,
            {},
            list(reading.embeddings),
            dict(state.metadata),
            Source(str(path), container, reading.form),
            [*state.notes, *reading.notes],
            list(reading.leftovers),
        )
    bundled, rest = split_bundle(state, file_stem=path.stem)
    dialect, _ = best_dialect(path, rest, told, host)
    adapter: Adapter = dialect.read(rest, told)
    adapter.embeddings = [*adapter.embeddings, *bundled]
    if not adapter.entries and not adapter.embeddings:
        raise not_an_adapter(path, state)
    source = adapter.source
    adapter.source = Source(str(path), container, source.dialect if source else dialect.name)
    adapter.notes = [*state.notes, *(note for note in adapter.notes if note not in state.notes)]
    return adapter


def _use_families(host: Host) -> None:
    """Make the families of plugins known to the dialects."""
    from persona.formats.models.families import FAMILIES, register

    for name in host.provided("family"):
        if name not in FAMILIES:
            register(host.load("family", name))


def best_dialect(path: Path, state: State, told: Told, host: Host) -> tuple[Any, Evidence]:
    """The dialect that explains most modules, with its evidence. Raises UnreadableFile when none explains one."""
    found: list[tuple[float, int, int, Any, Evidence]] = []
    for name in host.provided("dialect"):
        dialect = host.load("dialect", name)
        evidence = dialect.detect(state, told.siblings)
        if evidence.score > 0:
            found.append((evidence.score, getattr(dialect, "priority", 0), -len(found), dialect, evidence))
    if not found:
        for config in told.configs.values():  # a method of PEFT's that has factors of its own is told by its name
            check_config(config)
        raise not_an_adapter(path, state)
    best = max(found, key=lambda item: item[:3])
    return best[3], best[4]


def not_an_adapter(path: Path, state: State) -> UnreadableFile:
    """The error for a file no dialect names one module of: what it looks like, and what was tried."""
    from persona.exchange.kinds import looks_like
    from persona.formats.dialects.embeddings.read import unmarked

    keys = list(state.tensors)
    if not keys:
        return UnreadableFile(f"{path} holds no tensor at all.", hint="Fetch or save it again.")
    if reason_against := unmarked(state):
        return UnreadableFile(
            f"{path} holds nothing that is known: {reason_against}.",
            hint=f"If it is a word, call the file so: cp {path} {path.with_name(f'learned_embeds{path.suffix}')}",
        )
    shown = ", ".join(repr(key[:60]) for key in keys[:3])
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return UnreadableFile(
        f"{path} is {looks_like(state)}: no dialect finds a single module of an adapter among its keys {shown}{more}.",
        hint=f"See everything that is known about it: persona inspect {path}",
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _beside(path: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(beside.name for beside in path.parent.iterdir()))
    except OSError:  # a file can be readable in a folder that cannot be listed
        return (path.name,)


def configs_beside(path: Path) -> Mapping[str, Mapping[str, Any]]:
    """The small JSON files next to an adapter that say something about it (PEFT's adapter_config.json).
    Raises UnreadableFile for one that cannot be read: without it the strength would be guessed."""
    file = path.parent / "adapter_config.json"
    if not path.name.startswith("adapter_model") or not os.path.lexists(file):
        return {}
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise UnreadableFile(f"{file} is too large for a configuration.", hint="Fetch the folder again.")
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnreadableFile(
            f"{file} cannot be read: {error.strerror}.", hint=f"Without it the strength is not known: ls -l {file}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{file} is not JSON: {error}.", hint="Fetch the folder again.") from None
    if not isinstance(document, dict):
        raise UnreadableFile(f"{file} is not a JSON object.", hint="Fetch the folder again.")
    return {file.name: document}


def reason(error: BaseException) -> str:
    """One line for an error of any kind."""
    return error.message if isinstance(error, PersonaError) else f"{type(error).__name__}: {error}"
