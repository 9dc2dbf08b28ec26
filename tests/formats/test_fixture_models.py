"""Whole models that other programs wrote: the same tensors under every naming (tests/fixtures/index.json)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from persona.core.adapters.entry import Checkpoint
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import State
from persona.core.host.errors import UnreadableFile
from persona.formats.checkpoint_outputs import outputs
from persona.formats.checkpoints import checkpoint_of, is_whole_model, read_checkpoint
from persona.formats.containers.open import read_state
from persona.formats.models.sd2 import FAMILY as SD2

FIXTURES = Path(__file__).parent.parent / "fixtures"
ROWS = [row for row in json.loads((FIXTURES / "index.json").read_text()) if row["kind"] == "model"]
FOLDER = FIXTURES / "torch/dreambooth_full_sd15/diffusers"


def same(first: Any, second: Any) -> None:
    """Same names, dtypes, shapes and bits."""
    assert set(first) == set(second)
    for name in first:
        one, two = first[name].read(), second[name].read()
        assert (one.dtype, one.shape) == (two.dtype, two.shape), name
        assert one.tobytes() == two.tobytes(), name


def reopened(model: Checkpoint, form: str) -> Checkpoint:
    (output,) = outputs(model, form, [])  # type: ignore[arg-type]
    return checkpoint_of(State(output.tensors, output.metadata, (), "safetensors"), "memory")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_a_model_is_recognised_with_its_family(row: dict[str, Any]) -> None:
    model = read_checkpoint(FIXTURES / row["file"])
    assert model.family == row["family"]
    assert is_whole_model(State(read_state(FIXTURES / row["file"]).tensors))
    if "equals" in row:
        folder = read_checkpoint(FIXTURES / row["equals"])
        assert set(model.components) == set(folder.components) == {"unet", "vae", "text_encoder"}
        for component in folder.components:
            same(model.components[component], folder.components[component])


def test_a_diffusers_folder_becomes_the_very_file_that_diffusers_own_script_makes() -> None:
    (output,) = outputs(read_checkpoint(FOLDER), "ldm", [])
    same(output.tensors, read_state(FIXTURES / "torch/dreambooth_full_sd15/model.safetensors").tensors)


def test_a_single_file_becomes_a_folder_with_the_configs_that_shapes_can_tell() -> None:
    model = read_checkpoint(FIXTURES / "torch/dreambooth_full_sd15/model.safetensors")
    notes: list[str] = []
    made = {output.name: output for output in outputs(model, "diffusers", notes)}
    assert any("config.json" in note for note in notes)
    for component, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        same(made[f"{component}/{file}.safetensors"].tensors, read_checkpoint(FOLDER / component).components[component])
        ours, theirs = (
            made[f"{component}/config.json"].document,
            json.loads((FOLDER / component / "config.json").read_text()),
        )
        unknowable = {"attention_head_dim", "norm_num_groups", "num_attention_heads", "sample_size"}
        assert ours is not None
        assert {k: v for k, v in ours.items() if k not in unknowable} == {
            k: theirs[k] for k in ours if k not in unknowable
        }


def test_a_paddle_component_is_read_in_torchs_layout_and_written_back_bit_for_bit() -> None:
    file = FIXTURES / "paddle/unet-full-pd33/model_state.pdparams"
    model = read_checkpoint(file)
    with np.load(FIXTURES / "paddle/unet-full-pd33/expected.npz") as expected:
        assert set(expected.files) == set(model.components["unet"])
        for name in expected.files:
            np.testing.assert_array_equal(model.components["unet"][name].read(), expected[name])
    made = {output.name: output for output in outputs(model, "ppdiffusers", [])}
    same(made["unet/model_state.pdparams"].tensors, read_state(file).tensors)
    assert made["unet/config.json"].document == json.loads((file.parent / "config.json").read_text())


def test_wukongs_own_spelling_comes_back_bit_for_bit() -> None:
    file = FIXTURES / "mindspore/wukong_full_narrow/wukong_narrow_fp16.ckpt"
    model = read_checkpoint(file)
    assert set(model.components) == {"unet", "text_encoder"}
    (output,) = outputs(model, "wukong", [])
    same(output.tensors, read_state(file).tensors)


def test_ldm_and_mindspore_and_back_change_no_bit() -> None:
    model = read_checkpoint(FOLDER)
    for form in ("ldm", "mindspore", "wukong"):
        again = reopened(model, form)
        for component in model.components:
            same(again.components[component], model.components[component])


def test_mindspores_names_are_gamma_beta_and_embedding_table() -> None:
    (output,) = outputs(read_checkpoint(FOLDER), "mindspore", [])
    assert "model.diffusion_model.input_blocks.1.0.in_layers.0.gamma" in output.tensors
    assert "cond_stage_model.transformer.text_model.embeddings.token_embedding.embedding_table" in output.tensors
    assert not any(name.endswith("norm1.weight") for name in output.tensors)


def openclip(layers: int, width: int = 8) -> dict[str, TensorRef]:
    rng = np.random.default_rng(5)
    made: dict[str, TensorRef] = {}

    def put(name: str, *shape: int) -> None:
        made[f"cond_stage_model.model.{name}"] = in_memory(rng.standard_normal(shape).astype(np.float32))

    put("token_embedding.weight", 30, width)
    put("positional_embedding", 7, width)
    for n in range(layers):
        head = f"transformer.resblocks.{n}"
        put(f"{head}.attn.in_proj_weight", 3 * width, width)
        put(f"{head}.attn.in_proj_bias", 3 * width)
        for module, out, into in (("attn.out_proj", width, width), ("mlp.c_fc", 16, width), ("mlp.c_proj", width, 16)):
            put(f"{head}.{module}.weight", out, into)
            put(f"{head}.{module}.bias", out)
        for norm in ("ln_1", "ln_2"):
            put(f"{head}.{norm}.weight", width)
            put(f"{head}.{norm}.bias", width)
    put("ln_final.weight", width)
    put("ln_final.bias", width)
    put("text_projection", width, 12)
    put("logit_scale")
    return made


def test_sd2s_last_layer_is_no_information_but_travels_along() -> None:
    """dialects.md §2.3: diffusers keeps 23 of OpenCLIP's 24 layers."""
    tensors = openclip(24)
    model = checkpoint_of(State(tensors), "memory", family="sd2")
    names = model.components["text_encoder"]
    assert sum(name.endswith("self_attn.q_proj.weight") for name in names) == SD2.components["text_encoder"][0].layers  # type: ignore[attr-defined]
    np.testing.assert_array_equal(
        names["text_model.encoder.layers.3.self_attn.k_proj.weight"].read(),
        tensors["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"].read()[8:16],
    )
    (output,) = outputs(model, "ldm", [])
    same(output.tensors, tensors)


def test_sd2s_last_layer_is_made_up_and_told_when_the_source_has_none() -> None:
    model = checkpoint_of(State(openclip(24)), "memory", family="sd2")
    model.extras = {}
    notes: list[str] = []
    (output,) = outputs(model, "ldm", notes)
    copied = output.tensors["cond_stage_model.model.transformer.resblocks.23.mlp.c_fc.weight"].read()
    before = output.tensors["cond_stage_model.model.transformer.resblocks.22.mlp.c_fc.weight"].read()
    np.testing.assert_array_equal(copied, before)
    assert any("24th layer" in note for note in notes)


def test_t44_openclips_text_projection_is_transposed() -> None:
    """sd-scripts does not, and its square matrix hides it."""
    tensors = {
        name.replace("cond_stage_model.model.", "conditioner.embedders.1.model."): ref
        for name, ref in openclip(2).items()
    }
    model = checkpoint_of(State(tensors), "memory", family="sdxl")
    stored = tensors["conditioner.embedders.1.model.text_projection"].read()
    np.testing.assert_array_equal(model.components["text_encoder_2"]["text_projection.weight"].read(), stored.T)
    (output,) = outputs(model, "ldm", [])
    same(output.tensors, tensors)


def test_t37_a_parameter_without_a_home_is_named_and_refused() -> None:
    tensors = dict(read_state(FIXTURES / "torch/dreambooth_full_sd15/model.safetensors").tensors)
    tensors["first_stage_model.encoder.strange.weight"] = in_memory(np.zeros(3))
    with pytest.raises(UnreadableFile, match="strange"):
        checkpoint_of(State(tensors), "memory")


def test_t37_averages_and_schedules_are_left_behind_and_told() -> None:
    tensors = dict(read_state(FIXTURES / "torch/dreambooth_full_sd15/model.safetensors").tensors)
    tensors["model_ema.decay"] = in_memory(np.zeros(()))
    tensors["alphas_cumprod"] = in_memory(np.zeros(1000))
    model = checkpoint_of(State(tensors), "memory")
    assert any("model_ema.decay" in note and "alphas_cumprod" in note for note in model.notes)


def test_t37_the_older_attention_names_of_the_autoencoder_are_read() -> None:
    """sd-scripts PR#618."""
    renamed = {}
    for name, ref in read_checkpoint(FOLDER).components["vae"].items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        renamed[name] = ref
    (output,) = outputs(Checkpoint("sd1", {"vae": renamed}), "ldm", [])
    theirs = read_state(FIXTURES / "torch/dreambooth_full_sd15/model.safetensors").tensors
    prefix = "first_stage_model."  # which a file with the autoencoder alone does not have
    same(output.tensors, {name.removeprefix(prefix): ref for name, ref in theirs.items() if name.startswith(prefix)})


def test_components_that_have_no_other_form_are_told(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "model")
    for name in ("safety_checker", "image_encoder"):
        (tmp_path / "model" / name).mkdir()
        save_file({"a.weight": np.ones((2, 2), np.float32)}, tmp_path / "model" / name / "model.safetensors")
    assert any(note.endswith("image_encoder, safety_checker") for note in read_checkpoint(tmp_path / "model").notes)
    assert not any("not read" in note for note in read_checkpoint(FOLDER).notes)
