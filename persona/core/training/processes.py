"""One run on several devices: a process for each, and all of them make the same steps, each with its part of the
samples. Which sample is whose follows from its slot, so the data are those of one device; only sums travel."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from persona.core.host.errors import TrainingError, UsageError
from persona.core.training.plan import TrainingPlan

Array = np.ndarray[Any, np.dtype[Any]]


class Processes(Protocol):
    """The processes of a run, seen from one of them. Every one has to make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0. Process 0 writes the run's folder."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def sum(self, values: Array) -> Array:
        """The sum of everybody's `values`, float64 of one shape. Raises PeerLost when a process is gone."""
        ...

    def barrier(self) -> None:
        """Wait until everybody is here. Raises PeerLost when a process is gone."""
        ...

    def leave(self) -> None:
        """Part from the others, at the end."""
        ...


class PeerLost(TrainingError):
    """Another process of the run is gone. It is a consequence; the cause is told by whoever went."""


@dataclass(frozen=True)
class OneProcess:
    """A run on one device."""

    rank: int = 0
    count: int = 1

    def sum(self, values: Array) -> Array:
        """The values themselves."""
        return values

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def leave(self) -> None:
        """There is nobody to part from."""


ALONE = OneProcess()


@dataclass(frozen=True)
class Part:
    """What one process computes of every update: of the micro-batches in `micros`, of every stream's places in each
    the `index`-th of `count` equal runs."""

    micros: range
    index: int = 0
    count: int = 1

    def places(self, samples: int) -> range:
        """Its places in a micro-batch of so many samples of a stream, as equal as they can be."""
        return range(samples * self.index // self.count, samples * (self.index + 1) // self.count)


def part_of(plan: TrainingPlan, processes: Processes) -> Part:
    """The part of a process. Micro-batches are split first, and whole ones are dealt out where that does not suffice.

    Raises UsageError when batch × accumulation cannot be shared equally."""
    each, among = shares(plan, processes.count)
    index, group = processes.rank % each, processes.rank // each
    micros = plan.accumulation // among
    return Part(range(group * micros, (group + 1) * micros), index, each)


def shares(plan: TrainingPlan, count: int) -> tuple[int, int]:
    """Into how many parts `count` processes split a micro-batch, and among how many groups of them the micro-batches
    are dealt. Raises UsageError when batch × accumulation cannot be shared equally."""
    samples = plan.batch * plan.accumulation
    if samples % count:
        fitting = -(-plan.batch // count) * count
        raise UsageError(
            f"--batch {plan.batch} x --accumulation {plan.accumulation} are {samples} samples a step, which {count} "
            "devices cannot share equally.",
            hint=f"For example: --batch {fitting}, or --accumulation {count}",
        )
    each = math.gcd(plan.batch, count)
    return each, count // each


def devices_of(backend: Any, device: str, count: int) -> tuple[str, ...]:
    """The names of the devices of `count` processes. Raises UsageError for a backend that knows one device only, and
    what the backend raises when so many are not there."""
    if not hasattr(backend, "devices"):
        raise UsageError(f"The backend {backend.name} runs on one device.", hint="Leave --devices out")
    return tuple(backend.devices(device, count))


def share_of(plan: TrainingPlan, count: int) -> TrainingPlan:
    """The plan as one of `count` processes sees it: its share of batch and accumulation."""
    each, among = shares(plan, count)
    return dataclasses.replace(plan, batch=plan.batch // each, accumulation=plan.accumulation // among)


def share_in_words(plan: TrainingPlan, devices: tuple[str, ...]) -> str:
    """What several devices make of batch and accumulation, for the user."""
    mine, total = share_of(plan, len(devices)), plan.batch * plan.accumulation
    return (
        f"{len(devices)} processes on {', '.join(dict.fromkeys(devices))}: {total} samples a step and stream as on one "
        f"device, {total // len(devices)} on each (batch {mine.batch} x accumulation {mine.accumulation}); learning "
        "rate and steps stay what they are"
    )


def computes_together(session: Any) -> bool:
    """Whether a session's model is spread over the processes, so that none of them can compute anything alone."""
    return bool(getattr(session, "is_sharded", False))


def agreed(processes: Processes, wish: bool) -> bool:
    """Whether any process wishes it; the same answer for all."""
    return bool(processes.sum(np.array([float(wish)]))[0])
