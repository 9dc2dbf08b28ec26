"""`persona convert`: adapters and embeddings from any spelling to any other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from persona.exchange.batch import Job, Outcome
    from persona.exchange.convert import Wish
    from persona.exchange.report import Report
    from persona.exchange.streams import Streams

MOST_NAMED = 40
"""Dropped modules that are printed by name."""
EPILOG = """\b
persona convert learned_embeds.pdparams cat.safetensors
persona convert lora.safetensors lora-for-a1111.safetensors --to kohya
persona convert *.pdparams --to kohya --out-dir converted
persona convert lora.ckpt - --alpha 16 > lora.safetensors"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("paths", nargs=-1, metavar="IN... OUT", required=True)
@click.option(
    "--to",
    metavar="DIALECT",
    help="Spelling of the output (persona plugins lists them); default: that of OUT's ending.",
)
@click.option("--out-dir", metavar="DIR", help="Convert every IN on its own, into this folder.")
@click.option("--alpha", type=float, metavar="ALPHA", help="LoRA alpha, where the file has none.")
@click.option("--override-alpha", is_flag=True, help="Let --alpha replace what the file says.")
@click.option(
    "--family", metavar="FAMILY", help="Base architecture, where names and shapes leave it open: sd1, sdxl, …"
)
@click.option("--dtype", metavar="DTYPE", help="float16, bfloat16 or float32; default: as it is.")
@click.option("--rank", type=int, metavar="RANK", help="Highest rank, where the target needs an approximation (SVD).")
@click.option("--base", metavar="MODEL", help="The base model, where a rewriting needs its weights (DoRA, IA3, GLoRA).")
@click.option("--drop", is_flag=True, help="Leave out modules that the target cannot hold; they are named.")
@click.option("--fix", "fixes", multiple=True, metavar="NAME", help="Mend a known fault: split-qkv-alpha.")
@click.option("--allow-leftovers", is_flag=True, help="Leave keys behind that nobody can explain; they are named.")
@click.option("--dry-run", is_flag=True, help="Print what would happen to every module; write nothing.")
@click.option("--certificate", metavar="FILE.json", help="Compare what was written with the source; write the errors.")
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def convert(
    context: click.Context, /, paths: tuple[str, ...], out_dir: str | None, as_json: bool, **values: object
) -> None:
    """Move an adapter, an embedding or a model to another file format and spelling. Nothing in a file is executed,
    and nothing is dropped unsaid.

    Several IN with one OUT are one adapter in parts. OUT may be a folder; - is stdin or stdout.
    """
    from persona.cli import _host
    from persona.exchange.batch import convert_all
    from persona.exchange.convert import Wish
    from persona.exchange.streams import standard_streams

    certificate = values.pop("certificate")
    wish = Wish(**values, certificate=Path(str(certificate)) if certificate else None)  # type: ignore[arg-type]
    with standard_streams() as streams:
        jobs, to_stdout = _jobs(paths, out_dir, wish, _host(context), streams)
        tell = Teller(wish, streams.readable, alone=len(jobs) == 1, as_json=as_json, to_stdout=to_stdout)
        outcomes = convert_all(jobs, wish, _host(context), tell.outcome)
        if len(jobs) == 1 and outcomes[0].error is not None:
            raise streams.named(outcomes[0].error)
        if to_stdout and outcomes[0].report is not None and not wish.dry_run:
            streams.give_out(outcomes[0].report.written[0])
    if as_json and not to_stdout:
        documents = [_document(outcome) for outcome in outcomes]
        click.echo(json.dumps(documents[0] if len(jobs) == 1 else documents, indent=1, ensure_ascii=False))
    failed = sum(outcome.error is not None for outcome in outcomes)
    if failed:
        click.echo(f"{len(outcomes) - failed} of {len(outcomes)} converted; {failed} failed", err=True)
        context.exit(1)


def _jobs(
    paths: tuple[str, ...], out_dir: str | None, wish: Wish, host: Any, streams: Streams
) -> tuple[list[Job], bool]:
    """What goes where, and whether it goes to stdout. Raises UsageError."""
    from persona.core.host.errors import UsageError
    from persona.exchange.batch import Job, jobs_into_folder, make_folder

    if out_dir is None and len(paths) == 1:
        first = Path(paths[0])
        raise UsageError(
            "Say where the result goes.",
            hint=f"persona convert {first} {first.stem or 'adapter'}-converted.safetensors",
        )
    names = paths if out_dir is not None else paths[:-1]
    if "" in paths:
        raise UsageError("One of the names is empty.", hint="persona convert IN OUT")
    if names.count("-") > 1:
        raise UsageError("- can be given once: there is one stdin.")
    sources = [streams.take_in() if name == "-" else Path(name).expanduser() for name in names]
    if out_dir is None and paths[-1] == "-":
        return [Job(tuple(sources), streams.prepared(_ending(wish, host)))], True
    destination = Path(out_dir if out_dir is not None else paths[-1]).expanduser()
    into_folder = out_dir is not None or paths[-1].endswith(("/", "\\")) or destination.is_dir()
    if not into_folder:
        return [Job(tuple(sources), destination)], False
    if wish.to is None:
        raise UsageError(
            f"Say in which dialect the files in {destination} shall be.", hint=f"--to diffusers --out-dir {destination}"
        )
    jobs = jobs_into_folder(sources, destination, _ending(wish, host))
    if wish.certificate is not None and len(jobs) > 1:
        raise UsageError(
            f"One certificate is for one conversion, and these are {len(jobs)}.", hint="Convert them one at a time."
        )
    if not wish.dry_run:
        make_folder(destination)
    return jobs, False


def _ending(wish: Wish, host: Any) -> str:
    """The file ending of outputs that are not named by the user; "" for a dialect that is a folder."""
    from persona.exchange.choices import dialect_called, suffix_for
    from persona.formats.dialects.embeddings.forms import BY_NAME

    if wish.to is None:
        return ".safetensors"
    if wish.to in BY_NAME and wish.to not in host.provided("dialect"):
        return BY_NAME[wish.to].suffixes[0]
    dialect = host.load("dialect", dialect_called(wish.to, host))
    return "" if dialect.slots.folder else suffix_for(dialect, host)


@dataclass(frozen=True)
class Teller:
    """Prints what became of each conversion: results on stdout, decisions and errors on stderr."""

    wish: Wish
    readable: Callable[[str], str]
    alone: bool
    as_json: bool
    to_stdout: bool

    def outcome(self, outcome: Outcome) -> None:
        """One conversion, as it ends. The error of the only one is raised by the command instead."""
        if outcome.report is not None:
            if not self.as_json:
                self._report(outcome.report, outcome.job)
        elif not self.alone:
            self._error(outcome)

    def _report(self, report: Report, job: Job) -> None:
        source = " + ".join(str(path) for path in job.sources)
        written = ", ".join("stdout" if self.to_stdout else str(path) for path in report.written)
        verb = "would write" if self.wish.dry_run else "wrote"
        self._line(f"{source}: {report.source}, {report.summary}", err=self.to_stdout)
        self._line(f"{verb} {written}: {report.dialect} ({report.container})", err=self.to_stdout)
        if self.wish.dry_run:
            for line in steps_table(report.steps):
                self._line(f"  {line}", err=self.to_stdout)
        for note in (*costs(report.steps), *report.notes):
            self._line(f"  {note}", err=True)

    def _error(self, outcome: Outcome) -> None:
        from persona.exchange.load import reason

        assert outcome.error is not None
        text, name = reason(outcome.error), str(outcome.job.sources[0])
        self._line(f"error: {text if name in text else f'{name}: {text}'}", err=True)
        if hint := getattr(outcome.error, "hint", ""):
            self._line(f"  {hint}", err=True)

    def _line(self, text: str, *, err: bool) -> None:
        click.echo(self.readable(text), err=err)


def costs(steps: Sequence[Any]) -> list[str]:
    """What happened to modules beyond a new name: action, how many, at what cost."""
    counted: dict[tuple[str, str], list[Any]] = {}
    for step in steps:
        if step.action not in ("rename", "write beside"):
            counted.setdefault((step.action, step.cost), []).append(step)
    lines = []
    for (action, cost), found in counted.items():
        details = list(dict.fromkeys(step.detail for step in found))
        more = f" and {len(details) - 1} other cases" if len(details) > 1 else ""
        modules = "1 module" if len(found) == 1 else f"{len(found)} modules"
        how = "" if action == "drop" else f", {cost}"
        lines.append(f"{action}: {modules}{how} ({details[0]}{more})")
        if cost == "approximate":
            shown = sorted(found, key=_kept)[:3] if action == "svd" else found[:MOST_NAMED]
            lines += [f"  {step.module}: {step.detail}" for step in shown]
            if len(shown) < len(found) and action != "svd":
                lines.append(f"  and {len(found) - len(shown)} more: --dry-run or --json lists them all")
    return lines


def _kept(step: Any) -> float:
    """The share of ΔW that a truncation keeps, from its detail: the worst come first."""
    found = re.search(r"([\d.]+)% kept", step.detail)
    return float(found[1]) if found else 100.0


def steps_table(steps: Sequence[Any]) -> list[str]:
    """A line for every module and step: action, cost, module, detail."""
    rows = [(step.action, step.cost, step.module, step.detail) for step in steps]
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows]  # fmt: skip


def _document(outcome: Outcome) -> dict[str, Any]:
    from persona.exchange.load import reason

    sources = [str(path) for path in outcome.job.sources]
    if outcome.report is not None:
        return {"sources": sources, **outcome.report.as_document()}
    assert outcome.error is not None
    return {"sources": sources, "error": reason(outcome.error), "hint": getattr(outcome.error, "hint", "")}
