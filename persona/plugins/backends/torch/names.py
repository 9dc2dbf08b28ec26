"""Two spellings of the same parameter. Outside (plans, adapters, states, files) a CLIP text encoder's names start with
`text_model.`; inside, transformers >= 5.6 has dropped that prefix from CLIPTextModel (stacks/torch.md §4)."""

from __future__ import annotations

from torch import nn


def outside(model: nn.Module, name: str) -> str:
    """The published spelling of `name`, a parameter or module path inside `model`."""
    return f"text_model.{name}" if _is_flattened(model) else name


def inside(model: nn.Module, name: str) -> str:
    """The path inside `model` of `name` as published."""
    return name.removeprefix("text_model.") if _is_flattened(model) else name


def _is_flattened(model: nn.Module) -> bool:
    return type(model).__name__ == "CLIPTextModel" and not hasattr(model, "text_model")
