"""DiffSynth-Studio: PEFT's module dump (`.lora_A.default.weight`), alpha nowhere (dialects.md §5.6).

Today's files carry diffusers' paths (SDXL, Kolors) or DiffSynth's Flux names; those of 2024 are a torch pickle of
its own SDXL UNet (`blocks.N`), flat or inside a Lightning checkpoint with `pipe.unet.` in front.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.slots import Slots
from persona.core.host.errors import NoPlace
from persona.formats.dialects.metadata import carried
from persona.formats.dialects.places import diffusers_path, prefixed, unprefixed
from persona.formats.dialects.table import Place, TableDialect, anywhere
from persona.formats.models.diffsynth_names import flux_to_original, unet_to_diffsynth, unet_to_diffusers
from persona.formats.models.transformer_names import FLUX

_PIPE = re.compile(r"^(?:state_dict\.)?(?:pipe\.)?(?:(unet|dit|denoising_model|text_encoder(?:_[123])?)\.)?(.+)$")
SUFFIXES = {"down": ".lora_A.default.weight", "up": ".lora_B.default.weight"}


def place(module: str) -> Place | None:
    """Its own UNet and Flux names, then diffusers' with or without the component."""
    match = _PIPE.match(module)
    if match is None:
        return None
    name = match[2]
    own = unet_to_diffusers(name)
    if own is not None:
        return Place("unet", own, name)
    flux = flux_to_original(name)
    path = FLUX.to_diffusers(flux) if flux else None
    if path is not None:
        return Place("transformer", path, name, True, frozenset({"flux1"}))
    if match[1] and match[1].startswith("text_encoder"):
        return Place(match[1], diffusers_path(match[1], name), name)
    return prefixed(module) or unprefixed(name)


def blocks_place(module: str) -> Place | None:
    """The UNet of 2024 alone."""
    match = _PIPE.match(module)
    path = unet_to_diffusers(match[2]) if match else None
    return Place("unet", path, match[2]) if match and path else None


def names(adapter: Adapter) -> Callable[[Entry], str]:
    """Diffusers' paths without a component: DiffSynth matches them against its pipeline's denoiser."""

    def name_of(entry: Entry) -> str:
        if entry.component not in ("unet", "transformer"):
            raise NoPlace(entry.name, "DiffSynth files hold the denoiser alone")
        return entry.path

    return name_of


def blocks_names(adapter: Adapter) -> Callable[[Entry], str]:
    """The UNet's `blocks.N` names of 2024."""

    def name_of(entry: Entry) -> str:
        name = unet_to_diffsynth(entry.path) if entry.component == "unet" else None
        if name is None:
            raise NoPlace(entry.name, "it has no name in DiffSynth's UNet of 2024")
        return name

    return name_of


def header(adapter: Adapter) -> dict[str, str]:
    """The source's metadata."""
    return {k: v for k, v in carried(adapter).items() if k != "lora_adapter_metadata"}


_DENOISER = frozenset({"unet", "transformer"})

DIALECT = TableDialect(
    name="diffsynth",
    summary="DiffSynth-Studio: diffusers paths, PEFT module dump, alpha = rank",
    slots=Slots(convolution=False, components=_DENOISER, containers=("safetensors", "torch")),
    places=anywhere(place),
    names=names,
    spellings=frozenset({"peft module"}),
    suffixes=SUFFIXES,
    header=header,
    priority=55,
)

BLOCKS = TableDialect(
    name="diffsynth-2024",
    summary="DiffSynth-Studio of 2024 (SDXL, Kolors): its own UNet names in a torch pickle",
    slots=Slots(
        convolution=False,
        components=frozenset({"unet"}),
        families=frozenset({"sdxl", "kolors"}),
        containers=("torch", "safetensors"),
    ),
    places=anywhere(blocks_place),
    names=blocks_names,
    spellings=frozenset({"peft module"}),
    suffixes=SUFFIXES,
    header=header,
    priority=56,
    families=frozenset({"sdxl", "kolors"}),
)
