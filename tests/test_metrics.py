from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effdl.data.metrics import (
    LOWER_IS_BETTER,
    METRICS,
    agreement,
    classes,
    f1,
    metric_of,
    mse,
    psnr,
    spearman,
    top1,
    top5,
)
from effdl.errors import DataError, UsageError


def test_registry() -> None:
    assert set(METRICS) == {"top1", "top5", "f1", "mse", "psnr", "spearman", "agreement"}
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


def brute_f1(predicted: list[int], truth: list[int]) -> float:
    scores = []
    for c in sorted({*predicted, *truth}):
        tp = sum(p == c == t for p, t in zip(predicted, truth, strict=True))
        precision = tp / max(predicted.count(c), 1)
        recall = tp / max(truth.count(c), 1)
        scores.append(2 * precision * recall / (precision + recall) if tp else 0.0)
    return sum(scores) / len(scores)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20))
def test_f1_is_the_mean_over_the_classes_that_occur(pairs: list[tuple[int, int]]) -> None:
    predicted, truth = ([p[k] for p in pairs] for k in (0, 1))
    scores = np.eye(5)[predicted]
    assert f1(scores, np.array(truth)) == pytest.approx(brute_f1(predicted, truth))


def test_f1_of_one_number_per_sample() -> None:
    labels = np.array([0, 1, 1, 0])
    probability = np.array([[0.2], [0.9], [0.4], [0.1]])
    logit = np.array([-3.0, 2.0, -0.1, -1.0])
    want = brute_f1([0, 1, 0, 0], [0, 1, 1, 0])
    assert f1(probability, labels) == pytest.approx(want)
    assert f1(logit, labels) == pytest.approx(want)
    assert f1(np.array([np.nan, 1.0, -1.0, -1.0]), labels) < 1
    with pytest.raises(DataError, match="go from 0 to 2"):
        f1(logit, np.array([0, 1, 2, 0]))
    with pytest.raises(DataError, match="class numbers"):
        f1(logit, labels.astype(float))


def test_psnr() -> None:
    truth = np.zeros((2, 1, 4, 4), np.uint8)
    noisy = truth.astype(np.float32)
    noisy[0] += 25.5  # a tenth of the peak: 20 dB
    assert psnr(noisy, truth) == pytest.approx((20 + 100) / 2)
    assert psnr(np.full((1, 4), 0.1), np.zeros((1, 4))) == pytest.approx(20)
    assert psnr(np.full((1, 4), -0.8), np.full((1, 4), -1.0)) == pytest.approx(20)


def test_agreement_of_pixels_and_of_classes() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(2, 3, 4, 5))
    assert classes(scores).shape == (2, 4, 5)
    assert agreement(scores, scores.argmax(1)) == 1.0
    assert agreement(scores.transpose(0, 2, 3, 1), scores.transpose(0, 2, 3, 1)) == 1.0
    with pytest.raises(DataError, match="two classes or more"):
        classes(np.zeros((2, 1)))


def test_parts_make_the_whole() -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(30, 6)), rng.integers(0, 6, 30)
    for name in ("top1", "top5", "f1"):
        metric = metric_of(name, labels)
        parts = [slice(k, k + 7) for k in range(0, 30, 7)]
        if metric.samples is not None:
            value = np.concatenate([metric.samples(scores[p], labels[p]) for p in parts]).mean()
        else:
            assert metric.whole is not None
            kept = metric.final(np.concatenate([metric.keep(scores[p]) for p in parts]))
            value = metric.whole(kept, labels)
        assert value == pytest.approx(METRICS[name](scores, labels))
        assert metric.share
    assert not metric_of("mse").higher_is_better
    with pytest.raises(UsageError, match="unknown metric 'acc'") as e:
        metric_of("acc")
    assert "module:function" in e.value.hint
