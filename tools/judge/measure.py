"""Measures a judge's folder, through the scorer that users have: names and backgrounds of pictures it has never seen,
of bad ones, and of things it has no name for.

    python -m tools.judge.measure persona/assets/judge
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
from tools.mini.pictures import COLOURS, FONT_PATH, NARROW, WIDE, Glyph, Spread, compose, draw, load_glyphs

from .training import caption
from .views import canvases, new_things, views, worsened

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """All in percent. `name`: of all names (on the picture's background), the right one is nearest."""

    name: float
    name_of_300: float
    name_as_mini: float
    name_as_mini_of_300: float
    name_in_five: float
    background: float
    name_worsened: float
    background_worsened: float
    name_decoded: float
    background_decoded: float
    same_glyph: float
    same_unnamed: float


def drawn(glyphs: Sequence[Glyph], colours: NDArray[np.int64], spread: Spread, random: np.random.Generator) -> Pictures:
    """Every glyph once, on its colour, somewhere within the spread."""
    names = list(COLOURS)
    return np.stack(
        [
            draw(glyph, compose(glyph, names[colour], random, spread))
            for glyph, colour in zip(glyphs, colours, strict=True)
        ]
    )


def pixels(pictures: torch.Tensor) -> Pictures:
    """[n, 3, h, w] in 0 to 1 as [n, h, w, 3] bytes."""
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()


def all_captions(judge: Clip, glyphs: Sequence[Glyph]) -> NDArray[np.float32]:
    """Vectors [colours, glyphs, d] of every name on every background."""
    return np.stack([judge.text_vectors([caption(glyph.name, colour) for glyph in glyphs]) for colour in COLOURS])


def ranks(
    seen: NDArray[np.float32], read: NDArray[np.float32], glyphs: NDArray[np.int64], colours: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each picture the number of names, with its own background's colour, that are nearer than its own."""
    cosines = np.einsum("nd,ngd->ng", seen, read[colours])
    own = cosines[np.arange(len(seen)), glyphs]
    return np.asarray((cosines > own[:, None]).sum(1))


def backgrounds(seen: NDArray[np.float32], read: NDArray[np.float32], glyphs: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each picture the colour whose caption, with the right name, is nearest."""
    return np.asarray(np.einsum("nd,cnd->nc", seen, read[:, glyphs]).argmax(1))


def same_thing(judge: Clip, first: Pictures, second: Pictures) -> float:
    """Share of pictures whose nearest among the second ones shows the same thing."""
    cosines = judge.picture_vectors(first) @ judge.picture_vectors(second).T
    return float((cosines.argmax(1) == np.arange(len(first))).mean())


@torch.no_grad()
def through(autoencoder: Path, pictures: Pictures) -> Pictures:
    """The pictures encoded and decoded."""
    model = AutoencoderKL.from_pretrained(autoencoder, torch_dtype=torch.float32).eval()
    made = []
    for part in torch.from_numpy(pictures).split(64):
        values = part.permute(0, 3, 1, 2).float() / 127.5 - 1
        made.append((model.decode(model.encode(values).latent_dist.mean).sample.clamp(-1, 1) + 1) / 2)
    return pixels(torch.cat(made))


def measure(folder: Path, autoencoder: Path, *, seed: int = 4321, font: Path = FONT_PATH) -> Measured:
    """All figures of the judge's card; the same seed makes the same pictures, none of which training drew."""
    judge = Clip(str(folder), device="cpu")
    glyphs = load_glyphs(font)
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    read = all_captions(judge, glyphs)
    asked = np.arange(len(glyphs))
    colours = random.integers(len(COLOURS), size=len(asked))
    clean = drawn(glyphs, colours, WIDE, random)
    seen = judge.picture_vectors(clean)
    clean_ranks = ranks(seen, read, asked, colours)
    few = random.choice(len(glyphs), 300, replace=False)
    few_ranks = ranks(seen[few], read[:, few], np.arange(300), colours[few])
    seen_as_mini = judge.picture_vectors(drawn(glyphs, colours, NARROW, random))
    few_as_mini = ranks(seen_as_mini[few], read[:, few], np.arange(300), colours[few])

    worse = pixels(worsened(torch.from_numpy(clean).permute(0, 3, 1, 2).float() / 255, generator))
    seen_worse = judge.picture_vectors(worse)
    decoded = through(autoencoder, clean[few])
    seen_decoded = judge.picture_vectors(decoded)

    stored = canvases(glyphs)
    mirrors = torch.tensor([glyph.mirrors for glyph in glyphs])[few]
    pair = [pixels(views(stored[few].float() / 255, mirrors, generator)[0]) for _ in range(2)]
    unnamed, begun_as = new_things(stored, 300, generator)
    unnamed_pair = [
        pixels(views(unnamed, torch.tensor([glyphs[n].mirrors for n in begun_as.tolist()]), generator)[0])
        for _ in range(2)
    ]
    shares = {
        "name": (clean_ranks == 0).mean(),
        "name_of_300": (few_ranks == 0).mean(),
        "name_as_mini": (ranks(seen_as_mini, read, asked, colours) == 0).mean(),
        "name_as_mini_of_300": (few_as_mini == 0).mean(),
        "name_in_five": (clean_ranks < 5).mean(),
        "background": (backgrounds(seen, read, asked) == colours).mean(),
        "name_worsened": (ranks(seen_worse, read, asked, colours) == 0).mean(),
        "background_worsened": (backgrounds(seen_worse, read, asked) == colours).mean(),
        "name_decoded": (ranks(seen_decoded, read, few, colours[few]) == 0).mean(),
        "background_decoded": (backgrounds(seen_decoded, read, few) == colours[few]).mean(),
        "same_glyph": same_thing(judge, *pair),
        "same_unnamed": same_thing(judge, *unnamed_pair),
    }
    return Measured(**{name: 100 * float(share) for name, share in shares.items()})


def main() -> None:
    """Reads the command line and prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="a judge's folder, e.g. persona/assets/judge")
    parser.add_argument("--autoencoder", type=Path, default=Path("persona/assets/mini/vae"))
    parser.add_argument("--seed", type=int, default=4321)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = measure(options.folder, options.autoencoder, seed=options.seed)
    print(json.dumps(asdict(measured), indent=2))


if __name__ == "__main__":
    main()
