"""docs/personalise.md and its sheets, from the table's JSON and the kept pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from personalise_rows import (
    CLASS_SEEDS,
    NO_PRIOR,
    OTHERS,
    PRIOR,
    ROWS,
    SUBJECT_SEEDS,
    SUBJECTS,
    Bench,
    Subject,
    of_class,
    of_subject,
)  # fmt: skip
from personalise_run import before, file_of, read
from personalise_table import Figures, averaged, by_subject, criteria, pictures_in, table
from PIL import Image

from persona.runs.sheet import draw_sheet, save_picture

DRIFT_ROWS = (PRIOR, NO_PRIOR, "lora", "full")
"""What is shown beside the base on the sheet of drift."""

HEAD = f"""# Methods compared

Written by `python benchmarks/personalise.py`: every method with one recipe for all, on five subjects
([what they are](../benchmarks/subjects/README.md)) that the base has never seen, with several seeds; judged against
pictures that no run was trained on. Each cell is the mean over the runs, with the smallest and the largest in brackets.

What is not said of a row below is what a user gets who says nothing: registry.yaml's settings for the method on `mini`.

- **Pictures made**: {SUBJECT_SEEDS} of the subject on each background of the held-out pictures, from fixed noise,
  {Bench.sampler_steps} DDIM steps, guidance {Bench.guidance_scale:g}. No run was shown one of these backgrounds.
- **Subject similarity**: mean cosine, by the judge, of every picture made with every held-out one (CLIP-I of arXiv
  2208.12242).
- **Of the way**: (after - before) / (real - before). *Before* is what the base makes of the same prompts and noise with
  the class word alone; *real* is the similarity of held-out with training pictures. 0 is no better than the base, 1 as
  like the held-out pictures as the training pictures are. Above 1 is possible: pictures made are on the held-out
  backgrounds, training pictures are not.
- **Background**: share of these pictures, in percent, whose border has the colour asked for (`tools/mini/measure.py`).
- **Prompt fidelity**: mean cosine, by the judge, of each of these pictures with its prompt, the class word in the
  subject's place (CLIP-T).
- **Class drift**: 1 - mean cosine, by the judge, of what the run makes of the class ("a robot on a purple background",
  {CLASS_SEEDS} pictures on each background) with what the base makes of the same prompt and noise. 0: the class is
  untouched.
- **Others' drift**: the same for {len(OTHERS)} names that have nothing to do with the subject.
- **Seconds**: the training in one process on one core: preparing, latents, steps, product; without the making of class
  pictures ({Bench.class_pictures}, once for each subject) and the import of the framework. All runs of a row do the
  same work, so that what a busy machine adds is left out by naming the fastest; all of them are in the JSON.
- **Peak MiB**: the process at its largest during training. **File MiB**: what the run gives.

The judge (`persona score`, [its model card](../persona/assets/judge/README.md)) is a small image-and-text encoder
trained on the same pictograms as the base with other augmentations; it has not seen the subjects either. It is no
person: it goes by colours more than an eye does, and rates what has the subject's colours in another shape (textual
inversion, on this base) higher than one would. Prompt fidelity asks for the class, and these subjects are odd ones of
their class: the last row says how real pictures of them fare. Look at the sheets.
"""


def page(document: Mapping[str, Any], bench: Bench, seed: int, pictures: Path) -> str:
    """The page's text; its sheets are drawn into the folder `pictures`."""
    figures: Sequence[Figures] = document["figures"]
    rows = table(averaged(figures))
    lines = [HEAD, "## The table", "", *markdown(rows), "", *unmade(figures, document["seeds"])]
    lines += ["## What it has to show", ""]
    lines += markdown([["", "found", "holds"], *([what, told, "yes" if holds else "**no**"]
                                                 for what, told, holds in criteria(figures))])  # fmt: skip
    lines += ["", "## DreamBooth with prior preservation, by subject", "", *markdown(subject_table(figures)), ""]
    lines += ["## Recipes", "", *markdown(recipe_table(document["recipes"])), "", "## Sheets", ""]
    lines += [
        "Each row is one method, seed "
        f"{seed}, each column a background that was not shown in training; the held-out pictures are at the left.",
        "",
    ]
    for subject in SUBJECTS:
        if sheet_of(subject, bench, seed, pictures):
            lines += [f"### {subject.name}", "", f"![{subject.name}]({pictures.name}/{subject.name}.png)", ""]
    if drift_sheet(SUBJECTS[0], bench, seed, pictures):
        lines += ["### What else changed", "", "The class and other names before and after, from the same noise.", ""]
        lines += [f"![drift]({pictures.name}/drift.png)", ""]
    told = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    lines += ["## Where and when", "", f"{document['date']}; {told}. Base: {document['base']}.", ""]
    return "\n".join(lines)


def unmade(figures: Sequence[Figures], seeds: Sequence[int]) -> list[str]:
    """Which rows have fewer runs than were meant, in words."""
    meant = len(SUBJECTS) * len(seeds)
    made = {row.name: sum(one["row"] == row.name for one in figures) for row in ROWS}
    short = [f"{name} {count}" for name, count in made.items() if count < meant]
    return [f"Of {meant} runs a row, these have fewer: {', '.join(short)}.", ""] if short else []


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words as a table, the first its heading."""
    lines = ["| " + " | ".join(cell for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def subject_table(figures: Sequence[Figures]) -> list[list[str]]:
    """DreamBooth's figures for each subject, the mean of its seeds."""
    keys = ("similarity", "reached", "background", "class_drift")
    found = {key: by_subject(figures, PRIOR, key) for key in keys}
    without = by_subject(figures, NO_PRIOR, "class_drift")
    lines = [["subject", "seeds", "subject similarity", "of the way", "background", "class drift", "without prior"]]
    for name, seeds in found["reached"].items():
        like, way, right, drift = (float(np.mean(found[key][name])) for key in keys)
        other = f"{np.mean(without[name]):.3f}" if name in without else ""
        cells = [f"{like:.3f}", f"{way:.2f}", f"{100 * right:.0f} %", f"{drift:.3f}", other]
        lines.append([name, str(len(seeds)), *cells])
    return lines


def recipe_table(recipes: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Every row with what its runs were told."""
    told = (", ".join(f"{key} {value}" for key, value in recipe.items()) for recipe in recipes.values())
    return [["", "recipe"], *([name, text] for name, text in zip(recipes, told, strict=True))]


def sheet_of(subject: Subject, bench: Bench, seed: int, pictures: Path) -> bool:
    """A sheet with the first picture on each background of every row; whether there was anything to draw."""
    count = len(subject.colours)
    rows = [(f"base: {subject.article} {subject.class_word}", before(subject, bench)["subject"][:count])]
    for row in ROWS:
        file = file_of(row, subject, seed, bench).with_suffix(".npz")
        if file.is_file():
            rows.append((row.name, read(file)["subject"][:count]))
    if len(rows) == 1:
        return False
    columns = [f"on {one.colour}" for one in of_subject("", subject)[:count]]
    _draw(rows, columns, pictures / f"{subject.name}.png", beside=_pictures(pictures_in(subject.held_out)))
    return True


def drift_sheet(subject: Subject, bench: Bench, seed: int, pictures: Path) -> bool:
    """A sheet of the class and of other names, before and after."""
    start = before(subject, bench)
    several = len(of_class(subject)) // CLASS_SEEDS
    rows = [("base", np.concatenate([start["subject"][:several], start["others"]]))]
    for name in DRIFT_ROWS:
        row = next(row for row in ROWS if row.name == name)
        file = file_of(row, subject, seed, bench).with_suffix(".npz")
        if file.is_file():
            made = read(file)
            rows.append((name, np.concatenate([made["class"][:several], made["others"]])))
    if len(rows) == 1:
        return False
    columns = [subject.class_word] * several + [name.split(maxsplit=1)[1] for name in OTHERS]
    _draw(rows, columns, pictures / "drift.png", cell=64)
    return True


def _draw(rows: Any, columns: Sequence[str], path: Path, *, beside: Any = (), cell: int = 96) -> None:
    sheet = draw_sheet(
        [_pictures(made) for _, made in rows], [name for name, _ in rows], columns, beside=beside,
        beside_name="held out" if beside else "", cell=cell,
    )  # fmt: skip
    save_picture(sheet.quantize(256, dither=Image.Dither.NONE), path)


def _pictures(pixels: Any) -> list[Image.Image]:
    return [Image.fromarray(one) for one in pixels]
