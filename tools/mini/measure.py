"""Measures an exported model: the autoencoder's PSNR, and whether its pictures are what was asked for.

No other network judges: a picture counts as recognised when, of *all* pictograms drawn on the asked-for colour in three
sizes, the one nearest to it (squared difference at 32x32 pixels, over shifts of up to 4 pixels) is the one asked for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from .pictures import (
    COLOURS,
    FONT_PATH,
    PICTURE_SIZE,
    WIDE,
    Composition,
    Glyph,
    compose,
    draw,
    load_glyphs,
    with_article,
)
from .sheet import sample

SIZES = (50, 51, 52)
"""Sizes at which the candidates are drawn, in pixels."""


@dataclass(frozen=True)
class Measured:
    """PSNR in dB, the others in percent."""

    psnr: float
    psnr_worst_tenth: float
    recognised: float
    recognised_in_five: float
    background: float


@torch.no_grad()
def autoencoder_psnr(folder: Path, glyphs: Sequence[Glyph], count: int = 512, seed: int = 12345) -> tuple[float, float]:
    """Mean PSNR over pictures and over their worst tenth, in dB: anything drawn anywhere, through the fp16 weights."""
    random = np.random.default_rng(seed)
    model = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    ratios: list[float] = []
    for _ in range(count // 64):
        pictures = []
        for _ in range(64):
            glyph = glyphs[int(random.integers(len(glyphs)))]
            colour = str(random.choice(list(COLOURS)))
            pictures.append(draw(glyph, compose(glyph, colour, random, WIDE)))
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = model.decode(model.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        errors = (decoded - pixels).square().mean(dim=(1, 2, 3)) / 4  # of a range from 0 to 1
        ratios += (-10 * errors.log10()).tolist()
    ratios.sort()
    return float(np.mean(ratios)), float(np.mean(ratios[: max(1, len(ratios) // 10)]))


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


def background_of(picture: NDArray[np.uint8]) -> str:
    """The named colour nearest to the median of the two outermost rows and columns."""
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])]
    )
    middle = np.median(border.astype(np.float64), axis=0)
    return min(COLOURS, key=lambda colour: float(np.square(middle - COLOURS[colour]).sum()))


def measure(
    folder: Path, *, count: int = 300, guidance: float = 4.0, seed: int = 7, device: str = "cpu", font: Path = FONT_PATH
) -> Measured:
    """All figures of the model card; the same seed asks for the same names, colours and noise."""
    glyphs = load_glyphs(font)
    random = np.random.default_rng(seed)
    asked = random.choice(len(glyphs), count, replace=False)
    colours = [str(colour) for colour in random.choice(list(COLOURS), count)]
    prompts = [
        f"{with_article(glyphs[number].name)} on {with_article(colour)} background"
        for number, colour in zip(asked, colours, strict=True)
    ]
    made = sample(folder, prompts, guidance=guidance, seed=seed, device=device)
    pictures = np.stack([np.asarray(picture.convert("RGB"), dtype=np.uint8) for picture in made])
    places: list[int] = []
    drawn = candidates(glyphs)
    for colour in COLOURS:
        chosen = [number for number in range(count) if colours[number] == colour]
        if chosen:
            places += ranks(pictures[chosen], [int(asked[number]) for number in chosen], colour, drawn)
    right = [background_of(picture) == colour for picture, colour in zip(pictures, colours, strict=True)]
    mean, worst = autoencoder_psnr(folder, glyphs)
    return Measured(
        psnr=mean,
        psnr_worst_tenth=worst,
        recognised=100 * float(np.mean([place == 0 for place in places])),
        recognised_in_five=100 * float(np.mean([place < 5 for place in places])),
        background=100 * float(np.mean(right)),
    )


def main() -> None:
    """Reads the command line, prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder, e.g. persona/assets/mini")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--font", type=Path, default=FONT_PATH)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    figures = measure(
        options.folder, count=options.count, guidance=options.guidance, device=options.device, font=options.font
    )
    print(json.dumps(asdict(figures), indent=2))


if __name__ == "__main__":
    main()
