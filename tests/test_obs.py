"""Which inputs of layers can go, against removal and least squares done by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from effdl.solve.obs import Reader, removal, weight_after


def reader(seed: int, channels: int = 8, taps: int = 3, outputs: int = 5, free: int = 0) -> Reader:
    """A layer whose inputs are correlated; ``free`` more columns belong to no channel."""
    rng = np.random.default_rng(seed)
    width = channels * taps + free
    rows = rng.standard_normal((400, width)) @ rng.standard_normal((width, width))
    columns = rng.permutation(width)[: channels * taps].reshape(channels, taps)
    return Reader(rng.standard_normal((outputs, width)), rows.T @ rows / 400, columns)


def error(one: Reader, kept: np.ndarray) -> float:
    """The relative error of the outputs when only these columns stay, by least squares."""
    h, w = one.moments, one.weight
    best = np.linalg.solve(h[np.ix_(kept, kept)], (w @ h[:, kept]).T).T
    change = w.copy()
    change[:, kept] -= best
    return float(np.sum((change @ h) * change) / np.sum((w @ h) * w))


def columns_left(one: Reader, gone: np.ndarray) -> np.ndarray:
    taken = one.columns[gone].reshape(-1)
    return np.setdiff1d(np.arange(one.weight.shape[1]), taken)


@pytest.mark.parametrize("free", [0, 4])
@pytest.mark.parametrize("seed", range(3))
def test_errors_are_those_of_the_best_weights(seed: int, free: int) -> None:
    readers = [reader(seed, free=free), reader(seed + 10, taps=1, outputs=2)]
    found = removal(readers, damping=0.0)
    assert sorted(found.order) == list(range(8))
    assert (np.diff(found.errors) >= -1e-9).all()
    for count in range(1, 8):
        want = sum(error(r, columns_left(r, found.order[:count])) for r in readers)
        assert found.errors[count] == pytest.approx(want, rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_to_go_is_the_cheapest(seed: int) -> None:
    one = reader(seed)
    alone = [error(one, columns_left(one, np.array([c]))) for c in range(8)]
    assert removal([one], damping=0.0).order[0] == int(np.argmin(alone))


def test_greedy_is_close_to_the_best_pairs() -> None:
    worse = []
    for seed in range(8):
        one = reader(seed)
        every = itertools.combinations(range(8), 3)
        best = min(error(one, columns_left(one, np.array(c))) for c in every)
        worse.append(removal([one], damping=0.0).errors[3] / best)
    assert np.median(worse) < 1.2


def test_the_weight_left_is_least_squares() -> None:
    one = reader(0)
    kept = columns_left(one, np.array([1, 5]))
    made = weight_after(one, kept, damping=0.0)
    change = one.weight.copy()
    change[:, kept] -= made
    own = float(np.sum((change @ one.moments) * change))
    total = float(np.sum((one.weight @ one.moments) * one.weight))
    assert own / total == pytest.approx(error(one, kept), rel=1e-8)


def test_inputs_that_are_always_zero_go_first_and_cost_nothing() -> None:
    one = reader(3)
    moments = one.moments.copy()
    dead = one.columns[4]
    moments[dead], moments[:, dead] = 0.0, 0.0
    found = removal([Reader(one.weight, moments, one.columns)])
    assert found.order[0] == 4
    assert found.errors[1] == pytest.approx(0.0, abs=1e-6)


def test_many_channels_in_steps() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((600, 200)) @ rng.standard_normal((200, 200))
    one = Reader(rng.standard_normal((20, 200)), rows.T @ rows / 600, np.arange(200)[:, None])
    found = removal([one])
    random = rng.permutation(200)[:100]
    assert error(one, columns_left(one, found.order[:100])) < 0.8 * error(
        one, columns_left(one, random)
    )
