"""What persona writes, loaded by Paddle and by ppdiffusers' own loaders."""

from __future__ import annotations

import os

os.environ.setdefault("USE_PEFT_BACKEND", "False")  # as ppdiffusers' own examples have it

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import ppdiffusers
import pytest
from peer_adapters import (
    ATTENTION,
    CONVOLUTIONS,
    FIXTURES,
    LINEAR,
    LOCON,
    LOHA,
    LOKR,
    PADDLE,
    TEXT_ENCODER,
    UNET,
    compare,
    expected,
)
from ppdiffusers import version as ppdiffusers_version
from ppdiffusers.transformers import CLIPTextConfig, CLIPTextModel

import persona

ppdiffusers_version.VERSION = "0.24.9"  # 0.29 stops at its own deprecation notices in every LoRA path


def pipeline() -> Any:
    """A Stable Diffusion pipeline of the narrow UNet and text encoder, random weights."""
    paddle.seed(0)
    return ppdiffusers.StableDiffusionPipeline(
        vae=ppdiffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        tokenizer=None,
        unet=ppdiffusers.UNet2DConditionModel(**UNET),
        scheduler=ppdiffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def weights(pipe: Any) -> dict[str, np.ndarray]:
    """Every weight by `component.path.weight` in torch layout: linear ones transposed."""
    found = {}
    for component in ("unet", "text_encoder"):
        model = getattr(pipe, component)
        layers = model.named_sublayers()
        linear = {f"{name}.weight" for name, layer in layers if isinstance(layer, paddle.nn.Linear)}
        for name, value in model.state_dict().items():
            array = value.numpy().copy()
            plain = name.replace(".lora_linear_layer", "").replace(".regular_linear_layer", "")
            found[f"{component}.{plain}"] = array.T if name in linear else array
    return found


@pytest.mark.parametrize("ending", [".pdparams", ".safetensors"])
@pytest.mark.parametrize("source", [ATTENTION, LINEAR, CONVOLUTIONS, LOCON, LOHA, LOKR, PADDLE])
def test_ppdiffusers_changes_its_weights_as_the_first_program_did(source: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"paddle_lora_weights{ending}"
    persona.convert(FIXTURES / source, file, to="ppdiffusers")
    pipe = pipeline()
    before = weights(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipe.fuse_lora()
    compare(before, weights(pipe), expected(source), set(persona.load(FIXTURES / source).deltas()))


def test_paddle_reads_the_values_of_every_dtype(tmp_path: Path) -> None:
    """bfloat16 has no mark of its own in the file: Paddle takes uint16 for it."""
    source = FIXTURES / ATTENTION
    for name in ("float32", "float16", "bfloat16"):
        file = tmp_path / f"{name}.pdparams"
        persona.convert(source, file, to="ppdiffusers", dtype=name)
        loaded, written = paddle.load(str(file)), persona.read_state(file)
        assert loaded.keys() == written.keys()
        for key, value in loaded.items():
            assert value.dtype.name == name.upper()
            wanted = np.asarray(written[key]).astype(np.float32)
            np.testing.assert_array_equal(value.astype("float32").numpy(), wanted)


@pytest.mark.parametrize("ending", [".pdparams", ".safetensors"])
def test_ppdiffusers_loads_a_word_that_came_from_torch(ending: str, tmp_path: Path) -> None:
    from ppdiffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    file = tmp_path / f"learned_embeds{ending}"
    persona.convert(FIXTURES / "torch/ti_sd15/learned_embeds_multi.bin", file)
    (loaded,) = load_textual_inversion_state_dicts([str(tmp_path)], weight_name=file.name, from_diffusers=False)
    with np.load(FIXTURES / "torch/ti_sd15/expected.npz") as archive:
        wanted = archive["learned_embeds_multi.bin:text_encoder:<sks>"]
    np.testing.assert_array_equal(loaded["<sks>"].numpy(), wanted)


def test_ppdiffusers_opens_a_whole_model_of_torchs(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = FIXTURES / "torch/dreambooth_full_sd15"
    persona.convert(folder / "diffusers", tmp_path / "model", to="ppdiffusers")
    unet = ppdiffusers.UNet2DConditionModel.from_pretrained(str(tmp_path / "model" / "unet"))
    linear = {f"{name}.weight" for name, layer in unet.named_sublayers() if isinstance(layer, paddle.nn.Linear)}
    wanted = load_file(folder / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    got = {name: value.numpy() for name, value in unet.state_dict().items()}
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name].T if name in linear else got[name], value, err_msg=name)
