import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effdl.solve import sparsity

floats = st.floats(-4, 4, width=32)
arrays = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=floats
)
matrices = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=floats
)


def dropped_by_sorting(scores: np.ndarray, count: int) -> set[int]:
    """Indices of the ``count`` smallest, first ones among equals, by plain sorting."""
    flat = scores.ravel().tolist()
    return set(sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count])


@given(arrays, st.floats(0, 0.99))
def test_unstructured_drops_exactly_the_smallest(w: np.ndarray, share: float) -> None:
    keep = sparsity.unstructured_mask(w, share)
    count = round(share * w.size)
    assert keep.shape == w.shape
    assert set(np.flatnonzero(~keep)) == dropped_by_sorting(np.abs(w), count)


@given(arrays, st.floats(0, 0.99))
def test_unstructured_again_zeroes_nothing_more(w: np.ndarray, share: float) -> None:
    pruned = np.where(sparsity.unstructured_mask(w, share), w, 0)
    again = np.where(sparsity.unstructured_mask(pruned, share), pruned, 0)
    np.testing.assert_array_equal(again, pruned)


@given(st.lists(arrays, min_size=1, max_size=4), st.floats(0, 1))
def test_cut_over_many_arrays_is_that_of_their_concatenation(
    many: list[np.ndarray], share: float
) -> None:
    scores = [sparsity.magnitudes(w) for w in many]
    whole = np.concatenate([s.ravel() for s in scores])
    count = round(share * whole.size)
    cut = sparsity.find_cut(lambda: scores, count)
    kept = []
    for s in scores:
        keep, cut = sparsity.keep_above(s, cut)
        kept.append(keep.ravel())
    assert set(np.flatnonzero(~np.concatenate(kept))) == dropped_by_sorting(whole, count)


def test_cut_is_found_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity, "_CHUNK", 7)
    w = np.random.default_rng(0).standard_normal((13, 11)).astype(np.float32)
    keep = sparsity.unstructured_mask(w, 0.4)
    assert set(np.flatnonzero(~keep)) == dropped_by_sorting(np.abs(w), round(0.4 * w.size))
    n_m = sparsity.n_m_mask(w, 2, 4)
    monkeypatch.undo()
    np.testing.assert_array_equal(n_m, sparsity.n_m_mask(w, 2, 4))


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="4 of 3"):
        sparsity.find_cut(lambda: [np.ones(3, np.float32)], 4)


def test_doubles_below_single_precision_are_not_zero() -> None:
    w = np.array([1e-300, 0.0, 1.0, 1e300])
    assert sparsity.magnitudes(w)[0] > 0
    np.testing.assert_array_equal(sparsity.unstructured_mask(w, 0.25), [True, False, True, True])


def test_nan_and_infinity_are_kept() -> None:
    w = np.array([np.nan, 1.0, -np.inf, 0.5], np.float32)
    np.testing.assert_array_equal(sparsity.unstructured_mask(w, 0.5), [True, False, True, False])
    np.testing.assert_array_equal(sparsity.n_m_mask(w, 2, 4), [True, False, True, False])


@given(arrays, st.integers(1, 6).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))))
def test_n_m_keeps_the_best_of_every_group(w: np.ndarray, n_m: tuple[int, int]) -> None:
    n, m = n_m
    keep = sparsity.n_m_mask(w, n, m)
    for row, mask in zip(w.reshape(-1, w.shape[-1]), keep.reshape(-1, w.shape[-1]), strict=True):
        for i in range(0, len(row), m):
            group, kept = np.abs(row[i : i + m]).astype(np.float64), mask[i : i + m]
            count = math.ceil(len(group) * n / m)
            assert kept.sum() == count
            best = max(sum(c) for c in itertools.combinations(group.tolist(), count))
            assert group[kept].sum() == pytest.approx(best)
    pruned = np.where(keep, w, 0)
    np.testing.assert_array_equal(np.where(sparsity.n_m_mask(pruned, n, m), pruned, 0), pruned)


@given(matrices, st.integers(1, 4), st.integers(1, 4), st.sampled_from(["l1", "l2"]))
def test_block_scores(w: np.ndarray, bh: int, bw: int, norm: str) -> None:
    got = sparsity.block_scores(w, (bh, bw), norm)  # type: ignore[arg-type]
    for i, j in itertools.product(range(got.shape[0]), range(got.shape[1])):
        part = w[i * bh : (i + 1) * bh, j * bw : (j + 1) * bw].astype(np.float64)
        want = np.abs(part).mean() if norm == "l1" else np.sqrt((part**2).mean())
        assert got[i, j] == pytest.approx(want, rel=1e-6)


@given(matrices, st.integers(1, 4), st.integers(1, 4), st.floats(0, 0.99))
def test_block_mask_drops_whole_blocks(w: np.ndarray, bh: int, bw: int, share: float) -> None:
    keep = sparsity.block_mask(w, (bh, bw), share)
    scores = sparsity.block_scores(w, (bh, bw))
    dropped = set()
    for k, (i, j) in enumerate(itertools.product(range(scores.shape[0]), range(scores.shape[1]))):
        part = keep[i * bh : (i + 1) * bh, j * bw : (j + 1) * bw]
        assert part.all() or not part.any()
        if not part.any():
            dropped.add(k)
    assert dropped == dropped_by_sorting(scores, round(share * scores.size))
    pruned = np.where(keep, w, 0)
    np.testing.assert_array_equal(
        np.where(sparsity.block_mask(pruned, (bh, bw), share), pruned, 0), pruned
    )
