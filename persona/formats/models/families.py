"""The families persona knows, by name. A plugin adds its own through the `persona_families` hook."""

from __future__ import annotations

from functools import lru_cache

from persona.core.adapters.evidence import is_known
from persona.core.adapters.family import Family
from persona.core.host.errors import UsageError, did_you_mean
from persona.formats.models import flux1, kolors, sd1, sd2, sd3, sdxl, sdxl_refiner, wukong

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (sd1, sd2, sdxl, sdxl_refiner, sd3, flux1, kolors, wukong)
}


def register(family: Family) -> None:
    """Make a plugin's family known."""
    FAMILIES[family.name] = family
    has_module.cache_clear()


@lru_cache(maxsize=16384)
def has_module(component: str, path: str) -> bool:
    """Whether some family has a module of this form in this component: every dialect asks it of the same paths."""
    return is_known(component, path, FAMILIES)


def family_named(name: str) -> Family:
    """The family of that name. Raises UsageError with near names."""
    if name not in FAMILIES:
        raise UsageError(f"There is no family {name!r}.", hint=did_you_mean(name, FAMILIES))
    return FAMILIES[name]
