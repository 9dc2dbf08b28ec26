"""Whole models: LDM's one file, folders of diffusers and ppdiffusers, MindSpore's and Wukong's checkpoints.

A `Checkpoint` has diffusers' components and parameter names in torch's layout, lazily; nothing is read but the headers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from persona.core.adapters.entry import Checkpoint, Entry, Scale, Source
from persona.core.adapters.evidence import decide
from persona.core.adapters.tensor import TensorRef
from persona.core.adapters.unet import UNet
from persona.core.host.contracts import Output, State
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.open import identify
from persona.formats.models import ldm_model, ldm_vae, mindspore_model, paddle_model
from persona.formats.models.clip_tokenizer import SIZE, clip_tokenizer, padding
from persona.formats.models.completeness import refuse_other_autoencoder
from persona.formats.models.configs import MAKERS, SAMPLE_OF_SD2_V, in_diffusers_words, index_of_others, model_index
from persona.formats.models.families import FAMILIES
from persona.formats.models.ldm_unet import Topology, topology_of
from persona.formats.models.schedulers import TOLD_BY, prediction_type, scheduler_config
from persona.formats.models.transformer_file import TABLES, read_one_file, write_one_file
from persona.formats.models.whole_transformer import names_of, refuse_incomplete

Tensors = Mapping[str, TensorRef]
Form = Literal["diffusers", "ppdiffusers", "ldm", "mindspore", "wukong"]
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


def outputs(checkpoint: Checkpoint, form: Form, notes: list[str]) -> list[Output]:
    """The files that spell a model; decisions are added to `notes`. Raises ConversionError when it has no such form."""
    if form in ("diffusers", "ppdiffusers"):
        return _folder_outputs(checkpoint, paddle=form == "ppdiffusers", notes=notes)
    if "transformer" in checkpoint.components:
        return [Output(_one_file(checkpoint, form, notes), {**_metadata(checkpoint), "format": "pt"})]
    encoders = ldm_model.WRITTEN_AS.get(checkpoint.family or "", {})
    if not encoders and any(name.startswith("text_encoder") for name in checkpoint.components):
        raise ConversionError("The family decides how LDM's file names the text encoder.", hint="--family sd1")
    if form == "wukong":
        encoders = {"text_encoder": ldm_model.ENCODERS[4]}
    topology = _topology(checkpoint)
    tensors = ldm_model.write_ldm(checkpoint.components, checkpoint.extras, encoders, topology, notes)
    if checkpoint.components.keys() == {"vae"} and form == "ldm":  # alone it is written, and read, without the prefix
        tensors = {name.removeprefix(ldm_model.VAE): ref for name, ref in tensors.items()}
    if form in ("mindspore", "wukong"):
        tensors = mindspore_model.to_mindspore(tensors, wrapped=form == "wukong")
    return [Output(tensors, {**_metadata(checkpoint), "format": "pt"})]


def _one_file(checkpoint: Checkpoint, form: Form, notes: list[str]) -> Tensors:
    if form != "ldm":
        raise ConversionError(f"Nobody has written SD3 or Flux as {form} yet.", hint="--to ldm or --to diffusers")
    if checkpoint.family not in TABLES:
        raise ConversionError(
            "persona knows how one file names the transformers of SD3 and Flux.1, and this is neither.",
            hint="A folder can hold it: --to diffusers",
        )
    return write_one_file(checkpoint.components, checkpoint.extras, TABLES[checkpoint.family], notes)


def _topology(checkpoint: Checkpoint) -> Topology:
    config = checkpoint.configs.get("unet")
    if config:
        return Topology.of(UNet.from_config(config))
    paths = [name.rpartition(".")[0] for name in checkpoint.components.get("unet", {})]
    wanted = [FAMILIES[checkpoint.family]] if checkpoint.family in FAMILIES else list(FAMILIES.values())
    return topology_of(paths, wanted)


def _folder_outputs(checkpoint: Checkpoint, *, paddle: bool, notes: list[str]) -> list[Output]:
    family = checkpoint.family or ""
    made: list[Output] = []
    scheduler = checkpoint.configs.get("scheduler") or _scheduler(checkpoint, notes)
    for component, parameters in checkpoint.components.items():
        encoder = component.startswith("text_encoder")
        name = "model_state.pdparams" if paddle else "model.safetensors" if encoder else WEIGHTS[0]
        tensors = paddle_model.exchanged(parameters) if paddle else dict(parameters)
        made.append(Output(tensors, {"format": "pd" if paddle else "pt"}, f"{component}/{name}"))
        config: Mapping[str, Any] | None = checkpoint.configs.get(component)
        if config is None and component in MAKERS:
            config = MAKERS[component](parameters, family)
            if component == "unet" and family == "sd2" and scheduler and "v_" in str(scheduler["prediction_type"]):
                config["sample_size"] = SAMPLE_OF_SD2_V
            notes.append(
                f"{component}/config.json was read off the shapes; heads and norm groups are {family or 'SD1'}'s"
            )
        if config is not None:
            made.append(Output(name=f"{component}/config.json", document=config))
    tokenizers = _tokenizers(checkpoint, notes)
    for folder, files in tokenizers.items():
        made += [Output(name=f"{folder}/{name}", document=content) for name, content in files.items()]
    if scheduler is not None:
        made.append(Output(name="scheduler/scheduler_config.json", document=scheduler))
    own = checkpoint.configs.get("model_index")
    index = in_diffusers_words(own) if own and not paddle else own or model_index(checkpoint.components, family)
    if not own:
        index = {**index, **index_of_others(tokenizers, scheduler)}
    made.append(Output(name="model_index.json", document=index))
    homeless = [name for name in checkpoint.extras if name not in ldm_model.FLAGS]
    if homeless:
        notes.append(f"left behind, diffusers has no place for it: {', '.join(homeless[:4])}")
    return made


def _tokenizers(checkpoint: Checkpoint, notes: list[str]) -> dict[str, dict[str, bytes]]:
    """The tokenizer folders: the source's own, else CLIP's for an encoder with its vocabulary."""
    found = dict(checkpoint.tokenizers)
    lacking = []
    for component, parameters in checkpoint.components.items():
        name = component.replace("text_encoder", "tokenizer")
        table = parameters.get("text_model.embeddings.token_embedding.weight")
        if not component.startswith("text_encoder") or name in found:
            continue
        if table is not None and table.shape[0] == SIZE:
            positions = parameters["text_model.embeddings.position_embedding.weight"].shape[0]
            found[name] = clip_tokenizer(padding(checkpoint.family or "", component), positions)
            notes.append(f"{name}: CLIP's own, because the source has none")
        else:
            lacking.append(name)
    if lacking:
        notes.append(f"{', '.join(lacking)}: to be copied from the base model's own folder; the source has none")
    return found


def _scheduler(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Any] | None:
    """The family's scheduler, for a source that has none."""
    unet, family = checkpoint.components.get("unet", {}), checkpoint.family or ""
    predicts, reason = prediction_type(family, unet, checkpoint.extras, checkpoint.metadata)
    made = scheduler_config(family, predicts) if unet else None
    if made is not None:
        notes.append(f"scheduler: {family}'s, which predicts {predicts.removesuffix('_prediction')}: {reason}")
    elif "transformer" in checkpoint.components or unet:
        notes.append("scheduler: to be copied from the base model's own folder; the source has none")
    return made


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    kept = {k: v for k, v in checkpoint.metadata.items() if k not in ("format", "sshs_model_hash", "sshs_legacy_hash")}
    predicts = {"v_prediction": "v", "epsilon": "epsilon"}.get(
        str(checkpoint.configs.get("scheduler", {}).get("prediction_type", ""))
    )
    if predicts and "unet" in checkpoint.components:
        kept[TOLD_BY] = predicts
    return {**kept, "persona.family": checkpoint.family} if checkpoint.family else kept


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
