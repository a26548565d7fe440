from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdl.data.metrics import LOWER_IS_BETTER, METRICS, agreement, mse, spearman, top1, top5
from effdl.errors import DataError


def test_registry() -> None:
    assert set(METRICS) == {"top1", "top5", "mse", "spearman", "agreement"}
    assert set(METRICS) >= LOWER_IS_BETTER == {"mse"}


def test_top1_and_top5() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((50, 10)).astype(np.float32)
    labels = rng.integers(0, 10, 50)
    assert top1(scores, labels) == np.mean(
        [row.argmax() == y for row, y in zip(scores, labels, strict=True)]
    )
    ranked = [
        y in sorted(range(10), key=lambda k: -row[k])[:5]
        for row, y in zip(scores, labels, strict=True)
    ]
    assert top5(scores, labels) == np.mean(ranked)
    assert top1(scores, scores.argmax(1)) == 1.0
    assert top1(scores[:, None, :], labels[:, None]) == top1(scores, labels)
    assert top5(scores[:, :3], np.zeros(50, int)) == 1.0


def test_top1_per_pixel_and_with_nan() -> None:
    scores = np.zeros((2, 3, 2, 2))
    scores[:, 1] = 1
    labels = np.ones((2, 2, 2), int)
    labels[0, 0, 0] = 2
    assert top1(scores, labels) == 7 / 8
    broken = np.array([[np.nan, 1.0], [0.0, 1.0]])
    assert top1(broken, np.array([1, 1])) == 0.5


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (np.zeros((3, 2)), np.zeros(4, int)),
        (np.zeros(3), np.zeros(3, int)),
        (np.zeros((3, 2)), np.zeros(3)),
        (np.zeros((3, 2)), np.array([0, 1, 2])),
        (np.zeros((3, 2)), np.array([0, -1, 1])),
        (np.zeros((0, 2)), np.zeros(0, int)),
    ],
)
def test_top1_refuses(scores: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(DataError):
        top1(scores, labels)


def test_mse() -> None:
    assert mse(np.array([[1.0], [3.0]]), np.array([0.0, 1.0])) == 2.5
    with pytest.raises(DataError):
        mse(np.zeros(3), np.zeros(4))


def brute_spearman(a: list[int], b: list[int]) -> float:
    def ranks(x: list[int]) -> list[float]:
        return [sum(v < u for v in x) + (sum(v == u for v in x) + 1) / 2 for u in x]

    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True))
    bottom = math.sqrt(sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))
    return top / bottom if bottom else math.nan


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_spearman_is_pearson_of_average_ranks(pairs: list[tuple[int, int]]) -> None:
    a, b = ([p[k] for p in pairs] for k in (0, 1))
    assert spearman(np.array(a), np.array(b)) == pytest.approx(brute_spearman(a, b), nan_ok=True)


def test_spearman_of_orders() -> None:
    x = np.array([1.0, 5.0, 2.0, 9.0])
    assert spearman(x, x**3) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    with pytest.raises(DataError):
        spearman(np.zeros((3, 2)), np.zeros((3, 2)))


def test_agreement() -> None:
    a = np.array([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [np.nan, 1.0]])
    b = np.array([[0.2, 0.8], [0.1, 0.9], [0.9, 0.1], [0.0, 1.0]])
    assert agreement(a, b) == 0.5
    with pytest.raises(DataError):
        agreement(a, b[:2])
    with pytest.raises(DataError):
        agreement(a[0], b[0])
