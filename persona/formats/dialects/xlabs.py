"""XLabs' Flux LoRAs: `double_blocks.N.processor.qkv_lora1.down.weight` (dialects.md §5.12; read only).

1 is the picture's stream, 2 the text's; on a single block `qkv_lora` covers the rows of q, k, v and not the MLP's.
"""

from __future__ import annotations

import re

from persona.core.adapters.slots import Slots
from persona.formats.dialects.original_places import without_prefix
from persona.formats.dialects.table import Place, TableDialect, anywhere

_KEY = re.compile(r"^(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_?(1|2)?$")
_KEY_NUMBERED = re.compile(r"^(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora(1|2)$")
INSIDE = {
    ("double", "qkv", "1"): "transformer_blocks.{}.attn.[to_q,to_k,to_v]",
    ("double", "qkv", "2"): "transformer_blocks.{}.attn.[add_q_proj,add_k_proj,add_v_proj]",
    ("double", "proj", "1"): "transformer_blocks.{}.attn.to_out.0",
    ("double", "proj", "2"): "transformer_blocks.{}.attn.to_add_out",
    ("single", "qkv", None): "single_transformer_blocks.{}.attn.[to_q,to_k,to_v]",
    ("single", "proj", None): "single_transformer_blocks.{}.proj_out",
}


def place(module: str) -> Place | None:
    """Processor names, perhaps behind `diffusion_model.`"""
    name = without_prefix(module)
    match = _KEY_NUMBERED.match(name) or _KEY.match(name)
    path = INSIDE.get((match[1], match[3], match[4])) if match else None
    return Place("transformer", path.format(match[2]), name, True, frozenset({"flux1"})) if match and path else None


DIALECT = TableDialect(
    name="xlabs",
    summary="XLabs' Flux attention processors (read only)",
    slots=Slots(components=frozenset({"transformer"})),
    places=anywhere(place),
    spellings=frozenset({"processor", "numbered processor"}),
    priority=85,
)
