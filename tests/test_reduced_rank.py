"""Low-rank approximations by output error: losses against brute force, and what must never happen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve.factorize import leading_svd
from effdl.solve.output_pca import balanced, output_energy, output_pca, shrunk
from effdl.solve.reduced_rank import (
    channel_basis,
    channel_features,
    composed_channels,
    composed_kernels,
    kernel_basis,
    kernel_features,
)


def layer(
    n: int, channels: int, places: int, seed: int, rows: int = 400
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight, correlated rows without a mean, and their second moments."""
    rng = np.random.default_rng(seed)
    width = channels * places
    mix = rng.standard_normal((width, width)) * rng.uniform(0.05, 1, width)
    x = rng.standard_normal((rows, width)) @ mix
    x -= x.mean(0)
    return rng.standard_normal((n, width)), x, x.T @ x / rows


def true_loss(weight: np.ndarray, other: np.ndarray, x: np.ndarray) -> float:
    """Mean squared error of the outputs over the rows."""
    return float(np.square(x @ (weight - other).T).sum() / len(x))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 999), with_data=st.booleans()
)
def test_output_pca_is_what_it_says_and_beats_plain_svd(
    n: int, k: int, seed: int, with_data: bool
) -> None:
    w, x, h = layer(n, k, 1, seed)
    found = output_pca(w, h if with_data else None)
    if not with_data:
        x = np.linalg.qr(np.random.default_rng(0).standard_normal((40, k)))[0] * np.sqrt(40)
    assert found.total == pytest.approx(true_loss(w, np.zeros_like(w), x))
    for rank in range(1, found.rank + 1):
        left, right = found.factors(rank)
        assert found.loss(rank) == pytest.approx(
            true_loss(w, left @ right, x), abs=1e-9 * found.total
        )
        plain_left, plain_right = leading_svd(w, rank).factors(rank)
        plain = true_loss(w, plain_left @ plain_right, x)
        assert found.loss(rank) <= plain + 1e-9 * found.total
    np.testing.assert_allclose(left @ right, w, atol=1e-6 * np.abs(w).max())


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 9),
    channels=st.integers(2, 6),
    places=st.integers(2, 5),
    seed=st.integers(0, 999),
    with_data=st.booleans(),
)
def test_combinations_of_channels(
    n: int, channels: int, places: int, seed: int, with_data: bool
) -> None:
    w, x, h = layer(n, channels, places, seed)
    cov = h if with_data else None
    if not with_data:
        x = np.eye(channels * places) * np.sqrt(channels * places)
    basis = channel_basis(w, cov, channels, channels)
    fits = channel_features(w, cov, basis, places)
    before = np.inf
    for rank in range(1, channels + 1):
        features = rank * places
        fit = fits.fit(features)
        whole = composed_channels(fit, basis[:rank], places)
        loss = fits.loss(features)
        assert loss == pytest.approx(true_loss(w, whole, x), abs=1e-6 * fits.total)
        # brute force: least squares of the outputs on the features
        z = np.einsum("rc,ncs->nrs", basis[:rank], x.reshape(len(x), channels, places))
        z = z.reshape(len(x), -1)
        solved = np.linalg.lstsq(z, x @ w.T, rcond=None)[0]
        best = np.square(x @ w.T - z @ solved).sum() / len(x)
        assert loss == pytest.approx(best, abs=1e-6 * fits.total)
        assert loss <= before + 1e-9 * fits.total
        before = loss
        directions, values = fits.outputs(features)
        last = np.inf
        for thin in range(1, n + 1):
            told = loss + values[thin:].sum()
            u = directions[:, :thin]
            assert told == pytest.approx(true_loss(w, u @ (u.T @ whole), x), abs=1e-6 * fits.total)
            assert told <= last + 1e-9 * fits.total, "more rank, more error"
            last = told
    assert before == pytest.approx(0, abs=1e-6 * fits.total), "full rank is exact"


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 9),
    channels=st.integers(1, 5),
    places=st.integers(2, 5),
    seed=st.integers(0, 999),
    with_data=st.booleans(),
)
def test_kernels_of_channels(
    n: int, channels: int, places: int, seed: int, with_data: bool
) -> None:
    w, x, h = layer(n, channels, places, seed)
    cov = h if with_data else None
    if not with_data:
        x = np.eye(channels * places) * np.sqrt(channels * places)
    kernels = kernel_basis(w, cov, channels, places)
    fits = kernel_features(w, cov, kernels)
    for count in range(1, places + 1):
        fit = fits.fit(count * channels)
        whole = composed_kernels(fit, kernels[:, :count])
        loss = fits.loss(count * channels)
        assert loss == pytest.approx(true_loss(w, whole, x), abs=1e-6 * fits.total)
        z = np.einsum("crs,ncs->nrc", kernels[:, :count], x.reshape(len(x), channels, places))
        z = z.reshape(len(x), -1)
        solved = np.linalg.lstsq(z, x @ w.T, rcond=None)[0]
        best = np.square(x @ w.T - z @ solved).sum() / len(x)
        assert loss == pytest.approx(best, abs=1e-6 * fits.total)
        # each channel's own best filters in the plain metric, without a fit, are no better
        cube = w.reshape(n, channels, places)
        plain = np.empty_like(cube)
        for c in range(channels):
            u, s, vt = np.linalg.svd(cube[:, c], full_matrices=False)
            plain[:, c] = (u[:, :count] * s[:count]) @ vt[:count]
        if not with_data:
            assert loss <= true_loss(w, plain.reshape(n, -1), x) + 1e-9 * fits.total
    assert loss == pytest.approx(0, abs=1e-6 * fits.total)


def test_the_second_look_at_the_basis_serves_the_outputs_that_stay() -> None:
    w, _, h = layer(16, 12, 4, 3)
    once = channel_basis(w, h, 12, 4)
    fits = channel_features(w, h, once, 4)
    directions, _ = fits.outputs(16)
    again = channel_basis(w, h, 12, 4, directions[:, :3])
    better = channel_features(w, h, again, 4)
    told = [f.loss(16) + f.outputs(16)[1][3:].sum() for f in (fits, better)]
    assert told[1] < told[0]


def test_balanced_factors_have_equal_ranges_and_the_same_product() -> None:
    rng = np.random.default_rng(0)
    left, right = (
        rng.standard_normal((9, 4)) * 100,
        rng.standard_normal((4, 7)) * [[1], [5], [0], [2]],
    )
    a, b = balanced(left, right)
    np.testing.assert_allclose(a @ b, left @ right, atol=1e-9)
    kept = [0, 1, 3]
    np.testing.assert_allclose(np.abs(a).max(0)[kept], np.abs(b).max(1)[kept])


def test_shrinking_keeps_the_trace_and_lifts_what_was_not_seen() -> None:
    x = np.random.default_rng(0).standard_normal((5, 20))
    h = x.T @ x / 5
    s = shrunk(h, 5)
    assert np.trace(s) == pytest.approx(np.trace(h))
    assert np.linalg.eigvalsh(s)[0] > 1e-3
    np.testing.assert_allclose(shrunk(h, 10**9), h, atol=1e-6)
    assert output_energy(np.eye(20), s) == pytest.approx(np.trace(s))
