"""A session's losses, gradients and updates against a loop written by hand with diffusers and torch alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import attention_lora, batch_of, modules, plan_of
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel

from persona.core.host.errors import TrainingError, UsageError
from persona.core.training.optimizer import AdamWState, adamw, clip_norm
from persona.core.training.plan import LowRank, NewToken, NewTokens, Optimizer, Weights


def hand_loss(unet: Any, batch: Any, given: dict[str, Any], mask: Any = None) -> tuple[Any, Any]:
    """Weighted loss and losses per sample, sample by sample, with x_t = a·x0 + s·ε and target = p·x0 + q·ε."""
    losses = []
    for n in range(len(batch)):
        x0, noise = torch.tensor(batch.latents[n : n + 1]), torch.tensor(batch.noise[n : n + 1])
        noisy = float(batch.a[n]) * x0 + float(batch.s[n]) * noise
        target = float(batch.p[n]) * x0 + float(batch.q[n]) * noise
        added = None
        if batch.time_ids is not None:
            added = {"text_embeds": given["pooled"][n : n + 1], "time_ids": torch.tensor(batch.time_ids[n : n + 1])}
        prediction = unet(
            noisy,
            torch.tensor(batch.timesteps[n]),
            encoder_hidden_states=given["hidden_states"][n : n + 1],
            added_cond_kwargs=added,
        ).sample
        error = (prediction - target).square()
        if mask is not None:
            error = error * torch.tensor(mask[n : n + 1])
        losses.append(error.sum() / error.numel())
    return sum(float(w) * loss for w, loss in zip(batch.w, losses, strict=True)), torch.stack(losses).detach()


def cached(batch: Any) -> dict[str, Any]:
    return {key: torch.tensor(value) for key, value in batch.embeddings.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_lora_loss_and_gradients_are_those_of_diffusers_with_peft(kind: str, narrow: Any, opened: Any) -> None:
    base = narrow(kind)
    trained = attention_lora(base)
    session = opened(base, plan_of(trained))
    unet = UNet2DConditionModel.from_pretrained(base.path / "unet")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=trained.rank, lora_alpha=trained.alpha, target_modules=list(trained.targets)))
    theirs = {}
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            path, _, rest = name.partition(".lora_")
            theirs[f"unet.{path}.{'down' if rest.startswith('A') else 'up'}"] = parameter
    assert theirs.keys() == session._optimizer.names.keys()
    random = np.random.default_rng(5)
    for name, value in session._optimizer.names.items():  # away from the zeros that hide half of the gradients
        value.data = torch.from_numpy(0.1 * random.standard_normal(value.shape, np.float32))
        theirs[name].data = value.data
    mask = random.uniform(0, 1, (2, 1, 8, 8)).astype(np.float32)
    for batch in (batch_of(base, seed=1), batch_of(base, seed=2, mask=mask)):
        losses = session.accumulate(batch)
        loss, expected = hand_loss(unet, batch, cached(batch), batch.mask)
        loss.backward()
        np.testing.assert_allclose(losses, expected.numpy(), rtol=2e-5)
    for name, value in session._optimizer.names.items():  # both batches added up
        atol = 1e-4 * float(theirs[name].grad.abs().max()) + 1e-9
        np.testing.assert_allclose(value.grad.numpy(), theirs[name].grad.numpy(), atol=atol, err_msg=name)


def test_whole_weights_follow_torch_adamw_with_clipping(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    targets = modules(base, "unet", (".attn2.to_k", ".attn2.to_v"), limit=6)
    options = Optimizer(beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
    session = opened(base, plan_of(Weights("unet", 1e-3, targets), optimizer=options))
    unet = UNet2DConditionModel.from_pretrained(base.path / "unet").requires_grad_(False)
    chosen = [unet.get_submodule(path).weight.requires_grad_(True) for path in targets]
    optimizer = torch.optim.AdamW(chosen, lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=False)
    for step in range(3):
        batch = batch_of(base, seed=step)
        session.accumulate(batch)
        norm, skipped = session.update([1e-3 / (step + 1)], 0.01)
        loss, _ = hand_loss(unet, batch, cached(batch))
        loss.backward()
        expected = torch.nn.utils.clip_grad_norm_(chosen, 0.01)
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()
        assert not skipped
        assert norm == pytest.approx(float(expected), rel=1e-4)
    product = session.product()
    for path, weight in zip(targets, chosen, strict=True):
        trained = product.components["unet"][f"{path}.weight"].read()
        np.testing.assert_allclose(trained, weight.detach().numpy(), atol=1e-6)
    untouched = product.components["unet"]["conv_in.weight"].read()
    np.testing.assert_array_equal(untouched, unet.conv_in.weight.numpy())


def test_an_update_is_the_cores_reference_adamw(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base)))
    values = {name: value.detach().numpy().astype(np.float64) for name, value in session._optimizer.names.items()}
    state = AdamWState.start(values)
    for step in range(3):
        session.accumulate(batch_of(base, seed=step))
        gradients = {n: v.grad.numpy().astype(np.float64) for n, v in session._optimizer.names.items()}
        clipped, norm = clip_norm(gradients, 0.05)
        values, state = adamw(values, clipped, state, 1e-2)
        assert session.update([1e-2], 0.05)[0] == pytest.approx(norm, rel=1e-6)
    for name, value in session._optimizer.names.items():
        np.testing.assert_allclose(value.detach().numpy(), values[name], atol=1e-6)


def test_each_entry_of_the_plan_has_its_own_learning_rate(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    layers = modules(base, "text_encoder", (".q_proj", ".v_proj"))
    plan = plan_of(attention_lora(base), LowRank("text_encoder", layers, 2, 2.0, 1e-3))
    session = opened(base, plan)
    before = session.state()
    session.accumulate(batch_of(base, embeddings={}, captions=("a photo of a cat", "a dog")))
    session.update([0.0, 1e-3], 0.0)
    after = session.state()
    moved = {name for name in before if name.startswith("value/") and not np.array_equal(before[name], after[name])}
    assert moved and all(name.startswith("value/text_encoder.text_model.encoder.layers.") for name in moved)


def test_loraplus_gives_up_a_rate_of_its_own(narrow: Any, opened: Any) -> None:
    """arXiv 2402.12354 §4. AdamW's first step is the learning rate itself, wherever there is a gradient."""
    base = narrow("sd1")
    low = attention_lora(base, limit=4, initialisation="pissa", up_rate_ratio=16.0)
    session = opened(base, plan_of(low, optimizer=Optimizer(weight_decay=0.0)))
    before = session.state()
    session.accumulate(batch_of(base))
    session.update([1e-4], 0.0)
    after = session.state()
    for name in (name for name in before if name.startswith("value/")):
        step = np.median(np.abs(after[name] - before[name]))
        assert step == pytest.approx(16e-4 if name.endswith(".up") else 1e-4, rel=0.01), name


def test_text_encoder_gradients_come_through_the_denoiser(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(Weights("text_encoder", 1e-3)))
    captions = ("a photo of a cat", "a red toy on the blue background")
    batch = batch_of(base, embeddings={}, captions=captions)
    losses = session.accumulate(batch)
    unet = UNet2DConditionModel.from_pretrained(base.path / "unet").requires_grad_(False)
    encoder = CLIPTextModel.from_pretrained(base.path / "text_encoder")
    ids, _ = session._words["text_encoder"].ids(captions)
    loss, expected = hand_loss(unet, batch, {"hidden_states": encoder(torch.from_numpy(ids))[0]})
    loss.backward()
    np.testing.assert_allclose(losses, expected.numpy(), rtol=2e-5)
    for name, parameter in encoder.named_parameters():
        ours = session._optimizer.names[f"text_encoder.text_model.{name.removeprefix('text_model.')}"].grad
        atol = 1e-4 * float(parameter.grad.abs().max())
        np.testing.assert_allclose(ours.numpy(), parameter.grad.numpy(), atol=atol + 1e-9, err_msg=name)


def test_only_the_new_rows_of_a_token_move(narrow: Any, opened: Any) -> None:
    base = narrow("sdxl")
    tokens = (NewToken("<toy>", "red cat", 3), NewToken("<other>", "dog"))
    encoders = ("text_encoder", "text_encoder_2")
    session = opened(base, plan_of(NewTokens(encoders, tokens, 1e-2)))
    tables = {name: session._components[name] for name in encoders}
    frozen = {
        name: {k: v.clone() for k, v in model.state_dict().items() if "added" not in k}
        for name, model in tables.items()
    }
    start = session.product().embeddings
    batch = batch_of(base, embeddings={}, captions=("a photo of <toy>", "a <toy> on the background"))
    session.accumulate(batch)
    session.update([1e-2], 0.0)
    learned = session.product().embeddings
    assert [embedding.token for embedding in learned] == ["<toy>", "<other>"]
    for name in encoders:
        rows = start[0].vectors[name].read()
        red, cat = (frozen[name][next(k for k in frozen[name] if "token_embedding" in k)][
            session._words[name].split(word)].numpy() for word in ("red", "cat"))  # fmt: skip
        np.testing.assert_array_equal(rows, np.concatenate([red, cat, red]))  # cycled
        moved = learned[0].vectors[name].read() - rows
        assert (np.abs(moved).max(axis=1) > 1e-3).all(), "every vector is trained, not only the first"
        for key, value in tables[name].state_dict().items():
            if "added" not in key:
                assert torch.equal(value, frozen[name][key])


def test_an_average_lags_behind_and_is_what_the_product_holds(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base), ema_decay=0.75))
    name = next(iter(session._optimizer.names))
    average = session._optimizer.names[name].detach().numpy().copy()
    for step, decay in enumerate([0.0, 2 / 11, 3 / 12, 0.75]):
        session.accumulate(batch_of(base, seed=step))
        session.update([1e-2], 1.0)
        session.average(decay)
        average = decay * average + (1 - decay) * session._optimizer.names[name].detach().numpy()
    component, path, factor = "unet", name.removeprefix("unet.").removesuffix(".down"), "down"
    product = session.product().entries[component, path].factors[factor].read()
    np.testing.assert_allclose(product, average, atol=1e-7)


def test_a_loss_that_is_not_finite_is_told_and_leaves_nothing_to_update_with(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base)))
    latents = batch_of(base).latents.copy()
    latents[1, 0, 0, 0] = np.nan
    losses = session.accumulate(batch_of(base, latents=latents))
    assert np.isfinite(losses).tolist() == [True, False]
    with pytest.raises(TrainingError, match="no gradients"):
        session.update([1e-2], 1.0)


def test_gradients_that_are_not_finite_change_nothing(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base), ema_decay=0.5))
    before = session.state()
    session.accumulate(batch_of(base))
    next(iter(session._optimizer.names.values())).grad[0] = float("inf")
    norm, skipped = session.update([1e-2], 1.0)
    assert norm == float("inf") and not skipped
    after = session.state()
    values = [name for name in before if name.startswith(("value/", "ema/", "adam", "step"))]
    assert all(np.array_equal(before[name], after[name]) for name in values)


def test_cached_embeddings_are_used_although_captions_are_there(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    session = opened(base, plan_of(attention_lora(base)))
    with_captions = session.accumulate(batch_of(base, captions=("a cat", "a dog")))
    assert np.array_equal(with_captions, session.accumulate(batch_of(base)))


def test_targets_that_cannot_be_trained_are_refused(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    path = modules(base, "unet", (".attn1.to_q",), limit=1)[0]
    with pytest.raises(UsageError, match="no module") as missing:
        opened(base, plan_of(LowRank("unet", (path + "x",), 2, 2.0, 1e-3)))
    assert path in missing.value.hint
    with pytest.raises(UsageError, match="GroupNorm"):
        opened(base, plan_of(LowRank("unet", ("conv_norm_out",), 2, 2.0, 1e-3)))
    with pytest.raises(UsageError, match="twice"):
        opened(base, plan_of(LowRank("unet", (path, path), 2, 2.0, 1e-3)))
    with pytest.raises(UsageError, match="no weights called"):
        opened(base, plan_of(Weights("unet", 1e-3, ("nothing",))))
    with pytest.raises(UsageError, match="together"):
        opened(base, plan_of(Weights("unet", 1e-3), attention_lora(base)))
