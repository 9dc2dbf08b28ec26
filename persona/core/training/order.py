"""Which picture, which caption, which crop: every choice of a run, as a function of the seed and where it is used.

Nothing here has a state. What sample slot k of update u gets follows from (seed, u, k), so a resumed run, a longer run
and a run on more devices make the same choices. A slot is the number of a sample within its update, over all
micro-batches and devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from persona.core.training.noise import permutation, uniforms

Indices = NDArray[np.int64]


def epoch_length(repeats: Sequence[int]) -> int:
    """Samples in one epoch, where picture i is used `repeats[i]` times."""
    return sum(repeats)


@lru_cache(maxsize=16)
def epoch_order(seed: int, stream: str, repeats: tuple[int, ...], epoch: int) -> Indices:
    """Picture numbers in the order `epoch` uses them, [epoch_length] int64: a permutation of picture i × repeats[i].

    Raises ValueError when there is nothing to use.
    """
    uses = np.repeat(np.arange(len(repeats), dtype=np.int64), repeats)
    if not len(uses):
        raise ValueError(f"stream {stream!r} has no pictures to draw from")
    order = uses[permutation(seed, f"order {stream}", epoch, 0, len(uses))]
    order.setflags(write=False)
    return order


def order(
    seed: int, stream: str, count: int, update: int, samples: int, repeats: Sequence[int] | None = None
) -> Indices:
    """The pictures that `update` (from 0) draws from a stream of `count` pictures, [samples] int64 in 0..count−1.

    The stream is an endless row of epochs, each in an order of its own; an update takes the next `samples` of it, so
    `samples` (the stream's share × batch × accumulation) has to be the same in every update. `repeats` [count] is how
    often an epoch uses each picture (once when None). Raises ValueError when there is nothing to draw from.
    """
    uses = tuple(repeats) if repeats is not None else (1,) * count
    if len(uses) != count:
        raise ValueError(f"{len(uses)} repeats were given for {count} pictures")
    length = max(1, epoch_length(uses))
    epochs, places = np.divmod(np.arange(update * samples, (update + 1) * samples), length)
    drawn = [epoch_order(seed, stream, uses, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
    return np.concatenate(drawn) if drawn else np.zeros(0, np.int64)


Size = tuple[int, int]


def bucket_batch_count(sizes: Sequence[Size], repeats: Sequence[int], each: int) -> int:
    """Batches in one epoch, where every batch holds up to `each` uses of one size."""
    uses: dict[Size, int] = {}
    for size, count in zip(sizes, repeats, strict=True):
        uses[size] = uses.get(size, 0) + count
    return sum(-(-count // each) for count in uses.values())


@lru_cache(maxsize=16)
def bucket_batches(
    seed: int, stream: str, sizes: tuple[Size, ...], repeats: tuple[int, ...], each: int, epoch: int
) -> tuple[Indices, ...]:
    """The batches of one epoch, [≤ each] int64 of numbers into `sizes`, in the order they are used: every use once,
    all of one size in a batch, the last batch of a size perhaps shorter (kohya's bucket manager does likewise)."""
    row = epoch_order(seed, stream, repeats, epoch)
    by_size: dict[Size, list[int]] = {}
    for number in row.tolist():
        by_size.setdefault(sizes[number], []).append(number)
    batches = [
        np.array(by_size[size][start : start + each], np.int64)
        for size in sorted(by_size)
        for start in range(0, len(by_size[size]), each)
    ]
    return tuple(batches[place] for place in permutation(seed, f"batches {stream}", epoch, 0, len(batches)))


def bucket_batch(
    seed: int, stream: str, sizes: Sequence[Size], repeats: Sequence[int], each: int, number: int
) -> Indices:
    """Batch `number` (from 0) of the endless row of epochs; see `bucket_batches`."""
    count = bucket_batch_count(sizes, repeats, each)
    return bucket_batches(seed, stream, tuple(sizes), tuple(repeats), each, number // count)[number % count]


def choices(seed: int, purpose: str, update: int, slots: Sequence[int], counts: ArrayLike) -> Indices:
    """One number in 0..counts[i]−1 for each slot, [slots] int64, uniform."""
    drawn = uniforms(seed, purpose, update, slots, ()) * np.asarray(counts, np.float64)
    return drawn.astype(np.int64)


def happens(seed: int, purpose: str, update: int, slots: Sequence[int], probability: float) -> NDArray[np.bool_]:
    """Whether something of that probability happens in each slot, [slots] bool: never at 0, always at 1."""
    return uniforms(seed, purpose, update, slots, ()) < probability


def caption_choices(seed: int, update: int, slots: Sequence[int], counts: ArrayLike) -> Indices:
    """Which of its picture's `counts[i]` captions each slot gets, [slots] int64."""
    return choices(seed, "caption", update, slots, counts)


def caption_dropped(seed: int, update: int, slots: Sequence[int], probability: float) -> NDArray[np.bool_]:
    """Whether each slot trains with an empty caption instead, [slots] bool (arXiv 2207.12598, section 3.2)."""
    return happens(seed, "caption dropout", update, slots, probability)


def flipped(seed: int, update: int, slots: Sequence[int], probability: float = 0.5) -> NDArray[np.bool_]:
    """Whether each slot's picture is mirrored left to right, [slots] bool."""
    return happens(seed, "flip", update, slots, probability)


def crop_offsets(seed: int, update: int, slots: Sequence[int], spare: ArrayLike) -> Indices:
    """Where a random crop starts, [slots, 2] int64 (left, top), each in 0..spare inclusive; `spare` [slots, 2] or [2]
    is how many pixels the resized picture is larger than the crop."""
    room = np.asarray(spare, np.float64) + 1.0
    return (uniforms(seed, "crop", update, slots, (2,)) * room).astype(np.int64)


def shuffle_tags(caption: str, seed: int, update: int, slot: int, *, keep: int = 0, separator: str = ",") -> str:
    """The caption with its tags in another order; the first `keep` of them stay in front.

    Tags are what stands between separators, joined again by the separator and a space (kohya's shuffle_caption and
    keep_tokens). A caption of one tag, or one without separators such as Chinese prose, comes back as it is.
    """
    tags = [tag.strip() for tag in caption.split(separator) if tag.strip()]
    if len(tags) - keep < 2:
        return caption
    moved = permutation(seed, "tags", update, slot, len(tags) - keep)
    return f"{separator} ".join([*tags[:keep], *(tags[keep + int(place)] for place in moved)])
