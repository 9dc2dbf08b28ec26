"""Every method, optimizer and average, from the command line to the product: a run that is trained further is, bit for
bit, the longer run; and what else a run leaves behind."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from persona.api import load

FEW = ("--batch", 2, "--save-every", 2, "--keep-last", 9, "--sample-steps", 1, "--sample-prompt", "a toy")
RUNS: dict[str, tuple[Any, ...]] = {
    "textual inversion": (
        "--plugin", "textual-inversion", "--placeholder", "<toy>", "--initializer", "robot", "--vectors", 2,
        "--learning-rate", 1e-2, "--ema-decay", 0.9,
    ),
    "full": ("--plugin", "full", "--train-text-encoder", "--target", "attn2", "--ema-decay", 0.9, "--prompt", "a toy"),
    "lora with adafactor, DoRA, convolutions": (
        "--plugin", "lora", "--dora", "--conv-rank", 2, "--optimizer", "adafactor", "--shuffle-tags", "--repeats", 2,
        "--min-snr-gamma", 5, "--caption-dropout", 0.2, "--prompt", "red, toy, blue, dog", "--target-rank", "attn2.*=2",
        "--alpha-mask",
    ),
    "dreambooth of two subjects": (
        "--plugin", "dreambooth", "--lora", "--init", "orthogonal", "--rslora", "--class-pictures", 2, "--rank", 2,
        "--train-text-encoder", "--part-learning-rate", "text_encoder=1e-3",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shapes of picture, one with transparency."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, size in enumerate([(128, 64), (64, 128), (96, 96), (130, 64)]):
        drawn = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 4 if number == 2 else 3), np.uint8)
        Image.fromarray(drawn).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    """kohya's layout: two subjects."""
    folder = tmp_path_factory.mktemp("subjects")
    for name, number in (("2_sks toy", 0), ("1_zwx dog", 1)):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes((photographs / f"{number}.png").read_bytes())
    return folder


def product(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in [*run.glob("adapter*.safetensors"), *(run / "model").rglob("*")]
        if path.is_file()
    }


def load_files(product: Path) -> dict[str, dict[str, tuple[str, bytes]]]:
    """Every tensor of a file, or of all files in a folder."""
    files = [product] if product.is_file() else sorted(product.rglob("*.safetensors"))
    return {
        file.parent.name if product.is_dir() else "": {
            name: (str(values.dtype), values.tobytes()) for name, values in load_file(file).items()
        }
        for file in files
    }


@pytest.mark.parametrize("which", RUNS)
def test_a_run_trained_further_is_the_longer_run(
    which: str,
    persona_: Any,
    tiny_sd1: Path,
    photographs: Path,
    subjects: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """diffusers#5840, #5412, sd-scripts#1959, musubi-tuner#307: resume began at zero, with other noise or data."""
    data = subjects if which.startswith("dreambooth") else photographs
    words = ("train", *RUNS[which], *FEW, "--base", tiny_sd1, "--data", data)
    straight = persona_(*words, "--steps", 5, "--output", tmp_path / "straight")
    assert straight.code == 0, straight.err
    assert persona_(*words, "--steps", 3, "--output", tmp_path / "further").code == 0
    short = product(tmp_path / "further")
    further = persona_("train", "--resume", tmp_path / "further", "--steps", 5)
    assert further.code == 0, further.err
    assert product(tmp_path / "further") == product(tmp_path / "straight") != short
    monkeypatch.setattr("persona.plugins.backends.torch.backend.TorchBackend.open", None)  # no framework is opened
    place = tmp_path / ("exported" if which == "full" else "exported.safetensors")
    exported = persona_("export", tmp_path / "further", "--output", place, "--json")
    assert exported.code == 0, exported.err
    again = load_files(Path(json.loads(exported.out)[0]))
    its = load_files(next(path for path in (tmp_path / "further/adapter.safetensors", tmp_path / "further/model")
                          if path.exists()))  # fmt: skip
    assert again == its, "a checkpoint is the product that the run wrote"
    states = [
        load_file(tmp_path / run / "checkpoints/step-000005/state.safetensors") for run in ("straight", "further")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0])


def test_a_warm_up_that_is_a_share_of_the_steps_stays_as_long_as_it_was(
    persona_: Any, tiny_sd1: Path, photographs: Path, tmp_path: Path
) -> None:
    words = ("train", "--plugin", "lora", "--prompt", "a toy", *FEW, "--base", tiny_sd1, "--data", photographs)
    assert persona_(*words, "--warmup", 0.5, "--steps", 4, "--output", tmp_path / "further").code == 0
    assert persona_(*words, "--warmup", 2, "--steps", 6, "--output", tmp_path / "straight").code == 0
    further = persona_("train", "--resume", tmp_path / "further", "--steps", 6)
    assert further.code == 0, further.err
    assert load_files(tmp_path / "further/adapter.safetensors") == load_files(tmp_path / "straight/adapter.safetensors")


def test_buckets_validation_and_a_checkpoint_as_an_adapter(
    persona_: Any, tiny_sd1: Path, photographs: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    Image.new("RGB", (70, 140), (10, 200, 30)).save(held_out / "new.png")
    words = ("train", "--plugin", "lora", "--prompt", "a toy", *FEW, "--base", tiny_sd1, "--data", photographs)
    words += ("--buckets", "--epochs", 2, "--validation-data", held_out, "--validation-every", 2, "--also", "kohya")
    answer = persona_(*words, "--output", tmp_path / "run", "--title", "My toy", "--thumbnail", "--scale-lr")
    assert answer.code == 0, answer.err
    assert "2 epochs are 6 steps" in answer.err  # 2 wide, 1 tall and 1 square picture: 1 + 1 + 1 batches an epoch
    assert "learning rate 0.0001 -> 0.0002" in answer.err
    shapes = {values.shape[-2:] for values in load_file(tmp_path / "run/cache/latents.safetensors").values()}
    assert len(shapes) == 3, "three aspect buckets, really encoded at their sizes"
    with (tmp_path / "run/metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [bool(row["validation_loss"]) for row in rows] == [False, True] * 3
    assert "validation loss was lowest after step" in answer.err
    with safe_open(tmp_path / "run/adapter.safetensors", "numpy") as file:
        told = file.metadata()
    assert told["modelspec.title"] == "My toy" and told["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert load(tmp_path / "run/adapter-kohya.safetensors").source.dialect == "kohya"
    assert f"also:    {tmp_path / 'run/adapter-kohya.safetensors'}\n" in answer.err
    card = (tmp_path / "run/README.md").read_text()
    assert card.startswith("---\n") and "# My toy" in card and "adapter-kohya.safetensors" in card
    exported = persona_("export", f"{tmp_path / 'run'}:2", "--output", tmp_path / "early.safetensors", "--json")
    assert exported.code == 0, exported.err
    assert json.loads(exported.out) == [str(tmp_path / "early.safetensors")]
    early, last = (load_file(path) for path in (tmp_path / "early.safetensors", tmp_path / "run/adapter.safetensors"))
    state = load_file(tmp_path / "run/checkpoints/step-000002/state.safetensors")
    name = next(name for name in early if name.endswith("to_q.lora_B.weight"))
    stored = state[f"value/{name.replace('.lora_B.weight', '.up')}"]
    assert np.array_equal(early[name], stored) and not np.array_equal(early[name], last[name])
    again = persona_("export", f"{tmp_path / 'run'}:2", "--output", tmp_path / "early.safetensors")
    assert again.code == 1 and "is there already" in again.err
    missing = persona_("export", f"{tmp_path / 'run'}:3")
    assert missing.code == 1 and "it has 2, 4, 6" in missing.err


def test_pictures_that_are_trained_on_are_no_validation(
    persona_: Any, tiny_sd1: Path, photographs: Path, tmp_path: Path
) -> None:
    words = ("train", "--plugin", "lora", "--prompt", "a toy", "--base", tiny_sd1, "--data", photographs)
    answer = persona_(*words, "--validation-data", photographs, "--output", tmp_path / "run")
    assert answer.code == 1 and "4 of the validation pictures" in answer.err and not (tmp_path / "run").exists()


def test_steps_and_epochs_are_not_asked_for_together(persona_: Any, photographs: Path, tiny_sd1: Path) -> None:
    words = ("train", "--plugin", "lora", "--prompt", "a toy", "--base", tiny_sd1, "--data", photographs)
    answer = persona_(*words, "--steps", 5, "--epochs", 2, "--dry-run")
    assert answer.code == 2 and "--epochs" in answer.err


def test_a_run_of_epochs_is_trained_further_by_steps(
    persona_: Any, tiny_sd1: Path, photographs: Path, tmp_path: Path
) -> None:
    words = ("train", "--plugin", "lora", "--prompt", "a toy", *FEW, "--base", tiny_sd1, "--data", photographs)
    assert persona_(*words, "--epochs", 1, "--output", tmp_path / "run").code == 0
    answer = persona_("train", "--resume", tmp_path / "run", "--steps", 3)
    assert answer.code == 0, answer.err
    assert (tmp_path / "run/checkpoints/step-000003").is_dir()


def test_a_new_word_can_be_drawn_and_opened_by_diffusers(
    persona_: Any, tiny_sd1: Path, photographs: Path, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    words = ("train", *RUNS["textual inversion"], *FEW, "--base", tiny_sd1, "--data", photographs, "--steps", 2)
    assert persona_(*words, "--output", tmp_path / "run").code == 0
    file = tmp_path / "run/adapter.safetensors"
    assert {name: values.shape for name, values in load_file(file).items()} == {"<toy>": (2, 32)}
    told = persona_(
        "generate",
        "--base",
        tiny_sd1,
        "--adapter",
        file,
        "--prompt",
        "a <toy>",
        "--steps",
        1,
        "--output",
        tmp_path / "p",
    )
    assert told.code == 0, told.err
    assert (tmp_path / "p/0000.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_sd1), safety_checker=None, local_files_only=True)
    pipeline.load_textual_inversion(str(file))
    assert pipeline.tokenizer.tokenize("a <toy>")[-1] == "<toy>"


def test_both_encoders_of_sdxl_learn_the_word_and_one_file_brings_it(
    persona_: Any, photographs: Path, tmp_path: Path
) -> None:
    """diffusers#8854, #7511: an SDXL embedding wants two calls with clip_l and clip_g, or loads and does nothing."""
    from tests.narrow_models import narrow_pipeline

    base = narrow_pipeline("sdxl", tmp_path / "sdxl")
    words = ("train", *RUNS["textual inversion"], *FEW, "--base", base, "--data", photographs, "--steps", 2)
    answer = persona_(*words, "--output", tmp_path / "run")
    assert answer.code == 0, answer.err
    file = tmp_path / "run/adapter.safetensors"
    shapes = {name: values.shape for name, values in load_file(file).items()}
    assert shapes == {"clip_l": (2, 32), "clip_g": (2, 48)}
    line = next(line for line in answer.out.splitlines() if line.startswith("use it:"))
    words = shlex.split(line.removeprefix("use it:").replace("…", "a <toy>"))[1:]  # as it is printed, so it is typed
    assert f"--base {base}" in line
    told = persona_(*words, "--steps", 1, "--output", tmp_path / "p")
    assert told.code == 0, told.err
    assert "<toy> is a word of 2 vectors" in told.err
