"""Attaching what a plan trains to the opened components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from mindspore import Parameter, Tensor, nn

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.training.lora_values import FROM_WEIGHT, initial_factors, rate_factor, scale_of
from persona.core.training.plan import LowRank, NewTokens, Trained, TrainingPlan, Weights
from persona.plugins.backends.mindspore.cells import find, parameters_of, replace
from persona.plugins.backends.mindspore.embedding import grow
from persona.plugins.backends.mindspore.lowrank import Decomposed, Dropout, LowRankConv, LowRankDense, LowRankLayer
from persona.plugins.backends.shared.words import Words


@dataclass
class Group:
    """What one entry of a plan became. `values` are the trained parameters by their names in states:
    "unet.<path>.down", "unet.<path>.weight", "text_encoder.<placeholder>"; `layers` the LoRA layers by target."""

    trained: Trained
    values: dict[str, Parameter] = field(default_factory=dict)
    layers: dict[str, LowRankLayer] = field(default_factory=dict)
    longest: dict[str, float] = field(default_factory=dict)  # of new rows: the norm none of them may exceed
    starts: dict[str, Tensor] = field(default_factory=dict)  # of deltas from the base's weight: their first factors

    def rates(self, learning_rate: float) -> dict[str, float]:
        """The learning rate of every value."""
        if not isinstance(self.trained, LowRank):
            return dict.fromkeys(self.values, learning_rate)
        return {name: learning_rate * rate_factor(self.trained, name.rpartition(".")[2]) for name in self.values}


def attach(
    plan: TrainingPlan, components: Mapping[str, nn.Cell], words: Mapping[str, Words], drop: Dropout
) -> list[Group]:
    """Put the plan's trainable values into `components` and `words`, one Group per entry of `plan.trains`.

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
            groups.append(_low_rank(trained, _component(components, trained.component), plan.seed, drop))
        elif isinstance(trained, Weights):
            groups.append(_weights(trained, _component(components, trained.component)))
        else:
            groups.append(_new_tokens(trained, components, words))
    for group in groups:
        for name, parameter in group.values.items():
            parameter.name, parameter.requires_grad = (
                name,
                True,
            )  # MindSpore wants the names of what it derives to differ
    return groups


def _component(components: Mapping[str, nn.Cell], name: str) -> nn.Cell:
    if name not in components:
        raise UsageError(f'This base has no component "{name}".', hint=did_you_mean(name, components))
    return components[name]


def _low_rank(trained: LowRank, model: nn.Cell, seed: int, drop: Dropout) -> Group:
    group = Group(trained)
    for path in trained.targets:
        layer = _layer(trained, model, path, seed, drop)
        replace(model, path, layer)
        group.layers[path] = layer
        name = f"{trained.component}.{path}"
        pair = layer.layer if isinstance(layer, Decomposed) else layer
        group.values |= {f"{name}.down": pair.down, f"{name}.up": pair.up}
        if isinstance(layer, Decomposed):
            group.values[f"{name}.magnitude"] = layer.magnitude
        if pair.start is not None:
            group.starts |= {f"{name}.down": pair.start[0], f"{name}.up": pair.start[1]}
    return group


def _layer(trained: LowRank, model: nn.Cell, path: str, seed: int, drop: Dropout) -> LowRankLayer:
    cell = find(model, path)
    if cell is None:
        known = [name for name, inner in model.cells_and_names() if _can_have_delta(inner)]
        raise UsageError(f"{trained.component} has no module {path}.", hint=did_you_mean(path, known))
    if isinstance(cell, (LowRankDense, LowRankConv, Decomposed)):
        raise UsageError(f"{trained.component}.{path} is a target twice.")
    if not _can_have_delta(cell):
        raise UsageError(f"{trained.component}.{path} is a {type(cell).__name__}, which cannot have a low-rank delta "
                         "(linear layers and ungrouped convolutions can).")  # fmt: skip
    weight = cell.weight
    factors = initial_factors(trained, path, tuple(weight.shape), lambda: weight.astype("float32").asnumpy(), seed)
    start = factors if trained.initialisation in FROM_WEIGHT else None
    kind = LowRankConv if isinstance(cell, nn.Conv2d) else LowRankDense
    pair = kind(cell, factors, scale_of(trained, path), trained.dropout, drop, start)
    return Decomposed(pair) if trained.decomposed else pair


def _can_have_delta(cell: nn.Cell) -> bool:
    return isinstance(cell, nn.Dense) or (isinstance(cell, nn.Conv2d) and cell.group == 1)


def _weights(trained: Weights, model: nn.Cell) -> Group:
    group = Group(trained)
    for name, parameter in parameters_of(model):
        if not trained.targets or name.startswith(tuple(trained.targets)):
            group.values[f"{trained.component}.{name}"] = parameter
    for target in trained.targets:
        if not any(name.startswith(f"{trained.component}.{target}") for name in group.values):
            known = [name for name, _ in model.cells_and_names() if name]
            raise UsageError(f"{trained.component} has no weights called {target}.", hint=did_you_mean(target, known))
    return group


def _new_tokens(trained: NewTokens, components: Mapping[str, nn.Cell], words: Mapping[str, Words]) -> Group:
    group = Group(trained)
    for component in trained.components:
        table = grow(_component(components, component))
        known = table.base.embedding_table.astype("float32").asnumpy()  # [vocabulary, dim]
        for token in trained.tokens:
            start = words[component].split(token.initializer)
            if not start:
                raise UsageError(f'The initializer "{token.initializer}" of {token.placeholder} has no tokens.')
            words[component].add(token.placeholder, token.vectors)
            name = f"{component}.{token.placeholder}"
            group.values[name] = table.add(name, known[[start[n % len(start)] for n in range(token.vectors)]])
            if trained.norm_limit is not None:
                group.longest[name] = trained.norm_limit * float(np.median(np.linalg.norm(known, axis=1)))
    return group


def keep_short(group: Group) -> None:
    """Shorten rows that have grown beyond the group's limit to it."""
    for name, limit in group.longest.items():
        rows = group.values[name].asnumpy()
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # [n, 1]
        group.values[name].set_data(Tensor(rows * np.minimum(limit / lengths, 1.0).astype(np.float32)))
