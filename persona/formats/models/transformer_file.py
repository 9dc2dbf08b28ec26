"""SD3 and Flux.1 in one file: the transformer, and perhaps the autoencoder and the text encoders beside it.

Source: Stability-AI's sd3_medium_incl_clips, black-forest-labs' flux1-dev, and ComfyUI's supported_models.py, which
calls Flux' autoencoder `vae.` and SD3's `first_stage_model.`
"""

from __future__ import annotations

from collections.abc import Mapping

from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import UnreadableFile
from persona.formats.models import ldm_model
from persona.formats.models.ldm_model import Parts
from persona.formats.models.ldm_unet import Topology
from persona.formats.models.transformer_names import FLUX, SD3, TransformerNames
from persona.formats.models.whole_transformer import PREFIX, read_transformer, write_transformer

Tensors = Mapping[str, TensorRef]
TABLES = {names.family: names for names in (SD3, FLUX)}
COMFY_VAE = "vae."
UNUSED = "text_projection.weight"  # Flux takes CLIP's pooled output before it, and diffusers' class has none


def read_one_file(tensors: Tensors, names: TransformerNames, path: str) -> Parts:
    """Diffusers' components of a file. Raises UnreadableFile for a parameter that is there twice, and for joined rows
    that cannot be divided."""
    beside = (ldm_model.VAE, COMFY_VAE, "text_encoders.")
    rest = {key: ref for key, ref in tensors.items() if key.startswith(beside)}
    mine = _renamed({key: ref for key, ref in tensors.items() if key not in rest}, PREFIX, "", path)
    parameters, unknown = read_transformer(mine, names)
    parts = ldm_model.read_ldm(_renamed(rest, COMFY_VAE, ldm_model.VAE, path))
    parts.unknown += unknown
    components = {"transformer": parameters, **parts.components}
    if names is FLUX:
        if "text_encoder_3" in components:
            components["text_encoder_2"] = components.pop("text_encoder_3")
        projection = components.get("text_encoder", {}).pop(UNUSED, None)
        if projection is not None:
            parts.extras[f"text_encoders.clip_l.transformer.{UNUSED}"] = projection
    parts.components = components
    return parts


def _renamed(tensors: Tensors, before: str, after: str, path: str) -> dict[str, TensorRef]:
    """The tensors whose names begin with `before` beginning with `after`. Raises UnreadableFile for one that is there
    under both names."""
    made: dict[str, TensorRef] = {}
    for key, ref in tensors.items():
        name = after + key.removeprefix(before) if key.startswith(before) else key
        if name in made:
            raise UnreadableFile(f"{path} holds {name} twice, with {before!r} in front and without.")
        made[name] = ref
    return made


def write_one_file(
    components: Mapping[str, Tensors], extras: Tensors, names: TransformerNames, notes: list[str]
) -> dict[str, TensorRef]:
    """One file's tensors from diffusers' components; a transformer alone has no prefix, as its authors publish it.
    Raises ConversionError for a parameter that has no name there."""
    others = {name: parameters for name, parameters in components.items() if name != "transformer"}
    rest = ldm_model.write_ldm(others, extras, ldm_model.WRITTEN_AS[names.family], Topology(), notes)
    prefix = PREFIX if others else ""
    made = {prefix + key: ref for key, ref in write_transformer(components["transformer"], names).items()}
    for key, ref in rest.items():
        flux_vae = names is FLUX and key.startswith(ldm_model.VAE)
        made[COMFY_VAE + key.removeprefix(ldm_model.VAE) if flux_vae else key] = ref
    return made
