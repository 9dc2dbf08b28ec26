"""Our LoRA layers are peft's, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from persona.plugins.backends.torch.lowrank import Decomposed, LowRankConv, LowRankLinear

LAYERS = {
    "linear": lambda: nn.Linear(6, 10),
    "linear without bias": lambda: nn.Linear(6, 10, bias=False),
    "conv 3x3": lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1),
    "conv 1x1": lambda: nn.Conv2d(6, 10, 1),
}
RANK, ALPHA = 3, 2.0


def peft_layer(module: nn.Module, dora: bool, dropout: float) -> Any:
    """peft's own layer around a copy of `module`, with `up` away from its zeros."""
    torch.manual_seed(1)
    holder = nn.ModuleDict({"target": module})
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["target"], use_dora=dora, lora_dropout=dropout)
    layer = inject_adapter_in_model(config, holder)["target"]
    nn.init.normal_(layer.lora_B["default"].weight)
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data = magnitude.data * torch.linspace(0.5, 1.5, magnitude.numel()).view_as(magnitude)
    return layer


def our_layer(module: Any, theirs: Any, dora: bool, dropout: float) -> Any:
    down, up = (theirs.lora_A["default"].weight, theirs.lora_B["default"].weight)
    cls = LowRankConv if isinstance(module, nn.Conv2d) else LowRankLinear
    layer: Any = cls(module, down.detach().clone(), up.detach().clone(), ALPHA / RANK, dropout)
    if dora:
        layer = Decomposed(layer)
        layer.magnitude.data = theirs.lora_magnitude_vector["default"].weight.detach().clone().flatten()
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_are_those_of_peft(kind: str, dora: bool, dropout: float) -> None:
    torch.manual_seed(0)
    module = LAYERS[kind]().requires_grad_(False)
    theirs = peft_layer(module, dora, dropout)
    ours = our_layer(module, theirs, dora, dropout)
    x = torch.randn(2, 6, 5, 5) if kind.startswith("conv") else torch.randn(2, 5, 6)
    results = []
    for layer in (ours, theirs):
        layer.train()
        torch.manual_seed(2)  # the same dropout mask
        given = x.clone().requires_grad_(True)
        output = layer(given)
        (output**2).mean().backward()
        results.append((output, given.grad))
    pair = ours.layer if dora else ours
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    torch.testing.assert_close(pair.down.grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(pair.up.grad, theirs.lora_B["default"].weight.grad)
    if dora:
        their_magnitude = theirs.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(ours.magnitude.grad, their_magnitude.grad.flatten())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_layer_that_starts_from_its_weight_is_pefts(kind: str, dropout: float) -> None:
    torch.manual_seed(0)
    module = nn.Linear(6, 10).requires_grad_(False)
    plain = nn.Linear(6, 10).requires_grad_(False)
    plain.load_state_dict(module.state_dict())
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["target"], init_lora_weights=kind, lora_dropout=dropout
    )  # type: ignore[arg-type]
    theirs: Any = inject_adapter_in_model(config, nn.ModuleDict({"target": module}))["target"]
    down, up = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    first = down.detach().clone(), up.detach().clone()
    ours = LowRankLinear(plain, *(value.clone() for value in first), ALPHA / RANK, dropout, first)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(ours.eval()(x), plain(x))  # it starts as the layer itself
    with torch.no_grad():  # as if trained
        for value in (down, up):
            value += torch.randn(value.shape)
        ours.down.copy_(down)
        ours.up.copy_(up)
    results = []
    for layer in (ours, theirs):
        layer.train()
        torch.manual_seed(2)
        given = x.clone().requires_grad_(True)
        output = layer(given)
        (output**2).mean().backward()
        results.append((output, given.grad))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close((ours.down.grad, ours.up.grad), (down.grad, up.grad))


def test_a_decomposed_layer_starts_as_the_layer_itself() -> None:
    torch.manual_seed(0)
    module = nn.Linear(6, 10)
    layer = Decomposed(LowRankLinear(module, torch.randn(3, 6), torch.zeros(10, 3), 1.0, 0.0))
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), module(x))
