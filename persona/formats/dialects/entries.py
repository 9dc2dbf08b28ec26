"""From the keys of one module to an Entry: which algorithm, complete or not, alpha from where, DoRA's axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from persona.core.adapters.entry import Algorithm, Entry, Magnitude, Scale
from persona.core.adapters.reshaping import reshaped, transposed
from persona.core.adapters.shapes import Unfitting, check
from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import Told
from persona.core.host.errors import UnreadableFile, UsageError
from persona.formats.dialects.grammar import Group

Tensors = Mapping[str, TensorRef]
StoredScale = Callable[[str, str, int], "tuple[float, str, str] | None"]
"""(component, module name as the file has it, rank) -> (alpha, mode, origin) from a header or a config, or None."""

NOT_FACTORS = frozenset({"alpha", "dora_scale", "magnitude_out", "bias"})
REQUIRED: tuple[tuple[Algorithm, frozenset[str]], ...] = (
    ("lora", frozenset({"down", "up"})),
    ("lora", frozenset({"embedding_a", "embedding_b"})),
    ("loha", frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})),
    ("glora", frozenset({"a1", "a2", "b1", "b2"})),
    ("full", frozenset({"diff"})),
    ("norm", frozenset({"w_norm"})),
    ("ia3", frozenset({"weight", "on_input"})),
    ("ia3", frozenset({"ia3_l"})),
)
"""An algorithm is there when all of these factors are (dialects.md §1.3)."""


def algorithm_of(group: Group, tensors: Tensors) -> Algorithm:
    """The algorithm of a module's factors. Raises UnreadableFile when they are not complete."""
    have = set(group.keys)
    if "lokr" in group.spellings and not (have & {"w1_a", "w2_a"} and "loha" in group.spellings):
        return _lokr(group, have)
    for algorithm, required in REQUIRED:
        if required <= have:
            return algorithm
    if "oft_blocks" in have:
        return "boft" if len(tensors[group.keys["oft_blocks"]].shape) == 4 else "oft"
    if have & {"oft_diag", "oft_R"}:
        return "oft"
    if have & {"boft_R"}:
        return "boft"
    if have & {"set_weight"}:
        return "opaque"
    if have <= {"diff_b"}:
        return "full"
    missing = _missing(have)
    raise UnreadableFile(f"{group.module} has {', '.join(sorted(group.keys.values()))} and no {missing}.")


def _lokr(group: Group, have: set[str]) -> Algorithm:
    for half in ("w1", "w2"):
        pair = {f"{half}_a", f"{half}_b"} <= have
        if (half in have) == pair or (half in have and have & {f"{half}_a", f"{half}_b"}):
            raise UnreadableFile(f"{group.module}: LoKr needs either {half} or both {half}_a and {half}_b.")
    return "lokr"


def _missing(have: set[str]) -> str:
    best = max(REQUIRED, key=lambda item: len(item[1] & have) / len(item[1]))
    wanted = sorted(best[1] - have) if best[1] & have else ["factors beside it"]
    return " and ".join(wanted)


def build_entry(
    group: Group,
    tensors: Tensors,
    component: str,
    path: str,
    *,
    told: Told,
    stored_scale: StoredScale,
    name_in_component: str,
    paddle: bool,
) -> Entry:
    """The Entry of one module's keys. `paddle` says that two-dimensional LoRA factors are stored transposed."""
    algorithm = algorithm_of(group, tensors)
    factors = {name: tensors[key] for name, key in group.keys.items() if name not in NOT_FACTORS}
    if paddle:
        factors = {name: transposed(ref) if name in ("down", "up") else ref for name, ref in factors.items()}
    factors = _canonical(algorithm, factors)
    rank = rank_of(algorithm, factors)
    scale = _scale(group, tensors, component, algorithm, rank, told, stored_scale(component, name_in_component, rank))
    if algorithm == "lokr" and "w1" in factors and "w2" in factors and scale.origin != "config":
        scale = Scale(scale.alpha, rank, "none", scale.origin, scale.stored)  # LyCORIS: both full, no scale (§4.3)
    entry = Entry(
        component,
        path,
        algorithm,
        factors,
        scale,
        magnitude=_magnitude(group, tensors),
        bias=tensors[group.keys["bias"]] if "bias" in group.keys else None,
        origin=dict(group.keys),
    )
    return _checked(entry, group)


def _checked(entry: Entry, group: Group) -> Entry:
    try:
        check(entry)
    except Unfitting as problem:
        raise UnreadableFile(f"{group.module}: {problem}.") from None
    return entry


def _canonical(algorithm: Algorithm, factors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    if (
        "down" not in factors and {"embedding_a", "embedding_b"} <= factors.keys()
    ):  # ΔE = s·(B·A)ᵀ: as a low-rank delta of a [vocabulary, width] weight
        return {"down": transposed(factors["embedding_b"]), "up": transposed(factors["embedding_a"])}
    if "w_norm" in factors:
        factors["diff"] = factors.pop("w_norm")
    return factors


RANK_AXIS: dict[str, tuple[str, ...]] = {
    "lora": ("down",),
    "loha": ("w1_b",),
    "lokr": ("w1_b", "t2", "w2_b"),
    "glora": ("a2",),
}
"""The factor whose first axis is the rank that alpha is divided by; of several the first that is there (§4.1-4.3)."""


def rank_of(algorithm: str, factors: Mapping[str, TensorRef]) -> int:
    """The rank of a module's factors, 1 where there is none."""
    for name in RANK_AXIS.get(algorithm, ()):
        if name in factors:
            return next(iter(factors[name].shape), 1)
    return 1


def _scale(
    group: Group,
    tensors: Tensors,
    component: str,
    algorithm: Algorithm,
    rank: int,
    told: Told,
    stored: tuple[float, str, str] | None,
) -> Scale:
    if algorithm in ("full", "norm", "ia3", "opaque", "oft", "boft") and "alpha" not in group.keys:
        return Scale(None, rank, "none", "not applicable")
    found: Scale | None = None
    if "alpha" in group.keys:
        ref = tensors[group.keys["alpha"]]
        found = Scale(_number(group.keys["alpha"], ref), rank, "rank", "file key", ref)
    elif stored is not None:
        found = Scale(stored[0], rank, stored[1], stored[2])  # type: ignore[arg-type]
    if algorithm in ("full", "norm", "ia3", "opaque", "oft", "boft"):
        return Scale(found.alpha if found else None, rank, "none", "file key", found.stored if found else None)
    if told.alpha is None:
        return found or Scale(None, rank, "rank", "assumed")
    if found is not None and not told.override_alpha and found.alpha != told.alpha:
        raise UsageError(
            f"{group.module} has alpha {found.alpha:g} ({found.origin}), and {told.alpha:g} was given.",
            hint="Leave --alpha out, or add --override-alpha.",
        )
    return found if found is not None and found.alpha == told.alpha else Scale(told.alpha, rank, "rank", "told")


def _number(key: str, ref: TensorRef) -> float:
    if math.prod(ref.shape) != 1 and ref.python is None:
        raise UnreadableFile(f"{key} has shape {list(ref.shape)}; a scalar belongs there.")
    if isinstance(ref.python, str):
        raise UnreadableFile(f"{key} is text; a number belongs there.")
    value = float(np.asarray(ref.read()).reshape(-1)[0])
    if not math.isfinite(value):
        raise UnreadableFile(f"{key} is {value}; a finite number belongs there.")
    return value


def _magnitude(group: Group, tensors: Tensors) -> Magnitude | None:
    """DoRA's vector and the axis it keeps: decided by the key's name first, then by the place of the dimension that is
    not 1 (dialects.md §4.4)."""
    if "magnitude_out" in group.keys:
        ref = tensors[group.keys["magnitude_out"]]
        return Magnitude(reshaped(ref, (math.prod(ref.shape),)), "out")
    if "dora_scale" not in group.keys:
        return None
    ref = tensors[group.keys["dora_scale"]]
    if sum(size != 1 for size in ref.shape) > 1:
        raise UnreadableFile(f"{group.keys['dora_scale']} has shape {list(ref.shape)}; one axis belongs there.")
    on_input = len(ref.shape) > 1 and ref.shape[0] == 1 and ref.shape[1] != 1
    return Magnitude(reshaped(ref, (math.prod(ref.shape),)), "in" if on_input else "out")
