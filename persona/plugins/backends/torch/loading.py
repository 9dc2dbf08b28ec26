"""Opening a diffusers folder, strictly: every weight comes from the file, or the base is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
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
from persona.plugins.backends.torch.names import is_bookkeeping, outside, published

_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "UNet2DConditionModel": UNet2DConditionModel.from_config,
    "AutoencoderKL": AutoencoderKL.from_config,
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "CLIPTextModelWithProjection": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
}
_DEFAULT_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16")


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
    _refuse(base, name, "has no", [key for key, own in expected.items() if own not in state])
    _refuse(base, name, "has weights nobody knows:", unknown)
    model.load_state_dict(state, strict=True, assign=True)
    _fill_buffers(model, device)
    return model.requires_grad_(False).eval()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component's folder: the plain ones, else the fp16 or bf16 variant; shards in order.

    Raises BaseModelError when there are none."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if single.is_file():
                return [single]
            if index.is_file():
                table = json.loads(index.read_text(encoding="utf-8"))
                return [folder / shard for shard in sorted(set(table["weight_map"].values()))]
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles:
        raise BaseModelError(
            f"{folder} has its weights only as a pickle ({pickles[0]}), which the torch backend does not open.",
            hint=f"Convert the model first: persona convert {folder.parent} {folder.parent}-safetensors",
        )
    raise BaseModelError(f"{folder} has no weights (looked for {_STEMS[0]}.safetensors and {_STEMS[1]}.safetensors).",
                         hint="Is this a diffusers folder? persona models ls lists bases that work.")  # fmt: skip


def class_name(base: Base, name: str) -> str:
    """The library class of a component: what its config says, else what every Stable Diffusion has there."""
    config = base.components[name]
    architectures = config.get("architectures") or ()
    return str(config.get("_class_name") or (architectures[0] if architectures else _DEFAULT_CLASSES.get(name, "?")))


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
    if tensor.shape != wanted and tensor.dim() == 4 and tensor.shape[:2] == wanted and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]  # an attention projection of an old VAE, kept as a 1x1 convolution
    if tensor.shape != wanted:
        raise BaseModelError(f"{base.id}: {name}'s {key} is {list(tensor.shape)}, and its config makes it "
                             f"{list(wanted)}.", hint="config.json and weights are of two models.")  # fmt: skip
    return tensor


def _refuse(base: Base, name: str, complaint: str, keys: Iterable[str]) -> None:
    found = sorted(keys)
    if found:
        rest = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise BaseModelError(f"{base.id}: {name} {complaint} {', '.join(found[:5])}{rest}.",
                             hint="Its config.json and weights do not belong together; download it again.")  # fmt: skip


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
