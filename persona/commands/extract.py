"""`persona extract`: a LoRA out of the difference of two models."""

from __future__ import annotations

import json
from pathlib import Path

import click

from persona.commands.writing_options import writes_an_adapter


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("tuned", metavar="TUNED")
@click.argument("destination", metavar="OUT")
@click.option("--base", required=True, metavar="MODEL", help="The model TUNED was trained from.")
@writes_an_adapter(
    rank="The rank of every module, at most (16).",
    to="the usual one of OUT's ending",
    dtype="float16",
)
@click.pass_context
def extract(
    context: click.Context,
    tuned: str,
    destination: str,
    base: str,
    rank: int | None,
    energy: float | None,
    to: str | None,
    dtype: str | None,
    family: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the LoRA that turns MODEL into TUNED as nearly as its rank allows, and tell how near that is. Both are
    diffusers folders, registry names, or weight files with diffusers' names."""
    from persona.cli import _host
    from persona.exchange.base_weights import base_weights
    from persona.exchange.casting import dtype_called
    from persona.exchange.convert import Wish, deliver
    from persona.exchange.families import with_family
    from persona.exchange.rank import extract as difference
    from persona.exchange.rank import kept_notes
    from persona.exchange.sources import check_energy
    from persona.formats.containers.atomic import refuse_existing

    check_energy(energy)
    path = Path(destination).expanduser()
    refuse_existing(path, overwrite=force)
    rank = 16 if rank is None and energy is None else rank
    found = difference(base_weights(tuned), base_weights(base), rank, energy, dtype=dtype_called(dtype or "float16"))
    adapter = with_family(found.adapter, family)
    report = deliver(adapter, [], path, Wish(to=to, force=force), _host(context), kept_notes(found))
    if as_json:
        click.echo(json.dumps({**report.as_document(), "kept": found.kept}, indent=1, ensure_ascii=False))
        return
    click.echo(f"wrote {', '.join(str(one) for one in report.written)}: {report.dialect}, {report.summary}")
    for note in report.notes:
        click.echo(f"  {note}", err=True)
