"""Files and folders to adapters: container by bytes, dialect by grammar, folders by what lies in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona.core.adapters.entry import Adapter, Entry
from persona.core.host.contracts import State, Told
from persona.core.host.errors import UnreadableFile
from persona.formats.containers.open import identify
from persona.formats.dialects.peft_folder import BASE_CLASSES, CONFIG
from persona.formats.dialects.recognise import read

FOLDER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "paddle_lora_weights.safetensors",
    "paddle_lora_weights.pdparams",
)
LARGEST_JSON = 16 << 20


def open_state(path: Path | str) -> State:
    """A file's tensors with the name of its container."""
    container = identify(path)
    return replace(container.read(Path(path)), container=container.name)


def read_adapter(
    path: Path | str, *, alpha: float | None = None, override_alpha: bool = False, family: str | None = None
) -> Adapter:
    """The adapter in a file or folder. Raises UnreadableFile when there is none, or when a key is not explained."""
    path = Path(path)
    told = Told(alpha, override_alpha, family, str(path))
    if path.is_dir():
        return read_adapter_folder(path, told)
    return _read_file(path, told)


def read_adapter_folder(folder: Path, told: Told) -> Adapter:
    """A folder: one PEFT or diffusers adapter, or PEFT adapters in folders named after their components."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return _read_file(folder / name, told)
    parts = [child for child in sorted(folder.iterdir()) if (child / CONFIG).is_file()] if folder.is_dir() else []
    if not parts:
        raise UnreadableFile(f"{folder} holds no adapter: none of {', '.join(FOLDER_FILES)} is there.")
    read_parts = [(part.name, read_adapter_folder(part, told)) for part in parts]
    first = read_parts[0][1]
    entries: dict[tuple[str, str], Entry] = {}
    for name, adapter in read_parts:
        renamed = _as_component(adapter, name) if name in BASE_CLASSES else adapter
        entries.update(renamed.entries)
    notes = [note for _, adapter in read_parts for note in adapter.notes]
    from persona.core.adapters.evidence import decide
    from persona.formats.dialects.table import settle_family
    from persona.formats.models.families import FAMILIES

    whole = replace(first, entries=entries, notes=list(dict.fromkeys(notes)))
    whole.families, whole.family = settle_family(decide(entries.values(), FAMILIES).families, told, whole)
    return whole


def _read_file(path: Path, told: Told) -> Adapter:
    siblings = _siblings(path.parent)
    configs: dict[str, Mapping[str, Any]] = {}
    if CONFIG in siblings and path.name.startswith("adapter_model"):
        configs[CONFIG] = read_json(path.parent / CONFIG)
    adapter = read(open_state(path), replace(told, siblings=siblings, configs=configs))
    if configs:
        component = _component_of(configs[CONFIG])
        adapter = _as_component(adapter, component) if component else adapter
    return adapter


def _siblings(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(child.name for child in folder.iterdir()))[:1000]
    except OSError:
        return ()


def _component_of(config: Mapping[str, Any]) -> str | None:
    mapping = config.get("auto_mapping") or {}
    base_class = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return next((name for name, (known, _) in BASE_CLASSES.items() if known == base_class), None)


def _as_component(adapter: Adapter, component: str) -> Adapter:
    """Every entry moved to a component: a PEFT folder does not say it in its keys."""
    if {entry.component for entry in adapter.entries.values()} == {component}:
        return adapter
    moved = {
        (component, path): replace(entry, component=component) for (_, path), entry in adapter.entries.items()
    }
    return replace(adapter, entries=moved)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UnreadableFile."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UnreadableFile(f"{path} is too large for a configuration.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UnreadableFile(f"{path} is not a JSON object.")
    return value
