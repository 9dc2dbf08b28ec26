"""The transformers of SD3 and Flux.1 whole, in their authors' names and in diffusers' (dialects.md §2.4-2.6).

Rows are divided and joined, and two modulations have their halves exchanged; no number changes. What is read has to be
a complete model: its sizes are read off a few weights, and every parameter that a model of those sizes has must be
there, in its shape, and no other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from persona.core.adapters.family import Component
from persona.core.adapters.fusion import members, row_sizes
from persona.core.adapters.reshaping import rows, stacked, swapped_halves
from persona.core.adapters.tensor import TensorRef
from persona.core.adapters.transformer import Flux, MMDiT
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.models.completeness import refuse_other_than
from persona.formats.models.transformer_names import FLUX, SD3, TransformerNames, has_halves_swapped

Tensors = Mapping[str, TensorRef]
PREFIX = "model.diffusion_model."
POSITIONS, OUR_POSITIONS = "pos_embed", "pos_embed.pos_embed"
MARKS = ((SD3, ("joint_blocks.",)), (FLUX, ("double_blocks.", "single_blocks.")))
"""How a block of each begins."""


def names_of(tensors: Tensors) -> TransformerNames | None:
    """The table of the transformer that is among these tensors under its authors' names, or None."""
    bare = [key.removeprefix(PREFIX) for key in tensors]
    return next((names for names, starts in MARKS if any(key.startswith(starts) for key in bare)), None)


def read_transformer(tensors: Tensors, names: TransformerNames) -> tuple[dict[str, TensorRef], list[str]]:
    """Diffusers' parameters from the authors' (without PREFIX), and the keys that mean nothing here."""
    made: dict[str, TensorRef] = {}
    unknown: list[str] = []
    for key, ref in tensors.items():
        module, _, leaf = key.rpartition(".")
        if names is SD3 and key == POSITIONS:
            made[OUR_POSITIONS] = ref
            continue
        path = names.to_diffusers(module)
        leaf = "weight" if leaf == "scale" and module.endswith("_norm") else leaf
        if path is None or leaf not in ("weight", "bias"):
            unknown.append(key)
            continue
        weight = tensors.get(f"{module}.weight", ref)
        for part, value in _divided(path, ref, weight, key):
            made[f"{part}.{leaf}"] = swapped_halves(value) if has_halves_swapped(part, weight.shape) else value
    return made, unknown


def _divided(path: str, ref: TensorRef, weight: TensorRef, key: str) -> list[tuple[str, TensorRef]]:
    parts = members(path)
    if len(parts) == 1:
        return [(path, ref)]
    try:
        sizes = row_sizes(path, *weight.shape[:2]) if len(weight.shape) == 2 else (0,)
    except ValueError:
        sizes = (0,)
    if sum(sizes) != (ref.shape or (0,))[0]:
        raise UnreadableFile(f"{key} has shape {list(ref.shape)}, which is not that of {len(parts)} joined modules.")
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return [(part, rows(ref, at, at + size)) for part, at, size in zip(parts, starts, sizes, strict=True)]


def write_transformer(parameters: Tensors, names: TransformerNames) -> dict[str, TensorRef]:
    """The authors' parameters from diffusers', without PREFIX. Raises ConversionError for one without a name there."""
    made: dict[str, TensorRef] = {}
    for name, ref in parameters.items():
        if name == OUR_POSITIONS:
            made[POSITIONS] = ref
            continue
        path, _, leaf = name.rpartition(".")
        fused = names.fused_path(path)
        theirs = names.to_original(fused or path)
        if theirs is None:
            raise ConversionError(f"transformer.{name} has no name in the original's file.")
        if fused is not None:
            if members(fused)[0] == path:
                made[f"{theirs}.{leaf}"] = stacked([_part(parameters, part, leaf) for part in members(fused)])
            continue
        swapped = has_halves_swapped(path, _part(parameters, path, "weight").shape)
        leaf = "scale" if theirs.endswith("_norm") else leaf
        made[f"{theirs}.{leaf}"] = swapped_halves(ref) if swapped else ref
    return made


def _part(parameters: Tensors, path: str, leaf: str) -> TensorRef:
    if f"{path}.{leaf}" not in parameters:
        raise ConversionError(f"This model is not complete: it has no transformer.{path}.{leaf}.")
    return parameters[f"{path}.{leaf}"]


def config_of(parameters: Tensors, names: TransformerNames) -> Component:
    """The sizes of a model, from its shapes under diffusers' names. Raises UnreadableFile where one is missing."""
    return _mmdit(parameters) if names is SD3 else _flux(parameters)


def refuse_incomplete(parameters: Tensors, names: TransformerNames, path: str) -> None:
    """Raises UnreadableFile unless these are the parameters of a model of some sizes, all of them. The variants for
    depth, edges or filling in take more channels than they give."""
    entrance = "pos_embed.proj.weight" if names is SD3 else "x_embedder.weight"
    what, positions = f"The {names.family} transformer in {path}", [OUR_POSITIONS] if names is SD3 else []
    refuse_other_than(config_of(parameters, names), parameters, what, passed_over=positions, any_shape=entrance)
    if names is SD3:
        _refuse_other_positions(parameters, what)


def _refuse_other_positions(parameters: Tensors, what: str) -> None:
    """SD3's table of positions, [1, side·side, width], is a buffer: no module has it, so that it is looked at here."""
    if OUR_POSITIONS not in parameters:
        raise UnreadableFile(f"{what} is not complete: it lacks {POSITIONS}.")
    shape, width = parameters[OUR_POSITIONS].shape, parameters["pos_embed.proj.weight"].shape[0]
    square = len(shape) == 3 and math.isqrt(shape[1]) ** 2 == shape[1]
    if not square or shape != (1, shape[1], width):
        raise UnreadableFile(f"{what}: {POSITIONS} has shape {list(shape)}; [1, n·n, {width}] belongs there.")


def _shape(parameters: Tensors, name: str) -> tuple[int, ...]:
    if name not in parameters or len(parameters[name].shape) < (1 if name.endswith("norm_q.weight") else 2):
        raise UnreadableFile(f"This transformer is not complete: it lacks {name}, as diffusers calls it.")
    return parameters[name].shape


def _count(parameters: Tensors, block: str) -> int:
    """How many blocks there are, those that lack something too; a number nobody can have is not believed."""
    numbers = {int(match[1]) for name in parameters if (match := re.match(rf"{block}\.(\d{{1,4}})\.", name))}
    return max(numbers, default=-1) + 1


def _mmdit(parameters: Tensors) -> MMDiT:
    normed = "transformer_blocks.0.attn.norm_q.weight" in parameters
    entrance = _shape(parameters, "pos_embed.proj.weight")
    patch = entrance[-1]
    return MMDiT(
        layers=_count(parameters, "transformer_blocks"),
        width=entrance[0],
        dual=_count({name: ref for name, ref in parameters.items() if ".attn2." in name}, "transformer_blocks"),
        query_key_norm=normed,
        context=_shape(parameters, "context_embedder.weight")[1],
        pooled=_shape(parameters, "time_text_embed.text_embedder.linear_1.weight")[1],
        channels=_shape(parameters, "proj_out.weight")[0] // max(patch**2, 1),
        patch=patch,
        head=_shape(parameters, "transformer_blocks.0.attn.norm_q.weight")[0] if normed else 64,
    )


def _flux(parameters: Tensors) -> Flux:
    return Flux(
        double=_count(parameters, "transformer_blocks"),
        single=_count(parameters, "single_transformer_blocks"),
        width=_shape(parameters, "x_embedder.weight")[0],
        context=_shape(parameters, "context_embedder.weight")[1],
        pooled=_shape(parameters, "time_text_embed.text_embedder.linear_1.weight")[1],
        channels=_shape(parameters, "proj_out.weight")[0],
        guidance="time_text_embed.guidance_embedder.linear_1.weight" in parameters,
        head=_shape(parameters, "single_transformer_blocks.0.attn.norm_q.weight")[0],
    )


def transformer_config(parameters: Tensors, family: str) -> dict[str, Any]:
    """`transformer/config.json` of SD3 or Flux.1."""
    return _CONFIGS[family](parameters) if family in _CONFIGS else {}


def _sd3_config(parameters: Tensors) -> dict[str, Any]:
    config = _mmdit(parameters)
    positions = parameters[OUR_POSITIONS].shape if OUR_POSITIONS in parameters else (1, 192**2, 0)
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": config.head,
        "caption_projection_dim": config.width,
        "dual_attention_layers": list(range(config.dual)),
        "in_channels": parameters["pos_embed.proj.weight"].shape[1],
        "joint_attention_dim": config.context,
        "num_attention_heads": config.width // config.head,
        "num_layers": config.layers,
        "out_channels": config.channels,
        "patch_size": config.patch,
        "pooled_projection_dim": config.pooled,
        "pos_embed_max_size": math.isqrt(positions[1]),
        "qk_norm": "rms_norm" if config.query_key_norm else None,
        "sample_size": 128,
    }


def _flux_config(parameters: Tensors) -> dict[str, Any]:
    config = _flux(parameters)
    into = parameters["x_embedder.weight"].shape[1]
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": config.head,
        "axes_dims_rope": [config.head // 8, config.head * 7 // 16, config.head * 7 // 16],
        "guidance_embeds": config.guidance,
        "in_channels": into,
        "joint_attention_dim": config.context,
        "num_attention_heads": config.width // config.head,
        "num_layers": config.double,
        "num_single_layers": config.single,
        "out_channels": config.channels if config.channels != into else None,
        "patch_size": 1,
        "pooled_projection_dim": config.pooled,
    }


_CONFIGS: dict[str, Callable[[Tensors], dict[str, Any]]] = {"sd3": _sd3_config, "flux1": _flux_config}
