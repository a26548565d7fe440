"""Layers fitted to the outputs they should have, against least squares on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from effdl.solve.refit import Moments, refit, ridge

RNG = np.random.default_rng(2)


def of(x: np.ndarray, t: np.ndarray) -> Moments:
    """The moments of rows [n, K] and outputs [n, N], one group."""
    a, b = x - x.mean(0), t - t.mean(0)
    n = len(x)
    return Moments(
        n,
        x.mean(0)[None],
        t.mean(0)[None],
        (a.T @ a / n)[None],
        (b.T @ a / n)[None],
        (b**2).mean(0)[None],
    )


def rows(count: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = RNG.standard_normal((count, 12)) @ RNG.standard_normal((12, 12)) + 3
    weight = RNG.standard_normal((4, 12))
    t = x @ weight.T + 2 + noise * RNG.standard_normal((count, 4))
    return x, t, weight


def test_the_error_is_that_on_the_rows() -> None:
    x, t, _ = rows(300)
    wrong = RNG.standard_normal((4, 12))
    got = x @ wrong.T
    residual = (t - t.mean(0)) - (got - got.mean(0))
    want = (residual**2).sum() / ((t - t.mean(0)) ** 2).sum()
    assert of(x, t).error(wrong[None]) == pytest.approx(want)


def test_two_parts_are_the_whole() -> None:
    x, t, _ = rows(300)
    both, whole = of(x[:100], t[:100]).with_(of(x[100:], t[100:])), of(x, t)
    for name in ("mean_in", "mean_out", "inner", "cross", "spread"):
        np.testing.assert_allclose(getattr(both, name), getattr(whole, name), atol=1e-10)


def test_a_wrong_weight_becomes_the_right_one() -> None:
    x, t, weight = rows(2000)
    start = weight + 0.3 * RNG.standard_normal(weight.shape)
    fit = refit(start[None], of(x[:1500], t[:1500]), of(x[1500:], t[1500:]))
    assert fit.shrink is not None
    assert fit.after < 0.01 * fit.before
    np.testing.assert_allclose(x @ fit.weight[0].T + fit.bias[0], t, atol=0.2)


def test_few_rows_of_noise_change_nothing() -> None:
    x, _, weight = rows(400)
    t = x @ weight.T + 30 * RNG.standard_normal((400, 4))
    few, held = of(x[:15], t[:15]), of(x[15:], t[15:])
    fit = refit(weight[None], few, held)
    assert held.error(fit.weight) <= held.error(weight[None]) + 1e-12
    assert fit.after <= fit.before


def test_ridge_minimises_what_it_says() -> None:
    x, t, weight = rows(60, noise=1.0)
    seen = of(x, t)
    made = ridge(weight[None], seen, 0.05)
    lam = 0.05 * np.diagonal(seen.inner[0]).mean()

    def loss(w: np.ndarray) -> float:
        both = np.sum((w @ seen.inner) * w) - 2 * np.sum(w * seen.cross)
        return float(both + lam * np.sum((w - weight[None]) ** 2))

    for _ in range(20):
        assert loss(made) <= loss(made + 1e-3 * RNG.standard_normal(made.shape))


def test_groups_are_fitted_apart() -> None:
    (x, t, w), (x2, t2, w2) = rows(500), rows(500)
    one, two = of(x, t), of(x2, t2)
    both = Moments(
        500,
        *(
            np.concatenate([getattr(one, n), getattr(two, n)])
            for n in ("mean_in", "mean_out", "inner", "cross", "spread")
        ),
    )
    start = np.stack([w + 1, w2 - 1])
    made = ridge(start, both, 1e-3)
    np.testing.assert_allclose(made[0], ridge(start[:1], one, 1e-3)[0])
    np.testing.assert_allclose(made[1], ridge(start[1:], two, 1e-3)[0])
