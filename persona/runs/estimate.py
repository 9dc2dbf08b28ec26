"""What a run will need, before anything is loaded: parameters, memory, steps, disk. Figures are worked out from shapes;
what cannot be known without running (time) is left out rather than guessed."""

from __future__ import annotations

import math
from typing import Any

from persona.core.training.base import Base
from persona.core.training.plan import LowRank, NewTokens, Trained, Weights
from persona.core.training.targets import linear_modules
from persona.core.training.views import views_of
from persona.runs.training import Prepared

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def trained_parameters(part: Trained, base: Base) -> int:
    """How many numbers a part trains."""
    if isinstance(part, LowRank):
        shapes = linear_modules(base.parameters[part.component])
        total = 0
        for path in part.targets:
            rank, shape = part.ranks.get(path, part.rank), shapes[path]
            total += rank * (math.prod(shape[1:]) + shape[0])
        return total
    if isinstance(part, NewTokens):
        rows = sum(token.vectors for token in part.tokens)
        return sum(rows * int(base.components[name]["hidden_size"]) for name in part.components)
    stored = base.parameters[part.component]
    return sum(
        math.prod(parameter.shape)
        for name, parameter in stored.items()
        if not part.targets or name.startswith(tuple(part.targets))
    )


def all_parameters(base: Base) -> int:
    """How many numbers the base has."""
    return sum(math.prod(parameter.shape) for stored in base.parameters.values() for parameter in stored.values())


def estimate(ready: Prepared) -> dict[str, Any]:
    """The figures of `persona train --dry-run`."""
    plan, base = ready.plan, ready.base
    trained = sum(trained_parameters(part, base) for part in plan.trains)
    everything = all_parameters(base)
    width = BYTES[plan.precision]
    optimizer_bytes = trained * (4 + 4 + 4 + 4)  # fp32 values, gradient and AdamW's two moments
    pictures = {
        stream.name: len(stream.pictures) + (stream.generated.count if stream.generated else 0)
        for stream in plan.streams
    }
    samples = plan.batch * plan.accumulation * sum(stream.share for stream in plan.streams)
    checkpoint = trained * 12
    return {
        "method": plan.method,
        "base": base.id,
        "family": base.family,
        "pictures": pictures,
        "views": {stream.name: len(views_of(stream, plan)) for stream in plan.streams if stream.pictures},
        "size": [plan.width, plan.height],
        "trained_parameters": trained,
        "base_parameters": everything,
        "trained_modules": sum(len(part.targets) for part in plan.trains if isinstance(part, LowRank | Weights)),
        "steps": plan.steps,
        "samples_per_step": samples,
        "weights_and_optimizer_bytes": everything * width + optimizer_bytes,
        "checkpoint_bytes": checkpoint,
        "disk_bytes": checkpoint * ready.recipe.settings.keep_last + trained * 4,
        "learning_rates": [part.learning_rate for part in plan.trains],
        "sample_prompts": list(ready.prompts),
        "notes": list(ready.notes),
    }


def print_estimate(figures: dict[str, Any]) -> None:
    """The same for people."""
    share = figures["trained_parameters"] / figures["base_parameters"]
    rows = [
        ("method", f"{figures['method']} on {figures['base']} ({figures['family']})"),
        ("pictures", ", ".join(f"{count} {name}" for name, count in figures["pictures"].items())),
        ("size", f"{figures['size'][0]} x {figures['size'][1]} pixels"),
        ("trained", f"{figures['trained_parameters']:,} of {figures['base_parameters']:,} parameters ({share:.2%})"),
        ("steps", f"{figures['steps']} of {figures['samples_per_step']} samples"),
        ("learning rate", ", ".join(f"{rate:g}" for rate in figures["learning_rates"])),
        ("memory", f"{size(figures['weights_and_optimizer_bytes'])} for weights and optimizer, activations on top"),
        ("disk", f"{size(figures['disk_bytes'])} for checkpoints and product"),
        ("samples", "; ".join(figures["sample_prompts"])),
    ]
    for name, value in rows:
        print(f"{name:<14} {value}")
    for note in figures["notes"]:
        print(f"note           {note}")


def size(count: float) -> str:
    """Bytes in the unit people read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
