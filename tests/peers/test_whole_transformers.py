"""SD3, Flux.1 and autoencoders whole, in one file and as diffusers' folder: diffusers' own converters agree, and its
classes load what persona writes and calculate the same."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

import persona

SD3 = {
    "sample_size": 4,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "pos_embed_max_size": 6,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 14,
}
MEDIUM = {**SD3, "num_attention_heads": 1, "attention_head_dim": 64, "caption_projection_dim": 64}
MEDIUM_35 = {
    **SD3,
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0, 1),
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 14,
    "axes_dims_rope": (4, 14, 14),
}
VAE = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "sd3": (SD3Transformer2DModel, MEDIUM, "sd3"),
    "sd3.5": (SD3Transformer2DModel, MEDIUM_35, "sd3"),
    "flux-dev": (FluxTransformer2DModel, {**FLUX, "guidance_embeds": True}, "flux1"),
    "flux-schnell": (FluxTransformer2DModel, {**FLUX, "guidance_embeds": False}, "flux1"),
}


def their_converter(family: str, width: int) -> Any:
    """diffusers' function; Flux' has the real width written into it, which is all that is changed."""
    if family == "sd3":
        return single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert "inner_dim = 3072" in source
    scope: dict[str, Any] = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    return scope["convert_flux_transformer_checkpoint_to_diffusers"]


def answers(model: torch.nn.Module, family: str) -> np.ndarray:
    torch.manual_seed(5)
    time, text, pooled = torch.tensor([500.0]), torch.randn(1, 3, 10), torch.randn(1, 14)
    with torch.no_grad():
        if family == "sd3":
            return model(torch.randn(1, 4, 4, 4), text, pooled, time).sample.numpy()
        places = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
        guidance = torch.tensor([3.5]) if model.config["guidance_embeds"] else None  # type: ignore[index]
        states = torch.randn(1, 4, 16)
        return model(states, text, pooled, time, guidance=guidance, **places).sample.numpy()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_reads_what_persona_writes_as_one_file_and_the_other_way_round(name: str, tmp_path: Path) -> None:
    model_class, fields, family = MODELS[name]
    torch.manual_seed(1)
    model = model_class(**fields)
    model.save_pretrained(tmp_path / "in/transformer")
    persona.convert(tmp_path / "in", tmp_path / "one.safetensors", to="ldm", family=family)
    one = load_file(tmp_path / "one.safetensors")
    same(their_converter(family, model.inner_dim)(dict(one)), model.state_dict())
    report = persona.convert(tmp_path / "one.safetensors", tmp_path / "out", to="diffusers")
    assert family in report.summary
    again = model_class.from_pretrained(tmp_path / "out/transformer")
    same(again.state_dict(), model.state_dict())
    np.testing.assert_allclose(answers(again, family), answers(model, family), atol=1e-5)


def test_an_autoencoder_alone_is_what_diffusers_converter_makes_of_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoencoderKL(**VAE)
    model.save_pretrained(tmp_path / "vae")
    persona.convert(tmp_path / "vae", tmp_path / "vae.safetensors", to="ldm")
    theirs = single_file_utils.convert_ldm_vae_checkpoint(load_file(tmp_path / "vae.safetensors"), model.config)
    same(theirs, model.state_dict())
    persona.convert(tmp_path / "vae.safetensors", tmp_path / "out", to="diffusers")
    again = AutoencoderKL.from_pretrained(tmp_path / "out/vae")
    same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("fields", [VAE, {**VAE, "use_quant_conv": False, "use_post_quant_conv": False}, {}])
def test_the_inventory_of_an_autoencoder_is_diffusers(fields: dict[str, Any]) -> None:
    from persona.core.adapters.autoencoder import Autoencoder

    widths, latent = fields.get("block_out_channels", (64,)), fields.get("latent_channels", 4)
    ours = Autoencoder(widths, fields.get("layers_per_block", 1), latent, quant=fields.get("use_quant_conv", True))
    found = {f"{module.path}.weight": module.shape for module in ours.modules()}
    found |= {f"{module.path}.bias": module.shape[:1] for module in ours.modules()}
    theirs = AutoencoderKL(**fields).state_dict()
    assert found == {name: tuple(value.shape) for name, value in theirs.items()}


@pytest.mark.parametrize(("family", "second"), [("sd3", "text_encoder_3"), ("flux1", "text_encoder_2")])
def test_everything_in_one_file_comes_back_as_it_was(family: str, second: str, tmp_path: Path) -> None:
    model_class, fields, _ = MODELS["sd3.5" if family == "sd3" else "flux-dev"]
    torch.manual_seed(1)
    parts: dict[str, Any] = {
        "transformer": model_class(**fields),
        "vae": AutoencoderKL(**{**VAE, "use_quant_conv": False, "use_post_quant_conv": False}),
        second: T5EncoderModel(
            T5Config(
                vocab_size=53, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
            )
        ),
    }
    for name, part in parts.items():
        part.save_pretrained(tmp_path / "in" / name)
    persona.convert(tmp_path / "in", tmp_path / "one.safetensors", to="ldm", family=family)
    names = set(load_file(tmp_path / "one.safetensors"))
    vae = "first_stage_model." if family == "sd3" else "vae."
    for beginning in ("model.diffusion_model.", vae, "text_encoders.t5xxl.transformer."):
        assert any(name.startswith(beginning) for name in names)
    persona.convert(tmp_path / "one.safetensors", tmp_path / "out", to="diffusers")
    for name, part in parts.items():
        again = type(part).from_pretrained(tmp_path / "out" / name)
        same(again.state_dict(), part.state_dict())
