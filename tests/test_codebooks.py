"""The mathematics of shared weights, against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effdl.solve import codebooks as cb
from effdl.solve.clusters import cluster, distinct
from effdl.solve.entropy import code_lengths, entropy_bits


def spread(x: np.ndarray, mass: np.ndarray, centres: np.ndarray) -> float:
    return float((mass * np.square(x[:, None] - centres).min(1)).sum())


def least(x: np.ndarray, mass: np.ndarray, k: int) -> float:
    """The error of the best of all ways to cut sorted numbers into at most k runs."""
    n, best = len(x), np.inf
    for parts in range(min(k, n)):
        for cut in itertools.combinations(range(1, n), parts):
            runs = itertools.pairwise((0, *cut, n))
            centres = np.array([np.average(x[a:b], weights=mass[a:b]) for a, b in runs])
            best = min(best, spread(x, mass, centres))
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_clusters_are_the_best_there_are(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    x, mass = np.sort(rng.standard_normal(n)) + 100, rng.random(n) + 0.01
    centres = cluster(x, mass, k)
    assert len(centres) == min(n, k)
    assert spread(x, mass, centres) == pytest.approx(least(x, mass, k), abs=1e-9)


def test_bins_keep_mass_and_mean() -> None:
    rng = np.random.default_rng(0)
    x, h = rng.standard_normal(5000), rng.random(5000)
    places, mass = distinct(x, h, 100)
    assert len(places) <= 100
    assert np.all(np.diff(places) > 0)
    assert mass.sum() == pytest.approx(h.sum())
    assert places @ mass == pytest.approx(x @ h)
    few, mass = distinct(np.array([3.0, 1.0, 3.0]), np.array([1.0, 2.0, 5.0]))
    np.testing.assert_allclose(few, [1, 3])
    np.testing.assert_allclose(mass, [2, 6])


def problem(
    seed: int = 0, n: int = 12, inputs: int = 24, sets: int = 1, pruned: float = 0.0
) -> cb.Problem:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((sets, 200, inputs)) @ rng.standard_normal((inputs, inputs))
    w = rng.standard_normal((sets, n, inputs))
    w[rng.random(w.shape) < pruned] = 0
    moments = np.einsum("srk,srl->skl", x, x) / 200
    return cb.Problem(w, moments, w == 0 if pruned else None)


def started(p: cb.Problem, k: int, groups: int = 1, **zero: bool) -> tuple[np.ndarray, cb.Codes]:
    flat = p.weight.reshape(-1, p.weight.shape[2])
    books = cb.codebooks(flat, np.ones_like(flat), k, groups, **zero)
    middle = (books[:, 1:] + books[:, :-1]) / 2
    rows = len(flat) // groups
    codes = [np.searchsorted(middle[n // rows], row) for n, row in enumerate(flat)]
    return books, np.array(codes, np.uint8)


@pytest.mark.parametrize(("sets", "groups"), [(1, 1), (1, 4), (3, 1), (3, 2), (2, 24)])
def test_each_step_lowers_the_error(sets: int, groups: int) -> None:
    p = problem(sets=sets)
    books, near = started(p, 4, groups)
    fed = cb.assign(p, books)
    assert p.error(fed, books) < p.error(near, books)
    for start in (near, fed):
        down = cb.descend(p, start, books)
        assert p.error(down, books) <= p.error(start, books) * (1 + 1e-6)
        codes, fitted = cb.refit(p, down, books)
        assert p.error(codes, fitted) <= p.error(down, books) * (1 + 1e-6)
        assert np.all(np.diff(fitted, axis=1) >= 0)


def test_error_is_that_of_the_outputs() -> None:
    p = problem(sets=2)
    books, codes = started(p, 4)
    change = cb.decode(codes, books).reshape(p.weight.shape) - p.weight
    want = sum(np.trace(d @ h @ d.T) for d, h in zip(change, p.moments, strict=True))
    assert p.error(codes, books) == pytest.approx(want, rel=1e-5)


def test_descent_ends_where_no_single_code_helps() -> None:
    p = problem(n=3, inputs=6)
    books, codes = started(p, 4)
    codes = cb.descend(p, codes, books, sweeps=100)
    error = p.error(codes, books)
    for n, k, c in itertools.product(range(3), range(6), range(4)):
        other = codes.copy()
        other[n, k] = c
        assert p.error(other, books) >= error * (1 - 1e-6)


def test_refit_solves_the_normal_equations() -> None:
    p = problem(n=5, inputs=8)
    books, codes = started(p, 4)
    _, fitted = cb.refit(p, codes, books)
    h = p.moments[0]
    matrix, right = np.zeros((4, 4)), np.zeros(4)
    for row, w in zip(codes, p.weight[0], strict=True):
        a = np.eye(4)[row]
        matrix += a.T @ h @ a
        right += a.T @ h @ w
    np.testing.assert_allclose(fitted[0], np.sort(np.linalg.solve(matrix, right)), rtol=2e-3)


def test_zeros_stay_and_have_an_entry() -> None:
    p = problem(pruned=0.5)
    books, _ = started(p, 4, zero=True, apart=True)
    assert 0.0 in books[0]
    found = cb.solve(p, books, zero=True)
    values = cb.decode(found.codes, found.books)
    assert np.all(values[p.weight[0] == 0] == 0)
    assert np.count_nonzero(values) > 0.5 * np.count_nonzero(p.weight)


def test_without_moments_the_nearest_is_taken() -> None:
    p = cb.Problem(problem().weight)
    books, near = started(p, 8)
    np.testing.assert_array_equal(cb.assign(p, books), near)
    found = cb.solve(p, books)
    assert found.error <= p.error(near, books) * (1 + 1e-6)


@pytest.mark.parametrize("seen", [True, False])
def test_a_price_on_bits_buys_entropy(seen: bool) -> None:
    p = problem(n=64, inputs=48)
    p = p if seen else cb.Problem(p.weight)
    books, _ = started(p, 16, zero=True)
    plain = cb.solve(p, books, zero=True)
    unit = plain.error / p.weight.size
    bits = [plain.bits]
    for price in (1, 4, 16):
        cheap = cb.solve(p, books, zero=True, bit_price=price * unit, start=plain.codes)
        bits.append(cheap.bits)
        assert cheap.error + price * unit * cheap.bits <= plain.error + price * unit * plain.bits
    assert np.all(np.diff(bits) < 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_the_cells_of_priced_entries(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    books = np.sort(rng.integers(-4, 5, k)).astype(float)  # some are equal
    prices = rng.random(k) * rng.choice([0.1, 30])
    kept, starts = cb._cells(books, prices)
    x = rng.uniform(-6, 6, 50)
    codes = np.asarray(kept)[np.searchsorted(starts, x)]
    cost = np.square(x[:, None] - books) + prices
    np.testing.assert_allclose(cost[np.arange(50), codes], cost.min(1))


def test_entropy() -> None:
    assert entropy_bits(np.array([4, 4, 0])) == pytest.approx(8)
    assert entropy_bits(np.array([9])) == 0
    assert entropy_bits(np.array([])) == 0
    counts = np.array([7, 1, 4, 4])
    assert counts @ code_lengths(counts) == pytest.approx(entropy_bits(counts))
