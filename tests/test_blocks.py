"""Weights in blocks: grids and rounding against brute force and against each other."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve.blocks import (
    Grid,
    awq_factors,
    block_grid,
    descend,
    gptq,
    hqq,
    output_error,
)


def problem(outputs: int, inputs: int, seed: int, outlier: float = 1.0) -> tuple[Any, Any, Any]:
    """Weights, rows of correlated inputs, their second moments."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    mixed = rng.standard_normal((inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    rows = rng.standard_normal((8 * inputs, inputs)) @ mixed
    rows[:, 0] *= outlier
    return weight, rows, rows.T @ rows / len(rows)


def error(weight: Any, q: Any, moments: Any, grid: Grid) -> float:
    return output_error(weight, grid.weights(q), moments)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 40),
    size=st.sampled_from((4, 16, 32)),
    bits=st.sampled_from((2, 3, 4, 8)),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_grid_holds_what_it_spans(
    outputs: int, inputs: int, size: int, bits: int, symmetric: bool, seed: int
) -> None:
    weight, _, _ = problem(outputs, inputs, seed)
    for grid in (block_grid(weight, size, bits, symmetric=symmetric), hqq(weight, size, bits)):
        blocks = -(-inputs // size)
        assert grid.scale.shape == grid.zero.shape == (outputs, blocks)
        assert (grid.scale > 0).all()
        assert (grid.zero <= grid.top).all()
        q = grid.nearest(weight)
        assert q.max() <= grid.top
        inside = (grid.nearest(weight) > 0) & (q < grid.top)
        scale, _ = grid.wide(inputs)
        gap = np.abs(grid.weights(q) - weight)
        assert (gap[inside] <= scale[inside] * 0.501).all()
    plain = block_grid(weight, size, 8)
    np.testing.assert_allclose(plain.weights(plain.nearest(weight)), weight, atol=0.03)


def test_zero_stays_zero_and_empty_blocks_are_harmless() -> None:
    weight = np.zeros((2, 8), np.float32)
    weight[0, :4] = [1, -2, 0, 0.5]
    for grid in (block_grid(weight, 4, 4), hqq(weight, 4, 4)):
        back = grid.weights(grid.nearest(weight))
        assert (back[weight == 0] == 0).all()
        assert np.isfinite(back).all()


def test_clipping_pays_where_one_weight_is_far_out() -> None:
    weight = np.array([[4.0, *np.linspace(-1, 1, 31)]], np.float32)
    importance = np.ones(32, np.float32)
    importance[0] = 1e-3
    spanned, clipped = block_grid(weight, 32, 3), block_grid(weight, 32, 3, importance=importance)
    assert clipped.scale[0, 0] < spanned.scale[0, 0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_descent_ends_where_no_single_integer_helps(seed: int) -> None:
    weight, _, moments = problem(2, 5, seed)
    grid = block_grid(weight, 5, 2)
    q = descend(weight, grid.nearest(weight), moments, grid, sweeps=50)
    best = error(weight, q, moments, grid)
    assert best <= error(weight, grid.nearest(weight), moments, grid) * (1 + 1e-9)
    for n, k, value in product(range(2), range(5), range(4)):
        other = q.copy()
        other[n, k] = value
        assert error(weight, other, moments, grid) >= best * (1 - 1e-6) - 1e-12


def test_descent_comes_near_the_best_of_all_integers() -> None:
    every = np.array(list(product(range(4), repeat=6)), np.uint8)
    ratios = []
    for seed in range(30):
        weight, _, moments = problem(1, 6, seed)
        grid = block_grid(weight, 6, 2)
        least = min(error(weight, q[None], moments, grid) for q in every)
        found = descend(weight, gptq(weight, moments, grid), moments, grid)
        ratios.append(error(weight, found, moments, grid) / least)
    assert min(ratios) > 1 - 1e-6
    assert np.median(ratios) < 1.01
    assert np.mean(ratios) < 1.5


def test_each_method_is_better_than_the_one_before() -> None:
    """The order that is known of 4 bits: nearest, GPTQ, GPTQ and descent."""
    ratios = []
    for seed in range(5):
        weight, _, moments = problem(40, 72, seed)
        grid = block_grid(weight, 72, 4)
        nearest = grid.nearest(weight)
        one = gptq(weight, moments, grid)
        two = descend(weight, one, moments, grid)
        errors = [error(weight, q, moments, grid) for q in (nearest, one, two)]
        assert errors[0] > errors[1] >= errors[2]
        ratios.append(errors[2] / errors[0])
    assert np.mean(ratios) < 0.55


@pytest.mark.parametrize("panel", [1, 7, 128])
def test_panels_change_nothing(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, moments = problem(3, 30, 1)
    grid = block_grid(weight, 16, 4)
    first = gptq(weight, moments, grid)
    second = descend(weight, first, moments, grid, sweeps=1)
    monkeypatch.setattr("effdl.solve.blocks._PANEL", panel)
    np.testing.assert_array_equal(gptq(weight, moments, grid), first)
    np.testing.assert_array_equal(descend(weight, first, moments, grid, sweeps=1), second)


def test_inputs_that_are_always_zero() -> None:
    weight, _, moments = problem(3, 8, 2)
    moments[2, :] = moments[:, 2] = 0
    grid = block_grid(weight, 8, 4)
    q = descend(weight, gptq(weight, moments, grid), moments, grid)
    assert np.isfinite(grid.weights(q)).all()
    assert error(weight, q, moments, grid) <= error(weight, grid.nearest(weight), moments, grid)


def test_hqq_is_better_than_nearest_on_heavy_tails() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (64, 256)).astype(np.float32)
    spans = np.stack([weight.reshape(64, -1, 32).min(2), weight.reshape(64, -1, 32).max(2)])
    scale = ((np.maximum(spans[1], 0) - np.minimum(spans[0], 0)) / 15).astype(np.float32)
    plain = Grid(scale, np.rint(-np.minimum(spans[0], 0) / scale).astype(np.uint8), 32, 4)
    better = hqq(weight, 32, 4)

    def lp(grid: Grid) -> float:
        return float((np.abs(grid.weights(grid.nearest(weight)) - weight) ** 0.7).sum())

    assert lp(better) < lp(plain)


def test_awq_helps_where_an_input_is_large_and_is_one_where_none_is() -> None:
    weight, rows, moments = problem(16, 32, 3, outlier=40.0)
    factors = awq_factors(weight, moments, np.abs(rows).mean(0), 32, 4)
    plain, scaled = block_grid(weight, 32, 4), block_grid(weight * factors, 32, 4)
    before = output_error(weight, plain.weights(plain.nearest(weight)), moments)
    rounded = scaled.weights(scaled.nearest(weight * factors)) / factors
    assert output_error(weight, rounded, moments) < 0.7 * before
    assert factors[0] == factors.max()
    np.testing.assert_allclose(factors.max() * factors.min(), 1, rtol=1e-5)
    same = awq_factors(weight, np.eye(32), np.ones(32), 32, 4)
    np.testing.assert_array_equal(same, np.ones(32, np.float32))
