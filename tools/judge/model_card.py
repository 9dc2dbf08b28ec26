"""The judge's card: README.md of its folder, with the figures that were measured and nothing else."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from tools.mini.model_card import LICENSE

from .measure import Measured

__all__ = ["LICENSE", "Figures", "model_card"]


@dataclass(frozen=True)
class Figures:
    """What was measured: of the data, of the training, of the result (where it was measured)."""

    glyphs: int
    tokens: int
    parameters: int
    steps: int
    seconds: float
    finishing_steps: int
    finishing_seconds: float
    restarts: tuple[tuple[int, float], ...]  # steps and seconds of each
    machine: str
    note: str = ""
    finished: bool = False
    measured: Measured | None = None


def results(measured: Measured | None) -> str:
    """The table of results, or a line that says there is none."""
    if measured is None:
        return "Nothing yet: this export was not measured."
    return f"""\
| figure | value |
|---|---|
| right name, of all | {measured.name:.1f} % |
| right name, of 300 | {measured.name_of_300:.1f} % |
| right name among the nearest five of all | {measured.name_in_five:.1f} % |
| drawn as in mini's data (50 to 52 pixels, in the middle): right name, of all | {measured.name_as_mini:.1f} % |
| drawn as in mini's data: right name, of 300 | {measured.name_as_mini_of_300:.1f} % |
| right background, of twelve | {measured.background:.1f} % |
| worsened pictures: right name, of all | {measured.name_worsened:.1f} % |
| worsened pictures: right background | {measured.background_worsened:.1f} % |
| through mini's autoencoder: right name, of all | {measured.name_decoded:.1f} % |
| through mini's autoencoder: right background | {measured.background_decoded:.1f} % |
| same pictogram found among 300, picture to picture | {measured.same_glyph:.1f} % |
| same *unnamed* thing found among 300, picture to picture | {measured.same_unnamed:.1f} % |

By `python -m tools.judge.measure persona/assets/judge`, which uses persona's own scorer. Pictures: every pictogram
once, 44 to 58 pixels, shifted by up to 8, half of those that may be mirrored, on a random one of the twelve colours;
drawn anew. Names compete on the picture's own background, backgrounds with the right name. Worsened: contrast,
lightness, blur, noise and JPEG as in training. The last two rows compare two pictures of each thing with different
size, place, turn and background; unnamed things are recoloured pictograms with a second one over them, made anew, so
that training has seen none of them. Similar pictograms (clock faces, arrows, mahjong tiles) count as different
ones."""


def restarts(done: tuple[tuple[int, float], ...]) -> str:
    """What is said of the warm restarts after the first finishing."""
    if not done:
        return ""
    each = " and ".join(f"{steps:,} steps in {seconds / 60:.0f} minutes" for steps, seconds in done)
    return f", then with the learning rate back at 7e-4: {each}"


def model_card(figures: Figures) -> str:
    """The card, in Markdown with the hub's front matter."""
    standing = "" if figures.finished else "\n> An unfinished export, made while training goes on.\n"
    training = textwrap.fill(
        f"Both encoders together, from random weights: {figures.steps:,} steps of 64 pictures (32 things, each "
        f"twice) in {figures.seconds / 60:.0f} minutes of one core's time on {figures.machine}; AdamW (0.9, 0.98), "
        "learning rate 1e-3 falling as a cosine, bf16 autocast with fp32 weights, averaged weights exported. The "
        "losses are cross-entropies over cosines: the picture's name among all names and its background among the "
        "twelve; its caption among the batch's, with the same name on another background among them; the other view "
        "of the same thing among all views. Then the picture encoder alone, against the text encoder's vectors of all "
        f"captions: {figures.finishing_steps:,} steps in {figures.finishing_seconds / 60:.0f} minutes"
        f"{restarts(figures.restarts)}. No weights "
        "and no pictures of mini's training were used; mini's autoencoder was, to see what its blur looks like. "
        f"`python -m tools.judge.make` makes all of it again. {figures.note}",
        width=116,
        break_on_hyphens=False,
    )
    return f"""\
---
license: apache-2.0
library_name: transformers
tags: [clip, tiny, emoji, testing]
---

# judge
{standing}
A small CLIP that judges pictures of mini's world: how much two pictures show the same thing (cosine of picture and
picture, CLIP-I), and how well a picture shows what a caption says (cosine of picture and text, CLIP-T). It is the
default of persona's scorer `clip`; give the scorer a full-size CLIP for photographs.

```
persona score pictures --reference subject --prompt "a robot on a blue background"
```

## Data

The {figures.glyphs:,} pictograms that mini was trained on (Noto Color Emoji, Debian package
`fonts-noto-color-emoji`, SIL Open Font License 1.1), seen in other ways: 36 to 60 of 64 pixels, shifted by up to 10,
turned by a few degrees, warped, mirrored, on mini's twelve colours, on any other, on two; lighter, darker, blurred,
noisy, as a JPEG, decoded by mini's autoencoder from latents that are a little noisy, soft or mixed with another's. A
quarter of the things, in the last restart an eighth, are no pictogram but a recoloured one with another over it,
without a caption of its own. Captions: "a red apple on a blue background", or without the background.

## Configuration

CLIPModel: 8x8 patches of 64x64 pixels and 4 layers, 24 tokens and 2 layers, both 128 wide with 4 heads, a common
space of 128: {figures.parameters / 1e6:.2f} M parameters, fp16. Tokenizer: the words of the captions,
{figures.tokens:,} tokens (mini's, made again).

## Training

{training}

## Measured

{results(figures.measured)}

## Limits

It knows pictograms on plain backgrounds, at 64x64 pixels. Its cosines mean nothing for photographs, and none can be
compared with those of another CLIP. It has read the names of pictograms and nothing else: a placeholder such as "sks"
says nothing to it, so ask with the class's name. It was trained on the same pictograms as mini, so it can tell whether
mini draws what it learned, and nothing about pictures that neither has seen. It mixes up similar pictograms even when
they are drawn perfectly, as the table says: figures of recognition can hardly be higher than those. Similarity of
things without a name was learned from recoloured and combined pictograms; how far that carries is what the last row
above measures.
"""
