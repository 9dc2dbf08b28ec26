"""Trains an autoencoder's decoder on, with its encoder left alone: `python -m tools.mini.decoder --help`.

Latents keep their meaning, so this may be done beside or after the denoiser's training.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from .autoencoder import Training, random_pictures, reconstruction_loss
from .denoiser import save_state
from .pictures import FONT_PATH, Glyph, load_glyphs


def refine(source: Path, folder: Path, options: Training, glyphs: Sequence[Glyph], device: str) -> Path:
    """Trains the decoder of `source` on, until the seconds are used; writes and returns `folder`/vae.

    The encoder and the scaling factor stay as they are, so latents mean what they meant: a denoiser that was trained on
    them draws better pictures and has nothing to learn again. Decoded are means, as a denoiser makes them.
    """
    exported, path = folder / "vae", folder / "decoder.pt"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model = AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32).to(
        device, memory_format=torch.channels_last
    )
    trained = {name: value for name, value in model.named_parameters() if name.startswith(("decoder.", "post_quant"))}
    for name, value in model.named_parameters():
        value.requires_grad_(name in trained)
    parameters: list[Tensor] = list(trained.values())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    step, elapsed = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        for value, stored in zip(parameters, state["decoder"], strict=True):
            value.data.copy_(stored)
        optimizer.load_state_dict(state["optimizer"])
        average = [value.clone() for value in state["average"]]
        step, elapsed = state["step"], state["elapsed"]
    random = np.random.default_rng((options.seed, step, 1))

    def save() -> None:
        state = {"decoder": [value.detach() for value in parameters], "optimizer": optimizer.state_dict()}
        save_state(path, {**state, "average": average, "step": step, "elapsed": elapsed})

    begun, already, saved = time.process_time(), elapsed, time.monotonic()
    ratios: list[float] = []
    while elapsed < options.seconds:
        warm = min(1.0, (step + 1) / options.warm_up_steps)
        rate = options.learning_rate * warm * (0.01 + 0.495 * (1 + math.cos(math.pi * elapsed / options.seconds)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pictures = random_pictures(glyphs, options.batch, random).to(device)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            with torch.no_grad():
                latents = model.encode(pictures).latent_dist.mean
            decoded = model.decode(latents).sample.float()
        errors = (decoded - pictures).square().mean(dim=(1, 2, 3))
        # The mean of the logarithm is the mean PSNR; outlines are kept by the gradients, as in the first training.
        loss = errors.log().mean() + 2 * reconstruction_loss(pictures, decoded, options.gradient_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(options.average, (1 + step) / (10 + step)))
        ratios.append(float((-10 * (errors.detach() / 4).log10()).mean()))
        step += 1
        elapsed = already + time.process_time() - begun
        if step % options.log_every_steps == 0:
            mean = sum(ratios) / len(ratios)
            print(f"decoder step {step} psnr {mean:.2f} rate {rate:.2e} seconds {elapsed:.0f}", flush=True)
            ratios.clear()
        if time.monotonic() - saved > options.save_every_seconds:
            save()
            saved = time.monotonic()
    save()
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    model.half().save_pretrained(exported)
    return exported


def main() -> None:
    """Reads the command line and trains; the same command goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("autoencoder", type=Path, help="the folder to start from")
    parser.add_argument("--work", type=Path, required=True, help="where the state and the new folder, vae, are kept")
    parser.add_argument("--minutes", type=float, default=25, help="processor time, over all runs")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at the cosine's top")
    parser.add_argument("--font", type=Path, default=FONT_PATH)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    training = Training(seconds=60 * options.minutes, learning_rate=options.learning_rate)
    print(refine(options.autoencoder, options.work, training, load_glyphs(options.font), options.device))


if __name__ == "__main__":
    main()
