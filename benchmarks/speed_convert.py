"""What it takes to convert, as whole processes, beside `cp` and fsync of the same bytes in the same run; and how much
memory. The files are made here: a LoRA of SDXL's size (560 attention modules, rank 16, float16, 44 MiB) in several
dialects, and a batch of them; with --large a whole model of 3.9 GB as well."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # persona, where it is not installed

from speed import Result, Row
from speed_startup import environment

TARGET_ONE, TARGET_MEMORY, TARGET_BATCH = 0.5, 60.0, 2.0
"""Seconds for one file, MiB of it, and times `cp` + fsync for the batch (without start-up, which is what an adapter of
one module takes)."""
BATCHES = 5
RANK = 16
KINDS = (("diffusers", ".safetensors"), ("kohya", ".safetensors"), ("ppdiffusers", ".pdparams"), ("mindone", ".ckpt"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measurement."""
    parser.add_argument("--repetitions", type=int, default=5, help="of every single conversion (default: 5)")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the batch (default: 1000)")
    parser.add_argument("--large", action="store_true", help="a 4 GB model too (needs 10 GB of disk)")
    parser.add_argument("--folder", default=None, help="where the files are made (default: a temporary folder)")


def make_lora(path: Path, dialect: str, seed: int, modules: int = 560) -> None:
    """A LoRA on the attention projections of SDXL's UNet (of 560, the first `modules`), alpha 8 of rank 16, random
    float16."""
    import numpy as np

    import persona
    from persona.core.adapters.entry import Adapter, Entry, Scale
    from persona.core.adapters.family import inventory
    from persona.core.adapters.tensor import in_memory
    from persona.formats.models.families import FAMILIES

    random = np.random.default_rng(seed)
    entries = {}
    for name, module in inventory(FAMILIES["sdxl"].components["unet"][0]).items():
        if ".attn" in name and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            out, into = module.shape[:2]
            factors = {
                "down": in_memory(random.standard_normal((RANK, into), np.float32).astype(np.float16)),
                "up": in_memory(random.standard_normal((out, RANK), np.float32).astype(np.float16)),
            }
            entries["unet", name] = Entry("unet", name, "lora", factors, Scale(8.0, RANK, "rank", "told"))
        if len(entries) == modules:
            break
    if dialect in ("ppdiffusers", "mindone"):  # no place for alpha there
        entries = {key: _without_scale(entry) for key, entry in entries.items()}
    persona.save(Adapter("sdxl", entries, families=frozenset({"sdxl"})), path, to=dialect)


def _without_scale(entry: object) -> object:
    from dataclasses import replace

    from persona.core.adapters.entry import Scale

    return replace(entry, scale=Scale(None, RANK))  # type: ignore[type-var]


@dataclass(frozen=True)
class Spent:
    """One whole process: wall and processor seconds, peak memory in MiB."""

    seconds: float
    processor: float
    memory: float


@functools.cache
def bytecode_folder() -> tempfile.TemporaryDirectory[str]:
    """Where the measured processes keep compiled modules, for as long as this process runs."""
    return tempfile.TemporaryDirectory(prefix="persona-bytecode-")


def as_installed() -> dict[str, str]:
    """The environment of what is measured: modules are compiled once, as an installed persona's are, even where
    PYTHONDONTWRITEBYTECODE keeps a checkout clean."""
    variables = {**environment(), "PYTHONPYCACHEPREFIX": bytecode_folder().name}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    return variables


def process(arguments: Sequence[str]) -> Spent:
    """Run it to its end. This process stays small, because a child's peak begins with its parent's size.
    Raises RuntimeError when it fails."""
    start = time.perf_counter()
    child = subprocess.Popen(arguments, env=as_installed(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {said.decode()[-500:]}")
    return Spent(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def copied(sources: Sequence[Path], folder: Path) -> float:
    """Seconds for `cp` of the files into a new folder, and fsync of each."""
    folder.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *map(str, sources), str(folder)], check=True)
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def persona_command(*arguments: str) -> list[str]:
    """`persona …` with this Python."""
    return [sys.executable, "-m", "persona", *arguments]


def measure(arguments: argparse.Namespace) -> Result:
    """Conversions of one file and of a batch."""
    with tempfile.TemporaryDirectory(prefix="persona-speed-", dir=arguments.folder) as name:
        folder = Path(name)
        sources = []
        for number, (dialect, ending) in enumerate(KINDS):
            sources.append(folder / f"{dialect}{ending}")
            process([sys.executable, __file__, str(sources[-1]), dialect, str(number)])
        found = [_singles(folder, sources, arguments.repetitions), _batch(folder, sources, arguments.megabytes)]
        if arguments.large:
            from speed_convert_large import large  # it takes its tools from here

            shutil.rmtree(folder / "batch")
            found.append(large(folder))
    facts = {name: fact for one in found for name, fact in one.facts.items()}
    return Result([row for one in found for row in one.rows], facts, [line for one in found for line in one.wrong])


def _singles(folder: Path, sources: Sequence[Path], repetitions: int) -> Result:
    diffusers, kohya = sources[:2]
    out = folder / "out.safetensors"
    commands = {
        "python -c 'import numpy'": [sys.executable, "-c", "import numpy"],
        "diffusers -> kohya": persona_command("convert", str(diffusers), str(out), "--to", "kohya"),
        "kohya -> diffusers": persona_command("convert", str(kohya), str(out), "--to", "diffusers"),
        "ppdiffusers -> kohya": persona_command("convert", str(sources[2]), str(out), "--to", "kohya"),
    }
    seconds: dict[str, list[float]] = {"cp + fsync": [], **{what: [] for what in commands}}
    spent: dict[str, list[Spent]] = {what: [] for what in commands}
    for repetition in range(repetitions + 1):
        found = {"cp + fsync": copied([diffusers], folder / "copy")}
        for what, command in commands.items():
            out.unlink(missing_ok=True)
            spent[what].append(process(command))
            found[what] = spent[what][-1].seconds
        if repetition:  # the first fills caches
            for what, value in found.items():
                seconds[what].append(value)
    targets = {"diffusers -> kohya": TARGET_ONE, "kohya -> diffusers": TARGET_ONE}
    rows = [Row(what, values, targets.get(what), beside="cp + fsync") for what, values in seconds.items()]
    memory = {what: max(one.memory for one in found) for what, found in spent.items()}
    facts = {
        what: f"{min(one.processor for one in found):.2f} s of a processor, {memory[what]:.0f} MiB at most"
        for what, found in spent.items()
    }
    facts["one file"] = f"{diffusers.stat().st_size / 2**20:.1f} MiB, 1120 tensors"
    wrong = [
        f"{what}: {memory[what]:.0f} MiB, {TARGET_MEMORY:.0f} allowed"
        for what in targets
        if memory[what] > TARGET_MEMORY
    ]
    return Result(rows, facts, wrong)


def _batch(folder: Path, sources: Sequence[Path], megabytes: int) -> Result:
    inside = folder / "batch"
    inside.mkdir()
    total, copies = 0, []
    while total < megabytes * 1_000_000:
        source = sources[len(copies) % len(sources)]
        copies.append(inside / f"{len(copies)}{source.suffix}")
        shutil.copyfile(source, copies[-1])
        total += source.stat().st_size
    os.sync()
    out = folder / "converted"
    copying: list[float] = []
    spent: list[Spent] = []
    startup: list[float] = []
    wrong: list[str] = []
    small, made = folder / "small.safetensors", folder / "small-kohya.safetensors"
    process([sys.executable, __file__, str(small), "diffusers", "0", "1"])
    for _ in range(BATCHES):
        copying.append(copied(copies, folder / "copy"))
        spent.append(process(persona_command("convert", str(inside), "--to", "kohya", "--out-dir", str(out))))
        count = len(list(out.iterdir()))
        if count != len(copies):
            wrong.append(f"the batch gave {count} files of {len(copies)}")
        shutil.rmtree(out)
        words = ("convert", str(small), str(made), "--to", "kohya", "--family", "sdxl")
        startup.append(process(persona_command(*words)).seconds)
        made.unlink()
    seconds = statistics.median(one.seconds for one in spent)
    ratio = (seconds - statistics.median(startup)) / statistics.median(copying)
    rows = [
        Row(f"cp + fsync, {len(copies)} files", copying),
        Row("batch to kohya", [one.seconds for one in spent], beside=f"cp + fsync, {len(copies)} files"),
        Row("one module alone (start-up)", startup),
    ]
    facts = {
        "batch": f"{total / 1e9:.2f} GB in {len(copies)} files of {len(sources)} dialects",
        "batch without start-up": f"{ratio:.2f} times cp + fsync (target {TARGET_BATCH:g})",
        "the batch": f"{min(one.processor for one in spent):.2f} s of a processor, "
        f"{max(one.memory for one in spent):.0f} MiB at most",
    }
    return Result(rows, facts, wrong)


if __name__ == "__main__":  # a process of its own makes the files: FILE DIALECT SEED MODULES
    make_lora(Path(sys.argv[1]), sys.argv[2], *(int(number) for number in sys.argv[3:]))
