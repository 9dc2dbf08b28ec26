"""`persona backends`: what computes here, what is missing, and environments of their own for those that need one."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from persona.core.host.errors import UsageError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(invoke_without_command=True, context_settings=SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def backends(context: click.Context, as_json: bool) -> None:
    """Show the frameworks that can compute: which are here, what the others take, what each can do.

    Paddle and MindSpore cannot share an environment with torch; `persona backends setup` makes one for each.
    """
    if context.invoked_subcommand is not None:
        return
    from persona.cli import _host
    from persona.runs.abilities import backends_known, table

    host = _host(context)
    known = backends_known(host)
    if as_json:
        columns, body = table(host, known)
        click.echo(json.dumps({"backends": known, "columns": columns, "table": dict(body)}, indent=1))
        return
    for told in known:
        for line in lines_of(told):
            click.echo(line)
    columns, body = table(host, known)
    if columns:
        click.echo("")
        print_table(columns, body)


def lines_of(told: dict[str, Any]) -> list[str]:
    """A backend for people: what it is, where, how large, what to type."""
    from persona.environments.setup import size

    head = f"{told['name']:<11}"
    if told["usable"]:
        taken = f", {size(told['bytes'])}" if told.get("bytes") else ""
        return [f"{head}{told['version'] or 'there'} in {told['where']}{taken}" if told["where"] != "here"
                else f"{head}{told['version']} here"]  # fmt: skip
    takes = ""
    if told.get("disk_bytes"):
        takes = f" (downloads {size(told['download_bytes'])}, takes {size(told['disk_bytes'])})"
    return [f"{head}not usable: {told['reason']}{takes}", f"{'':<11}{told['hint']}"]


def print_table(columns: list[str], body: list[tuple[str, list[str]]]) -> None:
    """What is typed in the first column, a backend and device in each other one."""
    first = max(len(typed) for typed, _ in body)
    click.echo("  ".join([f"{'':<{first}}", *columns]))
    for typed, words in body:
        cells = [f"{word:<{len(column)}}" for word, column in zip(words, columns, strict=True)]
        click.echo("  ".join([f"{typed:<{first}}", *cells]).rstrip())


@backends.command(context_settings=SETTINGS)
@click.argument("name", metavar="paddle|mindspore")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def setup(name: str, as_json: bool) -> None:
    """Make the environment of a framework, and try it.

    It lies in the user's data folder ($PERSONA_DATA names another). Cut short, the same line begins it anew.
    """
    from persona.environments.frameworks import framework_called
    from persona.environments.places import environment_folder
    from persona.environments.setup import set_up, size

    told = set_up(framework_called(name), lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        click.echo(json.dumps(told, indent=1))
        return
    click.echo(f"{name} {told['version']} is ready: {environment_folder(name)}, {size(told['bytes'])}")
    click.echo(f"use it:  persona train --plugin dreambooth --backend {name}")


@backends.command(context_settings=SETTINGS)
@click.argument("name", metavar="paddle|mindspore")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(name: str, yes: bool) -> None:
    """Take the environment of a framework away."""
    from persona.environments.frameworks import framework_called
    from persona.environments.places import environment_folder
    from persona.environments.setup import remove as take_away
    from persona.environments.setup import size

    framework, folder = framework_called(name), environment_folder(name)
    if folder.is_dir() and not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{folder} would be removed.", hint=f"Say so: persona backends remove {name} --yes")
        click.confirm(f"Remove {folder}?", abort=True)
    click.echo(f"removed {folder}: {size(take_away(framework))} are free again")
