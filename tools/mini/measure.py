"""Measures an exported model: the autoencoder's PSNR, and whether its pictures are what was asked for.

The judge says what a picture shows (persona/assets/judge: a small CLIP of its own, tools/judge): a picture counts as
recognised when, of all names with the asked-for background, the one asked for is nearest. Nothing of mini's training is
in it. It is small and makes mistakes of its own, so pixels are asked as well (tools/mini/nearest.py): which drawing is
nearest, which colour the border has.
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

from persona.plugins.scorers.clip import Clip
from tools.judge.measure import all_captions, backgrounds, caption, ranks

from . import nearest
from .pictures import COLOURS, FONT_PATH, WIDE, Glyph, compose, draw, load_glyphs
from .sheet import sample


@dataclass(frozen=True)
class Measured:
    """PSNR in dB, the others in percent. `recognised` is among all names, `recognised_of_asked` among those asked for;
    these and `background` are the judge's word, those `by_pixels` and `by_border` the pixels'."""

    psnr: float
    psnr_worst_tenth: float
    recognised: float
    recognised_of_asked: float
    recognised_in_five: float
    recognised_by_pixels: float
    recognised_in_five_by_pixels: float
    background: float
    background_by_border: float


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


def background_of(picture: NDArray[np.uint8]) -> str:
    """The named colour nearest to the median of the two outermost rows and columns."""
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:])]
    )
    middle = np.median(border.astype(np.float64), axis=0)
    return min(COLOURS, key=lambda colour: float(np.square(middle - COLOURS[colour]).sum()))


def measure(
    folder: Path,
    *,
    count: int = 300,
    guidance: float = 3.0,
    seed: int = 7,
    device: str = "cpu",
    font: Path = FONT_PATH,
    model: str = "",
) -> Measured:
    """All figures of the model card; the same seed asks for the same names, colours and noise. `model` is the judge's
    folder, "" the embedded one's."""
    glyphs = load_glyphs(font)
    names = list(COLOURS)
    random = np.random.default_rng(seed)
    asked = random.choice(len(glyphs), count, replace=False)
    colours = np.array([names.index(str(colour)) for colour in random.choice(names, count)])
    prompts = [caption(glyphs[number].name, names[colour]) for number, colour in zip(asked, colours, strict=True)]
    made = sample(folder, prompts, guidance=guidance, seed=seed, device=device)
    pictures = [np.asarray(picture.convert("RGB"), dtype=np.uint8) for picture in made]
    judge = Clip(model, device)
    seen, read = judge.picture_vectors(pictures), all_captions(judge, glyphs)
    places = ranks(seen, read, asked, colours)
    places_of_asked = ranks(seen, read[:, asked], np.arange(count), colours)
    places_in_pixels = nearest.places(np.stack(pictures), asked, colours, glyphs)
    border = [background_of(picture) == names[colour] for picture, colour in zip(pictures, colours, strict=True)]
    mean, worst = autoencoder_psnr(folder, glyphs)
    return Measured(
        psnr=mean,
        psnr_worst_tenth=worst,
        recognised=100 * float(np.mean(places == 0)),
        recognised_of_asked=100 * float(np.mean(places_of_asked == 0)),
        recognised_in_five=100 * float(np.mean(places < 5)),
        recognised_by_pixels=100 * float(np.mean(places_in_pixels == 0)),
        recognised_in_five_by_pixels=100 * float(np.mean(places_in_pixels < 5)),
        background=100 * float(np.mean(backgrounds(seen, read, asked) == colours)),
        background_by_border=100 * float(np.mean(border)),
    )


def main() -> None:
    """Reads the command line, prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder, e.g. persona/assets/mini")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--judge", default="", metavar="FOLDER", help="a CLIP that knows mini's names; default: ours")
    parser.add_argument("--font", type=Path, default=FONT_PATH)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    figures = measure(
        options.folder,
        count=options.count,
        guidance=options.guidance,
        device=options.device,
        font=options.font,
        model=options.judge,
    )
    print(json.dumps(asdict(figures), indent=2))


if __name__ == "__main__":
    main()
