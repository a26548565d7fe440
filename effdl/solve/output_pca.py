"""The best matrix of low rank in the outputs that it gives, from the covariance of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.solve.factorize import leading_svd

Matrix = npt.NDArray[np.float64]


def shrunk(covariance: npt.NDArray[Any], rows: int) -> Matrix:
    """Return a covariance that few rows told, moved towards a multiple of the identity.

    A tenth of the width per row goes, at most a half: with eight rows per number 1.2 %. What is left to
    the identity lets plain squares of weights decide where the data says nothing.

    Args:
        covariance: [K, K].
        rows: how many were seen.

    Source: Ledoit and Wolf 2004, for the form; the share is a rule.
    """
    width = covariance.shape[0]
    share = min(0.5, 0.1 * width / max(rows, 1))
    found: Matrix = np.asarray(covariance, np.float64) * (1 - share)
    found[np.diag_indices(width)] += share * float(np.trace(covariance)) / width
    return found


def output_energy(weight: npt.NDArray[Any], covariance: Matrix | None) -> float:
    """Return ``tr(W H W^T)``: the variance of all outputs W x together.

    Args:
        weight: [N, K]; also the change of one, whose outputs are an error.
        covariance: [K, K] of the rows x, None for uncorrelated ones of size 1.
    """
    w: Matrix = np.asarray(weight, np.float64)
    return float(np.vdot(w, w if covariance is None else w @ covariance))


@dataclass(frozen=True)
class OutputPca:
    """The weight as ``left @ right``, the directions in which its outputs vary most first.

    Args:
        vectors: [N, k], orthonormal columns.
        values: [k], the variance of the outputs along each, descending.
        matrix: [N, K], the weight.
        total: the variance of all outputs.
    """

    vectors: Matrix
    values: Matrix
    matrix: Matrix
    total: float

    @property
    def rank(self) -> int:
        """Directions that are there."""
        return len(self.values)

    def loss(self, rank: int) -> float:
        """Return the variance of the outputs that the first ``rank`` directions lack."""
        return max(0.0, self.total - float(np.sum(self.values[:rank])))

    def factors(self, rank: int) -> tuple[Matrix, Matrix]:
        """Return left [N, rank] and right [rank, K]."""
        u = self.vectors[:, :rank]
        return u, u.T @ self.matrix


def output_pca(
    weight: npt.NDArray[Any],
    covariance: Matrix | None,
    rank: int | None = None,
    *,
    energy: float | None = None,
    seed: int = 0,
) -> OutputPca:
    """Return the directions of the outputs ``W x`` by the variance along them.

    The first r of them give the matrix of rank r whose outputs are nearest to those of W.

    Args:
        weight: [N, K].
        covariance: [K, K] of the rows x, None for uncorrelated ones of size 1.
        rank, energy, seed: as in ``factorize.leading_svd``, where there is no covariance.

    Source: Zhang et al. 2015, "Efficient and Accurate Approximations of Nonlinear Convolutional Networks",
    section 3.1; the loss is the sum of the eigenvalues left out (Eckart and Young).
    """
    w: Matrix = np.asarray(weight, np.float64)
    rows, columns = w.shape
    if covariance is None:
        svd = leading_svd(w, min(w.shape) if rank is None else rank, energy=energy, seed=seed)
        return OutputPca(svd.u, svd.s**2, w, svd.total)
    if rows <= columns:
        return from_gram(w, w @ covariance @ w.T)
    spread = w @ square_root(
        covariance
    )  # its left singular vectors are the directions, at most K of them
    total = float(np.vdot(spread, spread))
    values, vectors = np.linalg.eigh(spread.T @ spread)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    kept = values > 1e-14 * max(float(values[0]), 1e-300)
    values, vectors = values[kept], vectors[:, kept]
    return OutputPca(spread @ vectors / np.sqrt(values), values, w, total)


def from_gram(weight: Matrix, gram: Matrix) -> OutputPca:
    """Return the directions for a known covariance [N, N] of the outputs."""
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    return OutputPca(
        vectors[:, ::-1], np.maximum(values[::-1], 0.0), weight, max(0.0, float(np.trace(gram)))
    )


def square_root(covariance: Matrix) -> Matrix:
    """Return the symmetric S with ``S S`` equal to a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    root: Matrix = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def balanced(left: Matrix, right: Matrix) -> tuple[Matrix, Matrix]:
    """Give each pair of a column of ``left`` and a row of ``right`` the same largest absolute value.

    Their product stays. Factors of one range each lose least when they are quantized with one scale.

    Args:
        left: [N, r]; ``right``: [r, K].
    """
    ours, theirs = np.abs(left).max(0), np.abs(right).max(1)
    fit = (ours > 0) & (theirs > 0)
    scale = np.where(fit, np.sqrt(np.where(fit, theirs, 1) / np.where(fit, ours, 1)), 1.0)
    return left * scale, right / scale[:, None]
