"""Attaching what a plan trains to the opened components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import nn

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.training.lora_values import FROM_WEIGHT, initial_factors, rate_factor, scale_of
from persona.core.training.plan import LowRank, NewTokens, Trained, TrainingPlan, Weights
from persona.plugins.backends.paddle.layout import Parameter, find_layer, outside, parameters, replace_layer
from persona.plugins.backends.paddle.lowrank import Decomposed, LowRankConv, LowRankLinear, row_norms, trainable
from persona.plugins.backends.paddle.words import GrownEmbedding
from persona.plugins.backends.shared.names import TOKEN_EMBEDDING
from persona.plugins.backends.shared.words import Words


@dataclass
class Group:
    """What one entry of a plan became. `values` are the trained parameters by their names in states:
    "unet.<path>.down", "unet.<path>.weight", "text_encoder.<placeholder>"."""

    trained: Trained
    values: dict[str, Parameter] = field(default_factory=dict)
    longest: dict[str, float] = field(default_factory=dict)  # of new rows: the norm none of them may exceed
    starts: dict[str, Parameter] = field(default_factory=dict)  # of deltas from the base's weight: their first factors

    def rate_factor(self, name: str) -> float:
        """What the learning rate of one of the values is multiplied by."""
        return rate_factor(self.trained, name.rpartition(".")[2]) if isinstance(self.trained, LowRank) else 1.0


def attach(plan: TrainingPlan, components: Mapping[str, nn.Layer], words: Mapping[str, Words]) -> list[Group]:
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
            groups.append(_low_rank(trained, _component(components, trained.component), plan.seed))
        elif isinstance(trained, Weights):
            groups.append(_weights(trained, _component(components, trained.component)))
        else:
            groups.append(_new_tokens(trained, components, words))
    return groups


def grow(model: nn.Layer) -> GrownEmbedding:
    """The model's token embedding, with room for new rows."""
    embedding = find_layer(model, TOKEN_EMBEDDING)
    if isinstance(embedding, GrownEmbedding):
        return embedding
    grown = GrownEmbedding(embedding)
    replace_layer(model, TOKEN_EMBEDDING, grown)
    return grown


def _component(components: Mapping[str, nn.Layer], name: str) -> nn.Layer:
    if name not in components:
        raise UsageError(f'This base has no component "{name}".', hint=did_you_mean(name, components))
    return components[name]


def _low_rank(trained: LowRank, model: nn.Layer, seed: int) -> Group:
    group = Group(trained)
    for path in trained.targets:
        layer = _layer(trained, model, path, seed)
        replace_layer(model, path, layer)
        name = f"{trained.component}.{path}"
        pair = layer.layer if isinstance(layer, Decomposed) else layer
        group.values |= {f"{name}.down": Parameter(pair.down), f"{name}.up": Parameter(pair.up)}
        if isinstance(layer, Decomposed):
            group.values[f"{name}.magnitude"] = Parameter(layer.magnitude)
        if pair.start is not None:
            group.starts |= {f"{name}.down": Parameter(pair.start[0]), f"{name}.up": Parameter(pair.start[1])}
    return group


def _layer(trained: LowRank, model: nn.Layer, path: str, seed: int) -> Any:
    module = find_layer(model, path)
    if module is None:
        known = [outside(model, name) for name, layer in model.named_sublayers() if _can_have_delta(layer)]
        raise UsageError(f"{trained.component} has no module {path}.", hint=did_you_mean(path, known))
    if isinstance(module, (LowRankLinear, LowRankConv, Decomposed)):
        raise UsageError(f"{trained.component}.{path} is a target twice.")
    if not _can_have_delta(module):
        raise UsageError(f"{trained.component}.{path} is a {type(module).__name__}, which cannot have a low-rank delta "
                         "(linear layers and ungrouped convolutions can).")  # fmt: skip
    weight = Parameter(module.weight, isinstance(module, nn.Linear))
    arrays = initial_factors(trained, path, weight.shape, weight.read, seed)
    down, up = (paddle.to_tensor(array) for array in arrays)
    start = (down.clone(), up.clone()) if trained.initialisation in FROM_WEIGHT else None
    cls: Any = LowRankLinear if isinstance(module, nn.Linear) else LowRankConv
    pair = cls(module, down, up, scale_of(trained, path), trained.dropout, start)
    return Decomposed(pair, row_norms(paddle.to_tensor(weight.read()))) if trained.decomposed else pair


def _can_have_delta(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2D) and layer._groups == 1)


def _weights(trained: Weights, model: nn.Layer) -> Group:
    group = Group(trained)
    for name, parameter in parameters(model).items():
        if not trained.targets or name.startswith(tuple(trained.targets)):
            parameter.tensor.stop_gradient = False
            group.values[f"{trained.component}.{name}"] = parameter
    for target in trained.targets:
        if not any(name.startswith(f"{trained.component}.{target}") for name in group.values):
            known = [outside(model, own) for own, _ in model.named_sublayers()]
            raise UsageError(f"{trained.component} has no weights called {target}.", hint=did_you_mean(target, known))
    return group


def _new_tokens(trained: NewTokens, components: Mapping[str, nn.Layer], words: Mapping[str, Words]) -> Group:
    group = Group(trained)
    for component in trained.components:
        table = grow(_component(components, component))
        old = table.base.weight.numpy()
        for token in trained.tokens:
            start = words[component].split(token.initializer)
            if not start:
                raise UsageError(f'The initializer "{token.initializer}" of {token.placeholder} has no tokens.')
            words[component].add(token.placeholder, token.vectors)
            rows = trainable(paddle.to_tensor(old[[start[n % len(start)] for n in range(token.vectors)]]))
            table.added.append(rows)
            name = f"{component}.{token.placeholder}"
            group.values[name] = Parameter(rows)
            if trained.norm_limit is not None:
                lengths = np.sort(np.linalg.norm(old, axis=1))
                group.longest[name] = trained.norm_limit * float(lengths[(len(lengths) - 1) // 2])  # torch's median
    return group


@paddle.no_grad()
def keep_short(group: Group) -> None:
    """Shorten rows that have grown beyond the group's limit to it."""
    for name, limit in group.longest.items():
        rows = group.values[name].tensor
        lengths = paddle.sqrt((rows**2).sum(axis=1, keepdim=True))  # [n, 1]
        rows.set_value(rows * (limit / lengths).clip(max=1.0))
