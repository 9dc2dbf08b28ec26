"""What a run will need: parameters, memory, steps and disk from shapes; time and peak memory by a short trial where a
framework is there. A run that cannot work is refused with the flag that would save it."""

from __future__ import annotations

from typing import Any

from persona.core.host.contracts import Runtime
from persona.core.host.errors import BackendMissing
from persona.core.host.host import Host
from persona.core.training.plan import LowRank, Weights
from persona.core.training.priors import missing_class_pictures
from persona.core.training.processes import share_of
from persona.core.training.views import views_of
from persona.hub.bases import cache_folder
from persona.runs.abilities import refuse_unable
from persona.runs.accelerate_file import in_words
from persona.runs.backends import choose_backend
from persona.runs.calibration import Calibration, calibrate
from persona.runs.launching import devices_of
from persona.runs.preparing import Prepared
from persona.runs.sizes import (
    all_parameters,
    checkpoint_bytes,
    disk_bytes,
    encoded_views,
    product_bytes,
    refuse_without_memory,
    refuse_without_room,
    resident_bytes,
    size,
    trained_parameters,
)
from persona.runs.steps import sample_steps


def estimate(ready: Prepared, host: Host | None = None) -> dict[str, Any]:
    """The figures of `persona train --dry-run`; with a host, time and memory are tried out.

    Raises TrainingError for a run that cannot work on this machine."""
    plan, base = ready.plan, ready.base
    refuse_without_room(plan, base, ready.recipe)
    trained = sum(trained_parameters(part, base) for part in plan.trains)
    samples = plan.batch * plan.accumulation * sum(stream.share for stream in plan.streams)
    figures = {
        "method": plan.method,
        "base": base.id,
        "family": base.family,
        "pictures": {
            stream.name: len(stream.pictures) + (stream.generated.count if stream.generated else 0)
            for stream in plan.streams
        },
        "views": {stream.name: len(views_of(stream, plan)) for stream in plan.streams if stream.pictures},
        "size": [plan.width, plan.height],
        "trained_parameters": trained,
        "base_parameters": all_parameters(base),
        "trained_modules": sum(len(part.targets) for part in plan.trains if isinstance(part, LowRank | Weights)),
        "steps": plan.steps,
        "samples_per_step": samples,
        "weights_and_optimizer_bytes": resident_bytes(plan, base),
        "checkpoint_bytes": checkpoint_bytes(plan, base),
        "product_bytes": product_bytes(plan, base),
        "disk_bytes": disk_bytes(plan, base, ready.recipe),
        "learning_rates": [part.learning_rate for part in plan.trains],
        "sample_prompts": list(ready.prompts),
        "notes": list(ready.notes),
    }
    return figures | (tried(ready, host) if host is not None else {})


def tried(ready: Prepared, host: Host) -> dict[str, Any]:
    """Seconds and peak memory by a trial; why not, where no backend can be used."""
    recipe, plan = ready.recipe, ready.plan
    try:
        backend = choose_backend(host, recipe.backend)
    except BackendMissing as error:
        return {"seconds": None, "not_tried": error.message}
    refuse_unable(backend, plan, ready.base, recipe.device)
    free = backend.free_memory(recipe.device) if hasattr(backend, "free_memory") else 0
    devices = devices_of(backend, recipe, plan)
    if recipe.sharding is not None:
        told = in_words(recipe.sharding, len(devices))
        return {"devices": list(devices), "sharding": told, "seconds": None, "not_tried": "a trial is of one process"}
    refuse_without_memory(resident_bytes(plan, ready.base), free, plan, recipe.device)
    runtime = Runtime(recipe.device, recipe.settings.precision, recipe.settings.gradient_checkpointing)
    paints = bool(ready.prompts) or any(stream.generated for stream in plan.streams)
    each = share_of(plan, len(devices))  # what each device does
    found = calibrate(each, ready.base, backend, runtime, paints=paints)
    return {
        "devices": list(devices),
        "seconds": seconds(ready, found),
        "seconds_per_step": found.step,
        "seconds_to_first_step": found.load + found.first_step + found.picture * _encoded(ready),
        "peak_memory_bytes": found.peak_bytes,
    }


def seconds(ready: Prepared, found: Calibration) -> float:
    """How long the whole run will take by what a trial measured."""
    plan, settings = ready.plan, ready.recipe.settings
    rounds = len(sample_steps(settings.sample_every, plan.steps)) + 1
    drawn = rounds * len(ready.prompts) * settings.sample_steps
    drawn += sum(
        missing_class_pictures(
            stream, len(ready.own_class_pictures.get(stream.name, ())), ready.base, plan, cache_folder()
        )
        * stream.generated.steps
        for stream in plan.streams
        if stream.generated
    )
    judged = 0.0
    if ready.validation is not None:
        held_out = len(ready.validation.streams[0].pictures)
        judged = (plan.steps / settings.validation_every + 1) * held_out * found.step * 8 / max(1, plan.batch) / 3
    return (
        found.load
        + found.first_step
        + found.step * (plan.steps - 1)
        + found.picture * _encoded(ready)
        + found.sampler_step * drawn
        + judged
    )


def _encoded(ready: Prepared) -> int:
    return sum(encoded_views(stream, ready.plan) for stream in ready.plan.streams)


def print_estimate(figures: dict[str, Any]) -> None:
    """The same for people."""
    share = figures["trained_parameters"] / figures["base_parameters"]
    rows = [
        ("method", f"{figures['method']} on {figures['base']} ({figures['family']})"),
        ("pictures", ", ".join(f"{count} {name}" for name, count in figures["pictures"].items())),
        ("size", f"{figures['size'][0]} x {figures['size'][1]} pixels"),
        ("trained", f"{figures['trained_parameters']:,} of {figures['base_parameters']:,} parameters ({share:.2%})"),
        ("steps", f"{figures['steps']} of {figures['samples_per_step']} samples"),
        *([("devices", _devices(figures))] if len(figures.get("devices", ())) > 1 else []),
        ("learning rate", ", ".join(f"{rate:g}" for rate in figures["learning_rates"])),
        ("memory", _memory(figures)),
        *([("", figures["sharding"])] if "sharding" in figures else []),
        ("disk", f"{size(figures['disk_bytes'])}, of which the product {size(figures['product_bytes'])}"),
        ("time", _time(figures)),
        ("samples", "; ".join(figures["sample_prompts"])),
    ]
    for name, value in rows:
        print(f"{name:<14} {value}")
    for note in figures["notes"]:
        print(f"note           {note}")


def _devices(figures: dict[str, Any]) -> str:
    count = len(figures["devices"])
    each = figures["samples_per_step"] // count
    if "sharding" in figures:
        return f"{count} ({', '.join(dict.fromkeys(figures['devices']))}), {each} samples of a step on each"
    return f"{count} ({', '.join(dict.fromkeys(figures['devices']))}), {each} samples of a step and this memory on each"


def _memory(figures: dict[str, Any]) -> str:
    static = f"{size(figures['weights_and_optimizer_bytes'])} for weights and optimizer"
    peak = figures.get("peak_memory_bytes")
    return f"{size(peak)} at the most ({static})" if peak else f"{static}, activations on top"


def _time(figures: dict[str, Any]) -> str:
    if figures.get("seconds") is None:
        return f"not tried: {figures.get('not_tried', 'no trial was asked for')}"
    whole = round(figures["seconds"])
    return (
        f"about {whole // 60}:{whole % 60:02d} ({figures['seconds_per_step']:.3g} s a step, the first after "
        f"{figures['seconds_to_first_step']:.1f} s)"
    )
