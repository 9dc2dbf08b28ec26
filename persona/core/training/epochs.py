"""How many optimizer steps some passes over the pictures are."""

from __future__ import annotations

import math

from persona.core.host.errors import UsageError
from persona.core.training.order import bucket_batch_count
from persona.core.training.plan import TrainingPlan
from persona.core.training.views import repeats_of, sizes_of, views_of


def steps_of(plan: TrainingPlan, epochs: float) -> int:
    """Optimizer steps of `epochs` passes over the pictures of the plan's first stream that has some, each used
    `repeats` times; at least one. With aspect buckets a pass ends with a short batch in each of them.

    Raises UsageError when no stream brings pictures of its own."""
    stream = next((stream for stream in plan.streams if stream.pictures), None)
    if stream is None or epochs <= 0:
        raise UsageError(f"{epochs:g} epochs are no steps.", hint="Say how many: --steps 300")
    each = plan.batch * stream.share
    if not plan.buckets:
        uses = sum(picture.repeats for picture in stream.pictures)
        return max(1, math.ceil(epochs * uses / (each * plan.accumulation)))
    views = views_of(stream, plan)
    batches = bucket_batch_count(sizes_of(stream, views, plan), repeats_of(stream, views), each)
    rounds = len(views) / len(stream.pictures)  # crops and mirrorings of one picture
    return max(1, math.ceil(epochs * batches / rounds / plan.accumulation))
