"""A step on several devices is made of the samples of a step on one, and its figures are those of all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from persona.core.host.errors import NotFinite, UsageError
from persona.core.training.loop import Ingredients, all_views, micro_batches, take_step
from persona.core.training.plan import LowRank, Picture, Stream, TrainingPlan
from persona.core.training.processes import OneProcess, agreed, part_of, share_in_words, shares
from persona.core.training.schedule import NoiseSchedule
from persona.core.training.views import View, size_of
from tests.threads import Threads

SCHEDULE = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
SIZES = [(300, 150), (150, 300), (200, 200), (300, 150), (300, 150)]


class Losses:
    """A session whose losses follow from the noise it is given; not finite for one caption."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.updates = broken, 0

    def accumulate(self, batch: Any) -> Any:
        losses = np.abs(batch.noise).mean(axis=(1, 2, 3))
        return np.where([caption == self.broken for caption in batch.captions], np.nan, losses)

    def update(self, rates: Any, max_norm: float) -> tuple[float, bool]:
        self.updates += 1
        return 1.0, False


class Together(Losses):
    """Its model is in parts."""

    is_sharded, computed = True, 0

    def accumulate(self, batch: Any) -> Any:
        self.computed += 1
        return super().accumulate(batch)


def plan_of(**options: Any) -> TrainingPlan:
    pictures = tuple(Picture(f"/p/{n}.png", (f"p{n}",), sha256=f"{n:064x}", size=size) for n, size in enumerate(SIZES))
    streams = (Stream("instance", pictures), Stream("class", pictures[:3], weight=0.5))
    values = {"steps": 10, "batch": 4, "width": 64, "height": 64, "center_crop": True, **options}
    return TrainingPlan(method="test", trains=(LowRank("unet", ("a",), 1, 1.0, 1e-3),), streams=streams, **values)


def given(plan: TrainingPlan) -> Ingredients:
    def moments(number: int, view: View) -> Any:
        width, height = size_of(plan.streams[number].pictures[view.picture], plan)
        return np.full((2, 4, height // 8, width // 8), float(view.picture), np.float32)

    return Ingredients(SCHEDULE, all_views(plan), moments, {"scaling_factor": 1.0})


def samples(plan: TrainingPlan, update: int, processes: Any) -> list[Any]:
    """Every sample with all that is drawn for it, as bytes."""
    return [
        (names[n], batch.captions[n], float(batch.w[n]), float(batch.timesteps[n]), batch.noise[n].tobytes(),
         batch.latents[n].tobytes())
        for batch, names in micro_batches(plan, given(plan), update, processes)
        for n in range(len(batch))
    ]  # fmt: skip


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize(
    ("batch", "accumulation", "count"), [(4, 1, 2), (4, 1, 4), (2, 2, 4), (1, 3, 3), (4, 3, 6), (6, 2, 4), (3, 4, 2)]
)
def test_together_they_see_the_samples_of_one_device(batch: int, accumulation: int, count: int, buckets: bool) -> None:
    plan = plan_of(batch=batch, accumulation=accumulation, buckets=buckets)
    for update in range(4):
        alone = samples(plan, update, OneProcess())
        parts = [samples(plan, update, OneProcess(rank, count)) for rank in range(count)]
        assert sorted(sample for part in parts for sample in part) == sorted(alone)
        if not buckets:
            assert {len(part) for part in parts} == {len(alone) // count}, "equal shares"


def test_the_parts_of_a_step_do_not_overlap() -> None:
    plan = plan_of(batch=6, accumulation=2)
    taken = [
        (micro, place)
        for rank in range(4)
        for part in [part_of(plan, OneProcess(rank, 4))]
        for micro in part.micros
        for place in part.places(6)
    ]
    assert sorted(taken) == [(micro, place) for micro in range(2) for place in range(6)]
    assert shares(plan, 4) == (2, 2), "micro-batches of 3, and each pair of processes has one of the two"


def test_what_cannot_be_shared_equally_is_refused_in_a_line_that_says_what_could() -> None:
    with pytest.raises(UsageError, match="--batch 3 x --accumulation 1 are 3 samples a step, which 2 devices") as told:
        shares(plan_of(batch=3), 2)
    assert told.value.hint == "For example: --batch 4, or --accumulation 2"
    assert "4 samples a step" in share_in_words(plan_of(), ("cpu", "cpu"))
    assert "2 on each (batch 2 x accumulation 1)" in share_in_words(plan_of(), ("cpu", "cpu"))


def test_the_figures_of_a_step_are_those_of_all_processes() -> None:
    plan = plan_of(accumulation=2)
    alone = take_step(plan, given(plan), Losses(), 3)  # type: ignore[arg-type]
    for found in Threads(2).each(lambda one: take_step(plan, given(plan), Losses(), 3, one)):  # type: ignore[arg-type]
        for name in ("loss", "loss_instance", "loss_class"):
            assert found[name] == pytest.approx(alone[name], rel=1e-12)


@pytest.mark.parametrize(("batch", "accumulation", "count"), [(2, 1, 2), (4, 1, 4), (1, 3, 3), (4, 3, 6)])
@pytest.mark.parametrize("broken", ["", "p1"])
def test_where_none_can_compute_alone_all_compute_equally_often(
    batch: int, accumulation: int, count: int, broken: str
) -> None:
    plan = plan_of(batch=batch, accumulation=accumulation, buckets=True)
    unequal = 0
    for update in range(6):
        sessions = [Together(broken) for _ in range(count)]
        found = Threads(count).each(lambda one: take_step(plan, given(plan), sessions[one.rank], update, one))  # type: ignore[arg-type] # noqa: B023
        own = [len(list(micro_batches(plan, given(plan), update, OneProcess(rank, count)))) for rank in range(count)]
        assert {session.computed for session in sessions} == {max(own)}
        unequal += len(set(own)) > 1
        if broken:
            continue
        alone = take_step(plan, given(plan), Losses(), update)  # type: ignore[arg-type]
        for figures in found:
            for name in ("loss", "loss_instance", "loss_class"):
                assert figures[name] == pytest.approx(alone[name], rel=1e-12)
    assert unequal, "there is something to make equal"


def test_a_loss_that_is_not_finite_stops_every_process_before_its_update() -> None:
    plan = plan_of()
    first = samples(plan, 0, OneProcess(0, 2))
    second = [caption for _, caption, *_ in samples(plan, 0, OneProcess(1, 2))]
    only_second = next(caption for caption in second if caption not in {sample[1] for sample in first})
    sessions = [Losses(only_second), Losses(only_second)]
    found = Threads(2).each(lambda one: take_step(plan, given(plan), sessions[one.rank], 0, one))  # type: ignore[arg-type]
    assert [type(error) for error in found] == [NotFinite, NotFinite]
    assert [session.updates for session in sessions] == [0, 0]


def test_one_wish_is_enough() -> None:
    assert Threads(3).each(lambda one: agreed(one, one.rank == 1)) == [True] * 3
    assert Threads(3).each(lambda one: agreed(one, False)) == [False] * 3
    assert agreed(OneProcess(), True) and not agreed(OneProcess(), False)
