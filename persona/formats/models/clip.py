"""The CLIP text encoders that several families share."""

from __future__ import annotations

from persona.core.adapters.text_encoder import T5, Clip

CLIP_L = Clip(layers=12, width=768, intermediate=3072)
CLIP_L_PROJECTED = Clip(layers=12, width=768, intermediate=3072, projection=768)
CLIP_H = Clip(layers=23, width=1024, intermediate=4096)  # the penultimate output is used: 23 of OpenCLIP's 24 layers
CLIP_BIG_G = Clip(layers=32, width=1280, intermediate=5120, projection=1280)
T5_XXL = T5()
