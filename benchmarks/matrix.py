"""From which dialect to which, and at what cost: every cell is a real conversion, checked.

    python benchmarks/matrix.py                    write docs/matrix.md
    python benchmarks/matrix.py --family sd1       print one family's table

For each family a LoRA in float16 is made on one attention projection of every form (all widths of the real model, one
of the equal blocks), alpha 3 of rank 4, so that no scale is a power of two. It is written in every dialect, converted
to every other, read back, and each ΔW compared with the source's by the oracle; then converted back, and its tensors
compared bit for bit with the first file's. A second table does the same for each algorithm, from kohya's dialect."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # persona, where it is not installed

import persona
from persona.api import host
from persona.core.adapters.certificate import relative_error
from persona.core.adapters.entry import Adapter, Entry, Magnitude, Scale
from persona.core.adapters.evidence import form
from persona.core.adapters.family import Module, inventory
from persona.core.adapters.tensor import in_memory
from persona.exchange.choices import suffix_for
from persona.formats.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "matrix.md"
SHOWN = ("sd1", "sdxl", "sd3", "flux1")
RANK, ALPHA = 4, 3.0
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WORST = {"R": 0.0, "F": 2.0**-9, "E": 2.0**-9, "S": 1.0}
"""The relative error of ΔW that a cell may have: float16 rounds by 2⁻¹¹ of a value, and factors multiply."""


@dataclass(frozen=True)
class Cell:
    """A conversion that was made: its letter, the worst relative error of ΔW, whether it comes back bit for bit."""

    letter: str
    error: float = 0.0
    back: bool = False
    reason: str = ""

    def __str__(self) -> str:
        if self.letter == "×":
            return "×"
        return self.letter + ("=" if self.back else "")


def attention_modules(family: str) -> list[Module]:
    """The attention projections of one block of every width and kind in the denoiser: whole blocks, so that dialects
    which join q, k and v find all three."""
    config = FAMILIES[family].components[FAMILIES[family].denoiser][0]
    blocks: dict[tuple[str, tuple[int, ...]], str] = {}
    for path, module in inventory(config).items():
        block, found, rest = path.rpartition(".to_k")
        if found and not rest and ".attn" in path:
            blocks.setdefault((block.rsplit(".", 1)[-1] + form(path).split(".")[0][:6], module.shape), block)
    wanted = set(blocks.values())
    return [m for p, m in inventory(config).items() if p.endswith(ATTENTION) and p.rsplit(".to_", 1)[0] in wanted]


def plain_lora(family: str) -> Adapter:
    """Low-rank deltas on `attention_modules`, float16, alpha 3 of rank 4."""
    random = np.random.default_rng(7)
    component = FAMILIES[family].denoiser
    entries = {}
    for module in attention_modules(family):
        out, into = module.shape[:2]
        factors = {
            "down": in_memory((random.standard_normal((RANK, into)) / 8).astype(np.float16)),
            "up": in_memory((random.standard_normal((out, RANK)) / 8).astype(np.float16)),
        }
        scale = Scale(ALPHA, RANK, "rank", "told")
        entries[component, module.path] = Entry(component, module.path, "lora", factors, scale, kernel=module.kernel)
    return Adapter(family, entries, families=frozenset({family}))


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
    """R, F, E or S by the worst of a plan's steps."""
    worst = "R"
    for step in steps:
        if step.cost == "approximate":
            return "S"
        if step.cost == "one rounding":
            worst = "F"
        elif step.action in ("expand", "join", "split", "svd", "fold") and worst == "R":
            worst = "E"
    return worst


def made(source: Path, target: Path, to: str, family: str, known: Mapping[str, Any]) -> Cell:
    """Convert, read back, compare every ΔW with `known`."""
    try:
        report = persona.convert(source, target, to=to, family=family, alpha=None)
        deltas = persona.load(target, family=family).deltas()
    except persona.PersonaError as error:
        return Cell("×", reason=error.message)
    if set(deltas) != set(known):
        # a joined module also names parts that were not there: rows of zeros
        added = [name for name in deltas if name not in known]
        if any(name not in deltas for name in known) or any(deltas[name].any() for name in added):
            raise AssertionError(f"{source} -> {target}: other modules than before")
    error = max(relative_error(known[name], deltas[name].reshape(known[name].shape)) for name in known)
    letter = letter_of(report.steps)
    if error > WORST[letter]:
        raise AssertionError(f"{source.name} -> {to}: {letter} has an error of {error:.2e}")
    return Cell(letter, error)


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two files or folders hold the same tensors, bit for bit, under the same names."""
    files = [path / "adapter_model.safetensors" if path.is_dir() else path for path in (first, second)]
    left, right = (persona.read_state(path) for path in files)
    return set(left) == set(right) and all(
        np.asarray(left[name]).tobytes() == np.asarray(right[name]).tobytes() for name in left
    )


def family_table(family: str, folder: Path) -> tuple[dict[tuple[str, str], Cell], dict[str, str]]:
    """Every cell of a family, (from, to) -> Cell; and the dialects that cannot spell it, with the reason."""
    adapter = plain_lora(family)
    cells: dict[tuple[str, str], Cell] = {}
    absent: dict[str, str] = {}
    start = folder / "start.safetensors"
    persona.save(adapter, start, to="kohya")
    for source, spoken in dialects().items():
        first = folder / f"{source}{ending(spoken)}"
        try:
            persona.convert(start, first, to=source, family=family)
            before = persona.load(first, family=family).deltas()
            known = {name: before[name] for name in before}
        except persona.PersonaError as error:
            absent[source] = error.message
            continue
        for target, heard in dialects().items():
            second = folder / f"{source} to {target}{ending(heard)}"
            cell = made(first, second, target, family, known)
            if cell.letter != "×":
                cell = Cell(cell.letter, cell.error, comes_back(first, second, source, family, folder))
            cells[source, target] = cell
    return {key: cell for key, cell in cells.items() if key[1] not in absent}, absent


def family_cells(family: str) -> tuple[dict[tuple[str, str], Cell], dict[str, str]]:
    """`family_table` in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="persona-matrix-") as name:
        return family_table(family, Path(name))


def comes_back(first: Path, second: Path, dialect: str, family: str, folder: Path) -> bool:
    """Whether converting back gives the first file's tensors."""
    third = folder / f"back {second.name} {dialect}{first.suffix}"
    try:
        persona.convert(second, third, to=dialect, family=family)
    except persona.PersonaError:
        return False
    return same_tensors(first, third)


def algorithms() -> dict[str, Adapter]:
    """One adapter for each algorithm, on modules of SD1's UNet, float32."""
    random = np.random.default_rng(11)
    query = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 320 x 320
    conv = "down_blocks.1.resnets.0.conv1"  # 640 x 320 x 3 x 3
    norm = "down_blocks.0.resnets.0.norm1"  # 320

    def numbers(*shape: int) -> Any:
        return in_memory((random.standard_normal(shape) / 8).astype(np.float32))

    def one(path: str, algorithm: str, factors: dict[str, Any], mode: str = "rank", **more: Any) -> Adapter:
        scale = Scale(ALPHA if mode == "rank" else None, RANK, mode, "told" if mode == "rank" else "not applicable")  # type: ignore[arg-type]
        entry = Entry("unet", path, algorithm, factors, scale, **more)  # type: ignore[arg-type]
        return Adapter("sd1", {("unet", path): entry}, families=frozenset({"sd1"}))

    linear = {"down": numbers(RANK, 320), "up": numbers(320, RANK)}
    halves = {"w1_a": numbers(320, 2), "w1_b": numbers(2, 320), "w2_a": numbers(320, 2), "w2_b": numbers(2, 320)}
    return {
        "LoRA, linear": one(query, "lora", linear),
        "LoRA, 3x3 convolution": one(
            conv, "lora", {"down": numbers(RANK, 320, 3, 3), "up": numbers(640, RANK, 1, 1)}, kernel=(3, 3)
        ),
        "LoRA, Tucker": one(
            conv,
            "lora",
            {"down": numbers(RANK, 320, 1, 1), "mid": numbers(RANK, RANK, 3, 3), "up": numbers(640, RANK, 1, 1)},
            kernel=(3, 3),
        ),
        "DoRA, output axis": one(query, "lora", linear, magnitude=Magnitude(numbers(320), "out")),
        "DoRA, input axis": one(query, "lora", linear, magnitude=Magnitude(numbers(320), "in")),
        "LoHa": one(query, "loha", halves),
        "LoKr": one(query, "lokr", {"w1": numbers(16, 16), "w2_a": numbers(20, RANK), "w2_b": numbers(RANK, 20)}),
        "IA3": one(query, "ia3", {"weight": numbers(320), "on_input": in_memory(np.array(False))}, "none"),
        "GLoRA": one(
            query,
            "glora",
            {"a1": numbers(320, RANK), "a2": numbers(RANK, 320), "b1": numbers(320, RANK), "b2": numbers(RANK, 320)},
        ),
        "whole difference": one(query, "full", {"diff": numbers(320, 320)}, "none"),
        "norm difference": one(norm, "norm", {"diff": numbers(320)}, "none"),
    }


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


HEAD = """# From any dialect to any other

Written by `python benchmarks/matrix.py`, which really makes every conversion: a float16 LoRA (alpha 3, rank 4) on the
attention projections of the family's denoiser, at the model's real widths. Each ΔW that comes out is compared with the
one that went in by the oracle (`persona/core/adapters/delta.py`).

| letter | meaning | relative error of ΔW allowed here |
|---|---|---|
| R | renamed, reshaped or transposed; no number changes | 0 |
| E | exact algebra: split, joined, expanded, or a scale that is a power of two | 2⁻⁹ (rounding of the new factors) |
| F | the scale goes into the factors: one rounding | 2⁻⁹ |
| S | singular values, an approximation (only with `--rank`) | |
| W | needs the base model's weight (`--base`) | |
| × | refused: the target has no name or no place for it | |

`=` behind a letter: converted back, every tensor of the first file is there again, bit for bit.
"""


def main() -> int:
    """Make the tables; print one family's or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=SHOWN, help="print this family's table only")
    arguments = parser.parse_args()
    if not arguments.family:
        with tempfile.TemporaryDirectory(prefix="persona-matrix-") as name:
            by_algorithm = algorithm_table(Path(name))
    lines = [HEAD]
    families = [arguments.family] if arguments.family else list(SHOWN)
    with ProcessPoolExecutor(min(len(families), os.cpu_count() or 1)) as pool:
        tables = list(pool.map(family_cells, families))
    for family, (cells, absent) in zip(families, tables, strict=True):
        worst = max(cell.error for cell in cells.values())
        back = sum(cell.back for cell in cells.values())
        kept = sum(cell.letter != "×" for cell in cells.values())
        lines += [f"## {FAMILIES[family].title}", "", *as_markdown(cells, "from \\ to"), ""]
        lines += [f"{kept} conversions, {back} come back bit for bit, worst relative error {worst:.1e}.", ""]
        lines += [*[f"- not in {name}: {reason}" for name, reason in absent.items()], ""] if absent else []
        lines += ["Refused because:", "", *reasons(cells), ""] if kept < len(cells) else []
    if not arguments.family:
        lines += ["## By algorithm", "", "From a kohya (LyCORIS) file with one module of Stable Diffusion 1.x.", ""]
        lines += [*as_markdown(by_algorithm, "algorithm \\ to"), ""]
        PAGE.write_text("\n".join(lines), encoding="utf-8")
        print(f"wrote {PAGE}")
    else:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
