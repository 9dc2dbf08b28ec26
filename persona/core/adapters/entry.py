"""What an adapter means, whatever its spelling. Reading a file into these does no arithmetic: nothing is folded, cast
or dropped on the way in. (dialects.md §12 is the model.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from persona.core.adapters.tensor import TensorRef

ScaleMode = Literal["rank", "sqrt_rank", "none"]
Algorithm = Literal[
    "lora", "loha", "lokr", "full", "norm", "ia3", "glora", "oft", "boft", "peft_oft", "peft_boft", "opaque"
]

"""`oft` and `boft` are LyCORIS' and sd-scripts', which turn the outputs of a layer; PEFT's turn its inputs."""


@dataclass(frozen=True)
class Scale:
    """What the product of the factors is multiplied by at strength 1.

    `alpha / rank` (mode "rank"), `alpha / sqrt(rank)` ("sqrt_rank", rank-stabilised LoRA), or 1 ("none").
    `alpha` None means that no alpha is known: every reader then takes alpha = rank, a scale of 1.
    `origin` tells where alpha came from: "file key", "header", "config", "told", "assumed", …; `stored` is the tensor
    it was read from, so that the same dialect can write it back bit for bit.
    """

    alpha: float | None
    rank: int
    mode: ScaleMode = "rank"
    origin: str = "assumed"
    stored: TensorRef | None = field(default=None, compare=False, repr=False)

    @property
    def value(self) -> float:
        """The number itself."""
        if self.mode == "none" or self.alpha is None:
            return 1.0
        return self.alpha / (self.rank if self.mode == "rank" else self.rank**0.5)


@dataclass(frozen=True)
class Magnitude:
    """DoRA's magnitude vector (arXiv 2402.09353), 1-D, and the axis of the weight it keeps: "out" or "in"."""

    vector: TensorRef
    axis: Literal["out", "in"]


@dataclass(frozen=True)
class Entry:
    """The adapter's tensors for one module.

    `factors` are in torch orientation, original dtype, named as the algorithm names them (dialects.md §4): lora: down
    [rank, in(, kh, kw)], up [out, rank], mid; loha: w1_a, w1_b, w2_a, w2_b, t1, t2; lokr: w1 | w1_a, w1_b, w2 | w2_a,
    w2_b, t2; full: diff; …  `path` is diffusers' dotted path; a module that joins several of diffusers' rows in one
    weight is written `attn.[to_q,to_k,to_v]` (core/adapters/fusion.py). `kernel` is the kernel of the module's
    convolution, () when it is known not to be one, None when it is not known. `origin` maps each factor to the key it
    had in the file.
    """

    component: str
    path: str
    algorithm: Algorithm
    factors: Mapping[str, TensorRef]
    scale: Scale
    magnitude: Magnitude | None = None
    bias: TensorRef | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    kernel: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """`component.path`, the name `Adapter.deltas` uses."""
        return f"{self.component}.{self.path}"


@dataclass(frozen=True)
class Embedding:
    """A new word: one or several vectors per text encoder. `vectors[component]` is [n, dim]."""

    token: str
    vectors: Mapping[str, TensorRef]
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where something was read from: the path as given, the container and the dialect that explained it."""

    path: str
    container: str
    dialect: str


@dataclass(frozen=True)
class Leftover:
    """A key no rule explained, with the reason."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass
class Adapter:
    """Everything one adapter file (or folder) says. `family` is a name when the evidence leaves one, else None, and
    `families` is the set that is left. `notes` tell the user what was decided and why."""

    family: str | None
    entries: dict[tuple[str, str], Entry]
    embeddings: list[Embedding] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    source: Source | None = None
    notes: list[str] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    families: frozenset[str] = frozenset()

    def deltas(self, base: Mapping[str, Any] | None = None) -> Mapping[str, np.ndarray[Any, Any]]:
        """What the adapter adds at strength 1: a lazy mapping `component.path` -> ΔW, float32, torch layout.

        `base` maps the same names to base weights, for the algorithms that need them (DoRA, IA3, GLoRA). Fused modules
        appear under each of diffusers' names. CLIP encoders are spelt with `text_model.`
        """
        from persona.core.adapters.delta import Deltas

        return Deltas(self.entries.values(), base)


@dataclass
class Checkpoint:
    """A whole model (or some of its components), streamed: `components[name][parameter]` is a TensorRef in torch
    layout under diffusers' parameter names; `configs[name]` the component's config when the source had one, and
    `tokenizers[name]` the files of its tokenizer folders, by their names."""

    family: str | None
    components: dict[str, dict[str, TensorRef]]
    configs: dict[str, dict[str, object]] = field(default_factory=dict)
    extras: dict[str, TensorRef] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    source: Source | None = None
    notes: list[str] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)
    tokenizers: dict[str, dict[str, bytes]] = field(default_factory=dict)
