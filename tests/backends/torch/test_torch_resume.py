"""A session that takes up a state goes on as if nothing had happened, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import attention_lora, batch_of, modules, plan_of

from persona.core.host.errors import ResumeError
from persona.core.training.plan import LowRank, NewToken, NewTokens, Weights

KINDS = (
    "low rank with dropout",
    "from the weight, LoRA+",
    "decomposed, with text encoder",
    "new tokens",
    "whole weights",
    "bf16",
    "fp16",
)


def plans(base: Any) -> dict[str, Any]:
    return {
        "low rank with dropout": plan_of(attention_lora(base, dropout=0.3), ema_decay=0.9),
        "from the weight, LoRA+": plan_of(
            attention_lora(base, dropout=0.3, initialisation="pissa", up_rate_ratio=4.0), ema_decay=0.9
        ),
        "decomposed, with text encoder": plan_of(
            attention_lora(base, decomposed=True),
            LowRank("text_encoder", modules(base, "text_encoder", (".q_proj",)), 2, 2.0, 1e-3, dropout=0.2),
        ),
        "new tokens": plan_of(NewTokens(("text_encoder",), (NewToken("<toy>", "cat", 2),), 1e-3)),
        "whole weights": plan_of(Weights("unet", 1e-4), Weights("text_encoder", 1e-4), ema_decay=0.9),
        "bf16": plan_of(attention_lora(base, dropout=0.3), precision="bf16"),
        "fp16": plan_of(attention_lora(base, dropout=0.3), precision="fp16"),
    }


def go_on(session: Any, base: Any, steps: range) -> list[Any]:
    seen: list[Any] = []
    for step in steps:
        for part in range(2):
            captions = ("a photo of <toy>", "a cat")
            batch = batch_of(base, seed=10 * step + part, embeddings={}, captions=captions)
            seen.append(session.accumulate(batch).tolist())
        rates = [1e-3 * (step + 1)] * len(session.plan.trains)
        seen.append(session.update(rates, 1.0))
        if session.plan.ema_decay is not None:
            session.average(session.plan.ema_decay)
    return seen


@pytest.mark.parametrize("which", KINDS)
def test_a_resumed_run_is_the_straight_run(which: str, narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    plan = plans(base)[which]
    straight = opened(base, plan)
    go_on(straight, base, range(2))
    kept = {name: value.copy() for name, value in straight.state().items()}
    expected = go_on(straight, base, range(2, 4))
    end = straight.state()
    straight.close()
    resumed = opened(base, plan)
    resumed.load_state(kept)
    assert go_on(resumed, base, range(2, 4)) == expected
    again = resumed.state()
    assert again.keys() == end.keys()
    assert all(np.array_equal(again[name], end[name]) for name in end)


def test_names_and_types_in_a_state_know_no_framework(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    text = LowRank("text_encoder", ("text_model.encoder.layers.0.self_attn.q_proj",), 2, 2.0, 1e-3)
    session = opened(base, plan_of(text, ema_decay=0.9))
    session.accumulate(batch_of(base, embeddings={}, captions=("a", "b")))
    session.update([1e-3], 1.0)
    state = session.state()
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    kinds = ("value", "adam_m", "adam_v", "ema")
    assert set(state) == {f"{kind}/{name}.{factor}" for kind in kinds for factor in ("down", "up")} | {
        "step", "loss_scale"}  # fmt: skip
    assert float(state["step"]) == 1.0
    assert all(isinstance(value, np.ndarray) for value in state.values())


def test_a_state_of_another_run_is_refused_and_changes_nothing(narrow: Any, opened: Any) -> None:
    base = narrow("sd1")
    small, large = (opened(base, plan_of(attention_lora(base, rank=rank))) for rank in (2, 3))
    before = small.state()
    with pytest.raises(ResumeError, match=r"is \[3, 32\], not \[2, 32\].* and \d+ more"):
        small.load_state(large.state())
    fewer = {name: value for name, value in before.items() if not name.endswith("to_q.up")}
    with pytest.raises(ResumeError, match=r"to_q\.up is missing"):
        small.load_state(fewer)
    with pytest.raises(ResumeError, match=r"value/unet\.other is unknown"):
        small.load_state(before | {"value/unet.other": np.zeros(1)})
    after = small.state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
