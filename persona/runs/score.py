"""`persona score`, without the command line: folders of pictures, or runs, and what a scorer says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.host.contracts import Scorer
from persona.core.host.errors import DataError, UsageError
from persona.core.training.decode import decode
from persona.core.training.pictures import scan
from persona.core.training.plan import Picture
from persona.core.training.run import RunFolder

Note = Callable[[str], None]


@dataclass(frozen=True)
class Judged:
    """A picture, the prompt it was judged by ("" for none) and its figures; NaN where one could not be had."""

    path: Path
    prompt: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class JudgedFolder:
    """A folder's pictures, judged."""

    folder: Path
    pictures: tuple[Judged, ...] = field(default_factory=tuple)

    @property
    def means(self) -> dict[str, float]:
        """The mean of each figure over the pictures that have it; NaN when none has."""
        names = self.pictures[0].figures if self.pictures else ()
        found = {name: [one.figures[name] for one in self.pictures] for name in names}
        kept = {name: [value for value in values if not math.isnan(value)] for name, values in found.items()}
        return {name: float(np.mean(values)) if values else math.nan for name, values in kept.items()}


def parse_replacements(texts: Sequence[str]) -> dict[str, str]:
    """`WORD=TEXT` for each. Raises UsageError for one without a word or an equals sign."""
    pairs = [text.partition("=") for text in texts]
    for text, (word, sign, _) in zip(texts, pairs, strict=True):
        if not word or not sign:
            raise UsageError(f"{text!r} is not of the form WORD=TEXT.", hint="For example: --replace sks=")
    return {word: replacement for word, _, replacement in pairs}


def score_folders(
    scorer: Scorer,
    folders: Sequence[Path],
    *,
    reference: Path | None = None,
    prompt: str | None = None,
    replace: Mapping[str, str] | None = None,
    note: Note = lambda line: None,
) -> list[JudgedFolder]:
    """Every folder judged; a run is judged by the samples of each of its steps, compared with its own training pictures
    unless a `reference` folder is given. A `prompt` goes before what pictures say of themselves.

    Raises DataError for a folder without readable pictures, UsageError when there is nothing to judge by."""
    references = _pictures(reference, note) if reference else []
    found = []
    for folder in folders:
        run = RunFolder(folder)
        steps = sorted(run.samples.glob("step-*")) if run.plan_file.is_file() else []
        if run.plan_file.is_file() and not steps:
            raise DataError(f"The run {folder} has no samples.", hint="Make some: persona generate --base RUN")
        own = references
        if steps and not reference:
            own = [picture for stream in run.plan().streams if not stream.generated for picture in stream.pictures]
            note(f"{folder}: compared with its {len(own)} training pictures; --reference DIR takes others")
        for place in steps or [folder]:
            found.append(_judge(scorer, place, own, prompt, replace or {}, note))
    return found


def _judge(
    scorer: Scorer,
    folder: Path,
    references: Sequence[Picture],
    prompt: str | None,
    replace: Mapping[str, str],
    note: Note,
) -> JudgedFolder:
    pictures = _pictures(folder, note)
    same = {picture.sha256 for picture in references} & {picture.sha256 for picture in pictures}
    if same:
        note(f"{folder}: {len(same)} of its pictures are references themselves, and as similar as can be")
    prompts = [_replaced(prompt if prompt is not None else prompt_of(picture), replace) for picture in pictures]
    figures = scorer.score([_pixels(one) for one in pictures], references=[_pixels(one) for one in references],
                           prompts=prompts if any(prompts) else ())  # fmt: skip
    if not figures:
        raise UsageError(
            f"There is nothing to judge {folder} by: no references, and its pictures have no prompts.",
            hint=f"Give one of them: persona score {folder} --reference DIR --prompt TEXT",
        )
    judged = [
        Judged(Path(picture.path), text, {name: float(values[place]) for name, values in figures.items()})
        for place, (picture, text) in enumerate(zip(pictures, prompts, strict=True))
    ]
    return JudgedFolder(folder, tuple(judged))


def _pictures(folder: Path, note: Note) -> list[Picture]:
    try:
        found = scan(folder)
    except DataError as error:
        raise DataError(error.message, hint="Name a folder of pictures, or a run: persona score FOLDER") from error
    for problem in found.problems:
        if not problem.used:
            note(f"left out: {problem.path}: {problem.message}")
    return list(found.pictures)


def _pixels(picture: Picture) -> Any:
    return np.asarray(decode(picture.path).image)


def _replaced(prompt: str, replace: Mapping[str, str]) -> str:
    for word, text in replace.items():
        prompt = prompt.replace(word, text)
    return " ".join(prompt.split())


def prompt_of(picture: Picture) -> str:
    """What a picture was to show: its caption (a .txt beside it, a table), else what the file says of itself: persona's
    own `persona` and `prompt`, or `parameters` as A1111 writes it. "" when nothing does."""
    from PIL import Image

    if picture.captions:
        return picture.captions[0]
    with Image.open(picture.path) as image:
        words = {key: value for key, value in image.info.items() if isinstance(value, str)}
    try:
        own = json.loads(words.get("persona", "{}"))
    except ValueError:
        own = {}
    if isinstance(own, dict) and isinstance(own.get("prompt"), str):
        return str(own["prompt"])
    if not words.get("prompt", "{").lstrip().startswith("{"):  # ComfyUI's `prompt` is a graph
        return words["prompt"]
    return words.get("parameters", "").partition("\nNegative prompt:")[0].partition("\nSteps:")[0].strip()
