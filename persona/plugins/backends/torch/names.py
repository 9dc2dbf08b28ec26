"""Two spellings of the same parameter. Outside (plans, adapters, states, files) a CLIP text encoder's names start with
`text_model.`; inside, transformers >= 5.6 has dropped that prefix from CLIPTextModel (stacks/torch.md §4)."""

from __future__ import annotations

from torch import nn

_CLIP_ROOTS = ("embeddings.", "encoder.", "final_layer_norm.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.18


def outside(model: nn.Module, name: str) -> str:
    """The published spelling of `name`, a parameter or module path inside `model`."""
    return f"text_model.{name}" if _is_flattened(model) else name


def inside(model: nn.Module, name: str) -> str:
    """The path inside `model` of `name` as published."""
    return name.removeprefix("text_model.") if _is_flattened(model) else name


def published(component: str, stored: str) -> str:
    """The published spelling of a key `stored` in a weights file of `component`, old and flattened ones included."""
    if component.startswith("text_encoder") and stored.startswith(_CLIP_ROOTS):
        return f"text_model.{stored}"
    if component == "vae" and ".attentions." in stored:
        path, _, parameter = stored.rpartition(".")
        parent, _, last = path.rpartition(".")
        return f"{parent}.{_OLD_ATTENTION.get(last, last)}.{parameter}"
    return stored


def is_bookkeeping(name: str) -> bool:
    """Whether a stored key is a buffer that every transformers release makes by itself."""
    return name.endswith(".position_ids")


def _is_flattened(model: nn.Module) -> bool:
    return type(model).__name__ == "CLIPTextModel" and not hasattr(model, "text_model")
