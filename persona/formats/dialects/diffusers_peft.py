"""diffusers' own dialect: `unet.<path>.lora_A.weight`, alpha in the header (dialects.md §5.1).

Source: huggingface/diffusers loaders/lora_base.py, huggingface/peft utils/save_and_load.py. The trainer writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from persona.core.adapters.entry import Adapter
from persona.core.adapters.slots import Slots
from persona.core.host.contracts import State, Told
from persona.core.host.errors import UnreadableFile
from persona.formats.dialects.entries import StoredScale
from persona.formats.dialects.lora_config import alpha_from, config_of, fields_of
from persona.formats.dialects.metadata import carried
from persona.formats.dialects.places import COMPONENTS, prefixed, unprefixed
from persona.formats.dialects.spelling import in_modules_shape
from persona.formats.dialects.table import Place, TableDialect, anywhere

HEADER = "lora_adapter_metadata"
SUFFIXES = {
    "down": ".lora_A.weight",
    "up": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}


def place(module: str) -> Place | None:
    """`unet.<path>`; a path without a component is told by its first word."""
    return prefixed(module) or unprefixed(module)


def scales(state: State, told: Told) -> StoredScale:
    """Alpha from `lora_adapter_metadata`, or from the same fields directly in the header (SimpleTuner)."""
    fields = header_fields(state.metadata)
    bare = {key: value for key, value in fields.items() if "." not in key}
    of_component: dict[str, dict[str, Any]] = {}

    def scale(component: str, module: str, rank: int) -> tuple[float, str, str] | None:
        if component not in of_component:
            of_component[component] = fields_of(component, fields) or bare
        own = of_component[component]
        found = alpha_from(own, module) if own else None
        return (*found, "header") if found else None

    return scale


def header_fields(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The flattened `component.field` values of a header. Raises UnreadableFile when the JSON is broken."""
    fields: dict[str, Any] = {}
    for key, value in metadata.items():
        component, _, name = key.partition(".")
        if component in COMPONENTS and name in ("lora_alpha", "r", "use_rslora"):
            fields[key] = _number(value)
    if HEADER in metadata:
        try:
            parsed = json.loads(metadata[HEADER])
        except (ValueError, RecursionError) as error:
            raise UnreadableFile(f"The header's {HEADER} is not JSON: {error}.") from None
        if not isinstance(parsed, dict):
            raise UnreadableFile(f"The header's {HEADER} is not a JSON object.")
        fields.update(parsed)
    return fields


def _number(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text


def header(adapter: Adapter) -> dict[str, str]:
    """`lora_adapter_metadata` for every component, or for none when every reader gets the scale right without it."""
    entries = list(adapter.entries.values())
    kept = {key: value for key, value in carried(adapter).items() if key != HEADER}
    plain = all(entry.scale.value == 1.0 for entry in entries)
    uniform = len({entry.scale.rank for entry in entries}) <= 1
    if not entries or (plain and uniform and not any(entry.magnitude or entry.bias for entry in entries)):
        return {**kept, "format": "pt"}
    fields: dict[str, Any] = {}
    for component in dict.fromkeys(entry.component for entry in entries):
        config = config_of([entry for entry in entries if entry.component == component])
        fields.update({f"{component}.{key}": value for key, value in config.items()})
    return {**kept, "format": "pt", HEADER: json.dumps(fields, indent=2, sort_keys=True)}


DIALECT = TableDialect(
    name="diffusers",
    summary="diffusers and PEFT names, alpha in the safetensors header",
    slots=Slots(
        alpha="header",
        magnitude=frozenset({"out"}),
        magnitude_on_all=True,
        bias=True,
        containers=("safetensors", "torch"),
    ),
    places=anywhere(place),
    names=lambda adapter: lambda entry: entry.name,
    spellings=frozenset({"peft"}),
    suffixes=SUFFIXES,
    scales=scales,
    header=header,
    shaped=in_modules_shape,
    priority=50,
)
