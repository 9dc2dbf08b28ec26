"""What a process does that is not the first of its run: the same steps with its own samples, and nothing is written
but its share of the class pictures. Where the model is spread over the processes it takes part in whatever the first
computes: samples, validation, checkpoints, the product."""

from __future__ import annotations

from typing import Any

from persona.core.host.contracts import Runtime, Session
from persona.core.training.events import Event
from persona.core.training.loop import take_step
from persona.core.training.processes import Processes, agreed, computes_together
from persona.core.training.run import RunFolder, checkpoints, load_checkpoint
from persona.runs.ingredients import ingredients, with_class_pictures
from persona.runs.preparing import Prepared
from persona.runs.steps import is_saved, sample_request, sample_steps
from persona.runs.training import validation_of


def follow(run: RunFolder, ready: Prepared, backend: Any, processes: Processes, *, fresh: bool) -> None:
    """Go with the first process from the start of a run, or from its last checkpoint, to the end or until all stop."""
    recipe = ready.recipe
    settings = recipe.settings
    saved = [] if fresh else checkpoints(run)
    done, state = load_checkpoint(saved[-1]) if saved else (0, None)
    runtime = Runtime(
        recipe.device,
        settings.precision,
        settings.gradient_checkpointing,
        processes=processes,
        sharding=recipe.sharding,
    )
    session: Session = backend.open(ready.base, ready.plan, runtime)
    try:
        plan = with_class_pictures(ready, session, _untold, processes)
        processes.barrier()  # the first process has written the latents
        given = ingredients(run.path / "cache" / "latents.safetensors", plan, ready.base, session, _untold)
        together = computes_together(session)
        validation = validation_of(run, ready, session, _untold) if together else None
        if state is not None:
            session.load_state(state)
        sampled_at = sample_steps(settings.sample_every, plan.steps) if ready.prompts else set()
        request = sample_request(plan, ready.prompts, settings)
        if agreed(processes, False) and together:
            session.sample(request)
        if validation is not None and done == 0:
            validation.loss(session)
        for update in range(done, plan.steps):
            step = update + 1
            take_step(plan, given, session, update, processes)
            if validation is not None and validation.due(step):
                validation.loss(session)
            stopped = agreed(processes, False)
            if together and step in sampled_at and not stopped:
                session.sample(request)
            if together and (stopped or is_saved(settings, step, plan.steps)):
                session.state()
            if stopped and step < plan.steps:
                return
        if together:
            session.product()
    finally:
        session.close()


def _untold(event: Event) -> None:
    """The first process tells the user."""
