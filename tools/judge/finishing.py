"""Trains the judge's picture encoder on, while the text encoder stays as it is.

Every caption's vector is then known beforehand, so each picture is asked which of *all* names it shows, with its own
background, and which of all backgrounds it has: the very questions the judge will be asked. That costs no more than
the pictures themselves. More of them are calm (upright, large, near the middle), as generated ones mostly are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPModel

from tools.mini.denoiser import save_state
from tools.mini.pictures import COLOURS, Glyph
from tools.mini.tokenizer import Tokenizer

from .model import build, image_embeddings, text_embeddings
from .training import Batch, Source, Training, caption
from .views import Decoded


@torch.no_grad()
def all_captions(model: CLIPModel, glyphs: Sequence[Glyph], tokenizer: Tokenizer) -> Tensor:
    """Vectors [13, glyphs, 128] of every name on every colour, and last without a background."""
    rows = []
    for colour in (*COLOURS, ""):
        ids = torch.tensor([tokenizer.encode(caption(glyph.name, colour)) for glyph in glyphs])
        rows.append(torch.cat([text_embeddings(model, part, tokenizer.end) for part in ids.split(256)]))
    return torch.stack(rows)


def losses(model: CLIPModel, batch: Batch, read: Tensor, options: Training) -> tuple[Tensor, dict[str, float]]:
    """The sum of the losses, and each by name. A colour of -1 takes the captions without a background, the last."""
    things = options.named + options.unnamed
    asked = torch.nonzero((torch.arange(2 * things) % things) < options.named).flatten()
    behind = torch.nonzero(batch.colours >= 0).flatten()
    with torch.autocast("cpu", torch.bfloat16):
        seen = image_embeddings(model, batch.pictures)
    scale = model.logit_scale.exp().clamp(max=100)
    names = torch.bmm(read[batch.colours[asked]], seen[asked].unsqueeze(2)).squeeze(2)
    name = cross_entropy(scale * names, batch.glyphs[asked])
    colours = torch.einsum("cnd,nd->nc", read[:-1, batch.glyphs[behind]], seen[behind])
    background = cross_entropy(scale * colours, batch.colours[behind])
    alike = seen @ seen.T / options.view_temperature
    alike = alike.masked_fill(torch.eye(2 * things, dtype=torch.bool), -1e4)
    view = cross_entropy(alike, (torch.arange(2 * things) + things) % (2 * things))
    total = name + background + options.view_weight * view
    return total, {"name": name.item(), "background": background.item(), "view": view.item()}


def finish(
    begun_from: Path, path: Path, options: Training, glyphs: Sequence[Glyph], decoded: Decoded, tokenizer: Tokenizer
) -> Path:
    """Trains on from the averages of `begun_from` until the budget of processor seconds is used; returns the state file
    `path`, whose `average` is what is exported."""
    torch.manual_seed(options.seed)
    model = build(tokenizer)
    start = torch.load(begun_from, weights_only=True)  # of both encoders' training, or of a finishing before
    model.load_state_dict(start["average"], strict=False)
    read = all_captions(model, glyphs, tokenizer)
    trained = [name for name, _ in model.named_parameters() if not name.startswith("text_")]
    learned = dict(model.named_parameters())
    for name, value in learned.items():
        value.requires_grad_(name in trained)
    parameters: list[Tensor] = [learned[name] for name in trained]
    average = [parameter.detach().clone() for parameter in parameters]
    groups = [
        {"params": [value for value in parameters if value.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [value for value in parameters if value.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)
    step, elapsed = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = [state["average"][name].clone() for name in trained]
        step, elapsed = state["step"], state["elapsed"]
    source = Source(glyphs, decoded, options, (options.seed, step, 2))

    def save() -> None:
        averages = {
            **{name: value.detach() for name, value in learned.items()},
            **dict(zip(trained, average, strict=True)),
        }
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": averages}
        together = {
            "steps_together": start.get("steps_together", start["step"]),
            "elapsed_together": start.get("elapsed_together", start["elapsed"]),
        }
        save_state(path, {**state, **together, "step": step, "elapsed": elapsed})

    begun, already, saved = time.process_time(), elapsed, time.monotonic()
    sums: dict[str, float] = {}
    while elapsed < options.seconds:
        rate = options.learning_rate * min(1.0, (step + 1) / options.warm_up_steps)
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed / options.seconds)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, parts = losses(model, source.batch(), read, options)
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
            print(f"finishing step {step} {shown} rate {rate:.2e} seconds {elapsed:.0f}", flush=True)
            sums.clear()
        if time.monotonic() - saved > options.save_every_seconds:
            save()
            saved = time.monotonic()
    save()
    return path
