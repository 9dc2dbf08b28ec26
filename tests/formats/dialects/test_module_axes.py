"""Factors with the axes of the module they are for, and programs that have no such module."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import persona
from persona.core.host.errors import ConversionError
from tests.formats.dialects.written import adapter_of, lora_entry

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
RNG = np.random.default_rng(29)
PROJECTION, SECOND = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.1.conv1"


@pytest.mark.parametrize("to", ["peft", "diffusers", "mindone"])
@pytest.mark.parametrize(
    ("path", "family", "written"),
    [
        (PROJECTION, "sd1", (320, 320, 1, 1)),
        (PROJECTION.replace("blocks.0", "blocks.1"), "sdxl", (640, 640)),
        (QUERY, "sd1", (320, 320)),
        (SECOND, "sd1", (320, 320, 3, 3)),
    ],
)
@pytest.mark.parametrize("shown", [True, False])
def test_factors_get_the_axes_of_the_module_they_are_for(tmp_path, to, path, family, written, shown) -> None:
    """fastsdcpu#82: PEFT's layers load no others. SD1's proj_in is a convolution and SDXL's a linear layer; some
    trainers show a 1x1 that is not there, or leave out one that is."""
    width, window = written[0], written[2:] or (1, 1)
    down, up = RNG.standard_normal((2, width, *window)), RNG.standard_normal((width, 2, 1, 1))
    flat = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    if not shown:
        tensors = {name: value.reshape(value.shape[0], -1) for name, value in tensors.items()}
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, tmp_path / "k.safetensors")
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    persona.convert(tmp_path / "k.safetensors", out, to=to, family=family)
    found = load_file(out / "adapter_model.safetensors" if to == "peft" else out)
    shapes = {value.shape for value in found.values()}
    assert shapes == {(2, width, *written[2:]), (width, 2, *(1 for _ in written[2:]))}
    (change,) = persona.load(out, family=family).deltas().values()
    product = np.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    np.testing.assert_allclose(change, product.reshape(written), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1, 1)])
def test_the_whole_half_of_lokr_gets_the_axes_of_its_module(tmp_path, shape: tuple[int, ...]) -> None:
    for path, written in ((PROJECTION, (4, 4, 1, 1)), (QUERY, (4, 4))):
        factors = {"w1": RNG.standard_normal((2, 2)), "w2": RNG.standard_normal(shape)}
        flat = f"lora_unet_{path.replace('.', '_')}.lokr_"
        name = path.rpartition(".")[2]
        save_file({flat + key: v.astype(np.float32) for key, v in factors.items()}, tmp_path / f"{name}.safetensors")
        persona.convert(tmp_path / f"{name}.safetensors", tmp_path / name, to="peft", family="sd1")
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        assert found[f"base_model.model.{path}.lokr_w2"].shape == written


def test_a_projection_of_an_open_family_keeps_the_axes_it_has(tmp_path) -> None:
    """A narrow model can be SD1's kin or SD2's: nobody knows whether its proj_in is a convolution."""
    key = f"unet.{PROJECTION}"
    for shape in ((2, 8), (2, 8, 1, 1)):
        down, up = np.ones(shape, np.float32), np.ones((8, 2, *shape[2:]), np.float32)
        save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, tmp_path / f"{len(shape)}.safetensors")
        persona.convert(tmp_path / f"{len(shape)}.safetensors", tmp_path / f"{len(shape)}", to="peft")
        found = load_file(tmp_path / f"{len(shape)}" / "adapter_model.safetensors")
        assert found[f"base_model.model.{PROJECTION}.lora_A.weight"].shape == shape


@pytest.mark.parametrize(("family", "to"), [("sdxl", "mindone-sdv2"), ("sdxl", "mindpet"), ("sd1", "mindone-sdxl")])
def test_a_program_for_other_models_gets_no_file(tmp_path, family: str, to: str) -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    adapter = adapter_of([lora_entry("unet", path, 640, 2048 if family == "sdxl" else 768)], family)
    with pytest.raises(ConversionError, match=f"and this is one of {family}"):
        persona.save(adapter, tmp_path / "out.ckpt", to=to)
