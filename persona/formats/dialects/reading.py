"""Reading with tables: a file's modules one by one, each by the dialect that names it; what is there twice or left."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from persona.core.adapters.entry import Adapter, Entry, Leftover, Source
from persona.core.adapters.evidence import decide, kernel_of, weight_shape
from persona.core.adapters.family import Family
from persona.core.adapters.reshaping import same_bits
from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import State, Told
from persona.core.host.errors import UnreadableFile
from persona.formats.dialects.entries import StoredScale, build_entry
from persona.formats.dialects.family_choice import settle_family, stated_families
from persona.formats.dialects.grammar import group
from persona.formats.dialects.layout import decide_layout
from persona.formats.dialects.spelling import halves_swapped, with_swapped_halves
from persona.formats.dialects.table import Place, TableDialect
from persona.formats.models.families import FAMILIES


def read_groups(main: TableDialect, others: Sequence[TableDialect], state: State, told: Told) -> Adapter:
    """Read a file whose modules are spelt by `main`; a module that it cannot name may be named by one of `others`,
    because files that mix dialects exist (dialects.md §1.4)."""
    grouped = group(state.tensors)
    layout = decide_layout(grouped.groups.values(), state)
    adapter = Adapter(None, {}, metadata=dict(state.metadata), source=Source(told.path, state.container, main.name))
    adapter.notes += [*state.notes, *layout.notes]
    locators = _Locators((main, *others), grouped.groups)
    hints: set[str] = set()
    scales: dict[str, StoredScale] = {}
    twice: list[str] = []
    for one in grouped.groups.values():
        dialect, place = locators.find(one.module)
        if dialect is None or place is None:
            reason = "no family has a module of this name"
            adapter.leftovers += [_leftover(state, key, reason) for key in one.keys.values()]
            continue
        if dialect is not main:
            _note_once(adapter, f"some modules are spelt as {dialect.name} does")
        if dialect.name not in scales:
            scales[dialect.name] = dialect.scales(state, told)
        entry = build_entry(
            one,
            state.tensors,
            place.component,
            place.path,
            told=told,
            stored_scale=scales[dialect.name],
            name_in_component=place.name or place.path,
            paddle=layout.paddle,
        )
        hints |= place.families or set()
        entry = with_swapped_halves(entry) if place.original and halves_swapped(entry) else entry
        if not _add(adapter, entry):
            twice.append(entry.name)
    if twice:
        modules = f"{len(twice)} modules are" if len(twice) > 1 else f"{twice[0]} is"
        adapter.notes.append(f"{modules} there twice, bit for bit the same; one was kept")
    _finish(adapter, grouped.bookkeeping, state, told, main.families or (frozenset(hints) if hints else None))
    adapter.leftovers += [_leftover(state, key, "no known suffix") for key in grouped.unexplained]
    for first, second in grouped.duplicates:
        if not same_bits(state.tensors[first], state.tensors[second]):
            raise UnreadableFile(f"{first} and {second} mean the same and differ.")
        _note_once(adapter, f"{second} repeats {first} bit for bit and was passed over")
    return adapter


class _Locators:
    """The main dialect's names, then the others' in turn; each looks at the file when it is first asked."""

    def __init__(self, dialects: Sequence[TableDialect], modules: Collection[str]) -> None:
        self._dialects, self._modules = dialects, modules
        self._made: list[tuple[TableDialect, Callable[[str], Place | None]]] = []

    def find(self, module: str) -> tuple[TableDialect | None, Place | None]:
        for number, dialect in enumerate(self._dialects):
            if number == len(self._made):
                self._made.append((dialect, dialect.locator(self._modules)))
            place = self._made[number][1](module)
            if place is not None:
                return dialect, place
        return None, None


def _add(adapter: Adapter, entry: Entry) -> bool:
    """Whether the module was not there yet. Raises UnreadableFile when it was, with other values."""
    key = (entry.component, entry.path)
    if key not in adapter.entries:
        adapter.entries[key] = entry
        return True
    before = adapter.entries[key]
    first, second = _tensors(before), _tensors(entry)
    same = before.scale == entry.scale and first.keys() == second.keys()
    if not same or not all(same_bits(first[name], second[name]) for name in first):
        raise UnreadableFile(
            f"{entry.name} is there twice with different values: "
            f"{next(iter(before.origin.values()))} and {next(iter(entry.origin.values()))}."
        )
    return False


def _tensors(entry: Entry) -> dict[str, TensorRef]:
    """Everything of a module that is stored as a tensor, but for alpha."""
    more = {"bias": entry.bias, "magnitude": entry.magnitude.vector if entry.magnitude else None}
    return {**entry.factors, **{name: ref for name, ref in more.items() if ref is not None}}


def _finish(
    adapter: Adapter, bookkeeping: Sequence[str], state: State, told: Told, limit: frozenset[str] | None
) -> None:
    flux = frozenset({"flux1"})
    if limit == flux or told.family == "flux1" or stated_families(adapter.metadata) == flux:
        _move_t5_for_flux(adapter)
    _refuse_mixture(adapter)
    verdict = decide(adapter.entries.values(), FAMILIES)
    if not verdict.families and adapter.entries and told.family is None:
        raise UnreadableFile(
            f"Its {len(adapter.entries)} modules belong to no single base model: each is known, but not all to one.",
            hint="If it is a variant of one, say of which: --family sdxl",
        )
    families = verdict.families & limit if limit and verdict.families & limit else verdict.families
    adapter.families, adapter.family = settle_family(families, told, adapter)
    order = [FAMILIES[name] for name in FAMILIES if name in (adapter.families or FAMILIES)]
    adapter.entries = {key: replace(entry, kernel=_kernel(entry, order)) for key, entry in adapter.entries.items()}
    if bookkeeping:
        adapter.notes.append(f"dropped {len(bookkeeping)} bookkeeping keys: {', '.join(sorted(bookkeeping)[:5])}")
    _note_alpha(adapter)


def _kernel(entry: Entry, families: Sequence[Family]) -> tuple[int, ...] | None:
    """The kernel of the module, unless the factors' columns cannot be folded into it."""
    kernel = kernel_of(entry, families)
    shape = weight_shape(entry)
    if not kernel or shape is None:
        return kernel
    second = entry.factors.get("w2_b", entry.factors.get("w2")) if entry.algorithm == "lokr" else None
    columns = shape[1] if second is None else math.prod(second.shape[1:])  # LoKr's kernel lies within its second half
    folds = "t2" in entry.factors or columns % math.prod(kernel) == 0
    return kernel if folds else None


def _refuse_mixture(adapter: Adapter) -> None:
    """Every cross-attention of one UNet sees the same text: two widths are two base models in one file."""
    widths: dict[int, str] = {}
    for entry in adapter.entries.values():
        if entry.component == "unet" and entry.path.endswith((".attn2.to_k", ".attn2.to_v")):
            shape = weight_shape(entry)
            if shape is not None:
                widths.setdefault(shape[1], entry.name)
    if len(widths) > 1:
        (first, one), (second, other) = list(widths.items())[:2]
        raise UnreadableFile(
            f"It mixes adapters of different base models: {one} takes text {first} wide, {other} {second} wide."
        )


def _move_t5_for_flux(adapter: Adapter) -> None:
    """T5 is the third text encoder to kohya and in SD3, and the second in diffusers' Flux (dialects.md §0)."""
    moved = {}
    for (component, path), entry in adapter.entries.items():
        component = "text_encoder_2" if component == "text_encoder_3" else component
        moved[(component, path)] = replace(entry, component=component)
    adapter.entries = moved


def _note_alpha(adapter: Adapter) -> None:
    assumed = sum(entry.scale.origin == "assumed" for entry in adapter.entries.values())
    if assumed:
        adapter.notes.append(
            f"no alpha is stored for {assumed} of {len(adapter.entries)} modules; alpha = rank was assumed (scale 1)"
        )


def _note_once(adapter: Adapter, note: str) -> None:
    if note not in adapter.notes:
        adapter.notes.append(note)


def _leftover(state: State, key: str, reason: str) -> Leftover:
    ref = state.tensors[key]
    return Leftover(key, ref.shape, str(ref.dtype), reason)
