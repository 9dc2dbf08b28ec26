"""VisualDL, PaddlePaddle's viewer: logs in the run's `logs` folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona.plugins.trackers.packages import numbers, require


class VisualDL:
    """`visualdl --logdir RUN/logs` shows the curves."""

    name = "visualdl"

    def __init__(self) -> None:
        require("visualdl", self.name, "pip install visualdl")
        self._writer: Any = None

    def start(self, run_folder: Path, settings: Mapping[str, Any]) -> None:
        """Open a log file."""
        from visualdl import LogWriter

        self._writer = LogWriter(logdir=str(run_folder / "logs"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a figure."""
        for name, value in numbers(values).items():
            self._writer.add_scalar(tag=name, value=value, step=step)

    def finish(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
