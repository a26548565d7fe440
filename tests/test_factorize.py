import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdl.solve import factorize
from effdl.solve.factorize import Svd, leading_svd, rank_for_ratio, round_rank


def with_spectrum(rows: int, columns: int, s: np.ndarray, seed: int = 0) -> np.ndarray:
    """A matrix with the singular values ``s``."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((rows, len(s))))
    v, _ = np.linalg.qr(rng.standard_normal((columns, len(s))))
    return (u * s) @ v.T


def gram(w: np.ndarray, rank: int, seed: int = 0) -> Svd:
    return factorize._from_gram(w, rank, float(np.vdot(w, w)))


def sketch(w: np.ndarray, rank: int, seed: int = 0) -> Svd:
    return factorize._sketched(w, rank, float(np.vdot(w, w)), seed)


@pytest.mark.parametrize("method", [leading_svd, gram])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (1, 9), (9, 1)])
def test_against_lapack(method: object, shape: tuple[int, int]) -> None:
    w = np.random.default_rng(1).standard_normal(shape)
    svd = method(w, min(shape))  # type: ignore[operator]
    want = np.linalg.svd(w, compute_uv=False)
    np.testing.assert_allclose(svd.s, want, rtol=1e-9)
    np.testing.assert_allclose((svd.u * svd.s) @ svd.vt, w, atol=1e-12)
    np.testing.assert_allclose(svd.u.T @ svd.u, np.eye(svd.rank), atol=1e-12)
    np.testing.assert_allclose(svd.vt @ svd.vt.T, np.eye(svd.rank), atol=1e-9)


@pytest.mark.parametrize("method", [leading_svd, gram, sketch])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_error_is_that_of_eckart_and_young(
    method: object, shape: tuple[int, int], rank: int
) -> None:
    s = 0.8 ** np.arange(50)
    w = with_spectrum(*shape, s)
    svd = method(w, rank)  # type: ignore[operator]
    left, right = svd.factors(rank)
    assert left.shape == (shape[0], rank)
    assert right.shape == (rank, shape[1])
    actual = np.linalg.norm(w - left @ right) / np.linalg.norm(w)
    best = math.sqrt(float(np.sum(s[rank:] ** 2) / np.sum(s**2)))
    assert svd.error(rank) == pytest.approx(actual, rel=1e-9, abs=1e-12)
    assert actual == pytest.approx(best, rel=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1), rtol=1e-9
    )


def test_no_other_matrix_of_that_rank_is_nearer() -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((6, 5))
    svd = leading_svd(w, 5)
    left, right = svd.factors(2)
    best = np.linalg.norm(w - left @ right)
    for _ in range(200):  # alternating least squares from random starts, then random steps
        a = left + 0.1 * rng.standard_normal(left.shape)
        b = np.linalg.lstsq(a, w, rcond=None)[0]
        assert np.linalg.norm(w - a @ b) >= best - 1e-12


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=12),
    st.floats(0.01, 1.0),
)
def test_rank_for_energy_by_counting(values: list[float], share: float) -> None:
    s = np.sort(np.array(values))[::-1]
    w = np.diag(s)
    got = leading_svd(w, len(s)).rank_for_energy(share)
    squares = (s**2).tolist()
    want = next(
        r
        for r in range(1, len(s) + 1)
        if math.fsum(squares[:r]) >= share * math.fsum(squares) * (1 - 1e-9)
    )
    assert got is not None
    assert got == want or math.isclose(
        math.fsum(squares[: min(got, want)]), share * math.fsum(squares), rel_tol=1e-6
    )


def test_rank_that_is_not_reached_is_none() -> None:
    w = np.eye(10)
    assert leading_svd(w, 4).rank_for_energy(0.5) is None
    assert leading_svd(w, 5).rank_for_energy(0.5) == 5


def test_zero_and_rank_deficient_matrices() -> None:
    zero = leading_svd(np.zeros((4, 6)), 4)
    assert zero.rank_for_energy(0.9) == 1
    assert zero.error(1) == 0
    left, right = zero.factors(1)
    assert not (left @ right).any()
    w = np.outer(np.arange(1.0, 9.0), np.arange(1.0, 5.0))
    for svd in (leading_svd(w, 4), gram(w, 4), sketch(w, 4)):
        assert svd.rank_for_energy(1 - 1e-9) == 1
        left, right = svd.factors(4)
        assert np.isfinite(left).all()
        np.testing.assert_allclose(left @ right, w, atol=1e-6)


def test_which_method_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorize, "EXACT_SIDE", 8)
    monkeypatch.setattr(factorize, "GRAM_SIDE", 16)
    used: list[str] = []
    real_gram, real_sketch = factorize._from_gram, factorize._sketched
    monkeypatch.setattr(factorize, "_from_gram", lambda *a: (used.append("gram"), real_gram(*a))[1])
    monkeypatch.setattr(
        factorize, "_sketched", lambda *a: (used.append("sketch"), real_sketch(*a))[1]
    )
    steep, flat = with_spectrum(80, 80, 0.1 ** np.arange(9.0)), np.eye(80)
    leading_svd(np.eye(8), 4)
    assert used == []
    leading_svd(np.eye(12), 4)
    assert used == ["gram"]
    used.clear()
    assert leading_svd(steep, 40, energy=0.99).rank_for_energy(0.99) == 1
    assert used == ["sketch"]
    used.clear()
    assert leading_svd(flat, 60, energy=0.5).rank_for_energy(0.5) == 40
    assert used == ["sketch", "gram"]
    used.clear()
    leading_svd(flat, 5)
    leading_svd(flat, 50)
    assert used == ["sketch", "gram"]


def test_single_precision_input_is_computed_in_double() -> None:
    w = with_spectrum(600, 700, 0.9 ** np.arange(600.0)).astype(np.float32)  # the Gram path
    svd = leading_svd(w, 600)
    want = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(svd.s[:100], want[:100], rtol=1e-6)
    assert svd.rank_for_energy(0.999) == leading_svd(np.diag(want), 600).rank_for_energy(0.999)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 0.95))
def test_rank_for_ratio(rows: int, columns: int, ratio: float) -> None:
    rank = rank_for_ratio(rows * columns, rows + columns, ratio)
    allowed = ratio * rows * columns * (1 + 1e-6) + 1e-6
    assert rank * (rows + columns) <= allowed
    assert (rank + 1) * (rows + columns) > ratio * rows * columns


@pytest.mark.parametrize(
    ("rank", "up", "want"),
    [
        (1, True, 8),
        (8, True, 8),
        (9, True, 16),
        (7, False, 0),
        (8, False, 8),
        (12, False, 8),
        (13, False, 16),
        (23, False, 24),
    ],
)
def test_round_rank(rank: int, up: bool, want: int) -> None:
    assert round_rank(rank, 8, up=up) == want
