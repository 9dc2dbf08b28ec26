"""What is typed for an adapter with a strength, and for a share of energy."""

from __future__ import annotations

import math
from pathlib import Path

from persona.core.host.errors import UsageError


def weighted(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:STRENGTH`; a file whose own name ends in `:number` is taken as a file when it exists.
    Raises UsageError for a strength that is not a number."""
    path = Path(text).expanduser()
    file, sign, number = text.rpartition(":")
    if path.exists() or not sign or not file or "/" in number or "\\" in number:
        return path, 1.0
    try:
        strength = float(number)
    except ValueError:
        raise UsageError(
            f"{number!r} is not a strength; a number belongs behind the colon.", hint=f"{file}:0.7"
        ) from None
    if not math.isfinite(strength):
        raise UsageError(f"A strength of {strength} is not possible.", hint=f"{file}:0.7")
    return Path(file).expanduser(), strength


def check_energy(energy: float | None) -> None:
    """Raises UsageError for a share that is not above 0 and at most 1."""
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"An energy of {energy:g} is not possible; it is a share of 1.", hint="--energy 0.95")
