"""Converted models in diffusers itself, on the inputs whose outputs MindSpore computed (tests/fixtures/mindspore)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import activations
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from persona.core.adapters.entry import Checkpoint
from persona.formats.checkpoints import read_checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures/mindspore"


def values(model: Checkpoint, component: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.float32(ref.read())) for name, ref in model.components[component].items()}


@pytest.fixture
def tanh_gelu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wukong's GEGLU is MindSpore's GeLU, which is the tanh approximation."""
    monkeypatch.setattr(activations.GEGLU, "gelu", lambda self, gate: functional.gelu(gate, approximate="tanh"))
    yield


@torch.no_grad()
def test_a_mindone_unet_gives_mindspores_output() -> None:
    folder = FIXTURES / "unet_mindone_diffusers"
    unet = UNet2DConditionModel.from_config(json.loads((folder / "config.json").read_text())).eval()
    unet.load_state_dict(values(read_checkpoint(folder / "unet.ckpt"), "unet"))
    with np.load(folder / "expected.npz") as expected:
        x, t, context = (torch.from_numpy(np.asarray(expected[name])) for name in ("x", "t", "context"))
        made = unet(x.float(), t, context.float()).sample.numpy()
        np.testing.assert_allclose(made, expected["out"], atol=2e-5)


@torch.no_grad()
def test_wukong_gives_mindspores_output(tanh_gelu: None) -> None:
    folder = FIXTURES / "wukong_full_narrow"
    model = read_checkpoint(folder / "wukong_narrow_fp16.ckpt")
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(32, 32, 32, 32), attention_head_dim=8, cross_attention_dim=32
    ).eval()
    unet.load_state_dict(values(model, "unet"))
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            layer_norm_eps=1e-7,
        )
    ).eval()  # fmt: skip
    own = set(encoder.state_dict())
    named = {
        name.removeprefix("text_model.") if name not in own else name: value
        for name, value in values(model, "text_encoder").items()
    }
    encoder.load_state_dict(named)
    with np.load(folder / "expected.npz") as expected:
        context = encoder(torch.from_numpy(expected["ids"]).long()).last_hidden_state
        np.testing.assert_allclose(context.numpy(), expected["text_out"], atol=1e-4)
        timestep = torch.from_numpy(np.asarray(expected[next(n for n in expected.files if n.startswith("t"))]))
        made = unet(torch.from_numpy(expected["x"]), timestep, torch.from_numpy(expected["context"])).sample.numpy()
        np.testing.assert_allclose(made, expected["unet_out"], atol=1e-4)
