"""Random numbers that are the same everywhere: on every backend, numpy version, machine and number of devices.

Bits are Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a function of a key and a
counter with no state. The key is made of the seed and a purpose ("noise", "timestep", …), the counter of the update,
the global sample slot and the position, so that any number can be had without drawing those before it: resuming and
splitting a batch over devices change nothing.

Normal values are our own Box–Muller in float64. Logarithm and sine are polynomials, because numpy's own differ in the
last bit between versions and processors; only additions, multiplications, divisions and square roots are used, which
IEEE 754 rounds the same on all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # 32-bit words in 64-bit cells, so that a product of two of them fits

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10
_BLOCKS_AT_ONCE = 1 << 12  # keeps the working arrays inside a core's cache


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: the four 32-bit words for each `counter` [4, n] (words in uint64 cells) under `key`; [4, n]."""
    even = counter[0::2] & _LOW  # words 0 and 2, which get multiplied
    odd = counter[1::2] & _LOW  # words 1 and 3
    keys = np.array([[key[0]], [key[1]]], np.uint64)
    product = np.empty_like(even)
    for _ in range(_ROUNDS):
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(product[::-1], _HALF, out=even)
        even ^= odd
        even ^= keys
        np.bitwise_and(product[::-1], _LOW, out=odd)
        keys = (keys + _KEY_STEPS) & _LOW
    words = np.empty_like(counter)
    words[0::2], words[1::2] = even, odd
    return words


def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """The Philox key of a seed (any integer) and a purpose: the first eight bytes of a SHA-256 of both."""
    digest = hashlib.sha256(f"persona:{int(seed)}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _counters(update: int, slots: Sequence[int], blocks: int) -> Words:
    """Counters [4, slots × blocks]: block number, slot, and the low and high half of the update."""
    if not 0 <= update < 1 << 64:
        raise ValueError(f"update {update} is not in 0..2^64-1")
    if any(not 0 <= slot < 1 << 32 for slot in slots):
        raise ValueError(f"slots {list(slots)} are not all in 0..2^32-1")
    counter = np.empty((4, len(slots), blocks), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = np.array(slots, np.uint64)[:, None]
    counter[2] = np.uint64(update & 0xFFFFFFFF)
    counter[3] = np.uint64(update >> 32)
    return counter.reshape(4, -1)


def words(seed: int, purpose: str, update: int, slots: Sequence[int], count: int) -> Words:
    """`count` random 32-bit words per slot, [slots, count], in uint64 cells. Word i does not depend on `count`."""
    blocks = -(-count // 4)
    drawn = philox(_counters(update, slots, blocks), key_of(seed, purpose))  # [4, slots × blocks]
    return drawn.T.reshape(len(slots), blocks * 4)[:, :count]


_LN2 = math.log(2.0)
_SQRT_HALF_BITS = np.int64(0x3FE6A09E667F3BCD)  # float64 bits of √½, where the mantissa's range is cut
_MANTISSA_BITS = np.int64(52)
_ATANH = [1.0 / n for n in range(17, 0, -2)]  # atanh(x)/x = 1 + x²/3 + x⁴/5 + …; the rest is below 4e-15
_SINE = [(-1.0) ** (n // 2) / math.factorial(n) for n in range(15, 0, -2)]  # sin(x)/x in x²; the rest is below 1e-16


def _polynomial(coefficients: Sequence[float], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Horner's rule; the highest power's coefficient comes first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += coefficient
    return value


def _logarithm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln(x) for positive normal x, to about 1e-15: x = m·2^e with m in [√½, √2), ln(m) = 2·atanh((m−1)/(m+1))."""
    bits = x.view(np.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    mantissa = (bits - (exponent << _MANTISSA_BITS)).view(np.float64)
    ratio = mantissa - 1.0
    mantissa += 1.0
    ratio /= mantissa
    value = _polynomial(_ATANH, ratio * ratio)
    value *= ratio
    value *= 2.0
    value += exponent * _LN2
    return value


def _cosine_and_sine(turns: Words) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin of the angle π·(2·turns + 1 − 2³²)/2³², to about 1e-15: a quarter of it, doubled twice."""
    quarter = turns.astype(np.float64)
    quarter -= 2.0**31 - 0.5
    quarter *= math.pi / 2.0**33
    sine = _polynomial(_SINE, quarter * quarter)
    sine *= quarter
    cosine = np.sqrt(1.0 - sine * sine)  # the quarter lies within ±π/4, where the cosine is positive
    for _ in range(2):
        cosine *= sine  # ½·sin of twice the angle
        sine *= sine
        sine *= -2.0
        sine += 1.0  # cos of twice the angle
        cosine *= 2.0
        cosine, sine = sine, cosine
    return cosine, sine


def box_muller(words: Words) -> NDArray[np.float32]:
    """Standard normal values [n, 4] float32 from the words [4, n] of n Philox blocks (Box and Muller 1958).

    Words 0 and 2 give the radius, √(−2·ln((word + 1)/2³²)), at most 6.66; words 1 and 3 give the angle.
    """
    radius = words[0::2].astype(np.float64)
    radius += 1.0
    radius *= 2.0**-32
    radius = _logarithm(radius)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    cosine, sine = _cosine_and_sine(words[1::2])
    cosine *= radius
    sine *= radius
    values = np.empty((words.shape[1], 4), np.float32)
    values[:, 0], values[:, 2] = cosine
    values[:, 1], values[:, 3] = sine
    return values


def normals(seed: int, purpose: str, update: int, slots: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal values for every slot, [len(slots), *shape] float32: `normal` of each, stacked."""
    count = math.prod(shape)
    blocks = -(-count // 4)
    key = key_of(seed, purpose)
    counter = _counters(update, slots, blocks)
    values = np.empty((len(slots) * blocks, 4), np.float32)
    for start in range(0, len(values), _BLOCKS_AT_ONCE):
        part = slice(start, start + _BLOCKS_AT_ONCE)
        values[part] = box_muller(philox(counter[:, part], key))
    return values.reshape(len(slots), blocks * 4)[:, :count].reshape(len(slots), *shape)


def normal(seed: int, purpose: str, update: int, slot: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal values [*shape] float32 of (seed, purpose, update, slot). Value i does not depend on `shape`."""
    values: NDArray[np.float32] = normals(seed, purpose, update, (slot,), shape)[0]
    return values


def uniforms(seed: int, purpose: str, update: int, slots: Sequence[int], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Uniform values in [0, 1) with 53 bits for every slot, [len(slots), *shape] float64."""
    drawn = words(seed, purpose, update, slots, 2 * math.prod(shape))
    high, low = drawn[:, 0::2] >> np.uint64(5), drawn[:, 1::2] >> np.uint64(6)
    values: NDArray[np.float64] = (high * 2.0**26 + low) * 2.0**-53
    return values.reshape(len(slots), *shape)


def uniform(seed: int, purpose: str, update: int, slot: int, shape: tuple[int, ...] = ()) -> NDArray[np.float64]:
    """Uniform values in [0, 1), [*shape] float64, of (seed, purpose, update, slot)."""
    return uniforms(seed, purpose, update, (slot,), shape).reshape(shape)


def integers(
    seed: int, purpose: str, update: int, slot: int, low: int, high: int, shape: tuple[int, ...] = ()
) -> NDArray[np.int64]:
    """Integers in low..high−1, [*shape] int64; biased by no more than (high − low)/2⁵³. ValueError when none exist."""
    if not 0 < high - low <= 1 << 53:
        raise ValueError(f"no integers can be drawn from {low}..{high - 1}")
    drawn = uniform(seed, purpose, update, slot, shape) * float(high - low)
    return drawn.astype(np.int64) + np.int64(low)


def dropout_seed(seed: int, update: int, rank: int) -> int:
    """What a framework's own generator is seeded with before `update` begins in process `rank` (63 bits). Dropout draws
    too many numbers to be made here, and its masks differ between frameworks; but they follow from the plan, so a
    checkpoint needs no generator's state and any backend can go on from it."""
    low, high = words(seed, "dropout", update, [rank], 2)[0].tolist()
    return int(low | (high & 0x7FFFFFFF) << 32)


def permutation(seed: int, purpose: str, update: int, slot: int, count: int) -> NDArray[np.int64]:
    """A permutation of 0..count−1, int64: the order of `count` random 64-bit numbers."""
    drawn = words(seed, purpose, update, (slot,), 2 * count)[0]
    numbers = (drawn[0::2] << _HALF) | drawn[1::2]
    return np.argsort(numbers, kind="stable").astype(np.int64)
