"""How long persona takes to answer when there is nothing to compute, as whole processes, one after another in turn, so
that a busy machine slows all of them alike; and whether numpy or a framework was imported for it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from speed import Result, Row

ROOT = Path(__file__).parents[1]
TARGET = 0.150
"""Seconds that `persona --help` may take on the machine of the README."""

HEAVY = {
    "numpy", "ml_dtypes", "PIL", "safetensors", "torch", "torch_npu", "diffusers", "transformers", "peft", "accelerate",
    "paddle", "ppdiffusers", "mindspore", "mindone",
}  # fmt: skip
"""What `persona --help` must not import."""

BARE = "python -c pass"
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    BARE: (["-c", "pass"], None),
    "python -c 'import click'": (["-c", "import click"], None),
    "persona --help": (["-m", "persona", "--help"], TARGET),
    "persona --version": (["-m", "persona", "--version"], None),
    "persona train --help": (["-m", "persona", "train", "--help"], None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--repetitions", type=int, default=20, help="of every command (default: 20)")


def environment() -> dict[str, str]:
    """This process's, with persona importable even where it is not installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def seconds_of(arguments: list[str]) -> float:
    """Wall time of one whole process. Raises CalledProcessError when it fails: a crash is fast, but not a figure."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment(), cwd=ROOT)
    return time.perf_counter() - start


def imported_by(arguments: list[str]) -> dict[str, int]:
    """The modules a command imports and the microseconds each took by itself (`python -X importtime`)."""
    command = [sys.executable, "-X", "importtime", *arguments]
    report = subprocess.run(command, check=True, capture_output=True, text=True, env=environment(), cwd=ROOT).stderr
    found = {}
    for line in report.splitlines():
        cells = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and len(cells) == 3 and cells[0].strip().isdigit():
            found[cells[2].strip()] = int(cells[0])
    return found


def measure(arguments: argparse.Namespace) -> Result:
    """Median times of the commands, and what `persona --help` imported."""
    seconds: dict[str, list[float]] = {what: [] for what in COMMANDS}
    for command, _ in COMMANDS.values():
        seconds_of(command)  # compiles what is not compiled yet, fills the file cache
    for _ in range(arguments.repetitions):
        for what, (command, _) in COMMANDS.items():
            seconds[what].append(seconds_of(command))
    rows = [Row(what, seconds[what], target, beside=BARE) for what, (_, target) in COMMANDS.items()]
    imported = imported_by(COMMANDS["persona --help"][0])
    heavy = sorted({name.partition(".")[0] for name in imported} & HEAVY)
    slowest = sorted(imported, key=lambda name: -imported[name])[:5]
    return Result(
        rows,
        facts={
            "modules imported by persona --help": len(imported),
            "slowest imports": ", ".join(f"{name} {imported[name] / 1000:.1f} ms" for name in slowest),
            "numpy or a framework among them": ", ".join(heavy) or "no",
        },
        wrong=[f"persona --help imports {', '.join(heavy)}"] if heavy else [],
    )
