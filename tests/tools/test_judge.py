"""The judge's maker: what its pictures are, and what its figures mean."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from tools.judge import measure, views  # noqa: E402
from tools.judge.training import caption  # noqa: E402
from tools.mini.pictures import COLOURS  # noqa: E402


def square(size: int) -> torch.Tensor:
    """An opaque red square in the middle of a canvas, premultiplied: [1, 4, 64, 64]."""
    canvas = torch.zeros(1, 4, 64, 64)
    first = (64 - size) // 2
    canvas[:, 0, first : first + size, first : first + size] = 1
    canvas[:, 3, first : first + size, first : first + size] = 1
    return canvas


def place(canvas: torch.Tensor, size: float, centre: tuple[float, float], angle: float = 0.0, mirrored: bool = False):
    return views.placed(
        canvas, torch.tensor([size]), torch.tensor([centre]), torch.tensor([angle]), torch.tensor([mirrored])
    )


def extent(canvas: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last column, first and last row that are more than half covered."""
    rows, columns = torch.nonzero(canvas[0, 3] > 0.5).unbind(1)
    return int(columns.min()), int(columns.max()), int(rows.min()), int(rows.max())


def test_things_are_placed_where_and_as_large_as_is_asked() -> None:
    # 60 pixels are a canvas' full size, so a square of 60 at size 40 covers 40 pixels around the centre, 12 to 51.
    assert extent(place(square(60), 60, (0, 0))) == (2, 61, 2, 61)
    assert extent(place(square(60), 40, (0, 0))) == (12, 51, 12, 51)
    assert extent(place(square(60), 40, (10, -6))) == (22, 61, 6, 45)


def test_a_mirror_image_swaps_left_and_right_and_a_turn_keeps_the_centre() -> None:
    half = square(60)
    half[..., :32] = 0
    assert extent(place(half, 60, (0, 0))) == (32, 61, 2, 61)
    assert extent(place(half, 60, (0, 0), mirrored=True)) == (2, 31, 2, 61)
    turned = place(square(20), 60, (0, 0), angle=torch.pi / 4)
    left, right, top, bottom = extent(turned)
    assert left + right == top + bottom == 63
    assert right - left == pytest.approx(20 * 2**0.5, abs=2)


def test_named_backgrounds_have_the_colour_they_say() -> None:
    pictures, named = views.backgrounds(300, torch.Generator().manual_seed(0))
    assert 0.5 < (named >= 0).float().mean() < 0.8
    means = pictures[named >= 0].mean((2, 3))
    wanted = torch.tensor(list(COLOURS.values()))[named[named >= 0]] / 255
    assert (means - wanted).abs().max() < 0.15
    assert set(named.tolist()) == {-1, *range(12)}


def test_worsened_pictures_stay_pictures_of_the_same_thing() -> None:
    random = torch.Generator().manual_seed(0)
    before = torch.rand(40, 3, 8, 8, generator=random).repeat_interleave(8, 2).repeat_interleave(8, 3)
    after = views.worsened(before.clone(), random)
    assert after.shape == before.shape and after.min() >= 0 and after.max() <= 1
    assert 0.01 < (after - before).abs().mean() < 0.1


def test_unnamed_things_are_new_every_time_and_opaque_where_either_part_is() -> None:
    stored = (torch.cat([square(60), square(30)]) * 255).byte()
    random = torch.Generator().manual_seed(0)
    (first, begun_as), (second, _) = views.new_things(stored, 8, random), views.new_things(stored, 8, random)
    assert (first - second).abs().max() > 0.1
    assert first.min() >= 0 and first[:, :3].max() <= 1.001 and first[:, 3].max() <= 1.001
    assert ((stored[begun_as, 3].float() / 255 - first[:, 3]) < 0.01).all()


def test_captions_are_those_of_mini() -> None:
    assert caption("owl", "orange") == "an owl on an orange background"
    assert caption("red apple", "") == "a red apple"


def test_ranks_count_the_names_that_are_nearer_on_the_pictures_own_background() -> None:
    # Two colours, three names, two dimensions; the cosines of the first picture are 0.6, 0.8 and 1 on colour 1.
    read = np.zeros((2, 3, 2), np.float32)
    read[1] = [[0.6, 0.8], [0.8, 0.6], [1, 0]]
    read[0] = [[1, 0], [0, 1], [0, 1]]
    seen = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    glyphs, colours = np.array([0, 1, 2]), np.array([1, 1, 0])
    assert measure.ranks(seen, read, glyphs, colours).tolist() == [2, 1, 0]
    assert measure.backgrounds(seen, read, glyphs).tolist() == [0, 1, 0]


def test_latents_that_are_put_off_stay_near_and_some_are_left_as_they_are() -> None:
    latents = 1.25 * torch.randn(600, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    after = views.put_off(latents, torch.Generator().manual_seed(0))
    off = (after - latents).flatten(1).std(1)
    assert after.shape == latents.shape and off.max() < 1.25
    # Noise and softness are left out of a third each, the ghost of seven ninths.
    assert (off == 0).float().mean() == pytest.approx(1 / 3 * 1 / 3 * 7 / 9, abs=0.04)
