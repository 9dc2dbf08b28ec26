"""LoRA's initial values against what torch and PEFT draw: the same distribution, keyed by seed and name."""

import math

import numpy as np
import pytest
import torch

from persona.core.host.errors import UsageError
from persona.core.training.lora_values import initial_down, initial_factors, initial_up, rate_factor, scale_of
from persona.core.training.plan import LowRank

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("shape", [(64, 320), (16, 40, 3, 3)])
def test_kaiming_has_the_range_and_spread_of_torchs(shape):
    torch.manual_seed(0)
    theirs = torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)).numpy()
    ours = initial_down(0, NAME, shape)
    assert ours.dtype == np.float32 and ours.shape == shape
    assert abs(ours).max() == pytest.approx(abs(theirs).max(), rel=0.01)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.03)
    np.testing.assert_allclose(np.quantile(ours, [0.1, 0.5, 0.9]), np.quantile(theirs, [0.1, 0.5, 0.9]), atol=0.003)


def test_gaussian_has_the_spread_of_pefts():
    """PEFT (tuners/lora/layer.py): nn.init.normal_(lora_A.weight, std=1 / r)."""
    ours = initial_down(0, NAME, (32, 640), "gaussian")
    assert ours.std() == pytest.approx(1 / 32, rel=0.02) and abs(ours.mean()) < 1e-3
    assert abs(ours).max() > 3 / 32  # a normal's tails, not a uniform's


def test_values_belong_to_the_seed_and_the_name():
    first = initial_down(0, NAME, (4, 16))
    np.testing.assert_array_equal(first, initial_down(0, NAME, (4, 16)))
    assert not np.array_equal(first, initial_down(1, NAME, (4, 16)))
    assert not np.array_equal(first, initial_down(0, NAME.replace("to_q", "to_k"), (4, 16)))


def test_golden_values_hold_to_the_last_bit():
    found = initial_down(0, NAME, (2, 2)).astype(">f4").tobytes().hex(" ", 4)
    assert found == "3c38e78b be1e87d6 bf12d2ea 3ec59a56"


def test_up_starts_at_zero():
    up = initial_up((8, 4))
    assert up.shape == (8, 4) and up.dtype == np.float32 and not up.any()


def test_an_unknown_initialisation_is_refused():
    with pytest.raises(UsageError, match="gaussian"):
        initial_down(0, NAME, (4, 16), "gausian")


def test_orthogonal_rows_are_at_right_angles_and_as_long_as_kaimings():
    rows = initial_down(0, NAME, (6, 4, 3, 3), "orthogonal").reshape(6, 36).astype(np.float64)
    np.testing.assert_allclose(rows @ rows.T, np.eye(6) / 3, atol=1e-7)
    kaiming = initial_down(0, NAME, (64, 400)).astype(np.float64)
    assert (kaiming**2).sum(1).mean() == pytest.approx(1 / 3, rel=0.02)
    more = initial_down(0, NAME, (5, 3), "orthogonal").astype(np.float64)
    np.testing.assert_allclose(more[:3] @ more[:3].T, np.eye(3) / 3, atol=1e-7)
    assert np.isfinite(more).all()


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("size", [(10, 14), (14, 10)])
def test_factors_from_the_weight_are_pefts(kind, stabilised, size):
    """PEFT 0.21 itself (tuners/lora/layer.py: pissa_init, olora_init) on the same weight, up to a sign it leaves open;
    what it takes off the weight is what we take off the product."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    module = torch.nn.Linear(*size)
    weight = module.weight.detach().clone().numpy()
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["x"], init_lora_weights=kind, use_rslora=stabilised)
    theirs = inject_adapter_in_model(config, torch.nn.ModuleDict({"x": module}))["x"]
    down, up = (getattr(theirs, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B"))
    part = LowRank("unet", ("x",), 3, 5.0, 1e-3, initialisation=kind, rank_stabilised=stabilised)
    ours = initial_factors(part, "x", weight.shape, lambda: weight, seed=0)
    signs = np.sign((ours[0] * down).sum(1))
    np.testing.assert_allclose(ours[0], signs[:, None] * down, atol=2e-6)
    np.testing.assert_allclose(ours[1], up * signs, atol=2e-6)
    residual = weight - scale_of(part, "x") * ours[1] @ ours[0]
    np.testing.assert_allclose(residual, theirs.base_layer.weight.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_factors_of_a_convolution_are_those_of_its_weight_laid_flat(kind):
    weight = np.random.default_rng(0).standard_normal((6, 4, 3, 3)).astype(np.float32)
    part = LowRank("unet", ("x",), 6, 6.0, 1e-3, initialisation=kind)
    down, up = initial_factors(part, "x", weight.shape, lambda: weight, seed=0)
    assert (down.shape, up.shape) == ((6, 4, 3, 3), (6, 6, 1, 1))
    whole = (up[:, :, 0, 0] @ down.reshape(6, -1)).reshape(weight.shape)
    np.testing.assert_allclose(whole, weight, atol=1e-5)  # at full rank nothing of W is left


def test_drawn_factors_do_not_read_the_weight_and_a_weights_own_do_not_mix_with_dora():
    def unread():
        raise AssertionError("the weight was read")

    down, up = initial_factors(LowRank("unet", ("x",), 2, 2.0, 1e-3), "x", (6, 4), unread, seed=3)
    np.testing.assert_array_equal(down, initial_down(3, "unet.x", (2, 4)))
    assert up.shape == (6, 2) and not up.any()
    part = LowRank("unet", ("x",), 2, 2.0, 1e-3, initialisation="pissa", decomposed=True)
    with pytest.raises(UsageError, match="--dora"):
        initial_factors(part, "x", (6, 4), unread, seed=3)
    with pytest.raises(UsageError, match="this backend"):
        initial_down(0, NAME, (4, 16), "olora")


def test_loraplus_is_the_rate_of_up_alone():
    part = LowRank("unet", ("x",), 2, 2.0, 1e-3, up_rate_ratio=16.0)
    assert [rate_factor(part, name) for name in ("down", "up", "magnitude")] == [1.0, 16.0, 1.0]
