"""Zeros by second moments, against brute force and least squares."""

import itertools

import numpy as np
import pytest

from effdl.solve.sparse_admm import admm, change, path, refit
from effdl.solve.sparse_obs import curvature, panels, quotas, saliency, sweep, wanda_scores
from effdl.solve.sparse_pattern import Blocks, Groups


def problem(outputs: int, inputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and second moments of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) / np.sqrt(np.arange(1, inputs + 1))
    rows = rng.standard_normal((8 * inputs, inputs)) @ mix
    return rng.standard_normal((outputs, inputs)), rows.T @ rows / len(rows)


def error(weight: np.ndarray, new: np.ndarray, second: np.ndarray) -> float:
    return change(weight[None], new[None], second[None])


def least_squares(weight: np.ndarray, kept: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The best weights on a support, row by row."""
    best = np.zeros_like(weight)
    for row, keep, out in zip(weight, kept, best, strict=True):
        out[keep] = np.linalg.solve(second[np.ix_(keep, keep)], second[keep] @ row)
    return best


def smallest(weight: np.ndarray, count: int) -> np.ndarray:
    return np.where(Blocks(len(weight)).drop(np.abs(weight), count), 0, weight)


def test_saliency_is_the_error_of_losing_one_weight() -> None:
    weight, second = problem(3, 7)
    found = saliency(weight, curvature(second, damping=0.0))
    for n, k in itertools.product(range(3), range(7)):
        kept = np.ones_like(weight, bool)
        kept[n, k] = False
        lost = weight - least_squares(weight, kept, second)
        assert found[n, k] == pytest.approx(np.einsum("nk,nk->", lost @ second, lost), rel=1e-9)


def test_a_sweep_of_one_column_is_the_best_answer_to_it() -> None:
    weight, second = problem(4, 6)
    weight[:, 1:] += 10 * np.sign(weight[:, 1:])  # so that the first column goes
    weight[:, 0] /= 100
    new = sweep(weight, curvature(second, damping=0.0), Blocks(4), [4])
    assert (new[:, 0] == 0).all()
    np.testing.assert_allclose(new, least_squares(weight, new != 0, second), rtol=1e-9)


def test_refit_is_least_squares_on_the_support() -> None:
    weight, second = problem(5, 12)
    start = smallest(weight, 36)
    new = refit(weight[None], start[None], second[None], steps=60, damping=0.0)[0]
    np.testing.assert_array_equal(new != 0, start != 0)
    np.testing.assert_allclose(new, least_squares(weight, start != 0, second), rtol=1e-5, atol=1e-7)


def test_refit_never_makes_it_worse_and_shrinks_towards_the_weights() -> None:
    weight, second = problem(6, 20)
    start = smallest(weight, 80)
    errors = [
        error(
            weight, refit(weight[None], start[None], second[None], steps=n, damping=0.0)[0], second
        )
        for n in range(8)
    ]
    assert errors[0] == error(weight, start, second)
    assert errors == sorted(errors, reverse=True)
    stiff = refit(weight[None], start[None], second[None], damping=1e6)[0]
    np.testing.assert_allclose(stiff, start, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_each_way_is_better_than_the_one_before(share: float, seed: int) -> None:
    weight, second = problem(24, 160, seed)
    count, blocks, known = round(share * weight.size), Blocks(24), curvature(second)
    swept = sweep(weight, known, blocks, quotas([saliency(weight, known)], blocks, count)[0])
    drawn = admm(weight[None], second[None], lambda s: blocks.drop(s, count))[0]
    ways = [
        smallest(weight, count),
        swept,
        refit(weight[None], swept[None], second[None])[0],
        drawn,
    ]
    assert all(int((w == 0).sum()) == count for w in ways)
    errors = [error(weight, w, second) for w in ways]
    assert errors == sorted(errors, reverse=True)


def test_admm_comes_near_the_best_of_all_supports() -> None:
    weight, second = problem(1, 10)
    drawn = admm(weight[None], second[None], lambda s: Blocks(1).drop(s, 6))[0]
    drawn = refit(weight[None], drawn[None], second[None], damping=0.0)[0]
    best, plain = np.inf, error(weight, smallest(weight, 6), second)
    for chosen in itertools.combinations(range(10), 4):
        kept = np.zeros((1, 10), bool)
        kept[0, list(chosen)] = True
        best = min(best, error(weight, least_squares(weight, kept, second), second))
    assert best <= error(weight, drawn, second) < best + 0.2 * (plain - best)


@pytest.mark.parametrize("way", ["sweep", "admm"])
def test_groups_keep_n_of_m(way: str) -> None:
    weight, second = problem(8, 140)
    groups = Groups(2, 4, 70)  # two runs of 17 groups and a rest of two, of which one stays
    if way == "sweep":
        new = sweep(weight, curvature(second), groups, [0] * len(panels(groups, 140)))
    else:
        new = admm(weight[None], second[None], groups.drop)[0]
    runs = (new != 0).reshape(8, 2, 70)
    assert (runs[..., :68].reshape(8, 2, 17, 4).sum(3) == 2).all()
    assert (runs[..., 68:].sum(2) == 1).all()
    plain = np.where(groups.drop(np.abs(weight)), 0, weight)
    assert error(weight, new, second) < 0.8 * error(weight, plain, second)


@pytest.mark.parametrize("way", ["sweep", "admm"])
def test_whole_blocks_become_zero(way: str) -> None:
    weight, second = problem(10, 33)
    blocks = Blocks(10, 4, 2)  # 3 x 17, the last ones cut off
    if way == "sweep":
        known = curvature(second)
        new = sweep(weight, known, blocks, quotas([saliency(weight, known)], blocks, 20)[0])
    else:
        new = admm(weight[None], second[None], lambda s: blocks.drop(s, 20))[0]
    means = blocks.means(np.abs(new))
    assert means.shape == (3, 17)
    assert int((means == 0).sum()) == 20
    assert int((new == 0).sum()) == int(blocks.spread(means == 0, new).sum())


@pytest.mark.parametrize("way", ["sweep", "admm", "refit"])
def test_zeros_stay_and_dead_inputs_do_no_harm(way: str) -> None:
    weight, second = problem(6, 30)
    weight[:, 3] = 0
    weight[2, 4:9] = 0
    second[5] = second[:, 5] = 0
    if way == "sweep":
        known = curvature(second)
        new = sweep(weight, known, Blocks(6), quotas([saliency(weight, known)], Blocks(6), 60)[0])
    elif way == "admm":
        new = admm(weight[None], second[None], lambda s: Blocks(6).drop(s, 60))[0]
    else:
        new = refit(weight[None], weight[None], second[None])[0]
    assert (new[weight == 0] == 0).all()
    assert np.isfinite(new).all()


def test_groups_of_outputs_share_the_zeros() -> None:
    """A group whose inputs are large keeps more, and every group has its own inputs."""
    first, second = problem(2, 9, 1), problem(2, 9, 2)
    weight, moments = np.stack([first[0], second[0]]), np.stack([100 * first[1], second[1]])
    blocks = Blocks(4)
    new = admm(weight, moments, lambda s: blocks.drop(s, 18))
    zeros = (new == 0).sum((1, 2))
    assert zeros.sum() == 18
    assert zeros[0] < zeros[1]
    counts = quotas(list(weight), blocks, 18)
    assert sum(map(sum, counts)) == 18


def test_the_path_grows_and_ends_near_the_single_solution() -> None:
    weight, second = problem(12, 60)
    counts = [round(s * weight.size) for s in (0.3, 0.5, 0.7, 0.9)]
    drops = [lambda s, n=n: Blocks(12).drop(s, n) for n in counts]
    errors = list(path(weight[None], second[None], drops))
    assert errors == sorted(errors)
    alone = error(weight, admm(weight[None], second[None], drops[-1])[0], second)
    assert errors[-1] < 1.5 * alone


def test_wanda_weighs_by_the_inputs() -> None:
    scores = wanda_scores(np.array([[1.0, -2.0]]), np.diag([9.0, 1.0]))
    np.testing.assert_allclose(scores, [[3, 2]])
