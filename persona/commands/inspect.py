"""`persona inspect`: what a file is, who made it, and which tools will load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("paths", nargs=-1, metavar="FILE...", required=True)
@click.option("--quick", is_flag=True, help="Read headers only: no hashes, norms or NaN counts.")
@click.option("--metadata", "show_metadata", is_flag=True, help="Print the file's own text metadata too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object, or a list for several files.")
@click.pass_context
def inspect(context: click.Context, paths: tuple[str, ...], quick: bool, show_metadata: bool, as_json: bool) -> None:
    """Tell what files are, without running anything in them: file format, dialect, base model, ranks and where alpha
    comes from, words, hashes, and which tools will load them. Folders are looked through.

    Exit code 1 when a file cannot be read."""
    from persona.cli import _host
    from persona.exchange.inspect import inspect_path

    host = _host(context)
    documents: list[dict[str, Any]] = []
    for path in _files(paths):
        try:
            found = inspect_path(path, host, quick=quick)
        except (OSError, MemoryError, ValueError) as error:
            found = {"path": str(path), "error": f"{path} cannot be read: {error}.", "hint": ""}
        except Exception as error:
            found = _refusal(path, error)
        documents.append(found)
        if not as_json:
            _tell(found, show_metadata=show_metadata, apart=len(documents) > 1)
    if as_json:
        click.echo(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1, ensure_ascii=False))
    if any("error" in found for found in documents):
        context.exit(1)


def _refusal(path: Path, error: Exception) -> dict[str, Any]:
    from persona.core.host.errors import PersonaError

    if not isinstance(error, PersonaError):
        raise error
    return {"path": str(path), "error": error.message, "hint": error.hint}


def _files(paths: tuple[str, ...]) -> list[Path]:
    """The files and adapter folders that are meant. Raises UnreadableFile for a folder without weights."""
    from persona.core.host.errors import PersonaError, UnreadableFile
    from persona.exchange.places import adapter_files, is_one_folder, weight_files

    found: list[Path] = []
    for name in paths:
        path = Path(name).expanduser()
        if not path.is_dir():
            found.append(path)
            continue
        if is_one_folder(path):
            found.append(path)
            continue
        try:
            adapter_files(path)
            found.append(path)
        except PersonaError:
            inside = weight_files(path)
            if not inside:
                raise UnreadableFile(f"There is no weight file in {path}.", hint=f"ls {path}") from None
            found += inside
    return found


def _tell(found: Mapping[str, Any], *, show_metadata: bool, apart: bool) -> None:
    if apart:
        click.echo()
    if "error" in found:
        click.echo(f"error: {found['error']}", err=True)
        if found["hint"]:
            click.echo(f"  {found['hint']}", err=True)
        return
    click.echo(f"{found['path']}  {_size(found['size'])}")
    for name, text in _lines(found):
        if text:
            click.echo(f"  {name:<14}{text}")
    for number, line in enumerate(_tool_lines(found.get("tools", ()))):
        click.echo(f"  {'' if number else 'loads in':<14}{line}")
    for number, note in enumerate(found["notes"]):
        click.echo(f"  {'notes' if number == 0 else '':<14}{note}")
    if show_metadata:
        for key, text in found["metadata"].items():
            click.echo(f"  {key} = {text}")


def _lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each line about a file; empty texts are left out by the caller."""
    lines = [("kind", _kind(found)), ("file format", found["container"]), ("dialect", found.get("dialect", ""))]
    if found.get("dialect"):
        lines += _adapter_lines(found)
    else:
        components = found.get("components", {})
        lines += [("family", found.get("family") or ""), ("spelling", found.get("spelling", ""))]
        lines += [("components", ", ".join(f"{name} {count} tensors" for name, count in components.items()))]
        lines += [("keys", "" if components else ", ".join(found["keys"][:4]))]
        lines += [("no adapter", found["why_not_an_adapter"])]
        lines += [("values", _pairs(found["values"]))]
    words = ", ".join(found["trigger_words"])
    lines += [("trainer", found["trainer"]), ("base named", found["base_named"]), ("trigger words", words)]
    lines += [("tensors", f"{found['tensors']} of {_times(found['dtypes'])}, {found['parameters']:,} numbers")]
    if "hashes" in found:
        bad = found["not_finite"]
        if bad["nan"] or bad["infinite"]:
            where = ", ".join(bad["tensors"][:3])
            lines += [("NOT FINITE", f"{bad['nan']} NaN and {bad['infinite']} infinite values, in {where}")]
        lines += [("sha256", found["hashes"].get("sha256", ""))]
        short = {name: digest for name, digest in found["hashes"].items() if name != "sha256"}
        lines += [("also known as", ", ".join(f"{name} {digest}" for name, digest in short.items()))]
    return lines


def _kind(found: Mapping[str, Any]) -> str:
    return str(found.get("looks_like") or found["kind"])


def _adapter_lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    family = found["family"] or " or ".join(found["families"]) or "open"
    evidence = f" ({'; '.join(found['family_evidence'])})" if found["family_evidence"] else ""
    origins = ", ".join(f"{count} {_origin(origin)}" for origin, count in found["alpha_from"].items())
    alphas = f"{_spread(found['alphas'])}: {origins}" if found["alphas"] else origins
    lines = [
        ("family", family + evidence),
        ("modules", _times(found["modules"])),
        ("algorithm", _times(found["algorithms"])),
        ("rank", _spread(found["ranks"])),
        ("alpha", alphas),
        ("scale", _spread(found["scales"])),
    ]
    for one in found["embeddings"]:
        vectors = ", ".join(f"{v['shape']} {v['dtype']} for {name}" for name, v in one["vectors"].items())
        lines.append(("word", f"{one['token']}  {vectors}"))
    for component, norms in found.get("delta_norms", {}).items():
        zero = f", {norms['zero_modules']} modules change nothing" if norms["zero_modules"] else ""
        lines.append(
            (
                "‖ΔW‖",
                f"{component}: {norms['smallest']:.3g} to {norms['largest']:.3g}, middle {norms['middle']:.3g}{zero}",
            )
        )
    left = found["leftovers"]
    if left:
        lines.append(
            ("NOT EXPLAINED", f"{len(left)} keys: " + ", ".join(f"{one['key']} ({one['reason']})" for one in left[:3]))
        )
    return lines


def _origin(origin: str) -> str:
    words = {"file key": "beside the module", "header": "in the header", "config": "in adapter_config.json",
             "assumed": "not stored, so alpha = rank"}  # fmt: skip
    return words.get(origin, origin)


def _spread(counts: Mapping[str, int]) -> str:
    """`8`, or `4 (128 modules), 8 (12 modules)`."""
    if len(counts) <= 1:
        return next(iter(counts), "")
    shown = sorted(counts.items(), key=lambda item: -item[1])[:6]
    more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    return ", ".join(f"{value} ({count} modules)" for value, count in shown) + more


def _times(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {str(value)[:60]}" for key, value in list(values.items())[:6])


def _tool_lines(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tools that load it, each with what it ignores; then those that do not, by reason."""
    lines: list[str] = []
    refused: dict[str, list[str]] = {}
    for tool in tools:
        if tool["loads"] in ("all", "part"):
            partly = "" if tool["loads"] == "all" else ", in part"
            lines.append(f"{tool['tool']}{partly}" + (f": {tool['why']}" if tool["why"] else ""))
            lines += [f"    {ignored}" for ignored in tool["ignores"]]
        else:
            refused.setdefault(tool["why"], []).append(tool["tool"])
    return lines + [f"not in {', '.join(names)}: {why}" for why, names in refused.items()]


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1024  # type: ignore[assignment]
    return f"{count:.2f} GiB"
