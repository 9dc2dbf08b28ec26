"""What captions are to the denoiser, encoded once each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Encode = Callable[[list[str]], Mapping[str, Array]]
MOST_SHUFFLED = 4096
"""Captions that are kept beside those known from the start: shuffled tags have no end of orders."""


class EncodedCaptions(Mapping[str, Mapping[str, Array]]):
    """Caption to its conditioning arrays. Each is encoded alone, so that it has the same bits whatever else is in the
    run; `known` captions at once, others (shuffled tags) when they are first met."""

    def __init__(self, encode: Encode, known: Iterable[str], report: Callable[[int, int], None]) -> None:
        self._encode = encode
        self._known: dict[str, Mapping[str, Array]] = {}
        self._met: dict[str, Mapping[str, Array]] = {}
        captions = list(known)
        for number, caption in enumerate(captions):
            if number % 16 == 0:
                report(number, len(captions))
            self._known[caption] = self._alone(caption)

    def __getitem__(self, caption: str) -> Mapping[str, Array]:
        if caption in self._known:
            return self._known[caption]
        if caption not in self._met:
            if len(self._met) >= MOST_SHUFFLED:
                self._met.pop(next(iter(self._met)))
            self._met[caption] = self._alone(caption)
        return self._met[caption]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._known, *self._met))

    def __len__(self) -> int:
        return len(self._known) + len(self._met)

    def _alone(self, caption: str) -> Mapping[str, Array]:
        return {name: values[0] for name, values in self._encode([caption]).items()}
