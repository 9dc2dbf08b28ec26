"""Everything a session does, on a simulated NPU: the results are the cpu's, and a tensor left behind is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def seen(narrow: Any) -> Any:
    """What `npu_run.py` printed. A process of its own, since a device once registered stays."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE)])}
    command = [sys.executable, str(HERE / "npu_run.py"), str(narrow("sd1").path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["low rank", "decomposed", "whole weights", "new tokens"])
def test_npu_results_are_those_of_the_cpu(what: str, seen: Any) -> None:
    differences = seen["differences"][what]
    assert differences["losses"] < 1e-4 and differences["text"] < 1e-4 and differences["moments"] < 1e-4
    assert [value <= 1 for name, value in differences.items() if name.startswith("picture")] == [True], "levels of 255"
    assert max(value for name, value in differences.items() if name.startswith(("value/", "ema/"))) < 5e-4


def test_npu_refuses_a_tensor_left_on_the_cpu(seen: Any) -> None:
    assert "expected all tensors on npu:0" in seen["stray"] and "layer_norm" in seen["stray"]


def test_npu_with_torch_npu_trains_as_the_cpu_does(seen: Any) -> None:
    found = seen["torch_npu"]
    assert max(value for name, value in found["differences"].items() if name.startswith(("value/", "ema/"))) < 5e-4
    assert found["differences"]["losses"] < 1e-4 and found["fused steps"] == 2
    assert found["capabilities"]["fused_adamw"] and found["capabilities"]["flash_attention"]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp16 on a 910"])
def test_npu_in_half_precision_is_near_full_precision_and_says_what_it_takes(precision: str, seen: Any) -> None:
    half, full = seen["torch_npu"][precision], seen["torch_npu"]["full"]
    assert half["losses"] == pytest.approx(full["losses"], rel=0.05) and half["norm"] == pytest.approx(
        full["norm"], rel=0.1
    )
    assert half["mean"] == pytest.approx(full["mean"], abs=4) and not half["skipped"]
    first = "npu_fusion_attention" if precision != "fp16 on a 910" else "attention scores are computed in fp32"
    assert [any(words in note for note in half["notes"]) for words in (first, "NpuFusedAdamW")] == [True, True]
    assert full["notes"] == []


def test_npu_of_the_first_generation_has_neither_bf16_nor_fused_attention(seen: Any) -> None:
    found = seen["torch_npu"]
    assert found["fused attentions"] > 0 == found["fused attentions on a 910"]
    assert "cannot compute in bf16" in found["bf16 on a 910"] and "--precision" in found["bf16 on a 910"]
    assert [found["capabilities of a 910"][name] for name in ("bf16", "fp16", "flash_attention")] == [
        False,
        True,
        False,
    ]
