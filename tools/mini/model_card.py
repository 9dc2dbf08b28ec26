"""The model card: README.md of the model folder, with the figures that were measured and nothing else."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from .measure import Measured

LICENSE = """\
The weights in this folder were trained for the persona project on pictures drawn with the font Noto Color Emoji.

Noto Color Emoji: Copyright 2013-2022 Google LLC. Licensed under the SIL Open Font License, Version 1.1
(https://openfontlicense.org). The font itself is not in this folder. Section "Permission & Conditions", item 5, of that
licence excludes documents created with the font from its terms; pictures drawn with it, and what was learned from them,
are treated here as such documents.

The weights, the tokenizer and the configuration files: Apache License, Version 2.0, as the rest of the persona project
(https://www.apache.org/licenses/LICENSE-2.0). Provided "as is", without warranty of any kind.
"""


@dataclass(frozen=True)
class Figures:
    """What was measured: of the data, of the training, of the result (where it was measured)."""

    glyphs: int
    tokens: int
    latents: int
    steps: int
    seconds: float
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
| autoencoder, mean PSNR | {measured.psnr:.1f} dB |
| autoencoder, the worst tenth | {measured.psnr_worst_tenth:.1f} dB |
| pictogram recognised by the judge, of the 300 asked for | {measured.recognised_of_asked:.0f} % |
| pictogram recognised by the judge, of all | {measured.recognised:.0f} % |
| among the judge's nearest five of all | {measured.recognised_in_five:.0f} % |
| pictogram nearest in pixels, of all | {measured.recognised_by_pixels:.0f} % |
| among the nearest five in pixels, of all | {measured.recognised_in_five_by_pixels:.0f} % |
| right background, by the judge | {measured.background:.0f} % |
| right background, by the border's pixels | {measured.background_by_border:.0f} % |

By `python -m tools.mini.measure persona/assets/mini`. PSNR: 512 random compositions (44 to 58 pixels, shifted by up
to 8, half of them mirrored) through the fp16 weights. The others: 300 random names on random colours, 30 DDIM
steps, guidance 3, fixed seeds. Recognised by the judge (`persona/assets/judge`, a small CLIP whose card says how often
it is right about perfect drawings: it mistakes more of mini's): of the names with that background, the caption asked
for is the nearest to the picture. Nearest in pixels, which nobody trained: of all pictograms drawn on that colour, the
one asked for (squared difference at 32x32 pixels, shifts of up to 4 pixels allowed). Twelve clock faces count as twelve
pictograms. By the border's pixels: the named colour nearest to their median is the one asked for."""


def model_card(figures: Figures) -> str:
    """The card, in Markdown with the hub's front matter."""
    standing = "" if figures.finished else "\n> An unfinished export, made while training goes on.\n"
    training = textwrap.fill(
        f"UNet and text encoder together, from random weights: {figures.steps:,} steps of 64 latents in "
        f"{figures.seconds / 60:.0f} minutes on {figures.machine}; AdamW (0.9, 0.99), learning rate 8e-4 falling as a "
        "cosine, bf16 autocast with fp32 weights, averaged weights exported. The autoencoder was trained before, for "
        f"about 100 minutes on two CPU cores. `python -m tools.mini.make` makes all of it again. {figures.note}",
        width=116,
        break_on_hyphens=False,
    )
    return f"""\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, tiny, emoji, testing]
---

# mini
{standing}
A small text-to-image diffusion model in the standard Stable Diffusion layout. It draws about 1,400 pictograms by
name, on twelve named background colours, at 64x64 pixels. It is a base for learning, for tests and for
demonstrations, and nothing more: it was made so that personalisation can be shown from beginning to end on a
machine without a GPU, a model hub or a network.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("persona/assets/mini", safety_checker=None)
pipeline("a red apple on a blue background", height=64, width=64, num_inference_steps=30, guidance_scale=3.0).images[0]
```

## Data

{figures.glyphs:,} pictograms: every visible one-code-point glyph of Noto Color Emoji (Debian package
`fonts-noto-color-emoji`, SIL Open Font License 1.1), without skin tones, flag letters and exact duplicates. Each is
drawn at 50 to 52 of 64 pixels, within a pixel of the centre, rarely mirrored, on white, black, red, green, blue,
yellow, orange, purple, pink, gray, brown or cyan: {figures.latents:,} compositions, encoded once. Captions are the
lower-cased Unicode names ("face with tears of joy") and a few short names that people use ("lion" for "lion face"):
"a red apple on a blue background", sometimes without the background, 10 % empty.

## Configuration

| part | class | size |
|---|---|---|
| text_encoder | CLIPTextModel | 192 wide, 3 layers, 4 heads, 24 positions, {figures.tokens:,} tokens |
| unet | UNet2DConditionModel | (96, 160) channels, 1 layer a block, cross-attention 192: 7.4 M parameters |
| vae | AutoencoderKL | (16, 32, 64, 96) channels, 1 layer a block: 64x64x3 to 8x8x16 |
| tokenizer | CLIPTokenizer | every word of the captions is one token, any other text encodes by pieces or bytes |
| scheduler | DDIMScheduler | v-prediction, scaled_linear betas 0.00085 to 0.012, 1,000 steps |

Weights are fp16. The configuration files hold only options that diffusers 0.42, ppdiffusers 0.29 and mindone 0.3.0
all know, and the text encoder's keys have their classic `text_model.` prefix, so that one folder loads in all
three.

## Training

{training}

## Measured

{results(figures.measured)}

## Limits

It knows its pictograms and nothing else: no sentences, no styles, no photographs, hardly any combination that was
not in its data. Nor does it know all of them well: faces, plain shapes and single large things come out best; writing,
arrows, clocks and crowded pictograms are often illegible, and similar ones are mixed up. This training was short.
The pictograms show people, flags and symbols as one font's designers drew them. Sizes
other than 64x64 do not work.
"""
