"""What each method learns of a subject, and at what cost: five subjects, three seeds, judged by pictures held out.

    python benchmarks/personalise.py                    every run that is not there yet, the table, docs/personalise.md
    python benchmarks/personalise.py --quick            one subject, one seed, a few steps, no page: does it work?
    python benchmarks/personalise.py --row lora --subject robot --seed 1
    python benchmarks/personalise.py --jobs 2           two runs side by side, each on one core
    python benchmarks/personalise.py --table            judge what is there again and write table and page

A killed or stopped benchmark goes on where it was (--minutes ends it in time); runs belong to the base they were made
on. Beside this file: personalise_rows (what is compared), _run (one run), _figures (the arithmetic), _table, _page."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # persona and tools, where they are not installed

from personalise_page import page, plain
from personalise_rows import CONTROL, ROOT, ROWS, SUBJECTS, Bench, Row, Subject
from personalise_run import file_of, make
from personalise_table import averaged, criteria, judge_all, table
from speed import machine

PAGE = ROOT / "docs" / "personalise.md"
PICTURES = ROOT / "docs" / "personalise"
QUICK: dict[str, Any] = {"steps": 2, "batch": 2}
Run = tuple[Row, Subject, int]


def wanted_runs(rows: list[str], subjects: list[str], seeds: list[int]) -> list[Run]:
    """All runs, seed by seed, so that whatever is left undone is the last seeds of all rows."""
    return [
        (row, subject, seed)
        for seed in seeds
        for subject in SUBJECTS
        if subject.name in subjects
        for row in ROWS
        if row.name in rows
    ]


def work(runs: list[Run], bench: Bench, minutes: float, jobs: int) -> int:
    """Make the runs that are not there until the time is up; how many are left."""
    end = time.time() + 60 * minutes
    parts: dict[tuple[str, int], list[Run]] = {}  # one subject and seed: the control row needs the LoRA before it
    for one in runs:
        if not file_of(*one, bench).is_file():
            parts.setdefault((one[1].name, one[2]), []).append(one)
    if jobs == 1:
        return sum(work_on(part, bench, end) for part in parts.values())
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(work_on, parts.values(), repeat(bench), repeat(end)))


def work_on(runs: list[Run], bench: Bench, end: float) -> int:
    """Make these runs, none after the `end` (seconds of the system's clock); how many are left."""
    for number, (row, subject, seed) in enumerate(runs):
        if time.time() > end:
            return len(runs) - number
        begun = time.monotonic()
        make(row, subject, seed, bench)
        print(f"{row.name}, {subject.name}, seed {seed}: {time.monotonic() - begun:.0f} s", flush=True)
    return 0


def recipes(bench: Bench) -> dict[str, dict[str, Any]]:
    """What each row is told beyond a method's own defaults: the registry's settings and the row's options."""
    from persona.runs.assemble import base_defaults

    told = {row.name: base_defaults(bench.base, row.method) | dict(row.options) | dict(bench.options) for row in ROWS}
    told[CONTROL] = {"adapter": "the row above"}
    return {name: {"method": row.method, **told[name]} for name, row in zip(told, ROWS, strict=True)}


def main() -> int:
    """Make the runs, judge them, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"row": [row.name for row in ROWS], "subject": [subject.name for subject in SUBJECTS]}
    for flag, known in names.items():
        parser.add_argument(f"--{flag}", action="append", choices=known, help="only this (repeatable)")
    parser.add_argument("--seed", action="append", type=int, help="only this (repeatable; default: 1, 2, 3)")
    parser.add_argument("--base", default="mini", help="what is personalised (default: mini)")
    parser.add_argument("--out", type=Path, help="where runs are kept (default: runs/personalise-DIGEST of the base)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further run after so long")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--table", action="store_true", help="make no run: judge what is there")
    parser.add_argument("--quick", action="store_true", help="one subject, one seed, a few steps, no page")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()

    from persona.hub.bases import open_base

    seeds = arguments.seed or ([1] if arguments.quick else [1, 2, 3])
    subjects = arguments.subject or (names["subject"][:1] if arguments.quick else names["subject"])
    name = f"personalise-{'quick-' if arguments.quick else ''}{open_base(arguments.base).hash[:8]}"
    folder = (arguments.out or ROOT / "runs" / name).absolute()
    bench = Bench(folder, arguments.base)
    if arguments.quick:
        bench = Bench(folder, arguments.base, sampler_steps=2, class_pictures=4, options=QUICK)
    runs = [] if arguments.table else wanted_runs(arguments.row or names["row"], subjects, seeds)
    left = work(runs, bench, arguments.minutes, arguments.jobs)

    from persona.api import host

    judge = host().load("scorer", "clip")()
    seeds = [1] if arguments.quick else sorted({1, 2, 3, *seeds})  # whatever is there belongs on the page
    figures = judge_all(bench, seeds, judge.picture_vectors, judge.text_vectors)
    rows = averaged(figures)
    document = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "base": f"{arguments.base} {open_base(arguments.base).hash[:12]}",
        "seeds": seeds,
        "recipes": recipes(bench),
        "rows": rows,
        "criteria": [{"what": what, "found": told, "holds": holds} for what, told, holds in criteria(figures)],
        "figures": figures,
    }
    (folder / "table.json").write_text(json.dumps(document, indent=1))
    print(json.dumps(document, indent=1) if arguments.json else "\n".join(plain(table(rows))))
    if not arguments.json:
        for what, told, holds in criteria(figures):
            print(f"{'holds' if holds else 'FAILS'}: {what}: {told}")
    if not arguments.quick:
        PICTURES.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(document, bench, seeds[0], PICTURES), encoding="utf-8")
        (PICTURES / "table.json").write_text(json.dumps(document, indent=1) + "\n")
    if left:
        print(f"{left} runs are left: the same command goes on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
