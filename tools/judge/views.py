"""The pictures the judge learns: glyphs as mini's, seen in many more ways.

mini sees a glyph at 50 to 52 pixels in the middle of twelve colours. The judge sees it at 36 to 60 pixels, shifted,
turned, warped, mirrored, on any colour or on two, brighter and darker, blurred, noisy, as a JPEG, or decoded by an
autoencoder from latents that are a little off: what a generated picture can be like. A quarter of its things are no
pictogram at all but a recoloured glyph with another one stuck on it, new in every batch, so that "the same thing" is
learned beyond the names it knows.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tools.mini.pictures import COLOURS, PICTURE_SIZE, Glyph, Spread, compose, draw

CANVAS = 60
"""Longer side of a glyph on its canvas, in pixels; views are this size or smaller."""

PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
"""The named colours [12, 3] in 0 to 1."""

LOOSE, CALM = Spread(36, 60, shift=10, mirrored=0.5), Spread(48, 54, shift=3, mirrored=0.1)
"""How pictures vary that go through the autoencoder: half of them either way."""

NOISE, SOFTNESS, GHOST = 0.5, 0.6, 0.35
"""How far latents are put off at most: the deviation of noise on them (their own is 1.25), how much of them is the mean
over their neighbours, and how much is another picture's."""

WARP = 2.5
"""How far a warped picture's points are moved, in pixels, as a standard deviation at most."""

MEAN, DEVIATION = 0.5, 0.29
"""What the encoder's pixels (0 to 1) are normalised with, for every channel."""


def canvases(glyphs: Sequence[Glyph]) -> Tensor:
    """Every glyph in the middle of a transparent canvas, colours premultiplied by alpha: [n, 4, 64, 64] uint8."""
    pictures = np.zeros((len(glyphs), PICTURE_SIZE, PICTURE_SIZE, 4), np.uint8)
    for number, glyph in enumerate(glyphs):
        width, height = glyph.image.size
        ratio = CANVAS / max(width, height)
        size = max(1, round(width * ratio)), max(1, round(height * ratio))
        # Pillow resizes RGBA with premultiplied colours and gives them back plain.
        scaled = np.asarray(glyph.image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)).astype(np.float32)
        scaled = np.concatenate([scaled[..., :3] * scaled[..., 3:] / 255, scaled[..., 3:]], axis=-1)
        left, top = (PICTURE_SIZE - size[0]) // 2, (PICTURE_SIZE - size[1]) // 2
        pictures[number, top : top + size[1], left : left + size[0]] = scaled.round()
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Decoded:
    """Pictures that went through an autoencoder [n, 64, 64, 3], with the index of the glyph and of the colour."""

    pictures: NDArray[np.uint8]
    glyphs: NDArray[np.int64]
    colours: NDArray[np.int64]


@torch.no_grad()
def put_off(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Latents [n, 16, 8, 8] that are a little noisy, soft, or haunted by another's: a denoiser's are never quite right
    either. Noise and softness are left out of a third each, ghosts of most."""

    def amounts(most: float) -> Tensor:
        share = 1.5 * torch.rand(len(latents), 1, 1, 1, generator=generator) - 0.5
        return most * share.clamp(min=0)

    padded = torch.nn.functional.pad(latents, (1, 1, 1, 1), mode="replicate")
    around = torch.nn.functional.avg_pool2d(padded, 3, stride=1)
    soft = torch.lerp(latents, around, amounts(SOFTNESS))
    haunted = torch.lerp(soft, latents.roll(1, 0), amounts(GHOST) * (amounts(1) > 0.5))
    return haunted + amounts(NOISE) * torch.randn(latents.shape, generator=generator)


def make_decoded(path: Path, autoencoder: Path, glyphs: Sequence[Glyph], *, repeats: int = 8, seed: int = 1) -> Decoded:
    """Reads the cache, or draws glyphs x repeats compositions, encodes them, puts the latents off, decodes them, and
    writes the cache atomically."""
    if not path.exists():
        random = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        model = AutoencoderKL.from_pretrained(autoencoder, torch_dtype=torch.float32).eval()
        names = list(COLOURS)
        chosen = np.tile(np.arange(len(glyphs)), repeats)
        # 64 in a row have the same background, so that a ghost's is no other.
        colours = random.integers(len(names), size=len(chosen) // 64 + 1).repeat(64)[: len(chosen)]
        pictures = np.empty((len(chosen), PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
        for first in range(0, len(chosen), 64):
            part = slice(first, first + 64)
            drawn = np.stack(
                [
                    draw(glyphs[glyph], compose(glyphs[glyph], names[colour], random, (LOOSE, CALM)[number % 2]))
                    for number, (glyph, colour) in enumerate(zip(chosen[part], colours[part], strict=True))
                ]
            )
            pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                latents = put_off(model.encode(pixels).latent_dist.mean.float(), generator)
                made = model.decode(latents).sample
            made = ((made.float().clamp(-1, 1) + 1) * 127.5).round().byte()
            pictures[part] = made.permute(0, 2, 3, 1).numpy()
        temporary = path.with_name("part-" + path.name)
        np.savez(temporary, pictures=pictures, glyphs=chosen, colours=colours)
        temporary.replace(path)
    with np.load(path) as stored:
        return Decoded(stored["pictures"], stored["glyphs"], stored["colours"])


def placed(
    things: Tensor, sizes: Tensor, centres: Tensor, angles: Tensor, mirrored: Tensor, moved: Tensor | None = None
) -> Tensor:
    """Canvases [n, 4, 64, 64] drawn again at `sizes` (pixels of the longer side), with their centre moved by `centres`
    ([n, 2], pixels), turned by `angles` (radians) and, where `mirrored` ([n], bool), mirrored; every point `moved` by
    its own distance ([n, 64, 64, 2], pixels)."""
    zoom = CANVAS / sizes
    flip = torch.where(mirrored, -1.0, 1.0)
    cosine, sine = torch.cos(angles), torch.sin(angles)
    x, y = (-2 * centres / PICTURE_SIZE).unbind(1)
    rows = torch.stack(
        [
            torch.stack([flip * zoom * cosine, flip * zoom * sine, flip * zoom * (cosine * x + sine * y)], 1),
            torch.stack([-zoom * sine, zoom * cosine, zoom * (-sine * x + cosine * y)], 1),
        ],
        1,
    )
    grid = torch.nn.functional.affine_grid(rows, list(things.shape), align_corners=False)
    if moved is not None:
        grid = grid + moved * (2 / PICTURE_SIZE)
    return torch.nn.functional.grid_sample(things, grid, mode="bilinear", align_corners=False)


def warps(count: int, generator: torch.Generator) -> Tensor:
    """Smooth distances [n, 64, 64, 2] in pixels that bend a picture; half of the pictures are left straight."""
    amount = WARP * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1).clamp(min=0)
    coarse = amount * torch.randn(count, 2, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=PICTURE_SIZE, mode="bilinear", align_corners=True)
    return smooth.permute(0, 2, 3, 1)


def new_things(stored: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Things nobody has a name for [count, 4, 64, 64], and the glyphs they began as: a glyph in colours mixed anew, and
    a smaller one over a part of it."""
    first, second = torch.randint(len(stored), (2, count), generator=generator)
    body, part = stored[first].float() / 255, stored[second].float() / 255
    mix = torch.eye(3) * 0.35 + torch.rand(count, 3, 3, generator=generator)
    mix = mix / mix.sum(2, keepdim=True)
    body = torch.cat([torch.einsum("nij,njhw->nihw", mix, body[:, :3]), body[:, 3:]], 1)
    part = placed(
        part,
        torch.rand(count, generator=generator) * 16 + 18,
        torch.rand(count, 2, generator=generator) * 32 - 16,
        torch.rand(count, generator=generator) * 1.2 - 0.6,
        torch.rand(count, generator=generator) < 0.5,
    )
    return part + body * (1 - part[:, 3:]), first


def backgrounds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Backgrounds [count, 3, 64, 64], and the index of each colour, -1 where it has no name: a third is any colour, or
    two that meet at a line or run into each other."""
    named = torch.randint(len(PALETTE), (count,), generator=generator)
    plain = PALETTE[named] + 0.025 * torch.randn(count, 3, generator=generator)
    first, second = torch.rand(2, count, 3, generator=generator)
    kind = torch.rand(count, generator=generator)
    angle = torch.rand(count, generator=generator) * 2 * torch.pi
    line = torch.linspace(-1, 1, PICTURE_SIZE)
    along = line.view(1, 1, -1) * angle.cos().view(-1, 1, 1) + line.view(1, -1, 1) * angle.sin().view(-1, 1, 1)
    sharp = torch.where(kind > 0.9, 40.0, 0.8).view(-1, 1, 1)
    share = torch.sigmoid(sharp * (along - 0.4 * torch.randn(count, 1, 1, generator=generator)))
    share = torch.where((kind < 0.8).view(-1, 1, 1), torch.zeros(()), share).unsqueeze(1)
    free = first.view(-1, 3, 1, 1) * (1 - share) + second.view(-1, 3, 1, 1) * share
    is_named = kind < 0.67
    pictures = torch.where(is_named.view(-1, 1, 1, 1), plain.view(-1, 3, 1, 1), free)
    return pictures, torch.where(is_named, named, -1)


def views(things: Tensor, mirrors: Tensor, generator: torch.Generator, *, calm: float = 0.0) -> tuple[Tensor, Tensor]:
    """One picture of each thing [n, 3, 64, 64] in 0 to 1 and the index of its background's colour (-1: no name).

    A share of them is `calm`: upright, large and near the middle."""
    count = len(things)
    sizes = 36 + 24 * torch.rand(count, generator=generator).sqrt()  # more of the large ones
    reach = ((PICTURE_SIZE - sizes) / 2 + 1).clamp(max=10).unsqueeze(1)
    centres = (2 * torch.rand(count, 2, generator=generator) - 1) * reach
    angles = torch.randn(count, generator=generator) * 0.06
    still = torch.rand(count, generator=generator) < calm
    sizes = torch.where(still, 46 + 12 * torch.rand(count, generator=generator), sizes)
    centres = torch.where(still.unsqueeze(1), 4 * (2 * torch.rand(count, 2, generator=generator) - 1), centres)
    angles = torch.where(still, torch.zeros(()), angles)
    mirrored = mirrors & (torch.rand(count, generator=generator) < 0.5)
    drawn = placed(things, sizes, centres, angles, mirrored, warps(count, generator))
    behind, colours = backgrounds(count, generator)
    return drawn[:, :3] + behind * (1 - drawn[:, 3:]), colours


def worsened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Lighter, darker, blurred, noisy, as a JPEG: each picture a little of some of it; [n, 3, 64, 64] in 0 to 1."""
    count = len(pictures)

    def draw_random(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    contrast = 1 + 0.2 * (draw_random(1, 1, 1) - 0.5)
    lightness = 0.1 * (draw_random(1, 1, 1) - 0.5) + 0.05 * (draw_random(3, 1, 1) - 0.5)
    pictures = (pictures - 0.5) * contrast + 0.5 + lightness
    for _ in range(2):
        blurred = torch.nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
        # Sums of slices: a depthwise convolution takes ten times as long on a CPU.
        blurred = (blurred[..., 2:, :] + blurred[..., :-2, :]) / 4 + blurred[..., 1:-1, :] / 2
        blurred = (blurred[..., 2:] + blurred[..., :-2]) / 4 + blurred[..., 1:-1] / 2
        share = (2 * draw_random(1, 1, 1) - 1).clamp(min=0)
        pictures = pictures + share * (blurred - pictures)
    loud = 0.035 * (2 * draw_random(1, 1, 1) - 1).clamp(min=0)
    pictures = (pictures + loud * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
    for number in torch.nonzero(draw_random() < 0.1).flatten().tolist():
        quality = int(torch.randint(25, 90, (1,), generator=generator))
        pictures[number] = as_jpeg(pictures[number], quality)
    return pictures


def as_jpeg(picture: Tensor, quality: int) -> Tensor:
    """The picture [3, h, w] after JPEG compression."""
    stored = io.BytesIO()
    values = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(values).save(stored, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(stored)).copy()).permute(2, 0, 1).float() / 255
