"""Opening a diffusers folder, strictly: every weight comes from the file, or the base is refused.

Not through ppdiffusers' `from_pretrained`, which fills a text encoder with random numbers and a warning when the file's
keys are spelt otherwise than it expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paddle import nn
from paddlenlp.transformers.clip.configuration import CLIPTextConfig
from paddlenlp.transformers.clip.modeling import CLIPTextModel, CLIPTextModelWithProjection
from ppdiffusers.models.autoencoder_kl import AutoencoderKL
from ppdiffusers.models.unet_2d_condition import UNet2DConditionModel

from persona.core.host.errors import BaseModelError
from persona.core.training.base import Base
from persona.plugins.backends.paddle.layout import parameters
from persona.plugins.backends.paddle.normalisation import replace_layer_norms
from persona.plugins.backends.shared.folder import class_name, read_weights

_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
              "num_attention_heads", "max_position_embeddings", "hidden_act", "attention_dropout",
              "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip


def load_component(base: Base, name: str) -> Any:
    """The component `name` of `base` in fp32 on the current device, frozen, in eval mode.

    Raises BaseModelError for weights that are missing, unknown or of another shape, naming up to five.
    """
    wanted = class_name(base, name)
    if wanted not in _BUILDERS:
        raise BaseModelError(f"{base.id}: its {name} is a {wanted}, and the paddle backend knows "
                             f"{', '.join(_BUILDERS)}.")  # fmt: skip
    model = _BUILDERS[wanted](base.components[name])
    replace_layer_norms(model)
    found = parameters(model)
    for key, values in read_weights(base, name, {key: parameter.shape for key, parameter in found.items()}):
        found[key].write(values)
    for parameter in found.values():
        parameter.tensor.stop_gradient = True
    model.eval()
    return model


def _text_encoder(cls: Any) -> Callable[[Mapping[str, Any]], nn.Layer]:
    def build(config: Mapping[str, Any]) -> nn.Layer:
        model: nn.Layer = cls(CLIPTextConfig(**{key: config[key] for key in _TEXT_KEYS if key in config}))
        replace_layer_norms(model, float(config.get("layer_norm_eps", 1e-5)))  # paddlenlp does not ask the config
        return model

    return build


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "UNet2DConditionModel": lambda config: UNet2DConditionModel.from_config(dict(config)),
    "AutoencoderKL": lambda config: AutoencoderKL.from_config(dict(config)),
    "CLIPTextModel": _text_encoder(CLIPTextModel),
    "CLIPTextModelWithProjection": _text_encoder(CLIPTextModelWithProjection),
}
