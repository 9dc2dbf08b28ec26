"""Trains the UNet and the text encoder together on the cached latents: v-prediction, AdamW, cosine, weights averaged.

The learning rate follows a budget of training *seconds* (the sum over all resumed runs), so that a machine of any
speed ends its cosine when its time is up. The state is written atomically every few minutes; the same command goes
on from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from .latents import Latents
from .pictures import COLOURS, Glyph, caption, caption_name
from .processes import average_gradients, join, wait
from .tokenizer import MAX_LENGTH, Tokenizer

STEPS = 1000
"""Steps of the noise schedule."""


@dataclass(frozen=True)
class Training:
    """Options of the training; `seconds` is the whole budget, over all resumed runs."""

    seconds: float
    batch: int = 64
    learning_rate: float = 8e-4
    warm_up_steps: int = 200
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_norm: float = 1.0
    average: float = 0.999
    save_every_seconds: float = 240.0
    log_every_steps: int = 100
    seed: int = 0
    compiled: bool = True


def build_unet() -> UNet2DConditionModel:
    """The UNet: 7.4 M parameters, two levels with cross-attention.

    `attention_head_dim` is the *number* of heads, as in Stable Diffusion 1.5 (an old misnomer of diffusers).
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: Tokenizer) -> CLIPTextModel:
    """The text encoder: 192 wide, 3 layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer.ids),
            hidden_size=192,
            intermediate_size=512,
            projection_dim=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.start,
            eos_token_id=tokenizer.end,
            pad_token_id=tokenizer.end,
        )
    )


def schedule() -> tuple[Tensor, Tensor]:
    """a_t and s_t [1000] of x_t = a·x0 + s·ε: betas "scaled_linear" 0.00085 to 0.012, as Stable Diffusion's."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return alphas.sqrt().float(), (1 - alphas).sqrt().float()


class Denoiser(torch.nn.Module):
    """UNet and text encoder as one function, so that they compile and average together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Predicted v [n, 16, 8, 8] from x_t [n, 16, 8, 8], t [n] and token ids [n, 24]."""
        states = self.text_encoder(ids)[0]  # [n, 24, 192]
        return self.unet(noisy, timesteps, encoder_hidden_states=states, return_dict=False)[0]


def random_timesteps(count: int, generator: torch.Generator, device: str) -> Tensor:
    """Timesteps [count] with density growing as the root of t: a few 8x8 latents survive much noise, so that the text
    only matters above t = 700 or so, and below 100 there is little left to learn."""
    return (torch.rand(count, generator=generator, device=device) ** (2 / 3) * STEPS).long().clamp(max=STEPS - 1)


def build(tokenizer: Tokenizer) -> Denoiser:
    """A denoiser with fresh weights."""
    denoiser = Denoiser(build_unet(), build_text_encoder(tokenizer))
    # Plain matrix products: on CPU, bf16's fused attention backward takes half of a step (690 ms a step against 313).
    denoiser.unet.set_attn_processor(AttnProcessor())
    denoiser.text_encoder.set_attn_implementation("eager")
    return denoiser


@dataclass(frozen=True)
class Batch:
    """Latents [n, 16, 8, 8] and token ids [n, 24]."""

    latents: Tensor
    ids: Tensor


def batches(
    latents: Latents, glyphs: Sequence[Glyph], tokenizer: Tokenizer, size: int, random: np.random.Generator
) -> Iterator[Batch]:
    """Endless batches: every sample once an epoch, each time with a new caption."""
    names = list(COLOURS)
    encode = lru_cache(maxsize=200_000)(tokenizer.encode)
    while True:
        order = random.permutation(len(latents.values))
        for first in range(0, len(order) - size + 1, size):
            chosen: NDArray[np.int64] = order[first : first + size]
            captions = [
                caption(caption_name(glyphs[latents.glyphs[sample]], random), names[latents.colours[sample]], random)
                for sample in chosen
            ]
            ids = torch.tensor([encode(text) for text in captions])
            yield Batch(torch.from_numpy(latents.values[chosen].astype(np.float32)), ids)


def learning_rate(options: Training, step: int, elapsed: float) -> float:
    """Linear warm-up over steps, then half a cosine over the budget of seconds, down to a hundredth."""
    warm = min(1.0, (step + 1) / options.warm_up_steps)
    progress = min(1.0, elapsed / options.seconds)
    return options.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Written beside the old state and renamed over it: a kill at any moment leaves one of the two whole."""
    temporary = path.with_name("part-" + path.name)
    torch.save(state, temporary)
    temporary.replace(path)


def train(
    folder: Path, options: Training, latents: Latents, glyphs: Sequence[Glyph], tokenizer: Tokenizer, device: str
) -> Path:
    """Trains until the budget of seconds is used; returns the state file (its `average` is what is exported)."""
    path = folder / "denoiser.pt"
    rank, processes = join(device)
    torch.manual_seed(options.seed)
    denoiser = build(tokenizer).to(device)
    parameters: list[Tensor] = list(denoiser.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )
    step, elapsed = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        denoiser.load_state_dict(state["denoiser"])
        optimizer.load_state_dict(state["optimizer"])
        for kept, value in zip(
            average, (state["average"][name] for name, _ in denoiser.named_parameters()), strict=True
        ):
            kept.copy_(value)
        step, elapsed = state["step"], state["elapsed"]
    # After a resume the data start a new epoch with other random numbers, which is as good for training.
    random = np.random.default_rng((options.seed, step, rank))
    source = batches(latents, glyphs, tokenizer, options.batch // processes, random)
    generator = torch.Generator(device).manual_seed(options.seed + step * processes + rank)
    signal, noise_level = (values.to(device) for values in schedule())

    def loss_of(clean: Tensor, noise: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        a, s = (values[timesteps].view(-1, 1, 1, 1) for values in (signal, noise_level))
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            predicted = denoiser(a * clean + s * noise, timesteps, ids)
        return (predicted.float() - (a * noise - s * clean)).square().mean()

    compute = torch.compile(loss_of) if options.compiled else loss_of

    def save() -> None:
        names = [name for name, _ in denoiser.named_parameters()]
        save_state(
            path,
            {
                "denoiser": denoiser.state_dict(),
                "average": dict(zip(names, average, strict=True)),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "elapsed": elapsed,
            },
        )

    if rank > 0:
        wait()  # until the first process has compiled: the others then find its work in the cache
    first = step
    mark = saved = time.monotonic()
    losses: list[Tensor] = []
    while elapsed < options.seconds:
        batch = next(source)
        clean, ids = batch.latents.to(device), batch.ids.to(device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        timesteps = random_timesteps(len(clean), generator, device)
        rate = learning_rate(options, step, elapsed)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = compute(clean, noise, timesteps, ids)
        loss.backward()
        if step == first and rank == 0:
            wait()
        elapsed = average_gradients(parameters, elapsed)
        torch.nn.utils.clip_grad_norm_(parameters, options.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            keep = min(options.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, parameters, 1 - keep)
        losses.append(loss.detach())
        step += 1
        now = time.monotonic()
        if step > first + 1:  # the first step after a start compiles, which is not training
            elapsed += now - mark
        mark = now
        if rank == 0 and step % options.log_every_steps == 0:
            mean = torch.stack(losses).mean().item()
            print(f"step {step} loss {mean:.4f} rate {rate:.2e} seconds {elapsed:.0f}", flush=True)
            losses.clear()
        if rank == 0 and now - saved > options.save_every_seconds:
            save()
            saved = now
    if rank == 0:
        save()
    wait()
    return path
