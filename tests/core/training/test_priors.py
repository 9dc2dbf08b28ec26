"""Class pictures: made in whole blocks, kept, found again, and never mixed up."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from persona.core.training import priors
from persona.core.training.plan import Generated, Picture, Stream, TrainingPlan
from persona.core.training.priors import class_picture_folder, fill_stream
from persona.core.training.processes import ALONE
from tests.threads import Threads


class Painter:
    """A session that paints a picture of its seed and of how many it was asked for at once."""

    def __init__(self):
        self.asked = []

    def sample(self, request):
        self.asked.append(request.seeds)
        size = (request.height, request.width, 3)
        return np.stack(
            [np.full(size, (seed % 97) + 100 * (len(request.seeds) % 2), np.uint8) for seed in request.seeds]
        )


class Base:
    hash = "b" * 64


PLAN = TrainingPlan("dreambooth", (), (), 10, width=16, height=8, seed=3)


def filled(
    cache, count, *, own=(), plan=PLAN, painter=None, processes=ALONE, report=lambda done, total: None, **options
):
    painter = painter or Painter()
    stream = Stream("class", generated=Generated("a toy", count, **options))
    told = {"base": Base, "plan": plan, "session": painter, "cache": cache, "report": report, "processes": processes}
    return fill_stream(stream, own, **told), painter


def test_pictures_are_made_in_blocks_with_seeds_of_their_own_and_found_the_next_time(tmp_path):
    stream, painter = filled(tmp_path, 10)
    assert [len(seeds) for seeds in painter.asked] == [8, 2]
    assert len({seed for seeds in painter.asked for seed in seeds}) == 10
    assert len(stream.pictures) == 10
    assert all(picture.captions == ("a toy",) and len(picture.sha256) == 64 for picture in stream.pictures)
    again, painter = filled(tmp_path, 10)
    assert painter.asked == []
    assert again == stream


@pytest.mark.parametrize("lost", [[0], [3, 4], [8], [9, 1]])
def test_a_block_with_a_hole_is_made_again_whole_so_that_its_bits_stay_the_same(tmp_path, lost):
    stream, first = filled(tmp_path, 10)
    for number in lost:
        Path(stream.pictures[number].path).unlink()
    again, painter = filled(tmp_path, 10)
    assert again == stream
    assert set(painter.asked) == {seeds for number in lost for seeds in first.asked[number // 8 : number // 8 + 1]}


def test_more_pictures_keep_the_whole_blocks_and_make_the_last_one_anew(tmp_path):
    filled(tmp_path, 10)
    grown, painter = filled(tmp_path, 12)
    assert [len(seeds) for seeds in painter.asked] == [4]
    fresh, _ = filled(tmp_path / "other", 12)
    assert [picture.sha256 for picture in grown.pictures] == [picture.sha256 for picture in fresh.pictures]


def test_own_pictures_come_first_and_only_the_rest_is_made(tmp_path):
    own = [Picture("/own/1.png", ()), Picture("/own/2.png", ("a blue toy",))]
    stream, painter = filled(tmp_path, 5, own=own)
    assert [picture.captions for picture in stream.pictures[:2]] == [("a toy",), ("a blue toy",)]
    assert [len(seeds) for seeds in painter.asked] == [3]
    assert filled(tmp_path, 1, own=own)[1].asked == []


@pytest.mark.parametrize(
    ("plan", "generated"),
    [
        ({"seed": 4}, {}),
        ({"width": 8}, {}),
        ({"precision": "fp16"}, {}),
        ({}, {"guidance_scale": 2.0}),
        ({}, {"steps": 3}),
        ({}, {"sampler": "euler"}),
        ({}, {"negative_prompt": "blur"}),
    ],
)
def test_whatever_decides_a_picture_decides_where_it_is_kept(tmp_path, plan, generated):
    plain = class_picture_folder(Generated("a toy", 3), Base, PLAN, tmp_path)
    other = class_picture_folder(Generated("a toy", 3, **generated), Base, dataclasses.replace(PLAN, **plan), tmp_path)
    assert other != plain
    assert class_picture_folder(Generated("a toy", 99), Base, PLAN, tmp_path) == plain


def test_a_stream_without_generated_pictures_is_left_alone(tmp_path):
    stream = Stream("instance", (Picture("/a.png", ("x",)),))
    assert fill_stream(
        stream, (), base=Base, plan=PLAN, session=None, cache=tmp_path, report=lambda done, total: None
    ) is stream  # fmt: skip
    assert priors.PICTURES_AT_ONCE == 8


def test_several_processes_make_the_pictures_of_one_and_each_only_its_share(tmp_path):
    alone, _ = filled(tmp_path / "one", 35)
    filled(tmp_path / "two", 8)  # the first block is there already
    told = []
    found = Threads(2).each(
        lambda one: filled(tmp_path / "two", 35, processes=one, report=lambda *at: told.append((one.rank, *at)))
    )
    assert [[len(seeds) for seeds in painter.asked] for _, painter in found] == [[8, 8], [8, 3]]
    assert found[0][0] == found[1][0]
    assert [picture.sha256 for picture in found[0][0].pictures] == [picture.sha256 for picture in alone.pictures]
    assert [at for at in told if at[0] == 0] == [(0, 8, 35), (0, 24, 35), (0, 35, 35)]
