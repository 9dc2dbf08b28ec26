"""`persona plugins`: who is plugged in, what they give, and who is broken and why."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plugins(context: click.Context, as_json: bool) -> None:
    """List plugins with what they give; a broken one is listed with its reason and file. Exit code 1 when one is."""
    from persona.cli import _host

    records = _host(context).as_table()
    if as_json:
        click.echo(json.dumps(records, indent=1, ensure_ascii=False))
    else:
        for record in records:
            package = f" ({record['package']} {record['version']})".replace(" )", ")") if record["package"] else ""
            click.echo(f"{record['name']}{package}: {record['state']}")
            for item in record["provides"]:
                click.echo(f"  gives {item}")
            if record["reason"]:
                click.echo(f"  {record['reason']}")
            if record["state"] == "broken" and record["file"]:
                click.echo(f"  at {record['file']}")
    if any(record["state"] == "broken" for record in records):
        context.exit(1)
