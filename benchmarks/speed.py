"""How fast persona is, measured beside something everybody has.

    python benchmarks/speed.py startup            a table
    python benchmarks/speed.py train              every method beside a bare loop with diffusers
    python benchmarks/speed.py startup --json     the same as JSON, with the machine it was measured on

Every measurement is one file beside this one, `speed_<name>.py`, with `add_arguments` and `measure`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # persona, where it is not installed

MEASUREMENTS = {
    "compile": "steps with --compile beside steps without: the first, the others, memory, and that losses agree",
    "convert": "one adapter, and a gigabyte of them, between dialects: beside cp + fsync of the same files",
    "train": "every method beside a bare loop with diffusers: steps, the first step, memory, what --dry-run foretold",
    "startup": "how long a command takes that does nothing: persona --help and its neighbours",
}


@dataclass(frozen=True)
class Row:
    """One thing measured: seconds of every repetition, the figure to stay under, and what it is compared with."""

    what: str
    seconds: list[float]
    target: float | None = None
    beside: str = ""  # the `what` of the row it is a ratio of

    @property
    def median(self) -> float:
        """The middle repetition, seconds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Result:
    """What a measurement found: rows, facts to print below them, and what is wrong (nothing, when all is well)."""

    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def as_table(result: Result) -> str:
    """The rows as text: median, fastest and slowest in milliseconds, target, ratio."""
    medians = {row.what: row.median for row in result.rows}
    width = max(len(row.what) for row in result.rows)
    lines = [f"{'':{width}}   median      min      max   target  ratio"]
    for row in result.rows:
        figures = "".join(f" {1000 * value:8.1f}" for value in (row.median, min(row.seconds), max(row.seconds)))
        target = f"{1000 * row.target:8.0f}" if row.target else " " * 8
        ratio = f"{row.median / medians[row.beside]:6.2f}" if row.beside else " " * 6
        lines.append(f"{row.what:{width}}{figures} {target} {ratio}")
    lines.append(f"milliseconds, {len(result.rows[0].seconds)} repetitions each, in turn")
    lines += [f"{name}: {value}" for name, value in {**machine(), **result.facts}.items()]
    return "\n".join([*lines, *(f"WRONG: {line}" for line in result.wrong)])


def as_json(result: Result) -> str:
    """The same for programs."""
    rows = [{**asdict(row), "median": row.median} for row in result.rows]
    return json.dumps({"machine": machine(), "rows": rows, "facts": result.facts, "wrong": result.wrong}, indent=1)


def main() -> int:
    """Measure, print, and exit 1 when something is wrong (not merely slow)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="measurement", required=True)
    modules = {name: importlib.import_module(f"speed_{name}") for name in MEASUREMENTS}
    for name, summary in MEASUREMENTS.items():
        verb = verbs.add_parser(name, help=summary, description=modules[name].__doc__)
        modules[name].add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    result: Result = modules[arguments.measurement].measure(arguments)
    print(as_json(result) if arguments.json else as_table(result))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    # The measurements import Row and Result from this very module, not from a second copy of it.
    sys.modules["speed"] = sys.modules["__main__"]
    sys.exit(main())
