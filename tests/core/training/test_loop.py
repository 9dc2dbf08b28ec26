"""What each optimizer step is made of: batches of one size, epochs, captions, weights, validation."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest

from persona.core.training.conditioning import EncodedCaptions
from persona.core.training.epochs import steps_of
from persona.core.training.loop import Ingredients, all_views, learning_rates, micro_batches, take_step
from persona.core.training.order import bucket_batch, bucket_batch_count
from persona.core.training.plan import LowRank, Optimizer, Picture, Stream, TrainingPlan
from persona.core.training.schedule import NoiseSchedule
from persona.core.training.settings import TrainSettings, plan_from
from persona.core.training.validation import TIMESTEPS, validation_batches, validation_loss
from persona.core.training.views import View, size_of

SCHEDULE = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
WIDE, TALL, SQUARE = (300, 150), (150, 300), (200, 200)


def pictures(*sizes: tuple[int, int], repeats: int = 1) -> tuple[Picture, ...]:
    return tuple(
        Picture(f"/p/{n}.png", (f"picture {n}",), sha256=f"{n:064x}", size=size, repeats=repeats)
        for n, size in enumerate(sizes)
    )


def plan_of(*streams: Stream, **options: Any) -> TrainingPlan:
    part = LowRank("unet", ("a",), 1, 1.0, 1e-3)
    values = {"steps": 10, "batch": 2, "width": 64, "height": 64, "center_crop": True, **options}
    return TrainingPlan(method="test", trains=(part,), streams=streams, **values)


def given(plan: TrainingPlan, **options: Any) -> Ingredients:
    def moments(number: int, view: View) -> Any:
        width, height = size_of(plan.streams[number].pictures[view.picture], plan)
        return np.full((2, 4, height // 8, width // 8), float(view.picture), np.float32)

    return Ingredients(SCHEDULE, all_views(plan), moments, {"scaling_factor": 1.0}, **options)


def test_with_buckets_every_batch_has_one_size_and_an_epoch_every_picture() -> None:
    stream = Stream("pictures", pictures(WIDE, TALL, SQUARE, WIDE, WIDE, SQUARE))
    plan = plan_of(stream, buckets=True)
    seen: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for update in range(4):  # ⌈3/2⌉ wide + ⌈1/2⌉ tall + ⌈2/2⌉ square batches of an epoch
        for batch, names in micro_batches(plan, given(plan), update):
            assert len(batch) == len(batch.captions) == len(names) <= 2
            for caption, weight in zip(batch.captions, batch.w, strict=True):
                seen[caption] += 1
                weights[caption] += float(weight)
    assert seen == {f"picture {n}": 1 for n in range(6)}
    assert set(weights.values()) == {0.5}, "a short batch does not make its pictures count more"


def test_buckets_are_the_sizes_the_pictures_are_encoded_at() -> None:
    plan = plan_of(Stream("pictures", pictures(WIDE, TALL, SQUARE)), buckets=True, width=512, height=512)
    sizes = [size_of(picture, plan) for picture in plan.streams[0].pictures]
    assert sizes == [(704, 320), (320, 704), (512, 512)]  # 2:1 among multiples of 64 within 512² pixels
    assert all(size_of(p, dataclasses.replace(plan, buckets=False)) == (512, 512) for p in plan.streams[0].pictures)


def test_streams_of_two_sizes_come_one_after_the_other() -> None:
    plan = plan_of(Stream("instance", pictures(WIDE)), Stream("class", pictures(SQUARE)), buckets=True)
    batches = list(micro_batches(plan, given(plan), 0))
    assert [names for _, names in batches] == [("instance",), ("class",)]
    assert len({batch.latents.shape for batch, _ in batches}) == 2
    plain = dataclasses.replace(plan, buckets=False)
    together = list(micro_batches(plain, given(plain), 0))
    assert [names for _, names in together] == [("instance", "instance", "class", "class")]


def test_bucket_batches_follow_from_their_number_alone() -> None:
    sizes, repeats = [WIDE, TALL, WIDE, SQUARE, TALL], [1, 2, 3, 1, 1]
    count = bucket_batch_count(sizes, repeats, 2)
    assert count == 2 + 2 + 1  # 4 wide, 3 tall, 1 square
    epochs = [
        Counter(int(n) for k in range(count) for n in bucket_batch(7, "s", sizes, repeats, 2, epoch * count + k))
        for epoch in range(3)
    ]
    assert epochs == [Counter({0: 1, 1: 2, 2: 3, 3: 1, 4: 1})] * 3
    rows = [[tuple(bucket_batch(7, "s", sizes, repeats, 2, e * count + k)) for k in range(count)] for e in range(2)]
    assert rows[0] != rows[1], "each epoch has its own order"


def test_epochs_become_steps() -> None:
    stream = Stream("pictures", pictures(WIDE, TALL, SQUARE, WIDE, WIDE, repeats=4))
    assert steps_of(plan_of(stream), 3) == 30  # 3 · 20 uses / 2 a batch
    assert steps_of(plan_of(stream, accumulation=4), 1) == 3  # ⌈20 / 8⌉
    # buckets: 12 wide, 4 tall, 4 square uses are 6 + 2 + 2 batches; with flips every picture is there twice
    assert steps_of(plan_of(stream, buckets=True), 2) == 20
    odd = Stream("pictures", pictures(WIDE, TALL, SQUARE))
    assert steps_of(plan_of(odd, buckets=True), 5) == 15 and steps_of(plan_of(odd), 5) == 8


def test_a_warm_up_below_one_is_a_share_of_the_steps() -> None:
    part = LowRank("unet", ("a",), 1, 1.0, 1e-3)
    streams = (Stream("pictures", pictures(SQUARE)),)

    def made(**options: Any) -> TrainingPlan:
        settings = TrainSettings(**options)
        return plan_from(settings, method="test", trains=(part,), streams=streams, size=(64, 64))

    assert made(steps=200, warmup=0.1).optimizer.warmup == 20
    assert made(steps=200, warmup=30).optimizer.warmup == 30
    plan = made(steps=200, warmup=0.1)
    assert [learning_rates(plan, step)[0] for step in (0, 10, 20, 199)] == pytest.approx([0, 5e-4, 1e-3, 1e-3])
    assert made(epochs=50, batch=1).steps == 50
    restarts = dataclasses.replace(plan, optimizer=Optimizer(schedule="cosine_with_restarts", cycles=2))
    assert learning_rates(restarts, 100)[0] == pytest.approx(1e-3), "the second cycle begins half-way"


def test_shuffled_tags_keep_the_first_and_are_the_same_on_every_run() -> None:
    stream = Stream("pictures", (Picture("/p.png", ("sks, red, round, small, old",), size=SQUARE),))
    plan = plan_of(stream, shuffle_tags=True, keep_tags=1, batch=16)
    ((batch, _),) = micro_batches(plan, given(plan), 3)
    assert all(caption.startswith("sks, ") for caption in batch.captions)
    assert all(sorted(caption.split(", ")) == ["old", "red", "round", "sks", "small"] for caption in batch.captions)
    assert len(set(batch.captions)) > 4
    ((again, _),) = micro_batches(plan, given(plan), 3)
    assert again.captions == batch.captions


def test_captions_are_encoded_alone_and_once() -> None:
    asked: list[list[str]] = []

    def encode(captions: list[str]) -> dict[str, Any]:
        asked.append(captions)
        return {"hidden_states": np.full((1, 2), len(captions[0]), np.float32)}

    encoded = EncodedCaptions(encode, ["a", "bb"], lambda done, total: None)
    assert asked == [["a"], ["bb"]] and len(encoded) == 2
    assert encoded["ccc"]["hidden_states"].tolist() == [3, 3] and encoded["ccc"] is encoded["ccc"]
    assert asked == [["a"], ["bb"], ["ccc"]]


class Recording:
    """A session that answers with the mean of what it was shown."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def evaluate(self, batch: Any) -> Any:
        self.batches.append(batch)
        return np.abs(batch.noise).mean(axis=(1, 2, 3)) + batch.latents.mean(axis=(1, 2, 3))


def test_the_validation_loss_is_always_of_the_same_noise_and_timesteps() -> None:
    """kohya's docs/validation.md: a loss that can be compared needs fixed noise and timesteps."""
    plan = plan_of(Stream("validation", pictures(SQUARE, WIDE)), buckets=True, seed=4)
    first, second = Recording(), Recording()
    loss = validation_loss(plan, given(plan), first)
    assert loss == validation_loss(dataclasses.replace(plan, steps=999, batch=7), given(plan), second)
    for one, two in zip(first.batches, second.batches, strict=True):
        assert np.array_equal(one.noise, two.noise) and np.array_equal(one.timesteps, two.timesteps)
        eighths = (np.asarray(one.timesteps) * TIMESTEPS // 1000).astype(int)
        assert eighths.tolist() == list(range(TIMESTEPS)), "one timestep in each part of the schedule"
    assert len(first.batches) == 2 and first.batches[0].latents.shape != first.batches[1].latents.shape
    by_hand = np.concatenate([Recording().evaluate(batch) for batch in validation_batches(plan, given(plan))])
    assert loss == pytest.approx(by_hand.mean())


def test_sizes_are_told_to_sdxl_for_each_picture() -> None:
    stream = Stream("pictures", pictures(WIDE, TALL))
    plan = plan_of(stream, buckets=True, batch=1)

    def time_ids(number: int, view: View) -> Any:
        return np.array([view.picture] * 6, np.float32)

    for update in range(2):
        ((batch, _),) = micro_batches(plan, given(plan, time_ids=time_ids), update)
        assert batch.time_ids is not None
        assert batch.time_ids[0, 0] == int(batch.captions[0].removeprefix("picture "))


class Counting:
    """A session that learns nothing and writes down what the core asks of it; its second update overflows."""

    def __init__(self) -> None:
        self.decays: list[float] = []
        self.updates = 0

    def accumulate(self, batch: Any) -> Any:
        return np.ones(len(batch), np.float32)

    def update(self, learning_rates: Any, max_norm: float) -> tuple[float, bool]:
        self.updates += 1
        return (float("inf"), True) if self.updates == 2 else (1.0, False)

    def average(self, decay: float) -> None:
        self.decays.append(decay)


def test_the_core_says_how_fast_averages_follow_and_counts_every_update() -> None:
    """As diffusers' EMAModel, n / (n + 9) up to the limit, whose step counts updates that overflowed too."""
    plan = plan_of(Stream("pictures", pictures(SQUARE)), ema_decay=0.3)
    session = Counting()
    for update in range(5):
        take_step(plan, given(plan), session, update)  # type: ignore[arg-type]
    assert session.decays == pytest.approx([0.0, 2 / 11, 3 / 12, 0.3, 0.3])
    without = Counting()
    take_step(dataclasses.replace(plan, ema_decay=None), given(plan), without, 0)  # type: ignore[arg-type]
    assert without.decays == []
