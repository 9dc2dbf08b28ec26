"""Philox against Random123's vectors and numpy's generator; normal values against math.log and math.cos."""

import hashlib
import math

import numpy as np
import pytest

from persona.core.training import noise

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
MULTIPLIERS = {32: (0xD2511F53, 0xCD9E8D57), 64: (0xD2E7470EE14C6C93, 0xCA5A826395121157)}
WEYL = {32: (0x9E3779B9, 0xBB67AE85), 64: (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)}


def numbers(text):
    return [int(word, 16) for word in text.split()]


def plain_philox(counter, key, width):
    """Philox4x`width`-10 with Python's integers, straight from the paper's figure."""
    mask = (1 << width) - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = MULTIPLIERS[width][0] * c[0], MULTIPLIERS[width][1] * c[2]
        c = [(second >> width) ^ c[1] ^ k[0], second & mask, (first >> width) ^ c[3] ^ k[1], first & mask]
        k = [(k[0] + WEYL[width][0]) & mask, (k[1] + WEYL[width][1]) & mask]
    return c


def plain_words(seed, purpose, update, slot, count):
    digest = hashlib.sha256(f"persona:{seed}:{purpose}".encode()).digest()
    key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little"))
    found = []
    for block in range(-(-count // 4)):
        found += plain_philox([block, slot, update % 2**32, update // 2**32], key, 32)
    return found[:count]


def plain_normals(words):
    values = []
    for first, second in zip(words[0::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log((first + 1) / 2**32))
        angle = math.pi * (2 * second + 1 - 2**32) / 2**32
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    column = np.array(numbers(counter), np.uint64)[:, None]
    found = noise.philox(column, tuple(numbers(key)))[:, 0]
    assert found.tolist() == numbers(expected)


def test_the_reference_in_this_file_is_numpys_philox_at_64_bits_and_ours_at_32():
    generator = np.random.Philox(counter=[11, 22, 33, 44], key=[55, 66])
    assert generator.random_raw(4).tolist() == plain_philox([12, 22, 33, 44], [55, 66], 64)  # numpy counts up first
    counters = np.random.default_rng(5).integers(0, 2**32, (4, 300), dtype=np.uint64)
    found = noise.philox(counters, (123456789, 4000000000))
    for column in range(300):
        assert found[:, column].tolist() == plain_philox(counters[:, column].tolist(), [123456789, 4000000000], 32)


def test_words_are_keyed_by_seed_purpose_update_and_slot():
    found = noise.words(-7, "noise", 2**40 + 3, [9, 2], 10)
    assert found.tolist() == [plain_words(-7, "noise", 2**40 + 3, slot, 10) for slot in (9, 2)]
    ways = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (0, "a", 2**32, 0)]
    assert len({tuple(noise.words(s, p, u, [k], 4)[0].tolist()) for s, p, u, k in ways}) == len(ways)


def test_normal_is_box_muller_as_the_textbook_has_it():
    found = noise.normal(42, "noise", 17, 3, (5, 7, 2)).ravel()
    expected = plain_normals(plain_words(42, "noise", 17, 3, 72))[:70]
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)
    assert found.dtype == np.float32


# Bits of float32 values, the same on every machine, numpy version and framework environment.
GOLDEN = {
    (0, "noise", 0, 0): "bf68b3b3 401591b8 bf9e5c6a bf8cdf6b 3f02b8d9 bf537808",
    (1234, "class noise", 999, 31): "bfa97a6d beb25bc2 3f270d69 3f1b5418 be56ca4c 3e37fccc",
}


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_values_hold_to_the_last_bit(key):
    assert noise.normal(*key, (6,)).astype(">f4").tobytes().hex(" ", 4) == GOLDEN[key]


def test_golden_digest_of_a_large_array():
    values = noise.normals(7, "noise", 5, range(16), (4, 64, 64)).astype("<f4")
    assert (
        hashlib.sha256(values.tobytes()).hexdigest()
        == "d0111b9e4556934a973f269d2d63b8bac3123fb2a0ccea9d6db83d0f365f49ed"
    )


def test_extreme_words_give_finite_values():
    low, high = 0, 2**32 - 1
    blocks = np.array([[low, low, low, low], [low, high, high, low], [high] * 4, [low, 2**31, 2**31, 2**30]], np.uint64)
    found = noise.box_muller(np.ascontiguousarray(blocks.T))
    for row, expected in zip(found, blocks.tolist(), strict=True):
        np.testing.assert_allclose(row, plain_normals(expected), rtol=1e-7, atol=1e-12)
    assert np.abs(found).max() < 6.67


def test_normals_are_normal_of_each_slot_stacked():
    slots = [5, 0, 4_000_000_000]
    stacked = np.stack([noise.normal(3, "noise", 8, slot, (3, 5, 5)) for slot in slots])
    np.testing.assert_array_equal(noise.normals(3, "noise", 8, slots, (3, 5, 5)), stacked)


def test_a_value_does_not_depend_on_how_many_are_drawn():
    few, many = noise.normal(3, "n", 0, 0, (7,)), noise.normal(3, "n", 0, 0, (70_000,))
    np.testing.assert_array_equal(few, many[:7])


def test_normals_are_standard_normal():
    values = noise.normals(0, "noise", 1, range(64), (4, 32, 32)).astype(np.float64)  # 262,144 values
    n = values.size
    assert abs(values.mean()) < 4 / math.sqrt(n)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((values**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / n)
    ordered = np.sort(values.ravel())
    distribution = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in ordered[:: n // 4096]])
    assert np.abs(distribution - np.arange(0, n, n // 4096) / n).max() < 1.95 / math.sqrt(
        n
    )  # Kolmogorov–Smirnov, 0.1 %


def test_slots_and_neighbours_are_uncorrelated():
    values = noise.normals(0, "noise", 1, range(16), (16384,)).astype(np.float64)
    correlations = np.corrcoef(values) - np.eye(16)
    assert np.abs(correlations).max() < 4.5 / math.sqrt(16384)
    flat = values.ravel()
    assert abs((flat[1:] * flat[:-1]).mean()) < 4 / math.sqrt(flat.size)


def test_uniform_values_have_53_bits_and_stay_below_one():
    first = plain_words(6, "crop", 2, 1, 4)
    expected = [((first[i] >> 5) * 2**26 + (first[i + 1] >> 6)) / 2**53 for i in (0, 2)]
    assert noise.uniform(6, "crop", 2, 1, (2,)).tolist() == expected
    assert noise.uniform(6, "crop", 2, 1).shape == ()
    many = noise.uniforms(6, "crop", 2, range(10), (10_000,))
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 4 * math.sqrt(1 / 12 / many.size)
    np.testing.assert_array_equal(many[3], noise.uniform(6, "crop", 2, 3, (10_000,)))


def test_integers_are_spread_evenly_over_their_range():
    found = noise.integers(0, "timestep", 0, 0, -3, 7, (100_000,))
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == list(range(-3, 7)) and found.dtype == np.int64
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # chi-squared, 9 degrees of freedom, 0.1 %
    assert int(noise.integers(0, "t", 0, 0, 5, 6)) == 5


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_a_permutation_has_everything_once(count):
    found = noise.permutation(1, "order", 0, 0, count)
    assert sorted(found.tolist()) == list(range(count))
    numbers = [
        high << 32 | low for high, low in zip(*[iter(plain_words(1, "order", 0, 0, 2 * count))] * 2, strict=True)
    ]
    assert found.tolist() == sorted(range(count), key=numbers.__getitem__)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: noise.normal(0, "n", -1, 0, (1,)),
        lambda: noise.normal(0, "n", 0, -1, (1,)),
        lambda: noise.normal(0, "n", 0, 2**32, (1,)),
        lambda: noise.integers(0, "n", 0, 0, 3, 3),
    ],
)
def test_what_cannot_be_counted_is_refused(draw):
    with pytest.raises(ValueError):
        draw()
