"""Which dialect a file is written in: every dialect says how much of it it can name, the one that names most wins
(dialects.md §1.4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from persona.core.adapters.entry import Adapter
from persona.core.host.contracts import Dialect, Evidence, State, Told
from persona.core.host.errors import UnreadableFile, UsageError, did_you_mean
from persona.formats.dialects import (
    comfy,
    diffsynth,
    diffusers_legacy,
    diffusers_peft,
    kohya,
    mindone,
    mindpet,
    original,
    peft_folder,
    ppdiffusers,
    xlabs,
)
from persona.formats.dialects.grammar import group
from persona.formats.dialects.table import TableDialect, read_groups

BUILT_IN = (
    diffusers_peft.DIALECT,
    diffusers_legacy.DIALECT,
    kohya.DIALECT,
    peft_folder.DIALECT,
    comfy.DIALECT,
    original.DIALECT,
    diffsynth.DIALECT,
    diffsynth.BLOCKS,
    xlabs.DIALECT,
    ppdiffusers.DIALECT,
    mindpet.DIALECT,
    mindone.SDV2,
    mindone.SDXL,
    mindone.KOHYA_PORT,
    mindone.DIFFUSERS,
)
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in BUILT_IN}
ALIASES = {
    "a1111": "kohya",
    "webui": "kohya",
    "lycoris": "kohya",
    "sd-scripts": "kohya",
    "diffusers-peft": "diffusers",
    "simpletuner": "diffusers",
    "ai-toolkit": "comfy",
    "comfyui": "comfy",
    "paddle": "ppdiffusers",
    "wukong": "mindpet",
    "mindspore": "mindone",
    "kolors": "diffsynth-2024",
}

REFUSED = (
    (re.compile(r"^lllite_unet"), "a ControlNet-LLLite, which is another kind of network"),
    (re.compile(r"^lora_controlnet$"), "a Control-LoRA, which needs its base model to mean anything"),
    (re.compile(r"custom_diffusion"), "Custom Diffusion weights, which persona does not convert"),
    (re.compile(r"\.lora_ups\.\d+\."), "a HydraLoRA with several ups a module, which persona does not convert"),
    (re.compile(r"(?:^|\.)(?:vera_lambda_|fourierft_|bone_|hra_|vblora_|randlora_|shira_|road_|miss_)"),
     "a PEFT method that persona does not convert"),
)  # fmt: skip
"""Names that say what a file is when it is no adapter persona can carry (dialects.md §1.2)."""


@dataclass(frozen=True)
class Recognised:
    """The dialect that names most of a file, the others that name some of it, and the evidence."""

    dialect: Dialect
    others: tuple[Dialect, ...]
    evidence: Evidence


def dialect_named(name: str) -> Dialect:
    """The dialect of that name or alias. Raises UsageError with near names."""
    found = DIALECTS.get(ALIASES.get(name, name))
    if found is None:
        raise UsageError(f"There is no dialect {name!r}.", hint=did_you_mean(name, [*DIALECTS, *ALIASES]))
    return found


def register(dialect: Dialect) -> None:
    """Make a plugin's dialect known."""
    DIALECTS[dialect.name] = dialect


def recognise(state: State, siblings: Sequence[str] = ()) -> Recognised:
    """The dialect of a state. Raises UnreadableFile with what the names look like when nobody knows them."""
    for key in state.tensors:
        for pattern, what in REFUSED:
            if pattern.search(key):
                raise UnreadableFile(f"This is {what} (key {key}).")
    scored = [(dialect.detect(state, siblings), dialect) for dialect in DIALECTS.values()]
    ranked = sorted(
        ((evidence, dialect) for evidence, dialect in scored if evidence.score > 0),
        key=lambda item: (item[0].score, getattr(item[1], "priority", 0)),
        reverse=True,
    )
    if not ranked:
        raise unknown(state)
    evidence, dialect = ranked[0]
    return Recognised(dialect, tuple(other for _, other in ranked[1:]), evidence)


def unknown(state: State) -> UnreadableFile:
    """The error for names that no dialect knows: what they look like, and what was tried."""
    grouped = group(state.tensors)
    shown = list(state.tensors)[:5]
    if not shown:
        return UnreadableFile("There are no tensors in it.")
    if grouped.groups:
        module = next(iter(grouped.groups))
        return UnreadableFile(
            f"It has {len(grouped.groups)} adapter modules, and no known base model has one named like {module}. "
            f"Tried: {', '.join(DIALECTS)}.",
            hint="Convert it in the tool that made it, or tell us its names.",
        )
    return UnreadableFile(f"No adapter tensors in it. Its keys begin with {', '.join(shown)}.")


def read(state: State, told: Told) -> Adapter:
    """An adapter's meaning, whatever its spelling; files that mix dialects are read module by module."""
    found = recognise(state, told.siblings)
    if not isinstance(found.dialect, TableDialect):
        return found.dialect.read(state, told)
    others = [dialect for dialect in found.others if isinstance(dialect, TableDialect)]
    adapter = read_groups(found.dialect, others, state, told)
    adapter.notes.insert(0, f"{found.dialect.name}: {'; '.join(found.evidence.reasons)}")
    return adapter
