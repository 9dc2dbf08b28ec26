"""Sizes by hand and by the buckets kohya's trainer lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona.core.training.buckets import buckets, fit, nearest_bucket, time_ids

sides = st.integers(1, 5000)

# sd-scripts, library/model_util.py: make_bucket_resolutions((512, 512), 256, 1024, 64)
KOHYA_512 = [
    (256, 832), (256, 896), (256, 960), (256, 1024), (320, 704), (320, 768), (384, 640), (448, 576), (512, 512),
    (576, 448), (640, 384), (704, 320), (768, 320), (832, 256), (896, 256), (960, 256), (1024, 256),
]  # fmt: skip


def test_buckets_at_512_are_those_of_kohya():
    assert list(buckets((512, 512), step=64, smallest=256, largest=1024)) == KOHYA_512


@pytest.mark.parametrize(("size", "step"), [((512, 512), 64), ((1024, 1024), 64), ((64, 64), 8), ((768, 512), 64)])
def test_buckets_keep_the_area_and_the_step(size, step):
    found = buckets(size, step=step)
    assert size in found and len(set(found)) == len(found) and list(found) == sorted(found)
    for width, height in found:
        assert width % step == height % step == 0
        assert size[0] * size[1] * 0.7 < width * height <= size[0] * size[1]
        assert (height, width) in found


def test_a_size_that_the_step_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="500x512"):
        buckets((500, 512))


@pytest.mark.parametrize(
    ("original", "bucket"),
    [((3000, 3000), (512, 512)), ((4000, 3000), (576, 448)), ((1080, 1920), (384, 640)), ((9000, 100), (1024, 256))],
)
def test_a_picture_goes_where_its_proportions_are_nearest(original, bucket):
    assert nearest_bucket(original, KOHYA_512) == bucket


def test_of_two_equally_near_the_larger_is_taken():
    assert nearest_bucket((100, 100), [(64, 64), (512, 512), (128, 128)]) == (512, 512)


@pytest.mark.parametrize(
    ("original", "size", "resized", "corner"),
    [
        ((1024, 512), (512, 512), (1024, 512), (256, 0)),
        ((1000, 2000), (500, 500), (500, 1000), (0, 250)),
        ((32, 32), (64, 64), (64, 64), (0, 0)),
        ((1920, 1080), (64, 64), (114, 64), (25, 0)),
        ((100, 150), (576, 448), (576, 864), (0, 208)),
    ],
)
def test_a_picture_covers_its_target_and_loses_both_ends_alike(original, size, resized, corner):
    made = fit(original, size)
    assert (made.resized, (made.left, made.top)) == (resized, corner)


@given(sides, sides, sides, sides)
def test_a_fit_covers_the_target_with_one_side_exact_and_proportions_kept(width, height, target_width, target_height):
    made = fit((width, height), (target_width, target_height))
    assert min(made.spare) == 0 and max(made.spare) >= 0
    assert made.left + target_width <= made.resized[0] and made.top + target_height <= made.resized[1]
    assert abs(made.resized[0] / width - made.resized[1] / height) * min(width, height) <= 1
    assert 0 <= made.lost < 1


def test_a_crop_can_be_put_elsewhere_but_not_outside():
    made = fit((200, 100), (100, 100))
    assert (made.at(100, 0).left, made.left, made.lost) == (100, 50, 0.5)
    with pytest.raises(ValueError, match="spare"):
        made.at(101, 0)


def test_time_ids_are_in_diffusers_order():
    """pipeline_stable_diffusion_xl._get_add_time_ids: original_size + crops_coords_top_left + target_size, each of
    them (height, width) or (top, left)."""
    assert time_ids(fit((2000, 1000), (512, 512)).at(7, 0)) == (1000, 2000, 0, 7, 512, 512)
