"""The Stable Diffusion XL refiner (dialects.md §2.1); its only text encoder is diffusers' `text_encoder_2`."""

from __future__ import annotations

from persona.core.adapters.family import Family
from persona.core.adapters.unet import UNet
from persona.formats.models.clip import CLIP_BIG_G

UNET = UNet(
    channels=(384, 768, 1536, 1536),
    depth=(0, 4, 4, 0),
    mid_depth=4,
    context=1280,
    linear_projection=True,
    added=2560,
)

FAMILY = Family(
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    components={"unet": (UNET,), "text_encoder_2": (CLIP_BIG_G,)},
    architecture="stable-diffusion-xl-v1-refiner",
    base_version="sdxl_refiner_v1-0",
)
