"""A dialect as a table: how modules are named, how factors are spelt, what it can hold. Both directions come from it.

Each dialect is one small file that fills in a `TableDialect`. Reading groups a file's keys by module (grammar), asks
the dialect where each module lies, and builds entries (entries); writing asks it for the names again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Entry, Leftover, Magnitude, Source
from persona.core.adapters.evidence import decide, is_known, kernel_of, weight_shape
from persona.core.adapters.reshaping import reshaped, same_bits, swapped_halves, transposed
from persona.core.adapters.slots import Slots
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import Evidence, Output, State, Told
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.dialects.entries import StoredScale, build_entry
from persona.formats.dialects.grammar import Group, group
from persona.formats.dialects.layout import decide_layout
from persona.formats.models.families import FAMILIES


@dataclass(frozen=True)
class Place:
    """Where a module lies: component, diffusers' path, its name inside the component as the file spells it, whether
    that is the original code's (which has some halves the other way round), and the families so spelt."""

    component: str
    path: str
    name: str = ""
    original: bool = False
    families: frozenset[str] | None = None


Places = Callable[[Collection[str]], Callable[[str], Place | None]]
"""All module names of a file -> where each lies."""


Names = Callable[[Adapter], Callable[[Entry], str]]
"""An adapter to write -> the name of each of its modules."""


def anywhere(place: Callable[[str], Place | None]) -> Places:
    """Places for a dialect whose names mean the same whatever stands beside them."""
    return lambda modules: place


@dataclass(frozen=True)
class TableDialect:
    """A dialect made of tables and a few plain functions.

    `places(modules)(module)` finds a module or gives None; `names(adapter)(entry)` is its inverse; `suffixes` (or
    `suffixes_of`, where they differ by module) spell the factors when writing; `spellings` are the grammar's spellings
    it reads; `applies(state)` is an extra condition (a container, a header); `scales` finds alpha in a header or
    config; `header(adapter)` makes the metadata to write; `priority` breaks ties between dialects that explain the
    same keys; `families` limits what the evidence may leave; `original` says that transformers are written as the
    original code has them, and `joined(adapter)(entry)` then names the joined module that a module is part of.
    """

    name: str
    summary: str
    slots: Slots
    places: Places
    spellings: frozenset[str]
    names: Names | None = None
    suffixes: Mapping[str, str] = field(default_factory=dict)
    suffixes_of: Callable[[Entry], Mapping[str, str]] | None = None
    applies: Callable[[State, Sequence[str]], bool] = lambda state, siblings: True
    scales: Callable[[State, Told], StoredScale] = lambda state, told: _no_scale
    header: Callable[[Adapter], dict[str, str]] = lambda adapter: {}
    alpha_shape: tuple[int, ...] = ()
    original: bool = False
    joined: Callable[[Adapter], Callable[[Entry], str | None]] = lambda adapter: lambda entry: None
    priority: int = 0
    families: frozenset[str] | None = None

    def detect(self, state: State, siblings: Sequence[str]) -> Evidence:
        """The share of modules that this table names, among modules spelt in its way."""
        if not self.applies(state, tuple(siblings)):
            return Evidence(0.0)
        grouped = group(state.tensors)
        if not grouped.groups:
            return Evidence(0.0)
        place = self.locator(grouped.groups)
        mine = [g for g in grouped.groups.values() if self._speaks(g) and place(g.module) is not None]
        if not mine:
            return Evidence(0.0)
        share = len(mine) / len(grouped.groups)
        example = mine[0].module
        return Evidence(share, (f"{len(mine)} of {len(grouped.groups)} modules are named like {example}",))

    def read(self, state: State, told: Told) -> Adapter:
        """The adapter, lazily; see Dialect.read. Modules spelt otherwise are read as their own dialect has them."""
        from persona.formats.dialects.recognise import TABLES

        return read_groups(self, [table for table in TABLES if table.name != self.name], state, told)

    def write(self, adapter: Adapter) -> Sequence[Output]:
        """One file: every entry under this dialect's name for it; see Dialect.write."""
        if self.names is None:
            raise ConversionError(f"persona reads {self.name} and does not write it.", hint="--to kohya")
        tensors: dict[str, TensorRef] = {}
        name_of = self.names(adapter)
        for entry in adapter.entries.values():
            suffixes = self.suffixes_of(entry) if self.suffixes_of else self.suffixes
            shown = with_swapped_halves(entry) if self.original and halves_swapped(entry) else entry
            tensors.update(spelled(shown, name_of(entry), suffixes, self.slots, self.alpha_shape))
        return (Output(tensors, self.header(adapter)),)

    def _speaks(self, group: Group) -> bool:
        return bool(group.spellings & self.spellings) or group.spellings <= {"any"}

    def locator(self, modules: Collection[str]) -> Callable[[str], Place | None]:
        """Where each module lies, for names that some family knows."""
        find = self.places(modules)

        def locate(module: str) -> Place | None:
            place = find(module)
            return place if place is not None and is_known(place.component, place.path, FAMILIES) else None

        return locate


def _no_scale(component: str, module: str, rank: int) -> None:
    return None


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
    for one in grouped.groups.values():
        dialect, place = locators.find(one.module)
        if dialect is None or place is None:
            reason = "no family has a module of this name"
            adapter.leftovers += [_leftover(state, key, reason) for key in one.keys.values()]
            continue
        if dialect is not main:
            _note_once(adapter, f"some modules are spelt as {dialect.name} does")
        entry = build_entry(
            one,
            state.tensors,
            place.component,
            place.path,
            told=told,
            stored_scale=scales.setdefault(dialect.name, dialect.scales(state, told)),
            name_in_component=place.name or place.path,
            paddle=layout.paddle,
        )
        hints |= place.families or set()
        _add(adapter, with_swapped_halves(entry) if place.original and halves_swapped(entry) else entry)
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


def _add(adapter: Adapter, entry: Entry) -> None:
    key = (entry.component, entry.path)
    if key not in adapter.entries:
        adapter.entries[key] = entry
        return
    before = adapter.entries[key]
    same = before.factors.keys() == entry.factors.keys() and before.scale == entry.scale
    if not same or not all(same_bits(before.factors[name], entry.factors[name]) for name in entry.factors):
        raise UnreadableFile(
            f"{entry.name} is there twice with different values: "
            f"{next(iter(before.origin.values()))} and {next(iter(entry.origin.values()))}."
        )
    _note_once(adapter, f"{entry.name} is there twice, bit for bit the same; one was kept")


def _finish(
    adapter: Adapter, bookkeeping: Sequence[str], state: State, told: Told, limit: frozenset[str] | None
) -> None:
    if limit == frozenset({"flux1"}):
        _move_t5_for_flux(adapter)
    verdict = decide(adapter.entries.values(), FAMILIES)
    families = verdict.families & limit if limit and verdict.families & limit else verdict.families
    adapter.families, adapter.family = settle_family(families, told, adapter)
    order = [FAMILIES[name] for name in FAMILIES if name in (adapter.families or FAMILIES)]
    adapter.entries = {key: replace(entry, kernel=kernel_of(entry, order)) for key, entry in adapter.entries.items()}
    if bookkeeping:
        adapter.notes.append(f"dropped {len(bookkeeping)} bookkeeping keys: {', '.join(sorted(bookkeeping)[:5])}")
    _note_alpha(adapter)


def _move_t5_for_flux(adapter: Adapter) -> None:
    """T5 is the third text encoder to kohya and in SD3, and the second in diffusers' Flux (dialects.md §0)."""
    moved = {}
    for (component, path), entry in adapter.entries.items():
        component = "text_encoder_2" if component == "text_encoder_3" else component
        moved[(component, path)] = replace(entry, component=component)
    adapter.entries = moved


def settle_family(families: frozenset[str], told: Told, adapter: Adapter) -> tuple[frozenset[str], str | None]:
    """The set that is left and its only member: what the user told wins when the evidence allows it."""
    if told.family is not None:
        if families and told.family not in families:
            raise UnreadableFile(
                f"This is not a {told.family} adapter: its modules fit {', '.join(sorted(families))}.",
                hint=f"--family {min(families)}",
            )
        return frozenset({told.family}), told.family
    stated = adapter.metadata.get("persona.family")
    if stated in families:
        return frozenset({stated}), stated
    return families, next(iter(families)) if len(families) == 1 else None


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


def halves_swapped(entry: Entry) -> bool:
    """Whether the original code has this modulation's shift and scale the other way round: the final layer's, and the
    last context block's of SD3, which has two parts where the others have six (dialects.md §2.4, §2.5)."""
    if entry.component != "transformer":
        return False
    if entry.path == "norm_out.linear":
        return True
    shape = weight_shape(entry) if entry.path.endswith(".norm1_context.linear") else None
    return shape is not None and shape[0] == 2 * shape[1]


def with_swapped_halves(entry: Entry) -> Entry:
    """Shift and scale exchanged: the row halves of up, of a difference, of the output axis' magnitude."""
    halved = {"lora": ("up",), "full": ("diff", "diff_b"), "loha": ("w1_a", "w2_a")}.get(entry.algorithm)
    if halved is None or "t1" in entry.factors:
        raise ConversionError(f"{entry.name}: the halves of a {entry.algorithm} modulation cannot be exchanged.")
    factors = {name: swapped_halves(ref) if name in halved else ref for name, ref in entry.factors.items()}
    magnitude = entry.magnitude
    if magnitude is not None and magnitude.axis == "out":
        magnitude = Magnitude(swapped_halves(magnitude.vector), "out")
    bias = swapped_halves(entry.bias) if entry.bias is not None else None
    return replace(entry, factors=factors, magnitude=magnitude, bias=bias)


def spelled(
    entry: Entry, name: str, suffixes: Mapping[str, str], slots: Slots, alpha_shape: tuple[int, ...]
) -> dict[str, TensorRef]:
    """The tensors of one entry under `name`. Raises ConversionError for a factor the dialect has no suffix for."""
    tensors: dict[str, TensorRef] = {}
    for factor, ref in entry.factors.items():
        factor = "w_norm" if entry.algorithm == "norm" and factor == "diff" else factor
        factor = "b_norm" if entry.algorithm == "norm" and factor == "diff_b" else factor
        ref = transposed(ref) if slots.layout == "paddle" and factor in ("down", "up") else ref
        tensors[name + _suffix(suffixes, factor, entry)] = ref
    if entry.bias is not None:
        tensors[name + _suffix(suffixes, "bias", entry)] = entry.bias
    if entry.magnitude is not None:
        key, ref = _spelled_magnitude(entry, entry.magnitude, suffixes)
        tensors[name + key] = ref
    if slots.alpha == "module" and entry.scale.origin != "not applicable":
        tensors[name + suffixes["alpha"]] = _spelled_alpha(entry, alpha_shape)
    return tensors


def _suffix(suffixes: Mapping[str, str], factor: str, entry: Entry) -> str:
    if factor not in suffixes:
        raise ConversionError(f"{entry.name}: there is no place for {factor} ({entry.algorithm}) in this dialect.")
    return suffixes[factor]


def _spelled_magnitude(entry: Entry, magnitude: Magnitude, suffixes: Mapping[str, str]) -> tuple[str, TensorRef]:
    """`dora_scale` is [out, 1(, 1, 1)] or [1, in(, 1, 1)]; PEFT's vector [out], on a convolution [1, out, 1, 1]."""
    shape: tuple[int, ...]
    size, convolution = magnitude.vector.shape[0], any(len(ref.shape) == 4 for ref in entry.factors.values())
    if "dora_scale" in suffixes:
        shape = (size, 1) if magnitude.axis == "out" else (1, size)
        return suffixes["dora_scale"], reshaped(magnitude.vector, (*shape, 1, 1) if convolution else shape)
    if magnitude.axis != "out":
        raise ConversionError(f"{entry.name}: a DoRA vector along the input has no place in this dialect.")
    shape = (1, size, 1, 1) if convolution else (size,)
    return _suffix(suffixes, "magnitude", entry), reshaped(magnitude.vector, shape)


def _spelled_alpha(entry: Entry, shape: tuple[int, ...]) -> TensorRef:
    """alpha as a scalar of the factors' own dtype; the tensor it was read from, when nothing changed since."""
    scale = entry.scale
    if scale.stored is not None and scale.mode in ("rank", "none"):
        return scale.stored
    alpha = scale.value * scale.rank
    dtype: Any = next(iter(entry.factors.values())).dtype
    if float(np.asarray(alpha, dtype)) != alpha:  # a dtype that would round alpha would change the strength
        dtype = np.dtype(np.float32)
    return in_memory(np.full(shape, alpha, dtype))
