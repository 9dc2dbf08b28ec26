"""A base that is no diffusers folder of .safetensors: converted once, said so, and then a base as any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import persona
from persona.api import host
from persona.core.host.errors import BaseModelError, UnwritableOutput
from persona.core.training.clip_words import ClipWords
from persona.formats.models.clip_tokenizer import clip_tokenizer
from persona.hub.bases import open_base
from persona.runs.bases import open_any_base
from tests.narrow_models import narrow_pipeline

MINI = Path(persona.__file__).parent / "assets" / "mini"
PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def with_clips_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow SD2, which predicts v, whose text encoder has a row for each of CLIP's 49,408 tokens."""
    return of_clips_words("sd2", tmp_path_factory.mktemp("bases") / "sd2")


def of_clips_words(kind: str, folder: Path) -> Path:
    narrow_pipeline(kind, folder)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    rows = np.random.default_rng(0).normal(0, 0.02, (49408, 32 if kind == "sd1" else 48)).astype(np.float32)
    save_file({**tensors, "text_model.embeddings.token_embedding.weight": rows}, file, {"format": "pt"})
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "vocab_size": 49408}))
    for name, content in clip_tokenizer("!").items():
        (folder / "tokenizer" / name).write_bytes(content)
    return folder


def test_a_single_file_of_sd1_paints(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    persona.convert(of_clips_words("sd1", tmp_path / "sd1"), file, to="ldm")
    assert drawn(file).shape == (64, 64, 3)  # other ones than the folder's: heads and groups are the real SD1's


def weights(path: Path) -> dict[str, np.ndarray]:
    return {f"{part}.{name}": array for part in PARTS for file in sorted((path / part).glob("*.safetensors"))
            for name, array in load_file(file).items()}  # fmt: skip


def opened_as(original: Path, form: Path) -> tuple[Any, list[str]]:
    """The base of another form, which has the weights of the original, bit for bit; and what was told."""
    told: list[str] = []
    base = open_any_base(str(form), host(), told.append)
    ours, theirs = weights(base.path), weights(original)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    return base, told


def drawn(base: Path) -> Any:
    (picture,) = persona.generate("a red apple", base=base, seed=4, steps=3, width=64, height=64)
    return np.asarray(picture)


def test_a_folder_of_ppdiffusers_is_the_base_that_it_was_made_of(tmp_path: Path) -> None:
    paddle = persona.convert(MINI, tmp_path / "mini-paddle", to="ppdiffusers") and tmp_path / "mini-paddle"
    assert not list(paddle.rglob("*.safetensors"))
    index = json.loads((paddle / "model_index.json").read_text())
    index["unet"][0], index["text_encoder"][0], index["_ppdiffusers_version"] = (
        "ppdiffusers",
        "paddlenlp.transformers",
        "0.29",
    )
    (paddle / "model_index.json").write_text(json.dumps(index))
    base, told = opened_as(MINI, paddle)
    assert "is converted to a diffusers folder, once" in told[0]
    assert base.id == str(paddle)
    written = json.loads((base.path / "model_index.json").read_text())
    assert written["unet"][0] == "diffusers" and written["text_encoder"][0] == "transformers"
    assert not any(key.startswith("_pp") for key in written)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (base.path / "tokenizer" / file).read_bytes() == (MINI / "tokenizer" / file).read_bytes()
    assert base.schedule == open_base("mini").schedule
    told.clear()
    assert open_any_base(str(paddle), host(), told.append).hash == base.hash
    assert told == [], "the second time nothing is done"
    assert np.array_equal(drawn(paddle), drawn(MINI))


def test_a_text_encoder_that_mindone_saved_is_read_under_its_names(tmp_path: Path) -> None:
    """mindone.transformers' save_pretrained writes MindSpore's names into model.safetensors, with format np."""
    folder = shutil.copytree(MINI, tmp_path / "mini-mindone")
    file = folder / "text_encoder" / "model.safetensors"
    norms = (("layer_norm1", "layer_norm2", "final_layer_norm"), {"weight": "gamma", "bias": "beta"})
    renamed = {}
    for name, array in load_file(file).items():
        path, _, last = name.rpartition(".")
        last = norms[1][last] if path.endswith(norms[0]) else last
        renamed[f"{path}.{'embedding_table' if path.endswith('_embedding') else last}"] = array
    save_file(renamed, file, {"format": "np"})
    assert sum(name.endswith(("gamma", "beta", "embedding_table")) for name in renamed) > 4
    _, told = opened_as(MINI, folder)
    assert "is converted" in told[0]


def test_a_single_file_gets_clips_words_and_the_schedule_it_names(with_clips_words: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.v1.safetensors"
    persona.convert(with_clips_words, file, to="ldm")
    base, told = opened_as(with_clips_words, file)
    assert (base.family, base.prediction_type, base.native_size) == ("sd2", "v_prediction", 768)
    assert any("modelspec.prediction_type" in line for line in told), told
    given = json.loads((with_clips_words / "scheduler" / "scheduler_config.json").read_text())
    for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type"):
        assert base.schedule[key] == given[key]
    assert ClipWords.read(base.tokenizers["tokenizer"]).ids("a diagram") == [320, 22697]  # openai/CLIP's README


def test_a_checkpoint_of_mindspore_too(with_clips_words: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    persona.convert(with_clips_words, file, to="mindspore")
    base, told = opened_as(with_clips_words, file)
    # It holds no word of what it predicts. The norm that ComfyUI looks at is zero in a model that was never trained.
    assert base.prediction_type == "epsilon" and any("predicts epsilon" in line for line in told)


def test_two_encoders_pad_as_sdxls_do(tmp_path: Path) -> None:
    folder = narrow_pipeline("sdxl", tmp_path / "sdxl")
    for name, width in (("text_encoder", 32), ("text_encoder_2", 48)):
        file = folder / name / "model.safetensors"
        rows = np.zeros((49408, width), np.float32)
        save_file({**load_file(file), "text_model.embeddings.token_embedding.weight": rows}, file, {"format": "pt"})
    file = tmp_path / "xl.safetensors"
    persona.convert(folder, file, to="ldm", family="sdxl")  # too narrow to be known by its widths; the file tells
    base = open_any_base(str(file), host(), lambda text: None)
    pads = [json.loads((base.tokenizers[name] / "tokenizer_config.json").read_text())["pad_token"]
            for name in ("tokenizer", "tokenizer_2")]  # fmt: skip
    assert pads == ["<|endoftext|>", "!"]
    assert (base.family, base.native_size, base.text_encoders) == ("sdxl", 1024, ("text_encoder", "text_encoder_2"))
    assert base.components["vae"]["force_upcast"] is True  # as stabilityai/stable-diffusion-xl-base-1.0 has it
    assert json.loads((base.path / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is True


def test_a_vocabulary_that_nobody_knows_is_told(tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "mini.safetensors"
    persona.convert(MINI, file, to="ldm")
    with pytest.raises(BaseModelError, match=r"lacks tokenizer \(no tokenizer came with it") as told:
        open_any_base(str(file), host(), lambda text: None)
    assert told.value.hint.endswith(f"persona convert {file} FOLDER --to diffusers")
    assert list((own_cache / "bases").iterdir()) == [], "nothing half-made stays"


def test_what_is_no_model_is_no_base(tmp_path: Path) -> None:
    save_file({"unet.x.lora_A.weight": np.zeros((2, 4), np.float32)}, tmp_path / "lora.safetensors")
    with pytest.raises(BaseModelError, match="is no whole model, and so no base") as told:
        open_any_base(str(tmp_path / "lora.safetensors"), host(), lambda text: None)
    assert told.value.hint == f"See what it is: persona inspect {tmp_path / 'lora.safetensors'}"
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(BaseModelError, match="cannot be read"):
        open_any_base(str(tmp_path / "notes.txt"), host(), lambda text: None)


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, own_cache: Path) -> None:
    paddle = tmp_path / "mini-paddle"
    persona.convert(MINI, paddle, to="ppdiffusers")
    own_cache.mkdir(exist_ok=True)
    (own_cache / "bases").write_text("in the way")
    with pytest.raises(UnwritableOutput):
        open_any_base(str(paddle), host(), lambda text: None)


def test_a_run_trains_on_it_and_its_adapter_finds_it_again(tmp_path: Path) -> None:
    paddle = tmp_path / "mini-paddle"
    persona.convert(MINI, paddle, to="ppdiffusers")
    shutil.copytree(Path(persona.__file__).parent / "assets" / "subjects" / "robot", tmp_path / "robot")
    run = persona.train("lora", tmp_path / "robot", base=str(paddle), steps=1, samples=False,
                        output=tmp_path / "run")  # fmt: skip
    (picture,) = persona.generate("a robot", base=paddle, adapters=(run.product,), steps=2)
    assert isinstance(picture, Image.Image)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["base_hash"]
