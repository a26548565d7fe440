"""Which inputs of layers can go: the optimal brain surgeon for blocks of columns.

A layer computes W x. With the second moments H of x, taking away the columns J of W and letting the others
make up for it costs, at the outputs, tr(W_J inv(P_JJ) W_J^T) with P = inv(H), and the others become
W - W_J inv(P_JJ) P_J (Hassibi and Stork 1993; for blocks: Frantar and Alistarh 2022, "Optimal Brain
Compression", equation 7; Kurtic et al. 2023, "ZipLM").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
DAMPING = 1e-3
"""Share of the mean second moment that is added to all, so that the inverse exists."""
_STEPS = 12
"""In so many steps half of the channels go; those of one step are chosen together."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels.

    Args:
        weight: [N, K].
        moments: [K, K], of its inputs: the covariance where a bias can take the mean, else x x^T.
        columns: [C, J], the columns that belong to each of the C channels.
    """

    weight: Float
    moments: Float
    columns: Ints


@dataclass(frozen=True)
class Removal:
    """Channels in the order in which they go.

    Args:
        order: [C], channel numbers, the first one to go first.
        errors: [C + 1], relative squared error of the readers' outputs, summed over readers, after so many
            channels are gone and the others have made up for them; not falling.
    """

    order: Ints
    errors: Float


def removal(readers: Sequence[Reader], *, damping: float = DAMPING) -> Removal:
    """Return the order in which channels are removed greedily, with the error at each count.

    Args:
        readers: all layers that read the channels; at least one.
        damping: see ``DAMPING``.
    """
    count = len(readers[0].columns)
    left = np.arange(count)
    order, errors = list[int](), [0.0]
    while len(left) > 1:
        states = [_State(r, left, damping) for r in readers]
        errors = _at_least(errors, sum(s.error for s in states))
        half = len(left) // 2
        for most in _parts(len(left) - half, _STEPS):
            scores = np.sum([s.scores(left) for s in states], axis=0)
            ranked = np.argsort(scores, kind="stable")[:most]
            before = errors[-1]
            after = before + sum(s.remove(left[ranked]) for s in states)
            share = np.cumsum(scores[ranked])
            share = share / share[-1] if share[-1] > 0 else np.arange(1, most + 1) / most
            errors += (before + (max(after, before) - before) * share).tolist()
            order += left[ranked].tolist()
            left = np.delete(left, ranked)
    last = max(errors[-1], float(len(readers)))
    return Removal(np.array([*order, *left], np.int64), np.array([*errors, last]))


def _parts(count: int, parts: int) -> list[int]:
    """Cut a count into so many parts of about the same size, fewer where it is small."""
    parts = min(count, parts)
    return [count * (k + 1) // parts - count * k // parts for k in range(parts)]


def _at_least(errors: list[float], exact: float) -> list[float]:
    """Replace the last error by an exact one; the sums before it were of single precision."""
    if len(errors) < 2:
        return errors
    return [*errors[:-1], max(exact, errors[-2])]


class _State:
    """A reader of the channels that are left: its weight, and the inverse of its moments.

    Exact at the start; then channels go one after the other in single precision, and what belongs to them
    stays where it is, unused.
    """

    def __init__(self, reader: Reader, channels: Ints, damping: float) -> None:
        kept = np.sort(reader.columns[channels].reshape(-1))
        always = np.setdiff1d(np.arange(reader.weight.shape[1]), reader.columns.reshape(-1))
        kept = np.sort(np.concatenate([kept, always]))
        moments = damped(reader.moments, damping)
        alive = np.where(np.diagonal(reader.moments) > 0, reader.weight, 0.0)
        target = alive @ moments
        energy = float(np.sum(target * alive)) or 1.0
        inverse = np.linalg.inv(moments[np.ix_(kept, kept)])
        weight = target[:, kept] @ inverse
        self.error = max(0.0, 1.0 - float(np.sum(weight * target[:, kept])) / energy)
        self._energy = energy
        self._weight = weight.astype(np.float32)
        self._inverse = inverse.astype(np.float32)
        places = np.full(reader.weight.shape[1], -1)
        places[kept] = np.arange(len(kept))
        self._columns = places[reader.columns]

    def scores(self, channels: Ints) -> Float:
        """Return the relative error that each channel's removal alone costs."""
        columns = self._columns[channels]
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]].astype(np.float64)
        parts = self._weight[:, columns].transpose(1, 2, 0).astype(np.float64)  # [C, J, N]
        found: Float = np.einsum("cjn,cjn->c", parts, _solve(blocks, parts)) / self._energy
        return np.maximum(found, 0.0)

    def remove(self, channels: Ints) -> float:
        """Take channels out and let the others make up for them; return the relative error it costs."""
        columns = self._columns[channels].reshape(-1)
        rows = self._inverse[columns]
        block = rows[:, columns].astype(np.float64)
        parts = self._weight[:, columns].astype(np.float64)
        solved = _solve(block, rows.astype(np.float64)).astype(np.float32)
        error = float(np.sum(parts * _solve(block, parts.T).T)) / self._energy
        self._weight -= self._weight[:, columns] @ solved
        self._inverse -= np.ascontiguousarray(rows.T) @ solved
        return max(error, 0.0)


def _solve(blocks: Float, right: Float) -> Float:
    """Solve positive definite systems, with a little more on the diagonal against rounding."""
    size = blocks.shape[-1]
    more = 1e-6 * np.trace(blocks, axis1=-2, axis2=-1) / size
    solved: Float = np.linalg.solve(blocks + more[..., None, None] * np.eye(size), right)
    return solved


def damped(moments: npt.NDArray[np.floating[Any]], damping: float) -> Float:
    """Return second moments with a share of their mean on the diagonal; inputs that are always 0 count 1."""
    made = np.array(moments, np.float64)
    diagonal = np.diagonal(made)
    mean = float(diagonal.mean()) or 1.0
    dead = diagonal <= 0
    made[np.diag_indices_from(made)] += np.where(dead, 1.0, damping * mean)
    return made


def weight_after(reader: Reader, kept: Ints, *, damping: float = DAMPING) -> Float:
    """Return the weight [N, kept columns] that is closest at the outputs when only ``kept`` columns stay."""
    moments = damped(reader.moments, damping)
    right = reader.weight @ moments[:, kept]
    found: Float = np.linalg.solve(moments[np.ix_(kept, kept)], right.T).T.astype(np.float64)
    return found
