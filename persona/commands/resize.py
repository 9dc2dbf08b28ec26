"""`persona resize`: an adapter at another rank."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("source", metavar="IN")
@click.argument("destination", metavar="OUT")
@click.option("--rank", type=click.IntRange(1), metavar="RANK", help="The rank of every module, at most.")
@click.option("--energy", type=float, metavar="SHARE", help="Smallest rank that keeps this share of ‖ΔW‖² (0.95).")
@click.option("--to", metavar="DIALECT", help="Spelling of the output; default: that of IN.")
@click.option("--dtype", metavar="DTYPE", help="float16, bfloat16 or float32; default: as it is.")
@click.option("--alpha", type=float, metavar="ALPHA", help="LoRA alpha, where the file has none.")
@click.option("--family", metavar="FAMILY", help="Base architecture, where names and shapes leave it open.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
