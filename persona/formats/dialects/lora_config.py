"""PEFT's LoraConfig as text: alpha and rank per module through patterns, read and written (dialects.md §5.1, §5.5).

Patterns are matched exactly as PEFT does (peft/utils/other.py get_pattern_key): each key is the regular expression
`(.*\\.)?(key)$` against the module's path, and the first that matches wins.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from persona.core.adapters.entry import Entry


def matching(patterns: Mapping[str, Any], path: str) -> list[str]:
    """The pattern keys that match a path, in order."""
    found = []
    for key in patterns:
        if key == path or (is_harmless(key) and re.match(rf"(.*\.)?({key})$", path)):
            found.append(key)
    return found


def patterned(config: Mapping[str, Any], field: str, path: str, otherwise: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says about a module, or `otherwise`."""
    patterns = config.get(field)
    keys = matching(patterns, path) if isinstance(patterns, Mapping) else []
    return patterns[keys[0]] if patterns and keys else otherwise


def is_harmless(pattern: str) -> bool:
    """Whether a pattern from a stranger's file is a regular expression that cannot run away: no repeated groups, and
    few repetitions at all."""
    if len(pattern) > 500 or re.search(r"\)[*+{?]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def alpha_from(config: Mapping[str, Any], path: str) -> tuple[float, str] | None:
    """(alpha, mode) for a module from a LoraConfig's fields, or None when the config says nothing."""
    value = patterned(config, "alpha_pattern", path, config.get("lora_alpha", config.get("alpha")))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value), "sqrt_rank" if config.get("use_rslora") else "rank"


def fields_of(component: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one component from flattened `component.field` metadata."""
    prefix = component + "."
    return {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}


def config_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """The fields that give every entry its scale back: the commonest rank and alpha, the others as anchored patterns.

    Only fields that every PEFT since 0.14 knows are written, because PEFT refuses unknown ones.
    """
    stabilised = all(entry.scale.mode == "sqrt_rank" for entry in entries)
    ranks = {entry.path: entry.scale.rank for entry in entries}
    alphas = {entry.path: _alpha(entry, stabilised=stabilised) for entry in entries}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": _tidy(alpha),
        "rank_pattern": {_anchored(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {_anchored(path): _tidy(value) for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(_either_generation(path) for path in ranks),
        "use_dora": any(entry.magnitude is not None for entry in entries),
        "lora_bias": any(entry.bias is not None for entry in entries),
    }
    if stabilised:
        config["use_rslora"] = True
    return config


def _alpha(entry: Entry, *, stabilised: bool) -> float:
    if stabilised and entry.scale.alpha is not None:
        return entry.scale.alpha
    return entry.scale.value * entry.scale.rank


def _either_generation(path: str) -> str:
    """transformers 5.6 and later has no `text_model.` level in CLIPTextModel, earlier ones do; PEFT matches the end of
    a path, so the part below that level finds the module in both."""
    return path.removeprefix("text_model.")


def _anchored(path: str) -> str:
    escaped = re.escape(_either_generation(path))
    return escaped if path.startswith("text_model.") else "^" + escaped


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _tidy(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
