"""A base is opened completely or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from persona.core.host.errors import BaseModelError
from persona.core.training.base import Base
from persona.plugins.backends.torch.loading import load_component
from tests.narrow_models import narrow_base

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(narrow: Any, tmp_path: Path) -> Base:
    """A narrow SD1.5 that a test may spoil."""
    return narrow_base("sd1", Path(shutil.copytree(narrow("sd1").path, tmp_path / "base")))


def rewrite(path: Path, change: Any) -> None:
    """Pass the tensors of a file through `change`, which edits the dict."""
    state = load_file(path)
    change(state)
    save_file(state, path)


def same_weights(one: Any, other: Any) -> bool:
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


def test_missing_weights_are_named_and_the_rest_counted(copied: Base) -> None:
    gone = [f"down_blocks.0.resnets.0.{name}" for name in ("conv1.bias", "conv1.weight", "conv2.bias", "conv2.weight")]
    gone += [f"down_blocks.0.resnets.0.norm{n}.{kind}" for n in (1, 2) for kind in ("bias", "weight")]
    rewrite(copied.path / UNET, lambda state: [state.pop(name) for name in gone])
    with pytest.raises(BaseModelError) as refused:
        load_component(copied, "unet", torch.float32, CPU)
    assert refused.value.message == f"narrow-sd1: unet has no {', '.join(sorted(gone)[:5])} and 3 more."


def test_unknown_weights_are_named(copied: Base) -> None:
    rewrite(copied.path / VAE, lambda state: state.update({"decoder.extra.weight": torch.zeros(1)}))
    with pytest.raises(BaseModelError, match=r"vae has weights nobody knows: decoder\.extra\.weight"):
        load_component(copied, "vae", torch.float32, CPU)


def test_a_text_encoder_never_falls_back_on_random_weights(copied: Base) -> None:
    def misspell(state: dict[str, Any]) -> None:
        for name in list(state):
            state[name.replace("text_model.", "model.")] = state.pop(name)

    rewrite(copied.path / TEXT, misspell)
    with pytest.raises(BaseModelError, match=r"text_encoder has no text_model\.embeddings.* and \d+ more"):
        load_component(copied, "text_encoder", torch.float32, CPU)


def test_a_shape_that_is_not_the_configs_is_named(copied: Base) -> None:
    rewrite(copied.path / UNET, lambda state: state.update({"conv_in.bias": torch.zeros(7)}))
    with pytest.raises(BaseModelError, match=r"conv_in\.bias is \[7\], and its config makes it \[32\]"):
        load_component(copied, "unet", torch.float32, CPU)


@pytest.mark.parametrize("flattened", [False, True])
def test_both_spellings_of_a_text_encoder_are_the_same_encoder(flattened: bool, copied: Base) -> None:
    ids = torch.tensor([[5, 9, 11, 2]])
    expected = CLIPTextModel.from_pretrained(copied.path / "text_encoder").eval()(ids)[0]

    def respell(state: dict[str, Any]) -> None:
        if flattened:  # as transformers >= 5.6 saves what it built from a config
            for name in list(state):
                state[name.removeprefix("text_model.")] = state.pop(name)
        else:  # as transformers < 4.31 saved it
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    rewrite(copied.path / TEXT, respell)
    loaded = load_component(copied, "text_encoder", torch.float32, CPU)
    torch.testing.assert_close(loaded(ids)[0], expected)


def test_old_names_of_the_vaes_attention_are_read(copied: Base) -> None:
    expected = load_component(copied, "vae", torch.float32, CPU)

    def age(state: dict[str, Any]) -> None:
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            for name in [name for name in state if f".{new}." in name]:
                tensor = state.pop(name)
                tensor = tensor[:, :, None, None] if old == "key" and tensor.dim() == 2 else tensor
                state[name.replace(f".{new}.", f".{old}.")] = tensor.contiguous()

    rewrite(copied.path / VAE, age)
    assert any("query" in name for name in load_file(copied.path / VAE))
    assert same_weights(load_component(copied, "vae", torch.float32, CPU), expected)


def test_an_fp16_variant_and_shards_are_found(copied: Base) -> None:
    expected = load_component(copied, "unet", torch.float16, CPU)
    state = {name: tensor.half() for name, tensor in load_file(copied.path / UNET).items()}
    (copied.path / UNET).unlink()
    save_file(state, copied.path / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert same_weights(load_component(copied, "unet", torch.float16, CPU), expected)
    (copied.path / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    names = sorted(state)
    table = {}
    for number, part in enumerate((names[:300], names[300:])):
        shard = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, copied.path / "unet" / shard)
        table |= dict.fromkeys(part, shard)
    index = copied.path / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert same_weights(load_component(copied, "unet", torch.float16, CPU), expected)


def test_a_pickle_is_not_opened(copied: Base) -> None:
    (copied.path / TEXT).rename(copied.path / "text_encoder/pytorch_model.bin")
    with pytest.raises(BaseModelError, match="only as a pickle") as refused:
        load_component(copied, "text_encoder", torch.float32, CPU)
    assert "persona convert" in refused.value.hint


def test_truncated_and_absent_weights_are_refused(copied: Base) -> None:
    weights = (copied.path / VAE).read_bytes()
    (copied.path / VAE).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BaseModelError, match="cannot be read"):
        load_component(copied, "vae", torch.float32, CPU)
    (copied.path / UNET).unlink()
    with pytest.raises(BaseModelError, match="has no weights"):
        load_component(copied, "unet", torch.float32, CPU)


def test_a_component_of_a_class_nobody_knows_is_refused(copied: Base) -> None:
    components = dict(copied.components) | {"unet": {**copied.components["unet"], "_class_name": "UNet9D"}}
    with pytest.raises(BaseModelError, match="its unet is a UNet9D"):
        load_component(dataclasses.replace(copied, components=components), "unet", torch.float32, CPU)


def test_a_loaded_component_owns_its_memory(copied: Base) -> None:
    unet = load_component(copied, "unet", torch.float32, CPU)
    before = unet.conv_in.weight.clone()
    with (copied.path / UNET).open("r+b") as file:
        file.truncate(1000)  # a mapped file would now end the process
    assert torch.equal(unet.conv_in.weight, before)
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_the_whole_base_is_checked_when_a_session_opens(copied: Base, opened: Any) -> None:
    rewrite(copied.path / VAE, lambda state: state.pop("encoder.conv_in.bias"))
    with pytest.raises(BaseModelError, match=r"vae has no encoder\.conv_in\.bias"):
        opened(copied)


def test_pictures_become_the_moments_of_the_autoencoder(narrow: Any, opened: Any) -> None:
    from diffusers import AutoencoderKL

    base = narrow("sd1")
    pictures = np.random.default_rng(0).uniform(-1, 1, (3, 3, 64, 72)).astype(np.float32)
    mean, logvar = opened(base).encode_pictures(pictures)
    with torch.no_grad():
        theirs = AutoencoderKL.from_pretrained(base.path / "vae").encode(torch.from_numpy(pictures)).latent_dist
    assert mean.shape == (3, 4, 8, 9) and mean.dtype == np.float32
    np.testing.assert_allclose(mean, theirs.mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(logvar, theirs.logvar.numpy(), atol=1e-5)
