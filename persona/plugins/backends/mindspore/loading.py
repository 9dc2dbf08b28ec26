"""Opening a diffusers folder, strictly: every weight comes from the file, or the base is refused.

mindone's own `from_pretrained` is not used: where names do not fit it loads nothing and only logs that weights were
"newly initialized". Its models are built from their configs without values, and filled one weight after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mindone.diffusers import AutoencoderKL, UNet2DConditionModel
from mindone.transformers import CLIPTextModel, CLIPTextModelWithProjection
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters
from transformers.models.clip.configuration_clip import CLIPTextConfig

from persona.core.host.errors import BaseModelError
from persona.core.training.base import Base
from persona.plugins.backends.mindspore.cells import parameters_of
from persona.plugins.backends.shared.folder import class_name, read_weights

_BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Cell]] = {
    "UNet2DConditionModel": UNet2DConditionModel.from_config,
    "AutoencoderKL": AutoencoderKL.from_config,
    "CLIPTextModel": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
    "CLIPTextModelWithProjection": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
}


def load_component(base: Base, name: str, dtype: Any) -> nn.Cell:
    """The component `name` of `base`, frozen, in eval mode, its weights in `dtype`, named as published with the
    component in front. Raises BaseModelError for weights that are missing, unknown or of another shape, up to five
    of them by name."""
    model = _build(base, name)
    parameters = dict(parameters_of(model))
    shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    for key, values in read_weights(base, name, shapes):
        parameter = parameters[key]
        parameter.set_dtype(dtype)
        parameter.set_data(Tensor(np.ascontiguousarray(values, np.float32)).astype(dtype))
        parameter.name, parameter.requires_grad = f"{name}.{key}", False
    model.set_train(False)
    return model


def _build(base: Base, name: str) -> nn.Cell:
    wanted = class_name(base, name)
    if wanted not in _BUILDERS:
        raise BaseModelError(f"{base.id}: its {name} is a {wanted}, and the MindSpore backend knows "
                             f"{', '.join(_BUILDERS)}.")  # fmt: skip
    with no_init_parameters():
        return _BUILDERS[wanted](dict(base.components[name]))
