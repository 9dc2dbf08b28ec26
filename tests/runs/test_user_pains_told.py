"""What users of other trainers were not told before, during and after a run, one test each, named by where it was told
(the peers' own issue threads); test_user_pains.py has the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FEW = ("--steps", 2, "--batch", 1, "--sample-steps", 1, "--save-every", 1)
LORA = ("train", "--plugin", "lora", "--prompt", "a toy", "--rank", 2, *FEW)
DREAMBOOTH = ("train", "--plugin", "dreambooth", "--lora", "--class", "toy", *FEW)


def test_own_class_pictures_are_counted_and_the_rest_is_labelled(
    persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d8ahazard/sd_dreambooth_extension#265: may I bring my own class images, and are they right?"""
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own"
    own.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (number * 90, 30, 60)).save(own / f"{number}.png")
    words = (*DREAMBOOTH, "--base", tiny_sd1, "--data", toys, "--class-data", own, "--no-samples")
    answer = persona_(*words, "--class-pictures", 3, "--output", tmp_path / "run")
    assert answer.code == 0, answer.err
    kept = tmp_path / "cache/class-pictures"
    assert f"class pictures (a toy): 2 of your own, 1 by the base, of which 1 have to be made now; kept in {kept}" in (
        answer.err
    )
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    places = [Path(picture["path"]).parent for picture in plan["streams"][1]["pictures"]]
    assert places[:2] == [own, own] and places[2].parent == kept
    enough = persona_(*words, "--class-pictures", 2, "--output", tmp_path / "enough")
    assert "class pictures (a toy): 2 of your own\n" in enough.err and "class pictures 0 of" not in enough.err


def test_class_pictures_are_made_a_few_at_a_time_and_before_anything_is_trained(
    persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface/diffusers#807, PR#829: making class pictures ran out of memory on 8 GB before training began."""
    from persona.plugins.backends.torch.session import TorchSession

    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    asked: list[int] = []
    sample = TorchSession.sample
    monkeypatch.setattr(
        TorchSession, "sample", lambda self, wish: asked.append(len(wish.prompts)) or sample(self, wish)
    )
    words = (*DREAMBOOTH, "--base", tiny_sd1, "--data", toys, "--class-pictures", 10, "--no-samples")
    answer = persona_(*words, "--output", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert sum(asked) == 10 and max(asked) <= 8
    assert answer.err.index("class pictures") < answer.err.index("step 1 of 2")


def test_a_run_can_do_without_painting(persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path) -> None:
    """PaddleMIX PR#724, #726: the final validation ran out of memory on a 910B; a flag to skip it was added later."""
    words = (*LORA, "--base", tiny_sd1, "--data", toys, "--no-samples")
    answer = persona_(*words, "--output", tmp_path / "run")
    assert answer.code == 0, answer.err
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter.safetensors" in made and "sampling" not in answer.err
    assert not made & {"samples", "sheet.png"} and not any(name.startswith(".") for name in made)


@pytest.mark.parametrize("method", ["textual-inversion", "full"])
def test_what_a_run_needs_is_foretold_for_every_method(method: str, persona_: Any, tiny_sd1: Path, toys: Path) -> None:
    """cloneofsimo/lora#112: pivotal tuning needed more memory than expected."""
    words = ("--placeholder", "<toy>", "--initializer", "robot", "--vectors", 3) if method != "full" else (
        "--prompt", "a toy", "--ema-decay", 0.9)  # fmt: skip
    answer = persona_(
        "train", "--plugin", method, *words, *FEW, "--base", tiny_sd1, "--data", toys, "--dry-run", "--json"
    )
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert told["peak_memory_bytes"] > told["weights_and_optimizer_bytes"] > 0 and told["seconds"] > 0
    if method == "textual-inversion":
        assert told["trained_parameters"] == 3 * 32 and told["product_bytes"] == 3 * 32 * 4
    else:  # value, gradient, two moments and an average of each
        assert told["weights_and_optimizer_bytes"] >= told["trained_parameters"] * 20


def test_the_file_alone_says_what_it_is_and_how_to_call_it(
    persona_: Any, tiny_sd1: Path, toys: Path, tmp_path: Path
) -> None:
    """Nerogar/OneTrainer#177, tdrussell/diffusion-pipe#318, bmaltais/kohya_ss#577: who knows the word a year later?"""
    words = (*DREAMBOOTH, "--token", "sks", "--class-pictures", 0, "--base", tiny_sd1, "--data", toys, "--thumbnail")
    assert persona_(*words, "--sample-prompt", "a sks toy", "--output", tmp_path / "run").code == 0
    answer = persona_("inspect", tmp_path / "run/adapter.safetensors", "--json")
    told = json.loads(answer.out)
    said = json.dumps(told)
    for word in ("sks toy", "dreambooth", "modelspec.thumbnail", "persona.base_hash", "modelspec.hash_sha256"):
        assert word in said, word
    samples = sorted(path.name for path in (tmp_path / "run/samples").iterdir())
    assert samples == ["step-000000", "step-000001", "step-000002"]  # diffusion-pipe#425: pictures of each checkpoint
