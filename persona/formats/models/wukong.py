"""Wukong-Huahua: SD1's UNet and a Chinese CLIP text model (minddiffusion wukong-huahua; stacks/mindspore.md §4)."""

from __future__ import annotations

from dataclasses import replace

from persona.core.adapters.family import Family
from persona.formats.models import sd1
from persona.formats.models.clip import CLIP_L

FAMILY = Family(
    name="wukong",
    title="Wukong-Huahua",
    components={"unet": (sd1.UNET,), "text_encoder": (replace(CLIP_L, vocabulary=21128),)},
    architecture="stable-diffusion-v1",
    base_version="sd_v1",
)
