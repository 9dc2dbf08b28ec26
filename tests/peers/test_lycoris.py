"""What persona writes, loaded by lycoris-lora's own reader and applied in its own forward.

lycoris-lora 4.1.3 multiplies by alpha / rank twice when it merges LoHa and LoKr, so its forward is what counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
from peer_adapters import (
    ATTENTION,
    CONVOLUTIONS,
    DORA,
    FIXTURES,
    LINEAR,
    LOCON,
    LOHA,
    LOKR,
    PADDLE,
    TEXT_ENCODER,
    UNET,
    base,
    expected,
)
from transformers import CLIPTextConfig, CLIPTextModel

import persona


class AsBefore(torch.nn.Module):
    """CLIP under the names it had before transformers 5.6, which every published file has and lycoris looks for."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.text_model = getattr(encoder, "text_model", encoder)


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "unet": diffusers.UNet2DConditionModel(**UNET),
        "text_encoder": AsBefore(CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER))),
    }


def applied(module: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return module(inputs)


def probe(module: Any, generator: torch.Generator) -> Any:
    """Something to put into a layer."""
    if isinstance(module, torch.nn.Conv2d):
        return torch.randn(2, module.in_channels, 5, 5, generator=generator)
    return torch.randn(3, module.in_features, generator=generator)


def by_hand(module: Any, change: Any, inputs: Any) -> Any:
    """What ΔW adds to the layer's output."""
    if isinstance(module, torch.nn.Conv2d):
        change = change.reshape(module.weight.shape)
        return torch.nn.functional.conv2d(inputs, change, stride=module.stride, padding=module.padding)
    return inputs @ change.reshape(module.weight.shape).T


@pytest.mark.parametrize("source", [ATTENTION, LINEAR, CONVOLUTIONS, LOCON, LOHA, LOKR, PADDLE, DORA])
def test_lycoris_adds_what_the_first_program_did(source: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    persona.convert(FIXTURES / source, file, to="kohya")
    made = models()
    # the default preset names two modules of a diffusers UNet alike (stopped by an assertion of its own)
    LycorisNetworkKohya.apply_preset({"unet_target_module": ["Transformer2DModel"], "unet_target_name": []})
    network, _ = create_network_from_weights(1.0, str(file), None, made["text_encoder"], made["unet"])
    deltas, generator = expected(source), torch.Generator().manual_seed(1)
    layers = {}
    for name in deltas:
        component, _, path = name.partition(".")
        layers[name] = made[component].get_submodule(path)
    with torch.no_grad():
        for name, weight in base(source).items():
            made["unet"].get_parameter(f"{name.removeprefix('unet.')}.weight").copy_(torch.from_numpy(weight))
    inputs = {name: probe(layer, generator) for name, layer in layers.items()}
    before = {name: applied(layer, inputs[name]) for name, layer in layers.items()}
    network.apply_to(made["text_encoder"], made["unet"], True, True)
    network.eval()
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len(persona.load(file).entries)
    assert max(np.abs(change).max() for change in deltas.values()) > 1e-3
    for name, layer in layers.items():
        added = applied(layer, inputs[name]) - before[name]
        wanted = by_hand(layer, torch.from_numpy(deltas[name]), inputs[name])
        np.testing.assert_allclose(added.numpy(), wanted.numpy(), atol=2e-5, err_msg=name)
