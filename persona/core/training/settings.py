"""The options every method shares. The command line, recipes and docs are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from persona.core.options import option
from persona.core.training.plan import Loss, Optimizer, Stream, Trained, TrainingPlan

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
    batch: int = option(4, help="Samples per micro-batch and stream.", minimum=1)
    accumulation: int = option(1, help="Micro-batches per optimizer step.", minimum=1)
    learning_rate: float = option(1e-4, help="Learning rate.", minimum=0.0)
    schedule: str = option("constant", help="Learning-rate schedule.", choices=LEARNING_RATE_SCHEDULES)
    warmup: int = option(0, help="Steps over which the learning rate rises from 0.", minimum=0)
    weight_decay: float = option(1e-2, help="AdamW's decoupled weight decay.", minimum=0.0)
    max_grad_norm: float = option(1.0, help="Gradients are clipped to this norm; 0 leaves them.", minimum=0.0)
    seed: int = option(0, help="One number that decides order, noise, crops and initial values.", minimum=0)
    width: int = option(0, help="Picture width in pixels; 0 takes the base's own size.", minimum=0)
    height: int = option(0, help="Picture height in pixels; 0 takes the base's own size.", minimum=0)
    center_crop: bool = option(True, help="Crop the middle, else a random place.")
    random_flip: bool = option(False, help="Mirror half of the pictures.")
    caption_dropout: float = option(
        0.0, help="Share of samples trained with an empty caption.", minimum=0.0, maximum=1.0
    )
    min_snr_gamma: float | None = option(None, help="Min-SNR loss weighting (5 is usual).", minimum=0.0)
    noise_offset: float = option(0.0, help="Constant per channel added to the noise.", minimum=0.0)
    precision: str = option("fp32", help="Arithmetic of forward and backward.", choices=("fp32", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, help="Less memory, more time.")
    save_every: int = option(100, help="Steps between checkpoints; 0 saves only at the end.", minimum=0)
    keep_last: int = option(2, help="Checkpoints that are kept.", minimum=1)
    sample_every: int = option(0, help="Steps between samples; 0 samples before, half-way and after.", minimum=0)
    sample_prompts: tuple[str, ...] = option(
        (), help="A prompt to sample (repeatable).", flag="--sample-prompt", metavar="TEXT"
    )
    sample_steps: int = option(25, help="Sampler steps of a sample.", minimum=1)
    guidance_scale: float = option(4.0, help="Classifier-free guidance of samples.", minimum=0.0)


def plan_from(
    settings: TrainSettings,
    *,
    method: str,
    trains: tuple[Trained, ...],
    streams: tuple[Stream, ...],
    size: tuple[int, int],
    metadata: dict[str, str] | None = None,
) -> TrainingPlan:
    """A TrainingPlan with the shared fields filled in; `size` is (width, height) after defaults."""
    return TrainingPlan(
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
        caption_dropout=settings.caption_dropout,
        loss=Loss(min_snr_gamma=settings.min_snr_gamma, noise_offset=settings.noise_offset),
        optimizer=Optimizer(
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            schedule=settings.schedule,
            warmup=settings.warmup,
        ),
        precision=settings.precision,  # type: ignore[arg-type]
        gradient_checkpointing=settings.gradient_checkpointing,
        metadata=metadata or {},
    )


def picture_size(settings: TrainSettings, native: int, multiple: int) -> tuple[int, int]:
    """(width, height) in pixels: what was asked for, or the base's `native` side, rounded down to the VAE's
    `multiple`."""
    width = settings.width or settings.height or native
    height = settings.height or settings.width or native
    return max(multiple, width // multiple * multiple), max(multiple, height // multiple * multiple)
