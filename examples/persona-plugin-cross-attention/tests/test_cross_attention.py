"""The plugin by itself: what it registers, and the plan it makes for a base of two attention layers."""

from pathlib import Path

import persona_plugin_cross_attention as plugin
import pytest
from persona_plugin_cross_attention.method import CrossAttention, CrossAttentionOptions

from persona.core.host.descriptor import Descriptor
from persona.core.host.errors import UsageError
from persona.core.host.host import Host
from persona.core.training.base import Base, ParameterShape
from persona.core.training.plan import Picture, plan_from_json, plan_to_json
from persona.core.training.settings import TrainSettings

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
MODULES = {
    f"{BLOCK}.attn1.to_q": (96, 96),
    f"{BLOCK}.attn1.to_k": (96, 96),
    f"{BLOCK}.attn1.to_v": (96, 96),
    f"{BLOCK}.attn2.to_q": (96, 96),
    f"{BLOCK}.attn2.to_k": (96, 32),
    f"{BLOCK}.attn2.to_v": (96, 32),
    f"{BLOCK}.attn2.to_out.0": (96, 96),
}
PICTURES = [Picture("/pictures/1.png", ()), Picture("/pictures/2.png", ("sks robot in the rain",))]


@pytest.fixture
def base() -> Base:
    """A base with one transformer block; a Base needs configs and shapes only."""
    return Base(
        id="two-layers",
        path=Path("two-layers"),
        hash="0",
        family="sd1",
        components={
            "unet": {"sample_size": 8},
            "vae": {"block_out_channels": [16, 32, 64, 96], "latent_channels": 16},
            "text_encoder": {"hidden_size": 32},
        },
        parameters={"unet": {f"{path}.weight": ParameterShape(shape, "F32") for path, shape in MODULES.items()}},
        schedule={"prediction_type": "v_prediction"},
    )


def test_the_host_takes_the_plugin_and_finds_its_method() -> None:
    host = Host([("cross-attention", plugin)], candidates=[])
    assert isinstance(host.provided("method")["cross-attention"], Descriptor)
    assert host.load("method", "cross-attention") is CrossAttention


def test_only_the_layers_that_read_the_caption_are_trained(base: Base) -> None:
    plan = CrossAttention().plan(CrossAttentionOptions(class_word="robot"), TrainSettings(), base, PICTURES)
    (deltas,) = plan.trains
    assert deltas.component == "unet"
    assert set(deltas.targets) == {f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"}


def test_a_new_word_starts_as_the_class_word(base: Base) -> None:
    options = CrossAttentionOptions(class_word="robot", new_word=True)
    plan = CrossAttention().plan(options, TrainSettings(), base, PICTURES)
    assert plan.trains[1].components == ("text_encoder",)
    assert (plan.trains[1].tokens[0].placeholder, plan.trains[1].tokens[0].initializer) == ("sks", "robot")


def test_pictures_keep_their_own_captions_and_the_class_keeps_its_prior(base: Base) -> None:
    options = CrossAttentionOptions(class_word="robot", class_pictures=12, prior_weight=0.5)
    plan = CrossAttention().plan(options, TrainSettings(), base, PICTURES)
    instance, prior = plan.streams
    assert [picture.captions for picture in instance.pictures] == [("a sks robot",), ("sks robot in the rain",)]
    assert (prior.generated.prompt, prior.generated.count, prior.weight) == ("a robot", 12, 0.5)


def test_a_worker_in_another_environment_gets_the_same_plan(base: Base) -> None:
    plan = CrossAttention().plan(CrossAttentionOptions(class_word="robot"), TrainSettings(), base, PICTURES)
    assert plan_from_json(plan_to_json(plan)) == plan


def test_a_rank_above_the_layer_is_refused_before_anything_is_loaded(base: Base) -> None:
    with pytest.raises(UsageError, match="Rank 64 is above the width 32"):
        CrossAttention().plan(CrossAttentionOptions(class_word="robot", rank=64), TrainSettings(), base, PICTURES)
