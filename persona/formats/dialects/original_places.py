"""Where the original code's names lie: LDM's UNet, OpenCLIP, BFL's Flux, SD3's MMDiT, behind their usual prefixes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache

from persona.core.adapters.entry import Adapter, Entry
from persona.core.host.errors import ConversionError, NoPlace
from persona.formats.dialects.places import diffusers_path
from persona.formats.dialects.table import Place
from persona.formats.models import ldm_unet, openclip
from persona.formats.models.families import FAMILIES
from persona.formats.models.ldm_unet import Topology, topology_of
from persona.formats.models.transformer_names import FLUX, SD3, TransformerNames

ENCODERS = (
    ("text_encoders.clip_l.transformer.", "text_encoder", "huggingface"),
    ("text_encoders.clip_h.transformer.", "text_encoder", "huggingface"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "huggingface"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", "huggingface"),
    ("conditioner.embedders.0.transformer.", "text_encoder", "huggingface"),
    ("conditioner.embedders.1.model.", "text_encoder_2", "openclip"),
    ("cond_stage_model.transformer.", "text_encoder", "huggingface"),
    ("cond_stage_model.model.", "text_encoder", "openclip"),
)
"""Prefix, component, names inside (dialects.md §2.3)."""

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True)
class OriginalNames:
    """The original's names of one file: its UNet's layers per level are read off all its names at once."""

    layers: int = 2

    @classmethod
    def of(cls, names: Collection[str]) -> OriginalNames:
        """From every module name of a file, with its prefix."""
        return cls(ldm_unet.layers_of([without_prefix(name) for name in names if "put_blocks." in name]))

    def denoiser(self, name: str) -> Place | None:
        """A denoiser's module without its prefix, in the original's names."""
        return _denoiser(name, self.layers)


@lru_cache(maxsize=16384)
def _denoiser(name: str, layers: int) -> Place | None:
    path = ldm_unet.to_diffusers(diffusers_path("unet", name), layers=layers)
    if path is not None:
        return Place("unet", path, name)
    for names in (FLUX, SD3):
        found = names.to_diffusers(name)
        if found is not None and name not in ("context_embedder",):
            hint = None if name.startswith("final_layer") else frozenset({names.family})
            return Place("transformer", found, name, True, hint)
    return None


def without_prefix(name: str) -> str:
    """A denoiser module's name without `model.diffusion_model.` or `diffusion_model.`"""
    for prefix in DENOISER_PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


@lru_cache(maxsize=4096)
def encoder_place(module: str) -> Place | None:
    """A text encoder's module behind its checkpoint prefix."""
    for prefix, component, style in ENCODERS:
        if module.startswith(prefix):
            name = module[len(prefix) :]
            if style == "openclip":
                path = openclip.to_huggingface(name) if name != "text_projection" else None  # stored transposed
            else:
                path = diffusers_path(component, name)
            return Place(component, path, name) if path else None
    return None


def original_places(modules: Collection[str]) -> Callable[[str], Place | None]:
    """Places of names behind `model.diffusion_model.`, `diffusion_model.` and the text encoders' prefixes."""
    names = OriginalNames.of(modules)

    def place(module: str) -> Place | None:
        bare = without_prefix(module)
        return names.denoiser(bare) if bare != module else encoder_place(module)

    return place


def transformer_names(adapter: Adapter) -> TransformerNames | None:
    """The table for an adapter's transformer, or None when it has none or its family is open."""
    if not any(entry.component == "transformer" for entry in adapter.entries.values()):
        return None
    families = {adapter.family} if adapter.family else set(adapter.families)
    if not families:
        paths = [entry.path for entry in adapter.entries.values()]
        families = (
            {"flux1"} if any(path.startswith("single_transformer_blocks") for path in paths) else {"sd3", "flux1"}
        )
    known = [names for names in (FLUX, SD3) if names.family in families]
    return known[0] if len(known) == 1 else None


def unet_topology(adapter: Adapter) -> Topology:
    """The topology of an adapter's UNet, for the original's block numbers."""
    paths = [entry.path for entry in adapter.entries.values() if entry.component == "unet"]
    wanted = [adapter.family] if adapter.family else sorted(adapter.families) or list(FAMILIES)
    families = [FAMILIES[name] for name in wanted if name in FAMILIES]
    return topology_of(paths, families or FAMILIES.values())


def original_denoiser_names(adapter: Adapter) -> Callable[[Entry], str]:
    """The original's name of each denoiser module, without prefix. Raises NoPlace for one that has none."""
    topology, table = unet_topology(adapter), transformer_names(adapter)

    def name_of(entry: Entry) -> str:
        if entry.component == "unet":
            name = ldm_unet.to_original(entry.path, layers=topology.layers, attends_up=topology.attends_up)
        elif table is not None:
            name = table.to_original(entry.path)
        else:
            raise ConversionError(
                "Flux and SD3 spell these modules differently, and the file does not say which it is.",
                hint="--family flux1 or --family sd3",
            )
        if name is None:
            raise NoPlace(entry.name, "it has no name in the original code")
        return name

    return name_of


def joined_paths(adapter: Adapter) -> Callable[[Entry], str | None]:
    """For each transformer module that the original keeps as rows of a larger one: the larger one's path."""
    table = transformer_names(adapter)

    def joined(entry: Entry) -> str | None:
        return table.fused_path(entry.path) if table is not None and entry.component == "transformer" else None

    return joined
