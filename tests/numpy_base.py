"""Tiny base models written without a framework, so that every environment's tests open the very same bytes: configs
and shapes from tests/backends/golden/shapes.json (as diffusers and transformers wrote them), values from the core's
counter-based noise, keyed by each parameter's name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.tensor import in_memory
from persona.core.training.base import Base
from persona.core.training.noise import normal
from persona.formats.containers.safetensors import Safetensors
from tests.narrow_models import END, _write_json, _write_tokenizer, narrow_base, scheduler_config

SHAPES = Path(__file__).parent / "backends" / "golden" / "shapes.json"
KINDS = ("tiny", "tiny-sdxl")


def numpy_base(kind: str, folder: Path) -> Base:
    """The base `kind`, written into `folder`, made if missing: "tiny" is SD1.5 with few layers, "tiny-sdxl" SDXL."""
    components = json.loads(SHAPES.read_text(encoding="utf-8"))[kind]
    family = "sdxl" if kind == "tiny-sdxl" else "sd1"
    for name, told in components.items():
        _write_json(folder / name / "config.json", told["config"])
        tensors = {key: in_memory(value_of(f"{name}.{key}", tuple(shape))) for key, shape in told["shapes"].items()}
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        Safetensors().write(folder / name / f"{stem}.safetensors", tensors, {"format": "pt"})
        if name.startswith("text_encoder"):
            _write_tokenizer(folder / name.replace("text_encoder", "tokenizer"), "!" if name.endswith("_2") else END)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(family))
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    }
    _write_json(folder / "model_index.json", index | {"force_zeros_for_empty_prompt": family == "sdxl"})
    return narrow_base(family, folder)


def value_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a parameter: about 1 for a norm's weight, near 0 for a bias, else of variance 1/inputs."""
    drawn = normal(0, name, 0, 0, shape)
    if len(shape) == 1:
        return np.float32(0.1) * drawn + np.float32(name.endswith(".weight"))
    return drawn / np.float32(math.sqrt(math.prod(shape[1:])))
