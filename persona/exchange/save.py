"""From a meaning to files: the spelling asked for, or the default of the extension."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from persona.core.adapters.entry import Adapter
from persona.core.host.contracts import Output
from persona.core.host.errors import ConversionError, UsageError
from persona.core.host.host import Host
from persona.exchange.choices import (
    EMBEDDING_FORMS,
    EMBEDDING_NAMES,
    container_for,
    default_dialect,
    dialect_called,
)
from persona.formats.containers.atomic import atomic_folder, atomic_write


@dataclass(frozen=True)
class Target:
    """Where an adapter goes: the file or folder, the spelling's name, and the dialect itself (None: a form of
    embeddings)."""

    path: Path
    name: str
    dialect: Any = None
    container: Any = None
    chosen: str = ""
    """How the name came about, when the user did not say it."""

    @property
    def slots(self) -> Any:
        """What dialect and container can hold together."""
        return self.dialect.slots.within(self.container.name if self.container else "safetensors")


@dataclass(frozen=True)
class Sheet:
    """One file to be written."""

    path: Path
    container: Any
    output: Output


def target_for(adapter: Adapter, path: Path, host: Host, to: str | None = None) -> Target:
    """The spelling and container of a destination. Raises UsageError when they do not go together."""
    if not adapter.entries and not adapter.embeddings:
        raise ConversionError("There is nothing to write: no module and no embedding.")
    if not adapter.entries:
        return _embedding_target(adapter, path, host, to)
    name = dialect_called(to, host) if to else default_dialect(path.suffix.lower(), host)
    chosen = "" if to else f"written as {name}, the default for {path.suffix or 'this name'}; --to chooses another"
    dialect = host.load("dialect", name)
    if dialect.slots.folder:
        if path.suffix.lower() in (".safetensors", ".bin", ".pt", ".ckpt", ".pdparams"):
            raise UsageError(
                f"{name} is a folder of files, and {path.name} is named as a file.",
                hint=f"Name a folder: {path.with_suffix('')}",
            )
        return Target(path, name, dialect, None, chosen)
    container = container_for(path, host, dialect.slots.containers)
    if container.name not in dialect.slots.containers:
        readers = ", ".join(dialect.slots.containers)
        raise UsageError(
            f"Readers of {name} do not open {path.suffix} files ({container.name}); they open {readers}.",
            hint=f"Name the output otherwise, for example {path.stem}.safetensors",
        )
    return Target(path, name, dialect, container, chosen)


def _embedding_target(adapter: Adapter, path: Path, host: Host, to: str | None) -> Target:
    from persona.formats.dialects.embeddings import forms

    suffix = path.suffix.lower()
    container_for(path, host)
    form, chosen = EMBEDDING_NAMES.get((to or "", suffix), to or ""), ""
    if not form:
        form = EMBEDDING_FORMS.get(suffix, "diffusers")
        several = len({component for one in adapter.embeddings for component in one.vectors}) > 1
        if several and suffix == ".safetensors":
            form = "clip-pair" if len(adapter.embeddings) == 1 else "bundle"
            chosen = (
                f"vectors of several text encoders in one file: written as {form}; --to diffusers makes a file for each"
            )
    if form not in forms.BY_NAME:
        dialect_called(form, host)  # a name nobody knows is told as such
        known = [one.name for one in forms.FORMS if one.writable]
        raise UsageError(f"{form} has no spelling for embeddings alone.", hint=f"--to {' | '.join(known)}")
    if suffix not in forms.BY_NAME[form].suffixes:
        fitting = [one.name for one in forms.FORMS if suffix in one.suffixes and one.writable]
        endings = " or ".join(forms.BY_NAME[form].suffixes)
        raise UsageError(
            f"Embeddings spelt {form} are kept in {endings} files, not {suffix or 'in one without an ending'}.",
            hint=f"Choose --to {' | '.join(fitting)}"
            if fitting
            else f"Name the output {path.stem}{endings.split()[0]}",
        )
    order = ("torch",) if form == "a1111" else ()
    return Target(path, form, None, container_for(path, host, order), chosen)


def sheets(adapter: Adapter, target: Target, host: Host) -> list[Sheet]:
    """The files that spell `adapter`: one, or several for a folder or for what has no place beside the modules.
    Raises ConversionError when the spelling cannot hold it."""
    if target.dialect is None:
        return _embedding_sheets(adapter, target)
    outputs = list(target.dialect.write(adapter))
    made = [_placed(output, target, host) for output in outputs]
    if not adapter.embeddings:
        return made
    if target.dialect.slots.embeddings == "bundle" and len(made) == 1:
        from persona.formats.dialects.embeddings.write import join_bundle

        joined = join_bundle(made[0].output.tensors, adapter.embeddings)
        return [replace(made[0], output=replace(made[0].output, tensors=joined))]
    return [*made, *_embeddings_beside(adapter, target, host)]


def _placed(output: Output, target: Target, host: Host) -> Sheet:
    path = target.path / output.name if output.name else target.path
    if output.document is not None:
        return Sheet(path, None, output)
    return Sheet(path, target.container or container_for(path, host), output)


def _embedding_sheets(adapter: Adapter, target: Target) -> list[Sheet]:
    from persona.formats.dialects.embeddings.write import by_encoder, write_embeddings

    one_encoder_each = target.name in ("diffusers", "ppdiffusers")
    parts = by_encoder(adapter.embeddings) if one_encoder_each else {"": adapter.embeddings}
    made = []
    for place, (component, embeddings) in enumerate(parts.items()):
        tensors, metadata = write_embeddings(embeddings, target.name)
        number = component.removeprefix("text_encoder_") if place else ""
        path = target.path.with_stem(f"{target.path.stem}_{number}") if number else target.path
        kept = {key: text for key, text in adapter.metadata.items() if key not in ("format", "lora_adapter_metadata")}
        made.append(Sheet(path, target.container, Output(tensors, {**kept, **metadata} if metadata else {})))
    return made


def _embeddings_beside(adapter: Adapter, target: Target, host: Host) -> list[Sheet]:
    """The new words of an adapter whose dialect has no place for them: a file of their own beside it."""
    folder = target.dialect.slots.folder
    path = target.path / "learned_embeds.safetensors" if folder else target.path.with_stem(f"{target.path.stem}_emb")
    alone = replace(adapter, entries={}, metadata={})
    return _embedding_sheets(alone, _embedding_target(alone, path, host, None))


def write_sheets(files: Sequence[Sheet], target: Target, *, force: bool = False) -> list[Path]:
    """Write all of them or none; each appears whole under its name. Nothing is overwritten unless `force`."""
    if target.dialect is not None and target.dialect.slots.folder and not target.path.is_dir():
        return _write_folder(files, target)
    if target.dialect is not None and target.dialect.slots.folder:
        for sheet in files:
            sheet.path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        places = [(stack.enter_context(atomic_write(sheet.path, overwrite=force)), sheet) for sheet in files]
        for temporary, sheet in places:
            _write_one(temporary, sheet)
    return [sheet.path for sheet in files]


def _write_folder(files: Sequence[Sheet], target: Target) -> list[Path]:
    """A new folder is filled under another name and renamed when it is complete."""
    with atomic_folder(target.path) as building:
        for sheet in files:
            path = building / sheet.path.relative_to(target.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                _write_one(temporary, sheet)
    return [sheet.path for sheet in files]


def _write_one(temporary: Path, sheet: Sheet) -> None:
    if isinstance(sheet.output.document, bytes):
        temporary.write_bytes(sheet.output.document)
    elif sheet.output.document is not None:
        temporary.write_text(json.dumps(sheet.output.document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        sheet.container.write(temporary, sheet.output.tensors, sheet.output.metadata)


def save_adapter(
    adapter: Adapter, path: Path, host: Host, *, to: str | None = None, dtype: str | None = None, force: bool = False
) -> str:
    """Write an adapter (or embeddings alone) to `path`; returns the name of the spelling. Nothing is overwritten unless
    `force`. Raises ConversionError when the spelling cannot hold it."""
    from persona.exchange.planning import cast, plan_for

    target = target_for(adapter, path, host, to)
    if target.dialect is None:
        adapter = cast(adapter, dtype)
    else:
        made = plan_for(adapter, target, dtype=dtype)
        made.demand()
        adapter = made.adapter
    write_sheets(sheets(adapter, target, host), target, force=force)
    return target.name
