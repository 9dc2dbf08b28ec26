"""How a picture of any size becomes one of the training size: aspect buckets, and the geometry of resize and crop.

A picture is scaled, keeping its proportions, until it just covers the target, and what stands over is cropped away.
With aspect buckets the target is the one of about the same area whose proportions are nearest, so that little stands
over (NovelAI's aspect ratio bucketing, as kohya's trainer has it). Sizes are (width, height) in pixels everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

Size = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """A resize followed by a crop: scaled to `resized`, then the `size` whose left upper corner is at (left, top)."""

    original: Size
    resized: Size
    size: Size
    left: int = 0
    top: int = 0

    @property
    def spare(self) -> Size:
        """How many pixels the resized picture is larger than the crop, (horizontally, vertically)."""
        return self.resized[0] - self.size[0], self.resized[1] - self.size[1]

    @property
    def scale(self) -> float:
        """How much the picture is enlarged (above 1) or reduced."""
        return max(self.resized[0] / self.original[0], self.resized[1] / self.original[1])

    @property
    def lost(self) -> float:
        """The share of the picture that the crop takes away, 0..1."""
        return 1.0 - (self.size[0] * self.size[1]) / (self.resized[0] * self.resized[1])

    def at(self, left: int, top: int) -> Fit:
        """The same resize, cropped at another place. Raises ValueError for a place outside the picture."""
        if not (0 <= left <= self.spare[0] and 0 <= top <= self.spare[1]):
            raise ValueError(f"a crop at {left}, {top} leaves the picture; up to {self.spare} is spare")
        return dataclasses.replace(self, left=left, top=top)


def fit(original: Size, size: Size) -> Fit:
    """Scale `original` until it covers `size`, and crop the middle. Raises ValueError for an empty size."""
    if min(*original, *size) < 1:
        raise ValueError(f"a picture of {original} cannot be fitted to {size}")
    scale = max(size[0] / original[0], size[1] / original[1])
    resized = (max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale)))
    return Fit(original, resized, size, (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2)


def time_ids(made: Fit) -> tuple[int, int, int, int, int, int]:
    """SDXL's size conditioning of a fitted picture (arXiv 2307.01952, section 2.2), in the order diffusers has:
    original height and width, the crop's top and left, target height and width."""
    (width, height), (target_width, target_height) = made.original, made.size
    return height, width, made.top, made.left, target_height, target_width


def buckets(size: Size, *, step: int = 64, smallest: int = 0, largest: int = 0) -> tuple[Size, ...]:
    """The sizes pictures are sorted into when training at `size`: sides are multiples of `step`, areas at most that of
    `size` and as near to it as the step allows, sides from `smallest` (default half of the shorter side) to `largest`
    (default twice the longer one). Narrowest first, each with its turned twin, `size` itself always among them.

    Raises ValueError when `size` is not a multiple of `step`.
    """
    if size[0] % step or size[1] % step or min(size) < step:
        raise ValueError(f"{size[0]}x{size[1]} is not a multiple of {step}")
    smallest = max(step, smallest or min(size) // 2)
    largest = largest or max(size) * 2
    found = {size, (size[1], size[0])}
    for width in range(math.ceil(smallest / step) * step, largest + 1, step):
        height = min(largest, size[0] * size[1] // width) // step * step
        if height >= smallest:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def bucket_step(size: Size, factor: int = 8) -> int:
    """The step of aspect buckets at a training size: 64, as is usual, or the VAE's `factor` for small sizes."""
    return 64 if min(size) >= 256 and size[0] % 64 == 0 and size[1] % 64 == 0 else factor


def nearest_bucket(original: Size, among: Iterable[Size]) -> Size:
    """The bucket whose proportions are nearest to those of a picture of size `original`; of two that are equally near,
    the one with the larger area. Raises ValueError when there is no bucket."""
    proportion = math.log(original[0] / original[1])
    return min(among, key=lambda size: (round(abs(math.log(size[0] / size[1]) - proportion), 9), -size[0] * size[1]))
