"""Spellings that are read and not (or otherwise) written, each with keys as its program writes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from persona.core.adapters.entry import Adapter
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import State, Told
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.dialects.cloneofsimo import DIALECT as CLONEOFSIMO
from persona.formats.dialects.recognise import DIALECTS, recognise
from persona.formats.models import sd1
from tests.formats.dialects.synthetic import family_adapter

RNG = np.random.default_rng(11)
LDM = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
OURS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def tensor(*shape: int) -> TensorRef:
    return in_memory(RNG.standard_normal(shape).astype(np.float32))


def read(
    tensors: dict[str, TensorRef], container: str = "safetensors", told: Told | None = None, **metadata: str
) -> Adapter:
    state = State(tensors, metadata, (), container)
    return recognise(state)[0].dialect.read(state, told or Told())


def product(down: TensorRef, up: TensorRef) -> np.ndarray:
    return np.asarray(up.read() @ down.read())


@pytest.mark.parametrize("suffix", ["mindpet_delta_lora_{}", "tk_delta_lora_{}"])
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_wukongs_adapters_in_both_toolkits_and_both_cases(suffix: str, case: object) -> None:
    down, up = tensor(2, 8), tensor(8, 2)
    a, b = (suffix.format(case(x)) for x in "ab")  # type: ignore[operator]
    adapter = read({f"{LDM}.{a}": down, f"{LDM}.{b}": up}, "mindspore", Told(alpha=4))
    assert adapter.source is not None and adapter.source.dialect == "mindpet"
    np.testing.assert_allclose(adapter.deltas()[f"unet.{OURS}"], 2 * product(down, up), rtol=1e-5, atol=1e-6)


def test_alpha_of_a_mindpet_file_that_nobody_told_is_assumed_and_said() -> None:
    adapter = read(
        {f"{LDM}.mindpet_delta_lora_a": tensor(2, 8), f"{LDM}.mindpet_delta_lora_b": tensor(8, 2)}, "mindspore"
    )
    assert any("alpha = rank was assumed" in note for note in adapter.notes)


def test_mindones_sdv2_file_in_mindspores_safetensors() -> None:
    down, up = tensor(2, 8), tensor(8, 2)
    adapter = read({f"{LDM}.lora_down.weight": down, f"{LDM}.lora_up.weight": up}, "safetensors", format="ms")
    assert adapter.source is not None and adapter.source.dialect == "mindone-sdv2"
    np.testing.assert_allclose(adapter.deltas()[f"unet.{OURS}"], product(down, up), rtol=1e-5, atol=1e-6)


def test_mindones_sdxl_text_encoder_beside_the_unet() -> None:
    unet = "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k"
    clip = "conditioner.embedders.0.transformer.text_model.encoder.layers.3.self_attn.k_proj"
    tensors = {f"{unet}.lora_A.weight": tensor(2, 32), f"{unet}.lora_B.weight": tensor(8, 2)}
    tensors |= {f"{clip}.lora_A.weight": tensor(2, 12), f"{clip}.lora_B.weight": tensor(12, 2)}
    adapter = read(tensors, "mindspore")
    assert list(adapter.entries) == [
        ("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"),
        ("text_encoder", "text_model.encoder.layers.3.self_attn.k_proj"),
    ]


def test_a_lora_on_openclips_stacked_projections_is_divided() -> None:
    stacked = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj"
    unet = "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k"
    down, up = tensor(2, 12), tensor(36, 2)
    tensors = {f"{stacked}.lora_A.weight": down, f"{stacked}.lora_B.weight": up}
    tensors |= {f"{unet}.lora_A.weight": tensor(2, 32), f"{unet}.lora_B.weight": tensor(8, 2)}
    deltas = read(tensors, "mindspore").deltas()
    got = deltas["text_encoder_2.text_model.encoder.layers.3.self_attn.v_proj"]
    np.testing.assert_allclose(got, product(down, up)[24:], rtol=1e-5, atol=1e-6)


def test_mindones_kohya_port_with_dots() -> None:
    down, up = tensor(2, 8), tensor(8, 2)
    tensors = {f"lora_unet.{OURS}.lora_down.weight": down, f"lora_unet.{OURS}.lora_up.weight": up}
    tensors[f"lora_unet.{OURS}.alpha"] = in_memory(np.float32(1.0))
    np.testing.assert_allclose(read(tensors).deltas()[f"unet.{OURS}"], 0.5 * product(down, up), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("letters", [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_paddle_files_of_either_backend_are_read_in_their_layout(letters: tuple[str, str]) -> None:
    key = OURS.replace("attn1.to_q", "attn2.to_k")
    down, up = tensor(12, 2), tensor(2, 8)
    adapter = read({f"unet.{key}.{letters[0]}.weight": down, f"unet.{key}.{letters[1]}.weight": up}, "paddle")
    assert adapter.source is not None and adapter.source.dialect == "ppdiffusers"
    np.testing.assert_allclose(adapter.deltas()[f"unet.{key}"], (down.read() @ up.read()).T, rtol=1e-5, atol=1e-6)


def test_paddlenlps_older_clip_names_and_its_one_element_alpha() -> None:
    name = "text_encoder.text_model.transformer.layers.0.linear1"
    down, up = tensor(12, 2), tensor(2, 24)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": in_memory(np.ones(1, np.float32)),
    }
    adapter = read(tensors, "paddle")
    got = adapter.deltas()["text_encoder.text_model.encoder.layers.0.mlp.fc1"]
    np.testing.assert_allclose(got, 0.5 * (down.read() @ up.read()).T, rtol=1e-5, atol=1e-6)


def test_a_file_whose_modules_contradict_each_others_layout_is_refused() -> None:
    key = "unet.down_blocks.{}.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{key.format(0)}.lora.down.weight": tensor(2, 12), f"{key.format(0)}.lora.up.weight": tensor(8, 2)}
    tensors |= {f"{key.format(2)}.lora.down.weight": tensor(12, 2), f"{key.format(2)}.lora.up.weight": tensor(2, 16)}
    with pytest.raises(UnreadableFile, match="laid out"):
        read(tensors)


def test_kohya_files_of_transformers_5_lack_a_level() -> None:
    """stacks/torch.md §7: `lora_te_encoder_layers_…`."""
    key = "lora_te_encoder_layers_1_mlp_fc2"
    adapter = read({f"{key}.lora_down.weight": tensor(2, 24), f"{key}.lora_up.weight": tensor(12, 2)})
    assert list(adapter.entries) == [("text_encoder", "text_model.encoder.layers.1.mlp.fc2")]


@pytest.mark.parametrize(
    "key, place",
    [
        (f"lycoris_{OURS.replace('.', '_')}", ("unet", OURS)),
        (f"{LDM.removeprefix('model.')}", ("unet", OURS)),
        (f"{LDM.removeprefix('model.diffusion_model.')}", ("unet", OURS)),
        (f"unet.{OURS}", ("unet", OURS)),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
            ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ),
        ("transformer.single_transformer_blocks.3.proj_out", ("transformer", "single_transformer_blocks.3.proj_out")),
        ("diffusion_model.single_blocks.3.linear2", ("transformer", "single_transformer_blocks.3.proj_out")),
        ("diffusion_model.transformer_blocks.0.attn.to_q", ("transformer", "transformer_blocks.0.attn.to_q")),
    ],
)
@pytest.mark.parametrize("letters", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_simpletuner_onetrainer_comfy_and_ai_toolkit_spellings(
    key: str, place: tuple[str, str], letters: tuple[str, str]
) -> None:
    into = 60 if key.endswith(("linear2", "proj_out")) else 12
    tensors = {f"{key}.{letters[0]}.weight": tensor(2, into), f"{key}.{letters[1]}.weight": tensor(12, 2)}
    adapter = read(tensors)
    assert list(adapter.entries) == [place] and adapter.leftovers == []


def test_onetrainers_input_axis_dora_in_a_diffusers_file() -> None:
    """It has no reader elsewhere (dialects.md §5.7)."""
    tensors = {f"unet.{OURS}.lora_A.weight": tensor(2, 8), f"unet.{OURS}.lora_B.weight": tensor(8, 2)}
    tensors[f"unet.{OURS}.dora_scale"] = tensor(1, 8)
    magnitude = read(tensors).entries[("unet", OURS)].magnitude
    assert magnitude is not None and magnitude.axis == "in"


def test_ai_toolkits_magnitude_is_doras_output_vector() -> None:
    key = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{key}.lora_A.weight": tensor(2, 8),
        f"{key}.lora_B.weight": tensor(8, 2),
        f"{key}.magnitude": tensor(8),
    }
    magnitude = next(iter(read(tensors).entries.values())).magnitude
    assert magnitude is not None and magnitude.axis == "out"


def test_projections_written_under_each_other_are_kept_once() -> None:
    """diffusers#2918: every pair repeated under every projection."""
    base = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors = {}
    pairs = {x: (tensor(2, 12), tensor(12, 2)) for x in ("q", "k", "v", "out")}
    for owner in pairs:
        for x, (down, up) in pairs.items():
            tensors[f"{base}.{owner}_proj.to_{x}_lora.down.weight"] = down
            tensors[f"{base}.{owner}_proj.to_{x}_lora.up.weight"] = up
    adapter = read(tensors)
    assert sorted(path.rsplit(".", 1)[1] for _, path in adapter.entries) == ["k_proj", "out_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("safeloras", [False, True])
@pytest.mark.parametrize("order", [("attn1", "ff", "attn2"), ("attn1", "attn2", "ff")])
def test_cloneofsimos_unnamed_list_is_matched_with_the_shapes(safeloras: bool, order: tuple[str, ...]) -> None:
    unet = {module.path: module for module in sd1.UNET.modules()}
    paths = []
    for block in ("down_blocks", "up_blocks", "mid_block"):
        heads = [p.removesuffix(".attn1.to_q") for p in unet if p.startswith(block) and p.endswith(".attn1.to_q")]
        for head in heads:
            for part in order:
                names = ("net.0.proj",) if part == "ff" else ("to_q", "to_k", "to_v", "to_out.0")
                paths += [f"{head}.{part}.{name}" for name in names]
    tensors = {}
    for n, path in enumerate(paths):
        out, into = unet[path].shape
        up, down = (f"unet:{n}:up", f"unet:{n}:down") if safeloras else (str(2 * n), str(2 * n + 1))
        tensors |= {up: in_memory(np.full((out, 1), n, np.float16)), down: in_memory(np.ones((1, into), np.float16))}
    state = State(tensors, {}, (), "torch")
    assert recognise(state)[0].dialect is CLONEOFSIMO
    adapter = CLONEOFSIMO.read(state, Told())
    assert [path for _, path in adapter.entries] == paths
    assert "sd1" in adapter.families


def test_cloneofsimos_list_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UnreadableFile, match="no order"):
        CLONEOFSIMO.read(State({"0": tensor(7, 1), "1": tensor(1, 5)}), Told())


def test_two_base_models_in_one_file_are_refused() -> None:
    tensors = {}
    for family in ("sd1", "sdxl"):
        for entry in family_adapter(family, components=["unet"], every=3, real=True).entries.values():
            tensors[f"{entry.name}.lora_A.weight"] = entry.factors["down"]
            tensors[f"{entry.name}.lora_B.weight"] = entry.factors["up"]
    with pytest.raises(UnreadableFile, match=r"different base models|twice with different values"):
        read(tensors)


def test_bookkeeping_is_dropped_and_named() -> None:
    tensors = {f"unet.{OURS}.lora_A.weight": tensor(2, 8), f"unet.{OURS}.lora_B.weight": tensor(8, 2)}
    tensors |= {"global_step": in_memory(np.int64(7)), f"adam_m.{OURS}.lora_A": tensor(2, 8)}
    adapter = read(tensors)
    assert adapter.leftovers == []
    assert any("global_step" in note for note in adapter.notes)


def test_pefts_lora_on_an_embedding_is_a_low_rank_delta_of_its_table() -> None:
    """dialects.md §4.1: ΔE = (B·A)ᵀ, and both factors go back as they were."""
    key = "base_model.model.text_model.embeddings.token_embedding"
    newer = key.replace("text_model.", "")  # CLIPTextModel since transformers 5.6
    a, b = tensor(2, 30), tensor(8, 2)
    tensors = {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
    adapter = read(tensors)
    got = adapter.deltas()["text_encoder.text_model.embeddings.token_embedding"]
    np.testing.assert_allclose(got, (b.read() @ a.read()).T, rtol=1e-5, atol=1e-6)
    written = DIALECTS["peft"].write(adapter)[0].tensors
    bytes_of = {name: ref.read().tobytes() for name, ref in written.items()}
    both = {f"{where}.{leaf.rpartition('.')[2]}": ref for leaf, ref in tensors.items() for where in (key, newer)}
    assert bytes_of == {name: ref.read().tobytes() for name, ref in both.items()}
    with pytest.raises(ConversionError, match="embedding"):
        DIALECTS["kohya"].write(replace(adapter, family="sd1"))
