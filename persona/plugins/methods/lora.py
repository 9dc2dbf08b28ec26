"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank deltas beside frozen weights.

x ──► W (frozen) ──────────────► + ──► y
│                                ▲
└──► down [r, in] ─► up [out, r] ┘ × alpha / r
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona.core.host.errors import UsageError
from persona.core.options import option
from persona.core.training.base import Base
from persona.core.training.plan import LowRank, Picture, Stream, TrainingPlan
from persona.core.training.settings import TrainSettings, picture_size, plan_from
from persona.core.training.targets import ATTENTION, TEXT_ATTENTION, check_rank, resolve_targets


@dataclass(frozen=True)
class LoraOptions:
    """What LoRA can be told."""

    rank: int = option(8, help="Rank of the deltas.", minimum=1)
    alpha: float | None = option(None, help="Scale is alpha / rank; default alpha = rank.")
    dropout: float = option(0.0, help="Dropout in front of the down projection.", minimum=0.0, maximum=1.0)
    targets: tuple[str, ...] = option(
        ATTENTION, help="Module name endings or wildcards (repeatable).", flag="--target", metavar="PATTERN"
    )
    train_text_encoder: bool = option(False, help="Put deltas on the text encoders too.")
    text_encoder_learning_rate: float | None = option(None, help="Their learning rate, when it is another.")
    rank_stabilised: bool = option(False, help="Scale alpha / sqrt(rank) (rsLoRA).", flag="--rslora")
    prompt: str | None = option(None, help="Caption of pictures that bring none of their own.", metavar="TEXT")


def low_rank_parts(options: LoraOptions, learning_rate: float, base: Base) -> tuple[LowRank, ...]:
    """The trained parts for `options` on `base`: the denoiser, then the text encoders when asked for."""
    if options.alpha is not None and options.alpha <= 0:
        raise UsageError(
            f"alpha {options.alpha:g} would switch the adapter off: its scale is alpha / rank.",
            hint=f"Give a positive number, for example --alpha {options.rank}",
        )
    alpha = float(options.rank if options.alpha is None else options.alpha)
    wanted = [(base.denoiser, tuple(options.targets), learning_rate)]
    if options.train_text_encoder:
        rate = options.text_encoder_learning_rate or learning_rate
        wanted += [(name, TEXT_ATTENTION, rate) for name in base.text_encoders]
    parts = []
    for component, patterns, rate in wanted:
        targets = resolve_targets(base, component, patterns)
        check_rank(base, component, targets, options.rank)
        parts.append(
            LowRank(
                component=component,
                targets=targets,
                rank=options.rank,
                alpha=alpha,
                learning_rate=rate,
                dropout=options.dropout,
                rank_stabilised=options.rank_stabilised,
            )
        )
    return tuple(parts)


def check_captions(pictures: Sequence[Picture], prompt: str | None) -> None:
    """Raises UsageError when pictures without a caption have no `prompt` to be called by."""
    bare = [picture.path for picture in pictures if not picture.captions]
    if bare and prompt is None:
        raise UsageError(
            f"{len(bare)} of {len(pictures)} pictures have no caption, such as {bare[0]}.",
            hint='Say what they show: --prompt "a photo of …" (or put a .txt file beside each picture)',
        )


def captioned(pictures: Sequence[Picture], prompt: str) -> tuple[Picture, ...]:
    """The pictures, those without a caption of their own with `prompt`."""
    import dataclasses

    return tuple(
        picture if picture.captions else dataclasses.replace(picture, captions=(prompt,)) for picture in pictures
    )


class Lora:
    """Low-rank deltas learned from captioned pictures."""

    name = "lora"
    summary = "Low-rank deltas on attention layers: small file, any base"
    Options = LoraOptions

    def plan(
        self, options: LoraOptions, settings: TrainSettings, base: Base, pictures: Sequence[Picture]
    ) -> TrainingPlan:
        """Deltas on the attention layers, learned from one stream of captioned pictures."""
        check_captions(pictures, options.prompt)
        return plan_from(
            settings,
            method=self.name,
            trains=low_rank_parts(options, settings.learning_rate, base),
            streams=(Stream("pictures", captioned(pictures, options.prompt or "")),),
            size=picture_size(settings, base.native_size, base.latent_factor),
        )
