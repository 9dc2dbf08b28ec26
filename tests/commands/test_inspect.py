"""`persona inspect` as it is typed."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from persona.cli import run

FIXTURES = Path(__file__).parents[1] / "fixtures"
WORD = FIXTURES / "paddle/ti-multi3/learned_embeds.pdparams"
LORA = FIXTURES / "torch/diffusers_sd15_unet/peft_keys_with_metadata.safetensors"


def told(capsys, *arguments: str) -> dict:
    assert run(["inspect", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_embedding_is_described(capsys):
    found = told(capsys, str(WORD))
    assert (found["kind"], found["container"]) == ("embedding", "paddle")
    assert found["embeddings"] == [
        {"token": "<multi>", "vectors": {"text_encoder": {"shape": [3, 12], "dtype": "float32"}}}
    ]
    by_tool = {tool["tool"]: tool["loads"] for tool in found["tools"]}
    assert by_tool["ppdiffusers"] == "all"
    assert by_tool["diffusers"] == "nothing"


def test_a_lora_is_described(capsys):
    found = told(capsys, str(LORA))
    assert (found["kind"], found["dialect"]) == ("adapter", "diffusers")
    assert found["modules"] == {"unet": 128}
    assert found["ranks"] == {"2": 128}
    assert found["alphas"] == {"4": 128}
    assert found["alpha_from"] == {"header": 128}
    assert found["tensors"] == 256
    comfy = next(tool for tool in found["tools"] if tool["tool"] == "ComfyUI")
    assert comfy["loads"] == "part" and "Comfy#12191" in comfy["ignores"][0]


def test_the_norms_are_those_of_the_deltas_the_makers_computed(capsys):
    found = told(capsys, str(LORA))
    with np.load(LORA.parent / "expected.npz") as expected:
        norms = sorted(float(np.linalg.norm(expected[name])) for name in expected.files)
    assert found["delta_norms"]["unet"]["largest"] == pytest.approx(norms[-1], rel=1e-5)
    assert found["delta_norms"]["unet"]["smallest"] == pytest.approx(norms[0], rel=1e-5)


def test_the_hashes_are_those_people_search_by(tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    module = "unet.down_blocks.0.attentions.0.proj_in"
    factors = {"lora_A.weight": np.ones((2, 320000), np.float32), "lora_B.weight": np.ones((320, 2), np.float32)}
    save_file({f"{module}.{name}": values for name, values in factors.items()}, path)
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    hashes = told(capsys, str(path))["hashes"]
    assert hashes["sha256"] == hashlib.sha256(data).hexdigest()
    assert hashes["autov2"] == hashlib.sha256(data).hexdigest()[:10]
    assert hashes["autov3"] == hashlib.sha256(data[8 + header :]).hexdigest()[:12]
    assert hashes["legacy"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_values_that_are_not_finite_are_counted(tmp_path, capsys):
    path = tmp_path / "word.safetensors"
    values = np.zeros((2, 8), np.float16)
    values[0, :3], values[1, 0] = np.nan, np.inf
    save_file({"<cat>": values}, path)
    assert told(capsys, str(path))["not_finite"] == {"nan": 3, "infinite": 1, "tensors": ["<cat>"]}
    assert run(["inspect", str(path)]) == 0
    assert "3 NaN and 1 infinite values, in <cat>" in capsys.readouterr().out


def test_trainer_base_and_trigger_words_come_from_the_metadata(tmp_path, capsys):
    path = tmp_path / "word.safetensors"
    tags = json.dumps({"10_sks": {"sks dog": 20, "grass": 4, "\x1b[31mred": 19}})
    metadata = {"ss_network_module": "networks.lora", "ss_sd_model_name": "base.ckpt", "ss_tag_frequency": tags}
    save_file({"<cat>": np.zeros((1, 8), np.float32)}, path, metadata=metadata)
    found = told(capsys, str(path))
    assert found["trainer"] == "kohya sd-scripts"
    assert found["base_named"] == "base.ckpt"
    assert found["trigger_words"] == ["sks dog", "[31mred"]
    assert run(["inspect", str(path), "--metadata"]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("torch/dreambooth_full_sd15/model.safetensors", "checkpoint"),
        ("torch/dreambooth_full_sd15/diffusers/unet/diffusion_pytorch_model.safetensors", "unet"),
        ("torch/dreambooth_full_sd15/diffusers/vae/diffusion_pytorch_model.safetensors", "vae"),
        ("torch/dreambooth_full_sd15/diffusers/text_encoder/model.safetensors", "text-encoder"),
        ("paddle/formats-pd33/state.pdparams", "state"),
    ],
)
def test_what_is_no_adapter_is_still_described(file, kind, capsys):
    found = told(capsys, str(FIXTURES / file))
    assert found["kind"] == kind
    assert found["tensors"] > 0 and found["hashes"]["sha256"]


@pytest.mark.parametrize(
    "file",
    [
        "paddle/formats-pd33/dense_uses_eval_global.pdparams",
        "mindspore/encrypted/enc_aes_gcm.ckpt",
        "index.json",
        "no-such-file",
    ],
)
def test_hostile_and_unknown_files_get_one_line(file, capsys):
    assert run(["inspect", str(FIXTURES / file)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("error: ") and Path(file).name in lines[0]
    assert len(lines) <= 2


def test_a_folder_is_looked_through_and_one_bad_file_does_not_stop_the_rest(tmp_path, capsys):
    save_file({"<cat>": np.zeros((1, 8), np.float32)}, tmp_path / "cat.safetensors")
    (tmp_path / "b.bin").write_bytes(b"garbage!")
    assert run(["inspect", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert ["error" in one for one in found] == [True, False]


def test_quick_reads_no_values(capsys):
    assert run(["inspect", str(LORA), "--json", "--quick"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "hashes" not in found and found["modules"] == {"unet": 128}
