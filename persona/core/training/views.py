"""Latent moments of every picture as it will be seen, made once and kept beside the run.

A view is a picture with one crop and one mirroring. The moments (mean and log-variance) are cached, not a draw from
them: every use draws its own latent with the core's noise, as training without a cache would."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.training.buckets import Size, bucket_step, buckets, nearest_bucket
from persona.core.training.plan import Picture, Stream, TrainingPlan

Array = np.ndarray[Any, np.dtype[Any]]
CROPS = 4
"""How many places a random crop is chosen from, per picture; each is encoded once."""


@dataclass(frozen=True)
class View:
    """Picture `picture` of a stream, its `crop`-th crop, mirrored or not."""

    picture: int
    crop: int
    mirrored: bool


def views_of(stream: Stream, plan: TrainingPlan) -> tuple[View, ...]:
    """All views of a stream's pictures: crops × mirrorings, picture by picture."""
    crops = 1 if plan.center_crop else CROPS
    sides = (False, True) if plan.random_flip else (False,)
    return tuple(
        View(picture, crop, mirrored)
        for picture in range(len(stream.pictures))
        for crop in range(crops)
        for mirrored in sides
    )


@lru_cache(maxsize=16)
def plan_buckets(size: Size) -> tuple[Size, ...]:
    """The aspect buckets of a training size."""
    return buckets(size, step=bucket_step(size))


def size_of(picture: Picture, plan: TrainingPlan) -> Size:
    """(width, height) at which the plan trains a picture: its own, or with buckets the one nearest to the picture's
    proportions (its own too for a picture whose size is not known, such as one the base made)."""
    size = (plan.width, plan.height)
    if not plan.buckets or picture.size == (0, 0):
        return size
    return nearest_bucket(picture.size, plan_buckets(size))


def sizes_of(stream: Stream, views: Sequence[View], plan: TrainingPlan) -> tuple[Size, ...]:
    """The training size of every view."""
    return tuple(size_of(stream.pictures[view.picture], plan) for view in views)


def repeats_of(stream: Stream, views: Sequence[View]) -> tuple[int, ...]:
    """How often an epoch uses every view."""
    return tuple(stream.pictures[view.picture].repeats for view in views)


def view_key(picture: Picture, view: View, plan: TrainingPlan, base_hash: str) -> str:
    """Names the moments of a view: equal when picture bytes, geometry, crop seed and base are equal."""
    width, height = size_of(picture, plan)
    parts = (picture.sha256 or picture.path, view.crop, view.mirrored, width, height, plan.center_crop)
    crop_seed = 0 if plan.center_crop else plan.seed
    return hashlib.sha256(repr((parts, crop_seed, base_hash)).encode()).hexdigest()[:40]


class MomentCache:
    """Moments by view key, in memory, kept in one safetensors file of the run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.moments: dict[str, Array] = {}
        if file.is_file():
            from safetensors.numpy import load_file

            try:
                self.moments = dict(load_file(file))
            except Exception:  # a damaged cache is made again: it is nothing but a copy
                self.moments = {}

    def fill(
        self,
        wanted: Sequence[str],
        picture_of: Callable[[str], Array],
        encode: Callable[[Array], tuple[Array, Array]],
        report: Callable[[int, int], None],
    ) -> None:
        """Encode what is missing, one picture at a time: a batch of another size could give other last bits, and a
        resumed run has to see the same latents."""
        from persona.core.training.run import write_atomically

        keys = list(dict.fromkeys(wanted))
        missing = [key for key in keys if key not in self.moments]
        try:
            for done, key in enumerate(missing):
                report(done, len(missing))
                mean, log_variance = encode(picture_of(key)[None])
                self.moments[key] = np.concatenate([mean, log_variance])  # [2, c, h, w]
        finally:  # what an interrupted start has made is kept
            self.moments = {key: self.moments[key] for key in keys if key in self.moments}
            if any(key in self.moments for key in missing):
                from safetensors.numpy import save

                write_atomically(self.file, save(self.moments))

    def __getitem__(self, key: str) -> Array:
        return self.moments[key]


def draw_latents(moments: Sequence[Array], noise: Array, config: Mapping[str, Any]) -> Array:
    """[n, c, h, w] scaled latents: (mean + exp(logvar / 2)·noise − shift)·scale, with the VAE config's factors."""
    stacked = np.stack(moments)
    drawn = stacked[:, 0] + np.exp(0.5 * np.clip(stacked[:, 1], -30.0, 20.0)) * noise
    shift = np.float32(config.get("shift_factor") or 0.0)
    scaled: Array = ((drawn - shift) * np.float32(config.get("scaling_factor", 0.18215))).astype(np.float32)
    return scaled
