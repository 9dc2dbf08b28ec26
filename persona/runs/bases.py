"""Bases that are no diffusers folder of .safetensors (LDM's one file, a folder of ppdiffusers, MindSpore's checkpoint,
old diffusers' .bin) are converted once, into the user's cache folder, and opened from there."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from persona.core.host.errors import BaseModelError, UnreadableFile
from persona.core.host.host import Host
from persona.core.training.base import Base
from persona.exchange.convert import Wish
from persona.exchange.models import converted_model, whole_model
from persona.formats.containers.atomic import unwritable
from persona.hub.bases import cache_folder, describe, open_base
from persona.runs import sizes

Tell = Callable[[str], None]


def open_any_base(name: str, host: Host, tell: Tell) -> Base:
    """`persona.hub.bases.open_base`, also of what has to be converted first; `tell` hears about that."""
    return open_base(name, lambda path: unpacked(path, host, tell))


def unpacked(path: Path, host: Host, tell: Tell) -> Path:
    """The diffusers folder made of the model `path`, now or before. It is known by the path, the sizes and the times of
    its files; nobody removes it but its user.

    Raises BaseModelError for what is no whole model, or lacks a tokenizer that is not CLIP's."""
    folder = cache_folder() / "bases" / f"{path.stem.replace('.', '-')}-{_stamp(path)[:16]}"
    if (folder / "model_index.json").is_file():
        return folder
    try:
        model = whole_model(path, host)
    except UnreadableFile as error:
        raise BaseModelError(f"The base {path} cannot be read: {error.message}", hint=error.hint) from error
    if model is None:
        raise BaseModelError(
            f"{path} is no whole model, and so no base.", hint=f"See what it is: persona inspect {path}"
        )
    size = sizes.size(sum(file.stat().st_size for file in _files(path)))
    spelling = f"{model.source.dialect}, {model.source.container}" if model.source else "a whole model"
    tell(f"base: {path} ({spelling}) is converted to a diffusers folder, once: {size} in {folder} …")
    building = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        report = converted_model(model, building, Wish(to="diffusers"), host)
        _refuse_incomplete(path, building)
        if not folder.exists():  # another process may have been faster
            building.rename(folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    for note in report.notes:
        tell(f"base: {note}")
    return folder


def _refuse_incomplete(path: Path, building: Path) -> None:
    try:
        describe(str(path), building)
    except BaseModelError as error:
        words = " (no tokenizer came with it, and its vocabulary is not CLIP's)" if "tokenizer" in error.message else ""
        raise BaseModelError(
            error.message.replace(f" ({building})", "").rstrip(".") + f"{words}.",
            hint=f"Put what it lacks into a folder of its own: persona convert {path} FOLDER --to diffusers",
        ) from error


def _stamp(path: Path) -> str:
    facts = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in _files(path)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
