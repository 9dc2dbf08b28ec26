"""What a session trained means the same elsewhere: in a fresh diffusers model, and in the next session."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import ATTENTION, attention_lora, batch_of, modules, plan_of
from diffusers import UNet2DConditionModel
from test_torch_text import pipeline
from transformers import CLIPTextModelWithProjection

from persona.core.adapters.entry import Adapter, Checkpoint, Entry, Scale
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import SampleRequest
from persona.core.host.errors import ConversionError, UsageError
from persona.core.training.plan import LowRank, Weights

CAPTIONS = ("a photo of a cat", "a red toy")
REQUEST = SampleRequest(("a photo of a cat",), (7,), steps=3)


def trained(base: Any, opened: Any, *trains: Any, steps: int = 4, **options: Any) -> Any:
    session = opened(base, plan_of(*trains, **options))
    for step in range(steps):
        session.accumulate(batch_of(base, seed=step, embeddings={}, captions=CAPTIONS))
        session.update([3e-2] * len(trains), 0.0)
    return session


def everything_low_rank(base: Any, **options: Any) -> tuple[LowRank, ...]:
    """LoRA on attention, feed-forward, convolutions and every text encoder, ranks and alphas of all kinds."""
    paths = modules(base, "unet", (*ATTENTION, "ff.net.0.proj", ".conv1", ".proj_in", ".conv"), limit=60)
    trains = [LowRank("unet", paths, 3, 2.0, 1e-2, ranks={paths[0]: 5}, alphas={paths[1]: 1.0}, **options)]
    for name in base.text_encoders:
        trains.append(LowRank(name, modules(base, name, (".q_proj", ".fc1")), 2, 2.0, 1e-2, **options))
    return tuple(trains)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"decomposed": True},
    "PiSSA": {"initialisation": "pissa", "rank_stabilised": True},
    "OLoRA": {"initialisation": "olora", "dropout": 0.1},
}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("sd1", "plain"), ("sdxl", "plain"), ("sdxl", "DoRA"), ("sd1", "PiSSA"), ("sd1", "OLoRA")],
)
def test_the_product_merged_into_a_fresh_session_paints_the_same(
    kind: str, variant: str, narrow: Any, opened: Any
) -> None:
    base = narrow(kind)
    session = trained(base, opened, *everything_low_rank(base, **VARIANTS[variant]), steps=2)
    fresh = opened(base)
    untrained = fresh.encode_text(CAPTIONS)["hidden_states"]
    notes = fresh.load_adapters([(session.product(), 1.0)])
    assert notes[0].endswith("modules changed at strength 1.")
    text, expected = fresh.encode_text(CAPTIONS), session.encode_text(CAPTIONS)
    for key in expected:
        np.testing.assert_allclose(text[key], expected[key], atol=2e-5)
    assert np.abs(untrained - expected["hidden_states"]).max() > 1e-2
    difference = np.abs(fresh.sample(REQUEST).astype(int) - session.sample(REQUEST).astype(int))
    assert difference.max() <= 1


def test_diffusers_loads_the_factors_with_the_same_meaning(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = trained(base, opened, attention_lora(base, rank=4, alpha=4.0))  # alpha = rank, as diffusers assumes
    state = {}
    for entry in session.product().entries.values():
        state[f"{entry.name}.lora_A.weight"] = torch.from_numpy(entry.factors["down"].read())
        state[f"{entry.name}.lora_B.weight"] = torch.from_numpy(entry.factors["up"].read())
    pipe = pipeline(base)
    pipe.load_lora_weights(state)
    result = pipe(
        prompt=list(REQUEST.prompts),
        num_inference_steps=3,
        guidance_scale=5.0,
        latents=torch.from_numpy(session_noise()),
        height=64,
        width=64,
        output_type="np",
    ).images
    difference = np.abs(session.sample(REQUEST).astype(int) - (result * 255).round().astype(int))
    assert difference.max() <= 1


def session_noise() -> Any:
    from persona.core.training.noise import normal

    return normal(7, "sample", 0, 0, (4, 8, 8))[None]


def test_strength_scales_the_change_and_adapters_add_up(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    path = modules(base, "unet", (".attn1.to_q",), limit=1)[0]
    random = np.random.default_rng(0)
    down, up = random.standard_normal((2, 32), np.float32), random.standard_normal((32, 2), np.float32)
    factors = {"down": in_memory(down), "up": in_memory(up)}
    entry = Entry("unet", path, "lora", factors, Scale(1.0, 2))
    adapter = Adapter("sd1", {("unet", path): entry})
    session = opened(base)
    before = session._components["unet"].get_submodule(path).weight.numpy().copy()
    session.load_adapters([(adapter, 0.75), (adapter, -0.25)])
    after = session._components["unet"].get_submodule(path).weight.numpy()
    np.testing.assert_allclose(after - before, 0.5 * 0.5 * up @ down, atol=1e-6)


def test_an_adapter_without_a_home_here_is_refused_and_changes_nothing(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    path = modules(base, "unet", (".attn1.to_q",), limit=1)[0]
    factors = {"down": in_memory(np.ones((2, 32), np.float32)), "up": in_memory(np.ones((32, 2), np.float32))}
    entries = {("unet", name): Entry("unet", name, "lora", factors, Scale(1.0, 2)) for name in (path, "blocks.7.x")}
    session = opened(base)
    before = session._components["unet"].get_submodule(path).weight.clone()
    with pytest.raises(ConversionError, match=r"1 of the adapter's 2 modules are not in this base: unet.blocks.7.x"):
        session.load_adapters([(Adapter("sd1", entries), 1.0)])
    wide = {"down": in_memory(np.ones((2, 99), np.float32)), "up": factors["up"]}
    wrong = {("unet", path): Entry("unet", path, "lora", wide, Scale(1.0, 2))}
    with pytest.raises(ConversionError, match=r"\[32, 32\] here"):
        session.load_adapters([(Adapter("sdxl", wrong), 1.0)])
    assert torch.equal(session._components["unet"].get_submodule(path).weight, before)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_delta_from_the_weight_is_relative_to_the_base_as_it_was(kind: str, narrow: Any, opened: Any) -> None:
    """peft#1932 and its PiSSA documents: loaded onto the original base, unconverted factors give another model."""
    base = narrow("sd1")
    low = attention_lora(base, rank=2, alpha=3.0, limit=2, initialisation=kind, rank_stabilised=True)
    begun = opened(base, plan_of(low))
    untouched = opened(base)._components["unet"].state_dict()
    for path in low.targets:
        assert torch.equal(begun._model.module("unet", path).base.weight, untouched[f"{path}.weight"])
    assert all(np.abs(delta).max() < 1e-6 for delta in begun.product().deltas().values()), "nothing was trained yet"
    session = trained(base, opened, low, steps=2)
    product = session.product()
    for (component, path), entry in product.entries.items():
        value, start = (
            {name: session.state()[f"{kept}/{component}.{path}.{name}"] for name in ("down", "up")}
            for kept in ("value", "start")
        )
        expected = 3.0 / 2**0.5 * (value["up"] @ value["down"] - start["up"] @ start["down"])
        assert entry.factors["down"].shape[0] == 4 and np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(product.deltas()[f"{component}.{path}"], expected, atol=1e-6)


def test_alphas_ranks_and_scale_are_kept_in_the_product(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    paths = modules(base, "unet", (".attn1.to_q",), limit=3)
    low = LowRank("unet", paths, 4, 8.0, 1e-3, ranks={paths[1]: 2}, alphas={paths[2]: 1.0}, rank_stabilised=True)
    product = opened(base, plan_of(low, metadata={"trigger": "sks"})).product()
    assert product.family == "sd1" and product.metadata == {"trigger": "sks"}
    scales = [product.entries["unet", path].scale for path in paths]
    assert [(scale.alpha, scale.rank, scale.mode) for scale in scales] == [
        (8.0, 4, "sqrt_rank"), (8.0, 2, "sqrt_rank"), (1.0, 4, "sqrt_rank")]  # fmt: skip
    assert product.entries["unet", paths[1]].factors["up"].shape == (32, 2)


def test_whole_weights_come_back_as_their_component_alone(narrow: Any, opened: Any) -> None:
    base = narrow("sdxl")
    session = trained(base, opened, Weights("text_encoder_2", 1e-3))
    product = session.product()
    assert isinstance(product, Checkpoint) and set(product.components) == {"text_encoder_2"}
    state = {name: torch.from_numpy(ref.read().copy()) for name, ref in product.components["text_encoder_2"].items()}
    assert set(state) == set(base.parameters["text_encoder_2"])
    theirs = CLIPTextModelWithProjection.from_pretrained(base.path / "text_encoder_2").eval()
    theirs.load_state_dict(state)
    ids, _ = session._words["text_encoder_2"].ids(CAPTIONS)
    with torch.no_grad():
        pooled = theirs(torch.from_numpy(ids)).text_embeds.numpy()
    theirs.text_model.eos_token_id = session._words["text_encoder_2"].end
    np.testing.assert_allclose(session.encode_text(CAPTIONS)["pooled"], pooled, atol=1e-5)


def test_a_trained_unet_is_a_checkpoint_diffusers_loads(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    product = trained(base, opened, Weights("unet", 1e-3), steps=1).product()
    unet = UNet2DConditionModel.from_config(product.configs["unet"])
    unet.load_state_dict(
        {name: torch.from_numpy(ref.read().copy()) for name, ref in product.components["unet"].items()}
    )
    assert set(product.components["unet"]) == set(base.parameters["unet"])


def test_a_session_without_a_plan_has_no_product(narrow: Any, opened: Any) -> None:
    with pytest.raises(UsageError, match="without a plan"):
        opened(narrow("sd1")).product()
