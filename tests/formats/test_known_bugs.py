"""The troubles people reported with other converters (P6; dialects.md §9), each as what persona does instead."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from persona.core.adapters.certificate import certify, relative_error
from persona.core.adapters.conversion import Plan, Wishes, plan
from persona.core.adapters.delta import bias_delta, delta
from persona.core.adapters.entry import Adapter, Entry, Scale
from persona.core.adapters.svd import truncate
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import State, Told
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.dialects.recognise import DIALECTS, recognise
from tests.formats.dialects.synthetic import family_adapter
from tests.formats.dialects.written import adapter_of, expected_delta, lora_entry, state_of

RNG = np.random.default_rng(3)
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"


def tensor(*shape: int, dtype: str = "float32") -> TensorRef:
    return in_memory(RNG.standard_normal(shape).astype(dtype))


def kohya(module: str, down: TensorRef, up: TensorRef, alpha: float | None = None) -> dict[str, TensorRef]:
    made = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
    return made if alpha is None else {**made, f"{module}.alpha": in_memory(np.float32(alpha))}


def read(tensors: dict[str, TensorRef], told: Told | None = None, **metadata: str) -> Adapter:
    state = State(tensors, metadata, (), "safetensors")
    return recognise(state)[0].dialect.read(state, told or Told())


def planned(adapter: Adapter, target: str, wishes: Wishes | None = None) -> Plan:
    dialect = DIALECTS[target]
    slots = dialect.slots.within(dialect.slots.containers[0])
    return plan(adapter, slots, target, wishes=wishes, fused_path=dialect.joined(adapter))


def converted(adapter: Adapter, target: str, wishes: Wishes | None = None) -> dict[str, TensorRef]:
    made = planned(adapter, target, wishes)
    made.demand()
    return dict(DIALECTS[target].write(made.adapter)[0].tensors)


def entry_of(algorithm: str, component: str, path: str, kernel: tuple[int, ...] = (), **factors: TensorRef) -> Entry:
    return Entry(component, path, algorithm, factors, Scale(1.0, 2, "rank", "file key"), kernel=kernel)  # type: ignore[arg-type]


def test_t5_flux_final_layer_keeps_its_alpha_and_has_its_halves_exchanged() -> None:
    """diffusers#13998."""
    down, up = tensor(2, 12), tensor(24, 2)
    tensors = kohya("lora_unet_final_layer_adaLN_modulation_1", down, up, alpha=1.0)
    tensors |= kohya("lora_unet_double_blocks_0_img_attn_qkv", tensor(2, 12), tensor(36, 2), alpha=1.0)
    out = converted(read(tensors), "diffusers")
    written = out["transformer.norm_out.linear.lora_B.weight"].read()
    np.testing.assert_array_equal(written, np.roll(up.read(), 12, axis=0))
    again = read(tensors)
    np.testing.assert_allclose(
        again.deltas()["transformer.norm_out.linear"], 0.5 * np.roll(up.read(), 12, axis=0) @ down.read(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("algorithm", "shapes"),
    [
        ("lora", {"lora_down.weight": (2, 12), "lora_up.weight": (24, 2), "diff_b": (24,)}),
        ("full", {"diff": (24, 12), "diff_b": (24,)}),
        ("loha", {f"hada_w{k}_{side}": (24, 2) if side == "a" else (2, 12) for k in "12" for side in "ab"}),
        ("lokr", {"lokr_w1": (4, 3), "lokr_w2": (6, 4)}),
        ("lokr", {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 3), "lokr_w2_a": (6, 1), "lokr_w2_b": (1, 4)}),
        ("lora of lokr", {"lokr_w1": (3, 4), "lokr_w2": (8, 3), "diff_b": (24,)}),
    ],
)
def test_t5_the_halves_of_every_algorithm_are_exchanged(algorithm: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """The same factors on a layer whose halves stay say what they add; the final layer's are rolled by one half."""
    values = {name: tensor(*shape) for name, shape in shapes.items()}
    found = []
    for module in ("final_layer_adaLN_modulation_1", "double_blocks_0_img_mlp_0"):
        named = {f"lora_unet_{module}.{name}": value for name, value in values.items()}
        adapter = read(named, Told(family="flux1"))
        (entry,) = adapter.entries.values()
        found.append((delta(entry), bias_delta(entry)))
        if module.startswith("final") and algorithm != "lora of lokr":
            back = converted(adapter, "kohya")
            assert all(np.array_equal(back[key].read(), ref.read()) for key, ref in named.items())
    (rolled, rolled_bias), (plain, bias) = found
    np.testing.assert_allclose(rolled, np.roll(plain, 12, axis=0), rtol=1e-5, atol=1e-6)
    assert bias is None or np.array_equal(np.roll(bias, 12), rolled_bias)


def test_t6_all_groups_outside_flux_blocks_get_a_component() -> None:
    groups = ("img_in", "txt_in", "time_in_in_layer", "vector_in_out_layer", "guidance_in_in_layer")
    tensors = {}
    for name in groups:
        tensors |= kohya(f"lora_unet_{name}", tensor(2, 12), tensor(12, 2), alpha=2.0)
    tensors |= kohya("lora_unet_single_blocks_0_linear2", tensor(2, 60), tensor(12, 2), alpha=2.0)
    out = converted(read(tensors), "diffusers")
    modules = {key.split(".lora_")[0] for key in out}
    assert modules == {
        "transformer.x_embedder",
        "transformer.context_embedder",
        "transformer.time_text_embed.timestep_embedder.linear_1",
        "transformer.time_text_embed.text_embedder.linear_2",
        "transformer.time_text_embed.guidance_embedder.linear_1",
        "transformer.single_transformer_blocks.0.proj_out",
    }


def test_t8_a_file_with_some_layers_only_reads_as_those_layers() -> None:
    """diffusers#9291, #10985."""
    tensors = kohya("lora_unet_single_blocks_7_linear2", tensor(2, 60), tensor(12, 2), alpha=2.0)
    adapter = read(tensors)
    assert list(adapter.entries) == [("transformer", "single_transformer_blocks.7.proj_out")]
    assert adapter.families == {"flux1"}


def test_t9_kohyas_third_encoder_is_flux_t5_and_zeros_are_kept() -> None:
    """diffusers#10862, sd-scripts#1803."""
    zeros = in_memory(np.zeros((12, 2), np.float32))
    tensors = kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", tensor(2, 12), zeros, alpha=2.0)
    tensors |= kohya("lora_unet_double_blocks_0_img_mlp_0", tensor(2, 12), tensor(48, 2), alpha=2.0)
    adapter = read(tensors)
    assert ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q") in adapter.entries
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight" in converted(adapter, "kohya")


def test_t10_a_mixture_of_spellings_is_read_module_by_module() -> None:
    """diffusers#10562."""
    tensors = kohya("lora_transformer_single_transformer_blocks_0_proj_out", tensor(2, 60), tensor(12, 2), alpha=2.0)
    tensors |= kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", tensor(2, 12), tensor(24, 2), alpha=2.0)
    down, up = tensor(2, 12), tensor(12, 2)
    stray = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    tensors |= {f"{stray}.lora_linear_layer.down.weight": down, f"{stray}.lora_linear_layer.up.weight": up}
    adapter = read(tensors)
    assert adapter.leftovers == [] and len(adapter.entries) == 3
    assert any("are spelt as" in note for note in adapter.notes)


def test_t11_xlabs_files_lose_no_block() -> None:
    """diffusers#9803, #9914, #9915."""
    tensors = {}
    for n in range(19):
        for part, rows in (("qkv_lora1", 36), ("qkv_lora2", 36), ("proj_lora1", 12), ("proj_lora2", 12)):
            tensors[f"double_blocks.{n}.processor.{part}.down.weight"] = tensor(2, 12)
            tensors[f"double_blocks.{n}.processor.{part}.up.weight"] = tensor(rows, 2)
    for n in range(38):
        tensors[f"single_blocks.{n}.processor.qkv_lora.down.weight"] = tensor(2, 12)
        tensors[f"single_blocks.{n}.processor.qkv_lora.up.weight"] = tensor(36, 2)
        tensors[f"single_blocks.{n}.processor.proj_lora.down.weight"] = tensor(2, 60)
        tensors[f"single_blocks.{n}.processor.proj_lora.up.weight"] = tensor(12, 2)
    adapter = read(tensors)
    assert adapter.leftovers == [] and adapter.families == {"flux1"}
    names = set(adapter.deltas())
    assert len(names) == 19 * 8 + 38 * 4
    assert "transformer.single_transformer_blocks.37.attn.to_v" in names
    assert "transformer.single_transformer_blocks.37.proj_mlp" not in names
    up = tensors["single_blocks.3.processor.qkv_lora.up.weight"].read()
    down = tensors["single_blocks.3.processor.qkv_lora.down.weight"].read()
    got = adapter.deltas()["transformer.single_transformer_blocks.3.attn.to_k"]
    np.testing.assert_allclose(got, up[12:24] @ down, rtol=1e-5, atol=1e-6)


def test_t12_norms_that_diffusers_cannot_hold_are_named() -> None:
    """diffusers#10745."""
    norm = entry_of("norm", "transformer", "transformer_blocks.0.attn.norm_q", diff=tensor(12))
    norm = replace(norm, scale=Scale(None, 1, "none", "not applicable"))
    adapter = adapter_of([norm, lora_entry("transformer", "x_embedder", 12, 12)], "flux1")
    made = planned(adapter, "diffusers")
    assert [step.module for step in made.refusals] == ["transformer.transformer_blocks.0.attn.norm_q"]
    with pytest.raises(ConversionError, match="norm_q"):
        made.demand()
    dropped = planned(adapter, "diffusers", Wishes(drop=True))
    assert [step.action for step in dropped.steps if "norm_q" in step.module] == ["drop"]


@pytest.mark.parametrize("target", ["diffusers", "ppdiffusers", "diffusers-legacy"])
def test_t14_t29b_a_middle_factor_is_multiplied_in_where_there_is_no_place_for_it(target: str) -> None:
    """diffusers#11943, sd-scripts#425."""
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = kohya(module, tensor(2, 8, 1, 1), tensor(8, 2, 1, 1), alpha=1.0)
    tensors[f"{module}.lora_mid.weight"] = tensor(2, 2, 3, 3)
    adapter = read(tensors)
    made = planned(adapter, target)
    assert made.cost == "exact" and not any("mid" in e.factors for e in made.adapter.entries.values())
    assert certify(adapter, made.adapter)["worst_relative_error"] <= 1e-6


@pytest.mark.parametrize("tucker", [False, True])
def test_t15_loha_becomes_lora_of_the_squared_rank_exactly(tucker: bool) -> None:
    """diffusers#3087, onnx-web#312."""
    module = "lora_unet_down_blocks_0_resnets_0_conv1"
    if tucker:
        shapes = {
            "t1": (2, 2, 3, 3),
            "w1_a": (2, 8),
            "w1_b": (2, 8),
            "t2": (2, 2, 3, 3),
            "w2_a": (2, 8),
            "w2_b": (2, 8),
        }
    else:
        shapes = {"w1_a": (8, 2), "w1_b": (2, 72), "w2_a": (8, 2), "w2_b": (2, 72)}
    tensors = {f"{module}.hada_{name}": tensor(*shape) for name, shape in shapes.items()}
    tensors[f"{module}.alpha"] = in_memory(np.float32(1.0))
    adapter = read(tensors)
    made = planned(adapter, "diffusers").adapter
    assert [entry.scale.rank for entry in made.entries.values()] == [4]
    assert adapter.deltas()[f"unet.{CONV}"].shape == (8, 8, 3, 3)
    assert certify(adapter, made)["worst_relative_error"] <= 1e-6


def test_t16_the_second_encoders_text_projection_has_a_home() -> None:
    """OneTrainer#314, diffusers#8237."""
    tensors = kohya("lora_te2_text_projection", tensor(2, 20), tensor(20, 2), alpha=2.0)
    tensors |= kohya(
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", tensor(2, 32), tensor(8, 2), alpha=2.0
    )
    adapter = read(tensors)
    assert ("text_encoder_2", "text_projection") in adapter.entries
    assert "text_encoder_2.text_projection.lora_A.weight" in converted(adapter, "diffusers")


@pytest.mark.parametrize("kernel", [0, 3])
def test_t17_t18_dora_vectors_change_key_and_shape_between_kohya_and_diffusers(kernel: int) -> None:
    """Comfy#3494, diffusers#7371, peft#1561; the convolution is square, so shape alone could not tell its axis."""
    path = CONV if kernel else QUERY
    entry = lora_entry("unet", path, 8, 8, kernel=kernel, alpha=1.0, dora="out")
    out = converted(adapter_of([entry]), "kohya")
    (key,) = [key for key in out if key.endswith(".dora_scale")]
    assert "." not in key.removesuffix(".dora_scale")
    assert out[key].shape == ((8, 1, 1, 1) if kernel else (8, 1))
    back = read(out)
    assert back.entries[("unet", path)].magnitude.axis == "out"  # type: ignore[union-attr]
    peft = converted(back, "diffusers")[f"unet.{path}.lora_magnitude_vector"]
    assert peft.shape == ((1, 8, 1, 1) if kernel else (8,))
    again = read(converted(back, "diffusers"))
    assert again.entries[("unet", path)].magnitude.axis == "out"  # type: ignore[union-attr]


def test_t18_a_vector_along_the_input_needs_the_base_to_leave_kohya() -> None:
    entry = lora_entry("unet", QUERY, 8, 8, alpha=1.0, dora="in")
    out = converted(adapter_of([entry]), "kohya")
    assert [ref.shape for key, ref in out.items() if key.endswith("dora_scale")] == [(1, 8)]
    made = planned(read(out), "diffusers")
    assert made.cost == "needs base"
    base = {entry.name: RNG.standard_normal((8, 8))}
    with_base = planned(read(out), "diffusers", Wishes(base=base))
    assert with_base.cost == "exact"
    made_delta = with_base.adapter.deltas()[entry.name]
    assert relative_error(delta(replace(entry), base[entry.name]), made_delta) <= 1e-6


def test_t20_lokr_with_both_factors_whole_ignores_alpha() -> None:
    """Comfy#15114."""
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    w1, w2 = tensor(2, 2), tensor(8, 8)
    tensors = {f"{module}.lokr_w1": w1, f"{module}.lokr_w2": w2, f"{module}.alpha": in_memory(np.float32(32.0))}
    adapter = read(tensors)
    np.testing.assert_allclose(adapter.deltas()[f"unet.{QUERY}"], np.kron(w1.read(), w2.read()), rtol=1e-6, atol=1e-6)
    assert certify(adapter, planned(adapter, "diffusers").adapter)["worst_relative_error"] <= 1e-6
    assert float(converted(adapter, "kohya")[f"{module}.alpha"].read()) == 32.0


def test_t20_pefts_lokr_with_both_factors_whole_divides_alpha_by_its_own_rank() -> None:
    w1, w2 = tensor(2, 2), tensor(8, 8)
    tensors = {f"base_model.model.{QUERY}.lokr_w1": w1, f"base_model.model.{QUERY}.lokr_w2": w2}
    told = Told(configs={"adapter_config.json": {"peft_type": "LOKR", "r": 8, "alpha": 4}})
    adapter = DIALECTS["peft"].read(State(tensors, {}), told)
    np.testing.assert_allclose(
        adapter.deltas()[f"unet.{QUERY}"], 0.5 * np.kron(w1.read(), w2.read()), rtol=1e-6, atol=1e-6
    )
    again = read(converted(adapter, "kohya"))
    np.testing.assert_allclose(again.deltas()[f"unet.{QUERY}"], adapter.deltas()[f"unet.{QUERY}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "suffix, shape", [("oft_blocks", (4, 2, 2)), ("oft_blocks", (2, 4, 2, 2)), ("oft_diag", (4, 2, 2))]
)
def test_t22_t23_rotations_stay_in_their_dialect_bit_for_bit_and_are_refused_elsewhere(
    suffix: str, shape: tuple[int, ...]
) -> None:
    """A1111#14973, sdnext#2516, sd-scripts#944: their alpha is a constraint, not a scale."""
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{module}.{suffix}": tensor(*shape), f"{module}.alpha": in_memory(np.float32(0.5))}
    adapter = read(tensors)
    out = converted(adapter, "kohya")
    assert {key: ref.read().tobytes() for key, ref in out.items()} == {
        k: r.read().tobytes() for k, r in tensors.items()
    }
    assert planned(adapter, "diffusers").cost == "refused"


def test_t24_rank_stabilised_alphas_of_lycoris_are_taken_as_stored_and_pefts_are_converted() -> None:
    """LyCORIS PR#214, #246: it stores alpha·√rank."""
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    stored = read(kohya(module, tensor(4, 8), tensor(8, 4), alpha=2.0))
    assert stored.entries[("unet", QUERY)].scale.value == 0.5
    entry = lora_entry("unet", QUERY, 8, 8, rank=4)
    stabilised = replace(entry, scale=Scale(2.0, 4, "sqrt_rank", "config"))
    out = converted(adapter_of([stabilised]), "kohya")
    assert float(out[f"{module}.alpha"].read()) == 4.0  # 2/√4 = 4/4


def test_t25_every_layer_keeps_its_rank_and_alpha_in_every_dialect_with_a_place_for_it() -> None:
    """AnimaLoraStudio PR#241."""
    entries = [
        lora_entry("unet", QUERY.replace("0.attn1", f"0.attn{n}"), 8, 8, rank=n + 1, alpha=float(2 * n + 1))
        for n in (1, 2)
    ]
    for target in ("kohya", "comfy", "diffusers", "mindone-kohya"):
        (output,) = DIALECTS[target].write(planned(adapter_of(entries), target).adapter)
        again = DIALECTS[target].read(state_of(output), Told())
        for entry in entries:
            scale = again.entries[(entry.component, entry.path)].scale
            assert (scale.rank, scale.value) == (entry.scale.rank, entry.scale.value), target


def test_t26_t43_truncation_at_full_rank_keeps_the_delta_and_sets_alpha_to_the_rank() -> None:
    """sd-scripts#2169, #325; DiffSynth centres the columns and loses the mean."""
    entry = lora_entry("unet", QUERY, 8, 12, rank=4, alpha=1.0)
    ones = replace(entry, factors={**entry.factors, "up": in_memory(np.ones((8, 4), np.float32))})
    for source in (entry, ones):
        whole = truncate(source, 4)
        assert whole.entry.scale.value == 1.0 and whole.kept == pytest.approx(1.0)
        np.testing.assert_allclose(delta(whole.entry), expected_delta(source), atol=1e-5)
    reduced = truncate(entry, 2)
    singular = np.linalg.svd(expected_delta(entry), compute_uv=False)
    assert reduced.kept == pytest.approx(np.sqrt((singular[:2] ** 2).sum() / (singular**2).sum()), rel=1e-6)
    assert np.linalg.norm(delta(reduced.entry) - expected_delta(entry)) == pytest.approx(
        np.linalg.norm(singular[2:]), rel=1e-4
    )


def test_t27_dora_that_cannot_be_rewritten_is_a_refusal_and_no_crash() -> None:
    """supermerger#373."""
    adapter = adapter_of([lora_entry("unet", QUERY, 8, 8, alpha=1.0, dora="out")])
    with pytest.raises(ConversionError, match="DoRA"):
        planned(adapter, "diffusers-legacy").demand()


def test_t28_t39_alpha_counts_and_half_precision_is_added_up_in_more() -> None:
    """cloneofsimo#187, openagents#9456."""
    entry = lora_entry("unet", QUERY, 8, 8, rank=4, alpha=1.0, dtype="float16")
    made = delta(entry)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected_delta(entry), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_t29_the_dtype_of_the_source_is_kept(dtype: str) -> None:
    """sd-scripts#192, kohya_ss PR#3205."""
    adapter = adapter_of([lora_entry("unet", QUERY, 8, 8, alpha=1.0, dtype=dtype)])
    for target in ("kohya", "diffusers", "ppdiffusers"):
        kinds = {ref.dtype for key, ref in converted(adapter, target).items() if not key.endswith("alpha")}
        assert kinds == {np.dtype(dtype)}, target


def test_t29c_separate_projections_are_joined_for_kohyas_flux() -> None:
    """kohya_ss#2975, #2714."""
    block = "single_transformer_blocks.0"
    parts = [
        lora_entry("transformer", f"{block}.attn.to_{x}", 12, 12, rank=2, alpha=a, seed=n)
        for n, (x, a) in enumerate(zip("qkv", (1.0, 2.0, 2.0), strict=True))
    ]
    adapter = adapter_of([*parts, lora_entry("transformer", f"{block}.proj_mlp", 48, 12, rank=2, alpha=1.0)], "flux1")
    out = converted(adapter, "kohya")
    assert sorted(out) == [
        f"lora_unet_single_blocks_0_linear1.{x}" for x in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    assert out["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (84, 8)
    again = read(out).deltas()
    for entry in adapter.entries.values():
        np.testing.assert_allclose(again[entry.name], expected_delta(entry), rtol=1e-5, atol=1e-6)


def test_t29d_text_encoder_layers_of_a_flux_file_are_all_there_afterwards() -> None:
    """sd-scripts#1458, diffusers#9221, #12053."""
    adapter = family_adapter("flux1", components=["text_encoder", "transformer"], every=7)
    (output,) = DIALECTS["kohya"].write(planned(adapter, "kohya").adapter)
    back = converted(DIALECTS["kohya"].read(state_of(output), Told()), "diffusers")
    there = {key.split(".lora_")[0] for key in back if key.startswith("text_encoder.")}
    assert len(there) == sum(component == "text_encoder" for component, _ in adapter.entries)


def test_t30_the_parts_of_a_divided_module_share_no_memory_when_written() -> None:
    """sd-scripts#1614: a tensor saved under three names."""
    tensors = kohya("lora_unet_double_blocks_0_img_attn_qkv", tensor(2, 12), tensor(36, 2), alpha=2.0)
    tensors |= kohya("lora_unet_single_blocks_0_linear2", tensor(2, 60), tensor(12, 2), alpha=2.0)
    out = converted(read(tensors), "diffusers")
    downs = [out[f"transformer.transformer_blocks.0.attn.to_{x}.lora_A.weight"] for x in "qkv"]
    assert len({ref.read().tobytes() for ref in downs}) == 1
    back = converted(read(out, Told(family="flux1")), "kohya")
    assert back["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape == (2, 12)  # rejoined, rank not grown


def test_t31_a_key_nobody_can_explain_is_reported_by_name() -> None:
    """diffusers#9134, #6399."""
    tensors = kohya("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", tensor(2, 8), tensor(8, 2))
    tensors |= kohya("lora_unet_no_such_module", tensor(2, 8), tensor(8, 2))
    tensors["something.else"] = tensor(3)
    adapter = read(tensors)
    assert sorted(one.key for one in adapter.leftovers) == [
        "lora_unet_no_such_module.lora_down.weight",
        "lora_unet_no_such_module.lora_up.weight",
        "something.else",
    ]


def test_t35_an_sd1_file_is_refused_as_sdxl_in_words() -> None:
    """fastsdcpu#82."""
    adapter = family_adapter("sd1", every=11, components=["unet"], real=True)
    (output,) = DIALECTS["diffusers"].write(adapter)
    with pytest.raises(UnreadableFile, match="not a sdxl adapter"):
        DIALECTS["diffusers"].read(state_of(output), Told(family="sdxl"))


def test_t36_an_sdxl_file_is_refused_as_the_refiners() -> None:
    """Comfy#1461."""
    adapter = family_adapter("sdxl", every=31, components=["unet"], real=True)
    (output,) = DIALECTS["kohya"].write(adapter)
    with pytest.raises(UnreadableFile, match="not a sdxl-refiner adapter"):
        DIALECTS["kohya"].read(state_of(output), Told(family="sdxl-refiner"))


def test_t40_an_architecture_nobody_knows_is_not_guessed_at() -> None:
    """diffusers#13107, #13162."""
    tensors = kohya("lora_unet_strange_stack_0_mixer_in", tensor(2, 8), tensor(8, 2), alpha=2.0)
    assert recognise(State(tensors, {})) == []


def test_t41_mindone_names_really_change() -> None:
    adapter = family_adapter("sd1", components=["unet"], every=5)
    adapter.entries = {key: e for key, e in adapter.entries.items() if "attn" in key[1] and ".to_" in key[1]}
    out = converted(adapter, "mindone-sdv2")
    assert all(key.startswith("model.diffusion_model.") and "lora_" in key for key in out)


def test_t42_diffsynth_gets_the_scale_in_its_factors() -> None:
    adapter = adapter_of(
        [
            lora_entry("unet", QUERY, 8, 8, rank=2, alpha=8.0),
            lora_entry("unet", QUERY.replace("to_q", "to_k"), 8, 8, rank=4, alpha=1.0),
        ]
    )
    out = converted(adapter, "diffsynth")
    assert not any("alpha" in key for key in out)
    for entry in adapter.entries.values():
        up, down = (out[f"{entry.path}.lora_{x}.default.weight"].read() for x in "BA")
        np.testing.assert_allclose(up @ down, expected_delta(entry), rtol=1e-5, atol=1e-6)


def test_t45_sd1_text_encoders_are_called_te_and_not_te1() -> None:
    adapter = family_adapter("sd1", components=["text_encoder"], every=9)
    assert all(key.startswith("lora_te_text_model_") for key in converted(adapter, "kohya"))


def test_t47_the_same_module_twice_is_kept_once_or_refused() -> None:
    """SDXL files that carry both spellings: diffusers drops one silently."""
    down, up = tensor(2, 8), tensor(8, 2)
    first = kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", down, up, alpha=1.0)
    second = kohya("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", down, up, alpha=1.0)
    adapter = read({**first, **second})
    assert len(adapter.entries) == 1 and any("twice" in note for note in adapter.notes)
    other = kohya("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", down, tensor(8, 2), alpha=1.0)
    with pytest.raises(UnreadableFile, match="twice with different values"):
        read({**first, **other})


def test_a_stored_alpha_of_zero_means_zero() -> None:
    """dialects.md §4.1: ComfyUI and A1111 read it so."""
    adapter = read(
        kohya(
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            tensor(2, 8),
            tensor(8, 2),
            alpha=0.0,
        )
    )
    assert not np.any(adapter.deltas()[f"unet.{QUERY}"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(UnreadableFile, match="finite"):
        read(
            kohya(
                "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
                tensor(2, 8),
                tensor(8, 2),
                alpha=bad,
            )
        )


def test_a_magnitude_without_factors_is_refused() -> None:
    with pytest.raises(UnreadableFile, match="no"):
        read({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.dora_scale": tensor(8, 1)})


def test_a_full_difference_becomes_lora_of_full_rank_exactly() -> None:
    entry = replace(
        entry_of("full", "unet", CONV, (3, 3), diff=tensor(8, 4, 3, 3)), scale=Scale(None, 1, "none", "not applicable")
    )
    made = planned(adapter_of([entry]), "diffusers").adapter
    assert made.entries[("unet", CONV)].scale.rank == 8
    np.testing.assert_array_equal(made.deltas()[entry.name], entry.factors["diff"].read())


def test_small_half_precision_values_keep_their_bits_when_folded() -> None:
    """dialects.md §4.8: all of the scale in one factor would push it below float16's normal range."""
    entry = lora_entry("unet", QUERY, 8, 8, rank=4, alpha=2.0**-12, dtype="float16")
    made = planned(adapter_of([entry]), "diffusers-legacy").adapter.entries[("unet", QUERY)]
    naive = (entry.factors["up"].read() * np.float16(2.0**-14)).astype(np.float64) @ entry.factors[
        "down"
    ].read().astype(np.float64)
    ours = relative_error(expected_delta(entry), delta(made))
    assert ours < relative_error(expected_delta(entry), naive) and ours < 1e-5
    smallest = np.float64(np.finfo(np.float16).tiny)
    assert min(np.median(np.abs(made.factors[name].read().astype(np.float64))) for name in ("up", "down")) > smallest


@pytest.mark.parametrize(
    "module, component",
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out", "unet"),
        ("lora_unet__down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", "unet"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0_", "unet"),
        ("lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", "unet"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out", "unet"),
        ("lora_te_encoder_layers_0_self_attn_out_proj", "text_encoder"),
        ("lora_te1_text_model_encoder_layers_0_self_attn_out_proj", "text_encoder"),
    ],
)
def test_t38_variants_of_a_key_mean_the_same_module(module: str, component: str) -> None:
    """stable-diffusion.cpp PR#577, dialects.md §3.3: what trainers write beside the usual spelling."""
    wide = {"unet": 320, "text_encoder": 768}[component]
    tensors = {f"{module}.lora_down.weight": tensor(2, wide), f"{module}.lora_up.weight": tensor(wide, 2)}
    state = State(tensors, {}, (), "safetensors")
    adapter = recognise(state)[0].dialect.read(state, Told())
    paths = {
        "unet": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "text_encoder": "text_model.encoder.layers.0.self_attn.out_proj",
    }
    assert list(adapter.entries) == [(component, paths[component])] and not adapter.leftovers


def test_every_row_of_the_list_of_troubles_is_named_by_a_test() -> None:
    """All of dialects.md §9, with its rows b, c and d: in a test's name, or in what it says of itself."""
    rows = {f"T{number}" for number in range(1, 48)} | {"T29b", "T29c", "T29d", "T37b"}
    text = "\n".join(path.read_text("utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    functions = "".join(re.findall(r"def test(_\w+)", text))
    told = set(re.findall(r"\bT\d+[bcd]?\b", text.replace(Path(__file__).read_text("utf-8"), "")))
    named = told | {f"T{row}" for row in re.findall(r"_t(\d+[bcd]?)(?=_)", functions)}
    assert rows <= named, sorted(rows - named)
