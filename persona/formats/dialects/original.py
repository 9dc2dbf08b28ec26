"""The original's names without any prefix (OneTrainer's ORIGINAL_LORA, bare LDM and Flux files; dialects.md §5.7)."""

from __future__ import annotations

from collections.abc import Callable, Collection

from persona.core.adapters.slots import LYCORIS, Slots
from persona.formats.dialects import comfy, kohya
from persona.formats.dialects.original_places import OriginalNames, joined_paths, original_denoiser_names
from persona.formats.dialects.table import Place, TableDialect


def places(modules: Collection[str]) -> Callable[[str], Place | None]:
    """`input_blocks…`, `double_blocks…`, `joint_blocks…` at the beginning of the key."""
    return OriginalNames.of(modules).denoiser


DIALECT = TableDialect(
    name="original",
    summary="the original code's names without a prefix (denoiser only)",
    slots=Slots(
        algorithms=LYCORIS - {"ia3"},
        alpha="module",
        magnitude=frozenset({"out", "in"}),
        tucker=True,
        fused=True,
        components=frozenset({"unet", "transformer"}),
        containers=("safetensors",),
    ),
    places=places,
    names=original_denoiser_names,
    spellings=kohya.SPELLINGS | {"peft", "peft module"},
    suffixes_of=comfy.suffixes_of,
    header=comfy.header,
    original=True,
    joined=joined_paths,
    priority=20,
)
