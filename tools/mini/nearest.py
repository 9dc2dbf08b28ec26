"""A second judge that nobody trained: of *all* pictograms drawn on the asked-for colour in three sizes, the one whose
pixels are nearest to the picture (squared difference at 32x32 pixels, over shifts of up to 4 pixels)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .pictures import COLOURS, PICTURE_SIZE, Composition, Glyph, draw

SIZES = (50, 51, 52)
"""Sizes at which the candidates are drawn, in pixels."""


def centred(glyph: Glyph, colour: str, size: int) -> NDArray[np.uint8]:
    """The glyph in the middle of its picture."""
    width, height = glyph.image.size
    ratio = size / max(width, height)
    left, top = ((PICTURE_SIZE - round(side * ratio)) // 2 for side in (width, height))
    return draw(glyph, Composition(colour, size, left, top, mirrored=False))


def halved(pictures: NDArray[np.uint8]) -> Tensor:
    """Pictures [n, 64, 64, 3] as [n, 3, 32, 32] in 0 to 1."""
    return torch.nn.functional.avg_pool2d(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, 2)


def shifted(pictures: Tensor, reach: int = 2) -> Tensor:
    """Every picture at every shift of up to `reach` pixels, edges repeated: [shifts, n, 3, 32, 32]."""
    side = pictures.shape[-1]
    padded = torch.nn.functional.pad(pictures, (reach,) * 4, mode="replicate")
    offsets = range(2 * reach + 1)
    return torch.stack([padded[..., top : top + side, left : left + side] for top in offsets for left in offsets])


def candidates(glyphs: Sequence[Glyph]) -> tuple[Tensor, Tensor]:
    """Every glyph in every size, on black and on white [glyphs * sizes, 3, 32, 32]: any colour lies between."""
    black, white = (
        halved(np.stack([centred(glyph, colour, size) for glyph in glyphs for size in SIZES]))
        for colour in ("black", "white")
    )
    return black, white


def ranks(pictures: NDArray[np.uint8], asked: Sequence[int], colour: str, drawn: tuple[Tensor, Tensor]) -> list[int]:
    """For each picture the number of pictograms that are nearer to it than the asked-for one; 0 is recognised."""
    black, white = drawn
    fill = torch.tensor(COLOURS[colour]).view(3, 1, 1) / 255
    coloured = (black + (white - black) * fill).flatten(1)  # [glyphs * sizes, 3072]
    queries = shifted(halved(pictures)).flatten(2)  # [shifts, n, 3072]
    distances = torch.stack([torch.cdist(query, coloured) for query in queries])
    nearest = distances.amin(0).view(len(pictures), -1, len(SIZES)).amin(2)  # [n, glyphs]
    return [int((row < row[number]).sum()) for row, number in zip(nearest, asked, strict=True)]


def places(
    pictures: NDArray[np.uint8], asked: NDArray[np.int64], colours: NDArray[np.int64], glyphs: Sequence[Glyph]
) -> NDArray[np.int64]:
    """For each picture [n, 64, 64, 3] the number of pictograms nearer to it than the one asked for, on its colour."""
    drawn = candidates(glyphs)
    found = np.zeros(len(pictures), np.int64)
    for number, colour in enumerate(COLOURS):
        chosen = np.flatnonzero(colours == number)
        if len(chosen):
            found[chosen] = ranks(pictures[chosen], asked[chosen].tolist(), colour, drawn)
    return found
