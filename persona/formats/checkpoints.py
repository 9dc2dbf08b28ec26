"""Whole models: LDM's one file, folders of diffusers and ppdiffusers, MindSpore's and Wukong's checkpoints.

A `Checkpoint` has diffusers' components and parameter names in torch's layout, lazily; nothing is read but the headers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona.core.adapters.entry import Checkpoint, Entry, Scale, Source
from persona.core.adapters.evidence import decide
from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import UnreadableFile
from persona.formats.containers.open import identify
from persona.formats.models import ldm_model, ldm_vae, mindspore_model, paddle_model
from persona.formats.models.completeness import refuse_other_autoencoder
from persona.formats.models.families import FAMILIES
from persona.formats.models.transformer_file import TABLES, read_one_file
from persona.formats.models.whole_transformer import names_of, refuse_incomplete

Tensors = Mapping[str, TensorRef]
COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "diffusion_paddle_model.safetensors",
    "model_state.pdparams",
)
BEGINNINGS = (
    ("vae", ("encoder.down_blocks.", "decoder.up_blocks.", "encoder.conv_in.", "quant_conv.")),
    ("unet", ("down_blocks.", "up_blocks.", "mid_block.", "time_embedding.", "conv_in.")),
    ("transformer", ("transformer_blocks.", "single_transformer_blocks.")),
    ("text_encoder", ("text_model.", "encoder.layers.")),
)
"""How the parameters of a component alone begin, under diffusers' names."""
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
    *("tokenizer.json", "spiece.model", "vocab.txt"),
)
LARGEST_JSON = 1 << 24


def is_whole_model(state: State) -> bool:
    """Whether a file's names are those of whole weights: a model in one file, or one of diffusers' components."""
    names = list(state.tensors)
    if any(
        name.endswith((".lora_down.weight", ".lora_A.weight", ".alpha", ".diff")) or "lora" in name for name in names
    ):
        return False
    known = ldm_model.is_ldm(state.tensors) or component_alone(state.tensors) is not None
    return known or names_of(state.tensors) is not None


def component_alone(tensors: Tensors) -> str | None:
    """The component whose parameters these are, or None."""
    return next((name for name, beginnings in BEGINNINGS if any(key.startswith(beginnings) for key in tensors)), None)


def read_checkpoint(path: Path | str, *, family: str | None = None) -> Checkpoint:
    """The model in a file or a diffusers or ppdiffusers folder. Raises UnreadableFile when it is not one."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, family)
    container = identify(path)
    state = replace(container.read(path), container=container.name)
    return checkpoint_of(state, str(path), family=family)


def checkpoint_of(state: State, path: str, *, family: str | None = None) -> Checkpoint:
    """The model that an opened file holds. Raises UnreadableFile for names nobody knows."""
    tensors, form, wrapped = state.tensors, "ldm", False
    if mindspore_model.is_mindspore(tensors):
        wrapped = mindspore_model.is_wrapped(tensors)
        tensors, form = mindspore_model.from_mindspore(tensors), "wukong" if wrapped else "mindspore"
    if ldm_vae.is_bare(tensors):
        tensors = {ldm_model.VAE + name: ref for name, ref in tensors.items()}
    table = names_of(tensors)
    if table is not None or ldm_model.is_ldm(tensors):
        parts = read_one_file(tensors, table, path) if table is not None else ldm_model.read_ldm(tensors)
        _refuse_unknown(parts.unknown, path)
        made = Checkpoint(None, parts.components, extras=parts.extras, notes=[*state.notes, *parts.notes])
    else:
        component = component_alone(tensors)
        if component is None:
            raise UnreadableFile(f"{path} holds no component of a diffusion model that persona knows.")
        made = Checkpoint(None, {component: _component(tensors, component, state)}, notes=list(state.notes))
        config = Path(path).parent / "config.json"
        made.configs = {component: read_json(config)} if config.is_file() else {}
        form = "diffusers"
    made.metadata = dict(state.metadata)
    made.source = Source(path, state.container, form)
    own = made.metadata.get("persona.family", "")  # what persona wrote: names alone may leave several
    family = own if family is None and own in _families_of(made) else family
    made.family = _settled_family(made, family, path, table.family if table is not None else None, wukong=wrapped)
    _refuse_parts(made, path)
    return made


def _component(tensors: Tensors, component: str, state: State) -> dict[str, TensorRef]:
    """One component's parameters in torch's layout, CLIP spelt with `text_model.`"""
    if _in_paddle_layout(tensors, state):
        tensors = paddle_model.exchanged(paddle_model.modern_names(tensors, component))
    if component.startswith("text_encoder"):
        beginnings = ("text_model.", "text_projection", "shared", "encoder.block", "encoder.final_layer_norm")
        tensors = {k if k.startswith(beginnings) else f"text_model.{k}": ref for k, ref in tensors.items()}
    return {name: ref for name, ref in tensors.items() if not name.endswith("position_ids")}


def _in_paddle_layout(tensors: Tensors, state: State) -> bool:
    """Shapes decide where they can (the feed-forward's are never square), then the container and the header."""
    for name, ref in tensors.items():
        if len(ref.shape) == 2 and ref.shape[0] != ref.shape[1]:
            if name.endswith(("ff.net.0.proj.weight", "mlp.fc1.weight", "linear1.weight")):
                return ref.shape[0] < ref.shape[1]
            if name.endswith(("ff.net.2.weight", "mlp.fc2.weight", "linear2.weight")):
                return ref.shape[0] > ref.shape[1]
    return state.container == "paddle" or state.metadata.get("format") in ("pd",)


def _read_folder(folder: Path, family: str | None) -> Checkpoint:
    made = Checkpoint(None, {})
    if (folder / "model_index.json").is_file():
        made.configs["model_index"] = read_json(folder / "model_index.json")
    parts = [folder / name for name in COMPONENTS if (folder / name).is_dir()]
    for part in parts or [folder]:
        files = weight_files(part)
        if not files:
            continue
        tensors: dict[str, TensorRef] = {}
        state = State({})
        for file in files:
            container = identify(file)
            state = replace(container.read(file), container=container.name)
            if mindspore_model.is_mindspore(state.tensors):
                state = replace(state, tensors=mindspore_model.from_mindspore(state.tensors))
            tensors.update(state.tensors)
        component = part.name if parts else component_alone(tensors)
        if component is None:
            raise UnreadableFile(f"{part} holds no component of a diffusion model that persona knows.")
        made.components[component] = _component(tensors, component, state)
        made.source = Source(str(folder), state.container, "diffusers")
        if (part / "config.json").is_file():
            made.configs[component] = read_json(part / "config.json")
    if not made.components:
        raise UnreadableFile(f"{folder} holds no model: none of {', '.join(WEIGHTS)} is in it or its components.")
    if others := _other_weights(folder, parts):
        made.notes.append(f"not read, because persona has no other form of it: {', '.join(others)}")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        made.configs["scheduler"] = read_json(scheduler)
    made.tokenizers = {name: found for name in TOKENIZERS if (found := _tokenizer_files(folder / name))}
    made.family = _settled_family(made, family, str(folder))
    _refuse_parts(made, str(folder))
    return made


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    """What a tokenizer folder has, by name; nothing where there is none, or a file is absurdly large."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {file.name: file.read_bytes() for file in files if file.stat().st_size <= LARGEST_JSON}


def _other_weights(folder: Path, parts: Sequence[Path]) -> list[str]:
    """Components beside those that are read, such as a safety checker."""
    beside = [part for part in sorted(folder.iterdir()) if part.is_dir() and part not in parts] if parts else []
    return [part.name for part in beside if weight_files(part)]


def _settled_family(
    checkpoint: Checkpoint, told: str | None, path: str, known: str | None = None, *, wukong: bool = False
) -> str | None:
    """What the user told, where the denoiser's names and widths allow it, else what these leave. Raises
    UnreadableFile where they say otherwise."""
    possible = frozenset({known}) if known else _families_of(checkpoint)
    if told is None:
        return known or family_of(checkpoint, wukong=wukong)
    if possible and told not in possible:
        raise UnreadableFile(
            f"{path} is no {told} model: its names and widths are those of {', '.join(sorted(possible))}.",
            hint=f"--family {min(possible)}",
        )
    return told


def _refuse_parts(checkpoint: Checkpoint, path: str) -> None:
    """Raises UnreadableFile for a transformer of SD3 or Flux.1 or an AutoencoderKL that is not whole."""
    if checkpoint.family in TABLES and "transformer" in checkpoint.components:
        refuse_incomplete(checkpoint.components["transformer"], TABLES[checkpoint.family], path)
    class_name = checkpoint.configs.get("vae", {}).get("_class_name", "AutoencoderKL")
    if "vae" in checkpoint.components and class_name == "AutoencoderKL":
        refuse_other_autoencoder(checkpoint.components["vae"], path)


def weight_files(folder: Path) -> list[Path]:
    """The weights of one component: one file, or the shards its index names (plain names inside the folder)."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(dict(read_json(index).get("weight_map") or {}).values()))
            if any(not isinstance(shard, str) or Path(shard).name != shard for shard in names):
                raise UnreadableFile(f"{index} names files outside its folder.")
            return [folder / shard for shard in names]
    return []


def family_of(checkpoint: Checkpoint, *, wukong: bool = False) -> str | None:
    """The family that names and widths leave; a vocabulary tells Wukong from SD1, which are otherwise the same."""
    families = _families_of(checkpoint)
    if {"sd1", "wukong"} & families:
        embedding = checkpoint.components.get("text_encoder", {}).get("text_model.embeddings.token_embedding.weight")
        chinese = wukong and (embedding is None or embedding.shape[0] != 49408)
        families = families & {"wukong"} if chinese else families - {"wukong"}
    if {"sd1", "sd2"} <= families:  # a narrow model: only SD1's projections are convolutions, as a rule
        projections = [
            ref for name, ref in checkpoint.components.get("unet", {}).items() if name.endswith("proj_in.weight")
        ]
        families -= {"sd1"} if projections and len(projections[0].shape) == 2 else {"sd2"}
    return next(iter(families)) if len(families) == 1 else None


def _families_of(checkpoint: Checkpoint) -> frozenset[str]:
    """The families whose denoiser has modules of these names, and of these widths where some have."""
    entries = []
    for component in ("unet", "transformer"):
        for name, ref in checkpoint.components.get(component, {}).items():
            if name.endswith(".weight") and len(ref.shape) in (2, 4):
                path = name.removesuffix(".weight")
                entries.append(Entry(component, path, "full", {"diff": ref}, Scale(None, 1, "none")))
    return decide(entries, FAMILIES).families


def _refuse_unknown(unknown: Sequence[str], path: str) -> None:
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise UnreadableFile(f"{path}: {len(unknown)} parameters have no home in the model: {shown}.")


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
