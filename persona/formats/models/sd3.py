"""Stable Diffusion 3 medium, 3.5 medium and 3.5 large (dialects.md §2.4)."""

from __future__ import annotations

from persona.core.adapters.family import Family
from persona.core.adapters.transformer import MMDiT
from persona.formats.models.clip import CLIP_BIG_G, CLIP_L_PROJECTED, T5_XXL

MEDIUM = MMDiT(layers=24, width=1536, query_key_norm=False)
MEDIUM_35 = MMDiT(layers=24, width=1536, dual=13)
LARGE_35 = MMDiT(layers=38, width=2432)

FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3",
    components={
        "transformer": (MEDIUM, MEDIUM_35, LARGE_35),
        "text_encoder": (CLIP_L_PROJECTED,),
        "text_encoder_2": (CLIP_BIG_G,),
        "text_encoder_3": (T5_XXL,),
    },
    architecture="stable-diffusion-v3-medium",
    base_version="sd3_m",
)
