"""Trains the autoencoder: 64x64x3 to 8x8x16, on random compositions drawn as it goes.

Loss: L1 + L2 + L1 of the picture's gradients + a tiny KL term. The gradients keep the outlines; no network judges the
pictures, so nothing has to be downloaded. Everything later is built on these latents: train this first and longest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .denoiser import save_state
from .pictures import COLOURS, WIDE, Glyph, compose, draw


@dataclass(frozen=True)
class Training:
    """Options of the training; `seconds` is the whole budget, over all resumed runs."""

    seconds: float
    batch: int = 16
    learning_rate: float = 2e-3
    warm_up_steps: int = 200
    kl_weight: float = 1e-4
    gradient_weight: float = 1.0
    average: float = 0.999
    save_every_seconds: float = 240.0
    log_every_steps: int = 100
    seed: int = 0


def build_autoencoder() -> AutoencoderKL:
    """The autoencoder with fresh weights: 16 latent channels, a factor of 8."""
    return AutoencoderKL(
        sample_size=64,
        latent_channels=16,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
    )


def random_pictures(glyphs: Sequence[Glyph], count: int, random: np.random.Generator) -> Tensor:
    """Pictures [count, 3, 64, 64] in -1 to 1: any glyph, any colour, places further out than captions ever see."""
    chosen = [glyphs[int(number)] for number in random.integers(len(glyphs), size=count)]
    colours = random.choice(list(COLOURS), count)
    pictures = [
        draw(glyph, compose(glyph, str(colour), random, WIDE)) for glyph, colour in zip(chosen, colours, strict=True)
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def gradients(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the right and to the lower neighbour."""
    return pictures[..., :, 1:] - pictures[..., :, :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def reconstruction_loss(pictures: Tensor, decoded: Tensor, gradient_weight: float) -> Tensor:
    """L1 + L2 + L1 of the gradients, means over all values."""
    loss = (decoded - pictures).abs().mean() + (decoded - pictures).square().mean()
    for wanted, made in zip(gradients(pictures), gradients(decoded), strict=True):
        loss = loss + gradient_weight * (made - wanted).abs().mean()
    return loss


def train(folder: Path, options: Training, glyphs: Sequence[Glyph], device: str) -> Path:
    """Trains until the seconds are used; writes and returns the autoencoder's folder, its scaling factor measured."""
    exported = folder / "vae"
    path = folder / "autoencoder.pt"
    torch.manual_seed(options.seed)
    model = build_autoencoder().to(device)
    parameters: list[Tensor] = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step, elapsed = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for kept, value in zip(average, state["average"], strict=True):
            kept.copy_(value)
        step, elapsed = state["step"], state["elapsed"]
    random = np.random.default_rng((options.seed, step))

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        save_state(path, {**state, "step": step, "elapsed": elapsed})

    mark = saved = time.monotonic()
    losses: list[float] = []
    while elapsed < options.seconds:
        warm = min(1.0, (step + 1) / options.warm_up_steps)
        rate = options.learning_rate * warm * (0.01 + 0.495 * (1 + math.cos(math.pi * elapsed / options.seconds)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pictures = random_pictures(glyphs, options.batch, random).to(device)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            posterior = model.encode(pictures).latent_dist
            decoded = model.decode(posterior.sample()).sample
        loss = reconstruction_loss(pictures, decoded.float(), options.gradient_weight)
        total = loss + options.kl_weight * posterior.kl().float().mean() / posterior.mean[0].numel()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(options.average, (1 + step) / (10 + step)))
        losses.append(loss.item())
        step += 1
        now = time.monotonic()
        elapsed, mark = elapsed + now - mark, now
        if step % options.log_every_steps == 0:
            mean = sum(losses) / len(losses)
            print(f"autoencoder step {step} loss {mean:.4f} rate {rate:.2e} seconds {elapsed:.0f}", flush=True)
            losses.clear()
        if now - saved > options.save_every_seconds:
            save()
            saved = now
    save()
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
        spread = torch.cat(
            [model.encode(random_pictures(glyphs, 64, random).to(device)).latent_dist.mean for _ in range(8)]
        )
    # Denoisers expect latents of unit deviation (Rombach et al., 2022, section G).
    model.register_to_config(scaling_factor=round(1 / spread.std().item(), 4))
    model.half().save_pretrained(exported)
    return exported
