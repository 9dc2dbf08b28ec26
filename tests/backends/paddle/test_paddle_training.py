"""Updates, averages, products and states of the Paddle backend."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ppdiffusers", reason="the Paddle environment is not here: persona backends setup paddle")

from persona.core.adapters.delta import delta
from persona.core.host.errors import ResumeError, UsageError
from persona.core.training.averages import average_decay
from persona.core.training.optimizer import AdamWState, adamw, clip_norm
from persona.core.training.plan import LowRank, Optimizer, Weights
from persona.plugins.backends.shared.loss_scale import LossScale
from tests.backends.golden import cases as golden

CASES = ("low rank", "decomposed, with text encoder", "new tokens", "whole weights")


def low_rank(base: Any, **options: Any) -> LowRank:
    return LowRank("unet", golden.modules(base, "unet", golden.ATTENTION), 2, 3.0, 1e-2, **options)


def test_a_layer_norm_with_frozen_weights_has_the_true_gradient() -> None:
    import paddle

    from persona.plugins.backends.paddle.normalisation import replace_layer_norms

    random = np.random.default_rng(0)
    x, given = random.standard_normal((2, 5, 16)), random.standard_normal((2, 5, 16))
    weight, bias = random.uniform(0.5, 1.5, 16), random.standard_normal(16)
    model = paddle.nn.Sequential(paddle.nn.LayerNorm(16, 1e-5))
    replace_layer_norms(model)
    model[0].weight.set_value(paddle.to_tensor(weight.astype(np.float32)))
    model[0].bias.set_value(paddle.to_tensor(bias.astype(np.float32)))
    for parameter in model.parameters():
        parameter.stop_gradient = True
    tensor = paddle.to_tensor(x.astype(np.float32), stop_gradient=False)
    (model(tensor) * paddle.to_tensor(given.astype(np.float32))).sum().backward()
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    unit, inner = (x - x.mean(-1, keepdims=True)) / deviation, given * weight
    expected = (inner - inner.mean(-1, keepdims=True) - unit * (inner * unit).mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("case", ["low rank", "whole weights"])
def test_an_update_is_the_cores_reference_adamw(case: str, tiny: Any, opened: Any) -> None:
    base = tiny()
    options = Optimizer(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
    plan = dataclasses.replace(golden.cases(base)[case], optimizer=options)
    session = opened(base, plan)
    values = {name: value.read().astype(np.float64) for name, value in session._optimizer.names.items()}
    state = AdamWState.start(values)
    for step in range(3):
        session.accumulate(golden.batch_of(base, case, number=step))
        gradients = {name: value.gradient().astype(np.float64) for name, value in session._optimizer.names.items()}
        clipped, norm = clip_norm(gradients, 0.05)
        rate = 1e-2 / (step + 1)
        values, state = adamw(values, clipped, state, rate, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
        assert session.update([rate] * len(plan.trains), 0.05)[0] == pytest.approx(norm, rel=1e-5)
    for name, value in session._optimizer.names.items():
        np.testing.assert_allclose(value.read(), values[name], atol=1e-6, err_msg=name)


def go_on(session: Any, base: Any, case: str, steps: range) -> list[Any]:
    seen: list[Any] = []
    for step in steps:
        seen += [session.accumulate(golden.batch_of(base, case, number=2 * step + part)).tolist() for part in range(2)]
        seen.append(session.update([1e-3 * (step + 1)] * len(session.plan.trains), 1.0))
        if session.plan.ema_decay is not None:
            session.average(average_decay(session.plan.ema_decay, step + 1))
    return seen


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_straight_run(case: str, tiny: Any, opened: Any) -> None:
    base = tiny()
    plan = dataclasses.replace(golden.cases(base)[case], ema_decay=0.9 if case != "new tokens" else None)
    if case == "low rank":
        plan = dataclasses.replace(plan, trains=(dataclasses.replace(plan.trains[0], dropout=0.3),))
    straight = opened(base, plan)
    go_on(straight, base, case, range(2))
    kept = {name: value.copy() for name, value in straight.state().items()}
    expected = go_on(straight, base, case, range(2, 4))
    resumed = opened(base, plan)
    resumed.load_state(kept)
    assert go_on(resumed, base, case, range(2, 4)) == expected
    end, again = straight.state(), resumed.state()
    assert again.keys() == end.keys()
    assert all(np.array_equal(again[name], end[name]) for name in end)


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
    frozen = {name: {key: value.numpy().copy() for key, value in session._components[name].state_dict().items()}
              for name in base.text_encoders}  # fmt: skip
    start = session.product().embeddings
    session.accumulate(golden.batch_of(base, "new tokens"))
    session.update([1e-2], 0.0)
    learned = session.product().embeddings
    assert [embedding.token for embedding in learned] == ["<toy>", "<other>"]
    for name in base.text_encoders:
        words, table = session._words[name], frozen[name]
        rows = table[next(key for key in table if key.endswith("token_embedding.base.weight"))]
        before = start[0].vectors[name].read()
        np.testing.assert_array_equal(before, rows[[*words.split("red cat"), words.split("red")[0]]])  # cycled
        moved = np.abs(learned[0].vectors[name].read() - before).max(axis=1)
        assert (moved > 1e-3).all(), "every vector is trained, not only the first"
        for key, value in session._components[name].state_dict().items():
            assert ".added." in key or np.array_equal(value.numpy(), table[key]), key


def test_a_product_is_what_was_trained(tiny: Any, opened: Any) -> None:
    base = tiny()
    trained = opened(base, golden.cases(base)["low rank"])
    trained.load_state(golden.start_values(trained.state()))
    adapter = trained.product()
    scale = 3.0 / 2
    for name, value in trained.state().items():
        if name.endswith(".up"):
            down = trained.state()[name.removesuffix("up") + "down"]
            path = name.removeprefix("value/unet.").removesuffix(".up")
            by_hand = scale * value.reshape(len(value), -1) @ down.reshape(len(down), -1)
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
    from tests.numpy_base import value_of

    assert {name: tensor.shape for name, tensor in product.items()} == {
        name: parameter.shape for name, parameter in base.parameters["unet"].items()}  # fmt: skip
    for name, tensor in product.items():
        moved = np.abs(tensor.read() - value_of(f"unet.{name}", tensor.shape)).max()
        assert (1e-3 < moved < 2e-2) if name.startswith(target) else moved == 0, name


def test_an_average_lags_behind_and_is_what_the_product_holds(tiny: Any, opened: Any) -> None:
    base = tiny()
    session = opened(base, golden.plan_of(low_rank(base), ema_decay=0.75))
    name, value = next(iter(session._optimizer.names.items()))
    average = value.read()
    for step, decay in enumerate((0.0, 0.5, 0.75)):
        session.accumulate(golden.batch_of(base, "low rank", number=step))
        session.update([1e-2], 1.0)
        session.average(decay)
        average = decay * average + (1 - decay) * value.read()
    path = name.removeprefix("unet.").removesuffix(".down")
    np.testing.assert_allclose(session.product().entries["unet", path].factors["down"].read(), average, atol=1e-7)
    batch = golden.batch_of(base, "low rank")
    inner = value.read()
    averaged = session.evaluate(batch)
    np.testing.assert_array_equal(value.read(), inner)
    assert not np.array_equal(averaged, session.accumulate(batch))


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_delta_from_the_base_weight_starts_as_the_base(initialisation: str, tiny: Any, opened: Any) -> None:
    base, batch = tiny(), golden.batch_of(tiny(), "low rank")
    session = opened(base, golden.plan_of(low_rank(base, initialisation=initialisation)))
    np.testing.assert_allclose(session.evaluate(batch), opened(base).evaluate(batch), rtol=1e-5)
    session.accumulate(batch)
    session.update([1e-2], 1.0)
    plain = opened(base)
    plain.load_adapters([(session.product(), 1.0)])
    np.testing.assert_allclose(plain.evaluate(batch), session.evaluate(batch), rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tiny: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, case = tiny(), "decomposed, with text encoder"
    plan, found = golden.cases(base)[case], []
    calls: dict[str, int] = {}
    for name in ("ppdiffusers.models.unet_2d_blocks", "paddlenlp.transformers.model_outputs"):
        module = importlib.import_module(name)

        def counted(*given: Any, name: str = name, once_more: Any = module.recompute, **named: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return once_more(*given, **named)

        monkeypatch.setattr(module, "recompute", counted)
    for checkpointing in (False, True):
        assert not calls
        session = opened(base, plan, gradient_checkpointing=checkpointing)
        session.load_state(golden.start_values(session.state()))
        session.accumulate(golden.batch_of(base, case))
        found.append({name: value.gradient() for name, value in session._optimizer.names.items()})
    assert len(calls) == 2, "in the denoiser and in the text encoder"
    for name, gradient in found[0].items():
        np.testing.assert_allclose(found[1][name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def test_gradients_that_are_not_finite_change_nothing(tiny: Any, opened: Any) -> None:
    base = tiny()
    session = opened(base, golden.plan_of(low_rank(base)))
    before = session.state()
    latents = golden.batch_of(base, "low rank").latents.copy()
    latents[1, 0, 0, 0] = np.nan
    losses = session.accumulate(dataclasses.replace(golden.batch_of(base, "low rank"), latents=latents))
    assert np.isfinite(losses).tolist() == [True, False]
    after = session.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_what_cannot_be_trained_is_refused(tiny: Any, opened: Any) -> None:
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
    with pytest.raises(UsageError, match="together"):
        opened(base, golden.plan_of(Weights("unet", 1e-3), low_rank(base)))
    with pytest.raises(UsageError, match="cannot compute in fp16"):
        opened(base, golden.plan_of(low_rank(base), precision="fp16"))
    with pytest.raises(UsageError, match='no optimizer "lion"'):
        opened(base, golden.plan_of(low_rank(base), optimizer=Optimizer(name="lion")))


def test_gradients_of_fp16_are_scaled_and_an_overflow_is_skipped(tiny: Any, opened: Any) -> None:
    """The part of fp16 that is the same on every device; its arithmetic needs a GPU."""
    base, batch = tiny(), golden.batch_of(tiny(), "low rank")
    scaled, plain = (opened(base, golden.plan_of(low_rank(base))) for _ in range(2))
    scaled._optimizer.loss_scale = LossScale(True)
    for session in (scaled, plain):
        session.load_state(golden.start_values(session.state()) | {"loss_scale": session.state()["loss_scale"]})
        session.accumulate(batch)
    for mine, theirs in zip(scaled._optimizer.names.values(), plain._optimizer.names.values(), strict=True):
        np.testing.assert_allclose(mine.gradient() / 65536, theirs.gradient(), rtol=1e-5, atol=1e-9)
    assert scaled.update([1e-2], 0.1)[0] == pytest.approx(plain.update([1e-2], 0.1)[0], rel=1e-5)
    before = scaled.state()
    for name, value in plain.state().items():
        if name.startswith("value/"):
            np.testing.assert_allclose(before[name], value, rtol=1e-5, atol=1e-6)
    scaled._optimizer.loss_scale.value = 2.0**127  # the losses are finite, the scaled gradients are not
    assert np.isfinite(scaled.accumulate(batch)).all()
    norm, skipped = scaled.update([1e-2], 0.1)
    assert not np.isfinite(norm) and skipped
    after = scaled.state()
    assert after["loss_scale"][0] == 2.0**126
    assert all(np.array_equal(before[name], after[name]) for name in before if name != "loss_scale")
