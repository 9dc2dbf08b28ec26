"""What a method makes of its options: a TrainingPlan, framework-free and JSON, which is all that a worker in another
environment needs. Methods + backends, never methods × backends."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PLAN_VERSION = 1


@dataclass(frozen=True)
class LowRank:
    """Low-rank deltas (LoRA, arXiv 2106.09685) on the modules `targets` of `component`: full dotted module paths."""

    component: str
    targets: tuple[str, ...]
    rank: int
    alpha: float
    learning_rate: float
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict)  # per target, where it is not `rank`
    alphas: Mapping[str, float] = field(default_factory=dict)  # per target, where it is not `alpha`
    rank_stabilised: bool = False  # scale alpha / sqrt(rank), arXiv 2312.03732
    decomposed: bool = False  # DoRA, arXiv 2402.09353
    initialisation: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"] = "kaiming"
    up_rate_ratio: float = 1.0  # LoRA+, arXiv 2402.12354: learning rate of `up`, as a multiple of that of `down`
    kind: Literal["low-rank"] = "low-rank"


@dataclass(frozen=True)
class Weights:
    """Whole weights of `component`: the parameters whose names start with one of `targets` (all when empty)."""

    component: str
    learning_rate: float
    targets: tuple[str, ...] = ()
    kind: Literal["weights"] = "weights"


@dataclass(frozen=True)
class NewToken:
    """One placeholder, `vectors` rows long; `initializer` is a text whose token embeddings start the rows (cycled)."""

    placeholder: str
    initializer: str
    vectors: int = 1


@dataclass(frozen=True)
class NewTokens:
    """New rows of the token embeddings (textual inversion, arXiv 2208.01618) in every text encoder of `components`.

    With `norm_limit` no row grows longer than that many times the median length of the encoder's own rows: a longer one
    drowns the other words of a prompt."""

    components: tuple[str, ...]
    tokens: tuple[NewToken, ...]
    learning_rate: float
    norm_limit: float | None = None
    kind: Literal["new-tokens"] = "new-tokens"


Trained = LowRank | Weights | NewTokens


@dataclass(frozen=True)
class Picture:
    """One training picture: an absolute path, the captions it may get (one is drawn per use), optional mask."""

    path: str
    captions: tuple[str, ...]
    mask: str | None = None
    sha256: str = ""
    size: tuple[int, int] = (0, 0)  # width, height, after EXIF orientation
    repeats: int = 1  # how often an epoch uses it


@dataclass(frozen=True)
class Generated:
    """Pictures the base makes itself before training (prior preservation), `count` of them from `prompt`."""

    prompt: str
    count: int
    negative_prompt: str = ""
    steps: int = 30
    guidance_scale: float = 5.0
    sampler: str = "ddim"
    folder: str | None = None  # own class pictures; generated ones fill up what is missing


@dataclass(frozen=True)
class Stream:
    """A source of training samples. Every update draws `share` × batch samples from each stream; `weight` is its
    weight in the loss (prior preservation's λ on the class stream)."""

    name: str
    pictures: tuple[Picture, ...] = ()
    generated: Generated | None = None
    weight: float = 1.0
    share: int = 1


@dataclass(frozen=True)
class Loss:
    """`mse` between prediction and target; min-SNR weighting (arXiv 2303.09556) when `min_snr_gamma` is set;
    `noise_offset` adds a constant per channel to the noise."""

    min_snr_gamma: float | None = None
    noise_offset: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    """`adamw` is built in and the same on every backend; other names come from `persona_optimizers`.

    Of those, `classes` says by the backend's name which class ("module:attribute") is it, and `options` are the
    keywords it is made with. `warmup` is in steps."""

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    schedule: str = "constant"
    warmup: int = 0
    cycles: int = 1  # hard restarts of cosine_with_restarts
    power: float = 1.0  # of polynomial
    classes: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that decides a run, except where it is executed."""

    method: str
    trains: tuple[Trained, ...]
    streams: tuple[Stream, ...]
    steps: int
    batch: int = 1
    accumulation: int = 1
    seed: int = 0
    width: int = 512
    height: int = 512
    center_crop: bool = False
    random_flip: bool = False
    buckets: bool = False  # each picture at the aspect bucket nearest to its own proportions
    caption_dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0  # this many stay in front when tags are shuffled
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema_decay: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    compile: bool | None = None  # the denoiser, for the training steps; None: as the backend does by itself
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the user should know about how the options were understood
    version: int = PLAN_VERSION

    def trained_components(self) -> frozenset[str]:
        """The components with something to train in them."""
        found: set[str] = set()
        for trained in self.trains:
            found.update(trained.components if isinstance(trained, NewTokens) else (trained.component,))
        return frozenset(found)


def plan_to_json(plan: TrainingPlan) -> str:
    """The plan as JSON text; `plan_from_json` is its inverse."""
    return json.dumps(dataclasses.asdict(plan), ensure_ascii=False, indent=1)


def plan_from_json(text: str) -> TrainingPlan:
    """Inverse of `plan_to_json`. Raises ValueError for a plan of another version."""
    document = json.loads(text)
    if document.get("version") != PLAN_VERSION:
        raise ValueError(f"plan version {document.get('version')} is not {PLAN_VERSION}")
    plan: TrainingPlan = build(TrainingPlan, document)
    return plan


def build(cls: Any, value: Any) -> Any:
    """An instance of the dataclass `cls` (nested dataclasses, tuples and unions by `kind` included) from JSON data."""
    origin = typing.get_origin(cls)
    if cls in (Any, object):
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        choices = [choice for choice in typing.get_args(cls) if choice is not type(None)]
        if len(choices) == 1:
            return build(choices[0], value)
        for choice in choices:
            if dataclasses.is_dataclass(choice) and isinstance(value, dict):
                kind = {f.name: f.default for f in dataclasses.fields(choice)}.get("kind")
                if kind == value.get("kind"):
                    return build(choice, value)
        return value
    if origin is tuple:
        arguments = typing.get_args(cls)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(build(arguments[0], item) for item in value)
        return tuple(build(kind, item) for kind, item in zip(arguments, value, strict=True))
    if dataclasses.is_dataclass(cls) and isinstance(value, dict):
        hints = typing.get_type_hints(cls)
        return cls(**{key: build(hints[key], item) for key, item in value.items()})  # type: ignore[operator]
    if origin in (dict, Mapping) or (origin is not None and isinstance(value, dict)):
        return dict(value)
    return value


def read_plan(path: Path) -> TrainingPlan:
    """The plan a run folder or a parent process left at `path`."""
    return plan_from_json(path.read_text(encoding="utf-8"))
