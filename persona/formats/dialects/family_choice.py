"""Which family an adapter is taken for: what its modules allow, narrowed by what the user or the header says
(dialects.md §1.5)."""

from __future__ import annotations

from collections.abc import Mapping

from persona.core.adapters.entry import Adapter
from persona.core.host.contracts import Told
from persona.core.host.errors import UnreadableFile
from persona.formats.models.families import FAMILIES


def settle_family(families: frozenset[str], told: Told, adapter: Adapter) -> tuple[frozenset[str], str | None]:
    """The set that is left and its only member: what the user told wins when the evidence allows it."""
    if told.family is not None:
        if families and told.family not in families:
            raise UnreadableFile(
                f"This is not a {told.family} adapter: its modules fit {', '.join(sorted(families))}.",
                hint=f"--family {min(families)}",
            )
        return frozenset({told.family}), told.family
    stated = stated_families(adapter.metadata)
    if stated & families:
        families &= stated
    elif stated and families:
        adapter.notes.append(
            f"the header says {'/'.join(sorted(stated))}, the modules fit {'/'.join(sorted(families))}; they count"
        )
    return families, next(iter(families)) if len(families) == 1 else None


STATED: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("ss_base_model_version", "sd_v1", frozenset({"sd1"})),
    ("ss_base_model_version", "sd_v2", frozenset({"sd2"})),
    ("ss_base_model_version", "sdxl_refiner", frozenset({"sdxl-refiner"})),
    ("ss_base_model_version", "sdxl_", frozenset({"sdxl"})),
    ("ss_base_model_version", "kolors", frozenset({"kolors"})),
    ("ss_base_model_version", "flux1", frozenset({"flux1"})),
    ("ss_base_model_version", "sd3", frozenset({"sd3"})),
    ("modelspec.architecture", "stable-diffusion-v1", frozenset({"sd1"})),
    ("modelspec.architecture", "stable-diffusion-v2", frozenset({"sd2"})),
    ("modelspec.architecture", "stable-diffusion-v3", frozenset({"sd3"})),
    ("modelspec.architecture", "stable-diffusion-xl-v1-base", frozenset({"sdxl"})),
    ("modelspec.architecture", "stable-diffusion-xl-v1-refiner", frozenset({"sdxl-refiner"})),
    ("modelspec.architecture", "flux-1", frozenset({"flux1"})),
)
"""(header key, how its value begins, families): what breaks a tie and never decides alone (dialects.md §1.5)."""


def stated_families(metadata: Mapping[str, str]) -> frozenset[str]:
    """The families a header names, or none."""
    own = metadata.get("persona.family")
    if own in FAMILIES:
        return frozenset({own})
    for key, beginning, families in STATED:
        if metadata.get(key, "").startswith(beginning):
            return families
    return frozenset()
