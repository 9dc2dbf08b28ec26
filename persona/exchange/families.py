"""The family of an adapter that was made here, not read."""

from __future__ import annotations

from dataclasses import replace

from persona.core.adapters.entry import Adapter
from persona.core.host.errors import ConversionError


def with_family(adapter: Adapter, told: str | None) -> Adapter:
    """`adapter` with the families its modules fit, and the one told. Raises ConversionError when that does not fit."""
    from persona.core.adapters.evidence import decide
    from persona.formats.models.families import FAMILIES, family_named

    if told is not None:
        family_named(told)
    verdict = decide(adapter.entries.values(), FAMILIES)
    if told is not None and verdict.families and told not in verdict.families:
        raise ConversionError(f"The modules are not those of {told}; they fit {', '.join(sorted(verdict.families))}.")
    families = frozenset({told}) if told else verdict.families
    return replace(adapter, families=families, family=next(iter(families)) if len(families) == 1 else None)
