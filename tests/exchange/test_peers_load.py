"""What persona writes, loaded by diffusers and PEFT themselves: the weights change by the ΔW they should."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import persona
from persona.core.adapters.entry import Adapter, Entry, Scale
from persona.core.adapters.tensor import in_memory
from persona.exchange.base_weights import BaseWeights, base_weights
from persona.exchange.families import with_family

ROOT = Path(persona.__file__).parent
MINI = ROOT / "assets" / "mini"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def adapter_for(base: BaseWeights, *, convolutions: bool, only: str = "") -> Adapter:
    """LoRA on every attention projection (ranks 3 and 4, alpha 5) and perhaps every resnet's first convolution."""
    random, entries = np.random.default_rng(0), {}
    for name in base:
        component, _, path = name.partition(".")
        shape = base.refs[f"{name}.weight"].shape
        if only and component != only:
            continue
        if len(shape) == 2 and path.endswith(PROJECTIONS):
            rank, window, alpha = (3 if "to_k" in path else 4), (), 5.0
        elif convolutions and component == "unet" and path.endswith("conv1"):
            rank, window, alpha = 2, shape[2:], 1.0
        else:
            continue
        down = random.standard_normal((rank, shape[1], *window)).astype(np.float32) / 10
        up = random.standard_normal((shape[0], rank, *((1, 1) if window else ()))).astype(np.float32) / 10
        factors = {"down": in_memory(down), "up": in_memory(up)}
        entries[component, path] = Entry(component, path, "lora", factors, Scale(alpha, rank, "rank", "told"))
    return with_family(Adapter(None, entries), "sd1")


@pytest.fixture(scope="module")
def base() -> BaseWeights:
    return base_weights("mini")


def weights(pipeline) -> dict[str, np.ndarray]:
    found = {f"unet.{name}": value for name, value in pipeline.unet.state_dict().items()}
    for name, value in pipeline.text_encoder.state_dict().items():
        found[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.detach().float().numpy().copy() for name, value in found.items()}


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "diffusers-legacy"])
def test_diffusers_applies_the_delta_of_what_was_written(dialect, base, tmp_path):
    adapter = adapter_for(base, convolutions=True)
    persona.save(adapter, tmp_path / "adapter.safetensors", to=dialect)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(MINI, dtype=torch.float32, safety_checker=None)
    before = weights(pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after, deltas = weights(pipeline), adapter.deltas()
    for name, change in deltas.items():
        np.testing.assert_allclose(
            (after[f"{name}.weight"] - before[f"{name}.weight"]).reshape(change.shape), change, atol=2e-6, err_msg=name
        )
    untouched = {name for name in before if name.removesuffix(".weight") not in deltas}
    assert all(np.array_equal(before[name], after[name]) for name in untouched)


def test_peft_applies_the_delta_of_a_folder(base, tmp_path):
    from peft import PeftModel

    adapter = adapter_for(base, convolutions=True, only="unet")
    persona.save(adapter, tmp_path / "peft", to="peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    unet = diffusers.UNet2DConditionModel.from_pretrained(MINI / "unet", torch_dtype=torch.float32)
    before = {name: value.clone().numpy() for name, value in unet.state_dict().items()}
    merged = PeftModel.from_pretrained(unet, str(tmp_path / "peft")).merge_and_unload()
    after = {name: value.float().numpy() for name, value in merged.state_dict().items()}
    for name, change in adapter.deltas().items():
        key = f"{name.removeprefix('unet.')}.weight"
        np.testing.assert_allclose((after[key] - before[key]).reshape(change.shape), change, atol=2e-6, err_msg=name)


def test_diffusers_loads_a_word_that_came_from_paddle(tmp_path):
    """ppdiffusers' learned_embeds.pdparams to safetensors, as the mission's own line has it."""
    fixture = Path(__file__).parents[1] / "fixtures" / "paddle" / "ti-single" / "learned_embeds.pdparams"
    persona.convert(fixture, tmp_path / "cat.safetensors")
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    (loaded,) = load_textual_inversion_state_dicts([str(tmp_path / "cat.safetensors")], local_files_only=True)
    with np.load(fixture.parent / "expected.npz") as expected:
        np.testing.assert_array_equal(loaded["<cat-toy>"].numpy().reshape(-1), expected["<cat-toy>"].reshape(-1))
