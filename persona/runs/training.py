"""`persona train`, without the command line: recipe → plan → session → loop → product, one readable line of steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from persona.core.host.contracts import Runtime, Session
from persona.core.host.errors import (
    BackendMissing,
    BaseModelError,
    Interrupted,
    ResumeError,
    UsageError,
)
from persona.core.host.host import Host
from persona.core.training.events import Emit, Event, Note, Stage
from persona.core.training.plan import TrainingPlan
from persona.core.training.processes import ALONE, Processes, share_in_words
from persona.core.training.run import (
    RunFolder,
    checkpoints,
    clear_disk_errors,
    discard,
    load_checkpoint,
    new_run,
    sole_writer,
    write_atomically,
    write_facts,
    write_plan,
)
from persona.environments.smoke import told_untested
from persona.runs.abilities import refuse_unable
from persona.runs.about import title_of
from persona.runs.accelerate_file import in_words
from persona.runs.backends import choose_backend
from persona.runs.card import model_card
from persona.runs.differences import check_pictures, differences_of, other_backend
from persona.runs.facts import facts_of, now, words_of
from persona.runs.ingredients import ingredients, with_class_pictures
from persona.runs.launching import devices_of, launch
from persona.runs.preparing import Prepared, prepare
from persona.runs.products import also_path, write_also, write_product
from persona.runs.recipe import Recipe, recipe_text
from persona.runs.sheet import run_sheet, save_picture
from persona.runs.sizes import refuse_without_room
from persona.runs.steps import Stop, train
from persona.runs.validation import Validation, best_step

STEADY = ("constant", "constant_with_warmup")
"""Learning-rate schedules that do not depend on how many steps there will be."""


def start(recipe: Recipe, host: Host, *, emit: Emit, stop: Stop) -> RunFolder:
    """Make a run from a recipe and train it to its end."""
    ready = prepare(recipe, host, lambda text: emit(Note(text)))
    refuse_without_room(ready.plan, ready.base, recipe)
    backend = choose_backend(host, recipe.backend)
    refuse_unable(backend, ready.plan, ready.base, recipe.device)
    devices = devices_of(backend, recipe, ready.plan)
    run = new_run(Path(recipe.output) if recipe.output else None, Path("runs"), recipe.method)
    with clear_disk_errors(run.path):
        write_atomically(run.recipe, recipe_text(recipe).encode())
        write_plan(run, ready.plan)
        write_facts(run, facts_of(ready, backend.name))
    for note in ready.notes:
        emit(Note(note))
    emit(Note(f"run: {run.path}"))
    try:
        if len(devices) > 1:
            _tell_shares(ready, devices, emit)
            launch(run, recipe, backend, host, fresh=True, emit=emit, stop=stop)
        else:
            with sole_writer(run):
                execute(run, ready, backend, host, done=0, state=None, emit=emit, stop=stop)
    except (UsageError, BaseModelError, BackendMissing):
        discard(run)  # nothing was begun: what was asked for cannot be done
        raise
    return run


def resume(run: RunFolder, recipe: Recipe, host: Host, *, allow_change: bool, emit: Emit, stop: Stop) -> RunFolder:
    """Go on with a run exactly where its last checkpoint is; `recipe` is its own with what was typed again now.

    Raises ResumeError, naming the differences, when data, base or options are not what they were."""
    run.check()
    ready = prepare(recipe, host, lambda text: emit(Note(text)))
    backend = choose_backend(host, recipe.backend or run.facts().get("backend"))
    devices = devices_of(backend, recipe, ready.plan)
    if len(devices) > 1:
        _tell_shares(ready, devices, emit)
        launch(run, recipe, backend, host, fresh=False, allow_change=allow_change, emit=emit, stop=stop)
    else:
        with sole_writer(run):
            resume_in(run, ready, backend, host, allow_change=allow_change, emit=emit, stop=stop)
    return run


def resume_in(
    run: RunFolder,
    ready: Prepared,
    backend: Any,
    host: Host,
    *,
    allow_change: bool,
    emit: Emit,
    stop: Stop,
    processes: Processes = ALONE,
) -> None:
    """`resume` in this process, which holds the run; of several processes, in the first."""
    facts, recipe = run.facts(), ready.recipe
    before = run.plan() if run.plan_file.is_file() else None  # a kill in the first moment leaves a recipe alone
    if before:
        ready = with_warmup_of(before, ready)
    differences = differences_of(before, ready.plan) if before else []
    if facts.get("base_hash") not in (None, ready.base.hash):
        differences.append(f"base {facts.get('base')}: digest {facts['base_hash'][:12]} is now {ready.base.hash[:12]}")
    if differences and not allow_change:
        raise ResumeError(
            f"{run.path} was started with something else: " + "; ".join(differences[:5]) + ".",
            hint="Go back to what it was, or accept the change: --allow-change",
        )
    for note in ready.notes:
        emit(Note(note))
    for difference in differences:
        emit(Note(f"changed: {difference}"))
    saved = checkpoints(run)
    done, state = load_checkpoint(saved[-1]) if saved else (0, None)
    further = f"Train it further: persona train --resume {run.path} --steps {done + 100}"
    if done == ready.plan.steps == facts.get("product_steps") and run.product:
        raise ResumeError(f"{run.path} is finished: {done} steps, the product is {run.product}.", hint=further)
    if done > ready.plan.steps:
        raise ResumeError(f"{run.path} has made {done} steps already, more than {ready.plan.steps}.", hint=further)
    if before and before.steps != ready.plan.steps and ready.plan.optimizer.schedule not in STEADY:
        emit(
            Note(
                f"the learning-rate schedule {ready.plan.optimizer.schedule} is now spread over {ready.plan.steps} "
                f"steps, not {before.steps}: the steps made so far were at other rates"
            )
        )
    told = other_backend(facts.get("backend", ""), backend.name, state or {}, ready.plan)
    if told:
        emit(Note(told))
    write_atomically(run.recipe, recipe_text(recipe).encode())
    write_facts(run, {**facts, **facts_of(ready, backend.name), "started": facts.get("started", "")})
    emit(Note(f"run: {run.path}, going on at step {done}"))
    execute(
        run,
        ready,
        backend,
        host,
        done=done,
        state=state,
        emit=emit,
        stop=stop,
        known=None if allow_change else before,
        processes=processes,
    )


def with_warmup_of(before: TrainingPlan, ready: Prepared) -> Prepared:
    """A warm-up told as a share of the steps stays as long as it was, when a run is trained further."""
    share = ready.recipe.settings.warmup
    if not 0 < share < 1 or before.optimizer.warmup != round(share * before.steps):
        return ready
    optimizer = replace(ready.plan.optimizer, warmup=before.optimizer.warmup)
    return replace(ready, plan=replace(ready.plan, optimizer=optimizer))


def execute(
    run: RunFolder,
    ready: Prepared,
    backend: Any,
    host: Host,
    *,
    done: int,
    state: Mapping[str, Any] | None,
    emit: Emit,
    stop: Stop,
    known: TrainingPlan | None = None,
    processes: Processes = ALONE,
) -> None:
    """Open the session, make priors and caches, train, write the product; of several processes, in the first. `known`
    is the plan the run was started with, whose pictures have to be the same."""
    begun = time.monotonic()
    recipe, base = ready.recipe, ready.base
    settings = recipe.settings
    runtime = Runtime(
        recipe.device,
        settings.precision,
        settings.gradient_checkpointing,
        run.worker_log,
        processes,
        sharding=recipe.sharding,
    )
    prepare_emit = _unless_stopped(emit, stop, run)
    prepare_emit(Stage("loading the base"))
    session: Session = backend.open(base, ready.plan, runtime)
    try:
        told = session.determinism() if hasattr(session, "determinism") else ""
        write_facts(run, {**run.facts(), "determinism": told, **getattr(session, "surroundings", {})})
        if told.startswith("up to"):
            emit(Note(f"the same seed gives the same run {told}"))
        plan = with_class_pictures(ready, session, prepare_emit, processes)
        if known is not None and done:
            check_pictures(known, plan)
        write_plan(run, plan)
        given = ingredients(run.path / "cache" / "latents.safetensors", plan, base, session, prepare_emit)
        validation = validation_of(run, ready, session, prepare_emit)
        processes.barrier()  # the latents are written, for the others too
        # other versions than tested, prompts cut, an autoencoder upcast, …: before the steps begin
        for text in (*told_untested(backend.name, session), *session.notes):
            emit(Note(text))
        if state is not None:
            session.load_state(state)
        train(
            run,
            plan,
            given,
            session,
            host,
            recipe,
            ready.prompts,
            validation,
            done=done,
            emit=emit,
            stop=stop,
            processes=processes,
        )
        references = [Path(picture.path) for picture in plan.streams[0].pictures]
        sheet = run_sheet(run.samples, ready.prompts, [path for path in references if path.is_file()])
        if sheet is not None:
            save_picture(sheet, run.path / "sheet.png")
        product = write_product(session.product(), run, base, words_of(run, plan, base, recipe.settings))
        # what persona train --dry-run predicts, to compare with (of this sitting, when the run was resumed)
        peak = session.peak_memory() if hasattr(session, "peak_memory") else 0
        spent = {"seconds": round(time.monotonic() - begun, 3), "peak_memory_bytes": peak}
    finally:
        session.close()
    wanted = [also_path(product, dialect, host) for dialect in recipe.settings.also]
    title = recipe.settings.title or title_of(plan, base)
    card = model_card(plan, base, title=title, product=product, prompts=ready.prompts, also=wanted)
    write_atomically(run.path / "README.md", card.encode())
    _tell_best(run, emit)
    # Said last: until then a product may be that of fewer steps, from before the run was trained further.
    write_facts(run, {**run.facts(), "product_steps": plan.steps, "finished": now(), **spent})
    for complaint in host.announce("persona_run_finished", run=run.path, product=product):
        emit(Note(complaint))
    for path in write_also(product, recipe.settings.also, host, base):
        emit(Note(f"also:    {path}"))


def _tell_shares(ready: Prepared, devices: tuple[str, ...], emit: Emit) -> None:
    """What the processes share, before they are started."""
    emit(Note(share_in_words(ready.plan, devices)))
    if ready.recipe.sharding is not None:
        emit(Note(in_words(ready.recipe.sharding, len(devices))))


def _unless_stopped(emit: Emit, stop: Stop, run: RunFolder) -> Emit:
    """`emit` for what comes before the first step, where nothing has to be finished: an interrupt ends it at once."""

    def check(event: Event) -> None:
        emit(event)
        if stop():
            raise Interrupted(
                "Stopped before the first step; what was made so far is kept.",
                hint=f"Go on with: persona train --resume {run.path}",
            )

    return check


def validation_of(run: RunFolder, ready: Prepared, session: Session, emit: Emit) -> Validation | None:
    """What follows the validation loss, its pictures encoded; None when none are held out."""
    plan = ready.validation
    if plan is None:
        return None
    given = ingredients(run.path / "cache" / "validation.safetensors", plan, ready.base, session, emit)
    return Validation(plan, given, ready.recipe.settings.validation_every, ready.plan.steps)


def _tell_best(run: RunFolder, emit: Emit) -> None:
    found = best_step(run)
    if found is not None:
        step, loss, last = found
        emit(Note(f"validation loss was lowest after step {step}: {loss:.4f} (at the end {last:.4f})"))
        if loss < last and any(path.name == f"step-{step:06d}" for path in checkpoints(run)):
            emit(Note(f"that one as an adapter: persona export {run.path}:{step}"))
