"""From what a user typed behind `--base` to a described Base: a registry name, a diffusers folder or a hub id.
Only configs and safetensors headers are read; no framework is imported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from persona.core.host.errors import BaseModelError, did_you_mean
from persona.core.training.base import Base, ParameterShape
from persona.hub.registry import packaged, registry

NEEDED = ("vae", "text_encoder", "tokenizer", "scheduler")


Unpack = Callable[[Path], Path]
"""From a model that is no diffusers folder of .safetensors to one that is (persona.runs.bases)."""


def open_base(name: str, unpack: Unpack | None = None) -> Base:
    """Describe the base called `name`. Raises BaseModelError when it cannot be found, or is not a diffusers folder and
    there is no `unpack` for it.

    A run that trained whole weights is a base too: its changed components in front of the base it was trained on."""
    trained = trained_model(Path(name).expanduser())
    if trained is None:
        return describe(name, locate(name, unpack))
    about = _json(trained / "persona.json", name)
    below = open_base(str(about["base"]), unpack)
    if below.hash != about["base_hash"]:
        raise BaseModelError(
            f"{name} was trained on another {about['base']}: its digest is {below.hash[:12]}, "
            f"not {str(about['base_hash'])[:12]}.",
            hint=f"Give the base it was trained on: edit {trained / 'persona.json'}",
        )
    folders = {folder.name: folder for folder in trained.iterdir() if (folder / "config.json").is_file()}
    together = hashlib.sha256(f"{below.hash} {digest(trained)}".encode()).hexdigest()
    components = dict(below.components) | {part: _json(folders[part] / "config.json", name) for part in folders}
    parameters = dict(below.parameters) | {part: stored_parameters(folders[part], name) for part in folders}
    return dataclasses.replace(
        below, id=name, hash=together, components=components, parameters=parameters, folders=folders
    )


def trained_model(path: Path) -> Path | None:
    """The folder of whole weights that a run left: the run itself or its `model` folder; None for anything else."""
    return next((found for found in (path, path / "model") if (found / "persona.json").is_file()), None)


def locate(name: str, unpack: Unpack | None = None) -> Path:
    """The folder of a base: from the registry, a path, or the hub's local cache (downloaded when allowed)."""
    known = registry()["bases"]
    if name in known:
        entry = known[name]
        if entry["source"] == "package":
            return packaged(entry["folder"])
        return from_hub(entry["source"])
    path = Path(name).expanduser()
    if path.is_file() or is_packed(path):
        if unpack is None:
            raise BaseModelError(
                f"{name} is no diffusers folder of .safetensors files.",
                hint=f"Make one of it: persona convert {name} FOLDER --to diffusers",
            )
        return unpack(path.resolve())
    if path.is_dir():
        return path.resolve()
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return from_hub(name)
    here = [str(found.parent) for found in Path().glob("*/model_index.json")]
    raise BaseModelError(
        f"There is no base model {name}: not a folder here, not a known name. {did_you_mean(name, [*known, *here])}",
        hint="Use the embedded one: --base mini",
    )


def is_packed(folder: Path) -> bool:
    """Whether it is a folder of a model, of whose components one has weights, but no .safetensors under torch's names:
    a folder of ppdiffusers or of an old diffusers, or a text encoder that mindone saved."""
    if not (folder / "model_index.json").is_file():
        return False
    parts = [part for part in folder.iterdir() if (part / "config.json").is_file()]
    return any(_is_elsewheres(part) for part in parts)


def _is_elsewheres(part: Path) -> bool:
    files = _safetensors(part)
    if not files:
        return any(file.suffix in (".pdparams", ".bin") for file in part.iterdir())
    if not part.name.startswith("text_encoder"):
        return False
    return any(name.endswith(".embedding_table") for file in files for name in safetensors_header(file))


def from_hub(identifier: str) -> Path:
    """The folder of a hub model, downloading what a diffusers pipeline needs."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BaseModelError(
            f"{identifier} is on a model hub, and huggingface_hub is not installed.",
            hint='Install it: pip install "persona[torch]"',
        ) from error
    patterns = ["*.json", "*.txt", "*.safetensors", "*/*.json", "*/*.txt", "*/*.safetensors"]
    try:
        return Path(snapshot_download(identifier, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"The base {identifier} could not be fetched from the hub: {reason}",
            hint="Give a folder that holds it (--base FOLDER), or use the embedded one: --base mini",
        ) from error


def describe(name: str, path: Path) -> Base:
    """Read the configs and headers of a diffusers folder."""
    index = _json(path / "model_index.json", name)
    components: dict[str, Mapping[str, Any]] = {}
    parameters: dict[str, dict[str, ParameterShape]] = {}
    tokenizers: dict[str, Path] = {}
    schedule: Mapping[str, Any] = {}
    for component, value in index.items():
        if component.startswith("_") or not isinstance(value, list) or value[0] is None:
            continue
        folder = path / component
        if component == "scheduler":
            schedule = _json(folder / "scheduler_config.json", name)
        elif component.startswith("tokenizer"):
            if not folder.is_dir():
                raise BaseModelError(f"The base {name} lacks its {component} folder ({folder}).")
            tokenizers[component] = folder
        elif component in ("unet", "transformer", "vae") or component.startswith("text_encoder"):
            components[component] = _json(folder / "config.json", name)
            parameters[component] = stored_parameters(folder, name)
    lacking = [part for part in NEEDED if part not in components and part not in tokenizers and part != "scheduler"]
    if not schedule:
        lacking.append("scheduler")
    if "unet" not in components and "transformer" not in components:
        lacking.append("unet")
    if lacking:
        raise BaseModelError(
            f"The base {name} ({path}) lacks {', '.join(lacking)}.",
            hint="Give the folder that DiffusionPipeline.save_pretrained wrote",
        )
    return Base(name, path, digest(path), family_of(components), components, parameters, schedule, tokenizers)


def family_of(components: Mapping[str, Mapping[str, Any]]) -> str:
    """The base architecture, by what the configs say (dialects.md §1.5); narrow models of the same topology count."""
    if "transformer" in components:
        return "flux1" if "guidance_embeds" in components["transformer"] else "sd3"
    if "text_encoder_2" in components or components["unet"].get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if components["unet"].get("use_linear_projection") else "sd1"


def _safetensors(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if ".fp16." not in file.name and ".non_ema." not in file.name] or files


def stored_parameters(folder: Path, name: str) -> dict[str, ParameterShape]:
    """Names, shapes and dtypes of a component's weights, from its safetensors headers."""
    files = _safetensors(folder)
    if not files:
        raise BaseModelError(
            f"The base {name} has no .safetensors weights in {folder}.",
            hint="Fetch it again, or give another one: --base mini",
        )
    found_parameters = {}
    for file in files:
        for key, entry in safetensors_header(file).items():
            if key != "__metadata__":
                found_parameters[key] = ParameterShape(tuple(entry["shape"]), entry["dtype"])
    return found_parameters


def safetensors_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises BaseModelError when it is not one."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(100_000_000, file.stat().st_size):
            raise BaseModelError(f"{file} is not a whole safetensors file.", hint="Fetch it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise BaseModelError(f"{file} has a broken safetensors header.", hint="Fetch it again") from error
    return header


def digest(path: Path) -> str:
    """sha256 over the names and bytes of a base's configs, tokenizer files and weights (64 hexadecimal digits).

    The digest of a large base is remembered in the user's cache folder by names, sizes and modification times."""
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file.suffix in (".json", ".txt", ".safetensors") and ".fp16." not in file.name
    )
    stamp = hashlib.sha256()
    for file in files:
        status = file.stat()
        stamp.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    memory = cache_folder() / "base-digests" / stamp.hexdigest()
    if memory.is_file():
        return memory.read_text()
    total = hashlib.sha256()
    for file in files:
        total.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_suffix(f".{os.getpid()}")
        temporary.write_text(total.hexdigest())
        temporary.replace(memory)
    except OSError:
        pass  # only a memory: a read-only home costs time, nothing else
    return total.hexdigest()


def cache_folder() -> Path:
    """The user's cache folder for persona: $PERSONA_CACHE, else $XDG_CACHE_HOME/persona, else ~/.cache/persona."""
    own = os.environ.get("PERSONA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persona"


def _json(file: Path, name: str) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(
            f"The base {name} has no {file.name} in {file.parent}: it is not a diffusers folder.",
            hint="Give the folder that DiffusionPipeline.save_pretrained wrote, or use --base mini",
        ) from error
    except ValueError as error:
        raise BaseModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise BaseModelError(f"{file} is not a JSON object.")
    return document
