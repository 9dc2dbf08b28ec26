"""`persona score`: what a judge says of pictures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from persona.runs.score import JudgedFolder


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("folders", nargs=-1, metavar="FOLDER...", required=True)
@click.option("--reference", default=None, metavar="DIR", help="Pictures of the subject; a run's default: its own.")
@click.option("--prompt", default=None, metavar="TEXT", help="What all pictures should show; default: what each says.")
@click.option(
    "--replace",
    "replacements",
    multiple=True,
    metavar="WORD=TEXT",
    help="Say a placeholder otherwise in the prompts (repeatable); sks= leaves it out.",
)
@click.option("--scorer", default="clip", show_default=True, metavar="NAME", help="Who judges.")
@click.option("--model", default="", metavar="MODEL", help="What it judges with: a folder or hub id; default: its own.")
@click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:1, npu, mps."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every picture of every folder.")
@click.pass_context
def score(
    context: click.Context,
    folders: tuple[str, ...],
    reference: str | None,
    prompt: str | None,
    replacements: tuple[str, ...],
    scorer: str,
    model: str,
    device: str,
    as_json: bool,
) -> None:
    """Judge the pictures of each FOLDER, or the samples of a run: is it the same subject as in the reference pictures,
    and is it what the prompt says?

    A placeholder such as sks means nothing to a judge: --replace sks= leaves it out. One folder is shown picture by
    picture, several by their means. Compare figures of the same model only.
    """
    from persona.cli import _host
    from persona.runs.score import parse_replacements, score_folders

    replace = parse_replacements(replacements)
    judge = _host(context).load("scorer", scorer)(model=model, device=device)
    judged = score_folders(
        judge,
        [Path(folder).expanduser() for folder in folders],
        reference=Path(reference).expanduser() if reference else None,
        prompt=prompt,
        replace=replace,
        note=lambda line: print(line, file=sys.stderr),
    )
    for line in getattr(judge, "notes", ()):
        print(line, file=sys.stderr)
    if as_json:
        document = {"scorer": scorer, "model": model or "embedded", "folders": [_document(one) for one in judged]}
        click.echo(json.dumps(document, ensure_ascii=False, indent=1))
        return
    _print_table(judged)


def _document(judged: JudgedFolder) -> dict[str, Any]:
    return {
        "folder": str(judged.folder),
        "means": _numbers(judged.means),
        "pictures": [{"path": str(one.path), "prompt": one.prompt, **_numbers(one.figures)} for one in judged.pictures],
    }


def _numbers(figures: Any) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else round(value, 6) for name, value in figures.items()}


def _print_table(judged: list[JudgedFolder]) -> None:
    """One folder: a row a picture and their mean. Several: a row a folder."""
    names = list(dict.fromkeys(name for one in judged for name in one.means))
    if len(judged) == 1:
        header = ["picture", *names, "prompt"]
        rows = [[one.path.name, *_cells(names, one.figures), one.prompt] for one in judged[0].pictures]
        rows.append([f"mean of {len(rows)}", *_cells(names, judged[0].means), ""])
    else:
        header = ["folder", *names, "pictures"]
        rows = [[str(one.folder), *_cells(names, one.means), str(len(one.pictures))] for one in judged]
    titles = [title.replace("_", " ") for title in header]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cells(names: list[str], figures: Any) -> list[str]:
    values = [figures.get(name, math.nan) for name in names]
    return ["-" if math.isnan(value) else f"{value:.3f}" for value in values]
