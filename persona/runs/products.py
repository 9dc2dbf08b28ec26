"""The product of a run, written where it can travel: deltas and new tokens as one file, whole weights as a diffusers
folder with the changed components and the name and digest of their base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.training.base import Base
from persona.core.training.run import RunFolder, clear_disk_errors

WEIGHT_NAMES = {"unet": "diffusion_pytorch_model.safetensors", "transformer": "diffusion_pytorch_model.safetensors"}


def write_product(product: Adapter | Checkpoint, run: RunFolder, base: Base, words: Mapping[str, str]) -> Path:
    """Write the product into the run and return its path. A run that is trained further replaces its own product."""
    with clear_disk_errors(run.path):
        if isinstance(product, Checkpoint):
            return write_components(product, run.model, base, words)
        return write_adapter(product, run.adapter, words)


def write_adapter(adapter: Adapter, path: Path, words: Mapping[str, str]) -> Path:
    """One safetensors file in the diffusers dialect, `words` in its metadata."""
    from persona.api import save

    adapter.metadata.update(words)
    temporary = path.with_name(".adapter.new.safetensors")
    temporary.unlink(missing_ok=True)  # what a kill may have left
    save(adapter, temporary, to="diffusers")
    temporary.replace(path)
    return path


def write_components(checkpoint: Checkpoint, folder: Path, base: Base, words: Mapping[str, str]) -> Path:
    """A diffusers folder with the changed components, built beside its place and renamed."""
    from persona.formats.containers.safetensors import Safetensors

    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    for component, tensors in checkpoint.components.items():
        part = temporary / component
        part.mkdir(parents=True)
        name = WEIGHT_NAMES.get(component, "model.safetensors")
        Safetensors().write(part / name, tensors, {"format": "pt"})
        config = checkpoint.configs.get(component) or base.components[component]
        (part / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    about = {"base": base.id, "base_hash": base.hash, **words}
    (temporary / "persona.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return folder
