"""SD3, Flux.1 and autoencoders whole, by names and shapes alone: there and back, and what is not one is refused.

That diffusers' own converters agree is in tests/peers/test_whole_transformers.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from persona.core.adapters.autoencoder import Autoencoder
from persona.core.adapters.entry import Checkpoint
from persona.core.adapters.family import Component
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.adapters.transformer import Flux, MMDiT
from persona.core.host.contracts import State
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.checkpoint_outputs import outputs
from persona.formats.checkpoints import checkpoint_of, is_whole_model, read_checkpoint
from persona.formats.models.configs import MAKERS

NARROW = {
    "sd3": MMDiT(layers=2, width=64, query_key_norm=False, context=10, pooled=6, channels=4),
    "sd3.5": MMDiT(layers=3, width=16, dual=1, context=10, pooled=6, channels=4, head=8),
    "flux-dev": Flux(double=2, single=1, width=16, context=10, pooled=6, channels=12, head=8),
    "flux-schnell": Flux(double=1, single=2, width=16, context=10, pooled=6, channels=12, head=8, guidance=False),
}
VAE = Autoencoder(channels=(4, 8), layers=1, latent=2)


def parameters(config: Component) -> dict[str, TensorRef]:
    rng = np.random.default_rng(7)
    shapes = {f"{module.path}.weight": module.shape for module in config.modules()}
    shapes |= {f"{module.path}.bias": module.shape[:1] for module in config.modules() if module.bias}
    if isinstance(config, MMDiT):
        shapes["pos_embed.pos_embed"] = (1, 36, config.width)
    return {name: in_memory(rng.standard_normal(shape).astype(np.float16)) for name, shape in shapes.items()}


def family_of(name: str) -> str:
    return "sd3" if name.startswith("sd3") else "flux1"


def one_file(name: str) -> dict[str, TensorRef]:
    (output,) = outputs(Checkpoint(family_of(name), {"transformer": parameters(NARROW[name])}), "ldm", [])
    return dict(output.tensors)


def read(tensors: Mapping[str, TensorRef]) -> Checkpoint:
    return checkpoint_of(State(dict(tensors), {}, (), "safetensors"), "file")


def bits(tensors: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (ref.shape, np.asarray(ref.read()).tobytes()) for name, ref in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", NARROW)
def test_a_transformer_goes_into_one_file_and_comes_back_bit_for_bit(name: str, prefix: str) -> None:
    tensors = {prefix + key: ref for key, ref in one_file(name).items()}
    assert is_whole_model(State(tensors))
    model = read(tensors)
    assert model.family == family_of(name)
    assert bits(model.components["transformer"]) == bits(parameters(NARROW[name]))


def test_the_halves_are_exchanged_and_the_rows_divided_as_the_specification_says() -> None:
    """dialects.md §2.4-2.6, by hand: norm_out is scale then shift in diffusers, shift then scale in the original;
    linear1 has the rows of q, k, v and the MLP."""
    ours, theirs = parameters(NARROW["flux-dev"]), one_file("flux-dev")
    final = theirs["final_layer.adaLN_modulation.1.weight"].read()
    np.testing.assert_array_equal(final[:16], ours["norm_out.linear.weight"].read()[16:])
    np.testing.assert_array_equal(final[16:], ours["norm_out.linear.weight"].read()[:16])
    linear1 = theirs["single_blocks.0.linear1.bias"].read()
    for start, stop, name in (
        (0, 16, "attn.to_q"),
        (16, 32, "attn.to_k"),
        (32, 48, "attn.to_v"),
        (48, 112, "proj_mlp"),
    ):
        np.testing.assert_array_equal(linear1[start:stop], ours[f"single_transformer_blocks.0.{name}.bias"].read())
    ours, theirs = parameters(NARROW["sd3"]), one_file("sd3")
    last = theirs["joint_blocks.1.context_block.adaLN_modulation.1.weight"].read()
    np.testing.assert_array_equal(last[:64], ours["transformer_blocks.1.norm1_context.linear.weight"].read()[64:])
    first = theirs["joint_blocks.0.context_block.adaLN_modulation.1.weight"].read()
    np.testing.assert_array_equal(first, ours["transformer_blocks.0.norm1_context.linear.weight"].read())


@pytest.mark.parametrize("name", NARROW)
def test_what_is_no_whole_transformer_is_refused_by_the_name_of_what_is_wrong(name: str) -> None:
    whole = one_file(name)
    for missing in list(whole)[::5]:
        with pytest.raises(UnreadableFile, match=r"lacks|joined modules"):
            read({key: ref for key, ref in whole.items() if key != missing})
    extra = next(key for key in whole if key.endswith("proj.weight"))
    with pytest.raises(UnreadableFile, match="scale_weight"):  # ComfyUI's scaled float8
        read({**whole, extra.replace(".weight", ".scale_weight"): in_memory(np.float32(1))})
    with pytest.raises(UnreadableFile, match="belongs there"):
        read({**whole, extra: in_memory(np.zeros((3, 5), np.float16))})


def folder_of(tmp_path: Path, **components: Mapping[str, TensorRef]) -> Path:
    for name, tensors in components.items():
        (tmp_path / name).mkdir()
        values = {key: np.asarray(ref.read()) for key, ref in tensors.items()}
        save_file(values, tmp_path / name / "diffusion_pytorch_model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", NARROW)
def test_a_folder_without_a_projection_is_refused_as_a_file_is(name: str, tmp_path: Path) -> None:
    """Rows of q are the first of three that are joined: without them k and v would be left out unsaid."""
    missing = "transformer_blocks.0.attn.to_q.weight"
    tensors = {key: ref for key, ref in parameters(NARROW[name]).items() if key != missing}
    with pytest.raises(UnreadableFile, match=missing):
        read_checkpoint(folder_of(tmp_path, transformer=tensors), family=family_of(name))


def test_a_folder_whose_autoencoder_lacks_something_is_refused(tmp_path: Path) -> None:
    tensors = {key: ref for key, ref in parameters(VAE).items() if key != "encoder.conv_out.bias"}
    with pytest.raises(UnreadableFile, match=r"lacks encoder\.conv_out\.bias"):
        read_checkpoint(folder_of(tmp_path, vae=tensors))


def test_scales_beside_the_weights_of_a_folder_are_refused(tmp_path: Path) -> None:
    tensors = {**parameters(NARROW["flux-dev"]), "proj_out.weight_scale": in_memory(np.ones(1, np.float32))}
    with pytest.raises(UnreadableFile, match=r"also has proj_out\.weight_scale"):
        read_checkpoint(folder_of(tmp_path, transformer=tensors))


@pytest.mark.parametrize("shape", [(3,), (1, 36, 7), (1, 35, 64), (2, 36, 64)])
def test_a_table_of_positions_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnreadableFile, match="pos_embed has shape"):
        read({**one_file("sd3"), "pos_embed": in_memory(np.zeros(shape, np.float16))})


def test_a_parameter_under_two_names_is_refused() -> None:
    tensors = one_file("flux-dev")
    again = {f"model.diffusion_model.{key}": ref for key, ref in tensors.items()}
    with pytest.raises(UnreadableFile, match="twice"):
        read({**tensors, **again})


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_a_family_that_the_names_contradict_is_refused_in_a_file_and_in_a_folder(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=f"no {family} model") as problem:
        checkpoint_of(State(one_file("flux-dev"), {}, (), "safetensors"), "file", family=family)
    assert problem.value.hint == "--family flux1"
    with pytest.raises(UnreadableFile, match=f"no {family} model"):
        read_checkpoint(folder_of(tmp_path, transformer=parameters(NARROW["flux-dev"])), family=family)


def test_a_transformer_has_no_form_for_mindspore() -> None:
    model = Checkpoint("sd3", {"transformer": parameters(NARROW["sd3"])})
    with pytest.raises(ConversionError, match="mindspore"):
        outputs(model, "mindspore", [])


def test_an_autoencoder_alone_has_no_prefix_and_keeps_every_bit() -> None:
    (output,) = outputs(Checkpoint("sd1", {"vae": parameters(VAE)}), "ldm", [])
    assert "encoder.down.0.block.0.conv1.weight" in output.tensors
    assert output.tensors["decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    for prefix in ("", "first_stage_model."):
        model = read({prefix + key: ref for key, ref in output.tensors.items()})
        assert list(model.components) == ["vae"]
        assert bits(model.components["vae"]) == bits(parameters(VAE))


def test_a_real_autoencoder_has_as_many_tensors_as_the_published_ones() -> None:
    """248 in Stable Diffusion 1 to XL; SD3's and Flux' lack the four of quant_conv and post_quant_conv."""
    assert len(parameters(Autoencoder(latent=2, channels=(2, 4, 8, 8)))) == 248
    assert len(parameters(Autoencoder(latent=2, channels=(2, 4, 8, 8), quant=False))) == 244


def test_another_autoencoder_is_refused_by_the_name_of_what_is_wrong() -> None:
    (output,) = outputs(Checkpoint("sd1", {"vae": parameters(VAE)}), "ldm", [])
    tensors = dict(output.tensors)
    with pytest.raises(UnreadableFile, match=r"lacks encoder\.mid_block\.resnets\.0\.conv2\.bias"):
        read({key: ref for key, ref in tensors.items() if key != "encoder.mid.block_1.conv2.bias"})
    with pytest.raises(UnreadableFile, match=r"also has decoder\.up_blocks\.0\.resnets\.7\.conv1\.bias"):
        read({**tensors, "decoder.up.1.block.7.conv1.bias": in_memory(np.zeros(8, np.float16))})
    with pytest.raises(UnreadableFile, match="belongs there"):
        wider = parameters(replace(VAE, channels=(4, 16)))["encoder.conv_out.weight"]
        read({**tensors, "encoder.conv_out.weight": wider})


@pytest.mark.parametrize(
    ("component", "family", "width", "projected", "activation"),
    [
        ("text_encoder", "sd1", 768, False, "quick_gelu"),
        ("text_encoder", "sd2", 1024, False, "gelu"),
        ("text_encoder", "sdxl", 768, False, "quick_gelu"),
        ("text_encoder_2", "sdxl", 1280, True, "gelu"),
        ("text_encoder", "sd3", 768, True, "quick_gelu"),
        ("text_encoder_2", "sd3", 1280, True, "gelu"),
        ("text_encoder", "flux1", 768, False, "quick_gelu"),
        ("text_encoder", "", 1280, True, "gelu"),
        ("text_encoder", "sd3", 12, True, "quick_gelu"),
        ("text_encoder_2", "sd3", 12, True, "gelu"),
    ],
)
def test_the_activation_of_a_text_encoder_is_its_makers(component, family, width, projected, activation) -> None:
    """hidden_act in the config.json published with each model: OpenAI's CLIP-L has quick_gelu, with a projection
    (SD3) and without, OpenCLIP's H and bigG have gelu."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": (5, width),
        "text_model.embeddings.position_embedding.weight": (7, width),
        "text_model.encoder.layers.0.mlp.fc1.weight": (9, width),
        **({"text_projection.weight": (width, width)} if projected else {}),
    }
    config = MAKERS[component]({name: in_memory(np.zeros(shape)) for name, shape in shapes.items()}, family)
    assert config["hidden_act"] == activation
    assert config["architectures"] == ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"]
