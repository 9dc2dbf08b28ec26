"""What a process does that is not the first of its run: the same steps with its own samples, and nothing is written
but its share of the class pictures."""

from __future__ import annotations

from typing import Any

from persona.core.host.contracts import Runtime, Session
from persona.core.training.events import Event
from persona.core.training.loop import take_step
from persona.core.training.processes import Processes, agreed
from persona.core.training.run import RunFolder, checkpoints, load_checkpoint
from persona.runs.ingredients import ingredients, with_class_pictures
from persona.runs.preparing import Prepared


def follow(run: RunFolder, ready: Prepared, backend: Any, processes: Processes, *, fresh: bool) -> None:
    """Go with the first process from the start of a run, or from its last checkpoint, to the end or until all stop."""
    settings = ready.recipe.settings
    saved = [] if fresh else checkpoints(run)
    done, state = load_checkpoint(saved[-1]) if saved else (0, None)
    runtime = Runtime(ready.recipe.device, settings.precision, settings.gradient_checkpointing, processes=processes)
    session: Session = backend.open(ready.base, ready.plan, runtime)
    try:
        plan = with_class_pictures(ready, session, _untold, processes)
        processes.barrier()  # the first process has written the latents
        given = ingredients(run.path / "cache" / "latents.safetensors", plan, ready.base, session, _untold)
        if state is not None:
            session.load_state(state)
        for update in range(done, plan.steps):
            take_step(plan, given, session, update, processes)
            if agreed(processes, False):
                return
    finally:
        session.close()


def _untold(event: Event) -> None:
    """The first process tells the user."""
