"""What persona's training is measured beside: the shortest loop that trains the same thing with diffusers (and PEFT)
alone. Latents and prompts are encoded once; noise, timesteps, loss, clipping and AdamW are torch's and diffusers' own.

    python benchmarks/bare_loop.py BASE METHOD PICTURES --batch 1 --steps 4

prints, as JSON, when the libraries were imported and when the first step was done (seconds from the start of the
process, by the clock and of processor time), and the most memory used."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

METHODS = ("lora", "dreambooth", "textual-inversion", "full")
RANK = 8


def peak_bytes() -> int:
    """The most memory this process has used so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class BareLoop:
    """One base with one method attached; `step()` is an optimizer step on `batch` samples (of each stream)."""

    def __init__(self, base: Path, method: str, pictures: list[Path], batch: int) -> None:
        import numpy as np
        import torch
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from PIL import Image
        from transformers import CLIPTextModel, CLIPTokenizer

        self.torch, self.method, self.batch = torch, method, batch
        self.unet = UNet2DConditionModel.from_pretrained(base / "unet").requires_grad_(False)
        self.scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        encoder: Any = CLIPTextModel.from_pretrained(base / "text_encoder").requires_grad_(False)
        vae = AutoencoderKL.from_pretrained(base / "vae")
        side = self.unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        with torch.no_grad():
            self.latents = []
            for picture in pictures:
                pixels = np.asarray(Image.open(picture).convert("RGB").resize((side, side)), np.float32)
                given = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
                self.latents.append(vae.encode(given).latent_dist)
            window = encoder.config.max_position_embeddings
            words = tokenizer(["a robot"], padding="max_length", max_length=window, return_tensors="pt").input_ids
            self.prompt = encoder(words)[0]
        self.scaling = vae.config.scaling_factor
        del vae
        if method == "textual-inversion":
            self.token = len(tokenizer)
            encoder.resize_token_embeddings(self.token + 1)
            self.table = encoder.get_input_embeddings().weight
            self.others = self.table.detach().clone()
            self.table.requires_grad_(True)
            self.encoder, self.words = encoder, words.clone()
            self.words[0, 2] = self.token
            trained = [self.table]
        elif method == "lora":
            from peft import LoraConfig

            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
            trained = [value for value in self.unet.parameters() if value.requires_grad]
        else:
            trained = list(self.unet.requires_grad_(True).parameters())
        self.unet.train()
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.done = 0

    def step(self) -> float:
        """One optimizer step; the loss."""
        torch = self.torch
        count = self.batch * (2 if self.method == "dreambooth" else 1)
        chosen = [self.latents[(self.done * count + n) % len(self.latents)] for n in range(count)]
        latents = torch.cat([found.sample() for found in chosen]) * self.scaling
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (count,))
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.method == "textual-inversion":
            prompts = self.encoder(self.words.expand(count, -1))[0]
        else:
            prompts = self.prompt.expand(count, -1, -1)
        predicted = self.unet(noisy, timesteps, prompts, return_dict=False)[0]
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
        if self.method == "dreambooth":
            own, prior = predicted.chunk(2)
            own_target, prior_target = target.chunk(2)
            loss = torch.nn.functional.mse_loss(own, own_target) + torch.nn.functional.mse_loss(prior, prior_target)
        else:
            loss = torch.nn.functional.mse_loss(predicted, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.method == "textual-inversion":
            with torch.no_grad():
                self.table[: self.token] = self.others[: self.token]
        self.done += 1
        return float(loss)


def main() -> None:
    """Measure the loop alone, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--started", type=float, default=time.time(), help="when the process was started")
    arguments = parser.parse_args()
    import diffusers  # noqa: F401
    import torch  # noqa: F401
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    imported = {"wall": time.time() - arguments.started, "cpu": time.process_time()}
    loop = BareLoop(arguments.base, arguments.method, sorted(arguments.pictures.glob("*.png")), arguments.batch)
    loop.step()
    first = {"wall": time.time() - arguments.started, "cpu": time.process_time()}
    for _ in range(arguments.steps - 1):
        loop.step()
    print(json.dumps({"imported": imported, "first_step": first, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()
