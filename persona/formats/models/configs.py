"""diffusers' config.json files for components whose source had none: read off the shapes, and what shapes cannot say
(heads, norm groups, activation) as the family has it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from persona.core.adapters.tensor import TensorRef
from persona.formats.models.clip import CLIP_BIG_G, CLIP_H, CLIP_L
from persona.formats.models.whole_transformer import transformer_config

Tensors = Mapping[str, TensorRef]
HEADS: dict[str, Any] = {
    "sd1": 8,
    "wukong": 8,
    "sd2": [5, 10, 20, 20],
    "sdxl": [5, 10, 20],
    "kolors": [5, 10, 20],
    "sdxl-refiner": [6, 12, 24, 24],
}
"""`attention_head_dim`, which in diffusers' UNet is the number of heads."""
SAMPLES = {"sdxl": 128, "sdxl-refiner": 128, "kolors": 128}
"""`sample_size`, the side of the latents a UNet was trained on, where it is not 64 (512 pixels)."""
SAMPLE_OF_SD2_V = 96
"""SD2 was published twice: for 512 pixels, predicting noise, and for 768, predicting v."""
PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux1": "FluxPipeline",
}
SCALING = {"sdxl": 0.13025, "sdxl-refiner": 0.13025, "kolors": 0.13025, "sd3": 1.5305, "flux1": 0.3611}
SHIFT = {"sd3": 0.0609, "flux1": 0.1159}
"""What the autoencoder's latents are multiplied by, and what is taken off before, as published with each model."""


ACTIVATIONS = {CLIP_L.width: "quick_gelu", CLIP_H.width: "gelu", CLIP_BIG_G.width: "gelu"}
"""`hidden_act` of OpenAI's CLIP and of OpenCLIP's two, by width; a narrow model has that of its place."""


def unet_config(parameters: Tensors, family: str) -> dict[str, Any]:
    """`unet/config.json`."""
    levels = _count(parameters, r"^down_blocks\.(\d+)\.")
    channels = [parameters[f"down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in range(levels)]
    attends = [f"down_blocks.{n}.attentions.0.norm.weight" in parameters for n in range(levels)]
    depth = [
        _count(parameters, rf"^down_blocks\.{n}\.attentions\.0\.transformer_blocks\.(\d+)\.") or 1
        for n in range(levels)
    ]
    depth[-1] = max(depth[-1], _count(parameters, r"^mid_block\.attentions\.0\.transformer_blocks\.(\d+)\."))
    projection = next((ref for name, ref in parameters.items() if name.endswith(".proj_in.weight")), None)
    context = next(ref.shape[1] for name, ref in parameters.items() if name.endswith(".attn2.to_k.weight"))
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": HEADS.get(family, 8),
        "block_out_channels": channels,
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "in_channels": parameters["conv_in.weight"].shape[1],
        "out_channels": parameters["conv_out.weight"].shape[0],
        "sample_size": SAMPLES.get(family, 64),
        "layers_per_block": _count(parameters, r"^down_blocks\.0\.resnets\.(\d+)\."),
        "norm_num_groups": _groups(channels[0]),
        "transformer_layers_per_block": depth if len(set(depth)) > 1 else depth[0],
        "use_linear_projection": projection is not None and len(projection.shape) == 2,
    }
    if "add_embedding.linear_1.weight" in parameters:
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = 256
        config["projection_class_embeddings_input_dim"] = parameters["add_embedding.linear_1.weight"].shape[1]
    return config


def vae_config(parameters: Tensors, family: str) -> dict[str, Any]:
    """`vae/config.json`."""
    levels = _count(parameters, r"^encoder\.down_blocks\.(\d+)\.")
    channels = [parameters[f"encoder.down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": parameters["encoder.conv_in.weight"].shape[1],
        "out_channels": parameters["decoder.conv_out.weight"].shape[0],
        "latent_channels": parameters["decoder.conv_in.weight"].shape[1],
        "layers_per_block": _count(parameters, r"^encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "norm_num_groups": _groups(channels[0]),
        "scaling_factor": SCALING.get(family, 0.18215),
        **({"shift_factor": SHIFT[family]} if family in SHIFT else {}),
        **({"force_upcast": True} if family.startswith("sdxl") else {}),  # its activations overflow in fp16
        "use_quant_conv": "quant_conv.weight" in parameters,
        "use_post_quant_conv": "post_quant_conv.weight" in parameters,
    }


def first_encoder_config(parameters: Tensors, family: str) -> dict[str, Any]:
    """`text_encoder/config.json`: OpenAI's CLIP-L, with a projection in SD3, and OpenCLIP's H in SD2."""
    return _clip_config(parameters, family, "gelu" if family == "sd2" else "quick_gelu")


def later_encoder_config(parameters: Tensors, family: str) -> dict[str, Any]:
    """`text_encoder_2/config.json` and `text_encoder_3/config.json`: OpenCLIP's bigG, or T5."""
    return _t5_config(parameters) if "shared.weight" in parameters else _clip_config(parameters, family, "gelu")


def _clip_config(parameters: Tensors, family: str, activation: str) -> dict[str, Any]:
    vocabulary, width = parameters["text_model.embeddings.token_embedding.weight"].shape
    projection = parameters.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection" if projection is not None else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_act": ACTIVATIONS.get(width, activation),
        "hidden_size": width,
        "intermediate_size": parameters["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-7 if family == "wukong" else 1e-5,
        "max_position_embeddings": parameters["text_model.embeddings.position_embedding.weight"].shape[0],
        "num_attention_heads": max(width // 64, 1),
        "num_hidden_layers": _count(parameters, r"^text_model\.encoder\.layers\.(\d+)\."),
        "projection_dim": projection.shape[0] if projection is not None else width,
        "vocab_size": vocabulary,
    }


def _t5_config(parameters: Tensors) -> dict[str, Any]:
    vocabulary, width = parameters["shared.weight"].shape
    buckets, heads = parameters["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_ff": parameters["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1],
        "d_kv": parameters["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads,
        "d_model": width,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "num_heads": heads,
        "num_layers": _count(parameters, r"^encoder\.block\.(\d+)\."),
        "relative_attention_num_buckets": buckets,
        "vocab_size": vocabulary,
    }


MAKERS: dict[str, Callable[[Tensors, str], dict[str, Any]]] = {
    "unet": unet_config,
    "transformer": transformer_config,
    "vae": vae_config,
    "text_encoder": first_encoder_config,
    "text_encoder_2": later_encoder_config,
    "text_encoder_3": later_encoder_config,
}
"""Component -> its config from shapes."""
CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
}
OWN_CLASSES = {
    "sd3": {
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    },
    "flux1": {
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
    },
}


def model_index(components: Mapping[str, Tensors], family: str) -> dict[str, Any]:
    """`model_index.json` of the components that are there."""
    index: dict[str, Any] = {"_class_name": PIPELINES.get(family, "StableDiffusionPipeline")}
    classes = {**CLASSES, **OWN_CLASSES.get(family, {})}
    if family == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    index.update({name: classes[name] for name in components if name in classes})
    return index


def index_of_others(
    tokenizers: Mapping[str, Mapping[str, bytes]], scheduler: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `model_index.json` says of tokenizers and the scheduler."""
    found = {
        name: ["transformers", "T5TokenizerFast" if "spiece.model" in files else "CLIPTokenizer"]
        for name, files in tokenizers.items()
    }
    return found | ({"scheduler": ["diffusers", scheduler["_class_name"]]} if scheduler else {})


def in_diffusers_words(index: Mapping[str, Any]) -> dict[str, Any]:
    """A `model_index.json` with the libraries of diffusers, where ppdiffusers named its own."""
    libraries = {"ppdiffusers": "diffusers", "paddlenlp.transformers": "transformers",
                 "ppdiffusers.transformers": "transformers"}  # fmt: skip
    return {
        name: [libraries.get(value[0], value[0]), *value[1:]] if isinstance(value, list) and value else value
        for name, value in index.items()
        if name != "_ppdiffusers_version"
    }


def _count(parameters: Tensors, pattern: str) -> int:
    found = [int(match[1]) for name in parameters if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _groups(width: int) -> int:
    """32, as in every published model, or the most that divide a narrower one."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if width % groups == 0)
