"""A base model as its configs and headers describe it: no framework is needed to plan a run on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ParameterShape:
    """A stored parameter of a component: torch layout shape and dtype name, from the safetensors header."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Base:
    """A base model in a diffusers folder.

    `id` is the name it was asked for by, `path` the folder, `hash` a digest of configs and weights' headers and bytes,
    `family` one of dialects.md §0 (mini is sd1-shaped but of its own family name "sd1" with narrow widths).
    `components[name]` is the component's config, `parameters[name]` its stored parameters. `schedule` is the
    scheduler's config. `tokenizers` are the tokenizer folders by component (`tokenizer`, `tokenizer_2`).
    """

    id: str
    path: Path
    hash: str
    family: str
    components: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Mapping[str, ParameterShape]]
    schedule: Mapping[str, Any]
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)

    def folder(self, component: str) -> Path:
        """Where a component lies: inside `path`, unless a trained one replaces it (`folders`)."""
        return self.folders.get(component, self.path / component)

    @property
    def denoiser(self) -> str:
        """Name of the component that predicts: unet or transformer."""
        return "transformer" if "transformer" in self.components else "unet"

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text encoders in their order: text_encoder, text_encoder_2, …"""
        return tuple(sorted(name for name in self.components if name.startswith("text_encoder")))

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: epsilon, v_prediction, sample or flow."""
        return str(self.schedule.get("prediction_type", "epsilon"))

    @property
    def latent_factor(self) -> int:
        """How many picture pixels a latent pixel stands for, per side."""
        return int(2 ** (len(self.components["vae"]["block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.components["vae"]["latent_channels"])

    @property
    def native_size(self) -> int:
        """The side in pixels the base was trained at."""
        return int(self.components[self.denoiser].get("sample_size", 64)) * self.latent_factor
