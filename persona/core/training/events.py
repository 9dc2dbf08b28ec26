"""What a run tells while it goes. Plain values, so that a worker in another environment can send them as JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stage:
    """A part of the work begins or goes on: "class pictures", 12 of 64."""

    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class StepDone:
    """An optimizer step was made: loss, learning rates, gradient norm, seconds."""

    step: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is whole on disk."""

    step: int
    path: str


@dataclass(frozen=True)
class Sampled:
    """Pictures were made from the model as it is."""

    step: int
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Note:
    """Something the user should know."""

    text: str


Event = Stage | StepDone | CheckpointSaved | Sampled | Note
Emit = Callable[[Event], None]
