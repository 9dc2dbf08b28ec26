"""Stable Diffusion 2.x (dialects.md §2.1). Both linear and 1x1-convolution projections exist in the wild."""

from __future__ import annotations

from dataclasses import replace

from persona.core.adapters.family import Family
from persona.core.adapters.unet import UNet
from persona.formats.models.clip import CLIP_H

UNET = UNet(channels=(320, 640, 1280, 1280), depth=(1, 1, 1, 0), mid_depth=1, context=1024, linear_projection=True)

FAMILY = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    components={"unet": (UNET, replace(UNET, linear_projection=False)), "text_encoder": (CLIP_H,)},
    architecture="stable-diffusion-v2-512",
    base_version="sd_v2",
)
