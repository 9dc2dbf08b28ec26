"""What a product says of itself: its own metadata, in the words of modelspec (github.com/Stability-AI/ModelSpec) where
that has some, so that a file found in a year still tells its base, its data and the word that wakes it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path

from persona import __version__
from persona.core.training.base import Base
from persona.core.training.plan import NewTokens, TrainingPlan, Weights

ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "flux1": "flux-1-dev",
}
"""modelspec.architecture by family; SD2 that predicts v is stable-diffusion-v2-768-v."""
THUMBNAIL_SIDE = 256


def product_words(plan: TrainingPlan, base: Base, *, title: str, steps: int) -> dict[str, str]:
    """The metadata of a product of `steps` steps. No date and no path: the same run gives the same bytes."""
    words = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture(plan, base),
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{plan.width}x{plan.height}",
        "persona.method": plan.method,
        "persona.base": base.id,
        "persona.base_hash": base.hash,
        "persona.data_hash": data_hash(plan),
        "persona.steps": str(steps),
        "persona.seed": str(plan.seed),
        "persona.version": __version__,
    }
    prediction = {"epsilon": "epsilon", "v_prediction": "v"}.get(base.prediction_type)
    if prediction:
        words["modelspec.prediction_type"] = prediction
    if plan.metadata.get("trigger"):
        words["modelspec.trigger_phrase"] = plan.metadata["trigger"]
    return words


def title_of(plan: TrainingPlan, base: Base) -> str:
    """What a product is called when nobody said it: by its word, else its method. Not by its run's folder, so that the
    same run has the same bytes wherever it lies."""
    return f"{plan.metadata.get('trigger') or plan.method} ({base.id})"


def architecture(plan: TrainingPlan, base: Base) -> str:
    """modelspec.architecture: the family's, and which kind of adapter it is."""
    family = ARCHITECTURES.get(base.family, base.family)
    if base.family == "sd2" and base.prediction_type == "v_prediction":
        family = "stable-diffusion-v2-768-v"
    if any(isinstance(part, Weights) for part in plan.trains):
        return family
    words_only = all(isinstance(part, NewTokens) for part in plan.trains)
    return f"{family}/{'textual-inversion' if words_only else 'lora'}"


def data_hash(plan: TrainingPlan) -> str:
    """SHA-256 over the user's own pictures (their bytes' digests) and captions, whatever folder they lie in."""
    own = [
        [picture.sha256, list(picture.captions), picture.repeats]
        for stream in plan.streams
        if stream.generated is None
        for picture in stream.pictures
    ]
    return hashlib.sha256(json.dumps(sorted(own), ensure_ascii=False).encode()).hexdigest()


def thumbnail(picture: Path) -> str:
    """A picture as modelspec.thumbnail: a JPEG data URL, at most 256 pixels a side."""
    from PIL import Image

    with Image.open(picture) as opened:
        small = opened.convert("RGB")
        small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
