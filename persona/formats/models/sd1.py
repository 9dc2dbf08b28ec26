"""Stable Diffusion 1.x (dialects.md §2.1)."""

from __future__ import annotations

from persona.core.adapters.family import Family
from persona.core.adapters.unet import UNet
from persona.formats.models.clip import CLIP_L

UNET = UNet(channels=(320, 640, 1280, 1280), depth=(1, 1, 1, 0), mid_depth=1, context=768)

FAMILY = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    components={"unet": (UNET,), "text_encoder": (CLIP_L,)},
    architecture="stable-diffusion-v1",
    base_version="sd_v1",
)
