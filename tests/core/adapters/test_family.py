"""Inventories against the counts that an independent module generator gave (dialects.md §2.1, §2.6, §2.7)."""

from __future__ import annotations

from collections import Counter

import pytest

from persona.core.adapters.family import Component, Module, inventory
from persona.core.adapters.unet import UNet
from persona.formats.models import flux1, sd1, sd2, sd3, sdxl, sdxl_refiner
from persona.formats.models.families import FAMILIES

UNETS = {"sd1": sd1.UNET, "sd2": sd2.UNET, "sdxl": sdxl.UNET, "sdxl-refiner": sdxl_refiner.UNET}


def tensors(component: Component) -> int:
    return sum(len(module.tensors) for module in component.modules())


def kinds(component: Component) -> tuple[int, int, int]:
    count = Counter((module.kind, module.kernel) for module in component.modules())
    return count["linear", ()], count["conv", (1, 1)], count["conv", (3, 3)]


def attention_targets(component: Component) -> int:
    """What kohya trains without conv_dim: everything linear or 1x1 under `attentions.`."""
    return sum("attentions." in m.path and (m.kind == "linear" or m.kernel == (1, 1)) for m in component.modules())


def convolution_targets(component: Component) -> int:
    """What kohya trains with conv_dim: also resnets and samplers."""
    return attention_targets(component) + sum(
        any(part in m.path for part in ("resnets.", "samplers.")) and m.kind in ("linear", "conv")
        for m in component.modules()
    )


@pytest.mark.parametrize(
    "name, modules, parameters",
    [("sd1", 391, 686), ("sd2", 391, 686), ("sdxl", 1050, 1680), ("sdxl-refiner", 742, 1220)],
)
def test_a_unet_has_as_many_modules_and_tensors_as_the_real_one(name: str, modules: int, parameters: int) -> None:
    assert (len(UNETS[name].modules()), tensors(UNETS[name])) == (modules, parameters)


@pytest.mark.parametrize("name, expected", [("sd1", (184, 46, 52)), ("sd2", (216, 14, 52)), ("sdxl", (743, 11, 40))])
def test_a_unet_has_the_real_number_of_linear_and_convolution_layers(name: str, expected: tuple[int, int, int]) -> None:
    assert kinds(UNETS[name]) == expected


@pytest.mark.parametrize(
    "name, attention, convolution",
    [("sd1", 192, 278), ("sd2", 192, 278), ("sdxl", 722, 788), ("sdxl-refiner", 462, 548)],
)
def test_kohya_would_train_the_number_of_modules_it_does(name: str, attention: int, convolution: int) -> None:
    assert (attention_targets(UNETS[name]), convolution_targets(UNETS[name])) == (attention, convolution)


@pytest.mark.parametrize("name, expected", [("sd1", 72), ("sd2", 138), ("sdxl", 72 + 192), ("sdxl-refiner", 192)])
def test_text_encoders_have_six_trained_modules_a_layer(name: str, expected: int) -> None:
    encoders = [c for part, c in FAMILIES[name].components.items() if part.startswith("text_encoder")]
    assert sum(".layers." in m.path and m.kind == "linear" for c in encoders for m in c[0].modules()) == expected


@pytest.mark.parametrize(
    "component, modules, linear",
    [
        (flux1.TRANSFORMER, 656, 504),
        (sd3.MEDIUM, 341, 341),
        (sd3.MEDIUM_35, 515, 393),
        (sd3.LARGE_35, 689, 537),
    ],
)
def test_a_transformer_has_as_many_modules_as_the_real_one(component: Component, modules: int, linear: int) -> None:
    found = component.modules()
    assert (len(found), sum(m.kind in ("linear", "conv") for m in found)) == (modules, linear)


GOLDEN = [
    ("sd1", "down_blocks.0.attentions.0.proj_in", (320, 320, 1, 1)),
    ("sd1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", (320, 768)),
    ("sd1", "down_blocks.0.downsamplers.0.conv", (320, 320, 3, 3)),
    ("sd1", "down_blocks.2.resnets.0.conv_shortcut", (1280, 640, 1, 1)),
    ("sd1", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", (10240, 1280)),
    ("sd1", "mid_block.resnets.1.time_emb_proj", (1280, 1280)),
    ("sd1", "up_blocks.0.resnets.2.conv_shortcut", (1280, 2560, 1, 1)),
    ("sd1", "up_blocks.1.attentions.2.proj_out", (1280, 1280, 1, 1)),
    ("sd1", "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0", (320, 320)),
    ("sdxl", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v", (640, 2048)),
    ("sdxl", "down_blocks.1.resnets.0.conv_shortcut", (640, 320, 1, 1)),
    ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2", (1280, 5120)),
    ("sdxl", "mid_block.attentions.0.proj_in", (1280, 1280)),
    ("sdxl", "up_blocks.1.attentions.0.proj_out", (640, 640)),
    ("sdxl", "up_blocks.2.resnets.2.conv1", (320, 640, 3, 3)),
    ("sdxl", "add_embedding.linear_1", (1280, 2816)),
    ("sdxl", "time_embedding.linear_2", (1280, 1280)),
    ("sdxl", "conv_out", (4, 320, 3, 3)),
]


@pytest.mark.parametrize("name, path, shape", GOLDEN)
def test_golden_rows_have_their_shapes(name: str, path: str, shape: tuple[int, ...]) -> None:
    assert inventory(UNETS[name])[path].shape == shape


def test_a_narrow_model_is_described_by_its_own_config() -> None:
    """The configuration of the embedded base `mini`."""
    unet = UNet.from_config(
        {
            "block_out_channels": [96, 160],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 192,
            "in_channels": 16,
            "out_channels": 16,
        }
    )
    paths = inventory(unet)
    assert paths["up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"].shape == (96, 192)
    assert paths["up_blocks.1.resnets.1.conv1"].shape == (96, 192, 3, 3)
    assert paths["conv_in"].shape == (96, 16, 3, 3)
    assert "down_blocks.0.attentions.1.proj_in" not in paths
    assert Module("conv_out", "conv", (16, 96, 3, 3)) in unet.modules()
