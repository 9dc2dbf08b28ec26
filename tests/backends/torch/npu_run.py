"""Train and paint on the simulated NPU and on the cpu, in a process of its own: prints what differed, as JSON.

python npu_run.py FOLDER_OF_A_NARROW_SD1
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from conftest import attention_lora, batch_of, plan_of
from simulated_npu import install

from persona.core.host.contracts import Runtime, SampleRequest
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


def main() -> None:
    """Print {plan: {array: largest difference}} and what a stray tensor led to."""
    install()
    base = narrow_base("sd1", Path(sys.argv[1]))
    differences = {}
    for name, (plan, given) in plans(base).items():
        on_cpu, on_npu = (run(base, device, plan, given) for device in ("cpu", "npu"))
        assert on_cpu.keys() == on_npu.keys()
        differences[name] = {key: float(np.abs(on_cpu[key] - on_npu[key]).max()) for key in on_cpu}
    print(json.dumps({"differences": differences, "stray": stray(base)}))


if __name__ == "__main__":
    main()
