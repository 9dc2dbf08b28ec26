"""The oracle against sums written out index by index (dialects.md §4)."""

from __future__ import annotations

import numpy as np
import pytest

from persona.core.adapters.delta import bias_delta, delta
from persona.core.adapters.entry import Entry, Magnitude, Scale
from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import ConversionError

RNG = np.random.default_rng(7)


def entry(algorithm: str, scale: Scale | None = None, **factors: np.ndarray) -> Entry:
    made = {name: in_memory(value) for name, value in factors.items()}
    return Entry("unet", "m", algorithm, made, scale or Scale(None, 1))  # type: ignore[arg-type]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def test_lora_is_scaled_by_alpha_over_rank() -> None:
    down, up = normal(2, 3), normal(4, 2)
    by_hand = [[1.5 * sum(up[i, k] * down[k, j] for k in range(2)) for j in range(3)] for i in range(4)]
    np.testing.assert_allclose(delta(entry("lora", Scale(3.0, 2), down=down, up=up)), by_hand, rtol=1e-6, atol=1e-6)


def test_rank_stabilised_lora_is_scaled_by_alpha_over_the_root_of_rank() -> None:
    down, up = normal(4, 3), normal(5, 4)
    stabilised = delta(entry("lora", Scale(3.0, 4, "sqrt_rank"), down=down, up=up))
    np.testing.assert_allclose(stabilised, 1.5 * np.tensordot(up, down, 1), rtol=1e-6, atol=1e-6)


def test_a_convolution_has_the_kernel_of_its_down_factor() -> None:
    down, up = normal(2, 3, 3, 3), normal(4, 2, 1, 1)
    made = delta(entry("lora", down=down, up=up))
    assert made.shape == (4, 3, 3, 3)
    assert made[1, 2, 0, 1] == pytest.approx(sum(up[1, k, 0, 0] * down[k, 2, 0, 1] for k in range(2)), rel=1e-5)


def test_tucker_lora_contracts_the_middle_factor() -> None:
    """T14, diffusers#11943."""
    down, mid, up = normal(2, 3, 1, 1), normal(2, 2, 3, 3), normal(4, 2, 1, 1)
    made = delta(entry("lora", down=down, mid=mid, up=up))
    by_hand = sum(up[1, m, 0, 0] * mid[m, n, 2, 0] * down[n, 1, 0, 0] for m in range(2) for n in range(2))
    assert made[1, 1, 2, 0] == pytest.approx(by_hand, rel=1e-5)


def test_loha_multiplies_two_products_elementwise_and_scales_once() -> None:
    """T21: LyCORIS' merge applies the scale twice, its forward pass once."""
    a, b, c, d = normal(4, 2), normal(2, 3), normal(4, 2), normal(2, 3)
    made = delta(entry("loha", Scale(1.0, 2), w1_a=a, w1_b=b, w2_a=c, w2_b=d))
    by_hand = 0.5 * sum(a[3, k] * b[k, 1] for k in range(2)) * sum(c[3, k] * d[k, 1] for k in range(2))
    assert made[3, 1] == pytest.approx(by_hand, rel=1e-5)


def test_tucker_loha_has_its_first_factors_transposed() -> None:
    """T15, onnx-web#312."""
    factors = {"t1": normal(2, 2, 3, 3), "w1_a": normal(2, 4), "w1_b": normal(2, 5)}
    factors |= {"t2": normal(2, 2, 3, 3), "w2_a": normal(2, 4), "w2_b": normal(2, 5)}
    made = delta(entry("loha", **factors))

    def half(k: int) -> float:
        t, a, b = factors[f"t{k}"], factors[f"w{k}_a"], factors[f"w{k}_b"]
        return float(sum(t[m, n, 1, 2] * a[m, 3] * b[n, 4] for m in range(2) for n in range(2)))

    assert made.shape == (4, 5, 3, 3)
    assert made[3, 4, 1, 2] == pytest.approx(half(1) * half(2), rel=1e-5)


def test_lokr_is_a_kronecker_product() -> None:
    w1, a, b = normal(2, 2), normal(3, 1), normal(1, 4)
    made = delta(entry("lokr", Scale(2.0, 1), w1=w1, w2_a=a, w2_b=b))
    np.testing.assert_allclose(made, 2 * np.kron(w1, a @ b), rtol=1e-6, atol=1e-6)


def test_a_lokr_convolution_unfolds_its_flattened_kernel() -> None:
    w1, a, b = normal(2, 2), normal(3, 1), normal(1, 4 * 9)
    flat = Entry(
        "unet",
        "m",
        "lokr",
        {n: in_memory(v) for n, v in (("w1", w1), ("w2_a", a), ("w2_b", b))},
        Scale(None, 1),
        kernel=(3, 3),
    )
    made = delta(flat)
    assert made.shape == (6, 8, 3, 3)
    assert made[4, 5, 2, 1] == pytest.approx(w1[1, 1] * a[1, 0] * b[0].reshape(4, 3, 3)[1, 2, 1], rel=1e-5)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_gives_every_kept_line_the_length_of_its_magnitude(axis: str) -> None:
    """T19, Comfy PR#15458: the norm is that of W + ΔW, not of W."""
    base, down, up, vector = normal(4, 3), normal(2, 3), normal(4, 2), np.abs(normal(4 if axis == "out" else 3))
    plain = entry("lora", Scale(1.0, 2), down=down, up=up)
    decomposed = Entry("unet", "m", "lora", plain.factors, plain.scale, Magnitude(in_memory(vector), axis))  # type: ignore[arg-type]
    merged = base + delta(decomposed, base)
    lengths = np.linalg.norm(merged, axis=1 if axis == "out" else 0)
    np.testing.assert_allclose(lengths, vector, rtol=1e-5, atol=1e-6)
    direction = base + 0.5 * up @ down
    cosine = (merged * direction).sum(axis=1 if axis == "out" else 0)
    np.testing.assert_allclose(
        cosine, lengths * np.linalg.norm(direction, axis=1 if axis == "out" else 0), rtol=1e-5, atol=1e-6
    )


def test_dora_without_the_base_weight_says_what_is_missing() -> None:
    decomposed = Entry(
        "unet",
        "m",
        "lora",
        {"down": in_memory(normal(2, 3)), "up": in_memory(normal(4, 2))},
        Scale(None, 2),
        Magnitude(in_memory(normal(4)), "out"),
    )
    with pytest.raises(ConversionError, match="base model's weight"):
        delta(decomposed)


def test_a_difference_is_added_as_it_is_stored() -> None:
    stored = normal(4, 3)
    np.testing.assert_array_equal(delta(entry("full", Scale(5.0, 1), diff=stored)), stored.astype(np.float32))


def test_ia3_scales_outputs_or_inputs() -> None:
    base, out, into = normal(4, 3), normal(4), normal(3)
    np.testing.assert_allclose(
        delta(entry("ia3", weight=out, on_input=np.array(0.0)), base)[2], base[2] * out[2], rtol=1e-6
    )
    np.testing.assert_allclose(
        delta(entry("ia3", weight=into, on_input=np.array(1.0)), base)[:, 1], base[:, 1] * into[1], rtol=1e-6
    )


def test_glora_adds_a_product_and_a_product_of_the_base() -> None:
    base, a1, a2, b1, b2 = normal(4, 3), normal(3, 2), normal(2, 3), normal(4, 2), normal(2, 3)
    made = delta(entry("glora", Scale(1.0, 2), a1=a1, a2=a2, b1=b1, b2=b2), base)
    by_hand = 0.5 * (np.einsum("ir,rj->ij", b1, b2) + np.einsum("ik,kr,rj->ij", base, a1, a2))
    np.testing.assert_allclose(made, by_hand, rtol=1e-5, atol=1e-6)


def test_a_lora_bias_is_scaled_and_a_bias_difference_is_not() -> None:
    lora = Entry(
        "unet",
        "m",
        "lora",
        {"down": in_memory(normal(2, 3)), "up": in_memory(normal(4, 2))},
        Scale(1.0, 2),
        bias=in_memory(np.ones(4)),
    )
    full = entry("full", diff=normal(4, 3), diff_b=np.ones(4))
    assert list(bias_delta(lora)) == [0.5] * 4  # type: ignore[arg-type]
    assert list(bias_delta(full)) == [1.0] * 4  # type: ignore[arg-type]
