"""Textual inversion in every spelling, both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import persona
from persona.core.adapters.entry import Embedding
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import State
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.flatten import python_scalar
from persona.formats.containers.mindspore import MindSpore
from persona.formats.containers.open import read_state
from persona.formats.containers.paddle import Paddle
from persona.formats.containers.safetensors import Safetensors
from persona.formats.containers.torch_pickle import TorchPickle
from persona.formats.dialects.embeddings import (
    FORMS,
    by_encoder,
    join_bundle,
    read_embeddings,
    recognise,
    split_bundle,
    write_embeddings,
)
from persona.formats.dialects.embeddings.forms import is_encoders_width

FIXTURES = Path(__file__).parent.parent / "fixtures"
ASSETS = Path(persona.__file__).parent / "assets"
RNG = np.random.default_rng(0)
CONTAINERS = {
    ".safetensors": Safetensors(),
    ".bin": TorchPickle(),
    ".pt": TorchPickle(),
    ".pdparams": Paddle(),
    ".ckpt": MindSpore(),
}


def numbers(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return RNG.normal(size=shape).astype(dtype)


def embedding(token: str, **vectors: np.ndarray[Any, Any]) -> Embedding:
    return Embedding(token, {component: in_memory(array) for component, array in vectors.items()})


def state(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> State:
    refs = {k: v if isinstance(v, TensorRef) else in_memory(v) for k, v in tensors.items()}
    return State(refs, metadata or {})


def the_one(found: list[Embedding] | None) -> Embedding:
    assert found is not None
    (one,) = found
    return one


SD1 = embedding("<cat-toy>", text_encoder=numbers(3, 768, dtype=np.float16))
SDXL = embedding("<cat-toy>", text_encoder=numbers(2, 768), text_encoder_2=numbers(2, 1280))
SD3 = embedding("s", text_encoder=numbers(1, 768), text_encoder_2=numbers(1, 1280), text_encoder_3=numbers(1, 4096))
FLUX = embedding("s", text_encoder=numbers(1, 768), text_encoder_2=numbers(1, 4096))
BF16 = embedding("<b>", text_encoder=numbers(2, 1024, dtype=ml_dtypes.bfloat16))
SEVERAL = [embedding("<a>", text_encoder=numbers(1, 768)), embedding("<b>", text_encoder=numbers(4, 768))]

XTI_LAYERS = {"IN": [1, 2, 4, 5, 7, 8], "OUT": [3, 4, 5, 6, 7, 8, 9, 10, 11]}

ROUND_TRIPS = [
    *(("diffusers", suffix, [SD1]) for suffix in (".safetensors", ".bin", ".pt", ".ckpt")),
    *(("diffusers", suffix, SEVERAL) for suffix in (".safetensors", ".bin", ".ckpt")),
    ("diffusers", ".safetensors", [BF16]),
    ("ppdiffusers", ".pdparams", [SD1]),
    ("ppdiffusers", ".pdparams", SEVERAL),
    ("ppdiffusers", ".pdparams", [BF16]),
    *(("kohya", suffix, [one]) for suffix in (".safetensors", ".pt") for one in (SD1, SDXL, SD3, BF16)),
    *(("clip-pair", ".safetensors", [one]) for one in (SDXL, SD3, FLUX)),
    ("a1111", ".pt", [SD1]),
    ("mindone-ti", ".ckpt", [SD1]),
    ("mindone-ti", ".ckpt", [BF16]),
    ("bundle", ".safetensors", [SDXL, embedding("b", text_encoder=numbers(1, 768))]),
]


@pytest.mark.parametrize(("form", "suffix", "embeddings"), ROUND_TRIPS)
def test_every_form_goes_and_comes_back_bit_for_bit(
    tmp_path: Path, form: str, suffix: str, embeddings: list[Embedding]
) -> None:
    path = tmp_path / f"{embeddings[0].token}{suffix}"
    tensors, metadata = write_embeddings(embeddings, form)
    CONTAINERS[suffix].write(path, tensors, metadata)
    found = read_embeddings(read_state(path), file_stem=path.stem)
    assert found is not None
    assert [one.token for one in found] == [one.token for one in embeddings]
    for one, other in zip(found, embeddings, strict=True):
        assert one.vectors.keys() == other.vectors.keys()
        for component, ref in other.vectors.items():
            assert one.vectors[component].dtype == ref.dtype
            assert np.asarray(one.vectors[component]).tobytes() == np.asarray(ref).tobytes()
            assert one.vectors[component].shape == ref.shape


def test_every_writable_form_is_in_a_round_trip() -> None:
    assert {form.name for form in FORMS if form.writable} == {name for name, _, _ in ROUND_TRIPS}
    for form in FORMS:
        if not form.writable:
            with pytest.raises(ConversionError):
                write_embeddings([SD1], form.name)


def test_paddle_to_diffusers_and_back_is_the_same_bytes(tmp_path: Path) -> None:
    """`persona convert learned_embeds.pdparams cat.safetensors` and back, without Paddle."""
    source = FIXTURES / "paddle" / "ti-multi3" / "learned_embeds.pdparams"
    found = read_embeddings(read_state(source), file_stem=source.stem)
    assert found is not None
    Safetensors().write(tmp_path / "cat.safetensors", *write_embeddings(found, "diffusers"))
    back = read_embeddings(read_state(tmp_path / "cat.safetensors"), file_stem="cat")
    assert back is not None
    Paddle().write(tmp_path / "back.pdparams", *write_embeddings(back, "ppdiffusers"))
    expected = np.load(FIXTURES / "paddle" / "ti-multi3" / "expected.npz")["<multi>"]
    assert np.array_equal(np.asarray(read_state(tmp_path / "back.pdparams").tensors["<multi>"]), expected)


def test_what_is_written_for_a1111_is_the_file_a1111_reads(tmp_path: Path) -> None:
    """Compared with the fixture's own structure, opened by torch."""
    fixture = torch.load(FIXTURES / "torch" / "ti_sd15" / "a1111_sks.pt", weights_only=True)
    TorchPickle().write(tmp_path / "cat.pt", *write_embeddings([SD1], "a1111"))
    loaded = torch.load(tmp_path / "cat.pt", weights_only=True)
    assert loaded.keys() <= fixture.keys()
    assert loaded["string_to_token"].keys() == fixture["string_to_token"].keys()
    assert np.array_equal(loaded["string_to_param"]["*"].numpy(), np.asarray(SD1.vectors["text_encoder"]))
    assert loaded["name"] == "<cat-toy>"


def test_mindone_gets_the_names_its_own_manager_writes(tmp_path: Path) -> None:
    fixture = read_state(FIXTURES / "mindspore" / "mindone_sdv2_textual_inversion" / "weights_ti.ckpt")
    found = read_embeddings(fixture, file_stem="weights_ti")
    assert found is not None
    MindSpore().write(tmp_path / "f.ckpt", *write_embeddings(found, "mindone-ti"))
    original = FIXTURES / "mindspore" / "mindone_sdv2_textual_inversion" / "weights_ti.ckpt"
    assert (tmp_path / "f.ckpt").read_bytes() == original.read_bytes()


def test_the_encoder_is_told_by_the_key_or_by_the_width() -> None:
    assert the_one(read_embeddings(state({"<a>": numbers(2, 1280)}), file_stem="x")).vectors.keys() == {
        "text_encoder_2"
    }
    assert the_one(read_embeddings(state({"<a>": numbers(2, 768)}), file_stem="x")).vectors.keys() == {"text_encoder"}
    narrow = state({"<a>": numbers(2, 20)})
    assert the_one(read_embeddings(narrow, file_stem="learned_embeds_2")).vectors.keys() == {"text_encoder_2"}
    assert the_one(read_embeddings(narrow, file_stem="learned_embeds")).vectors.keys() == {"text_encoder"}
    pair = state({"clip_g": numbers(1, 1280), "clip_l": numbers(1, 768)})
    assert the_one(read_embeddings(pair, file_stem="x")).vectors.keys() == {"text_encoder", "text_encoder_2"}
    flux = the_one(read_embeddings(state({"clip_l": numbers(1, 768), "t5": numbers(1, 4096)}), file_stem="x"))
    assert flux.vectors["text_encoder_2"].shape == (1, 4096)
    sd3 = state({"clip_l": numbers(1, 768), "clip_g": numbers(1, 1280), "t5": numbers(1, 4096)})
    assert the_one(read_embeddings(sd3, file_stem="x")).vectors["text_encoder_3"].shape == (1, 4096)


def test_the_file_names_the_token_where_the_content_does_not() -> None:
    reading = recognise(state({"emb_params": numbers(2, 768)}), file_stem="my-cat")
    assert reading is not None
    assert reading.embeddings[0].token == "my-cat"
    assert "my-cat" in reading.notes[0]
    named = recognise(state({"emb_params": numbers(2, 768)}, {"name": "dog"}), file_stem="my-cat")
    assert named is not None
    assert (named.embeddings[0].token, named.notes) == ("dog", [])
    for key in ("learned_embeds", "0"):
        assert the_one(read_embeddings(state({key: numbers(2, 768)}), file_stem="cat")).token == "cat"


def test_onetrainer_misspells_and_its_output_embeddings_are_reported() -> None:
    reading = recognise(state({"emp_params": numbers(2, 768), "emp_params_out": numbers(2, 768)}), file_stem="cat")
    assert reading is not None
    assert reading.form == "onetrainer"
    assert reading.embeddings[0].vectors["text_encoder"].shape == (2, 768)
    assert [left.key for left in reading.leftovers] == ["emp_params_out"]


def test_a1111_with_a_token_of_its_own_and_unknown_keys() -> None:
    """CompVis files may name the token; what is not known is a leftover, not lost."""
    tensors = {
        "string_to_token.<cat>": python_scalar(5),
        "string_to_param.<cat>": numbers(2, 768),
        "name": python_scalar("file name"),
        "step": python_scalar(9),
        "surprise": numbers(3),
    }
    reading = recognise(state(tensors), file_stem="x")
    assert reading is not None
    assert reading.embeddings[0].token == "<cat>"
    assert [left.key for left in reading.leftovers] == ["surprise"]
    assert "step = 9" in reading.notes


def test_bundled_embeddings_are_taken_out_of_a_lora_and_put_back() -> None:
    """Names with dots break readers that split at the first one (A1111 PR#13568, T33)."""
    lora = {"lora_unet_x.lora_down.weight": numbers(2, 8), "lora_unet_x.lora_up.weight": numbers(8, 2)}
    tensors = {
        **lora,
        "bundle_emb.my.cat.v2.emb_params": numbers(2, 768),
        "bundle_emb.dog.clip_l": numbers(1, 768),
        "bundle_emb.dog.clip_g": numbers(1, 1280),
        "bundle_emb.old.string_to_param.*": numbers(1, 768),
        "bundle_emb.bird.<bird>": numbers(1, 768),
    }
    found, rest = split_bundle(state(tensors), file_stem="x")
    assert rest.tensors.keys() == lora.keys()
    by_name = {one.token: one.vectors.keys() for one in found}
    assert by_name == {
        "my.cat.v2": {"text_encoder"},
        "dog": {"text_encoder", "text_encoder_2"},
        "old": {"text_encoder"},
        "<bird>": {"text_encoder"},
    }
    joined = join_bundle(rest.tensors, found)
    assert "bundle_emb.my_cat_v2.emb_params" in joined
    again, _ = split_bundle(State(joined), file_stem="x")
    assert {one.token for one in again} == {"my_cat_v2", "dog", "old", "<bird>"}
    assert split_bundle(state(lora), file_stem="x")[0] == []
    assert recognise(state(tensors), file_stem="x") is None  # an adapter that carries embeddings is an adapter
    with pytest.raises(ConversionError):
        join_bundle(joined, found)


def test_cloneofsimo_marks_tokens_in_the_header() -> None:
    tensors = {"<s1>": numbers(768), "<s2>": numbers(768), "unet:0:up": numbers(4, 2)}
    found, rest = split_bundle(state(tensors, {"<s1>": "<embed>", "<s2>": "<embed>", "unet": "[]"}), file_stem="x")
    assert [(one.token, one.vectors["text_encoder"].shape) for one in found] == [("<s1>", (1, 768)), ("<s2>", (1, 768))]
    assert list(rest.tensors) == ["unet:0:up"]
    assert rest.metadata == {"unet": "[]"}


def test_vectors_in_one_piece_stay_in_the_file(tmp_path: Path) -> None:
    """[dim] becomes [1, dim] without reading."""
    Safetensors().write(tmp_path / "f.safetensors", {"<a>": in_memory(numbers(768))}, {})
    ref = the_one(read_embeddings(read_state(tmp_path / "f.safetensors"), file_stem="x")).vectors["text_encoder"]
    assert ref.shape == (1, 768)
    assert ref.span is not None
    assert np.asarray(ref).shape == (1, 768)


@pytest.mark.parametrize(
    "tensors",
    [
        {"lin.weight": numbers(4, 4), "lin.bias": numbers(4)},
        {"weight": numbers(4, 4)},
        {"<a>": numbers(2, 3, 4)},
        {"<a>": np.arange(6).reshape(2, 3)},
        {"<a>": numbers(2, 8), "<b>": numbers(2, 9)},
        {"<a>": python_scalar("text")},
        {"lora_unet_x.alpha": numbers(1)},
        {"a.mindpet_delta_lora_a": numbers(2, 8)},
        {"placeholder_token": python_scalar("<a>")},
        {"emb_params": numbers(2, 768), "unet.w": numbers(2, 2)},
        {f"<{i}>": numbers(8) for i in range(65)},
        {"<a>": numbers(0, 768)},
        {},
    ],
)
def test_what_is_not_a_file_of_embeddings_is_left_to_others(tensors: dict[str, Any]) -> None:
    assert read_embeddings(state(tensors), file_stem="x") is None


@pytest.mark.parametrize(
    ("key", "shape", "stem", "read"),
    [
        ("<cat>", (3, 20), "any", True),
        ("<cat>", (20,), "any", True),
        ("sks", (2, 20), "learned_embeds", True),
        ("sks", (2, 20), "learned_embeds-steps-500", True),
        ("sks", (2, 20), "any", False),
        ("cat", (768, 768), "any", False),
        ("to_q.A", (4, 768), "any", False),
        ("blocks.0.mixer", (4, 768), "any", False),
        ("enc/layer", (4, 768), "any", False),
        ("unet:0:down", (4, 768), "any", False),
        *(("sks", (2, width), "any", True) for width in (192, 768, 1024, 1280, 4096)),
        ("sks", (75, 768), "any", True),
        ("sks", (76, 768), "any", False),
    ],
)
def test_a_tensor_of_an_unknown_name_is_a_word_only_where_something_says_so(key, shape, stem, read) -> None:
    reading = recognise(state({key: numbers(*shape)}), file_stem=stem)
    assert (reading is not None) is read
    if reading is not None:
        sure = key.startswith("<") or stem.startswith("learned_embeds")
        assert [note for note in reading.notes if "taken for a word" in note] == ([] if sure else reading.notes[:1])
        assert sure or reading.notes


def test_what_might_be_a_word_is_refused_in_one_line_with_what_to_type(tmp_path: Path) -> None:
    path = tmp_path / "stray.safetensors"
    for key, shape, said in (("A", (4, 40), "no encoder that persona knows is 40 wide"), ("a.b", (4, 768), "neither")):
        Safetensors().write(path, {key: in_memory(numbers(*shape))}, {})
        with pytest.raises(UnreadableFile, match=said) as problem:
            persona.load(path)
        assert problem.value.hint.endswith(f"cp {path} {tmp_path / 'learned_embeds.safetensors'}")
        path.rename(tmp_path / "learned_embeds.safetensors")
        assert the_one(persona.load(tmp_path / "learned_embeds.safetensors").embeddings).token == key


def test_the_widths_are_those_of_the_encoders_that_persona_has() -> None:
    config = json.loads((ASSETS / "mini/text_encoder/config.json").read_text())
    assert is_encoders_width(config["hidden_size"])
    assert not is_encoders_width(0) and not is_encoders_width(320)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"emb_params": numbers(2, 768), "clip_l": numbers(2, 768)}, "both"),
        ({"emb_params": numbers(2, 3, 768)}, "cannot be an embedding"),
        ({"clip_l": np.arange(768)}, "cannot be an embedding"),
        ({"string_to_param.*": numbers(2, 768), "string_to_param.<x>": numbers(2, 70)}, "wide"),
        ({"string_to_param.*": python_scalar(4)}, "cannot be an embedding"),
        (
            {f"{part}{n:02}": numbers(1, 768) for part, ns in XTI_LAYERS.items() for n in ns}
            | {"MID": numbers(1, 768)},
            "XTI",
        ),
        ({"bundle_emb.x": numbers(2, 768)}, "does not name"),
        ({"bundle_emb.a.emb_params": numbers(1, 768), "bundle_emb.a.clip_l": numbers(1, 768)}, "both"),
        ({"placeholder_token": python_scalar("  "), "e.embedding_table": numbers(1, 8)}, "no name"),
        (
            {
                "placeholder_token": python_scalar("a"),
                "x.embedding_table": numbers(1, 8),
                "y.embedding_table": numbers(1, 8),
            },
            "both",
        ),
    ],
)
def test_embeddings_that_contradict_themselves_are_refused(tensors: dict[str, Any], said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        read_embeddings(state(tensors), file_stem="x")


@pytest.mark.parametrize(
    ("embeddings", "form", "said"),
    [
        ([], "diffusers", "no embedding"),
        ([SD1], "nonsense", "Known forms"),
        (SEVERAL, "kohya", "one token a file"),
        (SEVERAL, "a1111", "one token a file"),
        ([SDXL], "diffusers", "one text encoder a file"),
        ([SDXL], "a1111", "one text encoder a file"),
        ([embedding("a", text_encoder_2=numbers(1, 1280))], "kohya", "zeros are not neutral"),
        ([embedding("a", text_encoder_2=numbers(1, 1280))], "mindone-ti", "not known"),
        ([SD1, SD1], "diffusers", "same token"),
        (
            [embedding("a.b", text_encoder=numbers(1, 8)), embedding("a_b", text_encoder=numbers(1, 8))],
            "bundle",
            "called",
        ),
        ([embedding("a", vae=numbers(1, 8))], "clip-pair", "no place"),
    ],
)
def test_what_a_form_cannot_hold_is_refused_with_what_could(embeddings: list[Embedding], form: str, said: str) -> None:
    with pytest.raises(ConversionError) as caught:
        write_embeddings(embeddings, form)
    assert said in str(caught.value)


def test_an_sdxl_pair_splits_into_two_diffusers_files() -> None:
    """What diffusers#5327, #7511 and #8854 ask for (T32)."""
    parts = by_encoder([SDXL])
    assert list(parts) == ["text_encoder", "text_encoder_2"]
    for component, embeddings in parts.items():
        tensors, _ = write_embeddings(embeddings, "diffusers")
        assert np.array_equal(np.asarray(tensors["<cat-toy>"]), np.asarray(SDXL.vectors[component]))
