"""Whole models: loaded as a `Checkpoint`, and moved between LDM's file, folders of diffusers and ppdiffusers, and
MindSpore's checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

from persona.core.adapters.entry import Checkpoint
from persona.core.adapters.slots import Slots
from persona.core.host.contracts import Output
from persona.core.host.errors import ConversionError, UnreadableFile, UsageError, did_you_mean
from persona.core.host.host import Host
from persona.exchange.choices import container_for, containers
from persona.exchange.report import Report
from persona.exchange.save import Sheet, Target, write_sheets
from persona.formats.checkpoint_outputs import Form, outputs
from persona.formats.checkpoints import COMPONENTS, checkpoint_of, is_whole_model, read_checkpoint
from persona.formats.checkpoints import weight_files as weights_of
from persona.formats.containers.open import identify
from persona.formats.dialects.grammar import group

if TYPE_CHECKING:
    from persona.exchange.convert import Wish

ALIASES = {
    "original": "ldm",
    "comfy": "ldm",
    "kohya": "ldm",
    "a1111": "ldm",
    "paddle": "ppdiffusers",
    "mindone": "mindspore",
    "mindpet": "wukong",
}
"""Other names for the forms of a whole model."""


def whole_model(path: Path, host: Host, family: str | None = None) -> Checkpoint | None:
    """The model in a file or a folder, or None when it is not one."""
    if path.is_dir():
        parts = [path, *(path / name for name in COMPONENTS if (path / name).is_dir())]
        return read_checkpoint(path, family=family) if any(weights_of(part) for part in parts) else None
    if not path.is_file():
        return None
    container = identify(path, containers(host))
    state = replace(container.read(path), container=container.name)
    if group(state.tensors).groups:  # factors of an adapter, whatever else is there
        return None
    return checkpoint_of(state, str(path), family=family) if is_whole_model(state) else None


def form_for(model: Checkpoint, destination: Path, to: str | None) -> tuple[Form, str]:
    """How a model is written: as told, else by the destination's ending; with a note when nobody told."""
    if to is not None:
        name = ALIASES.get(to, to)
        if name not in get_args(Form):
            raise UsageError(
                f"There is no form of a whole model called {to}. {did_you_mean(to, get_args(Form))}",
                hint=f"--to {' | '.join(get_args(Form))}",
            )
        return name, ""  # type: ignore[return-value]
    suffix = destination.suffix.lower()
    chosen: Form = "diffusers"
    if suffix in (".safetensors", ".pt", ".bin") and len(model.components) > 1:
        chosen = "ldm"
    elif suffix == ".ckpt" and len(model.components) > 1:
        chosen = "wukong" if model.family == "wukong" else "mindspore"
    elif suffix == ".pdparams":
        chosen = "ppdiffusers"
    return chosen, f"written as {chosen}, the default for {suffix or 'a folder'}; --to chooses another"


def convert_model(model: Checkpoint, destination: Path, wish: Wish) -> tuple[Form, list[Output], list[str]]:
    """The outputs of a conversion and what to tell. Raises UsageError for a folder named as a file."""
    form, note = form_for(model, destination, wish.to)
    notes = [*model.notes, *([note] if note else [])]
    model = _cast(model, wish.dtype)
    try:
        made = outputs(model, form, notes)
    except (KeyError, IndexError) as error:
        raise ConversionError(
            f"This model is not complete: it has no {error.args[0] if isinstance(error, KeyError) else 'such part'}.",
            hint="Fetch the whole model; a part of one cannot be written as another form.",
        ) from error
    if form in ("diffusers", "ppdiffusers") and destination.suffix:
        weights = [output for output in made if output.document is None]
        if len(weights) != 1:
            raise UsageError(
                f"{form} is a folder of components, and {destination.name} is named as a file.",
                hint=f"Name a folder: {destination.with_suffix('')}",
            )
        made = [replace(weights[0], name="")]
    return form, made, notes


def converted_model(model: Checkpoint, destination: Path, wish: Wish, host: Host) -> Report:
    """Write a model, all of it or nothing."""
    form, made, notes = convert_model(model, destination, wish)
    files = [_sheet(output, destination, host, form) for output in made]
    folder = any(output.name for output in made)
    target = Target(destination, form, SimpleNamespace(slots=Slots(folder=folder)), files[0].container, "")
    written = [sheet.path for sheet in files] if wish.dry_run else write_sheets(files, target, force=wish.force)
    source = model.source
    return Report(
        tuple(written),
        notes=tuple(dict.fromkeys(notes)),
        source=f"{source.dialect} ({source.container})" if source else "",
        dialect=form,
        container="folder" if folder else files[0].container.name,
        summary=summary(model),
    )


def _sheet(output: Output, destination: Path, host: Host, form: str) -> Sheet:
    path = destination / output.name if output.name else destination
    if output.document is not None:
        return Sheet(path, None, output)
    preferred = ("mindspore",) if form in ("mindspore", "wukong") else ("torch",)
    return Sheet(path, container_for(path, host, preferred), output)


def summary(model: Checkpoint) -> str:
    """What is in it, in a line."""
    counts = ", ".join(f"{name} {len(parameters)}" for name, parameters in model.components.items())
    size = sum(ref.nbytes for parameters in model.components.values() for ref in parameters.values())
    return f"a whole model ({counts} tensors, {size / 1e6:,.1f} MB)" + (f"; {model.family}" if model.family else "")


def _cast(model: Checkpoint, dtype: str | None) -> Checkpoint:
    if dtype is None:
        return model
    from persona.exchange.casting import dtype_called, rounded

    wanted: Any = dtype_called(dtype)
    components = {
        component: {name: rounded(ref, wanted, f"{component}.{name}") for name, ref in parameters.items()}
        for component, parameters in model.components.items()
    }
    return replace(model, components=components)


def load_model(path: Path, host: Host, problem: UnreadableFile, *, family: str | None = None) -> Checkpoint:
    """The model at `path`; raises `problem`, why it is no adapter, when it is no model either."""
    model = whole_model(path, host, family)
    if model is None:
        raise problem
    return model
