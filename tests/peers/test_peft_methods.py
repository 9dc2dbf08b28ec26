"""PEFT's methods beyond LoRA: its own folders read, written again and loaded by PEFT, and LyCORIS' as PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peer_adapters import UNET
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import persona

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FEED = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "mid_block.resnets.0.conv1"
LOKR: tuple[dict[str, Any], ...] = (
    {"r": 2},
    {"r": 1, "decompose_both": True},
    {"r": 1, "decompose_factor": 2, "use_effective_conv2d": True},
    {"r": 64},  # both halves whole: PEFT applies alpha / r all the same
    {"r": 1, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 7}},
)


def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**UNET)


def changes(model: torch.nn.Module, make: Any = unet) -> dict[str, np.ndarray]:
    """Parameter -> what merging changes in it."""
    before = make().state_dict()
    after = model.merge_and_unload().state_dict()  # type: ignore[operator]
    return {name: (after[name] - before[name]).numpy() for name in before}


def trained(config: Any, folder: Path, make: Any = unet) -> dict[str, np.ndarray]:
    """A folder that PEFT writes, with random values, and what PEFT itself makes of it."""
    model = get_peft_model(make(), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3 + (1 if "ia3_l" in name else 0)
    model.save_pretrained(folder)
    return changes(model, make)


@pytest.mark.parametrize(
    "config",
    [
        *(LoKrConfig(**{"alpha": 3, "target_modules": TARGETS, **fields}) for fields in LOKR),
        LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
        LoHaConfig(r=2, alpha=3, target_modules=TARGETS, use_effective_conv2d=True),
        IA3Config(target_modules=["to_k", "ff.net.2", "conv1"], feedforward_modules=["ff.net.2"]),
        IA3Config(target_modules=r".*(to_k|ff\.net\.2|conv1)", feedforward_modules=r".*(ff\.net\.2|conv1)"),
    ],
    ids=lambda config: "-".join(str(value) for value in (config.peft_type.value, getattr(config, "r", ""))),
)
def test_a_folder_of_peft_goes_through_persona_and_is_loaded_by_peft(config: Any, tmp_path: Path) -> None:
    wanted = trained(config, tmp_path / "in")
    base = {f"unet.{name.removesuffix('.weight')}": value.numpy() for name, value in unet().state_dict().items()}
    found = persona.load(tmp_path / "in").deltas(base)
    moved = {f"unet.{name.removesuffix('.weight')}" for name, change in wanted.items() if np.abs(change).max() > 1e-5}
    assert set(found) == {name for name in moved if not name.endswith("bias")}
    for name in found:
        np.testing.assert_allclose(found[name], wanted[f"{name[5:]}.weight"], atol=2e-6, rtol=1e-4, err_msg=name)
    persona.convert(tmp_path / "in", tmp_path / "out", to="peft")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"] == config.peft_type.value
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("in", "out"))
    assert {name: value.tobytes() for name, value in first.items()} == {
        name: value.tobytes() for name, value in second.items()
    }
    again = changes(PeftModel.from_pretrained(unet(), str(tmp_path / "out")))
    for name, change in wanted.items():
        np.testing.assert_allclose(again[name], change, atol=1e-6, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("fields", LOKR, ids=str)
def test_lokr_comes_back_from_kohya_as_it_went(fields: dict[str, Any], tmp_path: Path) -> None:
    wanted = trained(LoKrConfig(**{"alpha": 3, "target_modules": TARGETS, **fields}), tmp_path / "in")
    persona.convert(tmp_path / "in", tmp_path / "k.safetensors", to="kohya")
    persona.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"] == "LOKR"
    again = changes(PeftModel.from_pretrained(unet(), str(tmp_path / "out")))
    for name, change in wanted.items():
        np.testing.assert_allclose(again[name], change, atol=2e-6, rtol=1e-4, err_msg=name)


def test_widths_divided_in_two_ways_become_lora(tmp_path: Path) -> None:
    """PEFT has one decompose_factor for a folder."""
    rng, flat = np.random.default_rng(3), f"lora_unet_{QUERY.replace('.', '_')}"
    key = flat.replace("to_q", "to_k").replace("attn1", "attn2")
    tensors = {
        f"{flat}.lokr_w1": rng.standard_normal((2, 2)),
        f"{flat}.lokr_w2": rng.standard_normal((8, 8)),
        f"{key}.lokr_w1": rng.standard_normal((1, 3)),
        f"{key}.lokr_w2": rng.standard_normal((16, 4)),
    }
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(tensors, tmp_path / "k.safetensors")
    persona.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft", family="sd1", alpha=1.0)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["peft_type"] == "LORA"
    found = changes(PeftModel.from_pretrained(unet(), str(tmp_path / "out")))
    for name, module in ((flat, QUERY), (key, QUERY.replace("to_q", "to_k").replace("attn1", "attn2"))):
        product = np.kron(tensors[f"{name}.lokr_w1"], tensors[f"{name}.lokr_w2"])
        np.testing.assert_allclose(found[f"{module}.weight"], product, atol=1e-5, rtol=1e-4)


def test_dora_beside_plain_lora_keeps_what_both_do(tmp_path: Path) -> None:
    """PEFT's use_dora is one switch: without a vector the plain module would get ‖W‖, and lose most of its change."""
    rng = np.random.default_rng(11)
    names = {name: f"lora_unet_{QUERY.replace('to_q', name).replace('.', '_')}" for name in ("to_q", "to_k")}
    tensors = {}
    for flat in names.values():
        tensors |= {f"{flat}.lora_down.weight": rng.standard_normal((2, 16))}
        tensors |= {f"{flat}.lora_up.weight": rng.standard_normal((16, 2))}
    tensors[f"{names['to_q']}.dora_scale"] = rng.uniform(0.5, 1.5, (16, 1))
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, tmp_path / "k.safetensors")
    with pytest.raises(persona.PersonaError, match="has no DoRA and its neighbours have"):
        persona.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft", family="sd1")
    unet().save_pretrained(tmp_path / "base/unet")  # type: ignore[operator]
    base = str(tmp_path / "base")
    persona.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft", family="sd1", base=base)
    found = changes(PeftModel.from_pretrained(unet(), str(tmp_path / "out")))
    plain = tensors[f"{names['to_k']}.lora_up.weight"] @ tensors[f"{names['to_k']}.lora_down.weight"]
    np.testing.assert_allclose(found[f"{QUERY.replace('to_q', 'to_k')}.weight"], plain, atol=1e-5, rtol=1e-4)
    assert np.abs(found[f"{QUERY}.weight"]).max() > 0.1


ROTATIONS: tuple[Any, ...] = (
    OFTConfig(oft_block_size=4, target_modules=["to_q", "proj_in"], use_cayley_neumann=False),
    *(
        OFTConfig(oft_block_size=4, target_modules=["to_q"], num_cayley_neumann_terms=terms)
        for terms in (2, 3, 4, 5, 6)
    ),
    OFTConfig(oft_block_size=4, target_modules=["to_q", "ff.net.2"], block_share=True),
    BOFTConfig(boft_block_size=4, target_modules=["to_q", "conv1", "proj_in"]),
)


@pytest.mark.parametrize("config", ROTATIONS, ids=lambda config: config.peft_type.value)
def test_pefts_rotations_change_what_peft_itself_changes(config: Any, tmp_path: Path) -> None:
    """With the base they become LoRA of full rank, and PEFT makes the same of that."""
    wanted = trained(config, tmp_path / "in")
    with pytest.raises(persona.PersonaError, match="base model's weight") as problem:
        persona.convert(tmp_path / "in", tmp_path / "k.safetensors", to="kohya", family="sd1")
    assert problem.value.hint == "--base MODEL"
    unet().save_pretrained(tmp_path / "base/unet")  # type: ignore[operator]
    base = str(tmp_path / "base")
    persona.convert(tmp_path / "in", tmp_path / "out", to="peft", family="sd1", base=base)
    found = changes(PeftModel.from_pretrained(unet(), str(tmp_path / "out")))
    for name, change in wanted.items():
        np.testing.assert_allclose(found[name], change, atol=2e-6, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (OFTConfig(oft_block_size=4, target_modules=["conv1"]), "3x3 does one thing"),
        (OFTConfig(oft_block_size=4, target_modules=["to_q"], coft=True), "coft"),
    ],
)
def test_rotations_whose_meaning_is_not_one_are_refused(config: Any, words: str, tmp_path: Path) -> None:
    trained(config, tmp_path)
    with pytest.raises(persona.PersonaError, match=words) as problem:
        persona.load(tmp_path)
    assert "merge_and_unload()" in problem.value.hint


def test_pefts_oft_of_a_convolution_runs_otherwise_than_it_merges() -> None:
    """Why it is refused: the inputs are turned patch by patch and laid over each other again."""
    torch.manual_seed(1)
    layer = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3))
    model = get_peft_model(layer, OFTConfig(oft_block_size=4, target_modules=["0"]))
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    pictures = torch.randn(2, 4, 8, 8)
    before = model(pictures)
    assert (before - model.merge_and_unload()(pictures)).abs().max() > 0.5  # type: ignore[operator]


def test_ia3_of_lycoris_is_pefts_and_back(tmp_path: Path) -> None:
    """W∘(1 + w) by hand; PEFT keeps 1 + w."""
    rng = np.random.default_rng(5)
    key, feed = (f"lora_unet_{module.replace('.', '_')}" for module in (QUERY, FEED))
    scales = {key: rng.standard_normal(16), feed: rng.standard_normal(64)}
    tensors = {f"{name}.weight": value.astype(np.float32) for name, value in scales.items()}
    tensors |= {f"{key}.on_input": np.array(0), f"{feed}.on_input": np.array(1)}
    save_file(tensors, tmp_path / "k.safetensors")
    report = persona.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft", family="sd1")
    assert {(step.action, step.cost) for step in report.steps} == {("offset", "one rounding")}
    found = changes(PeftModel.from_pretrained(unet(), str(tmp_path / "out")))
    base = {name: value.numpy() for name, value in unet().state_dict().items()}
    wanted = {
        f"{QUERY}.weight": base[f"{QUERY}.weight"] * scales[key][:, None],
        f"{FEED}.weight": base[f"{FEED}.weight"] * scales[feed][None],
    }
    for name, change in found.items():
        np.testing.assert_allclose(change, wanted.get(name, 0 * change), atol=1e-6, rtol=1e-5, err_msg=name)
    persona.convert(tmp_path / "out", tmp_path / "again.safetensors", to="kohya", family="sd1")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_allclose(again[name], value, atol=2e-7)


def test_an_output_with_a_bias_is_scaled_otherwise_by_peft(tmp_path: Path) -> None:
    """PEFT's own code shows it: CLIP's projections have a bias, and it moves."""
    config = CLIPTextConfig(
        vocab_size=530, hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )

    def clip() -> torch.nn.Module:
        torch.manual_seed(0)
        model = CLIPTextModel(config)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter)
        return model

    moved = trained(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), tmp_path / "in", clip)
    assert np.abs(moved["encoder.layers.0.self_attn.k_proj.bias"]).max() > 0.01
    with pytest.raises(persona.PersonaError, match="scales the bias too"):
        persona.convert(tmp_path / "in", tmp_path / "k.safetensors", to="kohya", family="sd1")
