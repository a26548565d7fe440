"""Exact short forms: what is put together again has the same bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve import compact


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 256), st.integers(0, 40), st.integers(0, 10**6))
def test_symbols_in_bytes(k: int, n: int, seed: int) -> None:
    wide = compact.radix(k)
    assert wide >= k
    assert compact.per_byte(wide) >= compact.per_byte(k)
    codes = np.random.default_rng(seed).integers(0, k, n).astype(np.uint8)
    table = compact.digits(wide)
    assert len(table) <= 256
    got = table[compact.join(codes, wide)].reshape(-1)[:n]
    np.testing.assert_array_equal(got, codes)


def test_a_bitmap_is_read_with_the_digits_of_two() -> None:
    mask = np.random.default_rng(0).random(21) < 0.5
    got = compact.digits(2)[compact.bitmap(mask)].reshape(-1)[:21]
    np.testing.assert_array_equal(got, mask)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_entries_keep_their_bits(dtype: type) -> None:
    rng = np.random.default_rng(1)
    array = rng.choice(np.array([0.0, -0.0, 1.5, -2, np.inf, np.nan], dtype), (6, 5))
    array[2:4] = 1.5
    found = compact.symbols(array, 3)
    assert found is not None
    got = np.stack([b[c] for b, c in zip(found.books, found.codes, strict=True)]).reshape(6, 5)
    assert got.tobytes() == array.tobytes()


def test_the_most_frequent_entry_comes_first() -> None:
    found = compact.symbols(np.array([5, 1, 1, 1, 7, 7], np.float32))
    assert found is not None
    assert found.books.tolist() == [[1, 7, 5]]


def test_too_many_values() -> None:
    assert compact.symbols(np.arange(257, dtype=np.float32)) is None
    assert compact.symbols(np.arange(512, dtype=np.float32), 2) is not None


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_grid(axis: int | None) -> None:
    rng = np.random.default_rng(2)
    q = rng.integers(-127, 128, (5, 40)).astype(np.float32)
    scale = rng.random(5 if axis == 0 else 40 if axis == 1 else 1).astype(np.float32)
    array = q * (scale[:, None] if axis == 0 else scale)
    found = compact.grid(array, axis)
    assert found is not None
    wide = found.scale[:, None] if axis == 0 else found.scale
    assert (
        found.integers.astype(np.float32) * wide
    ).tobytes() == array.tobytes() or not array.all()
    np.testing.assert_array_equal(found.integers * wide, array)


def test_what_lies_on_no_grid() -> None:
    rng = np.random.default_rng(3)
    assert compact.grid(rng.standard_normal((4, 30)).astype(np.float32), 0) is None
    assert compact.grid(np.array([[-0.0, 1.0]], np.float32), None) is None
    assert compact.grid(np.array([[np.nan, 1.0]], np.float32), None) is None


def test_floats_taken_apart() -> None:
    rng = np.random.default_rng(4)
    array = (rng.standard_normal(5000) * np.exp(rng.uniform(-40, 40, 5000))).astype(np.float32)
    array[:3] = 0.0, -0.0, np.float32(2.0**100)
    parts = compact.planes(array)
    assert parts is not None
    upper, sign, power = compact.plane_tables()
    mantissa = upper[parts.high] + parts.low.astype(np.float32)
    assert (mantissa * sign[parts.high] * power[parts.exponent]).tobytes() == array.tobytes()


@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e-40, 1e-32])
def test_floats_that_stay_whole(bad: float) -> None:
    assert compact.planes(np.array([1, bad], np.float32)) is None
