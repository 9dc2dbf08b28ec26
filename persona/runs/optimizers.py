"""From an optimizer's name to the class a backend makes of it, or to the line that installs it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

from persona.core.host.contracts import OptimizerChoice
from persona.core.host.errors import UsageError
from persona.core.host.host import Host
from persona.core.training.plan import LowRank, Optimizer, TrainingPlan

BUILT_IN = "adamw"


def with_optimizer(plan: TrainingPlan, words: Sequence[str], host: Host) -> TrainingPlan:
    """The plan with its optimizer's classes and keywords filled in; `words` are KEY=VALUE of --optimizer-option.

    Raises UsageError for an unknown optimizer, one whose package is missing, and a keyword for AdamW."""
    from persona.runs.recipe import parse_assignments

    asked = plan.optimizer
    if asked.name == BUILT_IN:
        if words:
            raise UsageError(
                "--optimizer-option is for other optimizers than adamw.",
                hint="AdamW's are --adam-beta1, --adam-beta2, --adam-epsilon and --weight-decay",
            )
        return plan
    choice = found(asked.name, host)
    options = {**keywords(choice, asked), **parse_assignments(words)}
    notes = plan.notes
    rates = [part.learning_rate for part in plan.trains]
    if choice.learning_rate is not None and (
        len(set(rates)) > 1 or any(isinstance(part, LowRank) and part.up_rate_ratio != 1 for part in plan.trains)
    ):
        raise UsageError(
            f"{asked.name} finds one step size for all that is trained, and the learning rates differ.",
            hint="Leave --part-learning-rate, --text-encoder-learning-rate and --loraplus-lr-ratio out, or take "
            "--optimizer adamw",
        )
    if choice.learning_rate is not None and any(rate != choice.learning_rate for rate in rates):
        said = ", ".join(f"{rate:g}" for rate in dict.fromkeys(rates))
        notes += (f"{asked.name} wants a learning rate of {choice.learning_rate:g}, and it is {said}",)
    optimizer = dataclasses.replace(asked, classes=dict(choice.classes), options=options)
    return dataclasses.replace(plan, optimizer=optimizer, notes=notes)


def found(name: str, host: Host) -> OptimizerChoice:
    """The optimizer called `name`. Raises UsageError for an unknown one and when its package is missing."""
    known = host.provided("optimizer")
    if name not in known:
        from persona.core.host.errors import did_you_mean

        raise UsageError(
            f"There is no optimizer {name}. {did_you_mean(name, (BUILT_IN, *known))}", hint="The built-in one is adamw"
        )
    choice = host.load("optimizer", name)
    if not isinstance(choice, OptimizerChoice):
        raise UsageError(f"The optimizer {name} is no OptimizerChoice, so no backend can make it.")
    if importlib.util.find_spec(choice.package) is None:
        raise UsageError(f"The optimizer {name} needs {choice.package}, which is not installed.", hint=choice.install)
    return choice


def keywords(choice: OptimizerChoice, asked: Optimizer) -> dict[str, Any]:
    """What its class is called with. AdamW's own defaults of betas do not replace the constants of another one."""
    defaults = Optimizer()
    values = {"betas": [asked.beta1, asked.beta2], "epsilon": asked.epsilon, "weight_decay": asked.weight_decay}
    usual = {"betas": [defaults.beta1, defaults.beta2], "epsilon": defaults.epsilon}
    told = {
        keyword: values[field]
        for field, keyword in choice.keywords.items()
        if keyword not in choice.constants or values[field] != usual.get(field)
    }
    return {**choice.constants, **told}
