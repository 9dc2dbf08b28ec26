"""Learning-rate schedules by the names diffusers gives them, as multipliers of the learning rate.

A schedule is a function of the step alone, so a resumed run goes on where it was.
Source: diffusers, src/diffusers/optimization.py (which has them from transformers and fairseq).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from persona.core.host.errors import UsageError, did_you_mean


def _constant(step: int, warmup: int, total: int, cycles: int, power: float, end: float) -> float:
    return 1.0


def _linear(step: int, warmup: int, total: int, cycles: int, power: float, end: float) -> float:
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int, cycles: int, power: float, end: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def _cosine_with_restarts(step: int, warmup: int, total: int, cycles: int, power: float, end: float) -> float:
    progress = (step - warmup) / max(1, total - warmup)
    return 0.0 if progress >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0)))


def _polynomial(step: int, warmup: int, total: int, cycles: int, power: float, end: float) -> float:
    left = 1.0 - (step - warmup) / max(1, total - warmup)
    return end if left <= 0.0 else float((1.0 - end) * left**power + end)


_AFTER_WARMUP: dict[str, Callable[[int, int, int, int, float, float], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}
NAMES = tuple(_AFTER_WARMUP)


def multiplier(
    name: str, step: int, *, warmup: int = 0, total: int, cycles: int = 1, power: float = 1.0, end: float = 0.0
) -> float:
    """What the learning rate is multiplied by at `step` (the first step of a run is 0) of `total` steps.

    All but `constant` rise from 0 over the first `warmup` steps. `cycles` are the hard restarts of
    `cosine_with_restarts`; `power` and `end` (the multiplier after the last step) belong to `polynomial`; diffusers'
    `lr_end` of 1e-7 is `end` = 1e-7 / learning rate. Raises UsageError for an unknown name.
    """
    if name not in _AFTER_WARMUP:
        raise UsageError(f"There is no learning-rate schedule {name!r}.", hint=did_you_mean(name, NAMES))
    if name != "constant" and step < warmup:
        return step / warmup
    return _AFTER_WARMUP[name](step, warmup, total, cycles, power, end)
