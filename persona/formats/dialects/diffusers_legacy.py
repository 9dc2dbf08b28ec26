"""diffusers' spellings before PEFT: attention processors, `.lora.`, and text encoders' `lora_linear_layer`
(dialects.md §5.2). Today's training scripts still write the last two.

Source: huggingface/diffusers 0.11-0.21 loaders.py; utils/state_dict_utils.py convert_state_dict_to_diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.slots import Slots
from persona.formats.dialects.diffusers_peft import scales
from persona.formats.dialects.metadata import carried
from persona.formats.dialects.places import prefixed, unprefixed
from persona.formats.dialects.table import Place, TableDialect, anywhere

PROJECTION = re.compile(r"^(.*\.attn[12]?)\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)$")
_REPEATED = re.compile(r"\.(?:q|k|v|out)_proj\.to_(q|k|v|out)$")
SPELLINGS = frozenset({"dotted", "linear layer", "processor"})


def place(module: str) -> Place | None:
    """`unet.<attention>.processor.to_q`, `<module>.lora`, `text_encoder.<projection>`; with or without the component.

    The era of diffusers#2918 wrote every projection's pair under each projection: `k_proj.to_q_lora` is q's.
    """
    module = _REPEATED.sub(r".to_\1", module)
    return prefixed(module) or unprefixed(module)


def names(adapter: Adapter) -> Callable[[Entry], str]:
    """Attention projections under their processor, everything else under its own name."""

    def name_of(entry: Entry) -> str:
        match = PROJECTION.match(entry.path)
        if match and not entry.component.startswith("text_encoder"):
            return f"{entry.component}.{match[1]}.processor.{match[2].removesuffix('.0')}"
        return entry.name

    return name_of


def suffixes_of(entry: Entry) -> dict[str, str]:
    """`_lora.` on a processor, `.lora_linear_layer.` in a text encoder, `.lora.` elsewhere."""
    if entry.component.startswith("text_encoder"):
        infix = ".lora_linear_layer"
    else:
        infix = "_lora" if PROJECTION.match(entry.path) else ".lora"
    return {"down": f"{infix}.down.weight", "up": f"{infix}.up.weight"}


def header(adapter: Adapter) -> dict[str, str]:
    """The source's metadata, in torch layout."""
    return {**{k: v for k, v in carried(adapter).items() if k != "lora_adapter_metadata"}, "format": "pt"}


DIALECT = TableDialect(
    name="diffusers-legacy",
    summary="diffusers before PEFT: attention processors, no alpha",
    slots=Slots(containers=("safetensors", "torch")),
    places=anywhere(place),
    names=names,
    spellings=SPELLINGS,
    suffixes_of=suffixes_of,
    scales=scales,
    header=header,
    priority=45,
)
