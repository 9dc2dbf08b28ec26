"""ppdiffusers (Paddle): diffusers' names before PEFT with linear factors transposed, alpha folded because its loader
has no slot (dialects.md §5.9, stacks/paddle.md §4.9).

Files lie about their layout, so it is read off the shapes (layout.py); this dialect is chosen when they, the header or
the container say Paddle. PEFT keys are read too; its default backend cannot read them, so they are not written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from persona.core.adapters.entry import Adapter
from persona.core.adapters.slots import Slots
from persona.core.host.contracts import State
from persona.core.host.errors import UnreadableFile
from persona.formats.dialects import diffusers_legacy
from persona.formats.dialects.grammar import group
from persona.formats.dialects.layout import decide_layout
from persona.formats.dialects.metadata import carried
from persona.formats.dialects.table import Place, TableDialect, anywhere

_OLD_LAYER = re.compile(r"\btext_model\.(?:transformer|encoder)\.layers\.(\d+)\.(linear1|linear2|self_attn\.\w+)$")
_OLD_NAMES = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}


def place(module: str) -> Place | None:
    """As diffusers before PEFT; PaddleNLP's older CLIP names are read (dialects.md §2.3)."""
    match = _OLD_LAYER.search(module)
    if match:
        inside = _OLD_NAMES.get(match[2], match[2])
        module = f"{module[: match.start()]}text_model.encoder.layers.{match[1]}.{inside}"
    return diffusers_legacy.place(module)


def applies(state: State, siblings: Sequence[str]) -> bool:
    """The container, the header or the shapes say Paddle."""
    if state.container == "paddle" or state.metadata.get("format") == "pd":
        return True
    try:
        return decide_layout(group(state.tensors).groups.values(), state).paddle
    except UnreadableFile:
        return False


def header(adapter: Adapter) -> dict[str, str]:
    """The source's metadata, in Paddle layout."""
    return {**{k: v for k, v in carried(adapter).items() if k != "lora_adapter_metadata"}, "format": "pd"}


DIALECT = TableDialect(
    name="ppdiffusers",
    summary="ppdiffusers (Paddle): transposed linear factors, no alpha",
    slots=Slots(layout="paddle", containers=("paddle", "safetensors")),
    places=anywhere(place),
    names=diffusers_legacy.names,
    spellings=diffusers_legacy.SPELLINGS | {"peft", "kohya"},
    suffixes_of=diffusers_legacy.suffixes_of,
    applies=applies,
    header=header,
    priority=60,
)
