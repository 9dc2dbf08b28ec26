"""Every picture once per epoch; the same choices whatever is resumed, extended or split."""

import collections

import numpy as np
import pytest

from persona.core.training import order as ordering


def row(count, samples, updates, **options):
    return [int(i) for u in range(updates) for i in ordering.order(5, "instance", count, u, samples, **options)]


@pytest.mark.parametrize(("count", "samples"), [(5, 2), (7, 3), (4, 4), (3, 8), (1, 1), (1, 5)])
def test_an_epoch_uses_every_picture_once_and_batches_run_over_its_end(count, samples):
    seen = row(count, samples, 40)
    assert len(seen) == 40 * samples
    for epoch in range(len(seen) // count):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_streams_and_seeds_have_orders_of_their_own():
    seen = row(50, 50, 3)
    assert seen[:50] != seen[50:100] != seen[100:] and seen[:50] != sorted(seen[:50])
    for other in (ordering.order(5, "class", 50, 0, 50), ordering.order(6, "instance", 50, 0, 50)):
        assert other.tolist() != seen[:50]


def test_a_picture_is_used_as_often_as_its_repeats_say():
    repeats = [3, 1, 0, 10]
    seen = row(4, 7, 14, repeats=repeats)  # 98 uses: seven epochs of 14
    for epoch in range(7):
        counts = collections.Counter(seen[epoch * 14 : (epoch + 1) * 14])
        assert [counts[i] for i in range(4)] == repeats


def test_the_order_is_that_of_the_update_alone():
    """A resumed or longer run asks for update 31 without having asked for 0..30."""
    whole = row(9, 4, 40)
    ordering.epoch_order.cache_clear()
    assert ordering.order(5, "instance", 9, 31, 4).tolist() == whole[124:128]


def test_small_batches_read_the_same_row_as_large_ones():
    assert row(9, 2, 40) == row(9, 8, 10)


def test_all_orders_of_three_are_equally_likely():
    counts = collections.Counter(tuple(ordering.order(0, "s", 3, epoch, 3).tolist()) for epoch in range(6000))
    assert len(counts) == 6
    assert sum((n - 1000) ** 2 / 1000 for n in counts.values()) < 20.5  # chi-squared, 5 degrees of freedom, 0.1 %


def test_nothing_to_draw_from_is_an_error():
    with pytest.raises(ValueError, match="'instance'"):
        ordering.order(0, "instance", 0, 0, 2)
    with pytest.raises(ValueError, match="2 repeats"):
        ordering.order(0, "instance", 3, 0, 2, repeats=[1, 2])


def test_slots_choose_alone_so_a_batch_can_be_split_over_devices():
    slots = list(range(64))
    counts = [1 + slot % 5 for slot in slots]
    for draw in (
        lambda part: ordering.caption_choices(1, 2, part, [counts[s] for s in part]),
        lambda part: ordering.caption_dropped(1, 2, part, 0.3),
        lambda part: ordering.flipped(1, 2, part),
        lambda part: ordering.crop_offsets(1, 2, part, [5, 9]),
    ):
        whole = draw(slots)
        np.testing.assert_array_equal(whole, np.concatenate([draw(slots[:16]), draw(slots[16:])]))


def test_captions_are_drawn_evenly_within_their_count():
    slots = range(9000)
    found = ordering.caption_choices(0, 0, slots, np.full(9000, 3))
    assert np.bincount(found, minlength=3).tolist() == pytest.approx([3000] * 3, rel=0.06)
    assert ordering.caption_choices(0, 0, slots, np.ones(9000)).max() == 0


def test_dropout_and_flips_happen_as_often_as_they_should():
    slots = range(10_000)
    assert not ordering.caption_dropped(0, 0, slots, 0.0).any() and ordering.caption_dropped(0, 0, slots, 1.0).all()
    assert ordering.caption_dropped(0, 0, slots, 0.1).mean() == pytest.approx(0.1, abs=0.012)
    assert ordering.flipped(0, 0, slots).mean() == pytest.approx(0.5, abs=0.02)


def test_crops_start_anywhere_that_fits():
    found = ordering.crop_offsets(0, 0, range(2000), [3, 0])
    assert sorted(set(found[:, 0].tolist())) == [0, 1, 2, 3] and not found[:, 1].any()
    both = ordering.crop_offsets(0, 0, range(2000), [99, 99]).astype(float)
    assert abs(np.corrcoef(both.T)[0, 1]) < 0.08


def test_tags_are_shuffled_behind_those_that_are_kept():
    caption = "sks robot, standing, smile, outdoors, 1boy"
    found = {ordering.shuffle_tags(caption, 0, update, 0, keep=1) for update in range(50)}
    assert len(found) > 10
    for one in found:
        tags = one.split(", ")
        assert tags[0] == "sks robot" and sorted(tags) == sorted(caption.split(", "))


@pytest.mark.parametrize("caption", ["α猫 插画风格", "a photo of a robot", "", "one, two"])
def test_what_cannot_be_shuffled_comes_back_as_it_is(caption):
    assert ordering.shuffle_tags(caption, 0, 0, 0, keep=1) == caption
