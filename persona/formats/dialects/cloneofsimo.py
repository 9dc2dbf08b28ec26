"""cloneofsimo/lora: a list of pairs without names, up first, in the order of the model's modules (read only, SD1).

The order is not assumed: each of the orders its versions had is laid beside the shapes, and the one that fits is taken
(dialects.md §5.8). Source: cloneofsimo/lora lora_diffusion/lora.py (save_lora_weight, save_safeloras).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from persona.core.adapters.entry import Adapter, Entry, Leftover, Scale, Source
from persona.core.adapters.evidence import decide
from persona.core.adapters.family import Module
from persona.core.adapters.slots import Slots
from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import Evidence, Output, State, Told
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.dialects.family_choice import settle_family
from persona.formats.models import sd1
from persona.formats.models.families import FAMILIES

_LISTED = re.compile(r"^(?:(unet|text_encoder):)?(\d+)(?::(up|down))?$")
_ATTENTION = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))
_ENCODER = (("k_proj", "v_proj", "q_proj", "out_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"))
_BLOCKS = (("down_blocks", "up_blocks", "mid_block"), ("down_blocks", "mid_block", "up_blocks"))


@dataclass(frozen=True)
class Pair:
    """The two factors at one place of the list, with their keys."""

    up: TensorRef
    down: TensorRef
    keys: tuple[str, str]


class CloneOfSimo:
    """Lists in a torch pickle (`0`, `1`, …: up and down in turn) and safeloras (`unet:0:up`)."""

    name, summary, priority = "cloneofsimo", "cloneofsimo/lora: unnamed pairs in module order (read only)", 10
    slots = Slots(containers=("torch", "safetensors"))

    def detect(self, state: State, siblings: Sequence[str]) -> Evidence:
        """Every key is a number, or a model's name with a number and up or down."""
        keys = [key for key in state.tensors if state.metadata.get(key) != "<embed>"]
        listed = [key for key in keys if _LISTED.match(key)]
        if len(listed) < 2 or len(listed) < len(keys) or len(listed) % 2:
            return Evidence(0.0)
        return Evidence(1.0, (f"{len(listed) // 2} unnamed pairs, numbered",))

    def joined(self, adapter: Adapter) -> Callable[[Entry], str | None]:
        """Nothing is joined."""
        return lambda entry: None

    def read(self, state: State, told: Told) -> Adapter:
        """See Dialect.read. Raises UnreadableFile when no order of modules fits the shapes."""
        adapter = Adapter(None, {}, metadata=dict(state.metadata), source=Source(told.path, state.container, self.name))
        for model, pairs in _pairs(state).items():
            component, paths = _fitting_order(model, pairs)
            for path, pair in zip(paths, pairs, strict=True):
                rank = pair.down.shape[0]
                scale = Scale(None, rank) if told.alpha is None else Scale(told.alpha, rank, "rank", "told")
                entry = Entry(
                    component, path, "lora", {"down": pair.down, "up": pair.up}, scale,
                    origin={"up": pair.keys[0], "down": pair.keys[1]}, kernel=pair.down.shape[2:],
                )  # fmt: skip
                adapter.entries[(component, path)] = entry
        adapter.leftovers = [
            Leftover(key, ref.shape, str(ref.dtype), "not a factor") for key, ref in state.tensors.items()
            if not _LISTED.match(key)
        ]  # fmt: skip
        families = decide(adapter.entries.values(), FAMILIES).families
        adapter.families, adapter.family = settle_family(families, told, adapter)
        adapter.notes.append("modules carry no names; their order was matched with the shapes (scale 1 is folded in)")
        return adapter

    def write(self, adapter: Adapter) -> Sequence[Output]:
        """Not written."""
        raise ConversionError("persona reads cloneofsimo's lists and does not write them.", hint="--to kohya")


def _pairs(state: State) -> dict[str, list[Pair]]:
    """Model name ("" when the file does not say) -> its pairs, in order."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for key in state.tensors:
        match = _LISTED.match(key)
        if match is None:
            continue
        number, kind = int(match[2]), match[3]
        if kind is None:
            number, kind = number // 2, "down" if number % 2 else "up"
        found.setdefault(match[1] or "", {}).setdefault(number, {})[kind] = key
    result: dict[str, list[Pair]] = {}
    for model, numbered in found.items():
        for number in sorted(numbered):
            keys = numbered[number]
            if set(keys) != {"up", "down"}:
                raise UnreadableFile(f"Pair {number} of {model or 'the list'} is not complete.")
            pair = Pair(state.tensors[keys["up"]], state.tensors[keys["down"]], (keys["up"], keys["down"]))
            result.setdefault(model, []).append(pair)
    return result


def _fitting_order(model: str, pairs: Sequence[Pair]) -> tuple[str, list[str]]:
    for component, modules in _orders():
        if model in ("", component) and _fits(modules, pairs):
            return component, [module.path for module in modules]
    raise UnreadableFile(
        f"{len(pairs)} unnamed pairs fit no order of Stable Diffusion 1's modules.",
        hint="Only cloneofsimo's files for SD 1 can be read; convert it in the tool that made it.",
    )


def _fits(modules: Sequence[Module], pairs: Sequence[Pair]) -> bool:
    return len(modules) == len(pairs) and all(
        (pair.up.shape[0], *pair.down.shape[1:]) == module.shape
        or (pair.up.shape[0], pair.down.shape[1]) == module.shape
        for module, pair in zip(modules, pairs, strict=True)
    )


def _orders() -> Iterator[tuple[str, list[Module]]]:
    unet = {module.path: module for module in sd1.UNET.modules()}
    for blocks in _BLOCKS:
        for inside in _ATTENTION:
            for with_resnets in (False, True):
                yield "unet", list(_unet_order(unet, blocks, inside, with_resnets=with_resnets))
    encoder = {module.path: module for module in FAMILIES["sd1"].components["text_encoder"][0].modules()}
    for projections in _ENCODER:
        layers = [f"text_model.encoder.layers.{n}.self_attn.{name}" for n in range(12) for name in projections]
        yield "text_encoder", [encoder[path] for path in layers]


def _unet_order(
    unet: Mapping[str, Module], blocks: Sequence[str], inside: Sequence[str], *, with_resnets: bool
) -> Iterator[Module]:
    """Attentions' projections and GEGLU's, block list by block list; the extended form adds the resnets'."""
    for block in blocks:
        for path in [path for path in unet if path.startswith(block)]:
            if path.endswith(".attn1.to_q"):
                head = path.removesuffix(".attn1.to_q")
                for part in inside:
                    names = ("to_q", "to_k", "to_v", "to_out.0") if part.startswith("attn") else ("net.0.proj",)
                    yield from (unet[f"{head}.{part}.{name}"] for name in names)
            elif with_resnets and path.endswith((".conv1", ".conv2", ".conv_shortcut")):
                yield unet[path]


DIALECT = CloneOfSimo()
