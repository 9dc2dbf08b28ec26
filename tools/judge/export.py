"""Writes the judge's folder: transformers' CLIPModel layout, fp16, checked and swapped in as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel

from tools.mini.export import swap, write_json, write_weights
from tools.mini.tokenizer import MAX_LENGTH, Tokenizer

from .model import WIDTH, build, text_embeddings
from .model_card import LICENSE, Figures, model_card
from .views import DEVIATION, MEAN

SIZE_LIMIT = 6_000_000
"""The folder may hold this many bytes."""

PREPARATION: dict[str, Any] = {
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [MEAN] * 3,
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [DEVIATION] * 3,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 64},
}


def config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json, every value written out, since defaults differ between versions."""
    shared = {
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": WIDTH,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * WIDTH,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    text = {
        **shared,
        "bos_token_id": tokenizer.start,
        "eos_token_id": tokenizer.end,
        "max_position_embeddings": MAX_LENGTH,
        "model_type": "clip_text_model",
        "num_hidden_layers": 2,
        "pad_token_id": tokenizer.end,
        "vocab_size": len(tokenizer.ids),
    }
    vision = {
        **shared,
        "image_size": 64,
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "num_hidden_layers": 4,
        "patch_size": 8,
    }
    return {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": WIDTH,
        "text_config": text,
        "torch_dtype": "float32",
        "vision_config": vision,
    }


def export(state_file: Path, tokenizer: Tokenizer, destination: Path, figures: Figures) -> None:
    """Builds the folder beside its place, checks it, then swaps it in: a reader sees the old one or the new one."""
    average = torch.load(state_file, map_location="cpu", weights_only=True)["average"]
    fresh = destination.with_name(f".{destination.name}-new")
    shutil.rmtree(fresh, ignore_errors=True)
    write_json(fresh / "config.json", config(tokenizer))
    write_json(fresh / "preprocessor_config.json", PREPARATION)
    write_weights(fresh / "model.safetensors", average)
    tokenizer.write(fresh)
    (fresh / "README.md").write_text(model_card(figures), encoding="utf-8")
    (fresh / "LICENSE").write_text(LICENSE, encoding="utf-8")
    check(fresh, average, tokenizer)
    swap(fresh, destination)


@torch.no_grad()
def check(folder: Path, average: Mapping[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    """Refuses a folder that is too large, misses a weight, or computes something else than the trained judge."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > SIZE_LIMIT:
        raise ValueError(f"the folder has {size} bytes, more than {SIZE_LIMIT}")
    if not any(name.startswith("text_model.") for name in average):
        raise ValueError("the text encoder's names lack their classic prefix")
    loaded, info = CLIPModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"the weights did not come back whole: {info}")
    trained = build(tokenizer)
    trained.load_state_dict({name: value.half().float() for name, value in average.items()}, strict=False)
    ids = torch.tensor([tokenizer.encode("a red apple on a blue background")])
    both = [text_embeddings(model.eval(), ids, tokenizer.end) for model in (loaded, trained)]
    if (both[0] - both[1]).abs().max().item() > 1e-4:
        raise ValueError("the loaded judge computes something else")
