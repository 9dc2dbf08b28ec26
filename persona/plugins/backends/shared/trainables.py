"""Attaching what a plan trains to an opened base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.training.lora_values import FROM_WEIGHT, initial_factors, rate_factor
from persona.core.training.plan import LowRank, NewTokens, Trained, TrainingPlan, Weights
from persona.plugins.backends.shared.opened import OpenedModel
from persona.plugins.backends.shared.words import Words


@dataclass
class Group:
    """What one entry of a plan became. `values` are the trained values by their names in states:
    "unet.<path>.down", "unet.<path>.weight", "text_encoder.<placeholder>"."""

    trained: Trained
    values: dict[str, Any] = field(default_factory=dict)
    longest: dict[str, float] = field(default_factory=dict)  # of new rows: the norm none of them may exceed
    starts: dict[str, Any] = field(default_factory=dict)  # of deltas from the base's weight: their first factors

    def rate_factor(self, name: str) -> float:
        """What the learning rate of one of the values is multiplied by (LoRA+)."""
        return rate_factor(self.trained, name.rpartition(".")[2]) if isinstance(self.trained, LowRank) else 1.0


def attach(plan: TrainingPlan, model: OpenedModel, words: Mapping[str, Words]) -> list[Group]:
    """Put the plan's trainable values into `model` and `words`, one Group per entry of `plan.trains`.

    Raises UsageError for a target that is not there or cannot have a low-rank delta, and for a plan that trains whole
    weights together with something that is an adapter (no one file can hold both).
    """
    kinds = {trained.kind for trained in plan.trains}
    if "weights" in kinds and len(kinds) > 1:
        raise UsageError("Whole weights cannot be trained together with low-rank deltas or new tokens in one run.",
                         hint="Train the weights first, then the adapter on the result.")  # fmt: skip
    groups = []
    for trained in plan.trains:
        if isinstance(trained, LowRank):
            groups.append(_low_rank(trained, model, plan.seed))
        elif isinstance(trained, Weights):
            groups.append(_weights(trained, model))
        else:
            groups.append(_new_tokens(trained, model, words))
    for group in groups:
        for name, value in group.values.items():
            model.train(name, value)
    return groups


def keep_short(group: Group, model: OpenedModel) -> None:
    """Shorten rows that have grown beyond the group's limit to it."""
    for name, limit in group.longest.items():
        rows = model.read(group.values[name])
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # [n, 1]
        if lengths.max() > limit:
            model.write(group.values[name], rows * np.minimum(limit / lengths, 1.0).astype(np.float32))


def _low_rank(trained: LowRank, model: OpenedModel, seed: int) -> Group:
    _require(model, trained.component)
    group = Group(trained)
    for path in trained.targets:
        name = f"{trained.component}.{path}"
        module = model.module(trained.component, path)
        if module is None:
            known = [other for other, inner in model.paths(trained.component) if model.can_have_delta(inner)]
            raise UsageError(f"{trained.component} has no module {path}.", hint=did_you_mean(path, known))
        if model.has_delta(module):
            raise UsageError(f"{name} is a target twice.")
        if not model.can_have_delta(module):
            raise UsageError(f"{name} is a {type(module).__name__}, which cannot have a low-rank delta "
                             "(linear layers and ungrouped convolutions can).")  # fmt: skip
        shape = model.shape(name, "weight")
        assert shape is not None
        factors = initial_factors(trained, path, shape, partial(model.weight, name), seed)
        delta = model.put_delta(trained.component, path, trained, factors, trained.initialisation in FROM_WEIGHT)
        group.values |= {f"{name}.{last}": value for last, value in delta.values.items()}
        group.starts |= {f"{name}.{last}": value for last, value in delta.starts.items()}
    return group


def _weights(trained: Weights, model: OpenedModel) -> Group:
    _require(model, trained.component)
    group = Group(trained)
    for name, value in model.values(trained.component).items():
        if not trained.targets or name.startswith(tuple(trained.targets)):
            group.values[f"{trained.component}.{name}"] = value
    for target in trained.targets:
        if not any(name.startswith(f"{trained.component}.{target}") for name in group.values):
            known = [path for path, _ in model.paths(trained.component) if path]
            raise UsageError(f"{trained.component} has no weights called {target}.", hint=did_you_mean(target, known))
    return group


def _new_tokens(trained: NewTokens, model: OpenedModel, words: Mapping[str, Words]) -> Group:
    group = Group(trained)
    for component in trained.components:
        _require(model, component)
        known = model.word_rows(component)
        for token in trained.tokens:
            start = words[component].split(token.initializer)
            if not start:
                raise UsageError(f'The initializer "{token.initializer}" of {token.placeholder} has no tokens.')
            words[component].add(token.placeholder, token.vectors)
            name = f"{component}.{token.placeholder}"
            rows = known[[start[n % len(start)] for n in range(token.vectors)]]
            group.values[name] = model.add_rows(component, rows)
            if trained.norm_limit is not None:
                lengths = np.sort(np.linalg.norm(known, axis=1))
                group.longest[name] = trained.norm_limit * float(lengths[(len(lengths) - 1) // 2])  # a row's, no mean
    return group


def _require(model: OpenedModel, component: str) -> None:
    if component not in model.components:
        raise UsageError(f'This base has no component "{component}".', hint=did_you_mean(component, model.components))
