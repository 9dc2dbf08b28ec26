"""Train and paint on the simulated NPU and on the cpu, in a process of its own: prints what differed, as JSON.

python npu_run.py FOLDER_OF_A_NARROW_SD1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import attention_lora, batch_of, plan_of
from planted_torch_npu import planted
from simulated_npu import install

from persona.core.host.contracts import Runtime, SampleRequest
from persona.core.host.errors import PersonaError
from persona.core.training.base import Base
from persona.core.training.plan import NewToken, NewTokens, TrainingPlan, Weights
from persona.plugins.backends.torch import TorchBackend
from tests.narrow_models import narrow_base

CAPTIONS = {"embeddings": {}, "captions": ("a photo of <toy>",)}


def plans(base: Base) -> dict[str, tuple[TrainingPlan, dict[str, Any]]]:
    """One plan for each thing that can be trained, with what its batches have."""
    return {
        "low rank": (plan_of(attention_lora(base, limit=8), ema_decay=0.9), {}),
        "decomposed": (plan_of(attention_lora(base, limit=8, decomposed=True), gradient_checkpointing=True), {}),
        "whole weights": (plan_of(Weights("unet", 1e-4), Weights("text_encoder", 1e-4)), CAPTIONS),
        "new tokens": (plan_of(NewTokens(("text_encoder",), (NewToken("<toy>", "cat", 2),), 1e-3)), CAPTIONS),
    }


def run(base: Base, device: str, plan: TrainingPlan, given: dict[str, Any]) -> dict[str, Any]:
    """Everything a session does, on `device`."""
    session = TorchBackend().open(base, plan, Runtime(device))
    pictures = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    moments = session.encode_pictures(pictures)[0]
    text = session.encode_text(["a cat"])["hidden_states"]
    losses = []
    for step in range(2):
        losses += session.accumulate(batch_of(base, count=1, seed=step, **given)).tolist()
        session.update([1e-3] * len(plan.trains), 1.0)
        if plan.ema_decay is not None:
            session.average(plan.ema_decay)
        session.load_state(session.state())
    request = SampleRequest(("a photo of <toy>",), (1,), steps=2, sampler="euler-a")
    values = {name: value for name, value in session.state().items() if name.startswith(("value/", "ema/"))}
    found = {"moments": moments, "text": text, "losses": np.array(losses)} | values
    if plan.trains[0].kind == "weights":
        found["picture"] = session.sample(request).astype(float)
    else:
        fresh = TorchBackend().open(base, None, Runtime(device))
        fresh.load_adapters([(session.product(), 0.5)])
        found["picture with the adapter"] = fresh.sample(request).astype(float)
    return found


def stray(base: Base) -> str:
    """What happens when the text encoder is forgotten on the cpu."""
    session = TorchBackend().open(base, None, Runtime("npu"))
    session._parking.fetch(["text_encoder"])
    session._components["text_encoder"].final_layer_norm.to("cpu")
    try:
        session.encode_text(["a cat"])
    except RuntimeError as error:
        return str(error)
    return "nothing"


def half(base: Base, device: str, precision: str) -> dict[str, Any]:
    """Losses, gradient norm and notes of a step in a lower precision, and a picture."""
    session = TorchBackend().open(base, plan_of(attention_lora(base, limit=8), precision=precision), Runtime(device))
    losses = session.accumulate(batch_of(base, count=1)).tolist()
    norm, skipped = session.update([1e-3], 1.0)
    picture = session.sample(SampleRequest(("a cat",), (1,), steps=2)).astype(float)
    return {"losses": losses, "norm": norm, "skipped": skipped, "notes": session.notes, "mean": float(picture.mean())}


def refused(base: Base, precision: str) -> str:
    """What is said to a precision."""
    try:
        TorchBackend().open(base, plan_of(attention_lora(base, limit=1), precision=precision), Runtime("npu"))
    except PersonaError as error:
        return str(error)
    return "nothing"


def with_torch_npu(base: Base) -> dict[str, Any]:
    """The same with torch_npu's own attention and optimizer, on a 910B; and what is left of it on a 910."""
    plan, given = plans(base)["low rank"]
    on_cpu = run(base, "cpu", plan, given)
    found: dict[str, Any] = {"full": half(base, "cpu", "fp32")}
    with planted() as calls:
        on_npu = run(base, "npu", plan, given)
        found["differences"] = {key: float(np.abs(on_cpu[key] - on_npu[key]).max()) for key in on_cpu}
        found["fused steps"], calls["step"] = calls["step"], 0
        found |= {precision: half(base, "npu", precision) for precision in ("fp16", "bf16")}
        found["fused attentions"], calls["npu_fusion_attention"] = calls["npu_fusion_attention"], 0
        found["capabilities"] = dict(TorchBackend().capabilities("npu"))
        torch.npu.has_bf16 = False  # type: ignore[attr-defined]
        found |= {"fp16 on a 910": half(base, "npu", "fp16"), "bf16 on a 910": refused(base, "bf16")}
        found["fused attentions on a 910"] = calls["npu_fusion_attention"]
        found["capabilities of a 910"] = dict(TorchBackend().capabilities("npu"))
    return found


def main() -> None:
    """Print {plan: {array: largest difference}}, what a stray tensor led to, and what torch_npu changes."""
    install()
    base = narrow_base("sd1", Path(sys.argv[1]))
    differences = {}
    for name, (plan, given) in plans(base).items():
        on_cpu, on_npu = (run(base, device, plan, given) for device in ("cpu", "npu"))
        assert on_cpu.keys() == on_npu.keys()
        differences[name] = {key: float(np.abs(on_cpu[key] - on_npu[key]).max()) for key in on_cpu}
    print(json.dumps({"differences": differences, "stray": stray(base), "torch_npu": with_torch_npu(base)}))


if __name__ == "__main__":
    main()
