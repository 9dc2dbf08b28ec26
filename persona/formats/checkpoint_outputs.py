"""Whole models as the files that spell them: the other direction of checkpoints.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from persona.core.adapters.entry import Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.core.adapters.unet import UNet
from persona.core.host.contracts import Output
from persona.core.host.errors import ConversionError
from persona.formats.checkpoints import WEIGHTS
from persona.formats.models import ldm_model, mindspore_model, paddle_model
from persona.formats.models.clip_tokenizer import SIZE, clip_tokenizer, padding
from persona.formats.models.configs import MAKERS, SAMPLE_OF_SD2_V, in_diffusers_words, index_of_others, model_index
from persona.formats.models.families import FAMILIES
from persona.formats.models.ldm_unet import Topology, topology_of
from persona.formats.models.schedulers import TOLD_BY, prediction_type, scheduler_config
from persona.formats.models.transformer_file import TABLES, write_one_file

Tensors = Mapping[str, TensorRef]
Form = Literal["diffusers", "ppdiffusers", "ldm", "mindspore", "wukong"]


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
