"""A module that the target has a slot for and no name: refused with the line to type, left out with `--drop`."""

from __future__ import annotations

import pytest
from safetensors.numpy import load_file

import persona
from persona.api import host
from persona.core.adapters.entry import Adapter
from persona.core.host.errors import ConversionError, NoPlace
from persona.exchange.planning import plan_for
from persona.exchange.save import target_for
from persona.formats.dialects.recognise import DIALECTS, TABLES
from persona.formats.models.families import FAMILIES
from tests.formats.dialects.synthetic import lora, narrow
from tests.formats.dialects.written import adapter_of, lora_entry

QUERY = "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
TIME = "time_embedding.linear_1"
WRITTEN = [*(table.name for table in TABLES if table.names is not None), "peft"]


def sdxl() -> Adapter:
    return adapter_of([lora_entry("unet", QUERY, 640, 640), lora_entry("unet", TIME, 1280, 320)], "sdxl")


def test_it_is_refused_with_the_line_to_type(tmp_path) -> None:
    with pytest.raises(ConversionError, match=rf"cannot hold unet\.{TIME}: it has no name in DiffSynth") as caught:
        persona.save(sdxl(), tmp_path / "out.safetensors", to="diffsynth-2024")
    assert "--drop" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_dropping_leaves_it_out_and_names_it(tmp_path) -> None:
    persona.save(sdxl(), tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    report = persona.convert(tmp_path / "in.safetensors", out, to="diffsynth-2024", family="sdxl", drop=True)
    dropped = [step.module for step in report.steps if step.action == "drop"]
    assert dropped == [f"unet.{TIME}"]
    assert sorted(load_file(out)) == [
        f"blocks.7.transformer_blocks.1.attn1.to_q.lora_{letter}.default.weight" for letter in "AB"
    ]


def test_a_dry_run_shows_it_among_the_steps(tmp_path) -> None:
    persona.save(sdxl(), tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    report = persona.convert(tmp_path / "in.safetensors", out, to="diffsynth-2024", family="sdxl", dry_run=True)
    assert [(step.module, step.cost) for step in report.steps if step.cost == "refused"] == [
        (f"unet.{TIME}", "refused")
    ]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mini"])
def test_what_is_left_after_dropping_can_always_be_written(family: str, name: str, tmp_path) -> None:
    """Every linear layer, convolution and embedding that each family has, in every dialect that is written."""
    entries = {}
    for component, configs in FAMILIES[family].components.items():
        for number, module in enumerate(narrow(configs[0]).modules()):
            if module.kind in ("linear", "conv", "embedding") and not any(f".{n}." in module.path for n in (3, 4, 5)):
                entry = lora(component, module, rank=2, alpha=1.0, seed=number, dtype="float32")
                entries[component, module.path] = entry
    adapter = Adapter(family, entries, families=frozenset({family}))
    target = target_for(adapter, tmp_path / ("out" if name == "peft" else "out.safetensors"), host(), name)
    made = plan_for(adapter, target, drop=True)
    if not made.adapter.entries:
        return
    outputs = DIALECTS[name].write(made.adapter)
    assert sum(len(output.tensors) for output in outputs) >= 2 * len(made.adapter.entries)
    spell = DIALECTS[name].speller(adapter)  # type: ignore[attr-defined]
    refused = {step.module for step in made.steps if step.action == "drop" and "name" in step.detail}
    for entry in (one for one in adapter.entries.values() if one.name in refused):
        with pytest.raises(NoPlace):
            spell(entry)
