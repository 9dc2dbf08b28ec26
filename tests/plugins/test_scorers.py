"""The scorer `clip`: the embedded judge on pictures whose answer is known, any other CLIP, and what is none."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

import persona.api
from persona.core.host.contracts import Scorer
from persona.core.host.errors import BaseModelError, UsageError
from persona.plugins.scorers.clip import EMBEDDED, Clip
from tools.mini import pictures

ROOT = Path(__file__).parents[2]
JUDGE = ROOT / "persona" / EMBEDDED
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
needs_font = pytest.mark.skipif(
    not pictures.FONT_PATH.exists(), reason="needs the font of Debian's fonts-noto-color-emoji"
)


@pytest.fixture(scope="module")
def judge() -> Clip:
    return Clip(device="cpu")


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, str], np.ndarray]:
    """Some pictograms on some colours, at a size and place of their own."""
    glyphs = {glyph.name: glyph for glyph in pictures.load_glyphs()}
    random = np.random.default_rng(99)
    return {
        (name, colour): pictures.draw(glyphs[name], pictures.compose(glyphs[name], colour, random, pictures.WIDE))
        for name in ("red apple", "robot face", "octopus", "rocket", "cactus", "guitar")
        for colour in ("white", "blue", "yellow", "black")
    }


def caption(name: str, colour: str) -> str:
    return f"{pictures.with_article(name)} on {pictures.with_article(colour)} background"


def test_the_host_gives_it_and_it_fits_its_contract() -> None:
    given = persona.api.host().load("scorer", "clip")
    assert given is Clip
    asked = {word for word in (*vars(Scorer), *Scorer.__annotations__) if not word.startswith("_")}
    assert [word for word in asked if not hasattr(given, word)] == []


def test_the_embedded_judge_is_small_and_has_a_card_and_a_licence() -> None:
    assert sum(path.stat().st_size for path in JUDGE.rglob("*") if path.is_file()) <= 6_000_000
    card = (JUDGE / "README.md").read_text(encoding="utf-8")
    for words in ("Noto Color Emoji", "SIL", "fonts-noto-color-emoji", "tools.judge.make"):
        assert words in card
    assert "Apache License" in (JUDGE / "LICENSE").read_text(encoding="utf-8")


def test_the_embedded_judge_is_a_clip_in_half_precision_with_the_classic_names() -> None:
    with (JUDGE / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in header.values()} == {"F16"}
    model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(JUDGE, local_files_only=True))
    assert {name for name, _ in model.named_parameters()} == set(header)
    assert {name.partition(".")[0] for name in header} == {
        "logit_scale", "text_model", "text_projection", "vision_model", "visual_projection",
    }  # fmt: skip


@needs_font
def test_a_picture_is_liker_to_another_of_the_same_thing_than_to_one_of_another(judge, drawn) -> None:
    names = sorted({name for name, _ in drawn})
    for here, there in (("white", "blue"), ("black", "yellow")):
        rows = judge.picture_vectors([drawn[name, here] for name in names])
        columns = judge.picture_vectors([drawn[name, there] for name in names])
        assert (rows @ columns.T).argmax(1).tolist() == list(range(len(names)))


@needs_font
def test_a_picture_fits_its_own_caption_best(judge, drawn) -> None:
    asked = list(drawn)
    cosines = (
        judge.picture_vectors([drawn[one] for one in asked]) @ judge.text_vectors([caption(*one) for one in asked]).T
    )
    right = cosines.argmax(1) == np.arange(len(asked))
    assert right.mean() >= 0.9, [asked[place] for place in np.flatnonzero(~right)]


@needs_font
def test_figures_are_the_cosines_they_are_called(judge, drawn) -> None:
    asked = [("rocket", "blue"), ("cactus", "blue")]
    shown = [drawn[one] for one in asked]
    references = [drawn["rocket", "white"], drawn["rocket", "yellow"]]
    figures = judge.score(shown, references=references, prompts=["a rocket on a blue background", ""])
    seen, known = judge.picture_vectors(shown), judge.picture_vectors(references)
    assert np.allclose(np.linalg.norm(seen, axis=1), 1, atol=1e-5)
    assert figures["subject_similarity"] == pytest.approx([np.mean([row @ one for one in known]) for row in seen])
    assert figures["subject_similarity"][0] > figures["subject_similarity"][1]
    right, wrong = judge.text_vectors(["a rocket on a blue background", "a rocket on a red background"])
    assert figures["prompt_fidelity"][0] == pytest.approx(seen[0] @ right)
    assert seen[0] @ right > seen[0] @ wrong
    assert np.isnan(figures["prompt_fidelity"][1])
    assert set(judge.score(shown, references=references)) == {"subject_similarity"}
    assert judge.score(shown) == {}
    with pytest.raises(UsageError, match="1 prompts for 2 pictures"):
        judge.score(shown, prompts=["a rocket"])


def test_vectors_are_those_of_transformers_own_clip(tmp_path: Path) -> None:
    folder = narrow_clip(tmp_path / "clip")
    random = np.random.default_rng(3)
    shown = [random.integers(0, 256, size, np.uint8) for size in ((48, 64, 3), (32, 32, 3), (100, 40, 3))]
    texts = ["a red apple", "an octopus on a blue background"]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        answer = model(
            pixel_values=processor(
                images=[np.ascontiguousarray(one) for one in shown], return_tensors="pt"
            ).pixel_values,
            input_ids=tokenizer(texts, padding=True, return_tensors="pt").input_ids,
        )
    judge = Clip(str(folder), device="cpu")
    assert judge.picture_vectors(shown) == pytest.approx(answer.image_embeds.numpy(), abs=2e-3)
    assert judge.text_vectors(texts) == pytest.approx(answer.text_embeds.numpy(), abs=1e-5)


def narrow_clip(folder: Path) -> Path:
    """A CLIP with random weights that looks at 32x32 pixels, as transformers writes it, with mini's tokenizer."""
    parts = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = json.loads((JUDGE / "vocab.json").read_text(encoding="utf-8"))
    ends = {
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "pad_token_id": len(vocabulary) - 1,
    }
    text = {**parts, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": 24}
    vision = {**parts, "image_size": 32, "patch_size": 8}
    torch.manual_seed(1)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(JUDGE / name, folder / name)
    return folder


def test_a_text_that_is_too_long_is_cut_and_noted_once() -> None:
    judge = Clip(device="cpu")
    long = "an apple and " * 20
    assert judge.text_vectors([long, long]).shape[0] == 2
    assert len(judge.notes) == 1 and "24 tokens" in judge.notes[0]


def test_a_folder_that_is_no_clip_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"has no config\.json"):
        Clip(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BaseModelError, match="says bert, not clip") as refused:
        Clip(str(tmp_path))
    assert "\n" not in str(refused.value) and "--model" in refused.value.hint
    (tmp_path / "config.json").write_text((JUDGE / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BaseModelError, match="no pickle is opened"):
        Clip(str(tmp_path))
    with pytest.raises(BaseModelError, match="no such folder"):
        Clip(str(tmp_path / "nowhere"))


def test_missing_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "judge"
    shutil.copytree(JUDGE, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"1 weights are missing, the first is visual_projection\.weight"):
        Clip(str(folder), device="cpu").text_vectors(["a robot"])
    (folder / "model.safetensors").write_bytes((JUDGE / "model.safetensors").read_bytes()[:100_000])
    with pytest.raises(BaseModelError) as refused:
        Clip(str(folder), device="cpu").text_vectors(["a robot"])
    assert "\n" not in refused.value.message
