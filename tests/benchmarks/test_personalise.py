"""The arithmetic of benchmarks/personalise.py, by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _its_folder(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), str(BENCHMARKS.parent), *sys.path])


def test_similarity_is_the_mean_cosine_of_all_pairs():
    from personalise_figures import pairwise, similarity

    # cosines of (3, 4) with (1, 0) and (0, 2): 0.6 and 0.8; of (-1, 0) with them: -1 and 0
    these, those = np.array([[3.0, 4.0], [-1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]])
    assert similarity(these, those) == pytest.approx((0.6 + 0.8 - 1.0 + 0.0) / 4)
    assert pairwise(these, those) == pytest.approx((0.6 + 0.0) / 2)


def test_drift_is_nothing_for_the_same_pictures_and_grows_with_the_angle():
    from personalise_figures import drift

    before = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert drift(before, 5 * before) == pytest.approx(0.0)
    assert drift(before, np.array([[1.0, 1.0], [0.0, 1.0]])) == pytest.approx((1 - np.sqrt(0.5)) / 2)
    assert drift(before, before[::-1]) == pytest.approx(1.0)


def test_the_share_of_the_way_from_the_base_to_real_pictures():
    from personalise_figures import reached, share_right

    assert reached(0.2, before=0.2, real=0.8) == 0.0
    assert reached(0.62, before=0.2, real=0.8) == pytest.approx(0.7)
    assert reached(0.1, before=0.2, real=0.7) == pytest.approx(-0.2)
    assert share_right(["red", "blue", "blue", "gray"], ["red", "red", "blue", "gray"]) == 0.75


def test_shuffling_keeps_each_tensors_values_and_loses_their_places():
    from personalise_figures import shuffled

    tensors = {"up": np.arange(12, dtype=np.float16).reshape(3, 4), "down": np.arange(100, 112).reshape(4, 3)}
    made = shuffled(tensors, seed=1)
    for name, values in tensors.items():
        assert made[name].shape == values.shape
        assert made[name].dtype == values.dtype
        assert sorted(made[name].ravel().tolist()) == sorted(values.ravel().tolist())
        assert not np.array_equal(made[name], values)
    assert np.array_equal(shuffled(tensors, seed=1)["up"], made["up"])
    assert not np.array_equal(shuffled(tensors, seed=2)["up"], made["up"])


def test_drift_is_compared_within_a_seed_over_the_subjects_that_have_both_runs():
    from personalise_rows import NO_PRIOR, PRIOR
    from personalise_table import drift_by_seed

    runs = [(PRIOR, "robot", 1, 0.1), (NO_PRIOR, "robot", 1, 0.2), (PRIOR, "mug-cat", 1, 0.3)]
    runs += [(NO_PRIOR, "mug-cat", 1, 0.4), (PRIOR, "robot", 2, 0.5), (NO_PRIOR, "robot", 2, 0.6)]
    runs += [(PRIOR, "mug-cat", 2, 9.0)]  # without the other run there is nothing to compare it with
    found = drift_by_seed(
        {"row": row, "subject": subject, "seed": seed, "class_drift": value} for row, subject, seed, value in runs
    )
    assert {seed: [round(value, 9) for value in pair] for seed, pair in found.items()} == {1: [0.2, 0.3], 2: [0.5, 0.6]}


def test_a_row_is_the_mean_of_its_runs_with_the_least_and_the_most():
    from personalise_rows import PRIOR
    from personalise_table import averaged, table

    figures = [
        {"row": PRIOR, "similarity": 0.25, "seconds": 10.0, "file_bytes": 3 * 2**20},
        {"row": PRIOR, "similarity": 0.75, "seconds": 20.0, "file_bytes": 3 * 2**20},
    ]
    (row,) = averaged(figures)
    assert row["similarity"] == {"mean": 0.5, "least": 0.25, "most": 0.75}
    heading, cells = table([row])
    told = dict(zip(heading, cells, strict=True))
    assert told["subject similarity"] == "0.500 (0.250 to 0.750)"
    assert told["seconds, the fastest run"] == "10.0"
    assert told["file MiB"] == "3.000"
    assert told["class drift"] == ""


def test_what_has_to_hold_is_found_to_hold_or_not():
    from personalise_rows import CONTROL, NO_PRIOR, PRIOR
    from personalise_table import BASE_RARE, criteria

    prior = [{"row": PRIOR, "subject": name, "seed": 1} for name in ("robot", "mug-cat")]
    prior[0] |= {"reached": 0.6, "background": 1.0, "class_drift": 0.1}
    prior[1] |= {"reached": 0.9, "background": 0.5, "class_drift": 0.2}
    without = [{"row": NO_PRIOR, "subject": one["subject"], "seed": 1, "class_drift": 0.2} for one in prior]
    control = [{"row": CONTROL, "reached": 0.3}, {"row": BASE_RARE, "reached": 0.1}]
    holds = [(told.split()[0], whether) for _, told, whether in criteria([*prior, *without, *control])]
    # (0.6 + 0.9) / 2; (100 + 50) / 2; (0.1 + 0.2) / (0.2 + 0.2); 0.3 is 0.2 away from the base's 0.1
    assert holds == [("0.75", True), ("75", False), ("0.75", False), ("0.30", False)]


def test_nothing_that_is_judged_by_was_trained_on():
    from personalise_rows import SUBJECTS, colour_of

    for subject in SUBJECTS:
        shown = {colour_of(path) for path in subject.train.glob("*.png")}
        assert len(shown) == len(subject.colours) == 5
        assert not shown & set(subject.colours)


def test_every_row_asks_for_the_same_backgrounds_and_noise():
    from personalise_rows import ROWS, SUBJECTS, of_class, of_subject

    owl = SUBJECTS[-1]
    asked = {row.name: of_subject(row.called(owl), owl) for row in ROWS}
    assert {tuple((one.seed, one.colour) for one in pictures) for pictures in asked.values()} == {
        tuple((one.seed, one.colour) for one in of_subject("an owl", owl))
    }
    assert asked["lora"][0].prompt == "a sks owl on a black background"
    assert asked["textual-inversion"][0].prompt == "a <plaid-owl> on a black background"
    plain = of_class(owl)  # the base's pictures of the class are the first of those `before` holds
    assert plain == of_subject("an owl", owl)[: len(plain)]
