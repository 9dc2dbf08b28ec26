"""diffusers' scheduler_config.json for models whose file has none: the schedule their family was trained with.

Betas, and which of the values are what, from the scheduler folders that Stability and Runway published with SD1.5,
SD2.1 and SDXL. Whether a model predicts noise or v is its own affair; a file may tell (`prediction_type`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from persona.core.adapters.tensor import TensorRef

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TOLD_BY = "modelspec.prediction_type"
"""The key of ModelSpec in a file's metadata (Stability-AI/ModelSpec): "epsilon" or "v"."""
PROBE = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
"""What ComfyUI looks at in SD2 (comfy/supported_models.py, SD20): spread by more than 0.09, the model predicts v."""


def scheduler_config(family: str, prediction: str) -> dict[str, Any] | None:
    """`scheduler/scheduler_config.json`, of a DDIMScheduler; None for a family that has another kind."""
    if family not in ("sd1", "sd2", "sdxl"):
        return None
    return {
        "_class_name": "DDIMScheduler",
        **BETAS,
        "clip_sample": False,
        "prediction_type": prediction,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }


def prediction_type(
    family: str, unet: Mapping[str, TensorRef], extras: Mapping[str, TensorRef], metadata: Mapping[str, str]
) -> tuple[str, str]:
    """What the denoiser predicts, "epsilon" or "v_prediction", and how that is known."""
    told = metadata.get(TOLD_BY, "")
    if told:
        return ("v_prediction" if told.startswith("v") else "epsilon"), f"its metadata says so ({TOLD_BY})"
    if "v_pred" in extras:  # how SDXL checkpoints that predict v say so: comfy/supported_models.py, SDXL
        return "v_prediction", "it has a tensor v_pred"
    if family == "sd2" and PROBE in unet:
        spread = float(np.asarray(unet[PROBE].read(), np.float32).std())
        said = f"{PROBE} is spread by {spread:.2g}, ComfyUI's sign for SD2"
        return ("v_prediction" if spread > 0.09 else "epsilon"), said
    return "epsilon", "as models of this family do"
