"""Adapters that other programs wrote, with the ΔW their own code computed, and the narrow SD1.5 they were made for.

The tests beside this file convert them with persona and hand the result to a consumer's own loader; what that program
then changes in its weights has to be what the first program's own code computed (tests/fixtures/index.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures"

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 2,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
"""The narrow UNet of the fixtures' READMEs, for any diffusers-like `UNet2DConditionModel(**UNET)`."""
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 530,
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}
"""The narrow CLIP text encoder beside it."""

ATTENTION = "torch/diffusers_sd15_unet_te/peft_keys_with_metadata.safetensors"  # alpha 4 of rank 2, both components
LINEAR = "torch/kohya_sd15_linear/kohya_sd15_linear.safetensors"  # feed-forward and 1x1 projections too
CONVOLUTIONS = "torch/kohya_sd15_conv/kohya_sd15_conv.safetensors"
LOCON = "torch/lycoris_locon/lycoris_locon.safetensors"
LOHA = "torch/lycoris_loha/lycoris_loha.safetensors"
LOKR = "torch/lycoris_lokr/lycoris_lokr.safetensors"
PADDLE = "paddle/lora-unet-te-attnproc-pdparams/paddle_lora_weights.pdparams"
DORA = "torch/peft_dora"  # a folder; its ΔW depends on the base's weights, which lie beside it


def expected(file: str) -> dict[str, np.ndarray]:
    """`component.path` -> ΔW at strength 1, as the program that wrote `file` computed it (of some of the modules)."""
    rows = json.loads((FIXTURES / "index.json").read_text("utf-8"))
    row = next(row for row in rows if row["file"] == file and row["alpha"] is None)
    with np.load(FIXTURES / row["expected"]) as archive:
        return {row["expected_prefix"] + name: row["expected_factor"] * archive[name] for name in archive.files}


def base(file: str) -> dict[str, np.ndarray]:
    """`component.path` -> the base's weight, where the expectation was computed on certain ones; else nothing."""
    rows = json.loads((FIXTURES / "index.json").read_text("utf-8"))
    path = next(row.get("base_weights") for row in rows if row["file"] == file)
    if not path:
        return {}
    with np.load(FIXTURES / path) as archive:
        return {name: archive[name] for name in archive.files}


def compare(
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    changes: Mapping[str, np.ndarray],
    also: frozenset[str] | set[str],
    atol: float = 3e-6,
) -> None:
    """`after - before` is `changes`, and nothing else moved but the modules `also` (which no expectation covers).

    Weights are named `component.path.weight`, in torch layout; text encoders with `text_model.`"""
    assert changes
    assert any(np.abs(change).max() > 1e-3 for change in changes.values())
    for name, change in changes.items():
        moved = after[f"{name}.weight"] - before[f"{name}.weight"]
        np.testing.assert_allclose(moved.reshape(change.shape), change, atol=atol, rtol=1e-4, err_msg=name)
    touched = {f"{name}.weight" for name in (*changes, *also)}
    for name in before.keys() - touched:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
