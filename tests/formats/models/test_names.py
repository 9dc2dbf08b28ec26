# ruff: noqa: E501
"""Name maps against golden rows (dialects.md §2.7) and against dictionaries of whole inventories (§3)."""

from __future__ import annotations

import pytest

from persona.core.adapters.family import Component
from persona.core.adapters.fusion import members
from persona.core.adapters.unet import UNet
from persona.formats.models import flux1, ldm_unet, openclip, sd1, sd2, sd3, sdxl, sdxl_refiner
from persona.formats.models.clip import CLIP_BIG_G
from persona.formats.models.diffsynth_names import unet_to_diffsynth, unet_to_diffusers
from persona.formats.models.flat import flatten, unflatten
from persona.formats.models.ldm_unet import Topology
from persona.formats.models.transformer_names import FLUX, SD3, TransformerNames

UNETS = {"sd1": sd1.UNET, "sd2": sd2.UNET, "sdxl": sdxl.UNET, "refiner": sdxl_refiner.UNET}
MINI = UNet(channels=(96, 160), depth=(1, 1), mid_depth=1, context=192, layers_per_block=1)

GOLDEN = [
    ("sd1", "down_blocks.0.attentions.0.proj_in", "input_blocks.1.1.proj_in"),
    ("sd1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "input_blocks.1.1.transformer_blocks.0.attn2.to_k"),
    ("sd1", "down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    ("sd1", "down_blocks.2.resnets.0.conv_shortcut", "input_blocks.7.0.skip_connection"),
    ("sd1", "down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
    ("sd1", "down_blocks.3.resnets.1.conv2", "input_blocks.11.0.out_layers.3"),
    ("sd1", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", "middle_block.1.transformer_blocks.0.ff.net.0.proj"),
    ("sd1", "mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
    ("sd1", "up_blocks.0.resnets.2.conv_shortcut", "output_blocks.2.0.skip_connection"),
    ("sd1", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
    ("sd1", "up_blocks.1.attentions.2.proj_out", "output_blocks.5.1.proj_out"),
    ("sd1", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ("sd1", "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0", "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0"),
    ("sdxl", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v", "input_blocks.4.1.transformer_blocks.1.attn2.to_v"),
    ("sdxl", "down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
    ("sdxl", "down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
    ("sdxl", "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2", "input_blocks.8.1.transformer_blocks.9.ff.net.2"),
    ("sdxl", "mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
    ("sdxl", "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_q", "output_blocks.2.1.transformer_blocks.9.attn1.to_q"),
    ("sdxl", "up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
    ("sdxl", "up_blocks.1.attentions.0.proj_out", "output_blocks.3.1.proj_out"),
    ("sdxl", "up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
    ("sdxl", "up_blocks.2.resnets.2.conv1", "output_blocks.8.0.in_layers.2"),
    ("sdxl", "add_embedding.linear_1", "label_emb.0.0"),
    ("sdxl", "time_embedding.linear_2", "time_embed.2"),
    ("sdxl", "conv_out", "out.2"),
]  # fmt: skip


@pytest.mark.parametrize("family, ours, theirs", GOLDEN)
def test_golden_rows_are_read_in_both_directions(family: str, ours: str, theirs: str) -> None:
    topology = Topology.of(UNETS[family])
    assert ldm_unet.to_original(ours, layers=topology.layers, attends_up=topology.attends_up) == theirs
    assert ldm_unet.to_diffusers(theirs, layers=topology.layers) == ours


@pytest.mark.parametrize("unet", [*UNETS.values(), MINI], ids=[*UNETS, "mini"])
def test_every_unet_name_comes_back_from_the_original(unet: UNet) -> None:
    topology = Topology.of(unet)
    paths = [module.path for module in unet.modules()]
    there = [ldm_unet.to_original(p, layers=topology.layers, attends_up=topology.attends_up) for p in paths]
    assert len(set(there)) == len(paths) and None not in there
    layers = ldm_unet.layers_of([name for name in there if name])
    assert [ldm_unet.to_diffusers(name, layers=layers) for name in there if name] == paths


@pytest.mark.parametrize("unet", UNETS.values(), ids=UNETS)
def test_flat_unet_names_are_unique_and_read_as_a_dictionary_would(unet: UNet) -> None:
    topology = Topology.of(unet)
    ours = [module.path for module in unet.modules()]
    theirs = [ldm_unet.to_original(p, layers=topology.layers, attends_up=topology.attends_up) for p in ours]
    dotted = [*ours, *(name for name in theirs if name)]
    assert len({flatten(name) for name in dotted}) == len(dotted)
    assert [unflatten(flatten(name)) for name in dotted] == dotted


@pytest.mark.parametrize(
    "component, names, modules, linear",
    [
        (flux1.TRANSFORMER, FLUX, 466, 314),
        (sd3.MEDIUM, SD3, 245, 245),
        (sd3.MEDIUM_35, SD3, 393, 271),
        (sd3.LARGE_35, SD3, 537, 385),
    ],
    ids=["flux1", "sd3-medium", "sd3.5-medium", "sd3.5-large"],
)
def test_a_transformer_joined_as_in_the_original_has_its_number_of_modules(
    component: Component, names: TransformerNames, modules: int, linear: int
) -> None:
    kinds = {module.path: module.kind for module in component.modules()}
    joined = {names.fused_path(path) or path: kinds[path] for path in kinds}
    theirs = {path: names.to_original(path) for path in joined}
    assert None not in theirs.values()
    assert len(set(theirs.values())) == modules
    assert sum(kind in ("linear", "conv") for kind in joined.values()) == linear
    assert all(names.to_diffusers(name) == path for path, name in theirs.items() if name)
    assert {part for path in joined for part in members(path)} == set(kinds)
    assert all(unflatten(flatten(name)) == name for name in theirs.values() if name)
    assert all(unflatten(flatten(path)) == path for path in kinds)


def test_openclip_names_come_back() -> None:
    paths = [
        m.path
        for m in CLIP_BIG_G.modules()
        if "q_proj" not in m.path and "k_proj" not in m.path and "v_proj" not in m.path
    ]
    paths += [f"text_model.encoder.layers.{n}.self_attn.[q_proj,k_proj,v_proj]" for n in range(32)]
    there = [openclip.to_openclip(path) for path in paths]
    assert [openclip.to_huggingface(name) for name in there if name] == paths
    assert "transformer.resblocks.9.mlp.c_proj" in there


def test_diffsynths_blocks_are_where_its_published_files_have_them() -> None:
    """modelscope/DiffSynth-Studio sdxl_unet.py: attentions are blocks 7, 10, 15, 18, 21, 25, 28, 31, 35, 38, 41."""
    paths = [m.path for m in sdxl.UNET.modules() if m.path.endswith("transformer_blocks.0.attn1.to_out.0")]
    numbers = [int(str(unet_to_diffsynth(path)).split(".")[1]) for path in paths]
    assert sorted(numbers) == [7, 10, 15, 18, 21, 25, 28, 31, 35, 38, 41]
    assert [unet_to_diffusers(str(unet_to_diffsynth(path))) for path in paths] == paths


@pytest.mark.parametrize("stray", ["down_blocks_0_attentions_0_proj_in_", "_down_blocks_0__attentions_0_proj_in"])
def test_stray_underscores_are_passed_over(stray: str) -> None:
    """T34, Comfy#4347; Wan-Fun writes a doubled underscore."""
    assert unflatten(stray) == "down_blocks.0.attentions.0.proj_in"
