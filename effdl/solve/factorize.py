"""A matrix as the product of two thin ones: truncated SVD, and how many columns it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
EXACT_SIDE = 256
"""Shorter side up to which LAPACK's SVD is used."""
GRAM_SIDE = 2048
"""Shorter side up to which the Gram matrix is always diagonalised; above, a sketch is tried first."""
_SKETCH_SHARE = 8  # a sketch of 1/8 of the shorter side costs about a tenth of the Gram matrix
_OVERSAMPLING = 16
_POWER_STEPS = 2


@dataclass(frozen=True)
class Svd:
    """The leading singular triplets of a matrix: ``u * s @ vt`` is its best approximation.

    Args:
        u: [rows, k], orthonormal columns.
        s: [k], descending.
        vt: [k, columns], orthonormal rows (zero where ``s`` is).
        total: squared Frobenius norm of the whole matrix.
    """

    u: Matrix
    s: Matrix
    vt: Matrix
    total: float

    @property
    def rank(self) -> int:
        """Number of triplets that are there."""
        return len(self.s)

    def energy(self, rank: int) -> float:
        """Return the share of the squared singular values that the first ``rank`` of them hold."""
        if self.total == 0:
            return 1.0
        return min(1.0, float(np.sum(self.s[:rank] ** 2)) / self.total)

    def error(self, rank: int) -> float:
        """Return ``|W - W_r| / |W|`` in the Frobenius norm.

        Source: Eckart and Young 1936: the squared error of the best rank-r matrix is the sum of the
        squared singular values that it lacks.
        """
        return math.sqrt(max(0.0, 1.0 - self.energy(rank)))

    def rank_for_energy(self, share: float) -> int | None:
        """Return the smallest rank that holds ``share`` of the energy, None if none here does."""
        if self.total == 0:
            return 1
        reached = np.cumsum(self.s**2) >= share * self.total * (1 - 1e-12)
        return int(np.argmax(reached)) + 1 if reached.any() else None

    def factors(self, rank: int) -> tuple[Matrix, Matrix]:
        """Return ``u sqrt(s)`` [rows, rank] and ``sqrt(s) vt`` [rank, columns].

        Both have the same column and row norms, which keeps the range of either small.
        """
        root = np.sqrt(self.s[:rank])
        return self.u[:, :rank] * root, root[:, None] * self.vt[:rank]


def leading_svd(
    matrix: npt.NDArray[Any], rank: int, *, energy: float | None = None, seed: int = 0
) -> Svd:
    """Return the first ``rank`` singular triplets of a matrix, in double precision.

    Small matrices go through LAPACK's SVD, larger ones through the eigenvectors of their Gram
    matrix; large ones through a random sketch when few triplets suffice. What is missing is always
    known, since ``total`` is exact: a sketch that falls short of ``energy`` is not used.

    Args:
        matrix: [rows, columns] of finite numbers.
        rank: triplets wanted; fewer are returned when the matrix has fewer.
        energy: fewer triplets do when they hold this share of the squared norm.
        seed: of the sketch.

    Source: Halko, Martinsson, Tropp 2011, "Finding Structure with Randomness", algorithms 4.4, 5.1.
    """
    w: Matrix = np.asarray(matrix, np.float64)
    side = min(w.shape)
    rank = min(rank, side)
    total = float(np.vdot(w, w))
    if side <= EXACT_SIDE:
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        return Svd(u[:, :rank], s[:rank], vt[:rank], total)
    if side > GRAM_SIDE:
        few = rank if energy is None else min(rank, side // _SKETCH_SHARE)
        if few <= side // _SKETCH_SHARE:
            sketch = _sketched(w, few, total, seed)
            if few == rank or sketch.rank_for_energy(energy or 1.0) is not None:
                return sketch
    return _from_gram(w, rank, total)


def _from_gram(w: Matrix, rank: int, total: float) -> Svd:
    """Diagonalise the smaller of ``w w^T`` and ``w^T w``.

    Singular values below about 1e-8 of the largest are lost in rounding, which is 1e-16 of the
    energy; they are taken as norms of the projected matrix, which is exact for the vectors found.
    """
    if w.shape[0] > w.shape[1]:
        return _transposed(_from_gram(w.T, rank, total))
    _, vectors = np.linalg.eigh(w @ w.T)
    return _project(w, vectors[:, ::-1][:, :rank], total)


def _sketched(w: Matrix, rank: int, total: float, seed: int) -> Svd:
    """Find the leading triplets in the range of ``(w w^T)^2 w`` times random columns."""
    if w.shape[0] > w.shape[1]:
        return _transposed(_sketched(w.T, rank, total, seed))
    columns = min(rank + _OVERSAMPLING, w.shape[0])
    start = np.random.default_rng(seed).standard_normal((w.shape[1], columns))
    basis, _ = np.linalg.qr(w @ start)
    for _ in range(_POWER_STEPS):
        back, _ = np.linalg.qr(w.T @ basis)
        basis, _ = np.linalg.qr(w @ back)
    small = basis.T @ w
    _, turn = np.linalg.eigh(small @ small.T)
    return _project(w, (basis @ turn)[:, ::-1][:, :rank], total)


def _project(w: Matrix, u: Matrix, total: float) -> Svd:
    """Return the triplets for orthonormal ``u`` that diagonalise ``w w^T``."""
    rows = u.T @ w
    s = np.linalg.norm(rows, axis=1)
    order = np.argsort(-s, kind="stable")
    u, s, rows = u[:, order], s[order], rows[order]
    scale = np.divide(1.0, s, out=np.zeros_like(s), where=s > 0)
    return Svd(u, s, rows * scale[:, None], total)


def _transposed(svd: Svd) -> Svd:
    return Svd(svd.vt.T, svd.s, svd.u.T, svd.total)


def rank_for_ratio(before: float, per_rank: float, ratio: float) -> int:
    """Return the largest rank whose cost is at most ``ratio`` of what it was, 0 if none.

    Args:
        before: multiply-accumulates of the layer.
        per_rank: multiply-accumulates that each rank costs in the factors.
        ratio: share of the cost that may remain.
    """
    return math.floor(ratio * before / per_rank + 1e-9)


def round_rank(rank: int, multiple: int, *, up: bool) -> int:
    """Return the multiple above ``rank``, or the nearest one (the lower of two; 0 below the first)."""
    if up:
        return -(-rank // multiple) * multiple
    return 0 if rank < multiple else (rank + (multiple - 1) // 2) // multiple * multiple
