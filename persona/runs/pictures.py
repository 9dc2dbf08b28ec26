"""Pictures as a run needs them: found in a folder with their captions, and as arrays for the encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from persona.core.training.decode import picture_mask, picture_pixels
from persona.core.training.pictures import scan
from persona.core.training.plan import Picture, TrainingPlan
from persona.core.training.views import View, size_of


def scan_folder(folder: Path) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
    """The usable pictures of a folder and what the user should know about them and the others.

    Raises DataError when there is not one."""
    found = scan(folder)
    notes = [
        f"{problem.path}: {problem.message}" if problem.used else f"{problem.path} is left out: {problem.message}"
        for problem in found.problems
    ]
    if masked := sum(picture.mask is not None for picture in found.pictures):
        notes.append(f"{folder}: {masked} of {len(found.pictures)} pictures have a mask; only what it shows is learned")
    return found.pictures, tuple(notes)


def load_pixels(picture: Picture, view: View, plan: TrainingPlan) -> Any:
    """[3, height, width] float32 in −1..1: the picture as this view shows it."""
    return picture_pixels(
        picture,
        size_of(picture, plan),
        crop=None if plan.center_crop else view.crop,
        mirrored=view.mirrored,
        seed=plan.seed,
    )


def masks_of(plan: TrainingPlan, factor: int) -> Callable[[int, View], Any] | None:
    """A function of (stream number, view) giving its mask at the latent's size, [1, h, w] float32, or None for a
    picture without one; None when no picture of the plan has a mask. `factor` is the VAE's."""
    if not any(picture.mask for stream in plan.streams for picture in stream.pictures):
        return None

    @lru_cache(maxsize=4096)
    def mask(number: int, view: View) -> Any:
        picture = plan.streams[number].pictures[view.picture]
        crop = None if plan.center_crop else view.crop
        return picture_mask(picture, size_of(picture, plan), factor, crop=crop, mirrored=view.mirrored, seed=plan.seed)

    return mask
