"""The planner: what has to happen to an adapter so that a target can hold it (dialects.md §8).

The slots of dialect and container decide, module by module. Every step says what it costs: exact, one rounding,
approximate, needs the base model, or refused. Nothing is done until the planned adapter is written: the new factors are
calculated when they are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from persona.core.adapters import expansion, svd
from persona.core.adapters.delta import called, delta, needs_base
from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.folding import folded, folds_exactly
from persona.core.adapters.fusion import is_fused
from persona.core.adapters.reshaping import squeezed
from persona.core.adapters.slots import Slots
from persona.core.adapters.splitting import join, split
from persona.core.host.errors import ConversionError, NoPlace

Cost = Literal["exact", "one rounding", "approximate", "needs base", "refused"]
ORDER: tuple[Cost, ...] = ("exact", "one rounding", "approximate", "needs base", "refused")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Step:
    """One thing done to one module: what, at what cost, and a word about it."""

    module: str
    action: str
    cost: Cost
    detail: str = ""


@dataclass(frozen=True)
class Wishes:
    """What the user allows and asks for: `rank` truncates what would grow (approximate); `base` gives base weights by
    `component.path`; `drop` leaves out what the target cannot hold, and says so."""

    rank: int | None = None
    energy: float | None = None
    base: Mapping[str, Any] | None = None
    drop: bool = False


@dataclass
class Plan:
    """The adapter as the target can hold it, and how it came to that."""

    adapter: Adapter
    target: str
    steps: list[Step] = field(default_factory=list)

    @property
    def refusals(self) -> list[Step]:
        """The steps that stand in the way."""
        return [step for step in self.steps if step.cost in ("refused", "needs base")]

    @property
    def cost(self) -> Cost:
        """The worst cost of all steps."""
        return max((step.cost for step in self.steps), key=ORDER.index, default="exact")

    def summary(self) -> list[tuple[str, Cost, int, str]]:
        """(action, cost, modules, an example's detail), in the order of first appearance."""
        counted = Counter((step.action, step.cost) for step in self.steps)
        example = {(step.action, step.cost): step.detail for step in reversed(self.steps)}
        return [(action, cost, number, example[action, cost]) for (action, cost), number in counted.items()]

    def demand(self) -> None:
        """Raise ConversionError when a step stands in the way."""
        if not self.refusals:
            return
        first = self.refusals[0]
        more = f" ({len(self.refusals)} modules in all)" if len(self.refusals) > 1 else ""
        hint = "--base MODEL" if first.cost == "needs base" else "--drop leaves such modules out and lists them."
        raise ConversionError(f"{self.target} cannot hold {first.module}: {first.detail}{more}.", hint=hint)


class Refused(Exception):
    """A module that the target cannot hold."""

    def __init__(self, detail: str, cost: Cost = "refused") -> None:
        super().__init__(detail)
        self.detail, self.cost = detail, cost


def plan(
    adapter: Adapter,
    slots: Slots,
    target: str,
    *,
    wishes: Wishes | None = None,
    fused_path: Callable[[Entry], str | None] = lambda entry: None,
    spell: Callable[[Entry], object] = lambda entry: None,
    apart: Callable[[Sequence[Entry]], str | None] = lambda entries: None,
) -> Plan:
    """Plan a conversion. `fused_path` names the joined module that a module is part of in the target, if any; `spell`
    raises NoPlace for a module as the slots can hold it which the target still has no name for. `apart` tells why the
    modules of one component cannot all stay in the algorithms they have; they become LoRA then.
    """
    wishes = wishes or Wishes()
    made = Plan(replace(adapter, entries={}), target)
    entries = _regrouped(adapter.entries.values(), slots, fused_path, made)
    narrowed = _shared_algorithms(entries, slots, apart)
    for entry in entries:
        before = len(made.steps)
        mine, why = narrowed[entry.component]
        try:
            fitted = _fitted(entry, adapter, slots, mine, wishes, made.steps)
            spell(fitted)
        except (Refused, NoPlace) as problem:
            refused = problem if isinstance(problem, Refused) else Refused(problem.reason)
            del made.steps[before:]
            action, cost = ("drop", "approximate") if wishes.drop else ("refuse", refused.cost)
            made.steps.append(Step(entry.name, action, cost, refused.detail))  # type: ignore[arg-type]
            continue
        if why is not None and entry.algorithm != "lora":
            made.steps[before:] = [replace(one, detail=f"{one.detail}: {why}") for one in made.steps[before:]]
        made.adapter.entries[(fitted.component, fitted.path)] = fitted
    if slots.magnitude_on_all:
        _magnitudes_on_all(made, wishes)
    for embedding in adapter.embeddings:
        if slots.embeddings == "beside":
            made.steps.append(Step(embedding.token, "write beside", "exact", "a file of its own"))
    return made


def _magnitudes_on_all(made: Plan, wishes: Wishes) -> None:
    """Plain modules beside DoRA's get the vector that changes nothing, ‖W + ΔW‖, for which the base's weight is needed:
    without one, readers take ‖W‖ and change the module's strength."""
    decomposed = {component for (component, _), entry in made.adapter.entries.items() if entry.magnitude is not None}
    for key, entry in list(made.adapter.entries.items()):
        if entry.magnitude is not None or entry.component not in decomposed:
            continue
        base = wishes.base.get(entry.name) if wishes.base is not None else None
        if base is not None:
            made.adapter.entries[key] = expansion.with_neutral_magnitude(entry, base)
            made.steps.append(Step(entry.name, "decompose", "one rounding", "a DoRA vector that changes nothing"))
            continue
        del made.adapter.entries[key]
        made.steps[:] = [step for step in made.steps if step.module != entry.name]
        action: str = "drop" if wishes.drop else "refuse"
        cost: Cost = "approximate" if wishes.drop else "needs base"
        detail = "it has no DoRA and its neighbours have: a vector that changes nothing needs the base model's weight"
        made.steps.append(Step(entry.name, action, cost, detail))


def _fitted(entry: Entry, adapter: Adapter, slots: Slots, narrowed: Slots, wishes: Wishes, steps: list[Step]) -> Entry:
    """`fit`, with every reason against it a Refused."""
    try:
        _check_family(adapter, slots)
        return fit(entry, narrowed, wishes, steps)
    except ConversionError as problem:
        raise Refused(str(problem)) from problem


def fit(entry: Entry, slots: Slots, wishes: Wishes, steps: list[Step]) -> Entry:
    """One module as the slots can hold it; its steps are added to `steps`. Raises Refused."""
    before = len(steps)
    _check_home(entry, slots)
    entry = _fit_algorithm(entry, slots, wishes, steps)
    entry = _fit_shape(entry, slots, steps)
    entry = _fit_bias(entry, slots)
    entry = _fit_scale(entry, slots, steps)
    if slots.layout == "paddle" and len(entry.factors.get("down", entry.factors[next(iter(entry.factors))]).shape) == 2:
        steps.append(Step(entry.name, "transpose", "exact", "Paddle keeps linear factors [in, rank] and [rank, out]"))
    if len(steps) == before:
        steps.append(Step(entry.name, "rename", "exact"))
    return entry


def _shared_algorithms(
    entries: Iterable[Entry], slots: Slots, apart: Callable[[Sequence[Entry]], str | None]
) -> dict[str, tuple[Slots, str | None]]:
    """The slots for each component: LoRA alone where its modules cannot all stay as they are, and why."""
    listed = list(entries)
    result = {}
    for component in dict.fromkeys(entry.component for entry in listed):
        why = apart([entry for entry in listed if entry.component == component])
        result[component] = (slots if why is None else replace(slots, algorithms=frozenset({"lora"})), why)
    return result


def _check_family(adapter: Adapter, slots: Slots) -> None:
    families = {adapter.family} if adapter.family else set(adapter.families)
    if slots.families is not None and families and not families & slots.families:
        held, given = "/".join(sorted(slots.families)), "/".join(sorted(map(str, families)))
        raise Refused(f"it holds {held} adapters, and this is one of {given}")


def _check_home(entry: Entry, slots: Slots) -> None:
    if slots.components is not None and entry.component not in slots.components:
        raise Refused(f"it has no place for {entry.component}")
    if slots.attention_only and not entry.path.endswith(ATTENTION):
        raise Refused("it holds attention projections alone")


def _fit_algorithm(entry: Entry, slots: Slots, wishes: Wishes, steps: list[Step]) -> Entry:
    if "scalar" in entry.factors and not slots.tucker:
        steps.append(Step(entry.name, "fold", "one rounding", "LyCORIS' scalar goes into alpha"))
        entry = expansion.without_scalar(entry)
    axis_fits = entry.magnitude is None or entry.magnitude.axis in slots.magnitude
    if entry.algorithm in slots.algorithms and axis_fits:
        if "mid" in entry.factors and not slots.tucker:
            steps.append(Step(entry.name, "expand", "exact", "the middle factor is multiplied into down"))
            return expansion.without_middle(entry)
        if entry.algorithm == "ia3" and ("ia3_l" in entry.factors) != (slots.ia3 == "peft"):
            steps.append(Step(entry.name, "offset", "one rounding", "PEFT multiplies by 1 plus what LyCORIS keeps"))
        return _truncated_if_asked(entry, wishes, steps)
    what = f"DoRA along the {entry.magnitude.axis}put" if entry.magnitude is not None else called(entry)
    if entry.algorithm in ("oft", "boft", "opaque", "norm") or "lora" not in slots.algorithms:
        raise Refused(f"it has no place for {what}")
    base = wishes.base.get(entry.name) if wishes.base is not None else None
    if needs_base(entry) and base is None:
        raise Refused(f"{what} can only be rewritten with the base model's weight", "needs base")
    if wishes.rank is not None or wishes.energy is not None:
        reduced = svd.from_difference(entry, delta(entry, base), wishes.rank, energy=wishes.energy)
        steps.append(
            Step(
                entry.name, "svd", "approximate", f"{what} to rank {reduced.entry.scale.rank}, {reduced.kept:.4%} kept"
            )
        )
        return reduced.entry
    made = expansion.as_lora(entry, base)
    steps.append(Step(entry.name, "expand", "exact", f"{what} as LoRA of rank {made.scale.rank}"))
    return made


def _truncated_if_asked(entry: Entry, wishes: Wishes, steps: list[Step]) -> Entry:
    untouched = entry.algorithm != "lora" or not {"mid", "scalar"}.isdisjoint(entry.factors)
    if wishes.rank is None or untouched or entry.scale.rank <= wishes.rank:
        return entry
    if entry.magnitude is not None:
        raise Refused("the rank of a DoRA module cannot be reduced without the base model", "needs base")
    reduced = svd.truncate(entry, wishes.rank)
    steps.append(
        Step(entry.name, "svd", "approximate", f"rank {entry.scale.rank} to {wishes.rank}, {reduced.kept:.4%} kept")
    )
    return reduced.entry


def _fit_shape(entry: Entry, slots: Slots, steps: list[Step]) -> Entry:
    kernels = {ref.shape[2:] for ref in entry.factors.values() if len(ref.shape) == 4}
    if any(kernel != (1, 1) for kernel in kernels) and not slots.convolution:
        raise Refused("it has no place for convolutions")
    if kernels and slots.linear_only:
        steps.append(Step(entry.name, "reshape", "exact", "a 1x1 convolution as a linear layer"))
        return replace(entry, factors={name: squeezed(ref) for name, ref in entry.factors.items()})
    return entry


def _fit_bias(entry: Entry, slots: Slots) -> Entry:
    if entry.bias is not None and not slots.bias:
        raise Refused("it has no place for a trained bias")
    if "diff_b" in entry.factors and not {"full", "norm"} & slots.algorithms:
        raise Refused("it has no place for a difference of the bias")
    return entry


def _fit_scale(entry: Entry, slots: Slots, steps: list[Step]) -> Entry:
    whole = entry.algorithm == "lokr" and {"w1", "w2"} <= entry.factors.keys()
    whole_kronecker = whole and slots.alpha != "config"  # PEFT alone looks at alpha there (dialects.md §4.3)
    if entry.scale.mode == "none" or (slots.alpha != "none" and not whole_kronecker):
        return entry
    scale = entry.scale.value
    if scale == 1.0:
        return folded(entry)
    cost: Cost = "exact" if folds_exactly(scale) else "one rounding"
    steps.append(Step(entry.name, "fold", cost, f"alpha / rank = {scale:g} goes into the factors"))
    return folded(entry)


def _regrouped(
    entries: Iterable[Entry], slots: Slots, fused_path: Callable[[Entry], str | None], made: Plan
) -> list[Entry]:
    """Joined modules divided, or neighbours joined, as the target's names want it."""
    result: list[Entry] = []
    waiting: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if slots.fused is False and is_fused(entry.path):
            try:
                parts = split(entry)
            except ConversionError as problem:
                made.steps.append(Step(entry.name, "refuse", "refused", problem.message))
                continue
            made.steps.append(Step(entry.name, "split", "exact", f"into {len(parts)} modules, rank and scale kept"))
            result += parts
            continue
        whole = fused_path(entry) if slots.fused and not is_fused(entry.path) else None
        if whole is None:
            result.append(entry)
        else:
            waiting.setdefault((entry.component, whole), []).append(entry)
    for (_, whole), parts in waiting.items():
        result += _joined(parts, whole, made)
    return result


def _joined(parts: Sequence[Entry], whole: str, made: Plan) -> list[Entry]:
    name = f"{parts[0].component}.{whole}"
    try:
        entry = join(parts, whole)
    except ConversionError as problem:
        made.steps.append(Step(name, "refuse", "refused", problem.message))
        return []
    shared = entry.scale.rank == parts[0].scale.rank and len(parts) > 1
    detail = "the parts share down" if shared else f"block-diagonal, rank {entry.scale.rank}"
    detail = "rows below rows" if entry.algorithm == "full" else detail
    equal = len({part.scale.value for part in parts}) == 1 or all(folds_exactly(part.scale.value) for part in parts)
    made.steps.append(Step(name, "join", "exact" if equal else "one rounding", detail))
    return [entry]
