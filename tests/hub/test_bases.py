"""What `--base` may be, and how a base is described from configs and headers alone."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from persona.core.host.errors import BaseModelError
from persona.hub.bases import digest, family_of, open_base, safetensors_header
from persona.hub.registry import registry


def test_the_registry_names_a_base_for_every_example_and_mini_lies_in_the_package():
    assert {"mini", "sd15", "sd21", "sdxl"} <= set(registry()["bases"])
    base = open_base("mini")
    assert (base.family, base.native_size, base.latent_channels) == ("sd1", 64, 16)
    assert set(base.components) == {"unet", "vae", "text_encoder"}


def test_a_folder_is_described_from_its_headers(tiny_sd1):
    base = open_base(str(tiny_sd1))
    stored = load_file(tiny_sd1 / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: (found.shape, found.dtype) for name, found in base.parameters["unet"].items()} == {
        name: (array.shape, "F32") for name, array in stored.items()
    }
    assert base.latent_factor == 8
    assert base.prediction_type == "epsilon"
    assert base.text_encoders == ("text_encoder",)
    assert base.denoiser == "unet"


def test_the_digest_is_of_names_and_bytes_and_not_of_places_or_times(tiny_sd1, tmp_path):
    copy = shutil.copytree(tiny_sd1, tmp_path / "copy")
    assert digest(copy) == digest(tiny_sd1)
    total = hashlib.sha256()
    for file in sorted(path for path in copy.rglob("*") if path.suffix in (".json", ".txt", ".safetensors")):
        total.update(str(file.relative_to(copy)).encode() + b"\0" + file.read_bytes())
    assert digest(copy) == total.hexdigest()
    (copy / "README.md").write_text("not the model")
    assert digest(copy) == digest(tiny_sd1)
    config = copy / "unet" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 8', '"sample_size": 9'))
    assert digest(copy) != digest(tiny_sd1)


@pytest.mark.parametrize(
    ("components", "family"),
    [
        ({"unet": {}, "text_encoder": {}}, "sd1"),
        ({"unet": {"use_linear_projection": True}}, "sd2"),
        ({"unet": {"use_linear_projection": True}, "text_encoder_2": {}}, "sdxl"),
        ({"unet": {"addition_embed_type": "text_time"}}, "sdxl"),
        ({"transformer": {"guidance_embeds": True}}, "flux1"),
        ({"transformer": {}}, "sd3"),
    ],
)
def test_the_family_is_what_the_configs_say(components, family):
    assert family_of(components) == family


def broken(tiny_sd1, folder, change):
    copy = shutil.copytree(tiny_sd1, folder)
    change(copy)
    return str(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda base: (base / "model_index.json").unlink(), "it is not a diffusers folder"),
        (lambda base: (base / "model_index.json").write_text("{"), "is not valid JSON"),
        (lambda base: (base / "model_index.json").write_text("[]"), "is not a JSON object"),
        (lambda base: shutil.rmtree(base / "tokenizer"), "lacks its tokenizer folder"),
        (lambda base: (base / "vae" / "config.json").unlink(), "has no config.json"),
        (
            lambda base: (base / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
            "no .safetensors weights in",
        ),
        (
            lambda base: (base / "unet" / "diffusion_pytorch_model.safetensors").rename(base / "unet" / "x.bin"),
            "is no diffusers folder of .safetensors files",
        ),
        (
            lambda base: (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 100),
            "is not a whole safetensors file",
        ),
        (
            lambda base: (base / "text_encoder" / "model.safetensors").write_bytes(b"\5" + b"\0" * 7 + b"{{{{{"),
            "has a broken safetensors header",
        ),
        (
            lambda base: (base / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "X"]})),
            "lacks vae, text_encoder, tokenizer, scheduler",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_base_is_refused_with_what_is_wrong(tiny_sd1, tmp_path, change, said):
    with pytest.raises(BaseModelError) as caught:
        open_base(broken(tiny_sd1, tmp_path / "base", change))
    assert said in caught.value.message


def test_an_empty_file_is_no_header(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(BaseModelError, match="is not a whole safetensors file"):
        safetensors_header(tmp_path / "empty.safetensors")


def test_trained_weights_lie_in_front_of_the_base_they_were_trained_on(tiny_sd1, tmp_path):
    base = open_base(str(tiny_sd1))
    part = tmp_path / "run" / "model" / "unet"
    part.mkdir(parents=True)
    shutil.copy(tiny_sd1 / "unet" / "config.json", part)
    stored = load_file(tiny_sd1 / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: array + np.float32(1) for name, array in stored.items()}, part / "diffusion_pytorch_model.safetensors"
    )
    about = {"base": str(tiny_sd1), "base_hash": base.hash}
    (part.parent / "persona.json").write_text(json.dumps(about))
    trained = open_base(str(tmp_path / "run"))
    assert trained.folder("unet") == part
    assert trained.folder("vae") == tiny_sd1 / "vae"
    assert trained.hash not in (base.hash, "")
    assert open_base(str(tmp_path / "run" / "model")).hash == trained.hash
    (part.parent / "persona.json").write_text(json.dumps(about | {"base_hash": "0" * 64}))
    with pytest.raises(BaseModelError, match="was trained on another"):
        open_base(str(tmp_path / "run"))
