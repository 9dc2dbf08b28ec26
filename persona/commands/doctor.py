"""`persona doctor`: what is broken here, by its symptom, and what puts it right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Look for combinations of packages that are known to break, for half-built environments, full disks and broken
    plugins. Exit code 1 when something is broken.

    Packages are not imported here; those that break others are tried in a process of their own.
    """
    from persona.cli import _host
    from persona.environments.checks import diagnose
    from persona.environments.facts import facts_here, facts_there, machine
    from persona.environments.frameworks import FRAMEWORKS
    from persona.environments.state import find
    from persona.hub.bases import cache_folder

    there = {name: find(framework) for name, framework in FRAMEWORKS.items()}
    broken = [(told["name"], told["reason"]) for told in _host(context).as_table() if told["state"] == "broken"]
    looked = [facts_here(), *(facts_there(name, found) for name, found in there.items() if found.is_usable)]
    known = [facts for facts in looked if facts is not None]
    findings = diagnose(known, machine(there, broken, {"cache": cache_folder(), "this folder": Path.cwd()}))
    if as_json:
        told = {
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "environments": {facts.where: {"python": facts.python, "packages": facts.packages} for facts in known},
        }
        click.echo(json.dumps(told, indent=1))
    else:
        for finding in findings:
            place = "" if finding.where in ("here", "machine") else f" ({finding.where})"
            click.echo(f"{finding.kind}{place}: {finding.symptom}")
            click.echo(f"  because {finding.cause}")
            click.echo(f"  {finding.fix}")
        if not any(finding.kind == "broken" for finding in findings):
            click.echo("nothing is broken")
    if any(finding.kind == "broken" for finding in findings):
        context.exit(1)
