"""Opening a diffusers folder, strictly: every weight comes from the file, or the base is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from persona.core.host.errors import BaseModelError
from persona.core.training.base import Base
from persona.plugins.backends.shared.folder import (
    class_name,
    is_pointwise,
    refuse_keys,
    refuse_shape,
    weight_files,
)
from persona.plugins.backends.shared.names import is_bookkeeping, published
from persona.plugins.backends.torch.names import outside

_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "UNet2DConditionModel": UNet2DConditionModel.from_config,
    "AutoencoderKL": AutoencoderKL.from_config,
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "CLIPTextModelWithProjection": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
}


def load_component(base: Base, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The component `name` of `base`, frozen, in eval mode, its floating weights in `dtype` on `device`.

    Built without memory and filled tensor by tensor, so that at most one tensor exists twice. Raises BaseModelError
    for weights that are missing, unknown or of another shape, naming up to five.
    """
    model = _build(base, name)
    expected = {outside(model, key): key for key in model.state_dict()}
    state: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for stored, read in _stored_tensors(base.folder(name)):
        key = published(name, stored)
        if key in expected:
            state[expected[key]] = _fit(base, name, key, read(), model, expected[key]).to(device, dtype, copy=True)
        elif not is_bookkeeping(key):
            unknown.append(stored)
    refuse_keys(base, name, "has no", [key for key, own in expected.items() if own not in state])
    refuse_keys(base, name, "has weights nobody knows:", unknown)
    model.load_state_dict(state, strict=True, assign=True)
    _fill_buffers(model, device)
    return model.requires_grad_(False).eval()


def _build(base: Base, name: str) -> nn.Module:
    wanted = class_name(base, name)
    if wanted not in _BUILDERS:
        raise BaseModelError(f"{base.id}: its {name} is a {wanted}, and the torch backend knows "
                             f"{', '.join(_BUILDERS)}.")  # fmt: skip
    with torch.device("meta"):
        return _BUILDERS[wanted](dict(base.components[name]))


def _stored_tensors(folder: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                    yield key, partial(file.get_tensor, key)
        except (SafetensorError, OSError) as error:
            raise BaseModelError(f"{path} cannot be read: {error}.", hint="Download it again.") from error


def _fit(base: Base, name: str, key: str, tensor: torch.Tensor, model: nn.Module, own: str) -> torch.Tensor:
    wanted = model.get_parameter(own).shape
    if is_pointwise(tensor.shape, wanted):
        return tensor[:, :, 0, 0]
    if tensor.shape != wanted:
        refuse_shape(base, name, key, tensor.shape, wanted)
    return tensor


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that no file holds, which building without memory left empty: CLIP's 0, 1, 2, …"""
    for path, buffer in list(model.named_buffers()):
        if buffer.device.type != "meta":
            continue
        parent, _, last = path.rpartition(".")
        if last != "position_ids":
            raise BaseModelError(f"{type(model).__name__} has a buffer {path} that no file holds.")
        values = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        model.get_submodule(parent).register_buffer(last, values, persistent=False)
