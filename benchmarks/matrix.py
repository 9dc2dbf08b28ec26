"""From which dialect to which, and at what cost: every cell is a real conversion, checked.

    python benchmarks/matrix.py                    write docs/matrix.md
    python benchmarks/matrix.py --family sd1       print one family's table

For each family a LoRA in float16 is made on one whole block of every form and width of each component, alpha 3 of rank
4, so that no scale is a power of two. It is written in every dialect, converted to every other, read back, and each ΔW
compared with the source's; then converted back, and its tensors compared bit for bit with the first file's. A second
table does the same for each algorithm, from kohya's dialect."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # persona, where it is not installed
sys.path.insert(0, str(Path(__file__).parent))

from matrix_adapters import algorithms, counted, plain_lora
from matrix_measure import Factors, by_oracle, distance, is_zero, low_rank, witnesses

import persona
from persona.api import host
from persona.core.adapters.certificate import relative_error
from persona.core.adapters.entry import Adapter
from persona.core.adapters.fusion import members
from persona.exchange.choices import suffix_for
from persona.exchange.convert import Wish, deliver
from persona.formats.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "matrix.md"
SHOWN = ("sd1", "sdxl", "sd3", "flux1")
PART = "◐"
WORST = {"R": 0.0, "F": 2.0**-9, "E": 2.0**-9, "S": 1.0}
"""The relative error of ΔW that a cell may have: float16 rounds by 2⁻¹¹ of a value, and factors multiply."""


@dataclass(frozen=True)
class Cell:
    """A conversion that was made: its letter, the worst relative error of ΔW, whether it comes back bit for bit, and
    how many modules were left out."""

    letter: str
    error: float = 0.0
    back: bool = False
    reason: str = ""
    dropped: int = 0

    def __str__(self) -> str:
        return self.letter + ("=" if self.back else "") + (PART if self.dropped else "")


def dialects() -> dict[str, Any]:
    """The dialects that persona writes."""
    loaded = {name: host().load("dialect", name) for name in host().provided("dialect")}
    return {
        name: one for name, one in loaded.items() if getattr(one, "names", True) is not None and name != "cloneofsimo"
    }


def ending(dialect: Any) -> str:
    """The file ending of a dialect; "" for a folder."""
    return "" if dialect.slots.folder else suffix_for(dialect, host())


def letter_of(steps: Iterable[Any]) -> str:
    """R, F, E or S by the worst of a plan's steps; modules that were left out do not count."""
    worst = "R"
    for step in steps:
        if step.action == "drop":
            continue
        if step.cost == "approximate":
            return "S"
        if step.cost == "one rounding":
            worst = "F"
        elif step.action in ("expand", "join", "split", "svd", "fold") and worst == "R":
            worst = "E"
    return worst


def made(source: Path, target: Path, to: str, family: str, before: Adapter, known: dict[str, Factors]) -> Cell:
    """Convert, read back, compare every ΔW with that of `before`, whose factors are `known`."""
    try:
        report = persona.convert(source, target, to=to, family=family, drop=True)
        after = persona.load(target, family=family)
    except persona.PersonaError as error:
        return Cell("×", reason=error.message)
    assert isinstance(after, Adapter)
    found = low_rank(after)
    dropped = left_out(report.steps)
    if set(known) - set(found) != set(dropped):
        raise AssertionError(f"{source.name} -> {to}: what is missing is not what was said to be left out")
    # a joined module also names parts that were not there: rows of zeros
    if any(not is_zero(found[name]) for name in found if name not in known):
        raise AssertionError(f"{source.name} -> {to}: other modules than before")
    errors = {name: distance(known[name], found[name]) for name in known if name in found}
    for name, error in by_oracle(before, after, witnesses({name: known[name] for name in errors})).items():
        if abs(error - errors[name]) > 1e-6:
            raise AssertionError(f"{source.name} -> {to}: {name}: {errors[name]:.2e}, by the oracle {error:.2e}")
    letter = letter_of(report.steps)
    if max(errors.values()) > WORST[letter]:
        raise AssertionError(f"{source.name} -> {to}: {letter} has an error of {max(errors.values()):.2e}")
    return Cell(letter, max(errors.values()), dropped=len(dropped))


def left_out(steps: Iterable[Any]) -> dict[str, str]:
    """`component.path` -> why, of each module that `--drop` left out; a joined one by its parts."""
    found = {}
    for step in steps:
        if step.action == "drop":
            component, _, path = step.module.partition(".")
            found.update({f"{component}.{part}": step.detail for part in members(path)})
    return found


def same_tensors(first: Path, second: Path, *, part: bool) -> bool:
    """Whether two files or folders hold the same tensors, bit for bit, under the same names; with `part`, whether
    those of the second are all in the first."""
    left, right = tensors(first), tensors(second)
    names = set(left) >= set(right) if part else set(left) == set(right)
    return names and all(np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes() for name in right)


def tensors(path: Path) -> dict[str, Any]:
    """Every tensor of a file, or of a PEFT folder and the folders of its components in it, by name."""
    if not path.is_dir():
        return dict(persona.read_state(path))
    files = path.rglob("adapter_model.safetensors")
    return {
        f"{one.parent.name}/{name}" if one.parent != path else name: ref
        for one in files
        for name, ref in persona.read_state(one).items()
    }


@dataclass(frozen=True)
class Table:
    """A family's cells, (from, to) -> Cell; what each dialect leaves out of the whole adapter, by reason; those that
    cannot spell any of it, with the reason; and what was converted."""

    cells: dict[tuple[str, str], Cell]
    held: dict[str, tuple[str, Counter[str]]]
    absent: dict[str, str]
    content: str
    seconds: float = 0.0
    peak: int = 0


def family_table(family: str, folder: Path) -> Table:
    """Every cell of a family."""
    adapter = plain_lora(family)
    table = Table({}, {}, {}, counted(adapter.entries))
    firsts: dict[str, Path] = {}
    for source, spoken in dialects().items():
        first = folder / f"{source}{ending(spoken)}"
        try:
            report = deliver(adapter, [], first, Wish(to=source, family=family, drop=True), host())
            persona.load(first, family=family)
        except persona.PersonaError as error:
            table.absent[source] = error.message.replace(f"{folder}{os.sep}", "")
            continue
        firsts[source] = first
        dropped = left_out(report.steps)
        kept = counted(key for key in adapter.entries if ".".join(key) not in dropped)
        table.held[source] = kept, Counter(dropped.values())
    for source, first in firsts.items():
        before = persona.load(first, family=family)
        assert isinstance(before, Adapter)
        known = low_rank(before)
        for target in firsts:
            second = folder / f"{source} to {target}{ending(dialects()[target])}"
            cell = made(first, second, target, family, before, known)
            if cell.letter != "×":
                cell = replace(cell, back=comes_back(first, second, source, family, folder, part=cell.dropped > 0))
                remove(second)
            table.cells[source, target] = cell
    return table


def remove(path: Path) -> None:
    """A file or a folder that is no longer needed."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def family_cells(family: str) -> Table:
    """`family_table` in a temporary folder, with the processor time and the peak memory (bytes) of making it."""
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="persona-matrix-") as name:
        table = family_table(family, Path(name))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return replace(table, seconds=time.process_time() - started, peak=peak)


def comes_back(first: Path, second: Path, dialect: str, family: str, folder: Path, *, part: bool) -> bool:
    """Whether converting back gives the first file's tensors, those of every module that was not left out."""
    third = folder / f"back {second.name} {dialect}{first.suffix}"
    try:
        persona.convert(second, third, to=dialect, family=family)
    except persona.PersonaError:
        return False
    same = same_tensors(first, third, part=part)
    if part and same:  # a module lost on the way back would leave fewer tensors, all of them right
        same = len(low_rank(persona.load(third, family=family))) == len(low_rank(persona.load(second, family=family)))
    remove(third)
    return same


def algorithm_table(folder: Path) -> dict[tuple[str, str], Cell]:
    """(algorithm, dialect) -> Cell; W where the base model's weight is needed."""
    cells = {}
    for number, (name, adapter) in enumerate(algorithms().items()):
        first = folder / f"algorithm{number}.safetensors"
        persona.save(adapter, first, to="kohya")
        read = persona.load(first, family="sd1")
        for target, heard in dialects().items():
            second = folder / f"algorithm{number} to {target}{ending(heard)}"
            cells[name, target] = _algorithm_cell(first, second, target, read)
    return cells


def _algorithm_cell(first: Path, second: Path, target: str, before: Adapter) -> Cell:
    from persona.core.adapters.delta import needs_base

    try:
        report = persona.convert(first, second, to=target, family="sd1")
    except persona.PersonaError as error:
        return Cell("W" if "base model's weight" in error.message else "×", reason=error.message)
    after = persona.load(second, family="sd1")
    letter, entry = letter_of(report.steps), next(iter(before.entries.values()))
    if needs_base(entry):  # any base will do to compare two readings of it
        shape = (320, 320)
        base = {entry.name: np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
        error = relative_error(before.deltas(base)[entry.name], after.deltas(base)[entry.name])
    else:
        error = relative_error(before.deltas()[entry.name], after.deltas()[entry.name])
    if error > (0.0 if letter == "R" else 1e-6):
        raise AssertionError(f"{first} -> {target}: {letter} has an error of {error:.2e}")
    return Cell(letter, error)


def as_markdown(cells: Mapping[tuple[str, str], Cell], corner: str) -> list[str]:
    """A table with rows and columns in order of appearance, and the reasons of refusals below."""
    rows, columns = (list(dict.fromkeys(key[place] for key in cells)) for place in (0, 1))
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for row in rows:
        lines.append(f"| {row} | " + " | ".join(str(cells[row, column]) for column in columns) + " |")
    return lines


def reasons(cells: Mapping[tuple[str, str], Cell]) -> list[str]:
    """Why cells are refused: for each target, what it says of the first source."""
    found: dict[str, str] = {}
    for (_, target), cell in cells.items():
        if cell.letter == "×":
            found.setdefault(target, cell.reason)
    return [f"- {target}: {reason}" for target, reason in found.items()]


def holdings(table: Table) -> list[str]:
    """What each dialect holds of the whole adapter, and why it leaves out the rest."""
    lines = ["| dialect | holds | leaves out |", "|---|---|---|"]
    for name, (kept, dropped) in table.held.items():
        why = "; ".join(f"{number}: {reason}" for reason, number in dropped.items())
        lines.append(f"| {name} | {kept} | {why or 'nothing'} |")
    return lines


HEAD = """# From any dialect to any other

Written by `python benchmarks/matrix.py`, which really makes every conversion: a float16 LoRA (alpha 3, rank 4) at the
model's real widths, on every linear layer and convolution of one whole block of each form and width, in every component
(denoiser and text encoders, T5 too): attention, feed-forward, projections, modulation, resnets, samplers, embedders.
Blocks that repeat one of these (same form, same shapes) are left out; Stable Diffusion 3 is the medium one.

Each ΔW that comes out is compared with the one that went in: by Gram matrices of the factors (equal factors are an
error of 0), and for one module of each component also by the oracle (`persona/core/adapters/delta.py`); both agree.
What a row starts from is what its dialect holds of the adapter, listed below each table.

| letter | meaning | relative error of ΔW allowed here |
|---|---|---|
| R | renamed, reshaped or transposed; no number changes | 0 |
| E | exact algebra: split, joined, expanded, or a scale that is a power of two | 2⁻⁹ (rounding of the new factors) |
| F | the scale goes into the factors: one rounding | 2⁻⁹ |
| S | singular values, an approximation (only with `--rank`) | |
| W | needs the base model's weight (`--base`) | |
| × | refused: the target has no name or no place for any of it | |

`=` behind a letter: converted back, every tensor of the first file is there again, bit for bit.
`◐` behind a letter: part. The target cannot hold every module of the source: the conversion is refused without
`--drop`, and with it, as here, leaves those modules out and names them; letter, error and `=` are of those it holds.

A dialect is "not in" a family's table when that adapter could not be written in it, or not be read back; where the
reason names a module or a file, that is a limit of persona.
"""


def family_section(family: str, table: Table) -> list[str]:
    """A family's tables and figures."""
    held = [cell for cell in table.cells.values() if cell.letter != "×"]
    lines = [f"## {FAMILIES[family].title}", "", f"Modules: {table.content}.", ""]
    lines += [*as_markdown(table.cells, "from \\ to"), ""]
    lines += [
        f"{len(held)} conversions, {sum(cell.dropped > 0 for cell in held)} of a part, "
        f"{sum(cell.back for cell in held)} come back bit for bit, "
        f"worst relative error {max(cell.error for cell in held):.1e}.",
        "",
    ]
    lines += [*holdings(table), ""]
    lines += [*[f"- not in {name}: {reason}" for name, reason in table.absent.items()], ""] if table.absent else []
    return lines + (["Refused because:", "", *reasons(table.cells), ""] if len(held) < len(table.cells) else [])


def main() -> int:
    """Make the tables; print one family's or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SHOWN, help="print this family's table only")
    arguments = parser.parse_args()
    if arguments.family:
        table = family_cells(arguments.family)
        print("\n".join(family_section(arguments.family, table)))
        print(f"{table.seconds:.0f} s of processor time, peak {table.peak / 2**20:.0f} MiB")
        return 0
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="persona-matrix-") as name:
        by_algorithm = algorithm_table(Path(name))
    seconds = time.process_time() - started
    with ProcessPoolExecutor(min(len(SHOWN), os.cpu_count() or 1, 2), max_tasks_per_child=1) as pool:
        tables = list(pool.map(family_cells, SHOWN))
    seconds += sum(table.seconds for table in tables)
    lines = [HEAD]
    lines += [
        f"Made on {date.today().isoformat()} in {seconds:.0f} s of processor time, at most two families at once; "
        f"the largest process had {max(table.peak for table in tables) / 2**20:.0f} MiB at its peak.",
        "",
    ]
    for family, table in zip(SHOWN, tables, strict=True):
        lines += family_section(family, table)
    lines += ["## By algorithm", "", "From a kohya (LyCORIS) file with one module of Stable Diffusion 1.x.", ""]
    lines += [*as_markdown(by_algorithm, "algorithm \\ to"), ""]
    PAGE.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
