"""`persona diff`: do two files mean the same?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from persona.exchange.compare import Comparison


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option("--alpha", type=float, metavar="ALPHA", help="LoRA alpha, where a file has none.")
@click.option("--family", metavar="FAMILY", help="Base architecture, where names and shapes leave it open.")
@click.option("--base", metavar="MODEL", help="The base model, to compare DoRA, IA3 and GLoRA.")
@click.option("--tolerance", type=float, metavar="ERROR", help="Relative error that still counts as the same.")
@click.option("--all", "show_all", is_flag=True, help="Print every module, not only those that differ.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def diff(
    context: click.Context,
    first: str,
    second: str,
    alpha: float | None,
    family: str | None,
    base: str | None,
    tolerance: float | None,
    show_all: bool,
    as_json: bool,
) -> None:
    """Compare what A and B do to a base model, module by module, whatever dialects and file formats they are in.

    Exit code 0: the same, up to one rounding of their dtype. 1: different, or not decidable."""
    from persona.cli import _host
    from persona.exchange.base_weights import base_weights
    from persona.exchange.compare import compare
    from persona.exchange.load import load_adapter

    host = _host(context)
    left = load_adapter(Path(first).expanduser(), host, family=family)
    right = load_adapter(Path(second).expanduser(), host, family=family)
    if alpha is not None:
        left, right = (
            load_adapter(Path(path).expanduser(), host, alpha=alpha if _lacks_alpha(one) else None, family=family)
            for path, one in ((first, left), (second, right))
        )
    found = compare(left, right, base=base_weights(base) if base else None, tolerance=tolerance)
    if as_json:
        click.echo(json.dumps(document(found), indent=1, ensure_ascii=False))
    else:
        for line in lines(found, show_all):
            click.echo(line)
    if not found.same:
        context.exit(1)


def _lacks_alpha(adapter: Any) -> bool:
    return any(entry.scale.origin == "assumed" for entry in adapter.entries.values())


def document(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON data; errors that are not finite are null."""
    return {
        "same": found.same,
        "worst_relative_error": _number(found.worst),
        "tolerance": found.tolerance,
        "modules": {name: _number(error) for name, error in found.modules.items()},
        "words": {name: _number(error) for name, error in found.words.items()},
        "only_in_first": list(found.only_first),
        "only_in_second": list(found.only_second),
        "undecided": list(found.undecided),
    }


def _number(value: float) -> float | None:
    return value if value == value and value not in (float("inf"), float("-inf")) else None


def lines(found: Comparison, show_all: bool) -> list[str]:
    """The comparison as text: modules that differ, worst first, then the verdict."""
    errors = {**found.modules, **found.words}
    shown = {name: error for name, error in errors.items() if show_all or not error <= found.tolerance}
    ordered = sorted(shown, key=lambda name: -shown[name] if shown[name] == shown[name] else float("-inf"))
    most = len(ordered) if show_all else 20
    text = [f"{shown[name]:.3e}  {name}" for name in ordered[:most]]
    text += [f"… and {len(ordered) - most} more"] if len(ordered) > most else []
    text += _missing("only in A", found.only_first) + _missing("only in B", found.only_second)
    text += _missing("not decided without the base model (--base)", found.undecided)
    modules = f"{len(found.modules)} modules" + (f" and {len(found.words)} words" if found.words else "")
    if found.same:
        how = "bit for bit" if found.worst == 0 else f"worst relative error {found.worst:.3g}"
        return [*text, f"the same: {modules}, {how}"]
    if found.undecided and not (found.only_first or found.only_second) and found.worst <= found.tolerance:
        return [*text, f"not decided: {len(found.undecided)} modules depend on the base model"]
    different = sum(not error <= found.tolerance for error in errors.values())
    return [
        *text,
        f"different: {different} of {len(errors)} differ by more than {found.tolerance:.3g}, worst {found.worst:.3g}",
    ]


def _missing(words: str, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{words}: {', '.join(names[:5])}{more}"]
