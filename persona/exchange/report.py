"""What a conversion did, as values: printed by the commands, returned by the API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """What `persona convert` did or would do.

    `written` are the files (those that would be written in a dry run); `source`, `dialect` and `container` name both
    sides; `summary` is one line about the content; `steps` is what happens to each module (objects of the planner);
    `notes` are the decisions the user should know; `certificate` is the document of `--certificate`."""

    written: tuple[Path, ...]
    steps: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""
    dialect: str = ""
    container: str = ""
    summary: str = ""
    certificate: Mapping[str, Any] | None = field(default=None, repr=False)

    def as_document(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "written": [str(path) for path in self.written],
            "from": self.source,
            "to": self.dialect,
            "container": self.container,
            "content": self.summary,
            "steps": [
                {"module": step.module, "action": step.action, "cost": step.cost, "detail": step.detail}
                for step in self.steps
            ],
            "notes": list(self.notes),
        }
