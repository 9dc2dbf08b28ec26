"""What stands beside up and down, a bias, a difference of the bias, LyCORIS' scalar: it goes along or is refused, and
is never lost on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from persona.core.adapters.conversion import plan
from persona.core.adapters.delta import bias_delta, delta
from persona.core.adapters.entry import Entry, Scale
from persona.core.adapters.expansion import as_lora
from persona.core.adapters.merge import merge
from persona.core.adapters.slots import LYCORIS, Slots
from persona.core.adapters.splitting import join
from persona.core.adapters.svd import truncate
from persona.core.adapters.tensor import BFLOAT16, in_memory
from persona.core.host.errors import ConversionError
from tests.formats.dialects.written import adapter_of, lora_entry

QUERY = "transformer_blocks.0.attn.to_q"
QKV = "transformer_blocks.0.attn.[to_q,to_k,to_v]"
NAMES = ("to_q", "to_k", "to_v")
RNG = np.random.default_rng(31)


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def with_factors(entry: Entry, **more: Any) -> Entry:
    return replace(entry, factors={**entry.factors, **{name: in_memory(value) for name, value in more.items()}})


def projection(name: str, **more: Any) -> Entry:
    return with_factors(lora_entry("transformer", QUERY.replace("to_q", name), 8, 8, alpha=1.0), **more)


def product(algorithm: Any) -> Entry:
    sizes = {"loha": {f"w{k}_{side}": (8, 2) if side == "a" else (2, 8) for k in "12" for side in "ab"}}
    shapes = sizes.get(algorithm, {"w1": (2, 2), "w2": (4, 4)})
    factors = {name: in_memory(numbers(*shape)) for name, shape in shapes.items()}
    return Entry("unet", "mid_block.attentions.0.proj_in", algorithm, factors, Scale(1.0, 2))


def test_a_difference_of_the_bias_is_joined_with_zeros_where_a_part_has_none() -> None:
    shifts = {"to_q": numbers(8), "to_v": numbers(8)}
    parts = [projection(name, **({"diff_b": shifts[name]} if name in shifts else {})) for name in NAMES]
    whole = join(parts, QKV)
    np.testing.assert_array_equal(bias_delta(whole), np.concatenate([shifts["to_q"], np.zeros(8), shifts["to_v"]]))
    np.testing.assert_allclose(delta(whole), np.concatenate([delta(part) for part in parts]), rtol=1e-6)


@pytest.mark.parametrize("names", [("diff", "diff_b"), ("diff_b",)])
def test_stored_differences_are_joined_with_those_of_their_biases(names: tuple[str, ...]) -> None:
    parts = []
    for name in NAMES:
        factors = {key: in_memory(numbers(8, 8) if key == "diff" else numbers(8)) for key in names}
        parts.append(Entry("transformer", QUERY.replace("to_q", name), "full", factors, Scale(None, 1, "none")))
    whole = join(parts, QKV)
    for key in names:
        np.testing.assert_array_equal(whole.factors[key], np.concatenate([np.asarray(p.factors[key]) for p in parts]))


def test_a_trained_bias_is_refused_where_rows_are_joined() -> None:
    parts = [replace(projection(name), bias=in_memory(numbers(8))) for name in NAMES]
    with pytest.raises(ConversionError, match="trained bias"):
        join(parts, QKV)


def test_scalars_and_dtypes_of_joined_parts_count() -> None:
    parts = [projection(name, scalar=np.float32(2 + n)) for n, name in enumerate(NAMES)]
    narrow = {name: in_memory(np.asarray(ref).astype(BFLOAT16)) for name, ref in parts[0].factors.items()}
    parts[0] = replace(parts[0], factors=narrow)
    whole = join(parts, QKV)
    assert all(np.asarray(ref).dtype == ref.dtype for ref in whole.factors.values())
    np.testing.assert_allclose(delta(whole), np.concatenate([delta(part) for part in parts]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_the_scalar_multiplies_whatever_the_algorithm_and_goes_into_alpha(algorithm: str) -> None:
    plain = projection("to_q") if algorithm == "lora" else product(algorithm)
    entry = with_factors(plain, scalar=np.float32(3))
    np.testing.assert_allclose(delta(entry), 3 * delta(plain), rtol=1e-6)
    made = plan(adapter_of([entry]), Slots(alpha="header"), "target")
    made.demand()
    (written,) = made.adapter.entries.values()
    assert set(written.factors) == {"up", "down"} and "fold" in {step.action for step in made.steps}
    np.testing.assert_allclose(delta(written), 3 * delta(plain), rtol=1e-5, atol=1e-6)
    kept = plan(adapter_of([entry]), Slots(algorithms=LYCORIS, alpha="module", tucker=True), "target")
    assert "scalar" in next(iter(kept.adapter.entries.values())).factors


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_a_difference_of_the_bias_beside_a_product_is_kept_or_refused(algorithm: str) -> None:
    shift = numbers(8)
    entry = with_factors(product(algorithm), diff_b=shift)
    np.testing.assert_array_equal(bias_delta(as_lora(entry)), shift)
    assert [step.cost for step in plan(adapter_of([entry]), Slots(), "target").refusals] == ["refused"]


def test_a_difference_of_the_bias_is_added_up_when_adapters_are() -> None:
    shifts = [numbers(8), numbers(8)]
    adapters = [adapter_of([projection("to_q", diff_b=shift)]) for shift in shifts]
    (entry,) = merge([(adapters[0], 0.5), (adapters[1], -1.0)]).entries.values()
    np.testing.assert_allclose(bias_delta(entry), 0.5 * shifts[0] - shifts[1], rtol=1e-6)


def test_a_lower_rank_leaves_the_biases_as_strong_as_they_were() -> None:
    entry = replace(projection("to_q", diff_b=numbers(8)), bias=in_memory(numbers(8)))
    assert entry.scale.value != 1
    np.testing.assert_allclose(bias_delta(truncate(entry, 1).entry), bias_delta(entry), rtol=1e-6)


def test_glora_of_a_convolution_multiplies_its_channels() -> None:
    """LyCORIS modules/glora.py, make_weight, written out in loops' order."""
    base = RNG.standard_normal((6, 4, 3, 3))
    values = {
        "a1": numbers(4, 2, 1, 1),
        "a2": numbers(2, 4, 1, 1),
        "b1": numbers(6, 2, 1, 1),
        "b2": numbers(2, 4, 3, 3),
    }
    factors = {name: in_memory(value) for name, value in values.items()}
    entry = Entry("unet", "conv_in", "glora", factors, Scale(1.0, 2), kernel=(3, 3))
    wanted = np.zeros_like(base)
    for y in range(3):
        for x in range(3):
            turned = base[:, :, y, x] @ values["a1"][:, :, 0, 0] @ values["a2"][:, :, 0, 0]
            wanted[:, :, y, x] = 0.5 * (turned + values["b1"][:, :, 0, 0] @ values["b2"][:, :, y, x])
    np.testing.assert_allclose(delta(entry, base), wanted, rtol=1e-5, atol=1e-6)
