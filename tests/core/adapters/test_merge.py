"""Σ strength·ΔW, against sums of ΔW that are calculated here."""

from __future__ import annotations

import numpy as np
import pytest

from persona.core.adapters.entry import Adapter, Embedding, Entry, Magnitude, Scale
from persona.core.adapters.merge import merge
from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import ConversionError

QUERY = ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
FLUX = "transformer_blocks.0.attn."


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lora(key: tuple[str, str], rank: int, alpha: float, seed: int, out: int = 6, into: int = 5, dtype=np.float32):
    up, down = numbers(out, rank, seed=seed).astype(dtype), numbers(rank, into, seed=seed + 100).astype(dtype)
    factors = {"up": in_memory(up), "down": in_memory(down)}
    return Entry(*key, "lora", factors, Scale(alpha, rank, "rank", "told")), alpha / rank * (
        up.astype(np.float64) @ down
    )


def one(entry: Entry, **more) -> Adapter:
    return Adapter("sd1", {(entry.component, entry.path): entry}, families=frozenset({"sd1"}), **more)


def test_the_sum_of_two_is_the_weighted_sum_of_their_deltas():
    (first, change), (second, other) = lora(QUERY, 2, 1.0, 1), lora(QUERY, 3, 6.0, 2)
    merged = merge([(one(first), 0.7), (one(second), -1.5)])
    assert merged.entries[QUERY].scale.rank == 5
    np.testing.assert_allclose(merged.deltas()["unet." + QUERY[1]], 0.7 * change - 1.5 * other, atol=1e-6)


def test_factors_are_not_averaged():
    """What scripts that average A and B get has cross terms; a sum of opposites would not be zero there."""
    first, _ = lora(QUERY, 2, 2.0, 1)
    merged = merge([(one(first), 1.0), (one(first), -1.0)])
    np.testing.assert_allclose(merged.deltas()["unet." + QUERY[1]], np.zeros((6, 5)), atol=1e-6)


def test_a_strength_of_one_adapter_goes_into_alpha_and_leaves_the_bits_alone():
    first, change = lora(QUERY, 2, 1.0, 1, dtype=np.float16)
    merged = merge([(one(first), 0.3)])
    entry = merged.entries[QUERY]
    assert entry.factors["up"] is first.factors["up"]
    np.testing.assert_allclose(merged.deltas()["unet." + QUERY[1]], 0.3 * change, rtol=1e-6)


def test_equal_scales_are_kept_so_half_precision_is_not_rounded():
    (first, change), (second, other) = (
        lora(QUERY, 2, 1.0, 1, dtype=np.float16),
        lora(QUERY, 4, 2.0, 2, dtype=np.float16),
    )
    merged = merge([(one(first), 1.0), (one(second), 1.0)])
    assert merged.entries[QUERY].factors["up"].dtype == np.float16
    np.testing.assert_allclose(merged.deltas()["unet." + QUERY[1]], change + other, rtol=1e-6, atol=1e-6)


def test_a_joined_module_and_its_parts_meet_as_parts():
    joined, change = lora(("transformer", FLUX + "[to_q,to_k,to_v]"), 2, 2.0, 1, out=12, into=4)
    part, other = lora(("transformer", FLUX + "to_k"), 2, 2.0, 2, out=4, into=4)
    first = Adapter("flux1", {(joined.component, joined.path): joined}, families=frozenset({"flux1"}))
    second = Adapter("flux1", {(part.component, part.path): part}, families=frozenset({"flux1"}))
    deltas = merge([(first, 1.0), (second, 1.0)]).deltas()
    np.testing.assert_allclose(deltas[f"transformer.{FLUX}to_q"], change[:4], atol=1e-6)
    np.testing.assert_allclose(deltas[f"transformer.{FLUX}to_k"], change[4:8] + other, atol=1e-6)


def test_a_loha_and_a_lora_add_up():
    first, change = lora(QUERY, 2, 2.0, 1)
    halves = {name: numbers(*shape, seed=n) for n, (name, shape) in enumerate(
        {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (6, 2), "w2_b": (2, 5)}.items())}  # fmt: skip
    loha = Entry(*QUERY, "loha", {name: in_memory(v) for name, v in halves.items()}, Scale(1.0, 2, "rank", "told"))
    other = 0.5 * (halves["w1_a"] @ halves["w1_b"]) * (halves["w2_a"] @ halves["w2_b"])
    merged = merge([(one(first), 1.0), (one(loha), 2.0)])
    np.testing.assert_allclose(merged.deltas()["unet." + QUERY[1]], change + 2 * other, atol=1e-5)


def test_a_stored_difference_takes_the_others_in():
    first, change = lora(QUERY, 2, 2.0, 1)
    stored = numbers(6, 5, seed=9)
    full = Entry(*QUERY, "full", {"diff": in_memory(stored)}, Scale(None, 1, "none", "not applicable"))
    merged = merge([(one(first), 0.5), (one(full), 3.0)])
    np.testing.assert_allclose(merged.deltas()["unet." + QUERY[1]], 0.5 * change + 3 * stored, atol=1e-5)


def test_biases_are_scaled_as_peft_scales_them():
    (first, _), (second, _) = lora(QUERY, 2, 1.0, 1), lora(QUERY, 2, 4.0, 2)
    from dataclasses import replace

    from persona.core.adapters.delta import bias_delta

    biases = numbers(6, seed=5), numbers(6, seed=6)
    first, second = replace(first, bias=in_memory(biases[0])), replace(second, bias=in_memory(biases[1]))
    merged = merge([(one(first), 1.0), (one(second), 0.5)])
    np.testing.assert_allclose(bias_delta(merged.entries[QUERY]), 0.5 * biases[0] + 0.5 * 2 * biases[1], atol=1e-6)


def test_dora_is_refused_and_named_not_a_crash():
    """supermerger#373: a KeyError."""
    first, _ = lora(QUERY, 2, 1.0, 1)
    dora = Entry(*QUERY, "lora", first.factors, first.scale, Magnitude(in_memory(numbers(6, seed=3)), "out"))
    with pytest.raises(ConversionError, match=r"attn1\.to_q: what DoRA adds depends on the base"):
        merge([(one(first), 1.0), (one(dora), 1.0)])


def test_adapters_of_different_families_are_refused():
    first, _ = lora(QUERY, 2, 1.0, 1)
    other = Adapter("sdxl", {QUERY: first}, families=frozenset({"sdxl"}))
    with pytest.raises(ConversionError, match="sd1 and sdxl"):
        merge([(one(first), 1.0), (other, 1.0)])


def test_one_word_with_two_meanings_is_refused():
    first, _ = lora(QUERY, 2, 1.0, 1)
    words = [Embedding("<cat>", {"text_encoder": in_memory(numbers(1, 4, seed=n))}) for n in (1, 2)]
    assert (
        len(merge([(one(first, embeddings=[words[0]]), 1.0), (one(first, embeddings=[words[0]]), 1.0)]).embeddings) == 1
    )
    with pytest.raises(ConversionError, match="<cat> is in two adapters"):
        merge([(one(first, embeddings=[words[0]]), 1.0), (one(first, embeddings=[words[1]]), 1.0)])
