"""`persona resize`: an adapter at another rank."""

from __future__ import annotations

import json
from pathlib import Path

import click

from persona.commands.writing_options import writes_an_adapter


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("source", metavar="IN")
@click.argument("destination", metavar="OUT")
@writes_an_adapter(
    rank="The rank of every module, at most.",
    to="that of IN",
    dtype="as it is",
    alpha="LoRA alpha, where the file has none.",
)
@click.pass_context
def resize(
    context: click.Context,
    source: str,
    destination: str,
    rank: int | None,
    energy: float | None,
    to: str | None,
    dtype: str | None,
    alpha: float | None,
    family: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write IN at another rank, the best approximation there is (singular values), and tell what is kept. LoHa and LoKr
    become LoRA. With both --rank and --energy the smaller rank is taken."""
    from persona.cli import _host
    from persona.core.host.errors import UsageError
    from persona.exchange.choices import same_dialect
    from persona.exchange.convert import Wish, deliver, refuse_own_source
    from persona.exchange.load import load_adapter
    from persona.exchange.rank import kept_notes
    from persona.exchange.rank import resize as at_rank
    from persona.exchange.sources import check_energy

    host = _host(context)
    if rank is None and energy is None:
        raise UsageError("Say how small.", hint=f"persona resize {source} {destination} --rank 8   (or --energy 0.95)")
    check_energy(energy)
    read, write = Path(source).expanduser(), Path(destination).expanduser()
    refuse_own_source([read], write)
    adapter = load_adapter(read, host, alpha=alpha, family=family)
    if not adapter.entries:
        raise UsageError(f"{source} has no modules, so it has no rank.", hint=f"persona inspect {source}")
    resized = at_rank(adapter, rank, energy)
    wish = Wish(to=to or same_dialect(adapter, write, host), dtype=dtype, force=force)
    notes = [*adapter.notes, *kept_notes(resized)]
    report = deliver(resized.adapter, [read], write, wish, host, notes)
    if as_json:
        document = {**report.as_document(), "kept": resized.kept}
        click.echo(json.dumps(document, indent=1, ensure_ascii=False))
        return
    click.echo(f"wrote {', '.join(str(path) for path in report.written)}: {report.dialect}, {report.summary}")
    for note in report.notes:
        click.echo(f"  {note}", err=True)
