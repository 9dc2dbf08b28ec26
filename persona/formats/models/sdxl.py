"""Stable Diffusion XL base (dialects.md §2.1)."""

from __future__ import annotations

from persona.core.adapters.family import Family
from persona.core.adapters.unet import UNet
from persona.formats.models.clip import CLIP_BIG_G, CLIP_L

UNET = UNet(
    channels=(320, 640, 1280),
    depth=(0, 2, 10),
    mid_depth=10,
    context=2048,
    linear_projection=True,
    added=2816,
)

FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    components={"unet": (UNET,), "text_encoder": (CLIP_L,), "text_encoder_2": (CLIP_BIG_G,)},
    architecture="stable-diffusion-xl-v1-base",
    base_version="sdxl_base_v1-0",
)
