"""What is compared, and on what: subjects, rows of the table (a method with its options), prompts and noise seeds.

A row has one recipe for all subjects. What it does not say is what a user gets who says nothing: the settings that
registry.yaml recommends for the method on the base, then the method's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "subjects"
TOKEN = "sks"
COLOURS = (
    "white", "black", "red", "green", "blue", "yellow", "orange", "purple", "pink", "gray", "brown", "cyan",
)  # fmt: skip
"""Every background the base knows: class pictures are on all of them, so that none comes to mean the subject."""

OTHERS = ("a red apple", "a bicycle", "a house", "a crab", "a guitar", "a cactus", "an umbrella", "a pizza")
"""Names that no subject has anything to do with."""
SUBJECT_SEEDS, CLASS_SEEDS = 3, 2
"""Pictures of each prompt: of the subject, and of its class."""


@dataclass(frozen=True)
class Bench:
    """One benchmark: where it keeps everything, what is personalised, how pictures are made, and options that win over
    every row's."""

    folder: Path
    base: str = "mini"
    sampler_steps: int = 20
    guidance_scale: float = 4.0
    class_pictures: int = 64  # as many as dreambooth makes by itself
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """One of benchmarks/subjects: its folder's name and the word for its class."""

    name: str
    class_word: str
    article: str = "a"

    @property
    def train(self) -> Path:
        """The pictures a run learns from."""
        own = FOLDER / self.name / "train"
        return own if own.is_dir() else ROOT / "persona" / "assets" / "subjects" / self.name

    @property
    def held_out(self) -> Path:
        """The pictures a run is judged by, which none is trained on."""
        return FOLDER / self.name / "held-out"

    @property
    def colours(self) -> list[str]:
        """The backgrounds of the held-out pictures: what the subject is asked for on."""
        return [colour_of(path) for path in sorted(self.held_out.glob("*.png"))]

    @property
    def class_prompt(self) -> str:
        """The class on every background, in turn."""
        return f"{self.article} {self.class_word}{{{'|'.join(f' on {a(colour)} background' for colour in COLOURS)}}}"


SUBJECTS = (
    Subject("robot", "robot"),
    Subject("mug-cat", "cat"),
    Subject("snail-car", "snail"),
    Subject("teapot-creature", "teapot"),
    Subject("plaid-owl", "owl", "an"),
)


@dataclass(frozen=True)
class Row:
    """A row of the table: the method, what it is told beyond the defaults, and how the subject is then called."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def called(self, subject: Subject) -> str:
        """The subject in a prompt."""
        if self.method == "textual-inversion":
            return f"a {placeholder(subject)}"
        return f"a {TOKEN} {subject.class_word}"

    def recipe(self, subject: Subject, class_data: Path, class_pictures: int) -> dict[str, Any]:
        """The options of a run: the row's, with the words of the subject."""
        if self.method == "dreambooth":
            words: dict[str, Any] = {"class_word": subject.class_word, "token": TOKEN}
            words |= {"class_prompt": subject.class_prompt}
            if self.options.get("class_pictures", 1):
                words |= {"class_data": str(class_data), "class_pictures": class_pictures}
        elif self.method == "textual-inversion":
            words = {"placeholder": [placeholder(subject)], "initializer": [subject.class_word]}
            words |= {"replaces": [f"{TOKEN} {subject.class_word}"]}
        else:
            words = {}
        return words | dict(self.options)


CONTROL = "lora, values shuffled"
PRIOR, NO_PRIOR = "dreambooth", "dreambooth without prior"
ROWS = (
    Row(PRIOR, "dreambooth"),
    Row(NO_PRIOR, "dreambooth", {"class_pictures": 0}),
    Row("lora", "lora"),
    Row(CONTROL, "lora"),  # trains nothing: the row above with its values in another order
    Row("textual-inversion", "textual-inversion", {"vectors": 4}),
    Row("full", "full"),
)


@dataclass(frozen=True)
class Asked:
    """A picture to be made: its prompt, the seed of its noise, and the background it has to have."""

    prompt: str
    seed: int
    colour: str


def of_subject(called: str, subject: Subject) -> list[Asked]:
    """The subject, by whatever it is `called`, on the backgrounds of the held-out pictures."""
    return _on_colours(called, subject, SUBJECT_SEEDS)


def of_class(subject: Subject) -> list[Asked]:
    """The class on the same backgrounds from the same noise: the first of those that `of_subject` asks the base for."""
    return _on_colours(f"{subject.article} {subject.class_word}", subject, CLASS_SEEDS)


def of_others() -> list[Asked]:
    """Each unrelated name once."""
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(OTHERS))]
    return [
        Asked(f"{name} on {a(colour)} background", 500 + number, colour)
        for number, (name, colour) in enumerate(zip(OTHERS, colours, strict=True))
    ]


def _on_colours(called: str, subject: Subject, seeds: int) -> list[Asked]:
    return [
        Asked(f"{called} on {a(colour)} background", 100 * seed + number, colour)
        for seed in range(1, seeds + 1)
        for number, colour in enumerate(subject.colours)
    ]


def placeholder(subject: Subject) -> str:
    """The new word of textual inversion."""
    return f"<{subject.name}>"


def a(colour: str) -> str:
    """The colour with its article."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def colour_of(path: Path) -> str:
    """The background of a subject's picture, which its file is named after: robot-red.png."""
    return path.stem.rpartition("-")[2]
