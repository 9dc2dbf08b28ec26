"""What of a file's text metadata goes along when it is converted (dialects.md §7)."""

from __future__ import annotations

from collections import Counter

from persona.core.adapters.entry import Adapter

PRIVATE = ("ss_dataset_dirs", "ss_datasets", "ss_tag_frequency", "ss_reg_dataset_dirs", "ot_config")
"""Paths and captions of the person who trained it: they stay behind."""

FALSE_AFTER_CHANGE = ("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""True of the source file's bytes only."""


def carried(adapter: Adapter) -> dict[str, str]:
    """The metadata that stays true and is nobody's secret, with the source dialect and the family added."""
    kept = {key: value for key, value in adapter.metadata.items() if key not in (*PRIVATE, *FALSE_AFTER_CHANGE)}
    if adapter.family:
        kept["persona.family"] = adapter.family
    return kept


def common(values: list[float]) -> str:
    """The only value as text, or "Dynamic", kohya's word for several."""
    different = Counter(values)
    return f"{next(iter(different)):g}" if len(different) == 1 else "Dynamic"
