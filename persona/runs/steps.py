"""The steps of a run: one after the other, with figures, samples and checkpoints; and what is said when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from persona.core.host.contracts import SampleRequest, Session
from persona.core.host.errors import Interrupted, NotFinite, TrainingError
from persona.core.host.host import Host
from persona.core.training.events import CheckpointSaved, Emit, Note, Sampled, Stage, StepDone
from persona.core.training.loop import Ingredients, take_step
from persona.core.training.plan import TrainingPlan
from persona.core.training.processes import ALONE, Processes, agreed
from persona.core.training.run import RunFolder, checkpoints, clear_disk_errors, load_step, save_checkpoint, write_state
from persona.core.training.settings import TrainSettings
from persona.runs.patience import told_while_waiting
from persona.runs.recipe import Recipe
from persona.runs.sheet import save_picture
from persona.runs.validation import Validation

Stop = Callable[[], bool]


def train(
    run: RunFolder,
    plan: TrainingPlan,
    given: Ingredients,
    session: Session,
    host: Host,
    recipe: Recipe,
    prompts: tuple[str, ...],
    validation: Validation | None = None,
    *,
    done: int,
    emit: Emit,
    stop: Stop,
    processes: Processes = ALONE,
) -> None:
    """Steps `done`+1 to the last, with figures, samples, checkpoints. A step's samples come before its checkpoint, so
    that a resumed run makes those again that a kill may have cut short."""
    settings = recipe.settings
    trackers = [host.load("tracker", name)() for name in dict.fromkeys(("csv", *settings.tracker))]
    for tracker in trackers:
        tracker.start(run.path, {**dataclasses.asdict(settings), "resumed_at": done})
    sampled_at = sample_steps(settings.sample_every, plan.steps)
    _announce(host, emit, "persona_run_started", run=run.path, settings=dataclasses.asdict(settings))
    try:
        is_wanted = (done == 0 or done in sampled_at) and not _is_sampled(run, done, prompts)
        if agreed(processes, is_wanted):
            sample(run, done, session, plan, prompts, recipe, host, emit)
        if done == 0 and validation is not None:
            emit(Note(f"validation loss before training: {validation.loss(session):.4f}"))
        first = session.first_step() if hasattr(session, "first_step") else "first step"
        for update in range(done, plan.steps):
            step = update + 1
            try:
                with told_while_waiting(emit, first) if update == done else contextlib.nullcontext():
                    values = take_step(plan, given, session, update, processes)
                if validation is not None and validation.due(step):
                    values["validation_loss"] = validation.loss(session)
            except TrainingError as error:
                _set_aside(error, run, step - 1)
                raise _with_last_checkpoint(error, run, step, plan) from error
            with clear_disk_errors(run.metrics):
                for tracker in trackers:
                    tracker.log(step, values)
            emit(StepDone(step, plan.steps, values))
            _announce(host, emit, "persona_step_done", run=run.path, step=step, values=values)
            stopped = agreed(processes, stop())
            if step in sampled_at and not stopped:
                try:
                    sample(run, step, session, plan, prompts, recipe, host, emit)
                except TrainingError as error:
                    raise _with_last_checkpoint(error, run, step, plan) from error
            if stopped or is_saved(settings, step, plan.steps):
                try:
                    path = save_checkpoint(run, step, state_writer(session), keep_last=settings.keep_last)
                except NotFinite as error:
                    raise _with_last_checkpoint(error, run, step, plan) from error
                emit(CheckpointSaved(step, str(path)))
                _announce(host, emit, "persona_checkpoint_saved", run=run.path, step=step, checkpoint=path)
            if stopped and step < plan.steps:
                raise Interrupted(
                    f"Stopped after step {step} of {plan.steps}; it is saved.",
                    hint=f"Go on with: persona train --resume {run.path}",
                )
    finally:
        for tracker in trackers:
            tracker.finish()


def state_writer(session: Session) -> Callable[[Path], None]:
    """What writes a session's state to a file: the worker itself, where it is elsewhere."""
    elsewhere: Callable[[Path], None] | None = getattr(session, "write_state", None)
    return elsewhere or (lambda path: write_state(path, session.state()))


def sample(
    run: RunFolder,
    step: int,
    session: Session,
    plan: TrainingPlan,
    prompts: tuple[str, ...],
    recipe: Recipe,
    host: Host,
    emit: Emit,
) -> None:
    """One picture per prompt, always from the same noise, so that what changes between steps is the model alone."""
    if not prompts:
        return
    emit(Stage("sampling", 0, len(prompts)))
    folder = run.samples / f"step-{step:06d}"
    shutil.rmtree(folder, ignore_errors=True)
    paths = []
    for number, pixels in enumerate(session.sample(sample_request(plan, prompts, recipe.settings))):
        path = folder / f"{number:02d}.png"
        save_picture(Image.fromarray(pixels), path, {"prompt": prompts[number], "step": str(step)})
        paths.append(path)
    emit(Sampled(step, tuple(str(path) for path in paths)))
    _announce(host, emit, "persona_sampled", run=run.path, step=step, pictures=paths)


def sample_request(plan: TrainingPlan, prompts: tuple[str, ...], settings: TrainSettings) -> SampleRequest:
    """What is sampled, the same at every step."""
    return SampleRequest(
        prompts=prompts,
        seeds=tuple(plan.seed * 1000 + number for number in range(len(prompts))),
        width=plan.width,
        height=plan.height,
        steps=settings.sample_steps,
        guidance_scale=settings.guidance_scale,
    )


def _is_sampled(run: RunFolder, step: int, prompts: tuple[str, ...]) -> bool:
    folder = run.samples / f"step-{step:06d}"
    return all((folder / f"{number:02d}.png").is_file() for number in range(len(prompts)))


def sample_steps(every: int, steps: int) -> set[int]:
    """The steps after which samples are made: every N, or half-way; always the last."""
    return {*range(every, steps, every), steps} if every else {steps // 2, steps} - {0}


def is_saved(settings: TrainSettings, step: int, steps: int) -> bool:
    """Whether there is a checkpoint after a step: every N, and after the last."""
    return step == steps or bool(settings.save_every and step % settings.save_every == 0)


def _set_aside(error: TrainingError, run: RunFolder, step: int) -> None:
    """What the very next step could not use is no good checkpoint: going on from it would end in the same way."""
    saved = checkpoints(run)
    if isinstance(error, NotFinite) and saved and load_step(saved[-1]) == step:
        saved[-1].rename(saved[-1].with_name(f"unusable-{saved[-1].name}"))


def _with_last_checkpoint(error: TrainingError, run: RunFolder, step: int, plan: TrainingPlan) -> TrainingError:
    """The error with its step, what is kept, and the line that goes on from there."""
    saved = checkpoints(run)
    kept = (
        f" The last good checkpoint is kept: {saved[-1]}."
        if saved
        else " There is no checkpoint before it; the run would begin again."
    )
    hint = f"{error.hint} Go on with: persona train --resume {run.path} … --allow-change"
    if isinstance(error, NotFinite):
        rate = f"--learning-rate {min(plan.trains[0].learning_rate / 10, 1e-4):g}"
        hint = f"Go on with a lower one: persona train --resume {run.path} {rate} --allow-change"
        if plan.precision != "fp32":
            hint += ", or take --precision fp32"
    return type(error)(f"Step {step} of {plan.steps}: {error.message}{kept}", hint=hint)


def _announce(host: Host, emit: Emit, event: str, **values: Any) -> None:
    for complaint in host.announce(event, **values):
        emit(Note(complaint))
