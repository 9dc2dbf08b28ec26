"""A LoRA trained on mini, through every dialect that is written and back: the same ΔW, and the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import persona
from persona.api import host
from persona.core.host.errors import ConversionError
from persona.exchange.choices import suffix_for

READ_ONLY = {"cloneofsimo", "xlabs"}
WRITTEN = [name for name in host().provided("dialect") if name not in READ_ONLY]
OTHER_FAMILIES = {"diffsynth-2024", "mindone-sdxl"}  # they have names for SDXL's UNet alone
RANK, ALPHA = 4, 2.0  # a scale that is a power of two: folding it rounds nothing


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product of three steps with a rate that leaves no module where it was."""
    folder = tmp_path_factory.mktemp("mini-travels")
    (folder / "toys").mkdir()
    drawn = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(drawn).save(folder / "toys" / "toy.png")
    run = persona.train(
        "lora", folder / "toys", output=folder / "run", prompt="a toy", rank=RANK, alpha=ALPHA, conv_rank=2,
        conv_alpha=1.0, train_text_encoder=True, learning_rate=0.01, steps=3, batch=1, sample_every=0, seed=1,
    )  # fmt: skip
    return Path(run.product)


def place(folder: Path, name: str, dialect: str) -> Path:
    spoken = host().load("dialect", dialect)
    return folder / f"{name}-{dialect}{'' if spoken.slots.folder else suffix_for(spoken, host())}"


def close(got: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert got.keys() == wanted.keys() and len(got) > 0
    for name in wanted:
        np.testing.assert_allclose(got[name].reshape(wanted[name].shape), wanted[name], rtol=1e-6, err_msg=name)


def test_the_training_moved_every_module(trained: Path) -> None:
    deltas = persona.load(trained).deltas()
    assert {name.split(".")[0] for name in deltas} == {"unet", "text_encoder"}
    assert any(deltas[name].ndim == 4 and deltas[name].shape[2:] == (3, 3) for name in deltas)
    assert sum(bool(np.abs(deltas[name]).max() > 1e-5) for name in deltas) > 0.9 * len(deltas)


@pytest.mark.parametrize("dialect", WRITTEN)
def test_there_and_back(dialect: str, trained: Path, tmp_path: Path) -> None:
    original = persona.load(trained).deltas()
    there, back = place(tmp_path, "there", dialect), tmp_path / "back.safetensors"
    if dialect in OTHER_FAMILIES:
        with pytest.raises(ConversionError, match="sdxl"):
            persona.convert(trained, there, to=dialect)
        return
    report = persona.convert(trained, there, to=dialect, drop=True)
    dropped = {step.module for step in report.steps if step.action == "drop"}
    assert all("conv" in name or name.startswith("text_encoder") for name in dropped), dropped
    wanted = {name: original[name] for name in original if name not in dropped}
    close(persona.load(there, family="sd1").deltas(), wanted)
    persona.convert(there, back, to="diffusers", family="sd1")
    close(persona.load(back).deltas(), wanted)


def test_the_same_picture_whatever_the_spelling(trained: Path, tmp_path: Path) -> None:
    def picture(*adapters: Path) -> np.ndarray:
        (image,) = persona.generate("a toy", adapters=adapters, seed=4, steps=2)
        return np.asarray(image).astype(int)

    as_trained = picture(trained)
    assert np.abs(as_trained - picture()).max() > 8
    for dialect in ("kohya", "ppdiffusers", "mindone", "peft"):
        file = place(tmp_path, "adapter", dialect)
        persona.convert(trained, file, to=dialect)
        assert np.abs(picture(file) - as_trained).max() <= 1, dialect
