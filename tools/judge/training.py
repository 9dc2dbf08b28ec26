"""Trains the judge. Every thing of a batch is seen twice, in different ways, and these questions are asked:

- which of *all* names is it, and which of the colours is behind it: names and colours have a learned vector each, a
  pole, that pictures and captions are both drawn to (and that nobody needs afterwards),
- which of the batch's captions is it, and the other way round; a caption with another background is among them,
- which of the other views shows the same thing, also for things that have no name.

Losses are cross-entropies over cosines: Radford et al. 2021 (CLIP), Chen et al. 2020 (SimCLR). Without the poles both
encoders wait for each other: after 150 steps hardly anything was learned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPModel

from tools.mini.denoiser import save_state
from tools.mini.pictures import COLOURS, Glyph, caption_name, with_article
from tools.mini.tokenizer import Tokenizer

from .model import WIDTH, build, image_embeddings, text_embeddings
from .views import Decoded, canvases, new_things, views, worsened


@dataclass(frozen=True)
class Training:
    """Options of the training; `seconds` is the whole budget of processor time, over all resumed runs."""

    seconds: float
    named: int = 24
    unnamed: int = 8
    learning_rate: float = 1e-3
    warm_up_steps: int = 100
    weight_decay: float = 0.05
    max_norm: float = 1.0
    average: float = 0.998
    decoded_share: float = 0.15
    calm: float = 0.0
    view_temperature: float = 0.1
    view_weight: float = 0.3
    save_every_seconds: float = 120.0
    log_every_steps: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Pictures [2n, 3, 64, 64]: the first views of the named and the unnamed things, then their second views.

    `glyphs` and `colours` [2n] are indices (the unnamed things' glyph is what they began as; colour -1 has no name)."""

    pictures: Tensor
    glyphs: Tensor
    colours: Tensor


class Source:
    """Makes batches: every glyph once an epoch, each time seen anew."""

    def __init__(self, glyphs: Sequence[Glyph], decoded: Decoded, options: Training, seed: Sequence[int]) -> None:
        self.canvases = canvases(glyphs)
        self.mirrors = torch.tensor([glyph.mirrors for glyph in glyphs])
        self.decoded = torch.from_numpy(decoded.pictures)
        self.decoded_colours = torch.from_numpy(decoded.colours)
        self.options = options
        self.generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        self.order: list[int] = []

    def batch(self) -> Batch:
        """The next batch."""
        named, unnamed = self.options.named, self.options.unnamed
        if len(self.order) < named:
            self.order = torch.randperm(len(self.canvases), generator=self.generator).tolist()
        chosen = torch.tensor([self.order.pop() for _ in range(named)])
        made, begun_as = new_things(self.canvases, unnamed, self.generator)
        things = torch.cat([self.canvases[chosen].float() / 255, made])
        glyphs = torch.cat([chosen, begun_as])
        mirrors = self.mirrors[glyphs]
        pictures, colours = views(things.repeat(2, 1, 1, 1), mirrors.repeat(2), self.generator, calm=self.options.calm)
        self._put_decoded(pictures, colours, chosen, len(things))
        return Batch(worsened(pictures, self.generator), glyphs.repeat(2), colours)

    def _put_decoded(self, pictures: Tensor, colours: Tensor, chosen: Tensor, things: int) -> None:
        """Replaces some of the named things' views by ones that went through the autoencoder."""
        repeats = len(self.decoded) // len(self.canvases)
        for view in range(2):
            replaced = torch.rand(len(chosen), generator=self.generator) < self.options.decoded_share
            which = torch.nonzero(replaced).flatten()
            row = chosen[which] + len(self.canvases) * torch.randint(repeats, (len(which),), generator=self.generator)
            pictures[view * things + which] = self.decoded[row].permute(0, 3, 1, 2).float() / 255
            colours[view * things + which] = self.decoded_colours[row]


class Captions:
    """Token ids of captions."""

    def __init__(self, glyphs: Sequence[Glyph], tokenizer: Tokenizer, random: np.random.Generator) -> None:
        self.glyphs, self.random, self.names = glyphs, random, list(COLOURS)
        self.encode = lru_cache(maxsize=200_000)(tokenizer.encode)

    def ids(self, glyphs: Tensor, colours: Tensor) -> Tensor:
        """Ids [n, 24] of a caption for each glyph with its background, or without one where the colour is -1."""
        return torch.tensor(
            [
                self.encode(
                    caption(caption_name(self.glyphs[glyph], self.random), self.names[colour] if colour >= 0 else "")
                )
                for glyph, colour in zip(glyphs.tolist(), colours.tolist(), strict=True)
            ]
        )


def caption(name: str, colour: str) -> str:
    """ "a red apple on a blue background", or "a red apple" without a colour."""
    return f"{with_article(name)} on {with_article(colour)} background" if colour else with_article(name)


class Poles(torch.nn.Module):
    """A vector for every name [n, 128] and every colour [12, 128], and the sharpness of the cross-entropies to them."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.names = torch.nn.Parameter(torch.randn(names, WIDTH) / WIDTH**0.5)
        self.colours = torch.nn.Parameter(torch.randn(len(COLOURS), WIDTH) / WIDTH**0.5)
        self.scale = torch.nn.Parameter(torch.tensor(3.0))


def losses(
    model: CLIPModel,
    batch: Batch,
    captions: Captions,
    poles: Poles,
    options: Training,
    end: int,
    random: np.random.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """The sum of the losses, and each by name."""
    things = options.named + options.unnamed
    is_named = (torch.arange(2 * things) % things) < options.named
    forget = torch.from_numpy(random.random(2 * things) < 0.2) & is_named
    said = torch.where(forget, -1, batch.colours)  # some captions leave the background out
    other = (said + torch.from_numpy(random.integers(1, len(COLOURS), 2 * things))) % len(COLOURS)
    coloured = torch.nonzero(said >= 0).flatten()
    asked = torch.nonzero(is_named).flatten()
    ids = torch.cat([captions.ids(batch.glyphs, said), captions.ids(batch.glyphs[coloured], other[coloured])])
    with torch.autocast("cpu", torch.bfloat16):
        seen = image_embeddings(model, batch.pictures)
        read = text_embeddings(model, ids, end)
    own, wrong = read.split([2 * things, len(coloured)])
    scale = model.logit_scale.exp().clamp(max=100)

    names, colours = (torch.nn.functional.normalize(values, dim=1) for values in (poles.names, poles.colours))
    sharpness = poles.scale.exp().clamp(max=100)
    behind = torch.nonzero(batch.colours >= 0).flatten()
    name = cross_entropy(sharpness * seen[asked] @ names.T, batch.glyphs[asked])
    colour = cross_entropy(sharpness * seen[behind] @ colours.T, batch.colours[behind])
    # Captions follow the poles, not the other way round.
    words = cross_entropy(sharpness.detach() * own @ names.detach().T, batch.glyphs)
    words = words + cross_entropy(sharpness.detach() * own[coloured] @ colours.detach().T, said[coloured])

    # A caption without a background, or with the same one, is as right for the other view of its glyph.
    same = batch.glyphs[asked, None] == batch.glyphs[None, asked]
    fits = (said[None, asked] < 0) | (said[None, asked] == said[asked, None])
    hidden = same & fits & ~torch.eye(len(asked), dtype=torch.bool)
    logits = (scale * seen[asked] @ own[asked].T).masked_fill(hidden, -1e4)
    target = torch.arange(len(asked))
    pair = cross_entropy(torch.cat([logits, scale * seen[asked] @ wrong.T], 1), target)
    pair = (pair + cross_entropy(logits.masked_fill(hidden.T, -1e4).T, target)) / 2

    matched = (seen[coloured] * own[coloured]).sum(1) - (seen[coloured] * wrong).sum(1)
    background = torch.nn.functional.softplus(-scale * matched).mean()

    alike = seen @ seen.T / options.view_temperature
    alike = alike.masked_fill(torch.eye(2 * things, dtype=torch.bool), -1e4)
    view = cross_entropy(alike, (torch.arange(2 * things) + things) % (2 * things))

    total = name + colour + words + pair + background + options.view_weight * view
    parts = {"name": name, "colour": colour, "words": words, "pair": pair, "background": background, "view": view}
    return total, {key: value.item() for key, value in parts.items()}


def train(folder: Path, options: Training, glyphs: Sequence[Glyph], decoded: Decoded, tokenizer: Tokenizer) -> Path:
    """Trains until the budget of processor seconds is used; returns the state file."""
    path = folder / "together.pt"
    torch.manual_seed(options.seed)
    model = build(tokenizer)
    poles = Poles(len(glyphs))
    parameters: list[Tensor] = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    plain = [parameter for parameter in parameters if parameter.ndim <= 1] + list(poles.parameters())
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    step, elapsed = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        poles.load_state_dict(state["poles"])
        optimizer.load_state_dict(state["optimizer"])
        for kept, (name, _) in zip(average, model.named_parameters(), strict=True):
            kept.copy_(state["average"][name])
        step, elapsed = state["step"], state["elapsed"]
    source = Source(glyphs, decoded, options, (options.seed, step))
    random = np.random.default_rng((options.seed, step))
    captions = Captions(glyphs, tokenizer, random)

    def save() -> None:
        names = [name for name, _ in model.named_parameters()]
        averages = dict(zip(names, average, strict=True))
        learned = {"model": model.state_dict(), "poles": poles.state_dict(), "optimizer": optimizer.state_dict()}
        save_state(path, {**learned, "average": averages, "step": step, "elapsed": elapsed})

    begun, already, saved = time.process_time(), elapsed, time.monotonic()
    sums: dict[str, float] = {}
    while elapsed < options.seconds:
        rate = options.learning_rate * min(1.0, (step + 1) / options.warm_up_steps)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed / options.seconds)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, parts = losses(model, source.batch(), captions, poles, options, tokenizer.end, random)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(options.average, (1 + step) / (10 + step)))
        step += 1
        elapsed = already + time.process_time() - begun
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + value / options.log_every_steps
        if step % options.log_every_steps == 0:
            shown = " ".join(f"{key} {value:.3f}" for key, value in sums.items())
            scale = model.logit_scale.exp().item()
            print(f"step {step} {shown} scale {scale:.0f} rate {rate:.2e} seconds {elapsed:.0f}", flush=True)
            sums.clear()
        if time.monotonic() - saved > options.save_every_seconds:
            save()
            saved = time.monotonic()
    save()
    return path
