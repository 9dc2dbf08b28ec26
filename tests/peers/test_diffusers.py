"""What persona writes, loaded and fused by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peer_adapters import (
    ATTENTION,
    CONVOLUTIONS,
    FIXTURES,
    LINEAR,
    LOCON,
    LOHA,
    LOKR,
    PADDLE,
    TEXT_ENCODER,
    UNET,
    compare,
    expected,
)
from transformers import CLIPTextConfig, CLIPTextModel

import persona


def pipeline() -> Any:
    """A Stable Diffusion pipeline of the narrow UNet and text encoder, random weights."""
    torch.manual_seed(0)
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def weights(pipe: Any) -> dict[str, np.ndarray]:
    found = {f"unet.{name}": value for name, value in pipe.unet.state_dict().items()}
    for name, value in pipe.text_encoder.state_dict().items():
        found[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.detach().float().numpy().copy() for name, value in found.items()}


def fused(pipe: Any, file: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every weight before and after diffusers has loaded and fused `file`."""
    before = weights(pipe)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return before, weights(pipe)


@pytest.mark.parametrize(
    "source, dialect",
    [
        *[(source, "diffusers") for source in (ATTENTION, LINEAR, CONVOLUTIONS, LOCON, LOHA, LOKR, PADDLE)],
        *[(source, "kohya") for source in (ATTENTION, LINEAR, CONVOLUTIONS, PADDLE)],
        *[(source, "diffusers-legacy") for source in (ATTENTION, LINEAR, PADDLE)],
    ],
)
def test_diffusers_changes_its_weights_as_the_first_program_did(source: str, dialect: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    persona.convert(FIXTURES / source, file, to=dialect)
    before, after = fused(pipeline(), file)
    compare(before, after, expected(source), set(persona.load(FIXTURES / source).deltas()))


def test_diffusers_reads_a_pickle_that_persona_wrote(tmp_path: Path) -> None:
    file = tmp_path / "adapter.bin"
    persona.convert(FIXTURES / ATTENTION, file, to="diffusers")
    before, after = fused(pipeline(), file)
    compare(before, after, expected(ATTENTION), set())


def test_diffusers_loads_a_word_that_came_from_paddle(tmp_path: Path) -> None:
    """ppdiffusers' learned_embeds.pdparams to safetensors, as the mission's own line has it."""
    fixture = FIXTURES / "paddle" / "ti-single" / "learned_embeds.pdparams"
    persona.convert(fixture, tmp_path / "cat.safetensors")
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    (loaded,) = load_textual_inversion_state_dicts([str(tmp_path / "cat.safetensors")], local_files_only=True)
    with np.load(fixture.parent / "expected.npz") as archive:
        np.testing.assert_array_equal(loaded["<cat-toy>"].numpy().reshape(-1), archive["<cat-toy>"].reshape(-1))


@pytest.mark.parametrize(
    "dialect, left_out, loads",
    [
        ("kohya", ("out_proj", "mlp"), "refuses"),
        ("kohya", ("out_proj",), "part"),
        ("kohya", ("self_attn",), "all"),
        ("diffusers", ("out_proj", "mlp"), "all"),
        ("diffusers", ("self_attn",), "refuses"),
        ("diffusers-legacy", ("self_attn",), "all"),
    ],
)
def test_what_inspect_says_of_a_text_encoder_in_part_is_what_diffusers_does(dialect, left_out, loads, tmp_path) -> None:
    adapter = persona.load(FIXTURES / LINEAR)
    adapter.entries = {
        place: entry
        for place, entry in adapter.entries.items()
        if place[0] == "unet" or not any(part in place[1] for part in left_out)
    }
    file = tmp_path / "adapter.safetensors"
    persona.save(adapter, file, to=dialect)
    if loads == "refuses":
        with pytest.raises(ValueError, match="automatically infer"):
            fused(pipeline(), file)
        return
    before, after = fused(pipeline(), file)
    wanted = [entry.name for entry in adapter.entries.values() if entry.component == "text_encoder"]
    kept = [name for name in wanted if not np.array_equal(before[f"{name}.weight"], after[f"{name}.weight"])]
    lost = [name for name in wanted if name not in kept]
    assert kept
    assert bool(lost) == (loads == "part")
    assert all("self_attn" in name for name in lost)
