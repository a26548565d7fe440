"""Weights that share a few values: codebooks, and which of their entries stands for each weight.

A matrix of N outputs and K inputs becomes codes [N, K] into codebooks [G, k]: rows are cut into G runs of
equal length, each with k values of its own, in ascending order. With second moments H of the inputs, a
change D of the weights costs tr(D H D^T) at the outputs (``solve/blocks.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.solve.blocks import inverse_factor
from effdl.solve.clusters import BINS, cluster, distinct
from effdl.solve.entropy import code_lengths, entropy_bits

Float = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]
_DAMPING = 0.01
"""Share of the mean second moment that is added to all, so that the inverse exists (GPTQ)."""
_PANEL = 128
_STEPS = 6
"""Of conjugate gradients in a refit, at most; each costs one product with H."""
_SMALL = 1e-4
"""Of the first residual's square: where conjugate gradients end."""


def codebooks(
    weight: Float,
    importance: Float,
    k: int,
    groups: int = 1,
    *,
    zero: bool = False,
    apart: bool = False,
) -> Doubles:
    """Return the best codebooks [groups, k], as float32 numbers, for errors that count by importance.

    Args:
        weight: [N, K].
        importance: [N, K] or [K]: how much the squared error of each counts.
        k: entries of a codebook, at least 2.
        groups: divides N.
        zero: the entry nearest to zero is made exactly zero.
        apart: as ``zero``, and the weights that are zero have that entry for themselves: the others share
            the rest.

    A group with fewer values than entries repeats its largest.
    """
    flat: Float = np.asarray(weight, np.float64)
    counts: Float = np.broadcast_to(np.asarray(importance, np.float64), weight.shape)
    rows = weight.shape[0] // groups
    bins = BINS if groups == 1 else max(512, 8 * k)
    books = np.empty((groups, k))
    for g in range(groups):
        run = slice(g * rows, (g + 1) * rows)
        part, count = flat[run], counts[run]
        if apart:
            count, part = count[part != 0], part[part != 0]
        centres = np.zeros(0)
        if part.size:
            centres = cluster(*distinct(part, count, bins), k - apart)
        if apart:
            centres = np.sort(np.append(centres, 0.0))
        elif zero:
            centres[np.argmin(np.abs(centres))] = 0.0
        books[g] = np.pad(centres, (0, k - len(centres)), mode="edge")
    return books.astype(np.float32).astype(np.float64)


def decode(codes: Codes, books: Float) -> Doubles:
    """Return the weights that codes [N, K] stand for."""
    return np.asarray(books[_group(codes, books)[:, None], codes], np.float64)


@dataclass(frozen=True)
class Problem:
    """Weights to be replaced by entries of codebooks, with what their errors cost.

    Args:
        weight: [sets, N, K]: the outputs of every set read inputs of their own.
        moments: [sets, K, K], symmetric and not negative; None: nothing is known of the inputs, all
            weights count alike.
        fixed: [sets, N, K], true where a weight is zero and stays it; None for nowhere.
    """

    weight: Doubles
    moments: Doubles | None = None
    fixed: npt.NDArray[np.bool_] | None = None

    @property
    def importance(self) -> Doubles:
        """[sets, 1, K]: the diagonals of the moments."""
        if self.moments is None:
            return np.ones((self.weight.shape[0], 1, self.weight.shape[2]))
        return np.diagonal(self.moments, axis1=1, axis2=2)[:, None, :]

    @cached_property
    def _single(self) -> npt.NDArray[np.float32] | None:
        return None if self.moments is None else self.moments.astype(np.float32)

    def times(self, change: Doubles) -> Float:
        """Return D H for changes D [sets, N, K]: half the slope of the error."""
        if self._single is None:
            return change
        # Single precision is enough: D is a small difference by itself, not that of large numbers.
        return np.asarray(np.matmul(change.astype(np.float32), self._single))

    def error(self, codes: Codes, books: Float) -> float:
        """Return the sum of tr(D H D^T) over the sets, of codes [sets * N, K]."""
        return self._quadratic(decode(codes, books).reshape(self.weight.shape) - self.weight)

    @cached_property
    def size(self) -> float:
        """The sum of tr(W H W^T): what errors are relative to."""
        return self._quadratic(self.weight)

    def _quadratic(self, change: Doubles) -> float:
        products = np.multiply(self.times(change), change, dtype=np.float64)
        return max(0.0, float(products.sum()))


class _Picker:
    """Chooses entries for one input of all outputs of one set."""

    def __init__(self, problem: Problem, books: Float, which: int, price: Float | None) -> None:
        outputs = problem.weight.shape[1]
        rows = problem.weight.shape[0] * outputs // len(books)
        group = (which * outputs + np.arange(outputs)) // rows
        self._alone = len(np.unique(group)) == 1
        self._books = books[group[:1]] if self._alone else books[group]
        self._row = np.zeros(outputs, np.int64) if self._alone else np.arange(outputs)
        self._middles = (self._books[0, 1:] + self._books[0, :-1]) / 2
        self._price = None
        self._cells: dict[int, tuple[npt.NDArray[np.intp], Doubles]] = {}
        if price is not None:
            self._price = price[group[:1]] if self._alone else price[group]
        self._fixed = problem.fixed[which].T if problem.fixed is not None else None
        self._zero = np.argmin(np.abs(self._books), axis=1)[self._row]

    def pick(self, wanted: Doubles, k: int, curvature: float) -> npt.NDArray[np.intp]:
        """Return the codes of least curvature * (wanted - entry)^2 + price for input ``k``.

        An input's curvature is the same each time.
        """
        if self._alone and self._price is None:
            codes = np.searchsorted(self._middles, wanted)
        elif self._alone and self._price is not None:
            if k not in self._cells:
                self._cells[k] = _cells(self._books[0], self._price[0] / curvature)
            kept, starts = self._cells[k]
            codes = kept[np.searchsorted(starts, wanted)]
        else:
            cost = np.square(wanted[:, None] - self._books)
            if self._price is not None:
                cost += self._price / curvature
            codes = np.argmin(cost, axis=1)
        return codes if self._fixed is None else np.where(self._fixed[k], self._zero, codes)

    def values(self, codes: npt.NDArray[np.intp]) -> Doubles:
        """Return the entries of codes."""
        found: Doubles = self._books[self._row, codes]
        return found


def _cells(books: Doubles, price: Float) -> tuple[npt.NDArray[np.intp], Doubles]:
    """Return which entries are ever of least (x - entry)^2 + price, and from where on each after the first.

    Without the x^2 that all share these are lines, and the entries, in ascending order, those of their
    lower envelope from left to right.
    """
    entries, prices = books.tolist(), price.tolist()
    kept, starts = [0], [-np.inf]
    for k in range(1, len(entries)):
        while kept:
            before = kept[-1]
            apart = entries[k] - entries[before]
            dearer = prices[k] - prices[before]
            if apart <= 0:
                start = np.inf if dearer >= 0 else -np.inf
            else:
                start = (entries[k] + entries[before] + dearer / apart) / 2
            if start > starts[-1]:
                break
            kept.pop()
            starts.pop()
        if not kept:
            start = -np.inf
        if start < np.inf:
            kept.append(k)
            starts.append(start)
    return np.array(kept), np.array(starts[1:])


def assign(problem: Problem, books: Float, price: Float | None = None) -> Codes:
    """Choose entries input by input, each time letting those still to come make up for the error.

    GPTQ (Frantar et al., 2022, algorithm 1) with the nearest entry in place of rounding. Zeros that are
    fixed stay.

    Args:
        problem: see there.
        books: [G, k].
        price: [G, k], what the choice of an entry costs besides its error; None for nothing.

    Returns:
        codes [sets * N, K].
    """
    sets, outputs, inputs = problem.weight.shape
    codes = np.empty((sets, outputs, inputs), np.uint8)
    for which in range(sets):
        picker, weight = _Picker(problem, books, which, price), problem.weight[which]
        if problem.moments is not None:
            codes[which] = _assign(weight, problem.moments[which], picker).T
            continue
        for k in range(inputs):
            codes[which, :, k] = picker.pick(weight[:, k], k, 1.0)
    return codes.reshape(sets * outputs, inputs)


def _assign(weight: Doubles, moments: Doubles, picker: _Picker) -> Codes:
    inputs = weight.shape[1]
    h = np.array(moments, np.float64)
    dead = np.diag(h) <= 0
    h[dead, dead] = 1.0
    h[np.diag_indices(inputs)] += _DAMPING * float(np.mean(np.diag(h)))
    order = np.argsort(-np.diag(h), kind="stable")
    upper = inverse_factor(h[np.ix_(order, order)])
    work = np.array(weight.T[order], np.float64, order="C")
    codes = np.empty(work.shape, np.uint8)
    for start in range(0, inputs, _PANEL):
        end = min(start + _PANEL, inputs)
        errors = np.empty((end - start, work.shape[1]))
        for k in range(start, end):
            chosen = picker.pick(work[k], int(order[k]), 1 / float(upper[k, k]) ** 2)
            codes[order[k]] = chosen
            error = (work[k] - picker.values(chosen)) / upper[k, k]
            work[k + 1 : end] -= np.multiply.outer(upper[k, k + 1 : end], error)
            errors[k - start] = error
        work[end:] -= upper[start:end, end:].T @ errors
    return codes


def descend(
    problem: Problem, codes: Codes, books: Float, price: Float | None = None, *, sweeps: int = 2
) -> Codes:
    """Change single codes as long as that lowers the error (plus prices): coordinate descent.

    Args:
        problem, books, price: as in ``assign``.
        codes: [sets * N, K], to start from.
        sweeps: over all inputs, at most.
    """
    if problem.moments is None:  # inputs do not bear on each other: one sweep is exact
        return assign(problem, books, price)
    sets, outputs, inputs = problem.weight.shape
    result = codes.reshape(sets, outputs, inputs).copy()
    for which in range(sets):
        picker = _Picker(problem, books, which, price)
        h, weight = problem.moments[which], problem.weight[which]
        now = np.array(result[which].T, np.intp, order="C")
        values = np.stack([picker.values(row) for row in now])
        gradient = h @ (values - weight.T)
        for _ in range(sweeps):
            if not _sweep(h, now, values, gradient, picker):
                break
        result[which] = now.T
    return result.reshape(codes.shape)


def _sweep(
    h: Doubles, codes: npt.NDArray[np.intp], values: Doubles, gradient: Doubles, picker: _Picker
) -> bool:
    """Set every input to its best codes, the others given, in place; whether any changed."""
    moved = False
    for start in range(0, len(h), _PANEL):
        end = min(start + _PANEL, len(h))
        changes = np.zeros((end - start, values.shape[1]))
        for k in range(start, end):
            if h[k, k] <= 0:
                continue
            slope = gradient[k] + h[k, start:k] @ changes[: k - start]
            chosen = picker.pick(values[k] - slope / h[k, k], k, float(h[k, k]))
            new = picker.values(chosen)
            changes[k - start] = new - values[k]
            codes[k], values[k] = chosen, new
        if changes.any():
            moved = True
            gradient += h[:, start:end] @ changes
    return moved


def refit(
    problem: Problem, codes: Codes, books: Float, *, zero: bool = False
) -> tuple[Codes, Doubles]:
    """Return the codebooks of least error for given codes, or nearly, with the codes in ascending order.

    The error is a quadratic in the entries, sum of tr((W - A c) H (W - A c)^T) with codes A; conjugate
    gradients, scaled by the diagonal, solve its k x k normal equations without forming them.

    Args:
        problem, codes: as in ``descend``.
        books: [G, k], to start from; entries that no weight has stay.
        zero: entries that are exactly zero stay.
    """
    groups, k = books.shape
    flat = (codes + _group(codes, books)[:, None] * k).ravel()
    shape = problem.weight.shape

    def gathered(change: Doubles) -> Doubles:
        """Return the sums over equal codes of H times a change of the weights."""
        return np.asarray(np.bincount(flat, problem.times(change).ravel(), groups * k), np.float64)

    scale = np.bincount(flat, np.broadcast_to(problem.importance, shape).ravel(), groups * k)
    free = scale > 0
    entries = books.ravel().astype(np.float64)
    if zero:
        free &= entries != 0
    inverse = np.where(free, 1 / np.where(scale > 0, scale, 1.0), 0.0)
    residual = gathered(problem.weight - entries[flat].reshape(shape)) * free
    direction = inverse * residual
    first = product = float(residual @ direction)
    for _ in range(min(_STEPS, int(free.sum()))):
        if product <= _SMALL * first:
            break
        image = gathered(direction[flat].reshape(shape)) * free
        curvature = float(direction @ image)
        if curvature <= 0:
            break
        length = product / curvature
        entries, residual = entries + length * direction, residual - length * image
        after = float(residual @ (inverse * residual))
        direction, product = inverse * residual + after / product * direction, after
    return _ordered(codes, entries.reshape(groups, k))


def _group(codes: Codes, books: Float) -> npt.NDArray[np.int64]:
    """Return the codebook of every row."""
    groups: npt.NDArray[np.int64] = np.arange(codes.shape[0]) // (codes.shape[0] // len(books))
    return groups


def _ordered(codes: Codes, books: Doubles) -> tuple[Codes, Doubles]:
    """Return codebooks of float32 numbers in ascending order, and what codes become."""
    single = books.astype(np.float32).astype(np.float64)
    order = np.argsort(single, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable").astype(np.uint8)
    return rank[_group(codes, books)[:, None], codes], np.take_along_axis(single, order, axis=1)


@dataclass(frozen=True)
class Solution:
    """What stands for the weights of a problem.

    Args:
        codes: [sets * N, K].
        books: [G, k].
        error: the sum of tr(D H D^T).
        bits: of all codes, by the entropy of each codebook's.
    """

    codes: Codes
    books: Doubles
    error: float
    bits: float


def solve(
    problem: Problem,
    books: Doubles,
    *,
    zero: bool = False,
    bit_price: float = 0.0,
    start: Codes | None = None,
    rounds: int = 2,
    sweeps: int = 2,
) -> Solution:
    """Choose codes and fit the codebooks to them by turns, for the least error + bit_price * bits.

    With a price on bits, frequent entries (mostly zero) are chosen more often than they are nearest: the
    quantizer of least error for its entropy (Chou, Lookabaugh, Gray, Entropy-constrained vector
    quantization, 1989), here with errors at the outputs of the layer.

    Args:
        problem, books: as in ``assign``.
        zero: entries that are exactly zero stay.
        bit_price: error that a bit must save.
        start: codes to go on from; GPTQ's where none are given.
        rounds: of codes and codebooks.
        sweeps: of ``descend`` in a round.
    """
    codes = assign(problem, books, None) if start is None else start
    best = _solution(problem, codes, books)
    for _ in range(rounds):
        price = bit_price * code_lengths(_counts(best.codes, best.books)) if bit_price else None
        codes = descend(problem, best.codes, best.books, price, sweeps=sweeps)
        now = _solution(problem, codes, best.books)
        fitted = _solution(problem, *refit(problem, codes, best.books, zero=zero))
        now = fitted if fitted.error < now.error else now
        if now.error + bit_price * now.bits >= best.error + bit_price * best.bits:
            break
        best = now
    return best


def _solution(problem: Problem, codes: Codes, books: Doubles) -> Solution:
    bits = sum(entropy_bits(c) for c in _counts(codes, books))
    return Solution(codes, books, problem.error(codes, books), bits)


def _counts(codes: Codes, books: Doubles) -> npt.NDArray[np.int64]:
    """Return how often each entry is used, [G, k]."""
    groups, k = books.shape
    flat = (codes + _group(codes, books)[:, None] * k).ravel()
    counts: npt.NDArray[np.int64] = np.bincount(flat, minlength=groups * k).reshape(groups, k)
    return counts
