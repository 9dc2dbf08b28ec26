"""The planner: which slot leads to which step, at which cost (dialects.md §8)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from persona.core.adapters.conversion import Plan, Wishes, plan
from persona.core.adapters.delta import delta
from persona.core.adapters.entry import Adapter, Embedding, Entry, Scale
from persona.core.adapters.folding import folded, folds_exactly
from persona.core.adapters.fusion import members, row_sizes
from persona.core.adapters.slots import LYCORIS, Slots
from persona.core.adapters.splitting import join, split
from persona.core.adapters.svd import from_difference, rank_for
from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import ConversionError
from tests.formats.dialects.written import adapter_of, expected_delta, lora_entry

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
QKV = "transformer_blocks.0.attn.[to_q,to_k,to_v]"
RNG = np.random.default_rng(17)


def steps(adapter: Adapter, slots: Slots, wishes: Wishes | None = None) -> list[tuple[str, str]]:
    return [(step.action, step.cost) for step in plan(adapter, slots, "target", wishes=wishes).steps]


@pytest.mark.parametrize(
    "alpha, slot, expected",
    [
        (1.0, "module", ("rename", "exact")),
        (None, "none", ("rename", "exact")),
        (2.0, "none", ("rename", "exact")),
        (1.0, "none", ("fold", "exact")),
        (0.7, "none", ("fold", "one rounding")),
    ],
)
def test_alpha_is_kept_where_there_is_a_slot_and_folded_where_there_is_none(
    alpha: float | None, slot: str, expected: tuple[str, str]
) -> None:
    adapter = adapter_of([lora_entry("unet", QUERY, 8, 8, rank=2, alpha=alpha)])
    assert steps(adapter, Slots(alpha=slot)) == [expected]  # type: ignore[arg-type]


def test_a_header_slot_is_there_in_safetensors_alone() -> None:
    assert Slots(alpha="header").within("safetensors").alpha == "header"
    assert Slots(alpha="header").within("paddle").alpha == "none"


@pytest.mark.parametrize(
    "entry, slots, cost",
    [
        (lora_entry("text_encoder", "text_projection", 8, 8), Slots(components=frozenset({"unet"})), "refused"),
        (lora_entry("unet", CONV, 8, 8, kernel=3), Slots(convolution=False), "refused"),
        (lora_entry("unet", QUERY.replace("attn1.to_q", "ff.net.2"), 8, 8), Slots(attention_only=True), "refused"),
        (lora_entry("unet", QUERY, 8, 8, dora="in"), Slots(magnitude=frozenset({"out"})), "needs base"),
        (replace(lora_entry("unet", QUERY, 8, 8), bias=in_memory(np.ones(8))), Slots(), "refused"),
    ],
)
def test_what_has_no_home_is_refused_or_left_out_by_name_when_allowed(entry: Entry, slots: Slots, cost: str) -> None:
    adapter = adapter_of([entry, lora_entry("unet", QUERY.replace("to_q", "to_k"), 8, 8)])
    made = plan(adapter, slots, "target")
    assert [(step.module, step.cost) for step in made.refusals] == [(entry.name, cost)]
    with pytest.raises(ConversionError, match="target cannot hold"):
        made.demand()
    dropped = plan(adapter, slots, "target", wishes=Wishes(drop=True))
    assert dropped.refusals == [] and len(dropped.adapter.entries) == 1
    assert ("drop", "approximate") in [(step.action, step.cost) for step in dropped.steps]


def test_a_switch_for_all_modules_is_not_set_for_some() -> None:
    """PEFT's use_dora: a module without a vector of its own would get ‖W‖ and lose its strength."""
    decomposed = lora_entry("unet", QUERY, 8, 8, dora="out")
    plain = lora_entry("unet", QUERY.replace("to_q", "to_k"), 8, 8, alpha=1.0)
    other = lora_entry("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj", 8, 8)
    adapter = adapter_of([decomposed, plain, other])
    slots = Slots(alpha="config", magnitude=frozenset({"out"}), magnitude_on_all=True)
    made = plan(adapter, slots, "target")
    assert [(step.module, step.cost) for step in made.refusals] == [(plain.name, "needs base")]
    dropped = plan(adapter, slots, "target", wishes=Wishes(drop=True))
    assert not dropped.refusals and len(dropped.adapter.entries) == 2
    base = RNG.standard_normal((8, 8))
    whole = plan(adapter, slots, "target", wishes=Wishes(base={plain.name: base}))
    assert not whole.refusals
    made_up = whole.adapter.entries[("unet", plain.path)]
    assert made_up.magnitude is not None and made_up.magnitude.axis == "out"
    np.testing.assert_allclose(delta(made_up, base), expected_delta(plain), rtol=1e-4, atol=1e-5)
    assert whole.adapter.entries[("text_encoder", other.path)].magnitude is None
    assert not plan(adapter_of([plain, other]), slots, "target").refusals


def test_a_rank_makes_what_would_grow_approximate() -> None:
    factors = {
        name: in_memory(RNG.standard_normal((8, 3) if name.endswith("a") else (3, 8)))
        for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    loha = Entry("unet", QUERY, "loha", factors, Scale(1.5, 3))
    assert steps(adapter_of([loha]), Slots(alpha="module")) == [("expand", "exact")]
    assert steps(adapter_of([loha]), Slots(alpha="module"), Wishes(rank=2)) == [("svd", "approximate")]
    assert steps(adapter_of([loha]), Slots(algorithms=LYCORIS, alpha="module")) == [("rename", "exact")]


def test_words_without_a_place_in_the_file_are_written_beside_it() -> None:
    adapter = adapter_of([lora_entry("unet", QUERY, 8, 8)])
    adapter.embeddings = [Embedding("<cat>", {"text_encoder": in_memory(np.zeros((1, 8)))})]
    assert ("write beside", "exact") in steps(adapter, Slots(embeddings="beside"))
    assert ("write beside", "exact") not in steps(adapter, Slots(embeddings="bundle"))


def test_the_summary_counts_steps_and_the_worst_cost_is_the_plans() -> None:
    adapter = adapter_of(
        [
            lora_entry("unet", QUERY.replace("to_q", f"to_{x}"), 8, 8, alpha=a)
            for x, a in (("q", 0.7), ("k", 0.7), ("v", 2.0))
        ]
    )
    made: Plan = plan(adapter, Slots(), "target")
    assert made.cost == "one rounding"
    assert [(action, cost, number) for action, cost, number, _ in made.summary()] == [
        ("fold", "one rounding", 2),
        ("rename", "exact", 1),
    ]


@pytest.mark.parametrize(
    "scale, exactly", [(1.0, True), (0.25, True), (-2.0, True), (0.0, True), (3.0, False), (0.1, False)]
)
def test_a_power_of_two_folds_exactly(scale: float, exactly: bool) -> None:
    assert folds_exactly(scale) is exactly
    entry = replace(lora_entry("unet", QUERY, 8, 8, rank=1), scale=Scale(scale, 1))
    np.testing.assert_allclose(delta(folded(entry)), scale * delta(replace(entry, scale=Scale(None, 1))), rtol=1e-6)


def test_rows_of_joined_modules() -> None:
    assert members(QKV) == tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
    assert row_sizes("b.0.[attn.to_q,attn.to_k,attn.to_v,proj_mlp]", 21504, 3072) == (3072, 3072, 3072, 12288)
    with pytest.raises(ValueError, match="cannot be divided"):
        row_sizes(QKV, 10, 8)


def test_parts_that_were_never_one_are_joined_block_diagonally_and_come_apart_as_they_were() -> None:
    parts = [
        lora_entry("transformer", f"transformer_blocks.0.attn.to_{x}", 8, 8, rank=n + 1, alpha=float(n + 1), seed=n)
        for n, x in enumerate("qkv")
    ]
    whole = join(parts, QKV)
    assert whole.scale.rank == 6
    np.testing.assert_allclose(delta(whole), np.concatenate([expected_delta(part) for part in parts]), atol=1e-5)
    for part, again in zip(parts, split(whole), strict=True):
        assert again.path == part.path
        for name in ("down", "up"):
            np.testing.assert_array_equal(again.factors[name].read(), part.factors[name].read())


def test_a_missing_part_becomes_rows_of_zeros() -> None:
    part = lora_entry("transformer", "transformer_blocks.0.attn.to_k", 8, 8)
    change = delta(join([part], QKV))
    assert change.shape == (24, 8) and not change[:8].any() and not change[16:].any()
    np.testing.assert_allclose(change[8:16], expected_delta(part), atol=1e-5)


def test_loha_is_divided_by_rows_without_growing() -> None:
    factors = {"w1_a": (24, 2), "w1_b": (2, 8), "w2_a": (24, 2), "w2_b": (2, 8)}
    whole = Entry(
        "transformer", QKV, "loha", {n: in_memory(RNG.standard_normal(s)) for n, s in factors.items()}, Scale(1.0, 2)
    )
    parts = split(whole)
    assert {part.algorithm for part in parts} == {"loha"}
    np.testing.assert_allclose(np.concatenate([delta(part) for part in parts]), delta(whole), rtol=1e-6)


def test_kept_energy_chooses_the_rank() -> None:
    assert rank_for(np.array([3.0, 4.0, 0.0]), 0.36) == 1
    assert rank_for(np.array([4.0, 3.0]), 0.64) == 1
    assert rank_for(np.array([4.0, 3.0]), 0.65) == 2
    change = np.diag([4.0, 3.0, 0.0])
    assert from_difference(lora_entry("unet", QUERY, 3, 3), change, energy=0.6).entry.scale.rank == 1


def test_a_spelling_that_belongs_to_one_family_refuses_the_others() -> None:
    adapter = adapter_of([lora_entry("unet", QUERY, 8, 8)], "sd1")
    made = plan(adapter, Slots(families=frozenset({"sdxl", "kolors"})), "target")
    assert made.refusals[0].detail == "it holds kolors/sdxl adapters, and this is one of sd1"
    assert plan(replace(adapter, family="sdxl"), Slots(families=frozenset({"sdxl"})), "target").refusals == []
