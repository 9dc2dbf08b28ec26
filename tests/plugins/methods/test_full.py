"""Plans of full fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest

from persona.core.host.errors import UsageError
from persona.core.training.plan import Picture
from persona.core.training.settings import TrainSettings
from persona.hub.bases import open_base
from persona.plugins.methods.full import Full, FullOptions

PICTURE = Picture("/photos/one.png", ("a dog",))


@pytest.fixture(scope="module")
def mini() -> Any:
    return open_base("mini")


def plan(base: Any, picture: Picture = PICTURE, settings: TrainSettings | None = None, **options: Any) -> Any:
    return Full().plan(FullOptions(**options), settings or TrainSettings(), base, (picture,))


def test_the_whole_denoiser_is_trained_and_the_text_encoder_when_asked_for(mini: Any) -> None:
    (only,) = plan(mini).trains
    assert (only.component, only.targets) == ("unet", ())
    both = plan(mini, train_text_encoder=True, text_encoder_learning_rate=1e-6).trains
    assert [(part.component, part.learning_rate) for part in both] == [("unet", 1e-4), ("text_encoder", 1e-6)]


def test_parts_of_the_denoiser_can_be_named(mini: Any) -> None:
    (part,) = plan(mini, targets=("attn2", "mid_block")).trains
    names = [name for name in mini.parameters["unet"] if name.startswith(part.targets)]
    expected = [name for name in mini.parameters["unet"] if ".attn2." in name or name.startswith("mid_block.")]
    assert names == expected and names
    assert not any(other != target and other.startswith(target) for target in part.targets for other in part.targets)
    with pytest.raises(UsageError, match=r"attn3 names no module of unet\. Did you mean attn"):
        plan(mini, targets=("attn3",))


def test_nothing_to_train_and_nothing_to_say_are_refused(mini: Any) -> None:
    with pytest.raises(UsageError, match="Nothing would be trained"):
        plan(mini, train_denoiser=False)
    with pytest.raises(UsageError, match="have no caption"):
        plan(mini, Picture("/photos/one.png", ()))


def test_the_averages_are_asked_for(mini: Any) -> None:
    assert plan(mini, settings=TrainSettings(ema_decay=0.99)).ema_decay == 0.99
