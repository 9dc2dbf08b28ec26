"""How fast persona trains, beside a bare loop with diffusers (and PEFT) alone that has latents and prompts cached too
(bare_loop.py): steps, the first step, memory, and how well `--dry-run` foretold them, for every method.

Steps: both by turns in one process, the ratio of the medians of all turns. The first step: seconds from the start of a
process, less those in which a bare process imports the same libraries. Times are by the clock and of processor time
(cpu), which other work on the machine changes less; the targets are held against processor time."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from speed import Result, Row

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "persona" / "assets" / "subjects" / "robot"
BASES = ("mini", "narrow-sd1")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"prompt": "a robot"},
    "dreambooth": {"class_word": "robot", "class_data": str(PICTURES), "class_pictures": 4},
    "textual-inversion": {"placeholder": ["<robot>"], "initializer": ["robot"], "captions": False},
    "full": {"prompt": "a robot"},
}
SPEED, LATE, MEMORY = 0.95, 2.0, 1.10
"""Targets: share of the bare loop's steps, seconds to the first step behind the imports, share of its memory."""
SCRIPTS = "58 to 171 ms a step, the first step after 11 to 16 s, 464 to 584 MiB"
"""What diffusers' example scripts for these methods took when they were measured elsewhere: two busy cores, torch 2.13,
diffusers 0.42, an SD1.5 with a denoiser of 2.5 million weights, 64 pixels, batch 1; they cache nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--base", action="append", choices=BASES, help="repeatable; default: both")
    parser.add_argument("--method", action="append", choices=tuple(METHODS), help="repeatable; default: all")
    parser.add_argument("--batch", type=int, default=1, help="samples a step (default: 1)")
    parser.add_argument("--turns", type=int, default=8, help="turns of each (default: 8)")
    parser.add_argument("--block", type=int, default=10, help="steps of a turn (default: 10)")


def measure(arguments: argparse.Namespace) -> Result:
    """Every method on every base, one after the other."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for base in arguments.base or BASES:
            path = folder_of(base, Path(folder))
            for method in arguments.method or METHODS:
                print(f"{base} {method} …", file=sys.stderr, flush=True)
                found = measured(base, path, method, arguments, Path(folder))
                rows += found.rows
                facts |= found.facts
                missed += found.wrong
    facts["diffusers' example scripts, measured elsewhere"] = SCRIPTS
    facts["targets missed"] = "; ".join(missed) or "none"
    return Result(rows, facts)


def folder_of(base: str, folder: Path) -> Path:
    """The base's diffusers folder; a narrow SD1.5 with random weights is made."""
    if base == "mini":
        return ROOT / "persona" / "assets" / "mini"
    from tests.narrow_models import narrow_pipeline

    return narrow_pipeline("sd1", folder / base)


def measured(base: str, path: Path, method: str, arguments: argparse.Namespace, folder: Path) -> Result:
    """One method on one base: the turns, the bare loop alone, the dry run."""
    options = {
        **METHODS[method],
        "steps": arguments.block * (arguments.turns + 1),
        "batch": arguments.batch,
        "samples": False,
        "save_every": 0,
    }
    place = str(folder / f"{base}-{method}")
    wish = {
        "base": str(path),
        "method": method,
        "pictures": str(PICTURES),
        "batch": arguments.batch,
        "block": arguments.block,
        "options": {**options, "output": place},
        "started": time.time(),
    }
    here = Path(__file__).parent
    own = child([str(here / "speed_train_turns.py"), json.dumps(wish)])
    words = [str(path), method, str(PICTURES), "--batch", str(arguments.batch), "--steps", str(arguments.block)]
    bare = child([str(here / "bare_loop.py"), *words, "--started", str(time.time())])
    foretold = child(["-m", "persona", *typed(method, path, options), "--dry-run", "--json"])
    return judged(f"{base} {method}", own, bare, foretold)


def typed(method: str, path: Path, options: dict[str, Any]) -> list[str]:
    """The words of `persona train` for these options."""
    words = ["train", "--method", method, "--base", str(path), "--data", str(PICTURES)]
    spelt = {"class_word": "--class"}
    for name, value in options.items():
        flag = spelt.get(name, "--" + name.replace("_", "-"))
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [word for each in (value if isinstance(value, list) else [value]) for word in (flag, str(each))]
    return words


def child(arguments: list[str]) -> dict[str, Any]:
    """What a process prints as JSON. Raises CalledProcessError, after showing what it said, when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
        done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def judged(name: str, own: dict[str, Any], bare: dict[str, Any], foretold: dict[str, Any]) -> Result:
    """Rows and facts of one method on one base, and what misses its target (as `wrong`)."""
    wall, cpu = ({who: [turn[which] for turn in own["turns"][who]] for who in own["turns"]} for which in (0, 1))
    speed = {kind: statistics.median(of["bare"]) / statistics.median(of["persona"]) for kind, of in
             {"wall": wall, "cpu": cpu}.items()}  # fmt: skip
    late = {kind: own["first_step"][kind] - bare["imported"][kind] for kind in ("wall", "cpu")}
    memory = own["peak_bytes"] / bare["peak_bytes"]
    errors = {
        what: foretold[key] / own[actual] - 1
        for what, key, actual in (
            ("time", "seconds", "seconds"),
            ("memory", "peak_memory_bytes", "peak_bytes"),
            ("disk", "disk_bytes", "disk_bytes"),
        )
    }
    facts = {
        f"{name}: steps/s of the bare loop's": f"{speed['cpu']:.2f} by cpu, {speed['wall']:.2f} by the clock",
        f"{name}: first step": f"{own['first_step']['cpu']:.1f} s cpu, {late['cpu']:+.2f} s behind the imports alone "
        f"(bare loop {bare['first_step']['cpu'] - bare['imported']['cpu']:+.2f} s); by the clock "
        f"{own['first_step']['wall']:.1f} s, {late['wall']:+.2f} s",
        f"{name}: memory": f"{own['peak_bytes'] / 2**20:.0f} MiB, {memory:.2f} of the bare loop's "
        f"{bare['peak_bytes'] / 2**20:.0f} MiB",
        f"{name}: dry run foretold": ", ".join(f"{what} {error:+.0%}" for what, error in errors.items()),
    }
    missed = []
    if speed["cpu"] < SPEED:
        missed.append(f"{name} makes {speed['cpu']:.2f} of the steps")
    if late["cpu"] > LATE:
        missed.append(f"{name} begins {late['cpu']:.1f} s behind the imports")
    if memory > MEMORY:
        missed.append(f"{name} takes {memory:.2f} of the memory")
    rows = [Row(f"{name}, bare", cpu["bare"]), Row(name, cpu["persona"], beside=f"{name}, bare")]
    return Result(rows, facts, missed)
