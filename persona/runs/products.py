"""The product of a run, written where it can travel: deltas and new tokens as one file, whole weights as a diffusers
folder with the changed components and the name and digest of their base."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.host.errors import UsageError
from persona.core.host.host import Host
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
    """One safetensors file as diffusers reads it, `words` in its metadata; new tokens that come with deltas lie beside
    it as `…_emb.safetensors`. What was there is replaced, each file whole or not at all."""
    from persona.api import save

    building = path.with_name(f".{path.stem}.new")
    shutil.rmtree(building, ignore_errors=True)  # what a kill may have left
    building.mkdir()
    try:
        save(adapter, building / path.name, to="diffusers" if adapter.entries else None)
        for file in sorted(building.iterdir()):
            stamp(file, words)
            file.replace(path.with_name(file.name))
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return path


def stamp(file: Path, words: Mapping[str, str]) -> None:
    """Write a safetensors file again with `words` in its header, and the hash of its tensors' bytes
    (modelspec.hash_sha256: everything behind the header)."""
    from persona.formats.containers.safetensors import Safetensors

    state = Safetensors().read(file)
    with file.open("rb") as stream:
        stream.seek(int.from_bytes(stream.read(8), "little"), 1)
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    told = {**state.metadata, "format": "pt", **words, "modelspec.hash_sha256": f"0x{digest.hexdigest()}"}
    again = file.with_name(f".{file.name}.stamped")
    Safetensors().write(again, state.tensors, told)
    again.replace(file)


def write_also(adapter: Path, dialects: Sequence[str], host: Host, base: Base) -> list[Path]:
    """The adapter file in other dialects, beside it as `adapter-DIALECT.…`, replacing what is there. `base` is what it
    was trained on, for dialects that hold it only rewritten. Raises ConversionError for one that cannot hold it."""
    from persona.exchange.convert import Wish, convert

    written = []
    for dialect in dialects:
        target = also_path(adapter, dialect, host)
        if not target.suffix:
            shutil.rmtree(target, ignore_errors=True)
        convert([adapter], target, Wish(to=dialect, base=base.id, force=True), host)
        written.append(target)
    return written


def also_path(adapter: Path, dialect: str, host: Host) -> Path:
    """Where the adapter's file in a dialect goes, with the first ending its readers open; a folder has none."""
    from persona.exchange.choices import ALIASES
    from persona.formats.dialects.embeddings.forms import BY_NAME

    known, ending = host.provided("dialect"), ".safetensors"
    name = dialect if dialect in known else ALIASES.get(dialect, dialect)
    if name in known:
        slots = host.load("dialect", name).slots
        ending = "" if slots.folder else host.provided("container")[slots.containers[0]].suffixes[0]
    elif dialect in BY_NAME:
        ending = BY_NAME[dialect].suffixes[0]
    return adapter.with_name(f"{adapter.stem}-{dialect}{ending}")


def check_also(dialects: Sequence[str], *, whole_weights: bool, words_only: bool, host: Host) -> None:
    """Raises UsageError, before anything is trained, for a dialect that nobody knows or that has no place for this."""
    from persona.exchange.choices import EMBEDDING_NAMES, dialect_called
    from persona.formats.dialects.embeddings.forms import FORMS

    for dialect in dialects:
        if whole_weights:
            raise UsageError(
                f"--also {dialect}: whole weights are no adapter.",
                hint="Train deltas: --plugin lora, or dreambooth --lora",
            )
        forms = [form.name for form in FORMS if form.writable]
        forms += [name for name, _ in EMBEDDING_NAMES if name not in forms]
        if words_only and dialect not in forms:
            raise UsageError(
                f"--also {dialect} has no spelling for new words alone.", hint=f"Known: {', '.join(forms)}"
            )
        if not words_only:
            dialect_called(dialect, host)


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
