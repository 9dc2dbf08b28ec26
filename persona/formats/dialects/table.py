"""A dialect as a table: how modules are named, how factors are spelt, what it can hold. Both directions come from it.

Each dialect is one small file that fills in a `TableDialect`. Reading groups a file's keys by module (grammar), asks
the dialect where each module lies, and builds entries (entries); writing asks it for the names again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.slots import Slots
from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import Evidence, Output, State, Told
from persona.core.host.errors import ConversionError
from persona.formats.dialects.entries import StoredScale
from persona.formats.dialects.grammar import Group, group
from persona.formats.dialects.spelling import halves_swapped, spelled, with_swapped_halves
from persona.formats.models.families import has_module


@dataclass(frozen=True, slots=True)
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
    """Places for a dialect whose names mean the same whatever stands beside them: what a file is asked when its dialect
    is looked for, it is asked again when it is read, and the files of a batch have mostly the same names."""
    known = lru_cache(maxsize=4096)(place)
    return lambda modules: known


@dataclass(frozen=True)
class TableDialect:
    """A dialect made of tables and a few plain functions.

    `places(modules)(module)` finds a module or gives None; `names(adapter)(entry)` is its inverse; `suffixes` (or
    `suffixes_of`, where they differ by module) spell the factors when writing; `spellings` are the grammar's spellings
    it reads; `applies(state)` is an extra condition (a container, a header); `scales` finds alpha in a header or
    config; `header(adapter)` makes the metadata to write; `priority` breaks ties between dialects that explain the
    same keys; `families` limits what the evidence may leave; `original` says that transformers are written as the
    original code has them, and `joined(adapter)(entry)` then names the joined module that a module is part of;
    `shaped(adapter)(entry)` is an entry with the factors and axes this dialect has.
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
    shaped: Callable[[Adapter], Callable[[Entry], Entry]] = lambda adapter: lambda entry: entry
    priority: int = 0
    families: frozenset[str] | None = None

    def detect(self, state: State, siblings: Sequence[str]) -> Evidence:
        """The share of modules that this table names, among modules spelt in its way."""
        if not self.applies(state, tuple(siblings)):
            return Evidence(0.0)
        grouped = group(state.tensors)
        spoken = [one for one in grouped.groups.values() if self._speaks(one)]
        if not spoken:
            return Evidence(0.0)
        place = self.locator(grouped.groups)
        mine = [one for one in spoken if place(one.module) is not None]
        if not mine:
            return Evidence(0.0)
        share = len(mine) / len(grouped.groups)
        example = mine[0].module
        return Evidence(share, (f"{len(mine)} of {len(grouped.groups)} modules are named like {example}",))

    def read(self, state: State, told: Told) -> Adapter:
        """The adapter, lazily; see Dialect.read. Modules spelt otherwise are read as their own dialect has them."""
        from persona.formats.dialects.reading import read_groups
        from persona.formats.dialects.recognise import TABLES

        return read_groups(self, [table for table in TABLES if table.name != self.name], state, told)

    def write(self, adapter: Adapter) -> Sequence[Output]:
        """One file: every entry under this dialect's name for it; see Dialect.write."""
        spell = self.speller(adapter)
        tensors: dict[str, TensorRef] = {}
        for entry in adapter.entries.values():
            tensors.update(spell(entry))
        return (Output(tensors, self.header(adapter)),)

    def speller(self, adapter: Adapter) -> Callable[[Entry], dict[str, TensorRef]]:
        """Each module's tensors under this dialect's names; what it returns raises NoPlace for a module without one.
        Raises ConversionError when the names depend on something that is open."""
        if self.names is None:
            raise ConversionError(f"persona reads {self.name} and does not write it.", hint="--to kohya")
        name_of, shape = self.names(adapter), self.shaped(adapter)

        def spell(entry: Entry) -> dict[str, TensorRef]:
            suffixes = self.suffixes_of(entry) if self.suffixes_of else self.suffixes
            shown = with_swapped_halves(entry) if self.original and halves_swapped(entry) else entry
            return spelled(shape(shown), name_of(entry), suffixes, self.slots, self.alpha_shape)

        return spell

    def _speaks(self, group: Group) -> bool:
        return not group.spellings.isdisjoint(self.spellings) or group.spellings <= _ANY

    def locator(self, modules: Collection[str]) -> Callable[[str], Place | None]:
        """Where each module lies, for names that some family knows."""
        find = self.places(modules)

        def locate(module: str) -> Place | None:
            place = find(module)
            return place if place is not None and has_module(place.component, place.path) else None

        return locate


_ANY = {"any"}


def _no_scale(component: str, module: str, rank: int) -> None:
    return None
