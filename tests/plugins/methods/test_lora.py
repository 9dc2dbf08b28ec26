"""Plans of LoRA: which modules get which rank and alpha. Names are compared with the base's own parameter names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from persona.core.host.errors import UsageError
from persona.core.training.plan import Picture
from persona.core.training.settings import TrainSettings
from persona.hub.bases import open_base
from persona.plugins.methods.lora import Lora, LoraOptions

PICTURE = Picture("/photos/one.png", ("a dog",))


@pytest.fixture(scope="module")
def mini() -> Any:
    return open_base("mini")


def parts(base: Any, settings: TrainSettings | None = None, **options: Any) -> Any:
    return Lora().plan(LoraOptions(**options), settings or TrainSettings(), base, (PICTURE,)).trains


def modules(base: Any, component: str) -> dict[str, tuple[int, ...]]:
    found = base.parameters[component]
    return {name.removesuffix(".weight"): found[name].shape for name in found if name.endswith(".weight")}


def test_attention_layers_are_the_default(mini: Any) -> None:
    (part,) = parts(mini)
    endings = (".to_q", ".to_k", ".to_v", ".to_out.0")
    assert list(part.targets) == [path for path in modules(mini, "unet") if path.endswith(endings)]
    assert (part.rank, part.alpha, part.ranks, part.alphas) == (8, 8.0, {}, {})


def test_ranks_and_alphas_are_told_by_pattern_the_later_word_winning(mini: Any) -> None:
    (part,) = parts(mini, target_rank=("attn2.*=4", "mid_block.*.attn2.to_k=2"), target_alpha=("to_q=1",))
    for path in part.targets:
        expected = 2 if path.startswith("mid_block") and path.endswith("attn2.to_k") else 4 if ".attn2." in path else 8
        assert part.ranks.get(path, part.rank) == expected
        # without --alpha a module's alpha is its own rank, which is a scale of 1
        assert part.alphas.get(path, part.alpha) == (1.0 if path.endswith("to_q") else expected)


def test_a_given_alpha_holds_for_every_rank(mini: Any) -> None:
    (part,) = parts(mini, alpha=2.0, target_rank=("attn2.*=4",))
    assert {part.alphas.get(path, part.alpha) for path in part.targets} == {2.0}


def test_convolutions_come_with_their_own_rank(mini: Any) -> None:
    (part,) = parts(mini, conv_rank=3, conv_alpha=1.5)
    added = [path for path in part.targets if path in part.ranks]
    convolutions = [
        path for path, shape in modules(mini, "unet").items()
        if len(shape) == 4 and any(word in path for word in ("resnets.", "downsamplers.", "upsamplers."))
    ]  # fmt: skip
    assert sorted(added) == sorted(convolutions) and any("conv1" in path for path in added)
    assert {part.ranks[path] for path in added} == {3} and {part.alphas[path] for path in added} == {1.5}


def test_text_encoders_have_targets_and_a_rate_of_their_own(mini: Any) -> None:
    denoiser, text = parts(
        mini, train_text_encoder=True, text_encoder_targets=("q_proj", "fc1"), text_encoder_learning_rate=1e-6
    )
    assert (denoiser.component, text.component, text.learning_rate) == ("unet", "text_encoder", 1e-6)
    assert all(path.endswith(("q_proj", "fc1")) for path in text.targets) and len(text.targets) == 6
    (only,) = parts(mini, train_text_encoder=True, train_denoiser=False)
    assert only.component == "text_encoder"
    rates = TrainSettings(part_learning_rate=("text_encoder=5e-5",), batch=2, accumulation=3, scale_lr=True)
    plan = Lora().plan(LoraOptions(train_text_encoder=True), rates, mini, (PICTURE,))
    assert [part.learning_rate for part in plan.trains] == [pytest.approx(6e-4), pytest.approx(3e-4)]
    assert any("0.0001 -> 0.0006" in note for note in plan.notes), "the effective rate is told"


def test_a_pattern_gives_some_targets_a_rate_of_their_own(mini: Any) -> None:
    rates = TrainSettings(learning_rate=1e-3, part_learning_rate=("attn2.*=1e-5", "unet.mid_block.*=1e-6"))
    everything = set(parts(mini)[0].targets)
    pieces = parts(mini, rates, target_rank=("attn2.to_q=2",))
    assert [piece.learning_rate for piece in pieces] == [1e-3, 1e-6, 1e-5, 1e-6]
    assert sorted(path for piece in pieces for path in piece.targets) == sorted(everything)
    for piece in pieces:
        for path in piece.targets:
            expected = 1e-6 if path.startswith("mid_block") else 1e-5 if ".attn2." in path else 1e-3
            assert piece.learning_rate == expected
            assert piece.ranks.get(path, piece.rank) == (2 if path.endswith("attn2.to_q") else 8)
    with pytest.raises(UsageError, match="trains no such part"):
        parts(mini, TrainSettings(part_learning_rate=("attn3=1e-5",)))


def test_variants_reach_the_plan(mini: Any) -> None:
    (part,) = parts(mini, decomposed=True, rank_stabilised=True, initialisation="orthogonal", dropout=0.1)
    assert (part.decomposed, part.rank_stabilised, part.initialisation, part.dropout) == (True, True, "orthogonal", 0.1)


def test_excluded_modules_stay_as_they_are(mini: Any) -> None:
    (part,) = parts(mini, exclude=("mid_block.*", "to_v"))
    assert part.targets and not any(path.startswith("mid_block") or path.endswith("to_v") for path in part.targets)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0.0}, "switch the adapter off"),
        ({"rank": 5000}, "above the width"),
        ({"target_rank": ("to_q=5000",)}, "above the width"),
        ({"target_rank": ("to_x=4",)}, "names no module that is trained.*to_"),
        ({"target_rank": ("to_q=1.5",)}, "not a positive number"),
        ({"target_rank": ("to_q",)}, "NAME=NUMBER"),
        ({"targets": ("to_x",)}, "names no module of unet"),
        ({"exclude": ("*",)}, "leaves nothing"),
        ({"decomposed": True, "initialisation": "pissa"}, "does not go together with --dora"),
        ({"train_denoiser": False}, "Nothing would be trained"),
    ],
)
def test_what_cannot_work_is_refused_in_words(mini: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parts(mini, **options)


def test_every_variant_trains_and_comes_out_as_planned(mini: Any) -> None:
    """Mixed ranks with their own alphas, convolutions, DoRA and rsLoRA: the scale of every module is alpha/√rank."""
    from persona.core.host.contracts import Runtime
    from persona.core.training.batch import Batch
    from persona.plugins.backends.torch import TorchBackend

    options = LoraOptions(
        rank=4, conv_rank=2, target_rank=("attn2.to_k=3",), target_alpha=("attn2.to_k=6",), rank_stabilised=True,
        decomposed=True, initialisation="orthogonal", train_text_encoder=True,
    )  # fmt: skip
    plan = Lora().plan(options, TrainSettings(), mini, (PICTURE,))
    session = TorchBackend().open(mini, plan, Runtime("cpu"))
    try:
        ones = np.ones(1, np.float32)
        batch = Batch(
            latents=np.ones((1, 16, 8, 8), np.float32), noise=np.ones((1, 16, 8, 8), np.float32),
            timesteps=np.array([500.0], np.float32), a=ones, s=ones, p=ones * 0, q=ones, w=ones, captions=("a dog",),
        )  # fmt: skip
        session.accumulate(batch)
        session.update([1e-2] * 2, 0.0)
        product = session.product()
    finally:
        session.close()
    for part in plan.trains:
        for path in part.targets:
            entry = product.entries[part.component, path]
            rank = 3 if path.endswith("attn2.to_k") else 2 if ".conv" in f".{path}" and "resnets" in path else None
            if rank is not None:
                assert entry.factors["down"].shape[0] == rank
            alpha = {3: 6.0}.get(rank or 0, float(entry.scale.rank))
            assert entry.scale.value == pytest.approx(alpha / entry.scale.rank**0.5)
            assert entry.magnitude is not None
