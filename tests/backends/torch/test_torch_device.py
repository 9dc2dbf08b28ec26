"""Devices, precisions and memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import attention_lora, batch_of, plan_of

from persona.core.host.contracts import SampleRequest
from persona.core.host.errors import BackendMissing, TrainingError, UsageError
from persona.plugins.backends.shared.loss_scale import GROWTH_INTERVAL, LossScale
from persona.plugins.backends.shared.memory import memory_errors
from persona.plugins.backends.torch import TorchBackend
from persona.plugins.backends.torch.device import capabilities, find_device, present_devices


def test_looking_whether_the_backend_is_there_imports_no_framework() -> None:
    code = (
        "import sys; from persona.plugins.backends.torch import TorchBackend; found = TorchBackend().availability(); "
        "assert found.available and found.version; "
        "print([name for name in ('torch', 'diffusers', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_session_imports_no_pipeline_and_says_nothing(narrow: Any) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.narrow_models import narrow_base\n"
        "from persona.core.host.contracts import Runtime; from persona.plugins.backends.torch import TorchBackend\n"
        f"TorchBackend().open(narrow_base('sd1', Path({str(narrow('sd1').path)!r})), None, Runtime('cpu'))\n"
        "print([name for name in sys.modules if name.startswith('diffusers.pipelines.') or name == 'torchvision'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("peft", "diffusers") else real(name))
    found = TorchBackend().availability()
    assert (found.available, found.reason) == (False, "not installed: diffusers, peft")
    assert found.hint == "pip install 'persona[torch]'"
    with pytest.raises(BackendMissing, match="diffusers, peft"):
        TorchBackend().capabilities("cpu")


def test_the_cpu_is_always_there_and_last() -> None:
    assert present_devices()[-1] == "cpu"
    assert find_device("cpu").kind == "cpu"
    assert str(find_device("auto").name) == present_devices()[0]
    assert capabilities(find_device("cpu"))["bf16"]


@pytest.mark.parametrize("name", ["cuda:99", "npu:99"])
def test_a_device_that_is_not_there_is_refused_and_those_that_are_named(name: str) -> None:
    with pytest.raises(BackendMissing, match=f"{name} was asked for, and here there is only .*cpu") as refused:
        find_device(name)
    assert refused.value.hint.startswith("Take another one: --device ")


@pytest.mark.parametrize("name", ["gpu", "cuda:first", "cpu:x", ""])
def test_a_device_nobody_knows_is_bad_use(name: str) -> None:
    with pytest.raises(UsageError, match="no device called"):
        find_device(name)


def test_running_out_of_memory_says_what_to_lower() -> None:
    with pytest.raises(TrainingError, match="Out of memory") as refused, memory_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "--batch" in refused.value.hint and "--gradient-checkpointing" in refused.value.hint
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_half_precision_is_near_full_precision(kind: str, precision: str, narrow: Any, opened: Any) -> None:
    base = narrow(kind)
    full, half = (opened(base, plan_of(attention_lora(base), precision=p)) for p in ("fp32", precision))
    for step in range(2):
        expected, losses = (session.accumulate(batch_of(base, seed=step)) for session in (full, half))
        np.testing.assert_allclose(losses, expected, rtol=0.05)
        norms = [session.update([1e-3], 1.0) for session in (full, half)]
        assert norms[1][0] == pytest.approx(norms[0][0], rel=0.1) and not norms[1][1]
    assert half._components["unet"].conv_in.weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert all(value.dtype == torch.float32 for value in half._optimizer.names.values())
    request = SampleRequest(("a cat",), (1,), steps=2)
    difference = half.sample(request).astype(int) - full.sample(request).astype(int)
    assert np.abs(difference).mean() < 4


def test_an_fp16_overflow_skips_the_update_and_halves_the_scale(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base), precision="fp16"))
    before = session.state()
    session.accumulate(batch_of(base))
    for value in session._optimizer.names.values():
        value.grad.fill_(float("inf"))
    assert session.update([1e-3], 1.0)[1] is True
    after = session.state()
    assert all(np.array_equal(before[name], after[name]) for name in before if name.startswith("value/"))
    assert before["loss_scale"].tolist() == [65536.0, 0.0] and after["loss_scale"].tolist() == [32768.0, 0.0]


def test_the_loss_scale_grows_after_many_good_updates() -> None:
    scale = LossScale(active=True)
    for _ in range(GROWTH_INTERVAL):
        scale.learn(finite=True)
    assert scale.value == 2 * 65536.0
    still = LossScale(active=False)
    for _ in range(GROWTH_INTERVAL):
        still.learn(finite=True)
    assert still.value == 1.0


def test_an_autoencoder_that_overflows_in_fp16_is_read_again_in_fp32(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base), precision="fp16"))
    pictures = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    assert session._components["vae"].dtype == torch.float16
    session._components["vae"].encoder.conv_in.bias.data.fill_(6e4)  # fp16 ends at 65504
    mean, _ = session.encode_pictures(pictures)
    expected, _ = opened(base).encode_pictures(pictures)
    np.testing.assert_array_equal(mean, expected)
    assert session.notes == ["The autoencoder overflowed in fp16, so it runs in fp32 from here on."]


def test_gradient_checkpointing_changes_no_gradient(narrow: Any, opened: Any) -> None:
    from persona.core.training.plan import LowRank

    base = narrow("sd1")
    text = LowRank("text_encoder", ("text_model.encoder.layers.3.mlp.fc1",), 2, 2.0, 1e-3)
    found = []
    for checkpointing in (False, True):
        plan = plan_of(attention_lora(base, dropout=0.2), text, gradient_checkpointing=checkpointing)
        session = opened(base, plan)
        assert session._components["unet"].is_gradient_checkpointing is checkpointing
        session.accumulate(batch_of(base, embeddings={}, captions=("a cat", "a dog")))
        found.append({name: value.grad.numpy().copy() for name, value in session._optimizer.names.items()})
    for name, gradient in found[0].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-6)
