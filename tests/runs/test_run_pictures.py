"""What a run sees of a folder: views as arrays, masks at the latent's size, notes in words."""

import numpy as np
import pytest
from PIL import Image

from persona.core.training.plan import LowRank, Stream, TrainingPlan
from persona.core.training.views import View, views_of
from persona.runs.pictures import load_pixels, masks_of, scan_folder


@pytest.fixture
def folder(tmp_path):
    drawn = np.zeros((64, 128, 3), np.uint8)
    drawn[:, :, 0] = np.arange(128)
    Image.fromarray(drawn).save(tmp_path / "a.png")
    Image.fromarray(drawn[:, ::-1]).save(tmp_path / "b.png")
    return tmp_path


def plan_of(pictures, **options):
    part = LowRank("unet", ("to_q",), 4, 4.0, 1e-4)
    return TrainingPlan("lora", (part,), (Stream("pictures", pictures),), 10, width=64, height=64, **options)


def test_views_show_the_middle_or_random_places_and_mirrorings(folder):
    pictures, notes = scan_folder(folder)
    assert notes == ()
    middle = load_pixels(pictures[0], View(0, 0, False), plan_of(pictures, center_crop=True))
    np.testing.assert_allclose((middle[0, 0] + 1) * 127.5, np.arange(32, 96), atol=1e-3)
    plan = plan_of(pictures, random_flip=True)
    starts = {}
    for view in views_of(plan.streams[0], plan):
        if view.picture == 0:
            row = np.round((load_pixels(pictures[0], view, plan)[0, 0] + 1) * 127.5).astype(int)
            row = row[::-1] if view.mirrored else row
            np.testing.assert_array_equal(row, np.arange(row[0], row[0] + 64))
            starts.setdefault(view.crop, set()).add(int(row[0]))
    assert len(starts) == 4 and len({start for found in starts.values() for start in found}) > 1
    assert all(len(found) == 1 for found in starts.values())  # a crop and its mirrored twin show the same place


def test_masks_come_at_the_latents_size_for_those_that_have_one(folder):
    assert masks_of(plan_of(scan_folder(folder)[0]), 8) is None
    (folder / "mask").mkdir()
    drawn = np.zeros((64, 128), np.uint8)
    drawn[:, 64:] = 255
    Image.fromarray(drawn).save(folder / "mask" / "a.png")
    pictures, notes = scan_folder(folder)
    assert notes == (f"{folder}: 1 of 2 pictures have a mask; only what it shows is learned",)
    found = masks_of(plan_of(pictures, center_crop=True), 8)
    np.testing.assert_array_equal(found(0, View(0, 0, False))[0], [[0, 0, 0, 0, 1, 1, 1, 1]] * 8)
    np.testing.assert_array_equal(found(0, View(0, 0, True))[0], [[1, 1, 1, 1, 0, 0, 0, 0]] * 8)
    assert found(0, View(1, 0, False)) is None
