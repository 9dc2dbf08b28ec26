"""Draw the subjects of the demos and the benchmarks: pictures to train on, and held-out ones to judge by.

    python -m tools.subjects.draw train robot persona/assets/subjects/robot --size 256
    python -m tools.subjects.draw held-out robot benchmarks/subjects/robot/held-out --size 64

Run it in the project's folder. It uses no font and draws the same picture every time. The drawings are CC0."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tools.mini.pictures import COLOURS
from tools.subjects import designs
from tools.subjects.pen import Pen

SUPERSAMPLING = 4
PICTURE_SIDE = 512


@dataclass(frozen=True)
class Pose:
    """Where a subject stands in a picture: a background, the subject's side as a share of the picture's, its centre's
    offset from the middle (same share), and a turn in degrees, anticlockwise."""

    background: str
    scale: float
    right: float = 0.0
    down: float = 0.0
    turn: float = 0.0


@dataclass(frozen=True)
class Subject:
    """A design with five poses to learn from and five, on backgrounds never shown in training, to judge by."""

    design: Callable[[Pen], None]
    class_word: str
    train: tuple[Pose, ...]
    held_out: tuple[Pose, ...]


# (scale, right, down, turn): sizes and shifts much as the pictograms of `mini` have them, some turned a little.
TRAIN = (
    (0.96, 0.0, 0.0, 0), (0.84, -0.05, 0.04, 6), (0.90, 0.03, -0.02, -5), (0.82, 0.06, 0.05, 3),
    (0.87, -0.03, -0.04, -7),
)  # fmt: skip
HELD_OUT = (
    (0.92, 0.0, 0.01, 0), (0.85, 0.05, 0.04, -4), (0.88, -0.03, -0.02, 5), (0.83, -0.05, 0.05, -6),
    (0.94, 0.01, 0.0, 2),
)  # fmt: skip


def subject(design: Callable[[Pen], None], class_word: str, train: str, held_out: str) -> Subject:
    """A subject in the standard placements, one background word for each."""
    return Subject(
        design,
        class_word,
        tuple(Pose(word, *place) for word, place in zip(train.split(), TRAIN, strict=True)),
        tuple(Pose(word, *place) for word, place in zip(held_out.split(), HELD_OUT, strict=True)),
    )


SUBJECTS: dict[str, Subject] = {
    "robot": subject(designs.robot, "robot", "white red yellow blue pink", "purple black green gray brown"),
    "mug-cat": subject(designs.mug_cat, "cat", "white green purple red cyan", "black pink gray orange blue"),
    "snail-car": subject(designs.snail_car, "snail", "white orange blue pink black", "yellow red cyan gray brown"),
    "teapot-creature": subject(
        designs.teapot_creature, "teapot", "white purple gray green pink", "blue black orange brown yellow"
    ),
    "plaid-owl": subject(designs.plaid_owl, "owl", "white cyan pink green gray", "purple brown black yellow red"),
}


def picture(design: Callable[[Pen], None], pose: Pose, side: int = PICTURE_SIDE) -> Image.Image:
    """The design in that pose, an RGB picture of `side` × `side` pixels."""
    large = side * SUPERSAMPLING
    pen = Pen(round(large * pose.scale))
    design(pen)
    turned = pen.image.rotate(pose.turn, resample=Image.Resampling.BICUBIC, expand=True)
    left = round(large * (0.5 + pose.right) - turned.width / 2)
    top = round(large * (0.5 + pose.down) - turned.height / 2)
    canvas = Image.new("RGBA", (large, large), (*COLOURS[pose.background], 255))
    layer = Image.new("RGBA", (large, large))
    layer.paste(turned, (left, top))
    canvas.alpha_composite(layer)
    return canvas.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def main() -> None:
    """Write one subject's pictures into a folder, named after subject and background."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("pictures", choices=("train", "held-out"))
    arguments.add_argument("subject", choices=tuple(SUBJECTS))
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--size", type=int, default=PICTURE_SIDE, help="side in pixels (default: 512)")
    given = arguments.parse_args()
    chosen = SUBJECTS[given.subject]
    given.folder.mkdir(parents=True, exist_ok=True)
    for pose in chosen.train if given.pictures == "train" else chosen.held_out:
        path = given.folder / f"{given.subject}-{pose.background}.png"
        picture(chosen.design, pose, given.size).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
