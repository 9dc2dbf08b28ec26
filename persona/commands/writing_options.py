"""The options that `persona merge`, `resize` and `extract` share: how small, and how the adapter is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def writes_an_adapter(*, rank: str, to: str, dtype: str, alpha: str = "") -> Callable[[Command], Command]:
    """--rank, --energy, --to, --dtype, --family, --force and --json, and --alpha when it has a help text. The texts say
    what differs from verb to verb: what the rank is about, and the defaults of dialect and dtype."""
    options = [
        click.option("--rank", type=click.IntRange(1), metavar="RANK", help=rank),
        click.option(
            "--energy", type=float, metavar="SHARE", help="Smallest rank that keeps this share of ‖ΔW‖² (0.95)."
        ),
        click.option("--to", metavar="DIALECT", help=f"Spelling of the output; default: {to}."),
        click.option("--dtype", metavar="DTYPE", help=f"float16, bfloat16 or float32; default: {dtype}."),
        *([click.option("--alpha", type=float, metavar="ALPHA", help=alpha)] if alpha else []),
        click.option("--family", metavar="FAMILY", help="Base architecture, where names and shapes leave it open."),
        click.option("--force", is_flag=True, help="Overwrite OUT."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]

    def decorated(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated
