"""Which weights become zero, and how the others make up for it, by second moments of the inputs.

A layer of N outputs and K inputs has the weights W [N, K] and the second moments H = mean of x x^T [K, K].
Weights V in its place change its outputs by tr((V - W) H (V - W)^T). Columns are swept once (SparseGPT,
Frantar and Alistarh 2023): what becomes zero is chosen a panel of columns at a time, and the columns still to
come are moved to where they make up for it best. Zeros of W stay zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.solve.blocks import inverse_factor
from effdl.solve.sparse_pattern import Blocks, Pattern
from effdl.solve.sparsity import Mask, find_cut, keep_above

Float = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
_DAMPING = 0.01
"""Share of the mean second moment that is added to all, so that the inverse exists."""
_PANEL = 128


@dataclass(frozen=True)
class Curvature:
    """The second moments of a layer's inputs, made ready for sweeps.

    Args:
        second: [K, K], damped; inputs that are always zero have 1 on the diagonal.
        factor: [K, K], the upper Cholesky factor of the inverse of ``second``.
        dead: [K], the inputs that are always zero.
    """

    second: Doubles
    factor: Doubles
    dead: Mask

    @property
    def inverse_diagonal(self) -> Doubles:
        """[K], the diagonal of the inverse of ``second``."""
        found: Doubles = np.einsum("ij,ij->j", self.factor, self.factor)
        return found


def curvature(second: Float, damping: float = _DAMPING) -> Curvature:
    """Return second moments [K, K] made ready: damped by a share of their mean, and factored."""
    h = np.array(second, np.float64)
    dead = np.diag(h) <= 0
    h[dead, :] = 0.0
    h[:, dead] = 0.0
    level = float(np.mean(np.diag(h))) or 1.0
    h[np.diag_indices(len(h))] += damping * level
    return Curvature(h, inverse_factor(h), dead)


def saliency(weight: Float, known: Curvature) -> Doubles:
    """Return w^2 / [H^-1]_jj: the error of losing one weight when all others make up for it, [N, K].

    Source: Hassibi and Stork 1993, "Second order derivatives for network pruning", equation 5, halved there.
    """
    scores: Doubles = np.square(np.asarray(weight, np.float64)) / known.inverse_diagonal
    scores[:, known.dead] = 0.0
    return scores


def wanda_scores(weight: Float, second: Float) -> Doubles:
    """Return |w| times the root mean square of its input, [N, K].

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", equation 1.
    """
    scores: Doubles = np.abs(np.asarray(weight, np.float64)) * np.sqrt(np.diag(second))
    return scores


def sweep(weight: Float, known: Curvature, pattern: Pattern, counts: Sequence[int]) -> Doubles:
    """Return the weights with zeros, the others moved to make up for them, [N, K].

    Args:
        weight: [N, K].
        known: of the inputs.
        pattern: what becomes zero together.
        counts: how many blocks of each panel (see ``panels``) become zero; unused for ``Groups``.

    Source: Frantar and Alistarh 2023, "SparseGPT", algorithm 1.
    """
    work = np.array(
        weight.T, np.float64, order="C"
    )  # a row per input: what is worked on lies together
    work[known.dead] = 0.0
    zero = work == 0
    upper = known.factor
    for (start, end), count in zip(panels(pattern, len(work)), counts, strict=True):
        part = work[start:end]
        if isinstance(pattern, Blocks):
            drop = _blocks_to_drop(
                part, zero[start:end], upper[start:end, start:end], pattern, count
            )
            groups = {}
        else:
            drop = zero[start:end].copy()
            groups = {
                a - start: (b - start, n)
                for a, b, n in pattern.bounds(len(work))
                if start <= a < end
            }
        errors = np.zeros_like(part)
        for k in range(end - start):
            if k in groups:
                last, some = groups[k]
                _drop_in_group(
                    part[k:last], drop[k:last], np.diag(upper)[start + k : start + last], some
                )
            here = drop[k]
            if here.any():
                error = np.where(here, part[k], 0.0) / upper[start + k, start + k]
                part[k + 1 :] -= np.multiply.outer(upper[start + k, start + k + 1 : end], error)
                errors[k] = error
                part[k, here] = 0.0
        work[end:] -= upper[start:end, end:].T @ errors
    work[zero] = 0.0
    return np.ascontiguousarray(work.T)


def panels(pattern: Pattern, inputs: int) -> list[tuple[int, int]]:
    """Return start and end of the panels that ``sweep`` works on: whole blocks, or whole groups."""
    if isinstance(pattern, Blocks):
        step = max(_PANEL // pattern.width, 1) * pattern.width
        return [(a, min(a + step, inputs)) for a in range(0, inputs, step)]
    starts = [0]
    for start, end, _ in pattern.bounds(inputs):
        if end - starts[-1] > _PANEL and start > starts[-1]:
            starts.append(start)
    return list(zip(starts, [*starts[1:], inputs], strict=True))


def _blocks_to_drop(part: Doubles, zero: Mask, upper: Doubles, pattern: Blocks, count: int) -> Mask:
    scores = np.square(part) / np.square(np.diag(upper))[:, None]
    scores[zero] = 0.0
    return replace(pattern, outputs=part.shape[1]).drop(scores.T, count).T | zero


def _drop_in_group(part: Doubles, drop: Mask, diagonal: Doubles, count: int) -> None:
    """Mark the ``count`` weights of every output whose loss costs least, zeros first."""
    scores = np.where(drop, -1.0, np.square(part) / np.square(diagonal)[:, None])
    order = np.argsort(scores, axis=0, kind="stable")[:count]
    np.put_along_axis(drop, order, True, axis=0)


def quotas(scores: Sequence[Doubles], pattern: Blocks, count: int) -> list[list[int]]:
    """Return how many blocks of each panel of each matrix are among the ``count`` lowest of all.

    Args:
        scores: of the weights, [N, K] each.
        pattern: whose blocks are counted; its outputs are those of all matrices.
        count: of the blocks of all matrices that become zero.
    """
    parts = [replace(pattern, outputs=len(s)) for s in scores]
    means = [part.means(s) for part, s in zip(parts, scores, strict=True)]
    cut = find_cut(lambda: means, count)
    found = []
    for s, mean in zip(scores, means, strict=True):
        keep, cut = keep_above(mean, cut)
        edges = [a // pattern.width for a, _ in panels(pattern, s.shape[1])]
        found.append([int(n) for n in np.add.reduceat((~keep).sum(0), edges)])
    return found
