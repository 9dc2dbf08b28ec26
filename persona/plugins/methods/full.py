"""Full fine-tuning: the weights themselves are trained, all of them or the parts that are named, on captioned pictures.

The product is a diffusers folder with the components that changed, as large as they are; on many captioned pictures it
learns most, on few it forgets most (that is what DreamBooth's prior preservation is for)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona.core.host.errors import UsageError
from persona.core.options import option
from persona.core.training.base import Base
from persona.core.training.plan import Picture, Stream, TrainingPlan, Weights
from persona.core.training.settings import TrainSettings, picture_size, plan_from
from persona.core.training.targets import resolve_weights
from persona.plugins.methods.lora import captioned, check_captions


@dataclass(frozen=True)
class FullOptions:
    """What full fine-tuning can be told."""

    prompt: str | None = option(None, help="Caption of pictures that bring none of their own.", metavar="TEXT")
    train_denoiser: bool = option(True, help="Train the denoiser.")
    train_text_encoder: bool = option(False, help="Train the text encoders too.")
    text_encoder_learning_rate: float | None = option(None, help="Their learning rate, when it is another.")
    targets: tuple[str, ...] = option(
        (), help="Only these parts of the denoiser: attn2, mid_block, *.norm? (repeatable).", flag="--target",
        metavar="PATTERN",
    )  # fmt: skip


class Full:
    """Whole weights, learned from captioned pictures."""

    name = "full"
    summary = "The weights themselves, whole or by parts: for many captioned pictures"
    Options = FullOptions

    def plan(
        self, options: FullOptions, settings: TrainSettings, base: Base, pictures: Sequence[Picture]
    ) -> TrainingPlan:
        """Whole weights of the denoiser and, when asked for, the text encoders, from one stream of pictures."""
        check_captions(pictures, options.prompt)
        return plan_from(
            settings,
            method=self.name,
            trains=weights(options, settings.learning_rate, base),
            streams=(Stream("pictures", captioned(pictures, options.prompt or "")),),
            size=picture_size(settings, base.native_size, base.latent_factor),
        )


def weights(options: FullOptions, learning_rate: float, base: Base) -> tuple[Weights, ...]:
    """The trained parts. Raises UsageError when nothing is left to train."""
    parts = []
    if options.train_denoiser:
        targets = resolve_weights(base, base.denoiser, options.targets) if options.targets else ()
        parts.append(Weights(base.denoiser, learning_rate, tuple(f"{path}." for path in targets)))
    if options.train_text_encoder:
        rate = learning_rate if options.text_encoder_learning_rate is None else options.text_encoder_learning_rate
        parts += [Weights(name, rate) for name in base.text_encoders]
    if not parts:
        raise UsageError("Nothing would be trained.", hint="Add --train-text-encoder, or leave --no-train-denoiser out")
    return tuple(parts)
