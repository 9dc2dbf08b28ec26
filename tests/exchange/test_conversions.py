"""Conversions through the API: what is kept, what is told, what is refused; certificates; many at once."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import persona
from persona.api import host
from persona.exchange import workers
from persona.exchange.batch import Job, convert_all, jobs_into_folder
from persona.exchange.convert import Wish

FIXTURES = Path(__file__).parents[1] / "fixtures"
KOHYA = FIXTURES / "torch/kohya_sd15_linear/kohya_sd15_linear.safetensors"
PEFT = FIXTURES / "torch/peft_lora"
RSLORA = FIXTURES / "torch/peft_rslora"
NO_ALPHA = FIXTURES / "torch/diffusers_sd15_unet/script_keys_no_metadata.safetensors"
SDXL = FIXTURES / "torch/diffusers_sdxl_unet_te1_te2/peft_keys_with_metadata.safetensors"
WUKONG = FIXTURES / "mindspore/wukong_lora_mindpet/wkhh_txt2img_lora.ckpt"
WORD = FIXTURES / "paddle/ti-single/learned_embeds.pdparams"
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def header(path: Path) -> dict:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def test_alpha_survives_the_trip_through_diffusers_header(tmp_path):
    out = tmp_path / "d.safetensors"
    persona.convert(KOHYA, out, to="diffusers")
    fields = json.loads(header(out)["__metadata__"]["lora_adapter_metadata"])
    assert (fields["unet.lora_alpha"], fields["unet.r"]) == (1.0, 2)
    with np.load(KOHYA.parent / "expected.npz") as expected:
        np.testing.assert_allclose(persona.load(out).deltas()[TO_Q], expected[TO_Q], atol=1e-6)


def test_sdxl_for_a1111_is_spelt_in_the_originals_names(tmp_path):
    """diffusers#6894: a file with diffusers' names has no effect in A1111."""
    out = tmp_path / "k.safetensors"
    persona.convert(SDXL, out, to="kohya")
    keys = list(load_file(out))
    assert any(key.startswith("lora_unet_input_blocks_") for key in keys)
    assert not any("down_blocks" in key for key in keys)
    assert {key.split("_")[1] for key in keys} == {"unet", "te1", "te2"}


def test_tensor_bytes_are_those_of_the_source(tmp_path):
    out = tmp_path / "d.safetensors"
    persona.convert(KOHYA, out, to="diffusers")
    before, after = load_file(KOHYA), load_file(out)
    flat = "lora_unet_" + TO_Q.removeprefix("unet.").replace(".", "_")
    assert np.array_equal(before[f"{flat}.lora_down.weight"], after[f"{TO_Q}.lora_A.weight"])
    assert before[f"{flat}.lora_up.weight"].dtype == after[f"{TO_Q}.lora_B.weight"].dtype


def test_a_peft_folder_goes_out_and_a_new_one_comes_in(tmp_path):
    persona.convert(PEFT, tmp_path / "k.safetensors", to="kohya")
    persona.convert(tmp_path / "k.safetensors", tmp_path / "peft", to="peft")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    before, after = persona.load(PEFT).deltas(), persona.load(tmp_path / "peft").deltas()
    assert set(before) == set(after)
    for name in list(before)[::12]:
        np.testing.assert_array_equal(before[name], after[name].reshape(before[name].shape))


def test_a_rank_stabilised_alpha_becomes_a_plain_one(tmp_path):
    """LyCORIS and kohya files hold alpha·√rank (dialects.md §4.1)."""
    persona.convert(RSLORA, tmp_path / "k.safetensors", to="kohya")
    config = json.loads((RSLORA / "adapter_config.json").read_text())
    assert config["use_rslora"]
    alphas = {float(value) for key, value in load_file(tmp_path / "k.safetensors").items() if key.endswith(".alpha")}
    plain = config["lora_alpha"] * config["r"] ** 0.5
    assert any(value == pytest.approx(plain) for value in alphas)


def test_the_assumed_alpha_is_told_and_a_told_one_is_used(tmp_path):
    assumed = persona.convert(NO_ALPHA, tmp_path / "a.safetensors", to="kohya")
    assert any("alpha = rank was assumed" in note for note in assumed.notes)
    told = persona.convert(NO_ALPHA, tmp_path / "b.safetensors", to="kohya", alpha=4)
    assert any("alpha 4 of 128 modules: told by --alpha" in note for note in told.notes)
    values = {float(value) for key, value in load_file(tmp_path / "b.safetensors").items() if key.endswith(".alpha")}
    assert values == {4.0}


def test_wukong_leaves_mindspore_with_the_strength_it_was_trained_with(tmp_path):
    persona.convert(WUKONG, tmp_path / "w.safetensors", to="kohya", alpha=4)
    assert persona.load(tmp_path / "w.safetensors").deltas().keys() == persona.load(WUKONG, alpha=4).deltas().keys()


def test_leftover_keys_are_an_error_that_names_them_until_allowed(tmp_path):
    tensors = {**load_file(KOHYA), "lora_unet_nowhere_at_all.lora_down.weight": np.ones((2, 3), np.float32),
               "lora_unet_nowhere_at_all.lora_up.weight": np.ones((3, 2), np.float32)}  # fmt: skip
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(persona.PersonaError, match="lora_unet_nowhere_at_all") as caught:
        persona.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert "--allow-leftovers" in caught.value.hint
    report = persona.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", allow_leftovers=True)
    assert sum("dropped, as allowed" in note for note in report.notes) == 2


def test_a_scale_without_a_place_is_folded_and_told(tmp_path):
    report = persona.convert(KOHYA, tmp_path / "p.pdparams")
    folds = [step for step in report.steps if step.action == "fold"]
    assert len(folds) == 204
    assert {step.cost for step in folds} == {"exact"}  # alpha / rank is 1/2


def test_a_certificate_measures_what_was_written(tmp_path):
    report = persona.convert(
        KOHYA, tmp_path / "out.pdparams", alpha=1.7, override_alpha=True, certificate=tmp_path / "c.json"
    )
    document = json.loads((tmp_path / "c.json").read_text())
    assert document["worst_relative_error"] == report.certificate["worst_relative_error"] < 2**-22
    assert set(document["alpha"].values()) == {"told"}
    assert len(document["modules"]) == 204 and not document["missing"]
    import hashlib

    assert document["outputs"][0]["sha256"] == hashlib.sha256((tmp_path / "out.pdparams").read_bytes()).hexdigest()
    assert document["inputs"][0]["sha256"] == hashlib.sha256(KOHYA.read_bytes()).hexdigest()


def test_another_dtype_is_one_rounding_and_never_infinity(tmp_path):
    values = np.array([[1e30, 1.0]], np.float32)
    save_file({"<cat>": values}, tmp_path / "in.safetensors")
    with pytest.raises(persona.PersonaError, match="1e\\+30, more than float16"):
        persona.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype="float16")
    assert not (tmp_path / "out.safetensors").exists()
    persona.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", dtype="bfloat16")
    assert header(tmp_path / "out.safetensors")["<cat>"]["dtype"] == "BF16"


def test_an_adapter_and_its_word_travel_together_to_kohya_and_apart_to_diffusers(tmp_path):
    both = tmp_path / "both.safetensors"
    persona.convert([KOHYA, WORD], both, to="kohya")
    assert "bundle_emb.<cat-toy>.emb_params" in load_file(both)
    persona.convert(both, tmp_path / "d.safetensors", to="diffusers")
    assert not any("bundle" in key for key in load_file(tmp_path / "d.safetensors"))
    assert list(load_file(tmp_path / "d_emb.safetensors")) == ["<cat-toy>"]


def test_sources_of_different_base_models_are_not_joined(tmp_path):
    with pytest.raises(persona.PersonaError, match=r"different base models|which another source changes too"):
        persona.convert([KOHYA, SDXL], tmp_path / "out.safetensors", to="diffusers")


def test_private_metadata_stays_behind_and_is_named(tmp_path):
    metadata = {"ss_dataset_dirs": '{"/home/me": 1}', "ss_output_name": "cat", "note": "ein Kätzchen"}
    save_file(load_file(KOHYA), tmp_path / "in.safetensors", metadata=metadata)
    report = persona.convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to="diffusers")
    with safe_open(str(tmp_path / "out.safetensors"), "np") as file:
        kept = file.metadata()
    assert kept["ss_output_name"] == "cat" and kept["note"] == "ein Kätzchen"
    assert "/home/me" not in json.dumps(kept)
    assert any("ss_dataset_dirs" in note for note in report.notes)


def test_split_qkv_is_told_and_mended_when_asked(tmp_path):
    """T2, sd-scripts#2204: rank 3r was saved with the alpha of rank r."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{name}.lora_down.weight": np.ones((12, 3072), np.float16),
        f"{name}.lora_up.weight": np.ones((9216, 12), np.float16),
        f"{name}.alpha": np.array(4, np.float16),
    }
    metadata = {"ss_network_args": '{"split_qkv": "True"}', "ss_network_dim": "4", "ss_network_alpha": "4"}
    save_file(tensors, tmp_path / "in.safetensors", metadata=metadata)
    told = persona.convert(tmp_path / "in.safetensors", tmp_path / "a.safetensors", to="kohya")
    assert any("sd-scripts#2204" in note and "--fix split-qkv-alpha" in note for note in told.notes)
    assert float(load_file(tmp_path / "a.safetensors")[f"{name}.alpha"]) == 4
    persona.convert(tmp_path / "in.safetensors", tmp_path / "b.safetensors", to="kohya", fixes=("split-qkv-alpha",))
    assert float(load_file(tmp_path / "b.safetensors")[f"{name}.alpha"]) == 12
    with pytest.raises(persona.PersonaError, match="nothing to mend"):
        persona.convert(KOHYA, tmp_path / "c.safetensors", fixes=("split-qkv-alpha",))


@pytest.mark.parametrize("forks", [True, False])
def test_many_at_once_give_what_one_by_one_gives(tmp_path, monkeypatch, forks):
    """Processes or threads read sixteen files of four dialects: no reading may see another's keys."""
    monkeypatch.setattr(workers, "can_fork", lambda: forks and sys.platform == "linux")
    sources = [KOHYA, NO_ALPHA, SDXL, WORD] * 4
    inside = tmp_path / "in"
    inside.mkdir()
    copies = [Path(shutil.copy(source, inside / f"{n}{source.suffix}")) for n, source in enumerate(sources)]
    jobs = [Job((path,), tmp_path / f"{path.stem}.safetensors") for path in copies]
    outcomes = convert_all(jobs, Wish(to="kohya"), host(), lambda outcome: None)
    assert [outcome.error for outcome in outcomes] == [None] * 16
    for number in range(4, 16):
        first = (tmp_path / f"{number % 4}.safetensors").read_bytes()
        other = (tmp_path / f"{number}.safetensors").read_bytes()
        if sources[number] != WORD:  # a word keeps its token, so only the names differ there
            assert first == other
    assert not list(tmp_path.glob(".persona*"))


def test_files_of_one_name_from_two_folders_get_two_names(tmp_path):
    jobs = jobs_into_folder(
        [FIXTURES / "paddle/ti-single/learned_embeds.pdparams", FIXTURES / "paddle/ti-multi3/learned_embeds.pdparams"],
        tmp_path,
        ".safetensors",
    )
    assert [job.destination.name for job in jobs] == [
        "ti-single_learned_embeds.safetensors",
        "ti-multi3_learned_embeds.safetensors",
    ]


def test_a_folder_of_files_is_every_file_in_it(tmp_path):
    jobs = jobs_into_folder([FIXTURES / "torch/ti_sd15"], tmp_path, ".safetensors")
    assert len(jobs) == 9
    assert [job.sources for job in jobs_into_folder([PEFT], tmp_path, "")] == [(PEFT,)]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import errno

    from persona.formats.containers.safetensors import Safetensors

    def full(self, path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Safetensors, "write", full)
    with pytest.raises(persona.PersonaError, match="the disk is full"):
        persona.convert(KOHYA, tmp_path / "out.safetensors", to="diffusers")
    with pytest.raises(persona.PersonaError, match="the disk is full"):
        persona.convert(KOHYA, tmp_path / "folder", to="peft")
    assert list(tmp_path.iterdir()) == []


def test_saving_an_adapter_plans_it_too(tmp_path):
    """A dialect without a place for alpha gets it folded in by persona.save as by persona.convert."""
    adapter = persona.load(KOHYA, family="sd1")
    persona.save(adapter, tmp_path / "p.pdparams")
    before, after = adapter.deltas(), persona.load(tmp_path / "p.pdparams").deltas()
    for name in list(before)[::20]:
        np.testing.assert_allclose(after[name].reshape(before[name].shape), before[name], atol=1e-7)


def test_a_folder_dialect_fills_an_empty_folder(tmp_path):
    persona.convert(KOHYA, tmp_path, to="peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text_encoder", "unet"]
    assert set(persona.load(tmp_path).deltas()) == set(persona.load(KOHYA).deltas())


@pytest.mark.parametrize("forks", [True, False])
def test_an_interruption_leaves_nothing_half_written(tmp_path, monkeypatch, forks):
    monkeypatch.setattr(workers, "can_fork", lambda: forks and sys.platform == "linux")
    copies = [Path(shutil.copy(KOHYA, tmp_path / f"{n}.safetensors")) for n in range(8)]
    out = tmp_path / "out"
    out.mkdir()

    def interrupt(outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_all([Job((path,), out / path.name) for path in copies], Wish(to="kohya"), host(), interrupt)
    assert not list(out.glob(".persona*"))
    for path in out.iterdir():
        assert len(load_file(path)) == len(load_file(KOHYA))
