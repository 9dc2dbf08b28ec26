"""The options every method shares. The command line, recipes and docs are made from these fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.options import option
from persona.core.training.plan import Loss, LowRank, NewTokens, Optimizer, Stream, Trained, TrainingPlan
from persona.core.training.targets import names

LEARNING_RATE_SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


@dataclass(frozen=True)
class TrainSettings:
    """What a run needs beside its method's own options; a method may have other defaults for some of them."""

    steps: int = option(300, help="Optimizer steps.", minimum=1)
    epochs: float | None = option(None, help="Passes over the pictures, instead of --steps.", minimum=0.0)
    repeats: int = option(1, help="How often an epoch uses each picture.", minimum=1)
    batch: int = option(4, help="Samples per micro-batch and stream.", minimum=1)
    accumulation: int = option(1, help="Micro-batches per optimizer step.", minimum=1)
    learning_rate: float = option(1e-4, help="Learning rate.", minimum=0.0)
    scale_lr: bool = option(False, help="Multiply learning rates by batch x accumulation; prints the result.")
    part_learning_rate: tuple[str, ...] = option(
        (), help="Another rate for a part: unet=1e-4, text_encoder=1e-5, tokens=5e-3, or, of deltas, for the targets "
        "that a pattern names: attn2.*=1e-5, unet.up_blocks.*=1e-5 (repeatable; the last one counts).",
        metavar="PART=RATE",
    )  # fmt: skip
    schedule: str = option("constant", help="Learning-rate schedule.", choices=LEARNING_RATE_SCHEDULES)
    warmup: float = option(
        0.0, help="The learning rate rises from 0 over so many steps; below 1 it is a share of them.", minimum=0.0
    )
    cycles: int = option(1, help="Restarts of the schedule cosine_with_restarts.", minimum=1)
    power: float = option(1.0, help="Power of the schedule polynomial.", minimum=0.0)
    optimizer: str = option("adamw", help="adamw, or what a plugin gives (persona plugins lists them).", metavar="NAME")
    optimizer_option: tuple[str, ...] = option(
        (), help="A keyword for another optimizer than adamw (repeatable).", metavar="KEY=VALUE"
    )
    adam_beta1: float = option(0.9, help="Decay of the mean of gradients.", minimum=0.0, maximum=1.0)
    adam_beta2: float = option(0.999, help="Decay of the mean of their squares.", minimum=0.0, maximum=1.0)
    adam_epsilon: float = option(1e-8, help="Keeps AdamW from dividing by zero.", minimum=0.0)
    weight_decay: float = option(1e-2, help="AdamW's decoupled weight decay.", minimum=0.0)
    max_grad_norm: float = option(1.0, help="Gradients are clipped to this norm; 0 leaves them.", minimum=0.0)
    ema_decay: float | None = option(
        None, help="Keep moving averages of what is trained, and make the product of them (0.999 is usual).",
        minimum=0.0, maximum=1.0,
    )  # fmt: skip
    seed: int = option(0, help="One number that decides order, noise, crops and initial values.", minimum=0)
    resolution: int = option(0, help="Picture side; 0 takes the base's own.", minimum=0, unit="pixels")
    width: int = option(0, help="Picture width in pixels, where it is not --resolution.", minimum=0)
    height: int = option(0, help="Picture height in pixels, where it is not --resolution.", minimum=0)
    buckets: bool = option(False, help="Train each picture at the aspect bucket nearest to its own proportions.")
    center_crop: bool = option(True, help="Crop the middle, else a random place.")
    random_flip: bool = option(False, help="Mirror half of the pictures.")
    alpha_mask: bool = option(False, help="Learn only what a picture's transparency shows.")
    caption_dropout: float = option(
        0.0, help="Share of samples trained with an empty caption.", minimum=0.0, maximum=1.0
    )
    shuffle_tags: bool = option(False, help="Shuffle the comma-separated tags of captions.")
    keep_tags: int = option(0, help="With --shuffle-tags: the first so many stay in front.", minimum=0)
    min_snr_gamma: float | None = option(None, help="Min-SNR loss weighting (5 is usual).", minimum=0.0)
    noise_offset: float = option(0.0, help="Constant per channel added to the noise.", minimum=0.0)
    precision: str = option("fp32", help="Arithmetic of forward and backward.", choices=("fp32", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, help="Less memory, more time.")
    compile: bool | None = option(
        None, help="Compile the denoiser: a slow first step, then mostly faster ones; default: as the backend does."
    )
    save_every: int = option(100, help="Steps between checkpoints; 0 saves only at the end.", minimum=0)
    keep_last: int = option(2, help="Checkpoints that are kept.", minimum=1)
    samples: bool = option(True, help="Sample pictures while training; without, nothing is painted at all.")
    sample_every: int = option(0, help="Steps between samples; 0 samples before, half-way and after.", minimum=0)
    sample_prompts: tuple[str, ...] = option(
        (), help="A prompt to sample (repeatable).", flag="--sample-prompt", metavar="TEXT"
    )
    sample_steps: int = option(25, help="Sampler steps of a sample.", minimum=1)
    guidance_scale: float = option(4.0, help="Classifier-free guidance of samples.", minimum=0.0)
    validation_data: str | None = option(
        None, help="Pictures held out of training; their loss is followed, always with the same noise.", metavar="DIR"
    )
    validation_every: int = option(50, help="Steps between validation losses (with --validation-data).", minimum=1)
    tracker: tuple[str, ...] = option(
        (), help="Also tell a tracker: tensorboard, visualdl, wandb (repeatable).", metavar="NAME"
    )
    also: tuple[str, ...] = option(
        (), help="Also write the adapter in another dialect, such as kohya (repeatable).", metavar="DIALECT"
    )
    title: str | None = option(None, help="Name of the product in its metadata; default: its word.", metavar="TEXT")
    thumbnail: bool = option(False, help="Put the first sample into the product's metadata.")


def plan_from(
    settings: TrainSettings,
    *,
    method: str,
    trains: tuple[Trained, ...],
    streams: tuple[Stream, ...],
    size: tuple[int, int],
    metadata: dict[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> TrainingPlan:
    """A TrainingPlan with the shared fields filled in; `size` is (width, height) after defaults.

    Here epochs become steps, a warm-up share becomes steps, and learning rates get their parts' values and scale.
    Raises UsageError for a part that is not trained."""
    trains, told = _learning_rates(settings, trains)
    plan = TrainingPlan(
        method=method,
        trains=trains,
        streams=streams,
        steps=settings.steps,
        batch=settings.batch,
        accumulation=settings.accumulation,
        seed=settings.seed,
        width=size[0],
        height=size[1],
        center_crop=settings.center_crop,
        random_flip=settings.random_flip,
        buckets=settings.buckets,
        caption_dropout=settings.caption_dropout,
        shuffle_tags=settings.shuffle_tags,
        keep_tags=settings.keep_tags,
        loss=Loss(min_snr_gamma=settings.min_snr_gamma, noise_offset=settings.noise_offset),
        ema_decay=settings.ema_decay,
        precision=settings.precision,  # type: ignore[arg-type]
        gradient_checkpointing=settings.gradient_checkpointing,
        compile=settings.compile,
        metadata=metadata or {},
    )
    from persona.core.training.epochs import steps_of  # needs numpy, and `persona train --help` does not

    steps = settings.steps if settings.epochs is None else steps_of(plan, settings.epochs)
    if settings.epochs is not None:
        told.append(f"{settings.epochs:g} epochs are {steps} steps")
    return dataclasses.replace(plan, steps=steps, optimizer=_optimizer(settings, steps), notes=(*notes, *told))


def _optimizer(settings: TrainSettings, steps: int) -> Optimizer:
    warmup = round(settings.warmup * steps) if settings.warmup < 1 else round(settings.warmup)
    schedule = settings.schedule
    if warmup and schedule == "constant":  # by itself it would not warm up, and nobody asks for what has no effect
        schedule = "constant_with_warmup"
    return Optimizer(
        name=settings.optimizer,
        beta1=settings.adam_beta1,
        beta2=settings.adam_beta2,
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        schedule=schedule,
        warmup=warmup,
        cycles=settings.cycles,
        power=settings.power,
    )


def _learning_rates(settings: TrainSettings, trains: tuple[Trained, ...]) -> tuple[tuple[Trained, ...], list[str]]:
    """The trained parts with the rates that were asked for, and what to tell about it."""
    told: list[str] = []
    for part, rate in assignments(settings.part_learning_rate, "--part-learning-rate"):
        known = {name for trained in trains for name in part_names(trained)}
        if part not in known and not any(_named(trained, part) for trained in trains):
            raise UsageError(
                f"--part-learning-rate {part}: this run trains no such part. {did_you_mean(part, sorted(known))}",
                hint=f"For example: --part-learning-rate {min(known)}=1e-5",
            )
        trains = tuple(
            piece
            for trained in trains
            for piece in (
                [dataclasses.replace(trained, learning_rate=rate)]
                if part in part_names(trained)
                else _with_rate(trained, part, rate)
            )
        )
    if settings.scale_lr:
        factor = settings.batch * settings.accumulation
        before = [trained.learning_rate for trained in trains]
        trains = tuple(
            dataclasses.replace(trained, learning_rate=rate * factor) for trained, rate in _with(trains, before)
        )
        rates = ", ".join(f"{rate:g} -> {rate * factor:g}" for rate in dict.fromkeys(before))
        told.append(
            f"--scale-lr: batch {settings.batch} x accumulation {settings.accumulation} = {factor}; "
            f"learning rate {rates}"
        )
    return trains, told


def _with(trains: tuple[Trained, ...], rates: list[float]) -> Iterable[tuple[Trained, float]]:
    return zip(trains, rates, strict=True)


def _named(trained: Trained, pattern: str) -> tuple[str, ...]:
    """The targets of deltas that a pattern names."""
    if not isinstance(trained, LowRank):
        return ()
    return tuple(path for path in trained.targets if names(trained.component, path, pattern))


def _with_rate(trained: Trained, pattern: str, rate: float) -> list[Trained]:
    """The part as two: the targets that the pattern does not name, and those it does, at another learning rate."""
    named = _named(trained, pattern)
    if not isinstance(trained, LowRank) or not named:
        return [trained]
    pieces = []
    for targets, its in ((tuple(p for p in trained.targets if p not in named), trained.learning_rate), (named, rate)):
        ranks = {path: value for path, value in trained.ranks.items() if path in targets}
        alphas = {path: value for path, value in trained.alphas.items() if path in targets}
        pieces.append(dataclasses.replace(trained, targets=targets, learning_rate=its, ranks=ranks, alphas=alphas))
    return [piece for piece in pieces if piece.targets]


def part_names(trained: Trained) -> tuple[str, ...]:
    """What a trained part may be called: its component, or `tokens` for new words."""
    return ("tokens",) if isinstance(trained, NewTokens) else (trained.component,)


def assignments(words: Iterable[str], flag: str) -> list[tuple[str, float]]:
    """(name, number) of `name=number` words. Raises UsageError for anything else."""
    found = []
    for word in words:
        name, sign, text = word.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not sign or not name or not math.isfinite(number):
            raise UsageError(
                f"{flag} {word!r} is not of the form NAME=NUMBER.", hint=f"For example: {flag} {name or 'unet'}=4"
            )
        found.append((name.strip(), number))
    return found


def picture_size(settings: TrainSettings, native: int, multiple: int) -> tuple[int, int]:
    """(width, height) in pixels: what was asked for, or the base's `native` side, rounded down to the VAE's
    `multiple`."""
    width = settings.width or settings.resolution or settings.height or native
    height = settings.height or settings.resolution or settings.width or native
    return max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple)
