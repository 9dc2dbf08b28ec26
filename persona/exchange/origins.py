"""What a file's text says about who made it, for which base, and by which words it is called (dialects.md §7).
Metadata can lie: this is shown, nothing is decided by it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SIGNS: tuple[tuple[str, str], ...] = (
    ("ot_branch", "OneTrainer"),
    ("ot_revision", "OneTrainer"),
    ("ss_network_module", "kohya sd-scripts"),
    ("ss_sd_scripts_commit_hash", "kohya sd-scripts"),
    ("training_info", "ai-toolkit"),
    ("persona.version", "persona"),
    ("simpletuner_version", "SimpleTuner"),
)
"""A key and the trainer that writes it."""


def trainer(metadata: Mapping[str, str]) -> str:
    """The trainer named by the metadata, "" when none is."""
    software = metadata.get("software", "")
    if software:
        try:
            parsed = json.loads(software)
        except (ValueError, RecursionError):
            return plain(software, 80)
        if isinstance(parsed, dict) and parsed.get("name"):
            return plain(f"{parsed['name']} {parsed.get('version', '')}".strip(), 80)
    module = metadata.get("ss_network_module", "")
    if module.startswith("lycoris"):
        return "kohya sd-scripts with LyCORIS"
    return next((name for key, name in SIGNS if key in metadata), "")


def base_named(metadata: Mapping[str, str]) -> str:
    """The base model named by the metadata, "" when none is."""
    keys = ("persona.base", "ss_sd_model_name", "ss_base_model_version", "modelspec.architecture", "sd_checkpoint_name")
    named = [plain(metadata[key], 80) for key in keys if metadata.get(key) not in (None, "", "None")]
    return ", ".join(dict.fromkeys(named))


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Words to put into a prompt: stated ones, else the words that stand in more than half of kohya's captions."""
    for key in (
        "persona.trigger_words",
        "modelspec.trigger_phrase",
        "ss_output_trigger",
        "trigger_phrase",
        "instance_prompt",
    ):
        if metadata.get(key):
            return [plain(metadata[key], 200)]
    counts = _tags(metadata.get("ss_tag_frequency", ""))
    if not counts:
        return []
    most = max(counts.values())
    frequent = sorted((tag for tag, count in counts.items() if 2 * count > most), key=lambda tag: -counts[tag])
    return [plain(tag, 60) for tag in frequent[:8]]


def _tags(text: str) -> dict[str, int]:
    """ss_tag_frequency is {folder: {tag: count}}."""
    try:
        parsed: Any = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    counts: dict[str, int] = {}
    for tags in parsed.values() if isinstance(parsed, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if type(count) is int:
                counts[tag.strip()] = counts.get(tag.strip(), 0) + count
    return counts


def plain(text: str, longest: int = 200) -> str:
    """Text from a file, safe to print: control characters (terminal escapes) out, one line, not too long."""
    clean = "".join(letter if letter.isprintable() else " " for letter in str(text))
    clean = " ".join(clean.split())
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"
