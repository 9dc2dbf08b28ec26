"""Makers of narrow base models: the real topology of SD1.5, SD2 (v-prediction, linear projections) and SDXL, a few
channels wide, random weights, our own small CLIP vocabulary. Diffusers folders, written without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persona.core.training.base import Base, ParameterShape

WORDS = ("a", "photo", "of", "cat", "dog", "toy", "red", "on", "the", "background", "robot", "blue", "in", "style")
GROUPS = 8  # group norms over four and more channels, as in the real ones; over two they are badly conditioned
START, END = "<|startoftext|>", "<|endoftext|>"

_CROSS = "CrossAttnDownBlock2D"
_UNET: dict[str, dict[str, Any]] = {
    "tiny": {  # no real model's depth: for tests of whole runs, many of which have to fit into a minute
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", _CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
    },
    "sd1": {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 8, "cross_attention_dim": 32},
    "sd2": {
        "block_out_channels": (32, 64, 64, 64),
        "attention_head_dim": (2, 4, 4, 4),
        "cross_attention_dim": 48,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", _CROSS, _CROSS),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 32 + 48,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 40 + 6 * 8,
    },
}
_TEXT: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"text_encoder": {"hidden_size": 32, "num_hidden_layers": 2, "hidden_act": "quick_gelu"}},
    "sd1": {"text_encoder": {"hidden_size": 32, "num_hidden_layers": 12, "hidden_act": "quick_gelu"}},
    "sd2": {"text_encoder": {"hidden_size": 48, "num_hidden_layers": 23, "hidden_act": "gelu"}},
    "sdxl": {
        "text_encoder": {"hidden_size": 32, "num_hidden_layers": 12, "hidden_act": "quick_gelu"},
        "text_encoder_2": {"hidden_size": 48, "num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 40},
    },
}
_PIPELINE = {
    "tiny": "StableDiffusionPipeline",
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def narrow_pipeline(kind: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a narrow `kind` ("sd1", "sd2", "sdxl", or "tiny": sd1 with fewer layers) into `folder`, made if missing.

    A seed always writes the same."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, _ = bpe(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(sample_size=8, norm_num_groups=GROUPS, **_UNET[kind])
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8) if kind == "tiny" else (32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=GROUPS,
            sample_size=64,
            force_upcast=kind == "sdxl",
            scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
        )
        encoders = {}
        for name, values in _TEXT[kind].items():
            config = CLIPTextConfig(
                vocab_size=len(vocabulary),
                intermediate_size=64,
                num_attention_heads=4,
                bos_token_id=vocabulary[START],
                eos_token_id=2,  # as the real ones have it, which no longer holds once there are new tokens
                pad_token_id=vocabulary[END] if name == "text_encoder" else vocabulary["!"],
                **values,
            )
            encoders[name] = (CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel)(config)
    for name, model in {"unet": unet, "vae": vae}.items():
        model.save_pretrained(folder / name)
    for name, model in encoders.items():
        _write_text_encoder(folder / name, model)
        _write_tokenizer(folder / name.replace("text_encoder", "tokenizer"), "!" if name == "text_encoder_2" else END)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(kind))
    index: dict[str, Any] = {"_class_name": _PIPELINE[kind], "_diffusers_version": "0.35.0"}
    index |= {name: ["diffusers", type(model).__name__] for name, model in {"unet": unet, "vae": vae}.items()}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    for name, model in encoders.items():
        index[name] = ["transformers", type(model).__name__]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if kind == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    _write_json(folder / "model_index.json", index)
    return folder


def scheduler_config(kind: str) -> dict[str, Any]:
    """The noise schedule the real models ship with."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction" if kind == "sd2" else "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def narrow_base(kind: str, folder: Path) -> Base:
    """`Base` of a folder that `narrow_pipeline` wrote, from configs and headers."""
    names = [entry.name for entry in sorted(folder.iterdir()) if (entry / "config.json").is_file()]
    return Base(
        id=f"narrow-{kind}",
        path=folder,
        hash=f"narrow-{kind}",
        family=kind,
        components={name: json.loads((folder / name / "config.json").read_text()) for name in names},
        parameters={name: dict(_headers(folder / name)) for name in names},
        schedule=json.loads((folder / "scheduler" / "scheduler_config.json").read_text()),
        tokenizers={entry.name: entry for entry in sorted(folder.glob("tokenizer*"))},
    )


def bpe(words: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """A CLIP byte-pair vocabulary whose merges make each of `words` one token: (token to id, merges)."""
    letters = [chr(code) for code in _byte_letters()]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            if merge not in merges:
                merges.append(merge)
                tokens.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens += [START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_letters() -> list[int]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order CLIP's vocabulary lists them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return printable + [256 + n for n in range(256 - len(printable))]


def _write_tokenizer(folder: Path, pad: str) -> None:
    vocabulary, merges = bpe(WORDS)
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True} | special
    _write_json(folder / "tokenizer_config.json", settings)


def _write_text_encoder(folder: Path, model: Any) -> None:
    """As published encoders are: `text_model.` in front of every key, whichever transformers wrote it."""
    from safetensors.torch import save_file

    state = {}
    for name, tensor in model.state_dict().items():
        published = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        state[published] = tensor.contiguous()
    model.config.architectures = [type(model).__name__]
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _headers(folder: Path) -> Iterator[tuple[str, ParameterShape]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                part = file.get_slice(name)
                yield name, ParameterShape(tuple(part.get_shape()), str(part.get_dtype()))
