"""`persona diff`, `merge`, `resize` and `extract` as they are typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import persona
from persona.cli import run

FIXTURES = Path(__file__).parents[1] / "fixtures"
LINEAR = FIXTURES / "torch/kohya_sd15_linear/kohya_sd15_linear.safetensors"
CONV = FIXTURES / "torch/kohya_sd15_conv/kohya_sd15_conv.safetensors"
LOHA = FIXTURES / "torch/lycoris_loha/lycoris_loha.safetensors"
DORA = FIXTURES / "torch/peft_dora"
BASE = FIXTURES / "torch/dreambooth_full_sd15/diffusers"
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


MODEL = FIXTURES / "torch/dreambooth_full_sd15/model.safetensors"


@pytest.mark.parametrize(("name", "to"), [("m.ckpt", "mindspore"), ("w.ckpt", "wukong"), ("paddle", "ppdiffusers")])
def test_a_whole_model_is_the_same_in_every_spelling(name, to, tmp_path, capsys):
    """The folder and the single file beside it are what diffusers' own scripts wrote."""
    assert run(["diff", str(BASE), str(MODEL)]) == 0
    out = capsys.readouterr().out
    assert "bit for bit" in out
    assert [f"{part}: " in out for part in ("unet", "vae", "text_encoder")] == [True] * 3
    assert run(["convert", str(MODEL), str(tmp_path / name), "--to", to]) == 0
    capsys.readouterr()
    assert run(["diff", str(BASE), str(tmp_path / name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    unet = load_file(BASE / "unet/diffusion_pytorch_model.safetensors")
    assert found["components"]["unet"] == {"parameters": len(unet), "different": 0, "worst_relative_error": 0.0}


def test_one_changed_parameter_of_a_whole_model_is_found_with_its_error(tmp_path, capsys):
    tensors = load_file(MODEL)
    tensors["model.diffusion_model.out.2.weight"] = tensors["model.diffusion_model.out.2.weight"] * 1.25
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, tmp_path / "changed.safetensors")
    assert run(["diff", str(BASE), str(tmp_path / "changed.safetensors"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["modules"]["unet.conv_out.weight"] == pytest.approx(0.25, rel=1e-3)
    assert found["components"]["unet"]["different"] == 1
    assert found["components"]["vae"]["different"] == 0
    assert found["only_in_first"] == ["unet.conv_out.bias"]


def test_a_whole_model_beside_an_adapter_is_refused_in_a_line(capsys):
    assert run(["diff", str(MODEL), str(LINEAR)]) != 0
    assert "is a whole model and" in capsys.readouterr().err


def test_an_adapter_and_its_conversion_are_the_same(tmp_path, capsys):
    assert run(["convert", str(LINEAR), str(tmp_path / "a.pdparams")]) == 0
    capsys.readouterr()
    assert run(["diff", str(LINEAR), str(tmp_path / "a.pdparams")]) == 0
    assert "the same: 204 modules" in capsys.readouterr().out


def test_a_lost_alpha_is_found(tmp_path, capsys):
    """What official converters do: the factors travel, alpha does not (peers.md §6.4)."""
    without = {key: ref for key, ref in load_file(LINEAR).items() if not key.endswith(".alpha")}
    save_file(without, tmp_path / "lost.safetensors")
    assert run(["diff", str(LINEAR), str(tmp_path / "lost.safetensors"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"]
    assert found["worst_relative_error"] == pytest.approx(1.0)  # alpha 1, rank 2: twice the strength


def test_missing_modules_are_a_difference(tmp_path, capsys):
    some = {key: ref for key, ref in load_file(LINEAR).items() if "lora_te" not in key}
    save_file(some, tmp_path / "some.safetensors")
    assert run(["diff", str(LINEAR), str(tmp_path / "some.safetensors")]) == 1
    assert "only in A: text_encoder." in capsys.readouterr().out


def test_dora_is_compared_bit_for_bit_or_with_the_base(tmp_path, capsys):
    assert run(["diff", str(DORA), str(DORA)]) == 0
    other = tmp_path / "dora"
    shutil.copytree(DORA, other)
    tensors = load_file(other / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("lora_B.weight"))
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, other / "adapter_model.safetensors")
    assert run(["diff", str(DORA), str(other)]) == 1
    assert "not decided: 1 modules depend on the base model" in capsys.readouterr().out
    assert run(["diff", str(DORA), str(other), "--base", str(DORA / "base.npz")]) == 1
    assert "different: 1 of 64" in capsys.readouterr().out


def test_words_are_compared_whatever_the_files_call_them(capsys):
    folder = FIXTURES / "torch/ti_sd15"
    assert run(["diff", str(folder / "kohya_sks.pt"), str(folder / "kohya_sks.safetensors")]) == 0
    assert run(["diff", str(folder / "learned_embeds.bin"), str(folder / "learned_embeds_multi.bin")]) == 1


def test_a_merged_file_is_the_sum(tmp_path, capsys):
    out = tmp_path / "sum.safetensors"
    assert run(["merge", f"{LINEAR}:0.5", f"{CONV}:-2", str(out), "--to", "kohya", "--dtype", "float32"]) == 0
    merged, linear, conv = (persona.load(path).deltas() for path in (out, LINEAR, CONV))
    assert set(merged) == set(linear) | set(conv)
    for name in list(merged)[::15]:
        wanted = (0.5 * linear[name] if name in linear else 0) - (2 * conv[name] if name in conv else 0)
        np.testing.assert_allclose(merged[name].reshape(wanted.shape), wanted, atol=1e-5)
    assert "0.5·kohya_sd15_linear.safetensors + -2·kohya_sd15_conv.safetensors" in capsys.readouterr().out


def test_resize_gives_the_best_approximation_and_says_what_it_keeps(tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert run(["resize", str(LINEAR), str(out), "--rank", "1", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    before, after = persona.load(LINEAR).deltas(), persona.load(out).deltas()
    for name in list(before)[::20]:
        singular = np.linalg.svd(before[name].astype(np.float64).reshape(before[name].shape[0], -1), compute_uv=False)
        error = np.linalg.norm(after[name].reshape(before[name].shape) - before[name])
        assert error == pytest.approx(np.sqrt((singular[1:] ** 2).sum()), rel=1e-3, abs=1e-6)  # Eckart-Young
        assert kept[name] == pytest.approx(singular[0] / np.linalg.norm(singular), rel=1e-4)
    assert {entry.scale.value for entry in persona.load(out).entries.values()} == {1.0}


def test_resize_by_energy_keeps_that_much(tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert run(["resize", str(LOHA), str(out), "--energy", "0.9", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert min(kept.values()) ** 2 >= 0.9
    assert run(["diff", str(LOHA), str(out), "--tolerance", "0.33"]) == 0  # sqrt(1 - 0.9)


@pytest.fixture
def tuned(tmp_path):
    """A base, and a copy of it whose UNet has a change of rank 2 in one matrix and one changed norm."""
    folder = tmp_path / "tuned"
    shutil.copytree(BASE, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: ref.astype(np.float32) for key, ref in load_file(file).items()}
    random = np.random.default_rng(3)
    weight = tensors[f"{TO_Q}.weight"]
    change = random.standard_normal((weight.shape[0], 2)) @ random.standard_normal((2, weight.shape[1]))
    tensors[f"{TO_Q}.weight"] = (weight + change).astype(np.float32)
    tensors["conv_norm_out.weight"] = tensors["conv_norm_out.weight"] + 1
    save_file(tensors, file)
    return folder, change


def test_extract_finds_the_change_and_merge_puts_it_back(tuned, tmp_path, capsys):
    folder, change = tuned
    out, again = tmp_path / "found.safetensors", tmp_path / "again"
    arguments = ["--base", str(BASE), "--rank", "2", "--dtype", "float32"]
    assert run(["extract", str(folder), str(out), *arguments]) == 0
    assert "conv_norm_out.weight" in capsys.readouterr().err
    deltas = persona.load(out).deltas()
    assert list(deltas) == [f"unet.{TO_Q}"]
    np.testing.assert_allclose(deltas[f"unet.{TO_Q}"], change, atol=1e-5)
    assert run(["merge", str(out), str(again), "--into", str(BASE)]) == 0
    before = load_file(BASE / "unet/diffusion_pytorch_model.safetensors")
    after = load_file(again / "unet/diffusion_pytorch_model.safetensors")
    wanted = before[f"{TO_Q}.weight"].astype(np.float64) + change
    np.testing.assert_allclose(after[f"{TO_Q}.weight"].astype(np.float64), wanted, rtol=2**-10, atol=2e-3)
    assert {key for key in before if not np.array_equal(before[key], after[key])} == {f"{TO_Q}.weight"}
    for file in BASE.rglob("*"):
        if file.is_file() and "unet/diff" not in str(file):
            assert (again / file.relative_to(BASE)).read_bytes() == file.read_bytes()


def test_an_adapter_of_another_model_is_not_merged_into_a_base(tmp_path, capsys):
    assert run(["merge", str(LINEAR), str(tmp_path / "new"), "--into", str(BASE)]) == 1
    assert "belongs to another base model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["merge", "LINEAR"], 2, "Say where the sum goes"),
        (["merge", "LINEAR:much", "out.safetensors"], 2, "'much' is not a strength"),
        (["merge", "LINEAR:nan", "out.safetensors"], 2, "not possible"),
        (["merge", "DORA", "LINEAR", "out.safetensors"], 1, "DoRA"),
        (["resize", "LINEAR", "out.safetensors"], 2, "Say how small"),
        (["resize", "LINEAR", "out.safetensors", "--energy", "95"], 2, "a share of 1"),
        (["resize", "LINEAR", "out.safetensors", "--rank", "0"], 2, "rank"),
        (["resize", "WORD", "out.safetensors", "--rank", "2"], 2, "no rank"),
        (["resize", "DORA", "out.safetensors", "--rank", "2"], 1, "DoRA"),
        (["extract", "BASE", "out.safetensors", "--base", "BASE"], 1, "nothing to extract"),
        (["extract", "BASE", "out.safetensors", "--base", "mini"], 1, "the same"),
        (["diff", "LINEAR", "nonesuch"], 1, "There is no file nonesuch"),
    ],
)
def test_a_mistake_gets_a_clear_line_and_leaves_nothing(arguments, code, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"LINEAR": LINEAR, "DORA": DORA, "BASE": BASE, "WORD": FIXTURES / "torch/ti_sd15/kohya_sks.safetensors"}
    typed = [word.replace(word.split(":")[0], str(places[word.split(":")[0]])) if word.split(":")[0] in places else word
             for word in arguments]  # fmt: skip
    assert run(typed) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error and "unexpected" not in error
    assert list(tmp_path.iterdir()) == []
