"""Which families an adapter can belong to: a set, decided by names and shapes, never by metadata alone
(dialects.md §1.5).

Three strengths, the first that leaves anything wins: names and widths are those of the family; the names are, the model
is narrower or wider; every name has the form of one of the family's (another number of blocks, as in `mini`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from persona.core.adapters.entry import Entry
from persona.core.adapters.family import Component, Family, inventory
from persona.core.adapters.fusion import is_fused, members

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class Verdict:
    """The families that are left, and how that was decided."""

    families: frozenset[str]
    reasons: tuple[str, ...]


@lru_cache(maxsize=16384)
def form(path: str) -> str:
    """A path with its indices blanked: `down_blocks.#.attentions.#.proj_in`."""
    return _INDEX.sub("#", path)


@lru_cache(maxsize=64)
def forms(component: Component) -> dict[str, tuple[int, ...]]:
    """Every form of a component's paths, with the kernel of its convolution (() for everything else)."""
    return {form(module.path): module.kernel for module in component.modules()}


def is_known(component: str, path: str, families: Mapping[str, Family]) -> bool:
    """Whether some family has a module of this form in this component."""
    wanted = [form(part) for part in members(path)]
    return any(
        all(part in forms(config) for part in wanted)
        for family in families.values()
        for config in family.components.get(component, ())
    )


def weight_shape(entry: Entry) -> tuple[int, int] | None:
    """(out, in·kh·kw) of the weight an entry belongs to, as its factors say, or None when they do not."""
    if "down" in entry.factors and "up" in entry.factors:
        down, up, middle = entry.factors["down"].shape, entry.factors["up"].shape, entry.factors.get("mid")
        return up[0], down[1] * math.prod(middle.shape[2:] if middle is not None else down[2:])
    shape = {name: ref.shape for name, ref in entry.factors.items()}
    if "w1_a" in shape and "w2_a" in shape and entry.algorithm == "loha":
        if "t1" in shape:
            return shape["w1_a"][1], shape["w1_b"][1] * math.prod(shape["t1"][2:])
        return shape["w1_a"][0], math.prod(shape["w1_b"][1:])
    if entry.algorithm == "lokr":
        return _lokr_shape(shape)
    if "diff" in shape:
        return shape["diff"][0], math.prod(shape["diff"][1:])
    return None


def _lokr_shape(shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    first = shape.get("w1") or (shape["w1_a"][0], shape["w1_b"][1])
    if "w2" in shape:
        second = shape["w2"]
    elif "t2" in shape:
        second = (shape["w2_a"][1], shape["w2_b"][1], *shape["t2"][2:])
    else:
        second = (shape["w2_a"][0], *shape["w2_b"][1:])
    return first[0] * second[0], first[1] * math.prod(second[1:])


def decide(entries: Iterable[Entry], families: Mapping[str, Family]) -> Verdict:
    """The families that can explain `entries`, with reasons. An empty set when none can."""
    listed = list(entries)
    if not listed:
        return Verdict(frozenset(), ("there are no modules to judge by",))
    shapes = {(e.component, e.path): (weight_shape(e), members(e.path)) for e in listed}
    named = {name for name, family in families.items() if _explains(family, shapes, widths=False)}
    exact = {name for name in named if _explains(families[name], shapes, widths=True)}
    if exact:
        return Verdict(frozenset(exact), ("module names and widths",))
    if named:
        return Verdict(frozenset(named), ("module names; the widths are another model's of the same topology",))
    kin = {name for name, family in families.items() if _is_kin(family, listed)}
    return Verdict(frozenset(kin), ("the form of the module names; the number of blocks is another model's",))


Shapes = Mapping[tuple[str, str], tuple[tuple[int, int] | None, tuple[str, ...]]]


def _explains(family: Family, shapes: Shapes, *, widths: bool) -> bool:
    for component in {component for component, _ in shapes}:
        mine = [value for key, value in shapes.items() if key[0] == component]
        configs = family.components.get(component, ())
        if not any(_component_explains(config, mine, widths=widths) for config in configs):
            return False
    return True


def _component_explains(
    config: Component, mine: Iterable[tuple[tuple[int, int] | None, tuple[str, ...]]], *, widths: bool
) -> bool:
    modules = inventory(config)
    for shape, paths in mine:
        for path in paths:
            if path not in modules:
                return False
        if widths and shape is not None:
            weights = [modules[path].shape for path in paths]
            out = sum(weight[0] for weight in weights)
            if (out, math.prod(weights[0][1:])) != shape:
                return False
    return True


def _is_kin(family: Family, entries: Iterable[Entry]) -> bool:
    """Same forms everywhere, and no deeper: a UNet whose transformers all have one block is not SDXL's kin."""
    listed = list(entries)
    deep = any(".transformer_blocks.1." in e.path for e in listed if e.component == "unet")
    unet = any(e.component == "unet" for e in listed)
    if unet and family.denoiser == "unet":
        depths = {getattr(config, "mid_depth", 1) for config in family.components["unet"]}
        if deep != (max(depths) > 1):
            return False
    return all(
        any(
            all(form(path) in forms(config) for path in members(e.path))
            for config in family.components.get(e.component, ())
        )
        for e in listed
    )


def kernel_of(entry: Entry, families: Iterable[Family]) -> tuple[int, ...] | None:
    """The kernel of the module an entry belongs to: from its own factors, else from the first family that has a module
    of that form; None when nobody knows."""
    for name in ("mid", "t1", "t2"):
        if name in entry.factors:
            return entry.factors[name].shape[2:]
    for name in ("down", "diff", "w2", "w2_b", "w1_b"):
        if name in entry.factors and len(entry.factors[name].shape) == 4:
            return entry.factors[name].shape[2:]
    if is_fused(entry.path):
        return ()
    for family in families:
        for config in family.components.get(entry.component, ()):
            kernel = forms(config).get(form(entry.path))
            if kernel is not None:
                return kernel
    return None


def module_kernels(families: Iterable[Family]) -> Callable[[Entry], tuple[int, ...] | None]:
    """The kernel of the module itself, whatever an entry's factors show: what all families have that know a module of
    that form, () for a linear layer, None where they differ or know none."""
    listed, tables = list(families), dict[str, list[dict[str, tuple[int, ...]]]]()

    def kernel(entry: Entry) -> tuple[int, ...] | None:
        component, wanted = entry.component, form(entry.path)
        if component not in tables:
            tables[component] = [forms(config) for family in listed for config in family.components.get(component, ())]
        found = {table[wanted] for table in tables[component] if wanted in table}
        return found.pop() if len(found) == 1 else None

    return kernel
