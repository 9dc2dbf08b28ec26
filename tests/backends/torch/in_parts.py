"""What every process of a sharded session does, and one process with the whole model: the same steps, each with its
part of every batch. `found` is what has to be alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from persona.core.host.contracts import Runtime, SampleRequest, Sharding
from persona.core.training.batch import Batch
from persona.core.training.plan import LowRank, NewToken, NewTokens, TrainingPlan, Weights
from persona.plugins.backends.torch import TorchBackend
from persona.plugins.backends.torch.processes import TorchProcesses
from tests.backends.torch.conftest import attention_lora, batch_of, modules, plan_of
from tests.narrow_models import narrow_base

CAPTIONS = ("a photo of a <x> toy", "a red <x>", "a blue dog", "the robot in style")
PROJECTIONS = (".q_proj", ".v_proj")


def lora(base: Any) -> TrainingPlan:
    return plan_of(attention_lora(base, rank=3, decomposed=True), gradient_checkpointing=True)


def fp16(base: Any) -> TrainingPlan:
    return plan_of(attention_lora(base, limit=6), precision="fp16")


def weights(base: Any) -> TrainingPlan:
    return plan_of(Weights("unet", 1e-4, ("mid_block",)), Weights("text_encoder", 1e-4), ema_decay=0.5)


def sdxl(base: Any) -> TrainingPlan:
    encoders = [LowRank(name, modules(base, name, PROJECTIONS), 3, 3.0, 1e-2)
                for name in ("text_encoder", "text_encoder_2")]  # fmt: skip
    return plan_of(attention_lora(base, limit=8), *encoders)


def word(base: Any) -> TrainingPlan:
    return plan_of(NewTokens(("text_encoder",), (NewToken("<x>", "toy", 3),), 0.5, norm_limit=0.5))


@dataclass(frozen=True)
class Job:
    """A plan on a base, how it is spread, and what the batches are."""

    kind: str
    plan: Callable[[Any], TrainingPlan]
    sharding: Sharding
    reads: bool = False  # captions, not embeddings
    paints: bool = False
    updates: int = 2
    changes: dict[str, Any] = field(default_factory=dict)  # of the second update


JOBS = {
    "lora": Job("tiny", lora, Sharding()),
    "weights": Job("tiny", weights, Sharding(reshard_after_forward=False), reads=True, paints=True),
    "sdxl": Job("sdxl", sdxl, Sharding(offload=True), reads=True, updates=1),
    "word": Job("tiny", word, Sharding(), reads=True),
    "fp16": Job("tiny", fp16, Sharding(), updates=3, changes={"w": np.array([0.5, 1e9, 0.5, 0.5], np.float32)}),
}


def batches(base: Any, job: Job, update: int) -> list[Batch]:
    """Two micro-batches of four samples."""
    made = []
    for micro in (0, 1):
        words: dict[str, Any] = {"captions": CAPTIONS, "embeddings": {}} if job.reads else {}
        made.append(batch_of(base, count=4, seed=10 * update + micro, **words, **(job.changes if update == 1 else {})))
    return made


def part(batch: Batch, rank: int, count: int) -> Batch:
    """The samples of one process."""
    rows = slice(len(batch) * rank // count, len(batch) * (rank + 1) // count)
    values = {name: value[rows] if value is not None and name != "embeddings" else value
              for name, value in vars(batch).items()}  # fmt: skip
    return Batch(**values | {"embeddings": {key: value[rows] for key, value in batch.embeddings.items()}})


def found(folder: str, name: str, processes: TorchProcesses | None) -> dict[str, Any]:
    """Make the steps of a job; losses of this process, and arrays that the first process has whole."""
    job = JOBS[name]
    base = narrow_base(job.kind, Path(folder))
    plan = job.plan(base)
    rank, count = (processes.rank, processes.count) if processes is not None else (0, 1)
    runtime = Runtime("cpu", plan.precision, processes=processes, sharding=job.sharding if processes else None)
    session = TorchBackend().open(base, plan, runtime)
    told: dict[str, Any] = {"losses": [], "norms": [], "skipped": [], "held": held_bytes(session)}
    for update in range(job.updates):
        for batch in batches(base, job, update):
            told["losses"].append(session.accumulate(part(batch, rank, count)))
        norm, skipped = session.update([part.learning_rate for part in plan.trains], 1.0)
        told["norms"].append(norm)
        told["skipped"].append(skipped)
        if plan.ema_decay is not None:
            session.average(plan.ema_decay)
    if job.paints:
        told["validation"] = session.evaluate(batches(base, job, 9)[0])
        told["pictures"] = session.sample(SampleRequest(("a toy",), (1,), steps=2))
        told["losses"].append(session.accumulate(part(batches(base, job, 4)[0], rank, count)))
        session.update([part.learning_rate for part in plan.trains], 1.0)
    told["state"] = session.state()
    product = session.product()
    if hasattr(product, "components"):
        told["product"] = {f"{component}.{name}": ref.read() for component, tensors in product.components.items()
                           for name, ref in tensors.items()}  # fmt: skip
    if processes is not None:  # the one process has left its state: in parts, and whole again
        session.load_state(load_file(Path(folder) / f"{name}.safetensors"))
        told["again"] = session.state()
    session.close()
    return told


def held_bytes(session: Any) -> dict[str, int]:
    """Of every component: the bytes of weights in this process."""
    own: dict[str, int] = {}
    for name, model in session._components.items():
        values = [value.to_local() if hasattr(value, "to_local") else value for value in model.parameters()]
        own[name] = sum(value.numel() * value.element_size() for value in values)
    return own


def work(rank: int, count: int, folders: dict[str, str], names: Sequence[str], results: Any) -> None:
    """The jobs called `names`, one after the other, in one of `count` processes; what was found is put to `results`."""
    processes = TorchProcesses("cpu")
    results.put((rank, {name: found(folders[JOBS[name].kind], name, processes) for name in names}))
    processes.leave()
