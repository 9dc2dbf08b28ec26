"""What environment.json keeps: versions, digests, dates; and the words a product carries."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from typing import Any

from persona import __version__
from persona.core.training.base import Base
from persona.core.training.plan import TrainingPlan
from persona.core.training.run import (
    RunFolder,
)
from persona.core.training.settings import TrainSettings
from persona.environments.worker import versions
from persona.runs.about import product_words, thumbnail, title_of
from persona.runs.preparing import Prepared


def facts_of(ready: Prepared, backend: str) -> dict[str, Any]:
    """What environment.json keeps."""
    return {
        "persona": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": backend,
        "device": ready.recipe.device,
        "devices": ready.recipe.devices,
        "sharding": dataclasses.asdict(ready.recipe.sharding) if ready.recipe.sharding else None,
        "packages": versions(),
        "base": ready.base.id,
        "base_hash": ready.base.hash,
        "pictures": {picture.path: picture.sha256 for s in ready.plan.streams for picture in s.pictures},
        "started": now(),
    }


def now() -> str:
    """The time in UTC, as ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def words_of(run: RunFolder, plan: TrainingPlan, base: Base, settings: TrainSettings) -> dict[str, str]:
    """What the run's product says of itself, with its first sample when that is wanted."""
    words = product_words(plan, base, title=settings.title or title_of(plan, base), steps=plan.steps)
    picture = run.samples / f"step-{plan.steps:06d}" / "00.png"
    if settings.thumbnail and picture.is_file():
        words["modelspec.thumbnail"] = thumbnail(picture)
    return words
