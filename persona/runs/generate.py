"""`persona generate`, without the command line: base + adapters → pictures, with the settings inside each PNG."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from persona import __version__
from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.host.errors import OutputExists, UsageError
from persona.core.host.host import Host
from persona.core.training.run import clear_disk_errors
from persona.runs.abilities import refuse_unable_to_sample
from persona.runs.backends import choose_backend
from persona.runs.bases import open_any_base
from persona.runs.sheet import draw_sheet, save_picture


@dataclass(frozen=True)
class Wish:
    """What pictures are wanted. `adapters` are (file, strength); every prompt is made `count` times, with seeds
    seed, seed + 1, …"""

    prompts: tuple[str, ...]
    base: str = "mini"
    adapters: tuple[tuple[str, float], ...] = ()
    negative_prompt: str = ""
    seed: int = 0
    count: int = 1
    width: int = 0
    height: int = 0
    steps: int = 30
    guidance_scale: float = 5.0
    sampler: str = "ddim"
    backend: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    batch: int = 4


def parse_adapter(text: str) -> tuple[str, float]:
    """`FILE` or `FILE:STRENGTH`. A file whose own name ends in `:number` is taken as a file when it exists."""
    if Path(text).exists():
        return text, 1.0
    file, sign, number = text.rpartition(":")
    if not sign:
        return text, 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if math.isfinite(strength):
        return file, strength
    if Path(file).exists():
        raise UsageError(f"The strength {number!r} is not a number.", hint=f"For example: --adapter {file}:0.8")
    return text, 1.0


def check_wish(wish: Wish) -> None:
    """Raises UsageError for a wish without a prompt."""
    if not wish.prompts:
        raise UsageError("There is no prompt.", hint='Say what to make: --prompt "a red apple"')


def make_pictures(wish: Wish, host: Host, note: Callable[[str], None] = lambda text: None) -> list[Image.Image]:
    """The pictures of a wish: prompt by prompt, seed by seed."""
    from persona.api import load
    from persona.core.adapters.entry import Adapter

    check_wish(wish)
    base = open_any_base(wish.base, host, note)
    adapters = []
    for file, strength in wish.adapters:
        adapter = load(file)
        if not isinstance(adapter, Adapter):
            raise UsageError(f"{file} is a whole model, not an adapter.", hint=f"Use it as the base: --base {file}")
        adapters.append((adapter, strength))
    backend = choose_backend(host, wish.backend)
    refuse_unable_to_sample(backend, wish.sampler, wish.precision, wish.device)
    session = backend.open(base, None, Runtime(wish.device, wish.precision))
    try:
        for line in session.load_adapters(adapters) if adapters else ():
            note(line)
        prompts = tuple(prompt for prompt in wish.prompts for _ in range(wish.count))
        seeds = tuple(wish.seed + number for _ in wish.prompts for number in range(wish.count))
        request = SampleRequest(
            prompts=prompts,
            seeds=seeds,
            negative_prompt=wish.negative_prompt,
            width=wish.width or base.native_size,
            height=wish.height or base.native_size,
            steps=wish.steps,
            guidance_scale=wish.guidance_scale,
            sampler=wish.sampler,
            batch=wish.batch,
        )
        pixels = session.sample(request)
        for line in session.notes:
            note(line)
        return [Image.fromarray(picture) for picture in pixels]
    finally:
        session.close()


def settings_text(wish: Wish, prompt: str, seed: int, size: tuple[int, int]) -> dict[str, str]:
    """What a PNG says of itself: `parameters` as A1111 and Civitai read them, and `persona` as JSON."""
    lines = [prompt]
    if wish.negative_prompt:
        lines.append(f"Negative prompt: {wish.negative_prompt}")
    lines.append(
        f"Steps: {wish.steps}, Sampler: {wish.sampler}, CFG scale: {wish.guidance_scale:g}, Seed: {seed}, "
        f"Size: {size[0]}x{size[1]}, Model: {wish.base}, Version: persona {__version__}"
    )
    document = {
        "prompt": prompt,
        "negative_prompt": wish.negative_prompt,
        "seed": seed,
        "size": list(size),
        "steps": wish.steps,
        "sampler": wish.sampler,
        "guidance_scale": wish.guidance_scale,
        "base": wish.base,
        "adapters": [{"file": Path(file).name, "strength": strength} for file, strength in wish.adapters],
        "version": __version__,
    }
    return {"parameters": "\n".join(lines), "persona": json.dumps(document, ensure_ascii=False)}


def write_pictures(wish: Wish, pictures: Sequence[Image.Image], folder: Path) -> list[Path]:
    """Write each picture as `folder/NNNN.png` under the next free number."""
    with clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(file.stem) for file in folder.glob("*.png") if file.stem.isdigit()]
        number = max(taken, default=-1) + 1
        paths = []
        for place, picture in enumerate(pictures):
            prompt, seed = wish.prompts[place // wish.count], wish.seed + place % wish.count
            path, number = _next_free(folder, number)
            save_picture(picture, path, settings_text(wish, prompt, seed, picture.size))
            paths.append(path)
    return paths


def _next_free(folder: Path, number: int) -> tuple[Path, int]:
    """Take the first free `folder/NNNN.png` from `number` on, even when another process is writing there, too; and the
    number after it."""
    while True:
        path = folder / f"{number:04d}.png"
        number += 1
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path, number


def check_places(folder: Path, grid: Path | None) -> None:
    """Raises before minutes are spent: OutputExists, UsageError for a sheet that would be no PNG, UnwritableOutput."""
    if grid and grid.exists():
        raise OutputExists(f"{grid} is there already.", hint="Choose another name: --grid FILE.png")
    if grid and grid.suffix.lower() != ".png":
        raise UsageError(f"The sheet {grid} has to be a PNG.", hint=f"For example: --grid {grid.with_suffix('.png')}")
    with clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_grid(wish: Wish, pictures: Sequence[Image.Image], path: Path) -> Path:
    """One sheet: rows = prompts, columns = seeds. Raises OutputExists."""
    if path.exists():
        raise OutputExists(f"{path} is there already.", hint="Choose another name: --grid FILE.png")
    rows = [pictures[start : start + wish.count] for start in range(0, len(pictures), wish.count)]
    names = [f"seed {wish.seed + number}" for number in range(wish.count)]
    with clear_disk_errors(path):
        save_picture(draw_sheet(rows, list(wish.prompts), names), path)
    return path
