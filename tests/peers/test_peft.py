"""The folders persona writes, loaded and merged by PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from peer_adapters import CONVOLUTIONS, DORA, FIXTURES, LINEAR, LOCON, LOHA, LOKR, PADDLE, UNET, base, compare, expected
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import persona


def merged(folder: Path, base_weights: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every weight of the narrow UNet before and after PEFT has loaded and merged `folder`."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNET)
    with torch.no_grad():
        for name, weight in base_weights.items():
            unet.get_parameter(f"{name.removeprefix('unet.')}.weight").copy_(torch.from_numpy(weight))
    before = {f"unet.{name}": value.clone().numpy() for name, value in unet.state_dict().items()}
    changed = PeftModel.from_pretrained(unet, str(folder)).merge_and_unload()
    return before, {f"unet.{name}": value.float().numpy() for name, value in changed.state_dict().items()}


@pytest.mark.parametrize(
    "source, kind",
    [
        (LINEAR, "LORA"),
        (CONVOLUTIONS, "LORA"),
        (LOCON, "LORA"),
        (LOHA, "LOHA"),
        (LOKR, "LOKR"),
        (PADDLE, "LORA"),
        ("torch/peft_rslora", "LORA"),
        (DORA, "LORA"),
    ],
)
def test_peft_changes_its_weights_as_the_first_program_did(source: str, kind: str, tmp_path: Path) -> None:
    persona.convert(FIXTURES / source, tmp_path / "peft", to="peft")
    several = not (tmp_path / "peft" / "adapter_config.json").is_file()
    folder = tmp_path / "peft" / "unet" if several else tmp_path / "peft"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == kind
    before, after = merged(folder, base(source))
    changes = {name: change for name, change in expected(source).items() if name.startswith("unet.")}
    compare(before, after, changes, {entry.name for entry in persona.load(FIXTURES / source).entries.values()})


SDXL_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16, 24),
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 20,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 24,
}
"""SDXL's topology, a few numbers wide."""
CLIP = {
    "vocab_size": 530,
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 12,
    "bos_token_id": None,
    "eos_token_id": None,
}
T5 = {"vocab_size": 530, "d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}
SDXL = {
    "unet": (lambda: diffusers.UNet2DConditionModel(**SDXL_UNET), ["to_q", "to_out.0", "conv1", "proj_in"]),
    "text_encoder": (lambda: CLIPTextModel(CLIPTextConfig(**CLIP)), ["q_proj", "fc1"]),
    "text_encoder_2": (lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)), ["v_proj", "fc2"]),
}
FLUX_T5 = {"text_encoder_2": (lambda: T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")), ["q", "wi_0"])}


def peft_delta(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Module -> ΔW as PEFT's own code calculates it."""
    layers = ((name, layer) for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight"))
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach().numpy()
        for name, layer in layers
        if hasattr(layer, "base_layer")
    }


@pytest.mark.parametrize(("family", "components", "by_way_of"), [("sdxl", SDXL, "kohya"), ("flux1", FLUX_T5, "kohya")])
def test_folders_that_peft_wrote_come_back(family: str, components: dict, by_way_of: str, tmp_path: Path) -> None:
    wanted = {}
    for component, (make, targets) in components.items():
        torch.manual_seed(1)
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(make(), config)
        model.save_pretrained(tmp_path / "peft" / component)
        wanted[component] = peft_delta(model)
        assert wanted[component]
    read = persona.load(tmp_path / "peft", family=family)
    found = {name.replace(".text_model.", "."): change for name, change in read.deltas().items()}
    expectation = {
        f"{component}.{name.removeprefix('text_model.')}": change
        for component, changes in wanted.items()
        for name, change in changes.items()
    }
    assert found.keys() == expectation.keys()
    for name, change in expectation.items():
        np.testing.assert_allclose(found[name].reshape(change.shape), change, atol=1e-6, rtol=1e-5, err_msg=name)
    between = tmp_path / "between.safetensors"
    persona.convert(tmp_path / "peft", between, to=by_way_of, family=family)
    persona.convert(between, tmp_path / "again", to="peft", family=family)
    for component, (make, _) in components.items():
        folder = tmp_path / "again" / (component if len(components) > 1 else "")
        changes = peft_delta(PeftModel.from_pretrained(make(), str(folder)))
        assert changes.keys() == wanted[component].keys()
        for name, change in changes.items():
            np.testing.assert_allclose(change, wanted[component][name], atol=1e-6, rtol=1e-5, err_msg=name)
