"""The built-in dialects, and which of them a file is written in: each says how much of the file it can name, and the
one that names most wins (dialects.md §1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona.core.host.contracts import Dialect, Evidence, State
from persona.formats.dialects import (
    cloneofsimo,
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
from persona.formats.dialects.table import TableDialect

BUILT_IN: tuple[Dialect, ...] = (
    diffusers_peft.DIALECT,
    diffusers_legacy.DIALECT,
    kohya.DIALECT,
    peft_folder.DIALECT,
    comfy.DIALECT,
    original.DIALECT,
    diffsynth.DIALECT,
    diffsynth.BLOCKS,
    xlabs.DIALECT,
    cloneofsimo.DIALECT,
    ppdiffusers.DIALECT,
    mindpet.DIALECT,
    mindone.SDV2,
    mindone.SDXL,
    mindone.KOHYA_PORT,
    mindone.DIFFUSERS,
)
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in BUILT_IN}
TABLES: tuple[TableDialect, ...] = tuple(dialect for dialect in BUILT_IN if isinstance(dialect, TableDialect))


@dataclass(frozen=True)
class Recognised:
    """A dialect that names something of a file, and the evidence."""

    dialect: Dialect
    evidence: Evidence


def recognise(state: State, siblings: Sequence[str] = ()) -> list[Recognised]:
    """The dialects that name something of a state, the one that names most first; ties go to the more particular."""
    found = [Recognised(dialect, dialect.detect(state, siblings)) for dialect in BUILT_IN]
    return sorted(
        (one for one in found if one.evidence.score > 0),
        key=lambda one: (one.evidence.score, getattr(one.dialect, "priority", 0)),
        reverse=True,
    )
