"""TensorBoard: event files in the run's `logs` folder, written by TensorBoard's own package, without a framework."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona.plugins.trackers.packages import numbers, require


class TensorBoard:
    """`tensorboard --logdir RUN/logs` shows the curves."""

    name = "tensorboard"

    def __init__(self) -> None:
        require("tensorboard", self.name, "pip install tensorboard")
        self._writer: Any = None

    def start(self, run_folder: Path, settings: Mapping[str, Any]) -> None:
        """Open an event file."""
        from tensorboard.summary import Writer

        self._writer = Writer(str(run_folder / "logs"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a figure."""
        for name, value in numbers(values).items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
