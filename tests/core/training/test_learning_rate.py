"""Learning rates against diffusers' own schedulers, step by step over a whole run and a little beyond."""

import warnings

import pytest
import torch
from diffusers.optimization import get_scheduler

from persona.core.host.errors import UsageError
from persona.core.training.learning_rate import NAMES, multiplier

LEARNING_RATE = 2e-4


def run_of_diffusers(name, steps, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE)
    scheduler = get_scheduler(name, optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
            scheduler.step()
    return rates


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 1, 17])
def test_every_step_is_that_of_diffusers(name, warmup):
    expected = run_of_diffusers(name, 110, num_warmup_steps=warmup, num_training_steps=100)
    end = 1e-7 / LEARNING_RATE if name == "polynomial" else 0.0
    found = [LEARNING_RATE * multiplier(name, step, warmup=warmup, total=100, end=end) for step in range(110)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("cosine_with_restarts", {"num_cycles": 3}, {"cycles": 3}),
        ("polynomial", {"power": 2.5}, {"power": 2.5, "end": 1e-7 / LEARNING_RATE}),
    ],
)
def test_cycles_and_power_are_those_of_diffusers(name, theirs, ours):
    expected = run_of_diffusers(name, 100, num_warmup_steps=10, num_training_steps=100, **theirs)
    found = [LEARNING_RATE * multiplier(name, step, warmup=10, total=100, **ours) for step in range(100)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_all_warmup_does_not_divide_by_zero(name):
    assert 0.0 <= multiplier(name, 10, warmup=10, total=10) <= 1.0


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(UsageError, match="cosine_with_restarts"):
        multiplier("cosine_with_restart", 0, total=10)
