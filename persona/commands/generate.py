"""`persona generate`: pictures from a base and adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to make (repeatable).")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="FILE[:STRENGTH]", help="An adapter of any format (repeatable)."
)
@click.option(
    "--base",
    default="mini",
    show_default=True,
    metavar="BASE",
    help="mini, a folder or single file of a model, a hub id, a run.",
)
@click.option("--negative-prompt", default="", metavar="TEXT", help="What to keep away from.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="The first picture's seed.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(1), help="Pictures per prompt.")
@click.option("--steps", default=30, show_default=True, type=click.IntRange(1), help="Sampler steps.")
@click.option(
    "--sampler", default="ddim", show_default=True, metavar="NAME", help="ddim, dpm++, euler, euler-a, unipc, lcm."
)
@click.option("--guidance-scale", default=5.0, show_default=True, type=float, help="Classifier-free guidance.")
@click.option("--width", default=0, type=click.IntRange(0), help="Pixels; 0 takes the base's own size.")
@click.option("--height", default=0, type=click.IntRange(0), help="Pixels; 0 takes the base's own size.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Pictures made at a time.")
@click.option("--backend", default=None, metavar="NAME", help="Framework; default: the first that is installed.")
@click.option(
    "--device", default="auto", show_default=True, metavar="DEVICE", help="auto, cpu, cuda, cuda:1, npu, mps."
)
@click.option(
    "--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]), help="Arithmetic."
)
@click.option("--output", default="pictures", show_default=True, metavar="DIR", help="Folder for the PNG files.")
@click.option("--grid", default=None, metavar="FILE.png", help="Write one sheet too: rows = prompts, columns = seeds.")
@click.option("--json", "as_json", is_flag=True, help="Print the files as JSON.")
@click.pass_context
def generate(
    context: click.Context,
    /,
    prompts: tuple[str, ...],
    adapters: tuple[str, ...],
    output: str,
    grid: str | None,
    as_json: bool,
    **values: object,
) -> None:
    """Make pictures. The settings are inside each PNG; nothing is overwritten."""
    from persona.cli import _host
    from persona.runs.generate import (
        Wish,
        check_places,
        check_wish,
        make_pictures,
        parse_adapter,
        write_grid,
        write_pictures,
    )

    wish = Wish(prompts=prompts, adapters=tuple(parse_adapter(text) for text in adapters), **values)  # type: ignore[arg-type]
    check_wish(wish)
    check_places(Path(output), Path(grid) if grid else None)
    pictures = make_pictures(wish, _host(context), lambda line: print(line, file=sys.stderr))
    paths = write_pictures(wish, pictures, Path(output))
    if grid:
        paths.append(write_grid(wish, pictures, Path(grid)))
    if as_json:
        click.echo(json.dumps([str(path) for path in paths]))
    else:
        for path in paths:
            click.echo(str(path))
