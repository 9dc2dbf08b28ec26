"""The example subject that ships in the package, and the subjects the benchmarks judge by."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tools.mini.pictures import COLOURS
from tools.subjects.draw import SUBJECTS, picture

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "persona" / "assets" / "subjects" / "robot"
BENCHMARKS = ROOT / "benchmarks" / "subjects"


def folder_of(name: str, kind: str) -> Path:
    """Where the pictures of a subject are kept."""
    return EXAMPLE if (name, kind) == ("robot", "train") else BENCHMARKS / name / kind


def background_of(path: Path) -> str:
    """The name of the colour in the picture's corner: the background as it is, whatever the file is called."""
    corner = np.asarray(Image.open(path).convert("RGB"))[0, 0].astype(int)
    return min(COLOURS, key=lambda name: int(np.abs(corner - COLOURS[name]).sum()))


def test_the_example_subject_is_five_small_pictures_that_its_description_lists() -> None:
    subject = yaml.safe_load((EXAMPLE / "subject.yaml").read_text(encoding="utf-8"))
    listed = {entry["file"]: entry["background"] for entry in subject["pictures"]}
    assert listed == {path.name: background_of(path) for path in EXAMPLE.glob("*.png")}
    assert len(listed) == 5
    assert subject["licence"] == "CC0-1.0"
    assert subject["instance_prompt"] == f"a {subject['token']} {subject['class']}"
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 200_000


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_no_subject_is_judged_on_a_background_it_was_trained_on(name: str) -> None:
    train = [background_of(path) for path in folder_of(name, "train").glob("*.png")]
    held_out = [background_of(path) for path in folder_of(name, "held-out").glob("*.png")]
    assert len(set(train)) == len(train) == 5
    assert len(set(held_out)) == len(held_out) == 5
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_the_script_draws_the_kept_pictures_again(name: str) -> None:
    pose = SUBJECTS[name].held_out[0]
    kept = Image.open(folder_of(name, "held-out") / f"{name}-{pose.background}.png")
    drawn = picture(SUBJECTS[name].design, pose, kept.width)
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(kept.convert("RGB")))
    assert difference.mean() < 1  # Pillow releases may round edges differently


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_a_subject_stays_inside_its_picture(name: str) -> None:
    for kind in ("train", "held-out"):
        for path in folder_of(name, kind).glob("*.png"):
            pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
            border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert np.abs(border - pixels[0, 0]).max() < 40, path.name
