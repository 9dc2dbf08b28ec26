"""What an optimizer remembers, as named arrays and back, exactly.

AdamW's moments have names that every backend knows (adam_m, adam_v). Of another optimizer everything is kept as it is:
`optimizer/<value>/<key>` are its tensors for a trained value, `optimizer_number/<value>/<key>` its plain numbers, and
`optimizer_group/<n>/<key>` the numbers of a parameter group that it changes itself, as Prodigy does with its step size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from persona.plugins.backends.torch.sharding import like

Parameters = Mapping[str, nn.Parameter]
States = Mapping[str, np.ndarray]
Read = Callable[[Tensor], np.ndarray]
BF16 = "bf16:"  # in front of a key: numpy has no bfloat16, and its bits travel as uint16


def adamw_state(optimizer: torch.optim.Optimizer, parameters: Parameters, read: Read) -> dict[str, np.ndarray]:
    """adam_m/<name> and adam_v/<name> of every value that was ever updated."""
    state = {}
    for name, parameter in parameters.items():
        known = optimizer.state.get(parameter)
        if known:
            state[f"adam_m/{name}"] = read(known["exp_avg"])
            state[f"adam_v/{name}"] = read(known["exp_avg_sq"])
    return state


def load_adamw_state(
    optimizer: torch.optim.Optimizer, parameters: Parameters, state: States, step: float, *, on_device: bool
) -> None:
    """Inverse of `adamw_state`; `step` counts the updates made, and is kept beside its value `on_device`."""
    optimizer.state.clear()
    for name, parameter in parameters.items():
        if f"adam_m/{name}" in state:
            optimizer.state[parameter] = {
                "step": torch.tensor(step, dtype=torch.float32, device=parameter.device if on_device else "cpu"),
                "exp_avg": like(parameter, state[f"adam_m/{name}"]),
                "exp_avg_sq": like(parameter, state[f"adam_v/{name}"]),
            }


def any_state(
    optimizer: torch.optim.Optimizer, parameters: Parameters, constants: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """Everything an optimizer keeps for its values, and what it has changed in its groups; `constants` are the groups'
    numbers as the plan made them (`group_numbers`)."""
    state: dict[str, np.ndarray] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                mark = BF16 if value.dtype == torch.bfloat16 else ""
                plain = value.view(torch.int16) if mark else value
                state[f"optimizer/{name}/{mark}{key}"] = plain.detach().cpu().numpy().copy()
            elif isinstance(value, bool | int | float):
                state[f"optimizer_number/{name}/{key}"] = np.array(value)
    for number, group in enumerate(group_numbers(optimizer)):
        changed = {key: value for key, value in group.items() if constants[number].get(key) != value}
        state |= {f"optimizer_group/{number}/{key}": np.array(value) for key, value in changed.items()}
    return state


def load_any_state(optimizer: torch.optim.Optimizer, parameters: Parameters, state: States) -> None:
    """Inverse of `any_state`."""
    optimizer.state.clear()
    by_name: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for full, array in state.items():
        kind, _, rest = full.partition("/")
        name, _, key = rest.rpartition("/")
        if kind == "optimizer" and name in by_name:
            tensor = torch.tensor(np.asarray(array), device=parameters[name].device)
            exact = tensor.view(torch.bfloat16) if key.startswith(BF16) else tensor
            by_name[name][key.removeprefix(BF16)] = exact
        elif kind == "optimizer_number" and name in by_name:
            by_name[name][key] = np.asarray(array).item()
        elif kind == "optimizer_group":
            optimizer.param_groups[int(name)][key] = np.asarray(array).item()
    for name, known in by_name.items():
        if known:
            optimizer.state[parameters[name]] = known


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The plain numbers of every parameter group, the learning rate left out."""
    return [
        {key: value for key, value in group.items() if key != "lr" and isinstance(value, bool | int | float)}
        for group in optimizer.param_groups
    ]
