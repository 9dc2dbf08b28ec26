"""What torch_npu has for an Ascend NPU beside torch: fused attention, fused AdamW and clipping. Functions here say what
is there and leave the choice to their callers.

Written from torch_npu's published source and documents (release 2.13, August 2026) and run on a stand-in whose
arithmetic is the cpu's; nothing here has run on an NPU.

| | 910 (910A, 910ProB, 910PremiumA) | 910B and later (Atlas A2, A3) |
|---|---|---|
| bf16 | no (torch_npu: SocVersion below Ascend910B1) | yes |
| npu_fusion_attention | no (documented for Atlas A2 and A3) | fp16 and bf16 |
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

ALIGNED = 16
"""npu_fusion_attention wants heads whose width is a multiple of this; SD1's are 40, 80 and 160 wide."""


def library() -> Any:
    """The module torch_npu; None when it is not there or cannot be imported (CANN missing, another torch)."""
    if importlib.util.find_spec("torch_npu") is None:
        return None
    try:
        return importlib.import_module("torch_npu")
    except Exception:  # without its CANN libraries it fails in many ways, all of which mean: not usable
        return None


def device_module() -> Any:
    """torch.npu, which torch_npu adds to torch."""
    return getattr(torch, "npu", None)


def has_bf16() -> bool:
    """Whether the NPU computes in bf16: the 910B and later do."""
    supported = getattr(device_module(), "is_bf16_supported", None)
    return bool(supported()) if supported else False


def has_flash_attention() -> bool:
    """Whether torch_npu has fused attention for this NPU. The first generation to have it is the first with bf16."""
    return has_bf16() and hasattr(library(), "npu_fusion_attention")


def fused_adamw() -> tuple[type | None, str]:
    """torch_npu's NpuFusedAdamW, or None and the reason."""
    try:
        found: type = importlib.import_module("torch_npu.optim").NpuFusedAdamW
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    except Exception as error:
        return None, f"torch_npu.optim cannot be imported: {type(error).__name__}: {error}"
    return found, ""


def keep_plain_layout() -> None:
    """Keep tensors in the layout they are written in: the NPU's own makes every new shape compile operators again."""
    config = getattr(device_module(), "config", None)
    if config is not None:
        config.allow_internal_format = False


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale · query · keyᵀ) · value in one kernel; all [n, heads, tokens, width], fp16 or bf16.

    Widths that are no multiple of 16 are filled up with zeros, which change no product, and cut off again."""
    width = query.shape[-1]
    short = -width % ALIGNED
    if short:
        query, key, value = (torch.nn.functional.pad(each, (0, short)) for each in (query, key, value))
    found: torch.Tensor = library().npu_fusion_attention(
        query, key, value, query.shape[1], input_layout="BNSD", scale=scale, keep_prob=1.0
    )[0]
    return found[..., :width] if short else found
