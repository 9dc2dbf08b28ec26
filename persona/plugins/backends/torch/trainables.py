"""Attaching what a plan trains to the opened components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.training.lora_values import FROM_WEIGHT, initial_factors, rate_factor, scale_of
from persona.core.training.plan import LowRank, NewTokens, Trained, TrainingPlan, Weights
from persona.plugins.backends.shared.names import TOKEN_EMBEDDING
from persona.plugins.backends.shared.words import Words
from persona.plugins.backends.torch.lowrank import Decomposed, LowRankConv, LowRankLayer, LowRankLinear
from persona.plugins.backends.torch.names import inside, outside
from persona.plugins.backends.torch.words import GrownEmbedding


@dataclass
class Group:
    """What one entry of a plan became. `values` are the trained parameters by their names in states:
    "unet.<path>.down", "unet.<path>.weight", "text_encoder.<placeholder>"; `layers` the LoRA layers by target."""

    trained: Trained
    values: dict[str, nn.Parameter] = field(default_factory=dict)
    layers: dict[str, LowRankLayer] = field(default_factory=dict)
    longest: dict[str, float] = field(default_factory=dict)  # of new rows: the norm none of them may exceed
    starts: dict[str, Tensor] = field(default_factory=dict)  # of deltas from the base's weight: their first factors

    def rate_factors(self) -> dict[float, dict[str, nn.Parameter]]:
        """The values by what their learning rate is multiplied by."""
        found: dict[float, dict[str, nn.Parameter]] = {}
        for name, value in self.values.items():
            last = name.rpartition(".")[2]
            factor = rate_factor(self.trained, last) if isinstance(self.trained, LowRank) else 1.0
            found.setdefault(factor, {})[name] = value
        return found


def attach(plan: TrainingPlan, components: Mapping[str, nn.Module], words: Mapping[str, Words]) -> list[Group]:
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


def grow(model: nn.Module) -> GrownEmbedding:
    """The model's token embedding, with room for new rows."""
    path = inside(model, TOKEN_EMBEDDING)
    embedding = model.get_submodule(path)
    if isinstance(embedding, GrownEmbedding):
        return embedding
    assert isinstance(embedding, nn.Embedding)
    grown = GrownEmbedding(embedding)
    _replace(model, path, grown)
    return grown


def _component(components: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name not in components:
        raise UsageError(f'This base has no component "{name}".', hint=did_you_mean(name, components))
    return components[name]


def _low_rank(trained: LowRank, model: nn.Module, seed: int) -> Group:
    group = Group(trained)
    for path in trained.targets:
        layer = _layer(trained, model, path, seed)
        _replace(model, inside(model, path), layer)
        group.layers[path] = layer
        name = f"{trained.component}.{path}"
        pair = layer.layer if isinstance(layer, Decomposed) else layer
        group.values |= {f"{name}.down": pair.down, f"{name}.up": pair.up}
        if isinstance(layer, Decomposed):
            group.values[f"{name}.magnitude"] = layer.magnitude
        if pair.start_down is not None and pair.start_up is not None:
            group.starts |= {f"{name}.down": pair.start_down, f"{name}.up": pair.start_up}
    return group


def _layer(trained: LowRank, model: nn.Module, path: str, seed: int) -> LowRankLayer:
    try:
        module = model.get_submodule(inside(model, path))
    except AttributeError:
        known = [outside(model, name) for name, module in model.named_modules() if _can_have_delta(module)]
        raise UsageError(f"{trained.component} has no module {path}.", hint=did_you_mean(path, known)) from None
    if isinstance(module, (LowRankLinear, LowRankConv, Decomposed)):
        raise UsageError(f"{trained.component}.{path} is a target twice.")
    if not _can_have_delta(module):
        raise UsageError(f"{trained.component}.{path} is a {type(module).__name__}, which cannot have a low-rank delta "
                         "(linear layers and ungrouped convolutions can).")  # fmt: skip
    weight = module.get_parameter("weight")
    arrays = initial_factors(trained, path, tuple(weight.shape), lambda: weight.detach().float().cpu().numpy(), seed)
    down, up = (torch.from_numpy(array).to(weight.device) for array in arrays)
    start = (down.clone(), up.clone()) if trained.initialisation in FROM_WEIGHT else None
    cls: Any = LowRankConv if isinstance(module, nn.Conv2d) else LowRankLinear
    pair = cls(module, down, up, scale_of(trained, path), trained.dropout, start)
    return Decomposed(pair) if trained.decomposed else cast(LowRankLayer, pair)


def _can_have_delta(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _weights(trained: Weights, model: nn.Module) -> Group:
    group = Group(trained)
    for own, parameter in model.named_parameters():
        name = outside(model, own)
        if not trained.targets or name.startswith(tuple(trained.targets)):
            parameter.requires_grad_(True)
            group.values[f"{trained.component}.{name}"] = parameter
    for target in trained.targets:
        if not any(name.startswith(f"{trained.component}.{target}") for name in group.values):
            known = [outside(model, own) for own, _ in model.named_modules() if own]
            raise UsageError(f"{trained.component} has no weights called {target}.", hint=did_you_mean(target, known))
    return group


def _new_tokens(trained: NewTokens, components: Mapping[str, nn.Module], words: Mapping[str, Words]) -> Group:
    group = Group(trained)
    for component in trained.components:
        model = _component(components, component)
        table = grow(model)
        for token in trained.tokens:
            start = words[component].split(token.initializer)
            if not start:
                raise UsageError(f'The initializer "{token.initializer}" of {token.placeholder} has no tokens.')
            words[component].add(token.placeholder, token.vectors)
            ids = torch.tensor([start[n % len(start)] for n in range(token.vectors)])
            rows = nn.Parameter(table.base.weight[ids.to(table.base.weight.device)].detach().float().clone())
            table.added.append(rows)
            name = f"{component}.{token.placeholder}"
            group.values[name] = rows
            if trained.norm_limit is not None:
                lengths = torch.linalg.vector_norm(table.base.weight.detach().float(), dim=1)
                group.longest[name] = trained.norm_limit * float(lengths.median())
    return group


@torch.no_grad()
def keep_short(group: Group) -> None:
    """Shorten rows that have grown beyond the group's limit to it."""
    for name, limit in group.longest.items():
        rows = group.values[name]
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)  # [n, 1]
        rows.mul_((limit / lengths).clamp(max=1.0))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
