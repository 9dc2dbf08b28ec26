"""Weights & Biases. It asks for an account by itself; WANDB_MODE=offline keeps everything in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona.plugins.trackers.packages import numbers, require


class WeightsAndBiases:
    """A run of the project `persona`, named as the folder; a resumed run goes on in its own."""

    name = "wandb"

    def __init__(self) -> None:
        require("wandb", self.name, "pip install wandb")
        self._run: Any = None

    def start(self, run_folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin or go on."""
        import wandb

        name = run_folder.name
        self._run = wandb.init(
            project="persona", name=name, id=name, dir=str(run_folder), config=dict(settings), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Every figure of the step."""
        self._run.log(numbers(values), step=step)

    def finish(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()
