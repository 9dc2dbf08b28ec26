"""Outputs that are folders, where they cannot be written or the disk is full: one line with the output's own name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import persona
from persona.core.host.errors import UnwritableOutput
from persona.formats.containers.safetensors import Safetensors

FIXTURES = Path(__file__).parents[1] / "fixtures" / "torch"
ADAPTER = FIXTURES / "kohya_sd15_linear/kohya_sd15_linear.safetensors"


def test_a_folder_that_may_not_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *arguments: object, **more: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UnwritableOutput, match=f"^{tmp_path} cannot be written: Operation not permitted") as told:
        persona.convert(ADAPTER, tmp_path / "out", to="peft")
    assert told.value.hint == "Choose a folder of yours for the output."


def test_a_full_disk_names_the_folder_that_was_asked_for_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, path: Path, *arguments: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Safetensors, "write", full)
    with pytest.raises(
        UnwritableOutput, match=rf"^{tmp_path}/out/(unet|text_encoder)/adapter_model.safetensors was not written"
    ) as told:
        persona.convert(ADAPTER, tmp_path / "out", to="peft")
    assert ".persona-" not in f"{told.value.message} {told.value.hint}"
    assert not list(tmp_path.iterdir())
