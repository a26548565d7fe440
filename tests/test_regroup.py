"""Constants across a reshape, against the reshape itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve.regroup import compress, regroup


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))

    def shape() -> tuple[int, ...]:
        dims, product = [], 1
        for f in factors:
            product *= f
            if draw(st.booleans()):
                dims.append(product)
                product = 1
        return (*dims, product)

    return shape(), shape()


@settings(max_examples=200, deadline=None)
@given(reshapes(), st.integers(0, 31))
def test_it_meets_the_same_elements(shapes: tuple[tuple[int, ...], ...], mask: int) -> None:
    source, target = shapes
    rng = np.random.default_rng(mask)
    array = rng.integers(0, 3, [n if mask >> k & 1 else 1 for k, n in enumerate(source)])
    x = rng.standard_normal(source)
    moved = regroup(array.astype(float), source, target)
    if moved is None:
        return
    assert moved.ndim == len(target)
    want = (x * array).reshape(target)
    np.testing.assert_array_equal(x.reshape(target) * moved, want)


def test_dynamic_dimensions() -> None:
    c = np.arange(6.0).reshape(2, 3)
    moved = regroup(c.reshape(1, 1, 2, 3), ("n", "t", 2, 3), ("n", "t", 6))
    assert moved is not None
    np.testing.assert_array_equal(moved, c.reshape(1, 1, 6))
    moved = regroup(c[:1].reshape(1, 1, 1, 3), ("n", "t", 2, 3), (None, 6))
    assert moved is not None
    np.testing.assert_array_equal(moved, np.tile(c[:1], (1, 2)))
    back = regroup(moved, (None, 6), ("n", "t", 2, 3))
    assert back is not None
    np.testing.assert_array_equal(back, c[:1].reshape(1, 1, 1, 3))
    per_channel = np.arange(4.0).reshape(1, 4, 1, 1)
    assert regroup(per_channel, ("n", 4, "h", "w"), ("n", None)) is None
    moved = regroup(per_channel, ("n", 4, "h", "w"), ("n", 4, None))
    assert moved is not None
    assert moved.shape == (1, 4, 1)
    assert regroup(per_channel, (None, 4, "h", "w"), (None, 4, None)) is None


@pytest.mark.parametrize(("source", "target"), [((), (1, 1)), ((1,), ()), ((), ())])
def test_single_numbers(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    moved = regroup(np.full(source, 2.0), source, target)
    assert moved is not None
    assert moved.shape == target


def test_a_constant_that_makes_its_tensor_larger_is_not_followed() -> None:
    assert regroup(np.arange(3.0).reshape(1, 3), (2, 1), (2,)) is None


def test_compress() -> None:
    array = np.broadcast_to(np.arange(3.0)[:, None], (3, 4))
    assert compress(array).shape == (3, 1)
    assert compress(np.ones((2, 2))).shape == (1, 1)
