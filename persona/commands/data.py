"""`persona data`: pictures as a trainer will see them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from persona.core.training.pictures import Problem, Scan
    from persona.core.training.preview import Seen


class PictureSize(click.ParamType):  # type: ignore[type-arg]
    """A side in pixels (512) or a width and height (768x512)."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        """(width, height)."""
        match = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", str(value).strip())
        if not match or not int(match[1]) or match[2] == "0":
            self.fail(f"{value!r} is no size; write 512 or 768x512.", parameter, context)
        return int(match[1]), int(match[2] or match[1])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def data() -> None:
    """Look at pictures the way a trainer will."""


@data.command()
@click.argument("folder", metavar="DIR")
@click.option(
    "--size", type=PictureSize(), metavar="PIXELS", help="Training size: 512 or 768x512; default: the base's."
)
@click.option("--base", default="mini", show_default=True, metavar="BASE", help="Base model whose size is meant.")
@click.option("--buckets", "into_buckets", is_flag=True, help="Fit each picture to its nearest aspect bucket.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check(
    context: click.Context, folder: str, size: tuple[int, int] | None, base: str, into_buckets: bool, as_json: bool
) -> None:
    """Show what a trainer will see of the pictures in DIR: size, crop, caption, and everything that is odd.

    Exit code 1 when there is nothing to train on.
    """
    from persona.core.host.errors import PersonaError
    from persona.core.training.pictures import scan
    from persona.core.training.preview import preview

    size, factor = _size(size, base, context)
    try:
        found = scan(folder)
    except PersonaError as error:
        if not as_json:
            raise
        click.echo(
            json.dumps({"pictures": [], "error": error.message, "hint": error.hint}, ensure_ascii=False, indent=1)
        )
        context.exit(1)
    seen = preview(found, size, into_buckets=into_buckets, factor=factor)
    if as_json:
        click.echo(json.dumps(as_document(folder, size, seen, found), ensure_ascii=False, indent=1))
        return
    _print_table(seen, into_buckets)
    click.echo(summary(folder, size, seen, found))
    for line in problem_lines(seen, found):
        click.echo(line)


def _size(size: tuple[int, int] | None, base: str, context: click.Context) -> tuple[tuple[int, int], int]:
    """The training size and the VAE's factor; the size is rounded down to that factor, as training does."""
    if size is None:
        from persona.cli import _host
        from persona.runs.bases import open_any_base

        opened = open_any_base(base, _host(context), lambda text: click.echo(text, err=True))
        return (opened.native_size, opened.native_size), opened.latent_factor
    factor = 8  # every autoencoder of the families that are known
    return (max(factor, size[0] // factor * factor), max(factor, size[1] // factor * factor)), factor


def as_document(folder: str, size: tuple[int, int], seen: Sequence[Seen], found: Scan) -> dict[str, Any]:
    """The whole answer as JSON data; sizes are [width, height], a crop is [left, top] in the resized picture."""
    return {
        "folder": str(Path(folder).expanduser().absolute()),
        "size": list(size),
        "pictures": [
            {
                "path": one.picture.path,
                "size": list(one.picture.size),
                "resized": list(one.fit.resized),
                "crop": [one.fit.left, one.fit.top],
                "trained_at": list(one.fit.size),
                "lost": round(one.fit.lost, 4),
                "bucket": list(one.bucket),
                "captions": list(one.picture.captions),
                "mask": one.picture.mask,
                "repeats": one.picture.repeats,
                "sha256": one.picture.sha256,
                "warnings": list(one.warnings),
            }
            for one in seen
        ],
        "problems": [
            {"path": problem.path, "message": problem.message, "hint": problem.hint, "used": problem.used}
            for problem in _others(seen, found)
        ],
    }


def _others(seen: Iterable[Seen], found: Scan) -> list[Problem]:
    """The problems that are not already a warning of a picture."""
    shown = {one.picture.path for one in seen}
    return [problem for problem in found.problems if problem.path not in shown]


def _rows(seen: Sequence[Seen], into_buckets: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; columns that say the same for every picture are left out."""
    repeats = any(one.picture.repeats != 1 for one in seen)
    masks = any(one.picture.mask for one in seen)
    header = ["picture", "size", "resized to", "crop lost", *(["bucket"] if into_buckets else [])]
    header += [*(["repeats"] if repeats else []), *(["mask"] if masks else []), "caption"]
    rows = []
    for one in seen:
        row = [Path(one.picture.path).name, _by(one.picture.size), _by(one.fit.resized), f"{one.fit.lost:.0%}"]
        row += [_by(one.bucket)] if into_buckets else []
        row += [str(one.picture.repeats)] if repeats else []
        row += ["yes" if one.picture.mask else ""] if masks else []
        rows.append([*row, _caption(one.picture.captions)])
    return header, rows


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _caption(captions: Sequence[str]) -> str:
    if not captions:
        return "(none)"
    first = captions[0] if len(captions[0]) <= 60 else captions[0][:59] + "…"
    return first + (f" (and {len(captions) - 1} more)" if len(captions) > 1 else "")


def _print_table(seen: Sequence[Seen], into_buckets: bool) -> None:
    header, rows = _rows(seen, into_buckets)
    if sys.stdout.isatty():
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header, box=SIMPLE)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def summary(folder: str, size: tuple[int, int], seen: Sequence[Seen], found: Scan) -> str:
    """One line: how many pictures, at which size, and how many are left out."""
    left_out = sum(not problem.used for problem in found.problems)
    captioned = sum(bool(one.picture.captions) for one in seen)
    text = f"{folder}: {len(seen)} pictures to train on at {_by(size)}, {captioned} with captions of their own"
    return text + (f"; {left_out} left out" if left_out else "")


def problem_lines(seen: Sequence[Seen], found: Scan) -> list[str]:
    """What to know, a line each; a warning that many pictures share is told once, with the first of them."""
    pictures: dict[str, list[str]] = {}
    for one in seen:
        for warning in one.warnings:
            pictures.setdefault(warning, []).append(Path(one.picture.path).name)
    lines = [
        f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {warning}"
        for warning, names in pictures.items()
    ]
    for problem in _others(seen, found):
        state = "" if problem.used else "left out: "
        hint = f" {problem.hint}" if problem.hint else ""
        lines.append(f"  {state}{Path(problem.path).name}: {problem.message}{hint}")
    return lines
