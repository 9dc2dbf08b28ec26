"""From kept pictures to figures, and from figures to the table: every run judged, rows averaged, criteria checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from personalise_figures import drift, pairwise, reached, share_right, similarity
from personalise_rows import (
    CONTROL,
    NO_PRIOR,
    PRIOR,
    ROWS,
    SUBJECTS,
    Bench,
    Subject,
    a,
    colour_of,
    of_class,
    of_subject,
)
from personalise_run import Pictures, before, file_of, read
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]
Figures = dict[str, Any]
Embed = Callable[[Any], Array]
BASE, BASE_RARE, REAL = "the base, by the class word", "the base, by the rare word", "real pictures: those trained on"
REACHED, RIGHT, DRIFT, SAME = 0.7, 0.8, 0.7, 0.1
"""What DreamBooth with prior preservation has to reach: of the way to real pictures, of backgrounds, and at most of the
drift without; and how far the control may be from the base, of the way."""


def pictures_in(folder: Path) -> Array:
    """The PNGs of a folder, by name, [n, height, width, 3] uint8."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))])


class Judged:
    """A subject's fixed side, embedded once: held-out pictures, training pictures, what the base made, the texts.

    `see` embeds pictures [n, h, w, 3] uint8 as [n, d], `hear` texts as [n, d], in one space."""

    def __init__(self, subject: Subject, bench: Bench, see: Embed, hear: Embed) -> None:
        self.subject, self.see = subject, see
        self.held_out, self.trained = see(pictures_in(subject.held_out)), see(pictures_in(subject.train))
        self.pictures = before(subject, bench)
        self.before = {part: see(made) for part, made in self.pictures.items()}
        self.asked = of_subject(f"{subject.article} {subject.class_word}", subject)
        self.texts = hear([one.prompt for one in self.asked])
        plain = f"{subject.article} {subject.class_word}"
        shown = [colour_of(path) for path in sorted(subject.train.glob("*.png"))]
        self.captions = hear([f"{plain} on {a(colour)} background" for colour in shown])
        self.real = similarity(self.held_out, self.trained)
        self.start = similarity(self.before["subject"], self.held_out)

    def of_subject(self, pictures: Array, seen: Array) -> Figures:
        """Similarity, the share of the way, fidelity, backgrounds of pictures made for the subject's prompts."""
        from tools.mini.measure import background_of  # imports torch

        like = similarity(seen, self.held_out)
        return {
            "similarity": like,
            "reached": reached(like, self.start, self.real),
            "fidelity": pairwise(seen, self.texts),
            "background": share_right([background_of(one) for one in pictures], [one.colour for one in self.asked]),
        }

    def of_run(self, pictures: Pictures) -> Figures:
        """All figures of a run's pictures."""
        count = len(of_class(self.subject))  # the first of the subject's prompts and noise, with the class word
        return self.of_subject(pictures["subject"], self.see(pictures["subject"])) | {
            "class_drift": drift(self.before["subject"][:count], self.see(pictures["class"])),
            "others_drift": drift(self.before["others"], self.see(pictures["others"])),
        }

    def references(self) -> list[Figures]:
        """The rows that nobody trained."""
        name = self.subject.name
        return [
            {"row": BASE, "subject": name, **self.of_subject(self.pictures["subject"], self.before["subject"])},
            {"row": BASE_RARE, "subject": name, **self.of_subject(self.pictures["sks"], self.before["sks"])},
            {
                "row": REAL,
                "subject": name,
                "similarity": self.real,
                "reached": 1.0,
                "fidelity": pairwise(self.trained, self.captions),
            },
        ]


def judge_all(bench: Bench, seeds: Sequence[int], see: Embed, hear: Embed) -> list[Figures]:
    """The figures of every run that is there, after those of the base and of real pictures."""
    found: list[Figures] = []
    for subject in SUBJECTS:
        made = [(row, seed, file_of(row, subject, seed, bench)) for row in ROWS for seed in seeds]
        made = [one for one in made if one[2].is_file()]
        if made:
            judged = Judged(subject, bench, see, hear)
            found += judged.references()
            found += [run_figures(judged, file) for _, _, file in made]
    return found


def run_figures(judged: Judged, file: Path) -> Figures:
    """What a run took and how its pictures are judged."""
    return {**json.loads(file.read_text()), **judged.of_run(read(file.with_suffix(".npz")))}


FASTEST = "seconds, the fastest run"
COLUMNS = (  # key, heading, digits, factor
    ("similarity", "subject similarity", 3, 1.0),
    ("reached", "of the way", 2, 1.0),
    ("background", "background", 0, 100.0),
    ("fidelity", "prompt fidelity", 3, 1.0),
    ("class_drift", "class drift", 3, 1.0),
    ("others_drift", "others' drift", 3, 1.0),
    ("seconds", FASTEST, 1, 1.0),
    ("peak_memory_bytes", "peak MiB", 0, 2.0**-20),
    ("file_bytes", "file MiB", 3, 2.0**-20),
)


def averaged(figures: Iterable[Figures]) -> list[Figures]:
    """One entry a row: the number of runs, and for each column mean, smallest and largest."""
    by_row: dict[str, list[Figures]] = {}
    for one in figures:
        by_row.setdefault(one["row"], []).append(one)
    order = [BASE, BASE_RARE, *(row.name for row in ROWS), REAL]
    return [{"row": row, "runs": len(by_row[row]), **_means(by_row[row])} for row in order if row in by_row]


def _means(runs: Sequence[Figures]) -> Figures:
    found = {}
    for key, _, _, factor in COLUMNS:
        values = [one[key] * factor for one in runs if one.get(key) is not None]
        if values:
            found[key] = {"mean": float(np.mean(values)), "least": min(values), "most": max(values)}
    return found


def table(rows: Sequence[Figures]) -> list[list[str]]:
    """Heading and rows as words: the mean, and in brackets the smallest and largest where they differ."""
    lines = [["", "runs", *(heading for _, heading, _, _ in COLUMNS)]]
    for row in rows:
        cells = (_cell(row.get(key), digits, heading == FASTEST) for key, heading, digits, _ in COLUMNS)
        lines.append([row["row"], str(row["runs"]), *cells])
    return lines


def _cell(value: Figures | None, digits: int, only_least: bool) -> str:
    if value is None or value["most"] == value["least"] == 0.0:
        return "" if value is None else "0"
    if only_least:
        return f"{value['least']:.{digits}f}"
    mean, least, most = (f"{value[key]:.{digits}f}" for key in ("mean", "least", "most"))
    return mean if least == most else f"{mean} ({least} to {most})"


def drift_by_seed(figures: Iterable[Figures]) -> dict[int, tuple[float, float]]:
    """Seed -> mean class drift with and without prior preservation, over the subjects for which both are there."""
    drifts: dict[tuple[str, int], dict[str, float]] = {}
    for one in figures:
        if one["row"] in (PRIOR, NO_PRIOR):
            drifts.setdefault((one["subject"], one["seed"]), {})[one["row"]] = one["class_drift"]
    pairs: dict[int, list[tuple[float, float]]] = {}
    for (_, seed), found in drifts.items():
        if len(found) == 2:
            pairs.setdefault(seed, []).append((found[PRIOR], found[NO_PRIOR]))
    return {seed: tuple(np.mean(pairs[seed], axis=0).tolist()) for seed in sorted(pairs)}


def criteria(figures: Sequence[Figures]) -> list[tuple[str, str, bool]]:
    """What has to hold, the figure, and whether it does."""
    prior = [one for one in figures if one["row"] == PRIOR]
    found = []
    if prior:
        way = float(np.mean([one["reached"] for one in prior]))
        right = float(np.mean([one["background"] for one in prior]))
        found += [
            (f"DreamBooth with prior: of the way, at least {REACHED:g}", f"{way:.2f}", way >= REACHED),
            (f"its backgrounds right, at least {100 * RIGHT:.0f} %", f"{100 * right:.0f} %", right >= RIGHT),
        ]
    for seed, (with_prior, without) in drift_by_seed(figures).items():
        ratio = with_prior / without
        told = f"{ratio:.2f} ({with_prior:.3f} of {without:.3f})"
        found.append((f"class drift, seed {seed}: at most {DRIFT:g} of without prior", told, ratio <= DRIFT))
    ways = {row: [one["reached"] for one in figures if one["row"] == row] for row in (CONTROL, BASE_RARE)}
    if ways[CONTROL]:
        control, base = (float(np.mean(values)) for values in ways.values())
        told = f"{control:.2f} of the way; the base by the same word {base:.2f}"
        found.append((f"a shuffled LoRA scores as the base does, within {SAME:g}", told, abs(control - base) <= SAME))
    return found


def by_subject(figures: Iterable[Figures], row: str, key: str) -> Mapping[str, list[float]]:
    """Subject -> the values of all seeds."""
    found: dict[str, list[float]] = {}
    for one in figures:
        if one["row"] == row:
            found.setdefault(one["subject"], []).append(one[key])
    return found
