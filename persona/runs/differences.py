"""What a run was started with against what it is asked for now."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona.core.host.errors import (
    ResumeError,
)
from persona.core.training.plan import TrainingPlan


def differences_of(before: TrainingPlan, now: TrainingPlan) -> list[str]:
    """What differs between two plans, in words; steps and the pictures of Generated streams may."""
    found: list[str] = []
    _compare("", _comparable(before), _comparable(now), found)
    return found


def _comparable(plan: TrainingPlan) -> dict[str, Any]:
    document = dataclasses.asdict(plan)
    document.pop("steps")
    document.pop("notes")
    for stream in document["streams"]:
        if stream["generated"]:
            stream["pictures"] = []
        stream["pictures"] = {Path(picture["path"]).name: {**picture, "path": ""} for picture in stream["pictures"]}
    return document


def _compare(name: str, before: Any, now: Any, found: list[str]) -> None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            inner = f"{name}.{key}" if name else str(key)
            if key not in before:
                found.append(f"{inner} is new")
            elif key not in now:
                found.append(f"{inner} is gone")
            else:
                _compare(inner, before[key], now[key], found)
    elif isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(before) == len(now):
        for number, (left, right) in enumerate(zip(before, now, strict=True)):
            _compare(f"{name}[{number}]", left, right, found)
    elif before != now:
        found.append(f"{name} was {_short(before)}, is {_short(now)}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_pictures(before: TrainingPlan, now: TrainingPlan) -> None:
    for old, new in zip(before.streams, now.streams, strict=False):
        if old.pictures and [p.sha256 for p in old.pictures] != [p.sha256 for p in new.pictures]:
            raise ResumeError(
                f"The pictures of stream {old.name} are not those the run was started with.",
                hint="Put them back, or begin a new run",
            )


OWN_STATE = ("optimizer/", "optimizer_number/", "optimizer_group/")
"""How the names of arrays begin that only the framework which wrote them understands."""


def other_backend(before: str, now: str, state: Mapping[str, Any], plan: TrainingPlan) -> str:
    """The note that a run made with the backend `before` goes on with `now`; "" when that is the same.

    Raises ResumeError when its `state` holds what only `before` understands."""
    if before in ("", now):
        return ""
    if any(name.startswith(OWN_STATE) for name in state):
        raise ResumeError(
            f"The checkpoint was made with the backend {before} and the optimizer {plan.optimizer.name}, whose state "
            f"{now} cannot read.",
            hint=f"Go on with it: --backend {before}",
        )
    dropout = any(getattr(part, "dropout", 0.0) for part in plan.trains)
    also = ", and dropout draws other numbers" if dropout else ""
    return f"going on with {now} what was begun with {before}: from here on the two differ by rounding{also}"
