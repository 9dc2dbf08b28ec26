"""Whole models through `persona.load` and `persona convert`."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import persona
from persona.core.adapters.entry import Checkpoint
from persona.core.host.errors import PersonaError, UnreadableFile, UsageError
from persona.exchange.convert import Wish, convert

FIXTURES = Path(__file__).parent.parent / "fixtures"
FILE = FIXTURES / "torch/dreambooth_full_sd15/model.safetensors"
FOLDER = FIXTURES / "torch/dreambooth_full_sd15/diffusers"


def bits(model: object) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    assert isinstance(model, Checkpoint)
    return {
        f"{component}.{name}": (str(ref.dtype), ref.shape, ref.read().tobytes())
        for component, parameters in model.components.items()
        for name, ref in parameters.items()
    }


def test_a_file_and_a_folder_of_one_model_load_as_the_same_checkpoint() -> None:
    assert bits(persona.load(FILE)) == bits(persona.load(FOLDER))


@pytest.mark.parametrize(
    "name, to",
    [("m.safetensors", None), ("m.ckpt", None), ("wukong.ckpt", "wukong"), ("folder", None), ("paddle", "ppdiffusers")],
)
def test_every_form_is_written_and_read_back_bit_for_bit(name: str, to: str | None, tmp_path: Path) -> None:
    report = convert([FILE], tmp_path / name, Wish(to=to), persona.api.host())
    assert all(path.exists() for path in report.written)
    assert bits(persona.load(tmp_path / name)) == bits(persona.load(FOLDER))
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in report.written} == {0o644 & ~mask}


def test_a_folder_that_has_its_configs_keeps_them(tmp_path: Path) -> None:
    convert([FOLDER], tmp_path / "copy", Wish(), persona.api.host())
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((tmp_path / "copy" / name).read_text()) == json.loads((FOLDER / name).read_text())


def test_one_component_of_paddles_becomes_one_file_of_diffusers(tmp_path: Path) -> None:
    source = FIXTURES / "paddle/unet-full-pd33/model_state.pdparams"
    convert([source], tmp_path / "unet.safetensors", Wish(to="diffusers"), persona.api.host())
    assert bits(persona.load(tmp_path / "unet.safetensors")) == bits(persona.load(source))


def test_a_folder_named_as_a_file_and_an_unknown_form_are_told_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder of components"):
        convert([FILE], tmp_path / "m.safetensors", Wish(to="diffusers"), persona.api.host())
    with pytest.raises(UsageError, match="no form"):
        convert([FILE], tmp_path / "m.safetensors", Wish(to="peft"), persona.api.host())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"precious")
    with pytest.raises(PersonaError, match="exists"):
        convert([FILE], tmp_path / "m.safetensors", Wish(), persona.api.host())
    assert (tmp_path / "m.safetensors").read_bytes() == b"precious"


def test_a_file_that_is_neither_adapter_nor_model_says_so() -> None:
    with pytest.raises(UnreadableFile, match="no dialect"):
        persona.load(FIXTURES / "mindspore/with_optimizer/train_one_step.ckpt")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("block", ["joint_blocks.0.x_block.attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight"])
@pytest.mark.parametrize("also", [[], ["first_stage_model.decoder.conv_in.weight"]])
def test_a_part_of_a_transformer_is_refused_in_a_line(prefix, block, also, tmp_path):
    file = tmp_path / "whole.safetensors"
    save_file({prefix + block: np.zeros((24, 8), np.float32)} | {n: np.zeros((2, 2), np.float32) for n in also}, file)
    for attempt in (
        lambda: persona.load(file),
        lambda: convert([file], tmp_path / "out", Wish(), persona.api.host()),
        lambda: convert([file], tmp_path / "out.safetensors", Wish(to="kohya"), persona.api.host()),
    ):
        with pytest.raises(UnreadableFile, match="not complete: it lacks") as told:
            attempt()
        assert "\n" not in told.value.message
    assert list(tmp_path.iterdir()) == [file]
