"""PEFT's folders: one component each, alpha and rank in adapter_config.json (dialects.md §5.5)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import persona
from persona.core.adapters.conversion import plan
from persona.core.adapters.delta import delta
from persona.core.adapters.entry import Adapter, Embedding, Entry, Magnitude, Scale
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import Output, Told
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.dialects.peft_folder import CONFIG, DIALECT
from tests.formats.dialects.written import adapter_of, expected_delta, lora_entry, state_of

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
RNG = np.random.default_rng(23)


def loha(path: str, shapes: dict[str, tuple[int, ...]], kernel: tuple[int, ...] = ()) -> Entry:
    factors = {name: in_memory(RNG.standard_normal(shape)) for name, shape in shapes.items()}
    return Entry("unet", path, "loha", factors, Scale(1.0, 2, "rank", "file key"), kernel=kernel)


FLAT = {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)}
CORE = {"t1": (2, 2, 3, 3), "w1_a": (2, 8), "w1_b": (2, 8), "t2": (2, 2, 3, 3), "w2_a": (2, 8), "w2_b": (2, 8)}


def folders(adapter: Adapter) -> dict[str, Output]:
    made = plan(adapter, DIALECT.slots, "peft", spell=DIALECT.speller(adapter), apart=DIALECT.apart)
    made.demand()
    return {output.name: output for output in DIALECT.write(made.adapter)}


def again(outputs: dict[str, Output], folder: str = "") -> Adapter:
    config = outputs[f"{folder}{CONFIG}"].document
    assert config is not None
    told = Told(path=f"/x/{folder}adapter_model.safetensors", configs={CONFIG: config})
    return DIALECT.read(state_of(outputs[f"{folder}adapter_model.safetensors"]), told)


def test_one_component_is_one_folder_and_several_are_several() -> None:
    unet, clip = lora_entry("unet", QUERY, 8, 8, alpha=3.0), lora_entry("text_encoder", CLIP, 12, 12, rank=4, alpha=1.0)
    assert sorted(folders(adapter_of([unet]))) == ["adapter_config.json", "adapter_model.safetensors"]
    both = folders(adapter_of([unet, clip]))
    assert sorted({name.split("/")[0] for name in both}) == ["text_encoder", "unet"]
    for folder, entry in (("unet/", unet), ("text_encoder/", clip)):
        read = again(both, folder)
        np.testing.assert_allclose(read.deltas()[entry.name], expected_delta(entry), rtol=1e-5, atol=1e-6)
        assert {e.scale.origin for e in read.entries.values()} == {"config"}


@pytest.mark.parametrize(
    ("family", "denoiser", "query", "component"),
    [
        ("sd3", "transformer", "transformer_blocks.0.attn.to_q", "text_encoder_3"),
        ("flux1", "transformer", "single_transformer_blocks.0.attn.to_q", "text_encoder_2"),
    ],
)
def test_t5_comes_back_as_the_encoder_it_was(tmp_path, family, denoiser, query, component) -> None:
    """transformers calls T5's layers `encoder.block.…`, which no other component does."""
    t5 = lora_entry(component, "encoder.block.0.layer.0.SelfAttention.q", 4096, 4096)
    width = {"sd3": 1536, "flux1": 3072}[family]
    persona.save(adapter_of([lora_entry(denoiser, query, width, width), t5], family), tmp_path / "out", to="peft")
    read = persona.load(tmp_path / "out")
    assert isinstance(read, Adapter) and read.family == family
    assert set(read.entries) == {(denoiser, query), (component, t5.path)}
    for name in ("down", "up"):
        written, found = (np.asarray(entry.factors[name]) for entry in (t5, read.entries[component, t5.path]))
        assert written.tobytes() == found.tobytes()


def test_an_encoder_whose_keys_do_not_say_which_is_told_by_the_config() -> None:
    entry = lora_entry("text_encoder_2", CLIP, 12, 12)
    read = again(folders(adapter_of([entry], "sdxl")))
    assert list(read.entries) == [("text_encoder_2", CLIP)]


def test_loha_of_one_kind_stays_loha() -> None:
    for entries in ([loha(QUERY, FLAT)], [loha(QUERY, FLAT), loha(CONV, CORE, (3, 3))]):
        made = folders(adapter_of(entries))
        config = made[CONFIG].document
        assert config is not None and config["peft_type"] == "LOHA"
        assert config["use_effective_conv2d"] is (len(entries) == 2)
        read = again(made)
        for entry in entries:
            np.testing.assert_array_equal(delta(read.entries[("unet", entry.path)]), delta(entry))


def test_dora_on_anything_but_lora_is_not_pefts() -> None:
    """LoHaConfig and LoKrConfig have no use_dora; without the base's weight the vector cannot leave."""
    entry = replace(loha(QUERY, FLAT), magnitude=Magnitude(in_memory(RNG.standard_normal(8)), "out"))
    with pytest.raises(ConversionError, match="base model's weight"):
        folders(adapter_of([entry]))


def test_loha_beside_lora_becomes_lora_because_a_folder_has_one_method() -> None:
    entries = [loha(QUERY, FLAT), lora_entry("unet", QUERY.replace("to_q", "to_k"), 8, 8, alpha=1.0)]
    made = folders(adapter_of(entries))
    config = made[CONFIG].document
    assert config is not None and config["peft_type"] == "LORA"
    read = again(made)
    for entry in entries:
        np.testing.assert_allclose(delta(read.entries[("unet", entry.path)]), delta(entry), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "class_name", "width", "component"),
    [
        ("sdxl", "CLIPTextModel", 768, "text_encoder"),
        ("sdxl", "CLIPTextModelWithProjection", 1280, "text_encoder_2"),
        ("sd3", "CLIPTextModelWithProjection", 768, "text_encoder"),
        ("sd3", "CLIPTextModelWithProjection", 1280, "text_encoder_2"),
        ("sd3", "T5EncoderModel", 4096, "text_encoder_3"),
        ("flux1", "T5EncoderModel", 4096, "text_encoder_2"),
    ],
)
def test_a_folder_of_any_name_with_its_family_told(family, class_name, width, component) -> None:
    """Every class a pipeline has, under the name diffusers' pipelines have it (their model_index.json)."""
    path = "encoder.block.0.layer.0.SelfAttention.q" if "T5" in class_name else CLIP
    entry = lora_entry(component, path, width, width)
    outputs = folders(adapter_of([entry], family))
    config = outputs[CONFIG].document
    assert config is not None and config["auto_mapping"]["base_model_class"] == class_name
    told = Told(family=family, path="/x/out/adapter_model.safetensors", configs={CONFIG: config})
    read = DIALECT.read(state_of(outputs["adapter_model.safetensors"]), told)
    assert read.family == family and list(read.entries) == [(component, path)]


@pytest.mark.parametrize("told", [None, "sdxl"])
def test_the_three_folders_of_sdxl_are_one_adapter(tmp_path, told) -> None:
    entries = [
        lora_entry("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", 640, 2048, alpha=3.0),
        lora_entry("text_encoder", CLIP, 768, 768, alpha=1.0),
        lora_entry("text_encoder_2", CLIP, 1280, 1280, rank=4, alpha=1.0),
    ]
    persona.save(adapter_of(entries, "sdxl"), tmp_path / "out", to="peft")
    read = persona.load(tmp_path / "out", family=told)
    assert isinstance(read, Adapter) and not read.leftovers
    assert read.family == "sdxl" if told else "sdxl" in read.families
    assert set(read.deltas()) == {entry.name for entry in entries}
    for entry in entries:
        np.testing.assert_allclose(read.deltas()[entry.name], expected_delta(entry), rtol=1e-5, atol=1e-5)


def test_transformers_name_their_class(tmp_path) -> None:
    for family, class_name in (("sd3", "SD3Transformer2DModel"), ("flux1", "FluxTransformer2DModel")):
        outputs = folders(adapter_of([lora_entry("transformer", "transformer_blocks.0.attn.to_q", 8, 8)], family))
        config = outputs[CONFIG].document
        assert config is not None and config["auto_mapping"]["base_model_class"] == class_name


def test_the_first_text_encoder_is_spelt_for_both_generations_of_transformers() -> None:
    """CLIPTextModel has no `text_model.` level since 5.6; PEFT would warn and change nothing."""
    outputs = folders(adapter_of([lora_entry("text_encoder", CLIP, 12, 12)], "sd1"))
    names = {key.split(".lora_")[0] for key in outputs["adapter_model.safetensors"].tensors}
    assert names == {f"base_model.model.{CLIP}", f"base_model.model.{CLIP.removeprefix('text_model.')}"}
    read = again(outputs)
    assert list(read.entries) == [("text_encoder", CLIP)] and any("twice" in note for note in read.notes)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"peft_type": "VERA"}, "VERA"),
        *(({"init_lora_weights": start}, start) for start in ("pissa_niter_4", "PiSSA", "lora_ga", "corda", "loftq")),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ],
)
def test_methods_that_mean_nothing_on_the_plain_base_are_refused(config: dict[str, Any], words: str) -> None:
    (output,) = (o for o in folders(adapter_of([lora_entry("unet", QUERY, 8, 8)])).values() if o.document is None)
    with pytest.raises(UnreadableFile, match=words):
        DIALECT.read(state_of(output), Told(configs={CONFIG: {"peft_type": "LORA", **config}}))


def test_the_same_fields_say_nothing_where_they_are_empty() -> None:
    outputs = folders(adapter_of([lora_entry("unet", QUERY, 8, 8)]))
    empty = {"kasa_config": None, "use_qalora": False, "layer_replication": None, "init_lora_weights": "eva"}
    config = {**(outputs[CONFIG].document or {}), **empty}
    assert DIALECT.read(state_of(outputs["adapter_model.safetensors"]), Told(configs={CONFIG: config})).entries


def test_a_folder_of_a_method_with_factors_of_its_own_is_told_by_the_methods_name(tmp_path: Path) -> None:
    names = {f"base_model.model.{QUERY}.vera_lambda_{end}": size for end, size in (("b", 8), ("d", 4))}
    save_file({name: np.ones(size, np.float32) for name, size in names.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "VERA"}))
    with pytest.raises(UnreadableFile, match="PEFT VERA adapter; persona reads LORA"):
        persona.load(tmp_path)


@pytest.mark.parametrize("pattern", [["to_q"], {"to_q": "8"}, "to_q", 7])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_the_wrong_kind_are_passed_over(field: str, pattern: Any) -> None:
    factors = {"w1": in_memory(np.ones((2, 2))), "w2": in_memory(np.ones((4, 4)))}
    outputs = folders(adapter_of([Entry("unet", QUERY, "lokr", factors, Scale(1.0, 1, "none"), kernel=())]))
    config = {**(outputs[CONFIG].document or {}), field: pattern}
    read = DIALECT.read(state_of(outputs["adapter_model.safetensors"]), Told(configs={CONFIG: config}))
    assert list(read.entries) == [("unet", QUERY)]


def ia3_of(feedforward: Any, conv: bool = True) -> bool:
    """Which side PEFT's IA3 factor of one module scales: True for the input."""
    path, shape = (CONV, (1, 8, 1, 1)) if conv else (QUERY, (8, 1))
    state = state_of(Output({f"base_model.model.{path}.ia3_l": in_memory(np.ones(shape, np.float32))}))
    configs = {} if feedforward is None else {CONFIG: {"peft_type": "IA3", "feedforward_modules": feedforward}}
    (entry,) = DIALECT.read(state, Told(configs=configs)).entries.values()
    return bool(np.asarray(entry.factors["on_input"]))


@pytest.mark.parametrize(
    ("feedforward", "on_input"),
    [
        (["conv1"], True),
        (["ff.net.2"], False),
        ([], False),
        (r".*(ff\.net\.2|conv1)", True),
        (r".*ff\.net\.2", False),
        ("conv1", False),
    ],
)
def test_the_side_of_ia3_on_a_convolution_is_told_by_a_list_or_by_a_regular_expression(
    feedforward: Any, on_input: bool
) -> None:
    """A list has endings; a text is a regular expression for the whole name (peft/tuners/ia3/model.py)."""
    assert ia3_of(feedforward) is on_input


@pytest.mark.parametrize("feedforward", [None, 3, r"((a+)+)+conv1"])
def test_the_side_of_ia3_is_never_guessed(feedforward: Any) -> None:
    with pytest.raises(UnreadableFile, match="its input or its output"):
        ia3_of(feedforward)
    assert ia3_of(feedforward, conv=False) is False


def test_the_reason_why_a_method_is_given_up_is_told() -> None:
    entries = [loha(QUERY, FLAT), lora_entry("unet", QUERY.replace("to_q", "to_k"), 8, 8, alpha=1.0)]
    made = plan(adapter_of(entries), DIALECT.slots, "peft", apart=DIALECT.apart)
    details = {step.module.rpartition(".")[2]: step.detail for step in made.steps}
    assert details["to_q"].endswith("LoRA of rank 4: a folder has one method, and these are loha and lora")
    assert "one method" not in details["to_k"]


@pytest.mark.parametrize(("fields", "scale"), [({}, 4.0), ({"alpha_pattern": {"to_q": 6}}, 3.0), ({"alpha": 5}, 2.5)])
def test_a_config_without_alpha_means_pefts_default(fields: dict[str, Any], scale: float) -> None:
    """LoraConfig.lora_alpha is 8 where nothing is said; the rank here is 2."""
    state = state_of(folders(adapter_of([lora_entry("unet", QUERY, 8, 8)]))["adapter_model.safetensors"])
    read = DIALECT.read(state, Told(configs={CONFIG: {"peft_type": "LORA", "r": 2, **fields}}))
    assert read.entries[("unet", QUERY)].scale.value == scale
    assert DIALECT.read(state, Told()).entries[("unet", QUERY)].scale.origin == "assumed"


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1]", "not a JSON object"), ("{", "not JSON"), (" " * (1 << 24) + "{}", "too large"), (None, "")],
)
def test_a_config_that_cannot_be_read_is_no_missing_one(tmp_path: Path, text: str | None, words: str) -> None:
    persona.save(adapter_of([lora_entry("unet", QUERY, 8, 8)]), tmp_path / "out", to="peft")
    config = tmp_path / "out" / CONFIG
    config.unlink()
    if text is None:
        config.symlink_to(tmp_path / "nowhere")
    else:
        config.write_text(text)
    with pytest.raises(UnreadableFile, match=words or "cannot be read: No such file"):
        persona.load(tmp_path / "out")


@pytest.mark.parametrize("components", [["unet"], ["unet", "text_encoder"]])
def test_words_beside_the_folders_come_back_with_them(tmp_path: Path, components: list[str]) -> None:
    entries = {"unet": lora_entry("unet", QUERY, 320, 320), "text_encoder": lora_entry("text_encoder", CLIP, 768, 768)}
    adapter = adapter_of([entries[name] for name in components])
    adapter.embeddings = [Embedding("<cat>", {"text_encoder": in_memory(np.ones((2, 768), np.float32))})]
    persona.save(adapter, tmp_path / "out", to="peft")
    read = persona.load(tmp_path / "out")
    assert isinstance(read, Adapter)
    assert {component for component, _ in read.entries} == set(components)
    assert [word.token for word in read.embeddings] == ["<cat>"]


def test_a_folder_of_named_adapters_says_which_there_are(tmp_path: Path) -> None:
    """PEFT puts an adapter that is not called `default` into a folder of its name."""
    (tmp_path / "out").mkdir()
    persona.save(adapter_of([lora_entry("unet", QUERY, 8, 8)]), tmp_path / "out/cat", to="peft")
    with pytest.raises(UnreadableFile, match="no weight file") as problem:
        persona.load(tmp_path / "out")
    assert problem.value.hint.endswith(str(tmp_path / "out/cat"))
