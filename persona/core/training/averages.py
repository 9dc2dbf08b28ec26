"""How fast moving averages of trained values follow them."""

from __future__ import annotations


def average_decay(limit: float, update: int) -> float:
    """The decay of an exponential moving average at `update` (the first of a run is 1): average ← decay · average +
    (1 − decay) · value.

    It rises to `limit` as update / (update + 9), and the first average is the value itself: with a constant 0.9999 the
    product of 300 steps would be little but the untrained base. Source: diffusers, training_utils.py,
    EMAModel.get_decay.
    """
    return 0.0 if update <= 1 else min(limit, update / (update + 9.0))
