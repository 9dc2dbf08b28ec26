"""Putting adapters into an opened base: every ΔW is added to its weight, every new token gets its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from persona.core.adapters.delta import Deltas, bias_delta
from persona.core.adapters.entry import Adapter, Embedding
from persona.core.host.errors import ConversionError
from persona.plugins.backends.shared.opened import Array, Kind, OpenedModel
from persona.plugins.backends.shared.words import Words


class _BaseWeights(Mapping[str, np.ndarray]):
    """`component.path` to the base's weight there, read when asked for."""

    def __init__(self, model: OpenedModel) -> None:
        self._model = model

    def __getitem__(self, name: str) -> Array:
        if self._model.shape(name, "weight") is None:
            raise KeyError(name)
        return self._model.weight(name)

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError("base weights are asked for by name")

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True


def merge(adapter: Adapter, strength: float, model: OpenedModel, words: Mapping[str, Words]) -> list[str]:
    """Add `adapter` at `strength` to the model.

    Raises ConversionError when entries have no home here, naming up to five, before anything is changed; for a shape
    that does not fit when it comes to it, and the session is then good for nothing. Returns notes."""
    if not adapter.entries and not adapter.embeddings:
        raise ConversionError("The adapter is empty: no module and no token was found in it.",
                              hint="persona inspect says what the file holds.")  # fmt: skip
    deltas = Deltas(adapter.entries.values(), _BaseWeights(model))
    _refuse_homeless([name for name in deltas if model.shape(name, "weight") is None], len(deltas))
    for name in deltas:
        _add(model, name, "weight", deltas[name] * np.float32(strength))
    for entry in adapter.entries.values():
        change = bias_delta(entry)
        if change is not None:
            _add(model, entry.name, "bias", np.asarray(change, np.float32) * np.float32(strength))
    notes = [_learn_word(embedding, model, words) for embedding in adapter.embeddings]
    return [f"{len(deltas)} modules changed at strength {strength:g}.", *notes] if len(deltas) else notes


def _add(model: OpenedModel, name: str, kind: Kind, change: Array) -> None:
    shape = model.shape(name, kind)
    if shape is None:
        raise ConversionError(f"{name} has a {kind} in the adapter and none in this base.")
    if change.shape != shape and change.size == math.prod(shape):
        change = change.reshape(shape)  # a 1x1 convolution written as a matrix
    if change.shape != shape:
        raise ConversionError(f"{name} is {list(shape)} here, and the adapter's change is {list(change.shape)}.",
                              hint="The adapter was made for another base model.")  # fmt: skip
    model.add(name, kind, np.ascontiguousarray(change, np.float32))


def _learn_word(embedding: Embedding, model: OpenedModel, words: Mapping[str, Words]) -> str:
    foreign = "The embedding was made for another base model."
    for component, reference in embedding.vectors.items():
        width = model.embedding_width(component)
        if width is None or component not in words:
            raise ConversionError(
                f"{embedding.token} has vectors for {component}, which this base does not have.", hint=foreign
            )
        if words[component].knows(embedding.token):
            raise ConversionError(f"{embedding.token} is a new word twice.", hint="Load only one of its files.")
        vectors = np.atleast_2d(np.asarray(reference.read(), np.float32))
        if vectors.shape[1] != width:
            raise ConversionError(
                f"{embedding.token}'s vectors are {vectors.shape[1]} wide, and {component}'s are {width}.", hint=foreign
            )
        words[component].add(embedding.token, len(vectors))
        model.add_rows(component, vectors)
    missing = sorted(set(words) - set(embedding.vectors))
    if missing:
        raise ConversionError(f"{embedding.token} has no vectors for {', '.join(missing)}.", hint=foreign)
    return f"{embedding.token} is a word of {len(vectors)} vector{'s' if len(vectors) > 1 else ''}."


def _refuse_homeless(names: list[str], count: int) -> None:
    if names:
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ConversionError(
            f"{len(names)} of the adapter's {count} modules are not in this base: "
            f"{', '.join(sorted(names)[:5])}{rest}.",
            hint="The adapter was made for another base model.",
        )
