"""Flux.1 dev and schnell (dialects.md §2.5); schnell is dev without the guidance embedder."""

from __future__ import annotations

from persona.core.adapters.family import Family
from persona.core.adapters.transformer import Flux
from persona.formats.models.clip import CLIP_L, T5_XXL

TRANSFORMER = Flux()

FAMILY = Family(
    name="flux1",
    title="Flux.1",
    components={"transformer": (TRANSFORMER,), "text_encoder": (CLIP_L,), "text_encoder_2": (T5_XXL,)},
    architecture="flux-1-dev",
    base_version="flux1",
)
