"""Writes the model folder: the Stable Diffusion layout, fp16, options every framework knows, swapped in as a whole.

Why so much is written by hand: transformers 5 drops `text_model.` from the text encoder's keys, and ppdiffusers,
mindone and transformers 4 then load *random* weights with no more than a warning; newer diffusers adds options to
config.json that older ports refuse or ignore. So configs hold only what diffusers 0.42, ppdiffusers 0.29 and
mindone 0.3 all have in their signatures, and every value is written out, since defaults differ between them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from .denoiser import build
from .model_card import LICENSE, Figures, model_card
from .tokenizer import MAX_LENGTH, Tokenizer

SIZE_LIMIT = 24_000_000
"""The folder may hold this many bytes."""

DIFFUSERS_VERSION = "0.29.0"
"""The oldest diffusers whose options these configs are; the ports follow it or a newer one."""

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": DIFFUSERS_VERSION,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [96, 160],
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 192,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 16,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 16,
    "resnet_time_scale_shift": "default",
    "sample_size": 8,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "upcast_attention": False,
    "use_linear_projection": False,
}

AUTOENCODER: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": DIFFUSERS_VERSION,
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "shift_factor": None,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
"""`mid_block_add_attention` is left out: ppdiffusers does not know it and always has it, as is everybody's default."""

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def text_encoder_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The text encoder's config; start, end and padding ids are explicit, since defaults differ between frameworks.

    `torch_dtype` is what transformers 5 computes in by default; without it that would be the fp16 of the file.
    """
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.start,
        "eos_token_id": tokenizer.end,
        "hidden_act": "quick_gelu",
        "hidden_size": 192,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": MAX_LENGTH,
        "model_type": "clip_text_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "pad_token_id": tokenizer.end,
        "projection_dim": 192,
        "torch_dtype": "float32",
        "vocab_size": len(tokenizer.ids),
    }


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Sorted, indented, with a newline at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """fp16 safetensors, marked as torch's layout, readable by everybody (safetensors makes its files private)."""
    save_file({name: value.half().contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def with_prefix(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text encoder's weights in the classic spelling, whichever spelling transformers gives them."""
    return {
        "text_model." + name.removeprefix("text_model."): value
        for name, value in weights.items()
        if not name.endswith("position_ids")
    }


def split_average(average: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """UNet and text encoder out of the denoiser's averaged weights."""
    unet = {name.removeprefix("unet."): value for name, value in average.items() if name.startswith("unet.")}
    text = {
        name.removeprefix("text_encoder."): value for name, value in average.items() if name.startswith("text_encoder.")
    }
    if len(unet) + len(text) != len(average):
        raise ValueError("the denoiser has weights that are neither the UNet's nor the text encoder's")
    return unet, text


def export(state_file: Path, autoencoder: Path, tokenizer: Tokenizer, destination: Path, figures: Figures) -> None:
    """Builds the folder beside its place, checks it, then swaps it in: a reader sees the old one or the new one."""
    state = torch.load(state_file, map_location="cpu", weights_only=True)
    unet, text = split_average(state["average"])
    fresh = destination.with_name(f".{destination.name}-new")
    shutil.rmtree(fresh, ignore_errors=True)
    write_json(fresh / "model_index.json", MODEL_INDEX)
    write_json(fresh / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(fresh / "unet" / "config.json", UNET)
    write_weights(fresh / "unet" / "diffusion_pytorch_model.safetensors", unet)
    write_json(fresh / "text_encoder" / "config.json", text_encoder_config(tokenizer))
    write_weights(fresh / "text_encoder" / "model.safetensors", with_prefix(text))
    scaling = json.loads((autoencoder / "config.json").read_text(encoding="utf-8"))["scaling_factor"]
    write_json(fresh / "vae" / "config.json", {**AUTOENCODER, "scaling_factor": scaling})
    write_weights(
        fresh / "vae" / "diffusion_pytorch_model.safetensors",
        load_file(autoencoder / "diffusion_pytorch_model.safetensors"),
    )
    tokenizer.write(fresh / "tokenizer")
    (fresh / "README.md").write_text(model_card(figures), encoding="utf-8")
    (fresh / "LICENSE").write_text(LICENSE, encoding="utf-8")
    check(fresh, state["average"], tokenizer)
    swap(fresh, destination)


def swap(fresh: Path, destination: Path) -> None:
    """Renames the new folder into place; the old one is away for an instant only."""
    old = destination.with_name(f".{destination.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.replace(old)
    fresh.replace(destination)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def check(folder: Path, average: Mapping[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    """Refuses a folder that is too large, misses a weight, or computes something else than the trained denoiser."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > SIZE_LIMIT:
        raise ValueError(f"the folder has {size} bytes, more than {SIZE_LIMIT}")
    trained = build(tokenizer)
    trained.load_state_dict({name: value.half().float() for name, value in average.items()}, strict=False)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    for component, loaded in (("unet", pipeline.unet), ("text_encoder", pipeline.text_encoder)):
        theirs, ours = loaded.state_dict(), getattr(trained, component).state_dict()
        different = [name for name, value in theirs.items() if name not in ours or not torch.equal(value, ours[name])]
        if different or len(theirs) != len(ours):
            raise ValueError(f"{component} did not come back as it was trained: {different[:5]}")
    text = "a red apple on a blue background"
    ids = torch.tensor([tokenizer.encode(text)])
    loaded_ids = pipeline.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
    if not torch.equal(ids, loaded_ids):
        raise ValueError(f"the tokenizer came back different: {loaded_ids.tolist()}")
    noisy, timesteps = torch.randn(1, 16, 8, 8), torch.tensor([500])
    states = pipeline.text_encoder(loaded_ids)[0]
    difference = (pipeline.unet(noisy, timesteps, states).sample - trained(noisy, timesteps, ids)).abs().max().item()
    if difference > 1e-4:
        raise ValueError(f"the loaded model computes something else: largest difference {difference}")
    loaded_vae: AutoencoderKL = pipeline.vae
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    if set(stored) != set(loaded_vae.state_dict()):
        raise ValueError("the autoencoder's file misses weights or has more than the model")
