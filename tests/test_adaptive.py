"""Adaptive rounding of 8-bit weights, against nearest rounding, brute force and the limit of 16 bits."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve.adaptive import adaptive_rounding
from effdl.solve.quantize import PAIR_LIMIT, weight_scales


def problem(groups: int, each: int, width: int, seed: int) -> tuple[Any, Any]:
    """Weights [groups * each, width] and the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((groups * each, width)).astype(np.float32)
    mixed = rng.standard_normal((groups, width, width)) + np.eye(width)
    rows = rng.standard_normal((groups, 10 * width, width)) @ mixed
    return weight, rows.transpose(0, 2, 1) @ rows / (10 * width)


def errors(weight: Any, q: Any, scales: Any, moments: Any) -> Any:
    groups, width, _ = moments.shape
    change = (q * scales[:, None].astype(float) - weight).reshape(groups, -1, width)
    return np.einsum("gnk,gkl,gnl->gn", change, moments, change).reshape(-1)


def nearest(weight: Any, scales: Any) -> Any:
    return np.clip(np.rint(weight / scales[:, None]), -127, 127)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from((1, 1, 2, 5)),
    each=st.integers(1, 4),
    width=st.integers(1, 20),
    guard=st.booleans(),
    seed=st.integers(0, 99),
)
def test_never_worse_than_nearest_and_within_the_limits(
    groups: int, each: int, width: int, guard: bool, seed: int
) -> None:
    weight, moments = problem(groups, each, width, seed)
    scales = weight_scales(weight, 0, saturation_guard=guard)
    q = adaptive_rounding(weight, scales, moments, saturation_guard=guard)
    assert q.dtype == np.int8
    assert q.shape == weight.shape
    assert q.min() >= -127
    before = errors(weight, nearest(weight, scales), scales, moments)
    assert (errors(weight, q, scales, moments) <= before * (1 + 1e-9) + 1e-12).all()
    if guard and width > 1:
        ordered = np.sort(q.astype(int), axis=1)
        assert (ordered[:, -2:].sum(1) <= PAIR_LIMIT).all()
        assert (ordered[:, :2].sum(1) >= -PAIR_LIMIT).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_near_the_best_of_all(groups: int) -> None:
    """On a coarse grid, where rounding matters: brute force over the neighbours of every weight."""
    ratio = []
    for seed in range(12):
        weight, moments = problem(groups, 1, 4, seed)
        scales = np.full(groups, 0.6, np.float32)
        q = adaptive_rounding(weight, scales, moments)
        start = np.floor(weight / scales[:, None])
        found = np.full(groups, np.inf)
        for step in product((-1, 0, 1, 2), repeat=4):
            found = np.minimum(found, errors(weight, start + np.array(step), scales, moments))
        mine = errors(weight, q, scales, moments)
        plain = errors(weight, nearest(weight, scales), scales, moments)
        assert (mine >= found * (1 - 1e-9) - 1e-9).all()
        ratio.append((mine.sum() - found.sum()) / max(plain.sum() - found.sum(), 1e-9))
    assert np.mean(ratio) < 0.5  # of what nearest rounding leaves on the table


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, moments = problem(1, 3, 6, 0)
    moments[:, 2] = moments[:, :, 2] = 0
    scales = weight_scales(weight, 0)
    q = adaptive_rounding(weight, scales, moments)
    assert (errors(weight, q, scales, moments) >= 0).all()
    deep = adaptive_rounding(weight.reshape(3, 6), scales, np.zeros((3, 6, 6)))
    np.testing.assert_array_equal(deep, nearest(weight, scales))
