"""Do two files mean the same? Module by module, by the oracle, whatever their spellings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from persona.core.adapters.certificate import relative_error
from persona.core.adapters.delta import bias_delta, needs_base
from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.reshaping import same_bits
from persona.core.adapters.tensor import BFLOAT16, TensorRef

OPAQUE = ("oft", "boft", "opaque")
ROUNDING = {np.dtype(np.float16): 2.0**-10, BFLOAT16: 2.0**-7}
"""What one rounding can change of a value, relative; anything wider counts as float32."""


@dataclass(frozen=True)
class Comparison:
    """`modules` and `words` map names to relative errors (‖B − A‖ / ‖A‖); `only_first` and `only_second` are names that
    one of the files lacks and that change something; `undecided` could not be compared without the base model;
    `tolerance` is what counts as the same."""

    modules: Mapping[str, float]
    words: Mapping[str, float]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    undecided: tuple[str, ...]
    tolerance: float
    notes: tuple[str, ...] = field(default=())

    @property
    def worst(self) -> float:
        """The largest relative error; not a number counts as infinite."""
        errors = [*self.modules.values(), *self.words.values()]
        return max((error if np.isfinite(error) else float("inf") for error in errors), default=0.0)

    @property
    def same(self) -> bool:
        """Whether nothing is missing, nothing is undecided and nothing differs by more than the tolerance."""
        return not self.only_first and not self.only_second and not self.undecided and self.worst <= self.tolerance


def compare(
    first: Adapter, second: Adapter, *, base: Mapping[str, Any] | None = None, tolerance: float | None = None
) -> Comparison:
    """Compare two adapters. `base` gives base weights by `component.path`, for DoRA, IA3 and GLoRA; the default
    tolerance is one rounding of the coarser dtype."""
    left, right = first.deltas(base), second.deltas(base)
    entries = (_by_member(first), _by_member(second))
    modules: dict[str, float] = {}
    undecided = []
    for name in left:
        if name not in right:
            continue
        one, other = entries[0][name], entries[1][name]
        if _is_same(one, other):
            modules[name] = 0.0
        elif _hidden(one, name, base) or _hidden(other, name, base):
            undecided.append(name)
        else:
            modules[name] = max(_change_error(left[name], right[name]), _bias_error(one, other))
    words = _words(first, second)
    allowed = tolerance if tolerance is not None else rounding_of((first, second))
    tokens = ({one.token for one in first.embeddings}, {one.token for one in second.embeddings})
    return Comparison(
        modules,
        words,
        tuple([name for name in left if name not in right] + sorted(tokens[0] - set(words))),
        tuple([name for name in right if name not in left] + sorted(tokens[1] - set(words))),
        tuple(undecided),
        allowed,
    )


def rounding_of(adapters: Iterable[Adapter]) -> float:
    """What one rounding of the coarsest dtype among them can change, relative."""
    refs = [ref for adapter in adapters for entry in adapter.entries.values() for ref in entry.factors.values()]
    refs += [ref for adapter in adapters for one in adapter.embeddings for ref in one.vectors.values()]
    return max((ROUNDING.get(ref.dtype, 1e-6) for ref in refs), default=1e-6)


def _by_member(adapter: Adapter) -> dict[str, Entry]:
    from persona.core.adapters.fusion import members

    return {f"{e.component}.{path}": e for e in adapter.entries.values() for path in members(e.path)}


def _hidden(entry: Entry, name: str, base: Mapping[str, Any] | None) -> bool:
    return entry.algorithm in OPAQUE or (needs_base(entry) and (base is None or name not in base))


def _is_same(one: Entry, other: Entry) -> bool:
    """Bit for bit the same factors under the same scale: then the base does not matter."""
    if one.algorithm != other.algorithm or one.path != other.path or one.factors.keys() != other.factors.keys():
        return False
    if one.scale.value != other.scale.value or (one.magnitude is None) != (other.magnitude is None):
        return False
    if one.magnitude is not None and other.magnitude is not None:
        same_axis = one.magnitude.axis == other.magnitude.axis
        if not same_axis or not same_bits(one.magnitude.vector, other.magnitude.vector):
            return False
    if (one.bias is None) != (other.bias is None):
        return False
    pairs = [(ref, other.factors[name]) for name, ref in one.factors.items()]
    pairs += [(one.bias, other.bias)] if one.bias is not None and other.bias is not None else []
    return all(a.shape == b.shape and same_bits(a, b) for a, b in pairs)


def _change_error(first: Any, second: Any) -> float:
    return relative_error(first, second) if first.size == second.size else float("inf")


def _bias_error(one: Entry, other: Entry) -> float:
    first, second = bias_delta(one), bias_delta(other)
    if first is None and second is None:
        return 0.0
    zero = np.zeros_like(first if first is not None else second)
    return relative_error(zero if first is None else first, zero if second is None else second)


def _words(first: Adapter, second: Adapter) -> dict[str, float]:
    """Errors of words by token. Files that cannot hold a token name it after themselves, so the only word of each file
    is compared whatever it is called."""
    pairs = {
        one.token: (one, other) for one in first.embeddings for other in second.embeddings if one.token == other.token
    }
    if not pairs and len(first.embeddings) == 1 and len(second.embeddings) == 1:
        pairs = {first.embeddings[0].token: (first.embeddings[0], second.embeddings[0])}
    found = {}
    for token, (one, other) in pairs.items():
        if one.vectors.keys() != other.vectors.keys():
            found[token] = float("inf")
            continue
        found[token] = max(_error(ref, other.vectors[name]) for name, ref in one.vectors.items())
    return found


def _error(one: TensorRef, other: TensorRef) -> float:
    return relative_error(one, other) if one.shape == other.shape else float("inf")
