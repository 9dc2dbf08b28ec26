"""MindONE's examples and its port of diffusers (dialects.md §5.10, stacks/mindspore.md §4).

Four spellings: `stable_diffusion_v2` (`….lora_down.weight`, scale 1), `stable_diffusion_xl` (`….lora_A.weight`, alpha
defaults to the rank), the kohya port (`lora_unet.<dotted>`), and mindone.diffusers, which writes what diffusers does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.slots import Slots
from persona.core.host.contracts import State
from persona.formats.dialects import diffusers_legacy, kohya, mindpet
from persona.formats.dialects.diffusers_peft import scales
from persona.formats.dialects.metadata import carried
from persona.formats.dialects.original_places import OriginalNames, original_places
from persona.formats.dialects.places import diffusers_path
from persona.formats.dialects.spelling import in_modules_shape
from persona.formats.dialects.table import Place, TableDialect, anywhere

_WRAPPED = re.compile(r"\.linear$")


def is_mindspore(state: State, siblings: Sequence[str]) -> bool:
    """A MindSpore checkpoint, or a safetensors file that MindSpore or mindone wrote (`format` ms or np)."""
    return state.container == "mindspore" or state.metadata.get("format") in ("ms", "np")


def sdv2_places(modules: Collection[str]) -> Callable[[str], Place | None]:
    """LDM's names; inside a full checkpoint the base weight moved to `.linear`, and some keys follow it."""
    behind, bare = original_places(modules), OriginalNames.of(modules)

    def place(module: str) -> Place | None:
        module = _WRAPPED.sub("", module)
        return behind(module) or bare.denoiser(module)

    return place


def kohya_port_place(module: str) -> Place | None:
    """`lora_unet.<diffusers' dotted path>`, `lora_te.<path>`."""
    for prefix, component in (("lora_unet.", "unet"), *((f"{k[:-1]}.", v) for k, v in kohya.ENCODERS.items())):
        if module.startswith(prefix):
            name = module[len(prefix) :]
            return Place(component, diffusers_path(component, name), name)
    return None


def kohya_port_names(adapter: Adapter) -> Callable[[Entry], str]:
    """The same names going back."""
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    return lambda entry: f"{prefixes[entry.component]}.{entry.path}"


def port_names(adapter: Adapter) -> Callable[[Entry], str]:
    """diffusers' `component.path`."""
    return lambda entry: entry.name


def port_suffixes(entry: Entry) -> dict[str, str]:
    """`.lora.` on the denoiser, `.lora_linear_layer.` in a text encoder, as mindone's save_lora_weights writes them."""
    infix = ".lora_linear_layer" if entry.component.startswith("text_encoder") else ".lora"
    return {"down": f"{infix}.down.weight", "up": f"{infix}.up.weight"}


def port_header(adapter: Adapter) -> dict[str, str]:
    """The source's metadata; mindone marks its files `np`."""
    return {**{k: v for k, v in carried(adapter).items() if k != "lora_adapter_metadata"}, "format": "np"}


_ATTENTION_DENSE = Slots(
    convolution=False,
    linear_only=True,
    attention_only=True,
    components=frozenset({"unet"}),
    containers=("mindspore", "safetensors"),
)

SDV2 = TableDialect(
    name="mindone-sdv2",
    summary="MindONE stable_diffusion_v2 (MindSpore): original names, scale 1",
    slots=replace(_ATTENTION_DENSE, families=mindpet.FAMILIES),
    places=sdv2_places,
    names=mindpet.names,
    spellings=frozenset({"kohya"}),
    suffixes={"down": ".lora_down.weight", "up": ".lora_up.weight"},
    applies=is_mindspore,
    priority=70,
    families=mindpet.FAMILIES,
)

SDXL = TableDialect(
    name="mindone-sdxl",
    summary="MindONE stable_diffusion_xl (MindSpore): original names, PEFT letters, scale 1",
    slots=replace(_ATTENTION_DENSE, families=frozenset({"sdxl"})),
    places=sdv2_places,
    names=mindpet.names,
    spellings=frozenset({"peft"}),
    suffixes={"down": ".lora_A.weight", "up": ".lora_B.weight"},
    applies=is_mindspore,
    priority=70,
    families=frozenset({"sdxl"}),
)

KOHYA_PORT = TableDialect(
    name="mindone-kohya",
    summary="MindONE's kohya port (MindSpore): dotted diffusers names, alpha beside each module",
    slots=Slots(
        alpha="module",
        tucker=True,
        components=frozenset({"unet", "text_encoder", "text_encoder_2"}),
        containers=("mindspore", "safetensors"),
    ),
    places=anywhere(kohya_port_place),
    names=kohya_port_names,
    spellings=kohya.SPELLINGS,
    suffixes_of=kohya.suffixes_of,
    priority=80,
)

DIFFUSERS = TableDialect(
    name="mindone",
    summary="mindone.diffusers (MindSpore): diffusers names; alpha folded, because 0.3 ignores the header",
    slots=Slots(containers=("safetensors", "mindspore")),
    places=anywhere(diffusers_legacy.place),
    names=port_names,
    spellings=diffusers_legacy.SPELLINGS | {"peft"},
    suffixes_of=port_suffixes,
    applies=is_mindspore,
    scales=scales,
    header=port_header,
    shaped=in_modules_shape,
    priority=65,
)
