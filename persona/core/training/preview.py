"""What a trainer will make of each picture, before it does: how it is scaled and cropped, its bucket, its caption, and
what its owner may want to know first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona.core.training.buckets import Fit, Size, bucket_step, buckets, fit, nearest_bucket
from persona.core.training.pictures import Scan
from persona.core.training.plan import Picture

MUCH_LOST = 0.35
"""A crop that takes away more of the picture than this is worth a word: a 3:2 photograph in a square loses a third."""


@dataclass(frozen=True)
class Seen:
    """One picture as it will be trained on: `fit` is the resize and crop, `bucket` its nearest aspect bucket, and
    `warnings` are what to know about it, in words."""

    picture: Picture
    fit: Fit
    bucket: Size
    warnings: tuple[str, ...]


def preview(found: Scan, size: Size, *, into_buckets: bool = False, factor: int = 8) -> tuple[Seen, ...]:
    """What training at `size` (width, height) will see of every usable picture, in their order.

    With `into_buckets` each is fitted to its nearest aspect bucket instead of `size`. Raises ValueError when `size` is
    no multiple of the VAE's `factor`.
    """
    among = buckets(size, step=bucket_step(size, factor))
    return tuple(_seen(picture, found, size, among, into_buckets) for picture in found.pictures)


def _seen(picture: Picture, found: Scan, size: Size, among: Sequence[Size], into_buckets: bool) -> Seen:
    bucket = nearest_bucket(picture.size, among)
    made = fit(picture.size, bucket if into_buckets else size)
    warnings = [problem.message for problem in found.problems if problem.path == picture.path]
    if made.scale > 1:
        warnings.append(f"smaller than it will be trained at; enlarged {made.scale:.2g} times")
    if made.lost > MUCH_LOST:
        warnings.append(f"the crop takes {made.lost:.0%} of it away")
    if not picture.captions:
        warnings.append("no caption of its own")
    return Seen(picture, made, bucket, tuple(warnings))
