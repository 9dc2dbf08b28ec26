"""The values a LoRA starts from, so that the first step starts from the base itself.

Usually `down` is drawn and `up` is zero. PiSSA and OLoRA start from the base's own weight W instead, with factors whose
product is not zero: it is taken off again, ΔW = scale · (up · down − up₀ · down₀), where up₀ and down₀ are those first
factors and stay as they are. W itself is never touched, so nothing is rounded. (PEFT takes scale · up₀ · down₀ off W
and converts afterwards, which comes to the same ΔW of twice the rank.)

Values belong to the seed and the module's name, not to the order modules are visited in, so every backend and every
choice of targets gives a module the same start.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.training.noise import normal, uniform
from persona.core.training.plan import LowRank

FROM_WEIGHT = ("pissa", "olora")
"""Initialisations that start from the base's weight."""
INITIALISATIONS = ("kaiming", "gaussian", "orthogonal", *FROM_WEIGHT)

Floats = NDArray[np.float32]


def scale_of(trained: LowRank, path: str) -> float:
    """What up · down of a target is multiplied by: alpha / rank, or alpha / √rank when rank-stabilised."""
    rank, alpha = trained.ranks.get(path, trained.rank), trained.alphas.get(path, trained.alpha)
    return alpha / (math.sqrt(rank) if trained.rank_stabilised else rank)


def initial_factors(
    trained: LowRank, path: str, shape: tuple[int, ...], weight: Callable[[], Floats], seed: int
) -> tuple[Floats, Floats]:
    """(down [rank, in(, kh, kw)], up [out, rank(, 1, 1)]) of the target `path`, whose weight has this shape, [out, in]
    or [out, in, kh, kw]. `weight` reads it as float32 and is called only for what starts from it (`FROM_WEIGHT`); of
    those, ΔW is scale · (up · down − these factors' product).

    pissa (arXiv 2404.02948 §3): up · down · scale is the best approximation of W of this rank, its singular values
    shared by both sides. olora (arXiv 2406.01775): the first columns of W's QR decomposition and the first rows of R.
    Raises UsageError for an unknown initialisation, and for DoRA from a weight, whose norms would be of another start.
    """
    rank = trained.ranks.get(path, trained.rank)
    window = (1,) * (len(shape) - 2)
    if trained.initialisation not in FROM_WEIGHT:
        down = initial_down(seed, f"{trained.component}.{path}", (rank, *shape[1:]), trained.initialisation)
        return down, initial_up((shape[0], rank, *window))
    if trained.decomposed:
        raise UsageError(
            f"--init {trained.initialisation} does not go together with --dora.", hint="Leave one of the two out"
        )
    whole = np.asarray(weight(), np.float64).reshape(shape[0], -1)
    low, high = (_principal if trained.initialisation == "pissa" else _first_columns)(whole, rank)
    if trained.initialisation == "pissa":
        high, low = high / math.sqrt(scale_of(trained, path)), low / math.sqrt(scale_of(trained, path))
    return low.reshape(rank, *shape[1:]).astype(np.float32), high.reshape(shape[0], rank, *window).astype(np.float32)


def _principal(whole: NDArray[np.float64], rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """down [rank, width] and up [out, rank]: the largest singular values with their vectors; each vector of `up` has
    its largest number positive, since a decomposition leaves the sign open."""
    left, singular, right = np.linalg.svd(whole, full_matrices=False)
    left, right, root = left[:, :rank], right[:rank], np.sqrt(singular[:rank])
    signs = np.sign(left[np.abs(left).argmax(0), np.arange(rank)])
    return (signs * root)[:, None] * right, left * (signs * root)


def _first_columns(whole: NDArray[np.float64], rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """down [rank, width] and up [out, rank]: Q of the first columns, and R = Qᵀ · W."""
    columns = orthonormal(whole[:, :rank].T)
    return columns @ whole, columns.T


def initial_down(seed: int, name: str, shape: tuple[int, ...], initialisation: str = "kaiming") -> NDArray[np.float32]:
    """The start of `down` [rank, in] or [rank, in, kh, kw], float32, of the module `name` ("unet.…attn1.to_q").

    kaiming: uniform within ±1/√fan_in, which is what torch's kaiming_uniform_(a=√5) comes to and what kohya and PEFT
    start from (peft/tuners/lora/layer.py). gaussian: normal with standard deviation 1/rank (PEFT's and the diffusers
    scripts' init_lora_weights="gaussian"). orthogonal: rows at right angles, as long as kaiming's are on average
    (√⅓), so that no two of them begin alike (the idea of PEFT's init_lora_weights="orthogonal"); with more rows than
    columns they can only be so in groups. Raises UsageError for another initialisation, also for one that needs the
    base's weight (`initial_factors`).
    """
    if initialisation == "kaiming":
        fan_in = math.prod(shape[1:])
        spread = uniform(seed, f"lora down {name}", 0, 0, shape) * 2.0 - 1.0
        return (spread / math.sqrt(fan_in)).astype(np.float32)
    if initialisation == "gaussian":
        return (normal(seed, f"lora down {name}", 0, 0, shape) / shape[0]).astype(np.float32)
    if initialisation == "orthogonal":
        rows = normal(seed, f"lora down {name}", 0, 0, (shape[0], math.prod(shape[1:]))).astype(np.float64)
        return (orthonormal(rows) * math.sqrt(1.0 / 3.0)).reshape(shape).astype(np.float32)
    if initialisation in FROM_WEIGHT:
        raise UsageError(
            f"--init {initialisation} starts from the base's weights, which this backend does not do.",
            hint="Take one that is drawn: --init orthogonal",
        )
    raise UsageError(
        f"There is no LoRA initialisation {initialisation!r}.", hint=did_you_mean(initialisation, INITIALISATIONS)
    )


def orthonormal(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows [n, width] made orthogonal and of length 1, one after the other (Gram and Schmidt, twice for accuracy;
    not LAPACK's QR, whose last bits and signs depend on the machine). Rows beyond the width begin anew."""
    width = rows.shape[1]
    found = np.empty_like(rows)
    for number, row in enumerate(rows):
        before = found[number - number % width : number]
        for _ in range(2):
            row = row - (before * (before * row).sum(1, keepdims=True)).sum(0)
        length = np.sqrt((row * row).sum())
        found[number] = row / length if length > 0 else row
    return found


def initial_up(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The start of `up` [out, rank] or [out, rank, 1, 1]: zeros, float32."""
    return np.zeros(shape, np.float32)


def rate_factor(trained: LowRank, value: str) -> float:
    """What the learning rate of one of an entry's values ("down", "up", "magnitude") is multiplied by (LoRA+)."""
    return trained.up_rate_ratio if value == "up" else 1.0
