"""One conversion, from sources to a destination: load, plan, write, and tell what was decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from persona.core.adapters.entry import Adapter
from persona.core.host.errors import (
    ConversionError,
    OutputExists,
    UnreadableFile,
    UnwritableOutput,
    UsageError,
    did_you_mean,
)
from persona.core.host.host import Host
from persona.exchange.join import join
from persona.exchange.load import load_adapter
from persona.exchange.planning import cast, plan_for
from persona.exchange.report import Report
from persona.exchange.save import Target, sheets, target_for, write_sheets
from persona.formats.containers.atomic import refuse_existing

FIXES = ("split-qkv-alpha",)
ALPHA_ORIGINS = {
    "file key": "stored beside each module",
    "header": "in the file's header",
    "config": "in adapter_config.json",
    "told": "told by --alpha",
}


@dataclass(frozen=True)
class Wish:
    """What the user asked of a conversion, as `persona convert` has it on its command line."""

    to: str | None = None
    alpha: float | None = None
    override_alpha: bool = False
    family: str | None = None
    dtype: str | None = None
    rank: int | None = None
    base: str | None = None
    drop: bool = False
    fixes: tuple[str, ...] = ()
    allow_leftovers: bool = False
    force: bool = False
    dry_run: bool = False
    certificate: Path | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for what can be seen to be wrong without opening a file."""
        for fix in self.fixes:
            if fix not in FIXES:
                raise UsageError(
                    f"There is no fix called {fix}. {did_you_mean(fix, FIXES)}", hint=f"--fix {' | '.join(FIXES)}"
                )
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"A rank of {self.rank} is not possible; it is 1 or more.", hint="--rank 16")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UsageError(f"An alpha of {self.alpha:g} is not possible; it is a number above 0.", hint="--alpha 16")
        if self.override_alpha and self.alpha is None:
            raise UsageError("--override-alpha says nothing without --alpha.", hint="--alpha 16 --override-alpha")


def convert(sources: Sequence[Path], destination: Path, wish: Wish, host: Host) -> Report:
    """Convert `sources` (several are one adapter: join) into `destination`. Raises the errors of reading, planning and
    writing; what was written in part is gone then."""
    refuse_own_source(sources, destination)
    if wish.family is not None:
        from persona.formats.models.families import family_named

        family_named(wish.family)
    try:
        loaded = [
            load_adapter(path, host, alpha=wish.alpha, override_alpha=wish.override_alpha, family=wish.family)
            for path in sources
        ]
    except UnreadableFile as problem:
        if len(sources) != 1:
            raise
        from persona.exchange.models import converted_model, load_model

        return converted_model(load_model(sources[0], host, problem, family=wish.family), destination, wish, host)
    adapter = loaded[0] if len(loaded) == 1 else join(loaded)
    notes = [*adapter.notes, *_alpha_notes(adapter, wish)]
    notes += _leftovers(adapter, wish)
    notes += split_qkv_notes(adapter, wish)
    if "split-qkv-alpha" in wish.fixes:
        adapter = with_split_qkv_alpha(adapter)
    return deliver(adapter, sources, destination, wish, host, notes)


def deliver(
    adapter: Adapter, sources: Sequence[Path], destination: Path, wish: Wish, host: Host, notes: Sequence[str] = ()
) -> Report:
    """Plan and write an adapter that is complete in memory, lazily; `sources` are only named and compared with."""
    notes = list(notes)
    target = target_for(adapter, destination, host, wish.to)
    if not wish.dry_run and not (target.dialect is not None and target.dialect.slots.folder):
        refuse_existing(destination, overwrite=wish.force)
    if wish.certificate is not None:
        refuse_existing(wish.certificate, overwrite=wish.force)
        if not wish.certificate.absolute().parent.is_dir():
            raise UnwritableOutput(
                f"There is no folder {wish.certificate.parent} for the certificate.",
                hint=f"mkdir -p {wish.certificate.parent}",
            )
    if target.chosen:
        notes.append(target.chosen)
    made, steps = _planned(adapter, target, wish)
    files = sheets(made, target, host)
    notes += _metadata_notes(adapter, files)
    if target.dialect is not None and adapter.embeddings and len(files) > 1:
        notes.append(f"{target.name} has no place for words beside the modules: {files[-1].path.name} holds them")
    paths = [sheet.path for sheet in files] if wish.dry_run else write_sheets(files, target, force=wish.force)
    report = Report(
        tuple(paths),
        tuple(steps),
        tuple(dict.fromkeys(notes)),
        _spelling(adapter),
        target.name,
        target.container.name if target.container else "folder",
        summary(adapter),
    )
    return _certified(report, adapter, sources, wish, host)


def _certified(report: Report, adapter: Adapter, sources: Sequence[Path], wish: Wish, host: Host) -> Report:
    """The report with its certificate, written beside, when one was asked for."""
    if wish.certificate is None or wish.dry_run:
        return report
    from persona.exchange.certificates import certificate, write_certificate

    document = certificate(adapter, report, sources, host, _base(wish))
    write_certificate(wish.certificate, document, force=wish.force)
    worst = max([document["worst_relative_error"], *document["words"].values()])
    note = f"certificate {wish.certificate}: worst relative error of a module {worst:.3g}"
    if document["missing"]:
        note += f"; {len(document['missing'])} modules are missing in the output"
    if document["unmeasured"]:
        note += f"; {len(document['unmeasured'])} need the base model to be measured (--base)"
    return replace(report, notes=(*report.notes, note), certificate=document)


def _planned(adapter: Adapter, target: Target, wish: Wish) -> tuple[Adapter, Sequence[Any]]:
    """The adapter as the target can hold it, and the steps that make it so. Raises ConversionError for a module that
    it cannot hold, unless a dry run only wants to see."""
    if target.dialect is None:
        return cast(adapter, wish.dtype), ()
    made = plan_for(adapter, target, rank=wish.rank, base=_base(wish), drop=wish.drop, dtype=wish.dtype)
    if not wish.dry_run:
        made.demand()
        if not made.adapter.entries:
            raise ConversionError(f"{target.name} can hold none of the {len(adapter.entries)} modules.")
    return made.adapter, made.steps


def _base(wish: Wish) -> Any:
    if wish.base is None:
        return None
    from persona.exchange.base_weights import base_weights

    return base_weights(wish.base)


def refuse_own_source(sources: Sequence[Path], destination: Path) -> None:
    """--force does not go as far as writing over what is being read."""
    for source in sources:
        if destination.exists() and source.exists() and destination.samefile(source):
            raise OutputExists(f"{destination} is also what is read; it would be lost.", hint="Choose another name.")


def _spelling(adapter: Adapter) -> str:
    source = adapter.source
    return f"{source.dialect} ({source.container})" if source else ""


def summary(adapter: Adapter) -> str:
    """What is in it, in a line: modules by component, rank, words."""
    parts = []
    counts = Counter(component for component, _ in adapter.entries)
    if counts:
        ranks = sorted({entry.scale.rank for entry in adapter.entries.values() if entry.algorithm in ("lora", "loha")})
        rank = f", rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]}-{ranks[-1]}'}" if ranks else ""
        named = ", ".join(f"{component} {count}" for component, count in counts.items())
        parts.append(f"{len(adapter.entries)} modules ({named}){rank}")
    for one in adapter.embeddings[:3]:
        shapes = ", ".join(f"{list(ref.shape)} for {component}" for component, ref in one.vectors.items())
        parts.append(f"the word {one.token} {shapes}")
    if len(adapter.embeddings) > 3:
        parts.append(f"{len(adapter.embeddings) - 3} more words")
    family = adapter.family or ("/".join(sorted(adapter.families)) if 0 < len(adapter.families) < 4 else "")
    return "; ".join(parts) + (f"; {family}" if family else "")


def _alpha_notes(adapter: Adapter, wish: Wish) -> list[str]:
    """Where alpha came from, by origin (assumed alphas are noted by the reader)."""
    if not adapter.entries and wish.alpha is not None:
        return ["--alpha says nothing about embeddings; it was not used"]
    found: dict[str, list[float]] = {}
    for entry in adapter.entries.values():
        if entry.scale.alpha is not None:
            found.setdefault(entry.scale.origin, []).append(entry.scale.alpha)
    notes = []
    for origin, alphas in found.items():
        low, high = min(alphas), max(alphas)
        value = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        notes.append(f"alpha {value} of {len(alphas)} modules: {ALPHA_ORIGINS.get(origin, origin)}")
    return notes


def _leftovers(adapter: Adapter, wish: Wish) -> list[str]:
    """Keys that no rule explains: an error, or dropped by name when the user allowed it."""
    if not adapter.leftovers:
        return []
    names = [f"{one.key} ({one.reason})" for one in adapter.leftovers]
    if wish.allow_leftovers:
        return [f"dropped, as allowed: {name}" for name in names]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    where = adapter.source.path if adapter.source else "the source"
    keys = "key" if len(names) == 1 else "keys"
    raise ConversionError(
        f"{where}: {len(names)} {keys} would be lost: {shown}.", hint="To leave them behind: --allow-leftovers"
    )


def _metadata_notes(adapter: Adapter, files: Sequence[Any]) -> list[str]:
    """Text of the source that the output does not carry."""
    with_text = [sheet for sheet in files if sheet.container is not None and sheet.container.name == "safetensors"]
    kept = {key for sheet in with_text for key in sheet.output.metadata}
    ours = ("format", "lora_adapter_metadata")
    lost = sorted(key for key in adapter.metadata if key not in kept and key not in ours)
    if not lost:
        return []
    shown = ", ".join(lost[:6]) + (f" and {len(lost) - 6} more" if len(lost) > 6 else "")
    return [f"metadata left behind (private, no longer true, or no place for text in the output): {shown}"]


def split_qkv_notes(adapter: Adapter, wish: Wish) -> list[str]:
    """A warning for sd-scripts' split_qkv (kohya-ss/sd-scripts#2204)."""
    affected = _split_qkv(adapter)
    if not affected:
        return []
    if "split-qkv-alpha" in wish.fixes:
        return [f"alpha of {len(affected)} modules was multiplied by 3 or 4 (split_qkv, kohya-ss/sd-scripts#2204)"]
    return [
        f"trained with split_qkv: {len(affected)} modules were saved at 3 or 4 times their rank, alpha unchanged, so "
        "every reader applies them 3 or 4 times too weakly (kohya-ss/sd-scripts#2204); --fix split-qkv-alpha mends it"
    ]


def _split_qkv(adapter: Adapter) -> dict[tuple[str, str], int]:
    """Modules whose alpha belongs to a third or a quarter of their rank, and how many times."""
    if '"split_qkv": "True"' not in adapter.metadata.get("ss_network_args", "").replace("'", '"'):
        return {}
    trained = adapter.metadata.get("ss_network_dim", "")
    if not trained.isdigit():
        return {}
    return {
        key: entry.scale.rank // int(trained)
        for key, entry in adapter.entries.items()
        if "[" in entry.path and entry.scale.rank in (3 * int(trained), 4 * int(trained))
    }


def with_split_qkv_alpha(adapter: Adapter) -> Adapter:
    """The same adapter with those alphas multiplied, so that alpha / rank is what was trained.
    Raises ConversionError when nothing is to be mended."""
    affected = _split_qkv(adapter)
    if not affected:
        raise ConversionError(
            "There is nothing to mend: the file does not say that it was trained with split_qkv.",
            hint="Leave --fix split-qkv-alpha out.",
        )
    entries = dict(adapter.entries)
    for key, times in affected.items():
        scale = entries[key].scale
        if scale.alpha is not None:
            mended = replace(scale, alpha=scale.alpha * times, origin="mended", stored=None)
            entries[key] = replace(entries[key], scale=mended)
    return replace(adapter, entries=entries)
