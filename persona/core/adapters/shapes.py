"""Whether an entry's factors fit together, so that everything after reading can rely on it (dialects.md §4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from persona.core.adapters.entry import Entry
from persona.core.adapters.evidence import weight_shape
from persona.core.adapters.fusion import is_fused, row_sizes
from persona.core.adapters.tensor import TensorRef

Shapes = Mapping[str, tuple[int, ...]]


_PRODUCT = frozenset({"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2", "scalar", "diff_b"})
FACTORS: dict[str, frozenset[str]] = {
    "lora": frozenset({"down", "up", "mid", "scalar", "diff_b"}),
    "loha": _PRODUCT,
    "lokr": _PRODUCT,
    "full": frozenset({"diff", "diff_b"}),
    "norm": frozenset({"diff", "diff_b"}),
    "ia3": frozenset({"weight", "on_input", "ia3_l"}),
    "glora": frozenset({"a1", "a2", "b1", "b2", "bm", "diff_b"}),
}
"""The factors each algorithm knows; anything else beside them would be lost unsaid."""


class Unfitting(ValueError):
    """Factors whose shapes or dtypes contradict each other; the text says how."""


def check(entry: Entry) -> None:
    """Raise Unfitting when the factors, the magnitude or the bias of an entry do not belong to one weight."""
    shapes = {name: ref.shape for name, ref in entry.factors.items()}
    for name, ref in entry.factors.items():
        _check_values(name, ref)
    strays = shapes.keys() - FACTORS.get(entry.algorithm, shapes.keys())
    if strays:
        raise Unfitting(f"{', '.join(sorted(strays))} means nothing beside {entry.algorithm}'s factors")
    rule = _RULES.get(entry.algorithm)
    if rule is not None:
        rule(shapes)
    weight = weight_shape(entry) if entry.algorithm in ("lora", "loha", "lokr", "full") else None
    for name, vector in (("bias", entry.bias), ("diff_b", entry.factors.get("diff_b"))):
        if vector is not None and (len(vector.shape) != 1 or (weight is not None and vector.shape[0] != weight[0])):
            raise Unfitting(f"{name} {list(vector.shape)} does not fit {weight[0] if weight else 'its'} rows")
    if entry.magnitude is not None and weight is not None:
        size, axis = entry.magnitude.vector.shape[0], entry.magnitude.axis
        fits = size == weight[0] if axis == "out" else weight[1] % size == 0
        if not fits:
            raise Unfitting(f"DoRA's vector of {size} along the {axis}put does not fit a weight {list(weight)}")
    if is_fused(entry.path) and weight is not None:
        try:
            row_sizes(entry.path, *weight)
        except ValueError as error:
            raise Unfitting(str(error)) from None


def _check_values(name: str, ref: TensorRef) -> None:
    if 0 in ref.shape or len(ref.shape) > 5:
        raise Unfitting(f"{name} has shape {list(ref.shape)}")
    if name == "on_input" and ref.dtype.kind in "biu":  # IA3's switch, which LyCORIS keeps as a whole number
        return
    if ref.dtype.kind not in "fV" or ref.python is not None:
        raise Unfitting(f"{name} is {ref.dtype}, not floating point")


def _lora(shapes: Shapes) -> None:
    down, up = shapes["down"], shapes["up"]
    if len(down) not in (2, 4) or len(up) not in (2, 4) or up[2:] not in ((), (1, 1)):
        raise Unfitting(f"down {list(down)} and up {list(up)} are no pair of low-rank factors")
    middle = shapes.get("mid")
    if middle is None:
        _demand(up[1] == down[0], f"down {list(down)} and up {list(up)} do not share a rank")
    else:
        fits = len(middle) == 4 and middle[:2] == (up[1], down[0]) and down[2:] in ((), (1, 1))
        _demand(fits, f"mid {list(middle)} does not fit down {list(down)} and up {list(up)}")
    _demand(math.prod(shapes.get("scalar", ())) == 1, "scalar has several values")


def _loha(shapes: Shapes) -> None:
    _demand(("t1" in shapes) == ("t2" in shapes), "only one of hada_t1 and hada_t2 is there")
    whole = []
    for k in "12":
        a, b, t = shapes[f"w{k}_a"], shapes[f"w{k}_b"], shapes.get(f"t{k}")
        if t is None:
            fits = len(a) == 2 and len(b) in (2, 4) and a[1] == b[0]
            whole.append((a[0], *b[1:]) if fits else ())
        else:
            fits = len(a) == len(b) == 2 and len(t) == 4 and t[:2] == (a[0], b[0])
            whole.append((a[1], b[1], *t[2:]) if fits else ())
        _demand(fits, f"hada_w{k}_a {list(a)} and hada_w{k}_b {list(b)} do not share a rank")
    _demand(whole[0] == whole[1], f"the halves are {list(whole[0])} and {list(whole[1])}")


def _lokr(shapes: Shapes) -> None:
    if "w1" in shapes:
        _demand(len(shapes["w1"]) == 2, f"lokr_w1 has shape {list(shapes['w1'])}")
    else:
        a, b = shapes["w1_a"], shapes["w1_b"]
        _demand(len(a) == len(b) == 2 and a[1] == b[0], "lokr_w1_a and lokr_w1_b do not share a rank")
    if "w2" in shapes:
        _demand(len(shapes["w2"]) in (2, 4) and "t2" not in shapes, f"lokr_w2 has shape {list(shapes['w2'])}")
        return
    a, b, t = shapes["w2_a"], shapes["w2_b"], shapes.get("t2")
    if t is None:
        _demand(len(a) == 2 and len(b) in (2, 4) and a[1] == b[0], "lokr_w2_a and lokr_w2_b do not share a rank")
    else:
        _demand(len(a) == len(b) == 2 and len(t) == 4 and t[:2] == (a[0], b[0]), "lokr_t2 does not fit its factors")


def _full(shapes: Shapes) -> None:
    if "diff" in shapes:
        _demand(len(shapes["diff"]) in (1, 2, 4), f"diff has shape {list(shapes['diff'])}")


def _norm(shapes: Shapes) -> None:
    _demand(len(shapes["diff"]) == 1, f"w_norm has shape {list(shapes['diff'])}")


def _ia3(shapes: Shapes) -> None:
    line = shapes.get("weight") or shapes.get("ia3_l") or ()
    _demand(sum(size != 1 for size in line) <= 1, f"the scale has shape {list(line)}; one axis belongs there")
    _demand(math.prod(shapes.get("on_input", ())) == 1, "on_input has several values")


def _glora(shapes: Shapes) -> None:
    a1, a2, b1, b2 = (shapes[name] for name in ("a1", "a2", "b1", "b2"))
    fits = all(len(shape) in (2, 4) for shape in (a1, a2, b1, b2)) and a1[1] == a2[0] and b1[1] == b2[0]
    _demand(fits, "the factors of GLoRA do not share a rank")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Unfitting(otherwise)


_RULES: dict[str, Callable[[Shapes], None]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
    "norm": _norm,
    "ia3": _ia3,
    "glora": _glora,
}
