"""The validation of a run: which pictures are held out, and when their loss is followed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from persona.core.host.contracts import Session
from persona.core.host.errors import DataError, UsageError
from persona.core.training.base import Base
from persona.core.training.loop import Ingredients
from persona.core.training.plan import TrainingPlan
from persona.core.training.run import RunFolder
from persona.core.training.validation import validation_loss
from persona.runs.pictures import scan_folder


def validation_plan(method: Any, recipe: Any, base: Base, plan: TrainingPlan) -> TrainingPlan | None:
    """A plan whose one stream are the held-out pictures, captioned by the method itself; None without any.

    Raises DataError when a picture is trained on as well: its loss would tell nothing."""
    settings = recipe.settings
    if settings.validation_data is None:
        return None
    folder = Path(settings.validation_data).expanduser()
    pictures, _ = scan_folder(folder)
    trained = {picture.sha256 for stream in plan.streams for picture in stream.pictures if picture.sha256}
    same = [Path(picture.path).name for picture in pictures if picture.sha256 in trained]
    if same:
        raise DataError(
            f"{len(same)} of the validation pictures in {folder} are trained on too, such as {same[0]}.",
            hint="Take them out of one of the two folders",
        )
    plain = dataclasses.replace(settings, center_crop=True, random_flip=False, part_learning_rate=())
    made: TrainingPlan = method.plan(recipe.options, plain, base, pictures)
    return dataclasses.replace(made, streams=(dataclasses.replace(made.streams[0], name="validation", generated=None),))


@dataclasses.dataclass(frozen=True)
class Validation:
    """Follows the loss of held-out pictures every `every` steps and after the last."""

    plan: TrainingPlan
    given: Ingredients
    every: int
    steps: int

    def due(self, step: int) -> bool:
        """Whether the loss is taken after this step."""
        return step % self.every == 0 or step == self.steps

    def loss(self, session: Session) -> float:
        """The mean loss of the held-out pictures. Raises UsageError for a backend that cannot evaluate."""
        if not hasattr(session, "evaluate"):
            raise UsageError("This backend has no validation loss.", hint="Leave --validation-data out")
        return validation_loss(self.plan, self.given, session)


def best_step(run: RunFolder) -> tuple[int, float, float] | None:
    """(step, loss, loss at the end) where the validation loss in metrics.csv was lowest; None without one."""
    import csv

    try:
        with run.metrics.open(newline="", encoding="utf-8") as stream:
            rows = [
                (int(row["step"]), float(row["validation_loss"]))
                for row in csv.DictReader(stream)
                if row.get("validation_loss")
            ]
    except (OSError, ValueError):
        return None
    rows = [row for row in rows if math.isfinite(row[1])]
    if not rows:
        return None
    step, loss = min(rows, key=lambda row: (row[1], row[0]))
    return step, loss, rows[-1][1]
