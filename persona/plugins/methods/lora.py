"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank deltas beside frozen weights.

x ──► W (frozen) ──────────────► + ──► y
│                                ▲
└──► down [r, in] ─► up [out, r] ┘ × alpha / r
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.options import option
from persona.core.training.base import Base
from persona.core.training.lora_values import FROM_WEIGHT, INITIALISATIONS
from persona.core.training.plan import LowRank, Picture, Stream, TrainingPlan
from persona.core.training.settings import TrainSettings, assignments, picture_size, plan_from
from persona.core.training.targets import (
    ATTENTION,
    TEXT_ATTENTION,
    check_rank,
    linear_modules,
    names,
    resolve_targets,
)


@dataclass(frozen=True)
class LowRankOptions:
    """What deltas can be told, by every method that trains them. A PATTERN is the end of a module's name (to_q,
    attn2.to_k), its whole name with or without the component, or a wildcard over it (down_blocks.*.attn1.*)."""

    rank: int = option(8, help="Rank of the deltas.", minimum=1)
    alpha: float | None = option(None, help="Scale is alpha / rank; default alpha = rank.")
    dropout: float = option(0.0, help="Dropout in front of the down projection.", minimum=0.0, maximum=1.0)
    targets: tuple[str, ...] = option(
        ATTENTION, help="Module name endings or wildcards (repeatable).", flag="--target", metavar="PATTERN"
    )
    exclude: tuple[str, ...] = option((), help="Modules that stay as they are (repeatable).", metavar="PATTERN")
    target_rank: tuple[str, ...] = option(
        (), help="Another rank for some modules (repeatable).", metavar="PATTERN=RANK"
    )
    target_alpha: tuple[str, ...] = option(
        (), help="Another alpha for some modules (repeatable).", metavar="PATTERN=ALPHA"
    )
    conv_rank: int | None = option(
        None, help="Train convolutions of residual blocks and samplers too, at this rank.", minimum=1
    )
    conv_alpha: float | None = option(None, help="Their alpha; default alpha = rank.")
    train_denoiser: bool = option(True, help="Train the denoiser.")
    train_text_encoder: bool = option(False, help="Train the text encoders too.")
    text_encoder_targets: tuple[str, ...] = option(
        TEXT_ATTENTION, help="Their modules (repeatable).", flag="--text-encoder-target", metavar="PATTERN"
    )
    text_encoder_learning_rate: float | None = option(None, help="Their learning rate, when it is another.")
    rank_stabilised: bool = option(False, help="Scale alpha / sqrt(rank) (rsLoRA).", flag="--rslora")
    decomposed: bool = option(False, help="Train magnitude and direction apart (DoRA).", flag="--dora")
    initialisation: str = option(
        "kaiming",
        help="What the deltas start from: drawn values (kaiming, gaussian, orthogonal), or the base's own weights "
        "(pissa, olora), which makes the file's rank twice --rank.",
        flag="--init",
        choices=INITIALISATIONS,
    )
    up_rate_ratio: float = option(
        1.0, help="LoRA+: the learning rate of the up projections is so many times that of the down projections "
        "(16 is usual).", flag="--loraplus-lr-ratio", minimum=0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class LoraOptions(LowRankOptions):
    """What LoRA can be told."""

    prompt: str | None = option(None, help="Caption of pictures that bring none of their own.", metavar="TEXT")


def low_rank_parts(options: LowRankOptions, learning_rate: float, base: Base) -> tuple[LowRank, ...]:
    """The trained parts for `options` on `base`: the denoiser, then the text encoders when asked for.

    Raises UsageError for an alpha that is not positive, a rank above a layer's width, a pattern that names nothing, and
    when nothing is left to train."""
    for value, flag in ((options.alpha, "--alpha"), (options.conv_alpha, "--conv-alpha")):
        if value is not None and value <= 0:
            raise UsageError(
                f"alpha {value:g} would switch the adapter off: its scale is alpha / rank.",
                hint=f"Give a positive number, for example {flag} {options.rank}",
            )
    if options.decomposed and options.initialisation in FROM_WEIGHT:
        raise UsageError(
            f"--init {options.initialisation} does not go together with --dora, whose norms are those of the base.",
            hint="Leave one of the two out",
        )
    rate = learning_rate if options.text_encoder_learning_rate is None else options.text_encoder_learning_rate
    wanted = [(base.denoiser, tuple(options.targets), learning_rate)] if options.train_denoiser else []
    if options.train_text_encoder:
        wanted += [(name, tuple(options.text_encoder_targets), rate) for name in base.text_encoders]
    if not wanted:
        raise UsageError("Nothing would be trained.", hint="Add --train-text-encoder, or leave --no-train-denoiser out")
    parts = tuple(_part(options, base, component, patterns, rate) for component, patterns, rate in wanted)
    _check_patterns(options, parts)
    return parts


def _part(options: LowRankOptions, base: Base, component: str, patterns: tuple[str, ...], rate: float) -> LowRank:
    targets = resolve_targets(base, component, patterns)
    convolutions = _convolutions(base, component) if options.conv_rank and component == base.denoiser else ()
    targets = tuple(
        path
        for path in dict.fromkeys((*targets, *convolutions))
        if not any(names(component, path, pattern) for pattern in options.exclude)
    )
    if not targets:
        raise UsageError(f"--exclude leaves nothing of {component} to train.", hint="Leave one of its patterns out")
    ranks = {path: options.conv_rank for path in convolutions if options.conv_rank is not None and path in targets}
    ranks |= {path: int(value) for path, value in _by_pattern(options.target_rank, "--target-rank", component, targets)}
    alphas = {path: float(rank) for path, rank in ranks.items()} if options.alpha is None else {}
    if options.conv_alpha is not None:
        alphas |= {path: options.conv_alpha for path in convolutions if path in targets}
    elif options.alpha is not None:  # the convolutions' own default, whatever the other layers have
        alphas |= {path: float(ranks[path]) for path in convolutions if path in targets}
    alphas |= dict(_by_pattern(options.target_alpha, "--target-alpha", component, targets))
    for path in targets:
        check_rank(base, component, (path,), ranks.get(path, options.rank))
    return LowRank(
        component=component,
        targets=targets,
        rank=options.rank,
        alpha=float(options.rank if options.alpha is None else options.alpha),
        learning_rate=rate,
        dropout=options.dropout,
        ranks={path: rank for path, rank in ranks.items() if rank != options.rank},
        alphas=alphas,
        rank_stabilised=options.rank_stabilised,
        decomposed=options.decomposed,
        initialisation=options.initialisation,  # type: ignore[arg-type]
        up_rate_ratio=options.up_rate_ratio,
    )


def _convolutions(base: Base, component: str) -> tuple[str, ...]:
    """The convolutions that kohya's conv_dim and LyCORIS train: of residual blocks and of down- and upsamplers."""
    return tuple(
        path
        for path, shape in linear_modules(base.parameters[component]).items()
        if len(shape) == 4 and any(f".{part}." in f".{path}" for part in ("resnets", "downsamplers", "upsamplers"))
    )


def _by_pattern(words: Sequence[str], flag: str, component: str, targets: Sequence[str]) -> list[tuple[str, float]]:
    """(path, value) of `PATTERN=VALUE` words for the targets they name; a later word wins."""
    found = []
    for pattern, value in assignments(words, flag):
        if value <= 0 or (flag == "--target-rank" and value != int(value)):
            raise UsageError(f"{flag} {pattern}={value:g} is not a positive number.", hint=f"{flag} {pattern}=4")
        found += [(path, value) for path in targets if names(component, path, pattern)]
    return found


def _check_patterns(options: LowRankOptions, parts: Sequence[LowRank]) -> None:
    """Raises UsageError for a pattern of --target-rank and --target-alpha that names no target of any part."""
    for words, flag in ((options.target_rank, "--target-rank"), (options.target_alpha, "--target-alpha")):
        for pattern, _ in assignments(words, flag):
            if not any(names(part.component, path, pattern) for part in parts for path in part.targets):
                endings = {path.rsplit(".", 1)[-1] for part in parts for path in part.targets}
                raise UsageError(
                    f"{flag} {pattern} names no module that is trained. {did_you_mean(pattern, endings)}",
                    hint="Add the module to --target first",
                )


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
