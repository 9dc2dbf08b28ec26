"""Updates, averages, products and states of the MindSpore backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mindone", reason="the MindSpore environment is not here: persona backends setup mindspore")

from persona.core.adapters.delta import delta
from persona.core.host.errors import ResumeError, TrainingError, UsageError
from persona.core.training.noise import normal
from persona.core.training.optimizer import AdamWState, adamw, clip_norm
from persona.core.training.plan import LowRank, Optimizer, Weights
from tests.backends.golden import cases as golden
from tests.numpy_base import value_of

CASES = ("low rank", "decomposed, with text encoder", "new tokens", "whole weights")


def low_rank(base: Any, **options: Any) -> LowRank:
    return LowRank("unet", golden.modules(base, "unet", golden.ATTENTION), 2, 3.0, 1e-2, **options)


def values_of(session: Any) -> dict[str, np.ndarray]:
    return {name: value.asnumpy().copy() for name, value in session._optimizer.names.items()}


def test_noise_has_the_same_bits_here() -> None:
    found = normal(0, "noise", 0, 0, (6,)).astype(">f4").tobytes().hex(" ", 4)
    assert found == "bf68b3b3 401591b8 bf9e5c6a bf8cdf6b 3f02b8d9 bf537808"  # as in tests/core/training/test_noise.py


@pytest.mark.parametrize("case", ["low rank", "whole weights"])
def test_an_update_is_the_cores_reference_adamw(case: str, tiny: Any, opened: Any) -> None:
    base = tiny()
    options = Optimizer(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
    plan = dataclasses.replace(golden.cases(base)[case], optimizer=options)
    session = opened(base, plan)
    values = {name: value.astype(np.float64) for name, value in values_of(session).items()}
    state = AdamWState.start(values)
    for step in range(3):
        session.accumulate(golden.batch_of(base, case, number=step))
        gradients = {name: value.astype(np.float64) for name, value in session._optimizer.gradients.items()}
        clipped, norm = clip_norm(gradients, 0.05)
        rate = 1e-2 / (step + 1)
        values, state = adamw(values, clipped, state, rate, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
        assert session.update([rate] * len(plan.trains), 0.05)[0] == pytest.approx(norm, rel=1e-6)
    for name, value in values_of(session).items():
        np.testing.assert_allclose(value, values[name], atol=1e-6, err_msg=name)


def test_lora_plus_moves_up_at_its_own_rate(tiny: Any, opened: Any) -> None:
    base = tiny()
    session = opened(base, golden.plan_of(low_rank(base, up_rate_ratio=4.0)))
    session.load_state(golden.start_values(session.state()))
    before = values_of(session)
    session.accumulate(golden.batch_of(base, "low rank"))
    session.update([1e-3], 0.0)
    moved = {name: np.abs(value - before[name]).max() for name, value in values_of(session).items()}
    # the first step of Adam is the learning rate in every direction; decay adds 1 % of the value's own size times it
    assert all(moved[name] == pytest.approx(4e-3 if name.endswith(".up") else 1e-3, rel=0.02) for name in moved)


def go_on(session: Any, base: Any, case: str, steps: range) -> list[Any]:
    seen: list[Any] = []
    for step in steps:
        seen += [session.accumulate(golden.batch_of(base, case, number=2 * step + part)).tolist() for part in range(2)]
        seen.append(session.update([1e-3 * (step + 1)] * len(session.plan.trains), 1.0))
        if session.plan.ema_decay is not None:
            session.average(0.5)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_straight_run(case: str, tiny: Any, opened: Any) -> None:
    base = tiny()
    plan = dataclasses.replace(golden.cases(base)[case], ema_decay=0.9 if case != "new tokens" else None)
    if case == "low rank":
        plan = dataclasses.replace(plan, trains=(dataclasses.replace(plan.trains[0], dropout=0.3),))
    straight = opened(base, plan)
    go_on(straight, base, case, range(1))
    kept = {name: value.copy() for name, value in straight.state().items()}
    expected = go_on(straight, base, case, range(1, 2))
    resumed = opened(base, plan)
    resumed.load_state(kept)
    assert go_on(resumed, base, case, range(1, 2)) == expected
    end, again = straight.state(), resumed.state()
    assert again.keys() == end.keys()
    assert all(np.array_equal(again[name], end[name]) for name in end)


def test_dropout_differs_between_updates_and_is_off_in_evaluation(tiny: Any, opened: Any) -> None:
    base, batch = tiny(), golden.batch_of(tiny(), "low rank")
    session = opened(base, golden.plan_of(low_rank(base, dropout=0.5)))
    session.load_state(golden.start_values(session.state()))
    plain = opened(base, golden.plan_of(low_rank(base)))
    plain.load_state(golden.start_values(plain.state()))
    np.testing.assert_array_equal(session.evaluate(batch), plain.evaluate(batch))
    first = session.accumulate(batch)
    assert not np.array_equal(first, session.accumulate(batch)), "every micro-batch has masks of its own"
    session.update([0.0], 1.0)
    assert not np.array_equal(first, session.accumulate(batch))


def test_a_state_knows_no_framework(tiny: Any, opened: Any) -> None:
    base = tiny()
    session = opened(base, golden.cases(base)["whole weights"])
    state = session.state()
    shapes = {f"value/{component}.{name}": parameter.shape for component in ("unet", "text_encoder")
              for name, parameter in base.parameters[component].items()}  # fmt: skip
    assert {name: value.shape for name, value in state.items() if name.startswith("value/")} == shapes
    fewer = {name: value for name, value in state.items() if not name.endswith("fc1.weight")}
    with pytest.raises(ResumeError, match=r"fc1\.weight is missing"):
        session.load_state(fewer)


def test_every_vector_of_a_new_word_moves_and_nothing_else(tiny: Any, opened: Any) -> None:
    base = tiny("tiny-sdxl")
    session = opened(base, golden.cases(base)["new tokens"])
    start = session.product().embeddings
    session.accumulate(golden.batch_of(base, "new tokens"))
    session.update([1e-2], 0.0)
    learned = session.product().embeddings
    assert [embedding.token for embedding in learned] == ["<toy>", "<other>"]
    from persona.plugins.backends.mindspore.cells import parameters_of

    for name in base.text_encoders:
        key = "text_model.embeddings.token_embedding.weight"
        rows = value_of(f"{name}.{key}", base.parameters[name][key].shape)
        words, before = session._words[name], start[0].vectors[name].read()
        np.testing.assert_array_equal(before, rows[[*words.split("red cat"), words.split("red")[0]]])  # cycled
        moved = np.abs(learned[0].vectors[name].read() - before).max(axis=1)
        assert (moved > 1e-3).all(), "every vector is trained, not only the first"
        for path, parameter in parameters_of(session._components[name]):
            own = path.replace("token_embedding.base.", "token_embedding.")
            if "token_embedding.added" not in own:
                np.testing.assert_array_equal(parameter.asnumpy(), value_of(f"{name}.{own}", tuple(parameter.shape)))


def test_a_product_is_what_was_trained(tiny: Any, opened: Any) -> None:
    base = tiny()
    trained = opened(base, golden.cases(base)["low rank"])
    trained.load_state(golden.start_values(trained.state()))
    adapter, state = trained.product(), trained.state()
    for name, value in state.items():
        if name.endswith(".up"):
            down = state[name.removesuffix("up") + "down"]
            path = name.removeprefix("value/unet.").removesuffix(".up")
            by_hand = 3.0 / 2 * value.reshape(len(value), -1) @ down.reshape(len(down), -1)
            found = delta(adapter.entries["unet", path])
            np.testing.assert_allclose(found.reshape(by_hand.shape), by_hand, rtol=1e-5, atol=1e-6)
    plain = opened(base)
    batch = golden.batch_of(base, "low rank")
    assert np.abs(plain.evaluate(batch) - trained.evaluate(batch)).max() > 1e-3
    assert plain.load_adapters([(adapter, 1.0)]) == [f"{len(adapter.entries)} modules changed at strength 1."]
    np.testing.assert_allclose(plain.evaluate(batch), trained.evaluate(batch), rtol=1e-5)


def test_whole_weights_come_out_in_torchs_layout(tiny: Any, opened: Any) -> None:
    base = tiny()
    target = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    session = opened(base, golden.plan_of(Weights("unet", 1e-2, (target,))))
    session.accumulate(golden.batch_of(base, "low rank"))
    session.update([1e-2], 1.0)
    product = session.product().components["unet"]
    assert {name: tensor.shape for name, tensor in product.items()} == {
        name: parameter.shape for name, parameter in base.parameters["unet"].items()}  # fmt: skip
    for name, tensor in product.items():
        moved = np.abs(tensor.read() - value_of(f"unet.{name}", tensor.shape)).max()
        assert (1e-3 < moved < 2e-2) if name.startswith(target) else moved == 0, name


def test_an_average_lags_behind_and_is_what_the_product_holds(tiny: Any, opened: Any) -> None:
    base = tiny()
    session = opened(base, golden.plan_of(low_rank(base), ema_decay=0.75))
    name = next(iter(session._optimizer.names))
    average = values_of(session)[name]
    for step, decay in enumerate((0.0, 0.5, 0.75)):
        session.accumulate(golden.batch_of(base, "low rank", number=step))
        session.update([1e-2], 1.0)
        session.average(decay)
        average = decay * average + (1 - decay) * values_of(session)[name]
    path = name.removeprefix("unet.").removesuffix(".down")
    np.testing.assert_allclose(session.product().entries["unet", path].factors["down"].read(), average, atol=1e-7)
    batch, before = golden.batch_of(base, "low rank"), values_of(session)[name]
    averaged = session.evaluate(batch)
    np.testing.assert_array_equal(values_of(session)[name], before)
    assert not np.array_equal(averaged, session.accumulate(batch))


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_delta_from_the_base_weight_starts_as_the_base(initialisation: str, tiny: Any, opened: Any) -> None:
    base, batch = tiny(), golden.batch_of(tiny(), "low rank")
    session = opened(base, golden.plan_of(low_rank(base, initialisation=initialisation)))
    plain = opened(base)
    np.testing.assert_allclose(session.evaluate(batch), plain.evaluate(batch), rtol=1e-5)
    session.accumulate(batch)
    session.update([1e-2], 1.0)
    assert np.abs(session.evaluate(batch) / plain.evaluate(batch) - 1).max() > 1e-3
    plain.load_adapters([(session.product(), 1.0)])
    np.testing.assert_allclose(plain.evaluate(batch), session.evaluate(batch), rtol=1e-4)


def test_a_loss_that_is_not_finite_is_told_and_leaves_nothing_to_update_with(tiny: Any, opened: Any) -> None:
    base = tiny()
    session, batch = opened(base, golden.cases(base)["low rank"]), golden.batch_of(base, "low rank")
    latents = batch.latents.copy()
    latents[1, 0, 0, 0] = np.nan
    assert np.isfinite(session.accumulate(dataclasses.replace(batch, latents=latents))).tolist() == [True, False]
    with pytest.raises(TrainingError, match="no gradients"):
        session.update([1e-2], 1.0)


def test_targets_that_cannot_be_trained_are_refused(tiny: Any, opened: Any) -> None:
    base = tiny()
    path = golden.modules(base, "unet", (".attn1.to_q",))[0]
    with pytest.raises(UsageError, match="no module") as missing:
        opened(base, golden.plan_of(LowRank("unet", (path + "x",), 2, 2.0, 1e-3)))
    assert path in missing.value.hint
    with pytest.raises(UsageError, match="GroupNorm"):
        opened(base, golden.plan_of(LowRank("unet", ("conv_norm_out",), 2, 2.0, 1e-3)))
    with pytest.raises(UsageError, match="twice"):
        opened(base, golden.plan_of(LowRank("unet", (path, path), 2, 2.0, 1e-3)))
    with pytest.raises(UsageError, match="no weights called"):
        opened(base, golden.plan_of(Weights("unet", 1e-3, ("nothing",))))
    with pytest.raises(UsageError, match="no optimizer"):
        opened(base, golden.plan_of(low_rank(base), optimizer=Optimizer("lion")))


def test_fp16_is_near_fp32_and_its_gradients_are_scaled(tiny: Any, opened: Any) -> None:
    base, batch = tiny(), golden.batch_of(tiny(), "low rank")
    half, full = (opened(base, golden.plan_of(low_rank(base), precision=precision)) for precision in ("fp16", "fp32"))
    for session in (half, full):
        session.load_state(golden.start_values(session.state()) | {"loss_scale": session.state()["loss_scale"]})
    np.testing.assert_allclose(half.accumulate(batch), full.accumulate(batch), rtol=2e-2)
    norms = [session.update([1e-3], 1.0) for session in (half, full)]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=5e-2) and not norms[0][1]
    with pytest.raises(UsageError, match="whole weights in fp32"):
        opened(base, golden.plan_of(Weights("unet", 1e-3), precision="fp16"))


@pytest.mark.parametrize("case", ["decomposed, with text encoder", "whole weights"])
def test_gradient_checkpointing_changes_no_gradient(case: str, tiny: Any, opened: Any) -> None:
    base = tiny()
    plan = golden.cases(base)[case]
    if case != "whole weights":  # masks have to be those of the forward pass when it is computed again
        plan = dataclasses.replace(plan, trains=tuple(dataclasses.replace(t, dropout=0.3) for t in plan.trains))
    found = []
    for checkpointing in (False, True):
        session = opened(base, dataclasses.replace(plan, gradient_checkpointing=checkpointing))
        blocks = [cell for _, cell in session._components["unet"].cells_and_names() if cell._recompute_cell is not None]
        assert bool(blocks) == checkpointing
        session.load_state(golden.start_values(session.state()))
        losses = [session.accumulate(golden.batch_of(base, case, number=number)) for number in range(2)]
        found.append((losses, session._optimizer.gradients))
    (losses, plain), (again, recomputed) = found
    np.testing.assert_array_equal(losses, again)
    assert plain.keys() == recomputed.keys()
    largest = max(float(np.abs(gradient).max()) for gradient in plain.values())
    for name, gradient in plain.items():
        np.testing.assert_allclose(recomputed[name], gradient, rtol=1e-4, atol=1e-6 * largest, err_msg=name)


def test_weights_that_nothing_depends_on_stay_what_they_are(tiny: Any, opened: Any) -> None:
    base = tiny("tiny-sdxl")
    plan = golden.plan_of(Weights("text_encoder", 1e-3), optimizer=Optimizer(weight_decay=0.5))
    session, batch = opened(base, plan), golden.batch_of(base, "whole weights")
    last = base.components["text_encoder"]["num_hidden_layers"] - 1
    unread = {name for name in session._optimizer.names if f".layers.{last}." in name or "final_layer_norm" in name}
    assert unread
    loss = session.evaluate(batch)
    for name in unread:  # the evidence: whatever they are, the loss is the same
        session._optimizer.names[name].set_data(session._optimizer.names[name] * 1.5)
    np.testing.assert_array_equal(session.evaluate(batch), loss)
    before = values_of(session)
    session.accumulate(batch)
    session.update([1e-2], 1.0)
    moved = {name for name, value in values_of(session).items() if not np.array_equal(value, before[name])}
    assert moved == before.keys() - unread
    assert not any(name.partition("/")[2] in unread for name in session.state() if name.startswith("adam"))
    with pytest.raises(UsageError, match="No picture depends"):
        opened(base, golden.plan_of(Weights("text_encoder", 1e-3, (f"text_model.encoder.layers.{last}",))))
