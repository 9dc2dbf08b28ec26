"""`persona diff`: do two files mean the same?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from persona.core.adapters.entry import Checkpoint
    from persona.core.host.host import Host
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
    """Compare what A and B do to a base model, module by module, whatever dialects and file formats they are in. Two
    whole models (files or folders) are compared parameter by parameter.

    Exit code 0: the same, up to one rounding of their dtype. 1: different, or not decidable."""
    from persona.cli import _host
    from persona.exchange.base_weights import base_weights
    from persona.exchange.compare import compare
    from persona.exchange.load import load_adapter

    host = _host(context)
    models = _whole_models((Path(first).expanduser(), Path(second).expanduser()), host, family)
    if models is not None:
        _say(context, _compare_models(*models, alpha=alpha, base=base, tolerance=tolerance), show_all, as_json)
        return
    left = load_adapter(Path(first).expanduser(), host, family=family)
    right = load_adapter(Path(second).expanduser(), host, family=family)
    if alpha is not None:
        left, right = (
            load_adapter(Path(path).expanduser(), host, alpha=alpha if _lacks_alpha(one) else None, family=family)
            for path, one in ((first, left), (second, right))
        )
    found = compare(left, right, base=base_weights(base) if base else None, tolerance=tolerance)
    _say(context, found, show_all, as_json)


def _say(context: click.Context, found: Comparison, show_all: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document(found), indent=1, ensure_ascii=False))
    else:
        for line in lines(found, show_all):
            click.echo(line)
    if not found.same:
        context.exit(1)


def _whole_models(paths: tuple[Path, Path], host: Host, family: str | None) -> tuple[Checkpoint, Checkpoint] | None:
    """Both whole models, or None when neither is one. Raises UsageError for a model beside an adapter."""
    from persona.core.host.errors import UsageError
    from persona.exchange.models import whole_model

    first, second = (whole_model(path, host, family) for path in paths)
    if first is not None and second is not None:
        return first, second
    if first is None and second is None:
        return None
    model, adapter = paths if first is not None else paths[::-1]
    raise UsageError(
        f"{model} is a whole model and {adapter} is not: they cannot be the same.",
        hint=f"persona extract TUNED lora.safetensors --base {model}   (then compare adapters)",
    )


def _compare_models(
    first: Checkpoint, second: Checkpoint, *, alpha: float | None, base: str | None, tolerance: float | None
) -> Comparison:
    from persona.core.host.errors import UsageError
    from persona.exchange.compare_models import compare_models

    if alpha is not None or base is not None:
        raise UsageError("--alpha and --base are about adapters, and these are whole models.")
    return compare_models(first, second, tolerance=tolerance)


def _lacks_alpha(adapter: Any) -> bool:
    return any(entry.scale.origin == "assumed" for entry in adapter.entries.values())


def document(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON data; errors that are not finite are null. Of whole models also every component."""
    parts = {
        name: {"parameters": count, "different": different, "worst_relative_error": _number(worst)}
        for name, (count, different, worst) in components(found).items()
    }
    return {
        **({"components": parts} if parts else {}),
        "same": found.same,
        "worst_relative_error": _number(found.worst),
        "tolerance": found.tolerance,
        "modules": {name: _number(error) for name, error in found.modules.items()},
        "words": {name: _number(error) for name, error in found.words.items()},
        "only_in_first": list(found.only_first),
        "only_in_second": list(found.only_second),
        "undecided": list(found.undecided),
    }


def components(found: Comparison) -> dict[str, tuple[int, int, float]]:
    """Of whole models: component -> (parameters, how many differ, worst relative error); of adapters nothing."""
    from persona.exchange.compare_models import ModelComparison

    return found.components() if isinstance(found, ModelComparison) else {}


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
    for name, (count, differ, worst) in components(found).items():
        text.append(f"{name}: {count} parameters, {differ} differ, worst relative error {worst:.3g}")
    text += _missing("only in A", found.only_first) + _missing("only in B", found.only_second)
    text += _missing("not decided without the base model (--base)", found.undecided)
    unit = "parameters" if components(found) else "modules"
    modules = f"{len(found.modules)} {unit}" + (f" and {len(found.words)} words" if found.words else "")
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
