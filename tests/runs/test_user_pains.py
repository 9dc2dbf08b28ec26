"""What users of other trainers ran into, one test each, named by where it was told (the peers' own issue threads)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

FEW = ("--steps", 2, "--batch", 1, "--sample-steps", 1, "--sample-prompt", "a toy", "--save-every", 1)
LORA = ("train", "--plugin", "lora", "--prompt", "a toy", "--rank", 2, *FEW)


def adapter(run: Path) -> bytes:
    return (run / "adapter.safetensors").read_bytes()


def test_the_same_seed_is_the_same_model_and_another_is_another(
    persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path
) -> None:
    """TheLastBen/fast-stable-diffusion#545; ppdiffusers documents its seed as not reproducible."""
    words = (*LORA, "--base", tiny_sd1, "--data", toys, "--dropout", 0.3, "--random-flip")
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        assert persona_(*words, "--seed", seed, "--output", tmp_path / name).code == 0
    assert adapter(tmp_path / "one") == adapter(tmp_path / "two") != adapter(tmp_path / "other")
    facts = json.loads((tmp_path / "one/environment.json").read_text())
    assert "bit for bit" in facts["determinism"]  # OneTrainer PR#803: say what can be relied on


def test_a_moved_data_set_is_the_same_run(persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path) -> None:
    """musubi-tuner PR#1011: the order of data has to be part of what is resumed; here it follows from the seed."""
    shutil.copytree(toys, tmp_path / "elsewhere")
    for name, data in (("one", toys), ("two", tmp_path / "elsewhere")):
        words = (*LORA, "--base", tiny_sd1, "--data", data, "--no-center-crop")
        assert persona_(*words, "--output", tmp_path / name).code == 0
    assert adapter(tmp_path / "one") == adapter(tmp_path / "two")


@pytest.mark.parametrize("lost", ["value/", "adam_v/", "loss_scale"])
def test_a_state_that_lacks_something_is_refused_not_begun_anew(
    lost: str, persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path
) -> None:
    """derrian-distro/LoRA_Easy_Training_Scripts#336: "Could not load random states" in the log, restarted from 0."""
    run = tmp_path / "run"
    words = (*LORA, "--base", tiny_sd1, "--data", toys, "--dropout", 0.3)
    assert persona_(*words, "--output", run).code == 0
    file = run / "checkpoints/step-000002/state.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.startswith(lost))
    del state[name]
    save_file(state, file)
    answer = persona_("train", "--resume", run, "--steps", 4)
    assert answer.code == 1 and name in answer.err and "missing" in answer.err


def test_the_folder_of_one_subject_itself_is_data_too(
    persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path
) -> None:
    """bmaltais/kohya_ss#3374, #216, #1725: "No data found", because the parent of N_name had to be named."""
    folder = tmp_path / "2_sks toy"
    toys.rename(folder)
    words = ("train", "--plugin", "dreambooth", "--lora", "--class-pictures", 0, *FEW, "--base", tiny_sd1)
    for number, data in enumerate((folder, tmp_path)):
        answer = persona_(*words, "--data", data, "--output", tmp_path / f"out/run-{number}")
        assert answer.code == 0, answer.err
        plan = json.loads((tmp_path / f"out/run-{number}/plan.json").read_text())
        assert plan["metadata"]["trigger"] == "sks toy"


def test_class_pictures_are_made_in_the_same_command_and_only_once(
    persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface/diffusers#807; MindONE: class pictures were made, and then the command had to be started again."""
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    words = ("train", "--plugin", "dreambooth", "--lora", "--class", "toy", "--class-pictures", 3, *FEW)
    words = (*words, "--base", tiny_sd1, "--data", toys)
    first = persona_(*words, "--output", tmp_path / "one")
    assert first.code == 0 and "class pictures 0 of 3" in first.err
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/class-pictures").rglob("*.png")}
    second = persona_(*words, "--output", tmp_path / "two")
    assert second.code == 0 and "class pictures 0 of 3" not in second.err and len(made) == 3
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert adapter(tmp_path / "one") == adapter(tmp_path / "two")
    assert "3 class pictures" in (tmp_path / "one/README.md").read_text()


def test_an_autoencoder_that_overflows_in_fp16_is_noticed_and_told(
    persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path
) -> None:
    """diffusers#4398, #7310, #9558; sd-scripts#952, #820: SDXL's VAE makes black pictures or a NaN loss in fp16."""
    base = tmp_path / "base"
    shutil.copytree(tiny_sd1, base)
    file = base / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"] = weights["encoder.conv_in.weight"] * np.float32(1e6)  # beyond fp16's 65504
    save_file(weights, file, metadata={"format": "pt"})
    words = (*LORA, "--base", base, "--data", toys, "--precision", "fp16")
    answer = persona_(*words, "--output", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "overflowed in fp16, so it runs in fp32" in answer.err
    moments = load_file(tmp_path / "run/cache/latents.safetensors")
    assert all(np.isfinite(values).all() for values in moments.values())


def test_transparency_is_a_mask_when_it_is_asked_for(persona_: Any, tiny_sd1: Path, tmp_path: Path) -> None:
    """OneTrainer's masked training, first-class there: only what is opaque is learned."""
    data = tmp_path / "data"
    data.mkdir()
    drawn = np.full((64, 64, 4), 120, np.uint8)
    drawn[:, :32, 3], drawn[:, 32:, 3] = 255, 0
    Image.fromarray(drawn).save(data / "half.png")
    losses = []
    for name, flags in (("plain", ()), ("masked", ("--alpha-mask",))):
        words = (*LORA, "--base", tiny_sd1, "--data", data, *flags)
        assert persona_(*words, "--output", tmp_path / name).code == 0
        rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        losses.append(float(rows[1].split(",")[1]))
    assert 0.2 < losses[1] / losses[0] < 0.8, "half of the picture is half of the loss"
