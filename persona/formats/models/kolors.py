"""Kolors: SDXL's UNet behind a projection of ChatGLM3's states (diffusers pipelines/kolors; unet/config.json)."""

from __future__ import annotations

from dataclasses import replace

from persona.core.adapters.family import Family
from persona.formats.models import sdxl

UNET = replace(sdxl.UNET, added=5632, hidden_projection=4096)

FAMILY = Family(
    name="kolors",
    title="Kolors",
    components={"unet": (UNET,)},
    architecture="kolors",
    base_version="kolors",
)
