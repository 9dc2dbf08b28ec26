"""A whole model in LDM's one file and as diffusers' components: parameter names both ways (dialects.md §2.3, §11).

Only names change, but for the autoencoder's attention (a shape) and OpenCLIP's stacked q, k, v and transposed
projection. What has no home in diffusers' components travels in `extras` under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from persona.core.adapters.reshaping import rows, squeezed, stacked, transposed, unsqueezed
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import ConversionError
from persona.formats.models import ldm_unet, ldm_vae, openclip
from persona.formats.models.ldm_unet import Topology

Tensors = Mapping[str, TensorRef]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
ENCODERS = (
    ("conditioner.embedders.0.transformer.", "text_encoder", "huggingface"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "openclip"),
    ("conditioner.embedders.0.model.", "text_encoder_2", "openclip"),
    ("cond_stage_model.transformer.", "text_encoder", "huggingface"),
    ("cond_stage_model.model.", "text_encoder", "openclip"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "huggingface"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "huggingface"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", "t5"),
)
WRITTEN_AS = {
    "sd1": {"text_encoder": ENCODERS[3]},
    "wukong": {"text_encoder": ENCODERS[3]},
    "sd2": {"text_encoder": ENCODERS[4]},
    "sdxl": {"text_encoder": ENCODERS[0], "text_encoder_2": ENCODERS[1]},
    "sdxl-refiner": {"text_encoder_2": ENCODERS[2]},
    "sd3": {"text_encoder": ENCODERS[5], "text_encoder_2": ENCODERS[6], "text_encoder_3": ENCODERS[7]},
    "flux1": {"text_encoder": ENCODERS[5], "text_encoder_2": ENCODERS[7]},
}
"""Family -> component -> (prefix, component, spelling)."""
RECALCULATED = re.compile(
    r"^(?:model_ema\.|loss\.|(?:alphas_cumprod|betas|sqrt_|log_one_minus|posterior_|logvar|lvlb_weights|global_step|"
    r"denoiser\.|edm_mean|edm_std|scale_factor|text_encoders\.\w+\.logit_scale$))|position_ids$"
)
"""Schedules, averages and counters: every reader makes its own."""
KEPT = re.compile(r"(?:logit_scale|text_projection|transformer\.resblocks\.23\.)")
FLAGS = ("v_pred", "ztsnr")
"""Empty tensors by which checkpoints of SDXL say that they predict v, and that their last step is pure noise."""
SECOND_LAST_LAYERS = 23  # diffusers' SD2 keeps 23 of OpenCLIP's 24 layers, because the penultimate output is used


@dataclass
class Parts:
    """Components with diffusers' parameter names, what travels along, what was left, and what to tell."""

    components: dict[str, dict[str, TensorRef]] = field(default_factory=dict)
    extras: dict[str, TensorRef] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, component: str, name: str, ref: TensorRef) -> None:
        """One parameter."""
        self.components.setdefault(component, {})[name] = ref


def is_ldm(tensors: Tensors) -> bool:
    """Whether the names are those of a whole model in LDM's one file."""
    beginnings = (UNET, VAE, *(prefix for prefix, _, _ in ENCODERS))
    return any(key.startswith(beginnings) for key in tensors)


def read_ldm(tensors: Tensors) -> Parts:
    """Diffusers' components from LDM's names (already torch's: see mindspore_model for MindSpore's)."""
    parts = Parts()
    layers = ldm_unet.layers_of([_module(key)[0][len(UNET) :] for key in tensors if key.startswith(UNET)])
    levels = ldm_vae.levels_of([key for key in tensors if key.startswith(VAE)])
    stacked_layers = _openclip_layers(tensors)
    for key, ref in tensors.items():
        module, leaf = _module(key)
        if key.startswith(UNET):
            path = ldm_unet.to_diffusers(module[len(UNET) :], layers=layers)
            _place(parts, "unet", path, leaf, key, ref)
        elif key.startswith(VAE) and not RECALCULATED.search(key):
            path = ldm_vae.to_diffusers(module[len(VAE) :], levels)
            shown = squeezed(ref) if path is not None and ldm_vae.is_attention(path) else ref
            _place(parts, "vae", path, leaf, key, shown)
        else:
            _encoder(parts, key, ref, stacked_layers)
    if parts.dropped:
        named = ", ".join(parts.dropped[:4]) + (f" and {len(parts.dropped) - 4} more" if len(parts.dropped) > 4 else "")
        parts.notes.append(f"left behind, because every reader makes its own: {named}")
    return parts


def _encoder(parts: Parts, key: str, ref: TensorRef, layers: Mapping[str, int]) -> None:
    found = next((row for row in ENCODERS if key.startswith(row[0])), None)
    if RECALCULATED.search(key):
        parts.dropped.append(key)
    elif key in FLAGS:
        parts.extras[key] = ref
    elif found is None:
        parts.unknown.append(key)
    elif found[2] == "t5":
        name = key[len(found[0]) :]  # T5 shares its table between both names, and transformers keeps the first
        if name != "encoder.embed_tokens.weight":
            parts.put(found[1], name, ref)
        else:
            parts.components.setdefault(found[1], {}).setdefault("shared.weight", ref)
    elif found[2] == "huggingface":
        name = key[len(found[0]) :]
        if not name.startswith(("text_model.", "text_projection")):
            name = f"text_model.{name}"
        parts.put(found[1], name, ref)
    else:
        _openclip(parts, key, key[len(found[0]) :], found[1], ref, layers.get(found[0], 0))


def _openclip(parts: Parts, key: str, name: str, component: str, ref: TensorRef, layers: int) -> None:
    """OpenCLIP's parameters. SD2's last layer, projection and logit scale have no home in diffusers: extras."""
    beyond = component == "text_encoder" and layers == SECOND_LAST_LAYERS + 1
    if name == "logit_scale" or (beyond and KEPT.search(name)):
        parts.extras[key] = ref
        return
    if name in ("text_projection", "text_projection.weight"):
        parts.put(component, "text_projection.weight", transposed(ref) if name == "text_projection" else ref)
        return
    if name == "positional_embedding":
        parts.put(component, "text_model.embeddings.position_embedding.weight", ref)
        return
    module, leaf = _module(name)
    if leaf in ("in_proj_weight", "in_proj_bias"):
        third = ref.shape[0] // 3
        path = openclip.to_huggingface(f"{module}.in_proj") or ""
        head = path.partition("[")[0]
        for n, part in enumerate(("q_proj", "k_proj", "v_proj")):
            parts.put(component, f"{head}{part}.{leaf[8:]}", rows(ref, n * third, (n + 1) * third))
        return
    _place(parts, component, openclip.to_huggingface(module), leaf, key, ref)


def _place(parts: Parts, component: str, path: str | None, leaf: str, key: str, ref: TensorRef) -> None:
    if path is None:
        (parts.dropped if RECALCULATED.search(key) else parts.unknown).append(key)
    else:
        parts.put(component, f"{path}.{leaf}", ref)


def _module(key: str) -> tuple[str, str]:
    module, _, leaf = key.rpartition(".")
    return module, leaf


def _openclip_layers(tensors: Tensors) -> dict[str, int]:
    """Checkpoint prefix -> number of OpenCLIP layers behind it."""
    found: dict[str, int] = {}
    for prefix, _, style in ENCODERS:
        if style == "openclip":
            beginning = f"{prefix}transformer.resblocks."
            numbers = {int(key[len(beginning) :].split(".")[0]) for key in tensors if key.startswith(beginning)}
            found[prefix] = len(numbers)
    return found


def write_ldm(
    components: Mapping[str, Tensors],
    extras: Tensors,
    encoders: Mapping[str, tuple[str, str, str]],
    topology: Topology,
    notes: list[str],
) -> dict[str, TensorRef]:
    """LDM's names for diffusers' components; `encoders` is a row of WRITTEN_AS. Raises ConversionError for a parameter
    that has none; what the file needs and diffusers does not have is made up as sd-scripts does, and told in
    `notes`."""
    made: dict[str, TensorRef] = {}
    for name, ref in components.get("unet", {}).items():
        module, leaf = _module(name)
        theirs = ldm_unet.to_original(module, layers=topology.layers, attends_up=topology.attends_up)
        made[f"{UNET}{_named(theirs, 'unet', name)}.{leaf}"] = ref
    vae = components.get("vae", {})
    levels = ldm_vae.levels_of(list(vae))
    for name, ref in vae.items():
        module, leaf = _module(name)
        shown = unsqueezed(ref) if ldm_vae.is_attention(module) else ref
        made[f"{VAE}{_named(ldm_vae.to_ldm(module, levels), 'vae', name)}.{leaf}"] = shown
    for component, mine in components.items():
        if component in ("unet", "vae"):
            continue
        row = encoders.get(component)
        if row is None:
            having = [family for family, row in WRITTEN_AS.items() if component in row]
            raise ConversionError(
                f"One file of this family has no place for {component}.", hint=f"--family {' | '.join(having)}"
            )
        made.update(_written_encoder(row, mine, extras, notes))
    made.update({key: ref for key, ref in extras.items() if key not in made})
    return made


def _named(name: str | None, component: str, parameter: str) -> str:
    if name is None:
        raise ConversionError(f"{component}.{parameter} has no name in LDM's file.")
    return name


def _written_encoder(row: tuple[str, str, str], parameters: Tensors, extras: Tensors, notes: list[str]) -> Tensors:
    prefix, component, style = row
    if style in ("huggingface", "t5"):
        return {f"{prefix}{name}": ref for name, ref in parameters.items()}
    made: dict[str, TensorRef] = {}
    for name, ref in parameters.items():
        module, leaf = _module(name)
        if module.endswith(".q_proj"):
            head = module.removesuffix("q_proj")
            parts = [parameters[f"{head}{part}.{leaf}"] for part in ("q_proj", "k_proj", "v_proj")]
            fused = openclip.to_openclip(f"{head}[q_proj,k_proj,v_proj]")
            made[f"{prefix}{fused}_{leaf}"] = stacked(parts)
        elif module.endswith((".k_proj", ".v_proj")):
            continue
        elif name == "text_projection.weight":
            made[f"{prefix}text_projection"] = transposed(ref)
        elif module.endswith("position_embedding"):
            made[f"{prefix}positional_embedding"] = ref
        else:
            made[f"{prefix}{_named(openclip.to_openclip(module), component, name)}.{leaf}"] = ref
    if component == "text_encoder":
        _complete_openclip(prefix, made, extras, notes)
    return made


def _complete_openclip(prefix: str, made: dict[str, TensorRef], extras: Tensors, notes: list[str]) -> None:
    """SD2's 24th layer: the source's own when it came from such a file, else a copy of the 23rd."""
    last = f"{prefix}transformer.resblocks.{SECOND_LAST_LAYERS}."
    if any(key.startswith(last) for key in (*made, *extras)):
        return
    before = f"{prefix}transformer.resblocks.{SECOND_LAST_LAYERS - 1}."
    copies = {last + key[len(before) :]: ref for key, ref in made.items() if key.startswith(before)}
    if copies:
        made.update(copies)
        notes.append("OpenCLIP's 24th layer is not in diffusers' SD2; a copy of the 23rd stands in its place (unused)")
