"""Pictures are those of diffusers' pipelines from the same noise."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import attention_lora, plan_of
from test_torch_text import pipeline

from persona.core.host.contracts import SampleRequest
from persona.core.host.errors import UsageError
from persona.core.training.noise import normal

# diffusers turns tensors into arrays in a way numpy 2 will drop
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}


def theirs(
    base: Any, request: SampleRequest, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...] = (4, 8, 8)
) -> Any:
    """What the pipeline makes, [n, h, w, 3] uint8."""
    pipe = pipeline(base)
    pipe.scheduler = getattr(diffusers, SCHEDULERS[request.sampler]).from_config(pipe.scheduler.config)
    steps = iter(range(request.steps))

    def drawn(*_: Any, **__: Any) -> Any:
        step = next(steps)
        return torch.tensor(np.stack([normal(seed, "sampler", step, 0, shape) for seed in request.seeds]))

    for module in ("scheduling_euler_ancestral_discrete", "scheduling_lcm"):  # noise on the way is the core's
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", drawn)
    result = pipe(
        prompt=list(request.prompts),
        negative_prompt=[request.negative_prompt] * len(request.prompts) if request.negative_prompt else None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        latents=torch.tensor(np.stack([normal(seed, "sample", 0, 0, shape) for seed in request.seeds])),
        height=shape[1] * 8,
        width=shape[2] * 8,
        output_type="np",
    )
    return (result.images * 255).round().astype(np.uint8)


def assert_same_pictures(ours: Any, expected: Any) -> None:
    assert ours.dtype == np.uint8 and ours.shape == expected.shape
    difference = np.abs(ours.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and expected.std() > 5, f"{difference.max()} levels apart"


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("negative", ["", "dog"])
def test_ddim_pictures_are_those_of_the_pipeline(
    kind: str, negative: str, narrow: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = SampleRequest(("a photo of a cat", "a red toy"), (3, 10**12), negative, steps=4, guidance_scale=4.0)
    assert_same_pictures(opened(narrow(kind)).sample(request), theirs(narrow(kind), request, monkeypatch))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("sampler", sorted(set(SCHEDULERS) - {"ddim"}))
def test_every_sampler_is_diffusers_own(
    kind: str, sampler: str, narrow: Any, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = SampleRequest(("a photo of a cat", "a red toy"), (3, 4), sampler=sampler, steps=5)
    assert_same_pictures(opened(narrow(kind)).sample(request), theirs(narrow(kind), request, monkeypatch))


def test_a_picture_does_not_depend_on_the_batch_it_was_made_in(narrow: Any, opened: Any) -> None:
    session = opened(narrow("sd1"))
    prompts = ("a cat", "a dog", "a toy")
    together = session.sample(SampleRequest(prompts, (1, 2, 3), sampler="euler-a", steps=3, batch=3))
    in_twos = session.sample(SampleRequest(prompts, (1, 2, 3), sampler="euler-a", steps=3, batch=2))
    alone = session.sample(SampleRequest(prompts[2:], (3,), sampler="euler-a", steps=3))
    assert_same_pictures(in_twos, together)
    assert_same_pictures(alone, together[2:])


def test_another_size_and_no_guidance(narrow: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    request = SampleRequest(("a cat",), (5,), width=96, height=64, steps=3, guidance_scale=1.0)
    pictures = opened(narrow("sd1")).sample(request)
    assert pictures.shape == (1, 64, 96, 3)
    assert_same_pictures(pictures, theirs(narrow("sd1"), request, monkeypatch, (4, 8, 12)))


def test_sampling_leaves_training_as_it_was(narrow: Any, opened: Any) -> None:
    session = opened(narrow("sd1"), plan_of(attention_lora(narrow("sd1"), dropout=0.5)))
    before = session.state()
    session.sample(SampleRequest(("a cat",), (5,), steps=2, sampler="euler-a"))
    after = session.state()
    assert all(np.array_equal(before[name], after[name]) for name in before | after), "random state included"
    assert all(value.grad is None for value in session._optimizer.names.values())


def test_requests_that_cannot_work_are_refused(narrow: Any, opened: Any) -> None:
    session = opened(narrow("sd1"))
    with pytest.raises(UsageError, match='no sampler "dpm"') as unknown:
        session.sample(SampleRequest(("a cat",), (5,), sampler="dpm"))
    assert "dpm++" in unknown.value.hint and "unipc" in unknown.value.hint
    with pytest.raises(UsageError, match="multiples of 8"):
        session.sample(SampleRequest(("a cat",), (5,), width=60))
    with pytest.raises(UsageError, match="one seed each"):
        session.sample(SampleRequest(("a cat",), (5, 6)))
    with pytest.raises(UsageError, match="0 sampling steps"):
        session.sample(SampleRequest(("a cat",), (5,), steps=0))
