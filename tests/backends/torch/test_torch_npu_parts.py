"""The parts that stand in on an NPU, computed on the cpu: attention islands, fused attention, fused AdamW."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import attention_lora, batch_of, plan_of
from planted_torch_npu import planted

from persona.core.training.plan import LowRank, Weights
from persona.core.training.plan import Optimizer as Options
from persona.plugins.backends.shared.trainables import Group
from persona.plugins.backends.torch import npu
from persona.plugins.backends.torch.attention import AttentionWith, full_precision_attention, substitute_attention
from persona.plugins.backends.torch.device import Device
from persona.plugins.backends.torch.optimizer import Optimizer


class Npu(Device):
    """A device that says it is an NPU; its tensors are the cpu's."""

    kind = "npu"
    fused_adamw = False


NPU = Npu(torch.device("cpu"))


def heads(width: int, tokens: int = 7, factor: float = 1.0, dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(width)
    made = [torch.randn(2, 3, count, width, generator=generator) * factor for count in (tokens, 5, 5)]
    return [each.to(dtype) for each in made]


def test_npu_attention_in_full_precision_is_attention() -> None:
    query, key, value = heads(16)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(full_precision_attention(query, key, value, 16**-0.5), expected)


def test_npu_attention_in_full_precision_survives_what_overflows_in_fp16() -> None:
    query, key, value = heads(64, factor=120.0, dtype=torch.float16)
    assert not torch.isfinite(query @ key.transpose(-1, -2)).all(), "plain fp16 scores do overflow here"
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    with torch.autocast("cpu", dtype=torch.float16):
        found = full_precision_attention(query, key, value, 64**-0.5)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=0.1)  # values around 120


@pytest.mark.parametrize("width", [40, 64, 80])
def test_npu_fused_attention_gets_widths_it_knows_and_is_attention(width: int) -> None:
    query, key, value = heads(width, dtype=torch.bfloat16)
    with planted() as calls:
        found = npu.flash_attention(query, key, value, width**-0.5)
    assert calls["npu_fusion_attention"] == 1
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert found.shape == query.shape
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_npu_attention_in_a_denoiser_gives_what_diffusers_gives(kind: str, narrow: Any, opened: Any) -> None:
    base = narrow(kind)
    plan = plan_of(attention_lora(base))
    usual, other = opened(base, plan), opened(base, plan)
    other._components["unet"].set_attn_processor(AttentionWith(full_precision_attention))
    losses = [session.accumulate(batch_of(base)) for session in (usual, other)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    for name, value in usual._optimizer.names.items():
        torch.testing.assert_close(other._optimizer.names[name].grad, value.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("bf16", "precision", "product", "note"),
    [
        (True, "fp32", None, ""),
        (True, "fp16", npu.flash_attention, "npu_fusion_attention"),
        (True, "bf16", npu.flash_attention, "npu_fusion_attention"),
        (False, "fp16", full_precision_attention, "computed in fp32"),
    ],
)
def test_npu_attention_is_chosen_by_what_is_there(
    bf16: bool, precision: str, product: Any, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Denoiser(torch.nn.Module):
        processor: Any = None

        def set_attn_processor(self, processor: Any) -> None:
            self.processor = processor

    monkeypatch.setattr(npu, "has_bf16", lambda: bf16)
    denoiser = Denoiser()
    with planted():
        assert note in (substitute_attention(denoiser, NPU, precision) or "")
    assert getattr(denoiser.processor, "product", None) is product
    assert substitute_attention(Denoiser(), Device(torch.device("cpu")), "fp16") == ""


def groups(dtype: Any = torch.float32) -> list[Group]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (5,), (2, 2))]
    plus = LowRank("unet", ("c",), 1, 1.0, 1.0, up_rate_ratio=2.0)
    return [Group(Weights("unet", 1.0), {"a": made[0], "b": made[1]}), Group(plus, {"c.up": made[2]})]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_npu_fused_adamw_is_torchs_adamw_also_when_resumed(precision: str, max_norm: float) -> None:
    options = Options(weight_decay=0.1, beta1=0.8, beta2=0.95)
    with planted() as calls:
        usual, fused = Optimizer(groups(), options, Device(torch.device("cpu")), precision), None
        fused = Optimizer(groups(), options, NPU, precision)
        assert fused.note == "npu: AdamW and clipping are torch_npu's NpuFusedAdamW" and not usual.note
        for step in range(8):
            norms = []
            for one in (usual, fused):
                generator = torch.Generator().manual_seed(step)
                for _ in range(2):  # gradients add up
                    pulled = [torch.randn(value.shape, generator=generator) * value for value in one.names.values()]
                    one.backward(sum(each.sum() for each in pulled))
                norms.append(one.update([1e-2, 3e-2], max_norm))
            assert norms[0] == (pytest.approx(norms[1][0], rel=1e-5), norms[1][1])
            for name, value in usual.names.items():
                torch.testing.assert_close(fused.names[name], value, rtol=1e-6, atol=1e-6)
            if step in (2, 5):  # what is kept is the same, and each goes on from the other's
                kept = [copy.deepcopy(one.state()) for one in (usual, fused)]
                assert kept[0].keys() == kept[1].keys()
                usual.load_state(kept[1])
                fused.load_state(kept[0])
        assert calls["step"] == calls["clip"] == 8


def test_npu_fused_adamw_leaves_everything_alone_when_a_gradient_overflows() -> None:
    with planted():
        fused = Optimizer(groups(), Options(), NPU, "fp16")
        fused.backward(sum(value.sum() for value in fused.names.values()))
        fused.update([1e-2, 1e-2], 1.0)
        before = {name: value.detach().clone() for name, value in fused.names.items()}
        fused.backward(next(iter(fused.names.values())).sum() * float("inf"))
        assert fused.update([1e-2, 1e-2], 1.0)[1] is True
        assert all(torch.equal(before[name], value) for name, value in fused.names.items())
        fused.backward(sum(value.sum() for value in fused.names.values()))
        assert fused.update([1e-2, 1e-2], 1.0)[1] is False, "the gradients were set to zero"


def test_npu_without_the_fused_optimizer_says_why_and_takes_torchs() -> None:
    with planted(optim=False):
        plain = Optimizer(groups(), Options(), NPU, "fp32")
    assert plain.note == "npu: AdamW and clipping are torch's own, the slower way: torch_npu.optim is not installed"
    assert isinstance(plain._inner, torch.optim.AdamW)
    assert npu.fused_adamw() == (None, "torch_npu is not installed")
