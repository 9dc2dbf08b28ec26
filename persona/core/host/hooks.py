"""Everything a plugin can hook into. A hook is a signature and one sentence; docs/plugins.md has an example of each.

The first group says what a plugin gives: each returns a list of `Descriptor`. The second group are events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pluggy

from persona.core.host.descriptor import Descriptor

PROJECT = "persona"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def persona_methods() -> list[Descriptor]:  # type: ignore[empty-body]
    """Training methods: what is learned, from what."""


@hookspec
def persona_backends() -> list[Descriptor]:  # type: ignore[empty-body]
    """Frameworks that can execute a plan."""


@hookspec
def persona_containers() -> list[Descriptor]:  # type: ignore[empty-body]
    """File formats: bytes to named tensors and back."""


@hookspec
def persona_dialects() -> list[Descriptor]:  # type: ignore[empty-body]
    """Spellings of adapters: named tensors to meaning and back."""


@hookspec
def persona_families() -> list[Descriptor]:  # type: ignore[empty-body]
    """Base architectures: configs that generate the inventory of module names."""


@hookspec
def persona_filters() -> list[Descriptor]:  # type: ignore[empty-body]
    """Filters that choose or change pictures when a data set is prepared."""


@hookspec
def persona_scorers() -> list[Descriptor]:  # type: ignore[empty-body]
    """Judges of pictures: similarity, prompt fidelity, aesthetics."""


@hookspec
def persona_trackers() -> list[Descriptor]:  # type: ignore[empty-body]
    """Places where a run's figures are sent."""


@hookspec
def persona_sources() -> list[Descriptor]:  # type: ignore[empty-body]
    """Sources of data sets, models and captions."""


@hookspec
def persona_optimizers() -> list[Descriptor]:  # type: ignore[empty-body]
    """Optimizers beside the built-in AdamW."""


@hookspec
def persona_commands() -> list[Descriptor]:  # type: ignore[empty-body]
    """Further verbs of the command line: click commands."""


@hookspec
def persona_run_started(run: Path, settings: Mapping[str, Any]) -> None:
    """A run's folder is complete and its first step is about to be made."""


@hookspec
def persona_step_done(run: Path, step: int, values: Mapping[str, float]) -> None:
    """An optimizer step was made: loss, learning rates, gradient norm, seconds."""


@hookspec
def persona_checkpoint_saved(run: Path, step: int, checkpoint: Path) -> None:
    """A checkpoint is whole on disk."""


@hookspec
def persona_sampled(run: Path, step: int, pictures: list[Path]) -> None:
    """Pictures were made from the model as it is now."""


@hookspec
def persona_run_finished(run: Path, product: Path) -> None:
    """The product is written and the run is over."""


KINDS: dict[str, str] = {
    "method": "persona_methods",
    "backend": "persona_backends",
    "container": "persona_containers",
    "dialect": "persona_dialects",
    "family": "persona_families",
    "filter": "persona_filters",
    "scorer": "persona_scorers",
    "tracker": "persona_trackers",
    "source": "persona_sources",
    "optimizer": "persona_optimizers",
    "command": "persona_commands",
}
"""What can be provided, and the hook that provides it."""

EVENTS = (
    "persona_run_started",
    "persona_step_done",
    "persona_checkpoint_saved",
    "persona_sampled",
    "persona_run_finished",
)
