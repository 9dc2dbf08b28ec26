"""The warnings somebody would want before a run, and none that nobody needs."""

import pytest

from persona.core.training.buckets import bucket_step
from persona.core.training.pictures import Problem, Scan
from persona.core.training.plan import Picture
from persona.core.training.preview import preview


def seen_of(size, at=(512, 512), captions=("a dog",), problems=(), **options):
    return preview(Scan((Picture("/d/a.jpg", captions, size=size),), problems), at, **options)[0]


def test_a_photograph_in_a_square_loses_a_third_without_a_word():
    seen = seen_of((3000, 2000))
    assert (seen.fit.resized, seen.fit.size, seen.bucket, seen.warnings) == ((768, 512), (512, 512), (640, 384), ())


def test_into_its_bucket_it_loses_less():
    seen = seen_of((3000, 2000), into_buckets=True)
    assert seen.fit.size == seen.bucket == (640, 384) and seen.fit.lost < 0.15


@pytest.mark.parametrize(
    ("size", "captions", "warning"),
    [
        ((256, 256), ("a",), "smaller than it will be trained at; enlarged 2 times"),
        ((2000, 1000), ("a",), "the crop takes 50% of it away"),
        ((512, 512), (), "no caption of its own"),
    ],
)
def test_what_is_odd_is_said(size, captions, warning):
    assert seen_of(size, captions=captions).warnings == (warning,)


def test_problems_of_the_picture_are_among_its_warnings():
    problems = (Problem("/d/a.jpg", "greyscale"), Problem("/d/b.jpg", "broken", used=False))
    assert seen_of((512, 512), problems=problems).warnings == ("greyscale",)


def test_buckets_step_by_64_and_small_sizes_by_the_latent():
    assert [bucket_step(size) for size in ((512, 512), (1024, 768), (64, 64), (520, 520))] == [64, 64, 8, 8]
