"""Contact sheets: pictures the exported model makes of random names, each with its prompt, to be judged by eye."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from .pictures import COLOURS, FONT_PATH, load_glyphs, with_article

CELL = 136
"""Width of one cell: a picture at twice its size, and a margin."""


def prompts_of(count: int, seed: int, font: Path = FONT_PATH) -> list[str]:
    """Random names on random backgrounds, the same for the same seed."""
    random = np.random.default_rng(seed)
    glyphs = load_glyphs(font)
    chosen = random.choice(len(glyphs), count, replace=False)
    colours = random.choice(list(COLOURS), count)
    return [
        f"{with_article(glyphs[glyph].name)} on {with_article(str(colour))} background"
        for glyph, colour in zip(chosen, colours, strict=True)
    ]


@torch.no_grad()
def sample(
    folder: Path,
    prompts: Sequence[str],
    *,
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
    spacing: str | None = None,
    device: str = "cpu",
) -> list[Image.Image]:
    """One picture a prompt, DDIM, from the exported folder; the noise depends on the seed and the place in the list."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True).to(device)
    if spacing:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(len(prompts), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), 64):
        part = slice(first, first + 64)
        pictures += pipeline(
            list(prompts[part]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=noise[part].to(device),
            height=64,
            width=64,
        ).images
    return pictures


def contact_sheet(pictures: Sequence[Image.Image], labels: Sequence[str], columns: int = 8) -> Image.Image:
    """The pictures at twice their size in a grid, each with its label beneath in lines that fit."""
    rows = -(-len(pictures) // columns)
    height = CELL + 34
    sheet = Image.new("RGB", (columns * CELL, rows * height), "white")
    write = ImageDraw.Draw(sheet)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = number % columns * CELL, number // columns * height
        sheet.paste(picture.resize((128, 128), Image.Resampling.NEAREST), (left + 4, top + 2))
        lines, line = [], ""
        for word in label.split():
            if write.textlength(f"{line} {word}") > CELL - 4 and line:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        write.multiline_text((left + 4, top + 130), "\n".join([*lines, line][:3]), fill="black", spacing=0)
    return sheet


def main() -> None:
    """Reads the command line, samples, writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder, e.g. persona/assets/mini")
    parser.add_argument("sheet", type=Path, help="the PNG to write")
    parser.add_argument("--prompt", action="append", help="instead of random names; may be repeated")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--spacing", choices=["leading", "trailing"], help="instead of the folder's own timestep spacing"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    prompts = options.prompt or prompts_of(options.count, options.seed)
    pictures = sample(
        options.folder,
        prompts,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        spacing=options.spacing,
        device=options.device,
    )
    contact_sheet(pictures, prompts).save(options.sheet)


if __name__ == "__main__":
    main()
