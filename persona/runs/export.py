"""Any checkpoint of a run as what the run's own product is: an adapter file, or a folder of changed components. The
checkpoint holds all that was trained, so no framework is opened for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.entry import Adapter, Checkpoint
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import OutputExists, ResumeError, UsageError
from persona.core.host.host import Host
from persona.core.training.base import Base
from persona.core.training.plan import TrainingPlan
from persona.core.training.product import adapter_of
from persona.core.training.run import RunFolder, checkpoints, clear_disk_errors, load_checkpoint
from persona.formats.containers.safetensors import Safetensors
from persona.plugins.backends.shared.folder import weight_files
from persona.plugins.backends.shared.names import is_bookkeeping, published
from persona.runs.about import product_words, title_of
from persona.runs.bases import open_any_base
from persona.runs.products import write_adapter, write_also, write_components
from persona.runs.recipe import read_recipe

Array = np.ndarray[Any, np.dtype[Any]]


def parse_run(text: str) -> tuple[RunFolder, int | None]:
    """`RUN` or `RUN:STEP`. Raises UsageError for a step that is no number."""
    if Path(text).is_dir():
        return RunFolder(Path(text)), None
    folder, sign, step = text.rpartition(":")
    if not sign:
        raise UsageError(f"There is no run {text}.", hint="Name its folder, for example: runs/lora-001")
    if not step.isdigit():
        raise UsageError(f"{step!r} is not a step.", hint=f"For example: {folder}:100")
    return RunFolder(Path(folder)), int(step)


def checkpoint_of(run: RunFolder, step: int | None) -> Path:
    """The checkpoint of a step, or the last. Raises ResumeError naming the steps there are."""
    saved = {int(path.name.removeprefix("step-")): path for path in checkpoints(run)}
    if not saved:
        raise ResumeError(f"{run.path} has no checkpoint.", hint="Keep more of them: --save-every and --keep-last")
    if step is None:
        return saved[max(saved)]
    if step not in saved:
        kept = ", ".join(str(number) for number in sorted(saved))
        raise ResumeError(
            f"{run.path} has no checkpoint of step {step}; it has {kept}.",
            hint=f"Take one of those, or keep more: --save-every, --keep-last (for example {run.path}:{max(saved)})",
        )
    return saved[step]


def export(
    run: RunFolder, step: int | None, host: Host, *, output: Path | None = None, also: Sequence[str] = ()
) -> list[Path]:
    """Write the product of a checkpoint to `output` (default: in the run, named by its step); what was written.

    Raises ResumeError when there is no such checkpoint or the base is another one, OutputExists."""
    plan = run.plan()
    chosen = checkpoint_of(run, step)
    recipe = {key: value for key, (value, _) in read_recipe(run.recipe).items()}
    base = open_any_base(str(recipe.get("base") or "mini"), host, lambda text: None)
    if run.facts().get("base_hash") not in (None, base.hash):
        raise ResumeError(f"The base {base.id} is not the one {run.path} was trained on: its digest is another.")
    if any(part.kind == "weights" for part in plan.trains) and also:
        raise UsageError("--also: whole weights are no adapter.", hint="Leave it out")
    reached, state = load_checkpoint(chosen)
    name = f"model-{reached:06d}" if any(part.kind == "weights" for part in plan.trains) else f"adapter-{reached:06d}"
    path = output or run.path / (name if name.startswith("model") else f"{name}.safetensors")
    if path.exists():
        raise OutputExists(f"{path} is there already.", hint="Name another place: --output FILE")
    words = product_words(plan, base, title=str(recipe.get("title") or title_of(plan, base)), steps=reached)
    product = product_of(plan, base, state)
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(product, Checkpoint):
            return [write_components(product, path, base, words)]
        write_adapter(product, path, words)
    return [path, *write_also(path, also, host, base)]


def product_of(plan: TrainingPlan, base: Base, state: Mapping[str, Array]) -> Adapter | Checkpoint:
    """What a session with this state would give as its product: the averages, where there are some.

    Raises ResumeError for a state that lacks something the plan trains."""

    def kept(kind: str, name: str) -> Array:
        if f"{kind}/{name}" not in state:
            raise ResumeError(f"The checkpoint does not fit the run: {kind}/{name} is missing.")
        return state[f"{kind}/{name}"]

    kind = "value" if plan.ema_decay is None else "ema"
    whole = sorted({part.component for part in plan.trains if part.kind == "weights"})
    if not whole:
        return adapter_of(plan, base.family, lambda name: kept(kind, name), lambda name: kept("start", name))
    return Checkpoint(
        family=base.family,
        components={name: _parameters(base, name, kind, state) for name in whole},
        configs={name: dict(base.components[name]) for name in whole},
        metadata=dict(plan.metadata),
    )


def _parameters(base: Base, component: str, kind: str, state: Mapping[str, Array]) -> dict[str, TensorRef]:
    """Every weight of a component as float32: trained ones from the state, the others as the base has them."""
    trained = {name for name in state if name.startswith(f"{kind}/{component}.")}
    found = {}
    for path in weight_files(base.folder(component)):
        for stored, reference in Safetensors().read(path).tensors.items():
            name = published(component, stored)
            if is_bookkeeping(name):
                continue
            full = f"{kind}/{component}.{name}"
            trained.discard(full)
            read = (lambda full=full: state[full]) if full in state else (lambda ref=reference: _wide(ref))
            found[name] = TensorRef(np.dtype(np.float32), reference.shape, read)
    if trained:
        raise ResumeError(f"The checkpoint does not fit the base: it has no {min(trained).partition('/')[2]}.")
    return found


def _wide(reference: TensorRef) -> Array:
    return np.asarray(reference.read()).astype(np.float32)
