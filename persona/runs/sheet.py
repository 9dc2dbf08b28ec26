"""Contact sheets: pictures in a grid with words beside and above, drawn with Pillow's own font."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from persona.core.training.run import write_atomically

MARGIN = 12
TEXT_HEIGHT = 18
INK = (32, 32, 32)
PAPER = (255, 255, 255)


def draw_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    *,
    beside: Sequence[Image.Image] = (),
    beside_name: str = "",
    cell: int = 192,
) -> Image.Image:
    """A grid of pictures, `cell` pixels a side, `row_names` left of it and `column_names` above; `beside` is a column
    of reference pictures at the far left."""
    font = ImageFont.load_default(size=14)
    name_width = 190 if any(row_names) else 0
    beside_cell = min(cell, (len(rows) * (cell + MARGIN)) // max(1, len(beside)) - MARGIN) if beside else 0
    left = MARGIN + (beside_cell + 2 * MARGIN if beside else 0)
    top = MARGIN + 2 * TEXT_HEIGHT
    width = left + name_width + len(column_names) * (cell + MARGIN)
    height = top + len(rows) * (cell + MARGIN)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    if beside:
        pen.text((MARGIN, MARGIN), beside_name, fill=INK, font=font)
        for number, picture in enumerate(beside):
            sheet.paste(_fitted(picture, beside_cell), (MARGIN, top + number * (beside_cell + MARGIN)))
    for number, name in enumerate(column_names):
        pen.text((left + name_width + number * (cell + MARGIN), MARGIN), name, fill=INK, font=font)
    for number, (name, pictures) in enumerate(zip(row_names, rows, strict=True)):
        y = top + number * (cell + MARGIN)
        pen.multiline_text((left, y + 4), "\n".join(textwrap.wrap(name, 24)), fill=INK, font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(_fitted(picture, cell), (left + name_width + column * (cell + MARGIN), y))
    return sheet


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    picture = picture.convert("RGB")
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Small pictures are blown up without smoothing: what is seen is then what the model made.
    way = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize(size, way)


def save_picture(picture: Image.Image, path: Path, words: dict[str, str] | None = None) -> None:
    """Write a PNG, whole or not at all, with `words` as its text chunks."""
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    for key, value in (words or {}).items():
        information.add_itxt(key, value) if not value.isascii() else information.add_text(key, value)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=information)
    write_atomically(path, buffer.getvalue())


def _sample(path: Path, prompt: str) -> Image.Image:
    """A sampled picture; an empty one when this step sampled another prompt, as after a resume with new ones."""
    if path.is_file():
        picture = Image.open(path)
        if picture.info.get("prompt", prompt) == prompt:
            return picture
    return Image.new("RGB", (64, 64), PAPER)


def run_sheet(samples: Path, prompts: Sequence[str], references: Sequence[Path]) -> Image.Image | None:
    """The sheet of a run: rows = prompts, columns = steps, reference pictures beside. None without samples."""
    folders = sorted(samples.glob("step-*"))
    if not folders or not prompts:
        return None
    steps = [int(folder.name.removeprefix("step-")) for folder in folders]
    names = ["before" if step == 0 else f"step {step}" for step in steps]
    names[-1] = f"after {steps[-1]} steps" if steps[-1] else names[-1]
    rows = [
        [_sample(folder / f"{number:02d}.png", prompt) for folder in folders] for number, prompt in enumerate(prompts)
    ]
    pictures = [Image.open(path) for path in references[:5]]
    return draw_sheet(rows, list(prompts), names, beside=pictures, beside_name="references")
