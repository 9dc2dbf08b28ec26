"""Whether a checkpoint's arrays fit the session that takes them up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from persona.core.host.errors import ResumeError

Shapes = Mapping[str, tuple[int, ...]]


def check_state(state: Mapping[str, Any], wanted: Shapes, values: Shapes) -> None:
    """Raises ResumeError, naming up to five, for arrays of `state` that are missing, of another shape, or trained
    values (value/…, ema/…) that are unknown. `wanted` are the shapes of what has to be there, by name; `values` those
    of the trained values, whose moments (adam_m/…, adam_v/…) have to fit where they are."""
    moments = {f"{kind}/{name}": shape for kind in ("adam_m", "adam_v") for name, shape in values.items()}
    wanted = dict(wanted) | {"step": (), "loss_scale": (2,)}
    updated = {name.partition("/")[2] for name in moments if name in state}  # both moments, or neither
    wanted |= {name: shape for name, shape in moments.items() if name.partition("/")[2] in updated}
    found = {name: tuple(np.shape(state[name])) for name in state}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is {list(found[name])}, not {list(shape)}" for name, shape in wanted.items()
                 if found.get(name, shape) != shape]  # fmt: skip
    problems += [f"{name} is unknown" for name in found if name.startswith(("value/", "ema/")) and name not in wanted]
    if problems:
        rest = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ResumeError(f"The checkpoint does not fit this run: {', '.join(problems[:5])}{rest}.",
                          hint="Was the run started with another plan or base?")  # fmt: skip
