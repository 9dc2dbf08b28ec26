"""`persona export`: any checkpoint of a run as an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("run", metavar="RUN[:STEP]")
@click.option("--output", metavar="FILE", help="Where to; default: in the run, as adapter-STEP.safetensors.")
@click.option("--also", multiple=True, metavar="DIALECT", help="Write it in another dialect too, such as kohya.")
@click.option("--json", "as_json", is_flag=True, help="Print the files as JSON.")
@click.pass_context
def export(context: click.Context, /, run: str, output: str | None, also: tuple[str, ...], as_json: bool) -> None:
    """Write any checkpoint of a run as an adapter (of whole weights: as a folder).

    RUN is a run's folder; without :STEP its last checkpoint is taken.
    """
    from persona.cli import _host
    from persona.runs.export import export as write
    from persona.runs.export import parse_run

    folder, step = parse_run(run)
    paths = write(folder, step, _host(context), output=Path(output) if output else None, also=also)
    if as_json:
        click.echo(json.dumps([str(path) for path in paths]))
    else:
        for path in paths:
            click.echo(path)
