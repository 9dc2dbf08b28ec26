"""`persona merge`: adapters added up, into one adapter or into a base model."""

from __future__ import annotations

import json
from pathlib import Path

import click

from persona.commands.writing_options import writes_an_adapter


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("paths", nargs=-1, metavar="FILE[:STRENGTH]... OUT", required=True)
@click.option("--into", "base", metavar="MODEL", help="Merge into this base model; OUT is then a new diffusers folder.")
@writes_an_adapter(
    rank="Truncate the sum to this rank (SVD).",
    to="the usual one of OUT's ending",
    dtype="the widest of the sources",
    alpha="LoRA alpha, where files have none.",
)
@click.pass_context
def merge(
    context: click.Context,
    paths: tuple[str, ...],
    base: str | None,
    rank: int | None,
    energy: float | None,
    to: str | None,
    dtype: str | None,
    alpha: float | None,
    family: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Add adapters up: Σ strength·ΔW. The sum is exact, its rank the sum of the ranks; --rank makes it smaller.

    FILE:0.7 takes seven tenths of FILE, FILE:-1 takes it away. Sources may be in different dialects."""
    from persona.cli import _host
    from persona.core.adapters.merge import merge as add_up
    from persona.core.host.errors import UsageError
    from persona.exchange.convert import Wish, deliver, refuse_own_source
    from persona.exchange.load import load_adapter
    from persona.exchange.rank import kept_notes, resize
    from persona.exchange.sources import check_energy, weighted

    host = _host(context)
    if len(paths) < 2:
        raise UsageError("Say where the sum goes.", hint=f"persona merge {paths[0]} OTHER merged.safetensors")
    check_energy(energy)
    destination = Path(paths[-1]).expanduser()
    named = [weighted(text) for text in paths[:-1]]
    refuse_own_source([path for path, _ in named], destination)
    loaded = [(load_adapter(path, host, alpha=alpha, family=family), strength) for path, strength in named]
    notes = [f"{path}: {note}" for (path, _), (adapter, _) in zip(named, loaded, strict=True) for note in adapter.notes]
    if base is not None:
        from persona.exchange.merge_base import merge_into_base

        if rank is not None or energy is not None or to is not None or dtype is not None:
            raise UsageError("--rank, --energy, --to and --dtype are about adapters, not about a base model.")
        notes += merge_into_base(loaded, base, destination)
        written = [str(destination)]
    else:
        merged = add_up(loaded)
        merged.metadata["persona.merged_from"] = ", ".join(f"{path.name}:{strength:g}" for path, strength in named)
        if rank is not None or energy is not None:
            resized = resize(merged, rank, energy)
            merged, notes = resized.adapter, [*notes, *kept_notes(resized)]
        wish = Wish(to=to, dtype=dtype, force=force)
        report = deliver(merged, [path for path, _ in named], destination, wish, host, notes)
        written, notes = [str(path) for path in report.written], [report.summary, *report.notes]
    if as_json:
        click.echo(json.dumps({"written": written, "notes": notes}, indent=1, ensure_ascii=False))
        return
    click.echo(f"wrote {', '.join(written)}: " + " + ".join(f"{strength:g}·{path.name}" for path, strength in named))
    for note in notes:
        click.echo(f"  {note}", err=True)
