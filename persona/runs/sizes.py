"""What a run takes, worked out from shapes: parameters, memory, disk. A run that cannot fit is refused with the flag
that would save it. No framework is needed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from persona.core.host.errors import TrainingError
from persona.core.training.base import Base
from persona.core.training.lora_values import FROM_WEIGHT
from persona.core.training.plan import LowRank, NewTokens, Trained, TrainingPlan, Weights
from persona.core.training.targets import linear_modules
from persona.core.training.views import views_of
from persona.runs.recipe import Recipe

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def trained_parameters(part: Trained, base: Base) -> int:
    """How many numbers a part trains."""
    if isinstance(part, LowRank):
        shapes = linear_modules(base.parameters[part.component])
        total = 0
        for path in part.targets:
            rank, shape = part.ranks.get(path, part.rank), shapes[path]
            total += rank * (math.prod(shape[1:]) + shape[0]) + (shape[0] if part.decomposed else 0)
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


def resident_bytes(plan: TrainingPlan, base: Base) -> int:
    """What has to be in memory at the least: the base in the run's precision, and of every trained number its value,
    gradient and AdamW's two moments in fp32, with its average when one is kept."""
    whole = {part.component for part in plan.trains if isinstance(part, Weights)}
    frozen = sum(
        math.prod(parameter.shape) * (4 if component in whole else BYTES[plan.precision])
        for component, stored in base.parameters.items()
        for parameter in stored.values()
    )
    in_place = sum(trained_parameters(part, base) for part in plan.trains if isinstance(part, Weights))
    trained = sum(trained_parameters(part, base) for part in plan.trains)
    values = trained * (16 + (4 if plan.ema_decay is not None else 0))
    return frozen - 4 * in_place + values + 4 * _first_factors(plan, base)


def product_bytes(plan: TrainingPlan, base: Base) -> int:
    """The size of the product: deltas and tokens as they are, whole weights with all of their component."""
    whole = {part.component for part in plan.trains if isinstance(part, Weights)}
    stored = sum(math.prod(p.shape) for name in whole for p in base.parameters[name].values())
    small = [part for part in plan.trains if not isinstance(part, Weights)]
    return 4 * (stored + sum(trained_parameters(part, base) for part in small) + _first_factors(plan, base))


def disk_bytes(plan: TrainingPlan, base: Base, recipe: Recipe) -> int:
    """What a run leaves: its checkpoints, latents, and the product in every dialect."""
    latents = sum(
        encoded_views(stream, plan) * 2 * base.latent_channels * (plan.width // base.latent_factor)
        * (plan.height // base.latent_factor) * 4
        for stream in plan.streams
    )  # fmt: skip
    products = product_bytes(plan, base) * (1 + len(recipe.settings.also))
    return checkpoint_bytes(plan, base) * kept_checkpoints(plan, recipe) + latents + products


def room_bytes(plan: TrainingPlan, base: Base, recipe: Recipe) -> int:
    """What a run needs while it goes: what it leaves, the checkpoint that is written before an older one goes, and the
    product a second time while it is finished."""
    saved = math.ceil(plan.steps / recipe.settings.save_every) if recipe.settings.save_every else 1
    more = checkpoint_bytes(plan, base) if saved > kept_checkpoints(plan, recipe) else 0
    return disk_bytes(plan, base, recipe) + more + product_bytes(plan, base)


def kept_checkpoints(plan: TrainingPlan, recipe: Recipe) -> int:
    """How many checkpoints there are at the end."""
    saved = math.ceil(plan.steps / recipe.settings.save_every) if recipe.settings.save_every else 1
    return min(saved, recipe.settings.keep_last)


def checkpoint_bytes(plan: TrainingPlan, base: Base) -> int:
    """Value and two moments of every trained number, and its average when one is kept."""
    trained = sum(trained_parameters(part, base) for part in plan.trains)
    return trained * (12 + (4 if plan.ema_decay is not None else 0)) + 4 * _first_factors(plan, base)


def _first_factors(plan: TrainingPlan, base: Base) -> int:
    """How many numbers are kept of what deltas started from, where that is the base's own weight."""
    from_weight = [part for part in plan.trains if isinstance(part, LowRank) and part.initialisation in FROM_WEIGHT]
    return sum(trained_parameters(part, base) for part in from_weight)


def encoded_views(stream: Any, plan: TrainingPlan) -> int:
    """How many views of a stream have to be encoded, of pictures still to be made too."""
    each = len(views_of(stream, plan)) // max(1, len(stream.pictures)) if stream.pictures else 1
    made = max(0, stream.generated.count - len(stream.pictures)) if stream.generated else 0
    return each * (len(stream.pictures) + made)


def refuse_without_room(plan: TrainingPlan, base: Base, recipe: Recipe) -> None:
    """Raises TrainingError when the disk cannot hold what the run would write."""
    place = Path(recipe.output).absolute() if recipe.output else Path.cwd()
    while not place.is_dir():
        place = place.parent
    needed, free = room_bytes(plan, base, recipe), shutil.disk_usage(place).free
    if needed > free:
        kept = kept_checkpoints(plan, recipe)
        fewer = kept > 1 and needed - checkpoint_bytes(plan, base) * (kept - 1) <= free
        raise TrainingError(
            f"The run would write {size(needed)}, and {place} has {size(free)} free.",
            hint="Keep one checkpoint: --keep-last 1" if fewer else "Name a folder on another disk: --output FOLDER",
        )


def refuse_without_memory(needed: int, free: int, plan: TrainingPlan, device: str) -> None:
    """Raises TrainingError when weights and optimizer alone do not fit; `free` 0 means that it is not known."""
    if not free or needed <= free:
        return
    hints = ["--gradient-checkpointing"] if not plan.gradient_checkpointing else []
    if plan.precision == "fp32":
        hints.insert(0, "--precision bf16")
    if any(isinstance(part, Weights) for part in plan.trains):
        hints.insert(0, "train deltas instead: --plugin lora, or dreambooth --lora")
    raise TrainingError(
        f"Weights and optimizer alone take {size(needed)}, and {device} has {size(free)} free.",
        hint=f"Lower it: {', or '.join(hints) or 'a smaller base'}",
    )


def size(count: float) -> str:
    """Bytes in the unit people read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
