"""What trackers of other packages share: saying which package is missing, and leaving out what is not a number."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping

from persona.core.host.errors import UsageError


def require(package: str, tracker: str, install: str) -> None:
    """Raises UsageError, with the line that installs it, when a tracker's package is missing."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"The tracker {tracker} needs {package}, which is not installed.", hint=install)


def numbers(values: Mapping[str, float]) -> dict[str, float]:
    """The values that are finite."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
