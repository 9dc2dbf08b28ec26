"""metrics.csv in the run's folder: one row a step, readable by everything."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from persona.core.training.run import write_atomically


class CsvTracker:
    """Writes a row as soon as its step is done; a figure that a step does not have is an empty cell. After a resume,
    rows behind the checkpoint are written again."""

    name = "csv"

    def __init__(self) -> None:
        self.file: TextIO | None = None
        self.columns: list[str] = []
        self.later: tuple[str, ...] = ()

    def start(self, run_folder: Path, settings: Mapping[str, Any]) -> None:
        """Open the file; keep the rows up to `settings["resumed_at"]`."""
        path = run_folder / "metrics.csv"
        self.later = ("validation_loss",) if settings.get("validation_data") else ()
        resumed_at = int(settings.get("resumed_at", 0))
        kept = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as stream:
                kept = [
                    row for row in csv.reader(stream) if row and (row[0] == "step" or _number(row[0]) <= resumed_at)
                ]
        self.columns = kept[0] if kept else []
        text = io.StringIO(newline="")
        csv.writer(text).writerows(kept)
        write_atomically(path, text.getvalue().encode())  # a kill now must not cost the rows of days before
        self.file = path.open("a", newline="", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row; the columns are those of the first step."""
        if self.file is None:
            return
        writer = csv.writer(self.file)
        if not self.columns:
            self.columns = ["step", *values, *(name for name in self.later if name not in values)]
            writer.writerow(self.columns)
        cells = [f"{values[name]:.9g}" if name in values else "" for name in self.columns[1:]]
        writer.writerow([step, *cells])
        self.file.flush()

    def finish(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")  # half a row that a kill left
