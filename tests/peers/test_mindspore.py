"""What persona writes, loaded by MindSpore and by mindone's own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore
import numpy as np
import pytest
from mindone import diffusers
from mindone.transformers import CLIPTextModel
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
from transformers import CLIPTextConfig

import persona

mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
mindspore.set_device("CPU")
mindspore.runtime.launch_blocking()


def pipeline() -> Any:
    """A Stable Diffusion pipeline of the narrow UNet and text encoder, random weights."""
    mindspore.set_seed(0)
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


NAMES = {"gamma": "weight", "beta": "bias", "embedding_table": "weight"}


def weights(pipe: Any) -> dict[str, np.ndarray]:
    """Every weight by `component.path.weight`, in torch's names."""
    found = {}
    for component in ("unet", "text_encoder"):
        for name, value in getattr(pipe, component).parameters_and_names():
            path, _, last = name.rpartition(".")
            path = path.replace(".base_layer", "")
            found[f"{component}.{path}.{NAMES.get(last, last)}"] = value.asnumpy().copy()
    return {name: value for name, value in found.items() if ".lora_" not in name}


PLAIN = (ATTENTION, LINEAR, CONVOLUTIONS, PADDLE)


@pytest.mark.parametrize(
    "source, dialect",
    [
        *[(source, "mindone") for source in (*PLAIN, LOCON, LOHA, LOKR)],
        *[(source, "kohya") for source in PLAIN],  # as diffusers, mindone knows no LyCORIS; 0.3 no alpha in a header
    ],
)
def test_mindone_changes_its_weights_as_the_first_program_did(source: str, dialect: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    persona.convert(FIXTURES / source, file, to=dialect)
    pipe = pipeline()
    before = weights(pipe)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name)
    pipe.fuse_lora()
    compare(before, weights(pipe), expected(source), set(persona.load(FIXTURES / source).deltas()))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mindspore_reads_the_values_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "lora.ckpt"
    persona.convert(FIXTURES / ATTENTION, file, to="mindone", dtype=dtype)
    loaded, written = mindspore.load_checkpoint(str(file)), persona.read_state(file)
    assert loaded.keys() == written.keys()
    for key, value in loaded.items():
        assert value.dtype == getattr(mindspore, dtype)
        wanted = np.asarray(written[key]).astype(np.float32)
        np.testing.assert_array_equal(value.astype(mindspore.float32).asnumpy(), wanted)


def test_mindspore_loads_a_word_that_came_from_torch(tmp_path: Path) -> None:
    file = tmp_path / "learned_embeds.ckpt"
    persona.convert(FIXTURES / "torch/ti_sd15/learned_embeds_multi.bin", file)
    loaded = mindspore.load_checkpoint(str(file))
    with np.load(FIXTURES / "torch/ti_sd15/expected.npz") as archive:
        wanted = archive["learned_embeds_multi.bin:text_encoder:<sks>"]
    np.testing.assert_array_equal(loaded["<sks>"].asnumpy(), wanted)


def test_mindone_opens_a_whole_model_of_torchs(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = FIXTURES / "torch/dreambooth_full_sd15"
    persona.convert(folder / "diffusers", tmp_path / "model", to="diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(str(tmp_path / "model" / "unet"))
    wanted = load_file(folder / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    got = {}
    for name, value in unet.parameters_and_names():
        path, _, last = name.rpartition(".")
        got[f"{path}.{NAMES.get(last, last)}"] = value.asnumpy()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name].reshape(value.shape), value, err_msg=name)
