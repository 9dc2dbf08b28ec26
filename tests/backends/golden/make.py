"""Write golden.npz and shapes.json with torch: `python -m tests.backends.golden.make`, in the torch environment.

What is written comes from the torch backend, which its own tests hold to diffusers, transformers and peft."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from persona.core.host.contracts import Runtime
from persona.plugins.backends.torch import TorchBackend
from tests import narrow_models
from tests.backends.golden import cases as golden
from tests.numpy_base import KINDS, SHAPES, numpy_base

_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}
_UNET = {
    "tiny": narrow_models._UNET["tiny"],
    "tiny-sdxl": {
        **narrow_models._UNET["sdxl"],
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
    },
}
_TEXT: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": narrow_models._TEXT["tiny"],
    "tiny-sdxl": {
        "text_encoder": {"hidden_size": 32, "num_hidden_layers": 2, "hidden_act": "quick_gelu"},
        "text_encoder_2": {"hidden_size": 48, "num_hidden_layers": 3, "hidden_act": "gelu", "projection_dim": 40},
    },
}


def shapes_of(kind: str) -> dict[str, Any]:
    """Configs and shapes of a base's components."""
    vocabulary, _ = narrow_models.bpe(narrow_models.WORDS)
    models: dict[str, Any] = {
        "unet": UNet2DConditionModel(sample_size=8, norm_num_groups=8, **_UNET[kind]),
        "vae": AutoencoderKL(**_VAE, scaling_factor=0.13025 if kind == "tiny-sdxl" else 0.18215),
    }
    for name, values in _TEXT[kind].items():
        config = CLIPTextConfig(
            vocab_size=len(vocabulary),
            intermediate_size=64,
            num_attention_heads=4,
            bos_token_id=vocabulary[narrow_models.START],
            eos_token_id=2,
            pad_token_id=vocabulary["!" if name == "text_encoder_2" else narrow_models.END],
            **values,
        )
        models[name] = (CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel)(config)
        models[name].config.architectures = [type(models[name]).__name__]
    found = {}
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            (model.config.save_pretrained if name.startswith("text") else model.save_config)(folder)
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        shapes = {_published(name, key): list(value.shape) for key, value in model.state_dict().items()}
        found[name] = {"config": config, "shapes": shapes}
    return found


def _published(component: str, key: str) -> str:
    plain = key.startswith(("text_model.", "text_projection."))
    return key if plain or not component.startswith("text_encoder") else f"text_model.{key}"


def results(kind: str, folder: Path) -> dict[str, np.ndarray]:
    """What torch computes on a base."""
    base = numpy_base(kind, folder)
    session: Any = TorchBackend().open(base, None, Runtime("cpu"))
    mean, logvar = session.encode_pictures(golden.pictures())
    found = {"mean": mean, "logvar": logvar, "sample": session.sample(golden.REQUEST)}
    found |= {f"text/{key}": value[:, ::7] for key, value in session.encode_text(golden.PROMPTS).items()}
    for case, plan in golden.cases(base).items():
        session = TorchBackend().open(base, plan, Runtime("cpu"))
        session.load_state(golden.start_values(session.state()))
        found[f"{case}/losses"] = np.stack([session.accumulate(golden.batch_of(base, case, number=n)) for n in (0, 1)])
        gradients = {name: _gradient(value) for name, value in session._optimizer.names.items()}
        norms = [np.linalg.norm(gradients[name].ravel()) for name in sorted(gradients)]
        found[f"{case}/norms"] = np.array(norms, np.float32)
        kept = [gradients[name].ravel() for name in golden.kept_whole(case, gradients)]
        found[f"{case}/gradients"] = np.concatenate(kept)  # one array: an npz spends 400 bytes on each
    return {f"{kind}/{name}": value for name, value in found.items()}


def _gradient(value: Any) -> np.ndarray:
    """A value that nothing depends on (SDXL reads the last but one layer of its first encoder) has none."""
    return np.zeros(value.shape, np.float32) if value.grad is None else value.grad.numpy()


def main() -> None:
    """Write both files."""
    SHAPES.write_text(json.dumps({kind: shapes_of(kind) for kind in KINDS}, separators=(",", ":")), encoding="utf-8")
    everything = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            everything |= results(kind, Path(folder))
    np.savez_compressed(golden.FILE, **everything)
    print(f"{golden.FILE}: {golden.FILE.stat().st_size} bytes, {SHAPES}: {SHAPES.stat().st_size} bytes")


if __name__ == "__main__":
    main()
