"""The folders persona writes, loaded and merged by PEFT itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from peer_adapters import CONVOLUTIONS, DORA, FIXTURES, LINEAR, LOCON, LOHA, PADDLE, UNET, base, compare, expected
from peft import PeftModel

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
