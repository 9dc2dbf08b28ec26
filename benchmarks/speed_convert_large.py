"""A whole model in one file, to a folder of diffusers and to a MindSpore checkpoint: Stable Diffusion 1's UNet and text
encoder in float32 under LDM's names, 3.9 GB, beside `cp` and fsync of the same file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # persona, where it is not installed

from speed import Result, Row
from speed_convert import Spent, copied, persona_command, process

TARGET_MEMORY = 300.0
"""MiB at most."""
SPACE = 10 * 10**9
"""Bytes that have to be free: the file and one copy of it at a time."""


def make_model(path: Path) -> None:
    """The file, random numbers in the shapes of the real one (one block of them over and over)."""
    import numpy as np

    import persona
    from persona.core.adapters.entry import Checkpoint
    from persona.core.adapters.family import Component, inventory
    from persona.core.adapters.tensor import TensorRef
    from persona.formats.models.families import FAMILIES

    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def parameters(component: Component) -> Iterator[tuple[str, TensorRef]]:
        for module in inventory(component).values():
            for name, shape in zip(module.tensors, (module.shape, module.shape[:1]), strict=False):
                yield name, TensorRef(block.dtype, shape, lambda shape=shape: np.resize(block, shape))  # type: ignore[misc]

    components = {name: dict(parameters(configs[0])) for name, configs in FAMILIES["sd1"].components.items()}
    persona.save(Checkpoint("sd1", components), path, to="ldm")


def large(folder: Path) -> Result:
    """Both conversions, each between two copies of the file by `cp`. Raises OSError when the disk is too full."""
    if shutil.disk_usage(folder).free < SPACE:
        raise OSError(f"{folder} has less than {SPACE / 1e9:.0f} GB free, which --large needs.")
    source = folder / "large.safetensors"
    process([sys.executable, __file__, str(source)])
    copies = [copied([source], folder / "copy")]
    spent: dict[str, Spent] = {}
    for form, name in (("diffusers", "large"), ("mindspore", "large.ckpt")):
        out = folder / name
        spent[f"LDM -> {form}"] = process(persona_command("convert", str(source), str(out), "--to", form))
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        copies.append(copied([source], folder / "copy"))
    beside = f"cp + fsync, {source.stat().st_size / 1e9:.2f} GB"
    rows = [Row(beside, copies), *(Row(what, [one.seconds], beside=beside) for what, one in spent.items())]
    facts = {what: f"{one.processor:.2f} s of a processor, {one.memory:.0f} MiB at most" for what, one in spent.items()}
    wrong = [
        f"{what}: {one.memory:.0f} MiB, {TARGET_MEMORY:.0f} allowed"
        for what, one in spent.items()
        if one.memory > TARGET_MEMORY
    ]
    return Result(rows, facts, wrong)


if __name__ == "__main__":  # a process of its own makes the file
    make_model(Path(sys.argv[1]))
