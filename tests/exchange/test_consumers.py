"""Which tools load a file: the verdicts agree with what was measured with the tools' own loaders (diffusers 0.42.1 and
0.35.2 on the fixtures; ppdiffusers 0.29)."""

from __future__ import annotations

from pathlib import Path

import pytest

import persona
from persona.exchange.consumers import TOOLS, verdicts

FIXTURES = Path(__file__).parents[1] / "fixtures"
MEASURED = [
    ("torch/diffusers_sd15_unet_te/peft_keys_with_metadata.safetensors", "diffusers", "all"),
    ("torch/diffusers_legacy_attnprocs/pytorch_lora_weights_unet_te_0.18.safetensors", "diffusers", "all"),
    ("torch/diffusers_legacy_attnprocs/pytorch_lora_weights_0.13_noprefix.bin", "diffusers", "refuses"),
    ("torch/kohya_sd15_linear/kohya_sd15_linear.safetensors", "diffusers", "all"),
    ("torch/kohya_sd15_conv/kohya_sd15_conv.safetensors", "diffusers", "all"),
    ("torch/lycoris_loha/lycoris_loha.safetensors", "diffusers", "refuses"),
    ("torch/lycoris_lokr/lycoris_lokr.safetensors", "diffusers", "refuses"),
    ("torch/peft_lora", "diffusers", "nothing"),
    ("torch/peft_lora", "PEFT", "all"),
    ("torch/diffsynth_2024_kolors_style/epoch=0-step=1.ckpt", "diffusers", "nothing"),
    ("torch/diffusers_sd15_unet/peft_keys_with_metadata.safetensors", "ComfyUI", "part"),
    ("torch/diffusers_sd15_unet/peft_keys_with_metadata.safetensors", "A1111, Forge", "nothing"),
    ("paddle/lora-unet-te-attnproc-pdparams/paddle_lora_weights.pdparams", "ppdiffusers", "all"),
    ("paddle/lora-unet-te-attnproc-pdparams/paddle_lora_weights.pdparams", "diffusers", "nothing"),
    ("torch/kohya_sd15_linear/kohya_sd15_linear.safetensors", "ppdiffusers", "all"),
    ("torch/diffusers_sd15_unet/peft_keys_with_metadata.safetensors", "ppdiffusers", "nothing"),
    ("mindspore/wukong_lora_mindpet/wkhh_txt2img_lora.ckpt", "Wukong (mindpet)", "all"),
    ("mindspore/mindone_sdv2_lora/sd-5_lora.ckpt", "MindONE stable_diffusion_v2", "all"),
    ("torch/ti_sd15/learned_embeds.safetensors", "diffusers", "all"),
    ("torch/ti_sd15/learned_embeds_multi.safetensors", "diffusers", "all"),
    ("torch/ti_sd15/two_tokens.safetensors", "diffusers", "refuses"),
    ("torch/ti_sd15/a1111_sks.pt", "diffusers", "all"),
    ("paddle/ti-single/learned_embeds.pdparams", "ppdiffusers", "all"),
]


@pytest.mark.parametrize(("file", "tool", "loads"), MEASURED, ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_the_verdict_is_what_the_tool_does(file, tool, loads):
    found = {verdict.tool: verdict for verdict in verdicts(persona.load(FIXTURES / file))}
    assert set(found) == {one.name for one in TOOLS}
    assert found[tool].loads == loads, found[tool]


def test_a_dora_in_kohyas_spelling_loses_its_magnitude_in_diffusers(tmp_path):
    """Measured: dropped with a warning, the result up to 96 % wrong."""
    persona.convert(FIXTURES / "torch/peft_dora", tmp_path / "k.safetensors", to="kohya")
    found = {verdict.tool: verdict for verdict in verdicts(persona.load(tmp_path / "k.safetensors"))}
    assert found["diffusers"].loads == "part"
    assert "dora_scale is dropped" in found["diffusers"].ignores[0]


TEXT_ENCODERS = [  # dialect, the text encoder's modules that are left out, what diffusers 0.42.1 does (measured)
    ("kohya", ("out_proj", "mlp"), "refuses"),
    ("kohya", ("out_proj",), "part"),
    ("kohya", ("k_proj",), "all"),
    ("kohya", ("self_attn",), "all"),
    ("diffusers", ("out_proj", "mlp"), "all"),
    ("diffusers", ("self_attn",), "refuses"),
    ("diffusers-legacy", ("out_proj", "mlp"), "all"),
    ("diffusers-legacy", ("self_attn",), "all"),
]


@pytest.mark.parametrize(("dialect", "left_out", "loads"), TEXT_ENCODERS)
def test_a_text_encoder_in_part_gets_the_verdict_that_was_measured(dialect, left_out, loads, tmp_path):
    """tests/peers/test_diffusers.py hands the same files to diffusers."""
    file = partial_text_encoder(dialect, left_out, tmp_path)
    adapter = persona.load(file)
    found = {verdict.tool: verdict for verdict in verdicts(adapter)}["diffusers"]
    assert found.loads == loads, found
    if loads == "part":  # q, k and v of two layers
        assert "(6 of " in found.ignores[0] and "dropped" in found.ignores[0]


def partial_text_encoder(dialect, left_out, folder):
    """The linear fixture without some modules of its text encoder, in a dialect."""
    adapter = persona.load(FIXTURES / "torch/kohya_sd15_linear/kohya_sd15_linear.safetensors")
    adapter.entries = {
        place: entry
        for place, entry in adapter.entries.items()
        if place[0] == "unet" or not any(part in place[1] for part in left_out)
    }
    assert any(component == "text_encoder" for component, _ in adapter.entries)
    persona.save(adapter, folder / "part.safetensors", to=dialect)
    return folder / "part.safetensors"


def test_every_verdict_that_is_not_all_says_why(tmp_path):
    for file, _, _ in MEASURED:
        for verdict in verdicts(persona.load(FIXTURES / file)):
            assert verdict.loads == "all" or verdict.why or verdict.ignores, (file, verdict)
