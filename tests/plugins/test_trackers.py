"""Trackers of other packages: what they are sent, and what is said when the package is missing."""

from __future__ import annotations

import csv
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from persona.api import host
from persona.core.host.errors import UsageError
from persona.core.training.plan import LowRank, Optimizer, TrainingPlan
from persona.runs.optimizers import with_optimizer

ROWS = [(1, {"loss": 0.5, "learning_rate": 1e-4}), (2, {"loss": float("nan"), "validation_loss": 0.25})]


class Sent(list[Any]):
    """Collects (name, value, step)."""

    def add_scalar(self, *place: Any, **named: Any) -> None:
        self.append(place or (named["tag"], named["value"], named["step"]))

    def log(self, values: Any, step: int) -> None:
        self.extend((name, value, step) for name, value in values.items())

    def close(self) -> None:
        self.append("closed")

    finish = close


@pytest.mark.parametrize(
    ("name", "modules", "attribute"),
    [
        ("tensorboard", ("tensorboard", "tensorboard.summary"), "Writer"),
        ("visualdl", ("visualdl",), "LogWriter"),
        ("wandb", ("wandb",), "init"),
    ],
)
def test_figures_are_sent_where_they_belong(
    name: str, modules: tuple[str, ...], attribute: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent, asked = Sent(), []
    for module in modules:
        fake = types.ModuleType(module)
        fake.__spec__ = types.SimpleNamespace(name=module)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module, fake)

    def make(*place: Any, **named: Any) -> Sent:
        asked.append((place, named))
        return sent

    setattr(sys.modules[modules[-1]], attribute, make)
    tracker = host().load("tracker", name)()
    tracker.start(tmp_path / "run-1", {"steps": 2})
    for step, values in ROWS:
        tracker.log(step, values)
    tracker.finish()
    assert sent == [("loss", 0.5, 1), ("learning_rate", 1e-4, 1), ("validation_loss", 0.25, 2), "closed"]
    assert "run-1" in str(asked[0])


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("visualdl", "visualdl"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PaddlePaddle/PaddleMIX#555: `--report_to wandb` crashed at the end of a run."""
    monkeypatch.setattr("importlib.util.find_spec", lambda found: None)
    with pytest.raises(UsageError, match=f"needs {package}, which is not installed") as refused:
        host().load("tracker", name)()
    assert refused.value.hint == f"pip install {package}"


def test_the_table_has_an_empty_cell_where_a_step_has_no_figure(tmp_path: Path) -> None:
    tracker = host().load("tracker", "csv")()
    tracker.start(tmp_path, {"validation_data": "held-out"})
    for step, values in ((1, {"loss": 0.5}), (2, {"loss": 0.25, "validation_loss": 0.125})):
        tracker.log(step, values)
    tracker.finish()
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["step", "loss", "validation_loss"],
            ["1", "0.5", ""],
            ["2", "0.25", "0.125"],
        ]


def plan_with(name: str, **options: Any) -> TrainingPlan:
    return TrainingPlan(
        "lora", (LowRank("unet", ("a",), 1, 1.0, 1e-3),), (), 5, optimizer=Optimizer(name=name, **options)
    )


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("prodigy", "pip install prodigyopt"),
        ("lion", "pip install lion-pytorch"),
        ("adamw-8bit", "pip install bitsandbytes"),
    ],
)
def test_an_optimizer_without_its_package_says_what_to_install(
    name: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes#961 and others: 8-bit optimizers are not everywhere, and it is told before anything is loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda found: None)
    with pytest.raises(UsageError, match="which is not installed") as refused:
        with_optimizer(plan_with(name), (), host())
    assert refused.value.hint == install


def test_an_optimizer_gets_its_keywords_and_says_which_rate_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda found: object())
    plan = with_optimizer(plan_with("prodigy", weight_decay=0.05), ("d_coef=2", "use_bias_correction=false"), host())
    assert plan.optimizer.classes == {"torch": "prodigyopt:Prodigy"}
    assert plan.optimizer.options == {
        "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.05, "safeguard_warmup": True,
        "use_bias_correction": False, "d_coef": 2,
    }  # fmt: skip
    assert plan.notes == ("prodigy wants a learning rate of 1, and it is 0.001",)
    lion = with_optimizer(plan_with("lion"), (), host()).optimizer.options
    assert lion["betas"] == [0.9, 0.99], "AdamW's usual betas are not Lion's"
    assert with_optimizer(plan_with("lion", beta2=0.95), (), host()).optimizer.options["betas"] == [0.9, 0.95]


def test_an_optimizer_that_finds_one_step_size_is_not_given_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """prodigyopt raises in the middle of the first step for learning rates that differ."""
    monkeypatch.setattr("importlib.util.find_spec", lambda found: object())
    plan = plan_with("prodigy")
    (part,) = plan.trains
    for trains in (
        (part, dataclasses.replace(part, component="text_encoder", learning_rate=1e-4)),
        (dataclasses.replace(part, up_rate_ratio=16.0),),
    ):
        with pytest.raises(UsageError, match="one step size"):
            with_optimizer(dataclasses.replace(plan, trains=trains), (), host())


def test_options_for_adamw_and_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="for other optimizers than adamw"):
        with_optimizer(plan_with("adamw"), ("x=1",), host())
    with pytest.raises(UsageError, match=r"no optimizer prodigi\. Did you mean prodigy"):
        with_optimizer(plan_with("prodigi"), (), host())
