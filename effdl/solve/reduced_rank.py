"""Outputs of a layer told from few features of its inputs: regressions that contain one another.

A layer gives ``y = W x``. Features ``z = F x`` come first to last; for each number p of them the best
``A`` with ``A z[:p]`` near y is a least squares fit, and one Cholesky factor holds all of them: with
``F H F^T = L L^T`` and ``Z = L^-1 F H W^T`` the variance that p features explain is ``|Z[:p]|^2``. A bound
on the rank of A on top of it is the eigenvalues of ``Z[:p]^T Z[:p]`` (reduced-rank regression, Izenman 1975).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from effdl.solve.output_pca import Matrix, square_root

_JITTER = 1e-10
_BLOCK = 256


@dataclass(frozen=True)
class Regression:
    """The fits of all numbers of features.

    Args:
        factor: [m, m], L, lower triangular; None for the identity.
        explained: [m, N], Z.
        total: the variance of all outputs.
    """

    factor: Matrix | None
    explained: Matrix
    total: float

    def loss(self, features: int) -> float:
        """Return the variance of the outputs that the first features do not explain."""
        return max(0.0, self.total - float(self._levels[features]))

    @cached_property
    def _levels(self) -> Matrix:
        """The variance that the first 0, 1, 2... features explain."""
        return np.concatenate([[0.0], np.cumsum(np.square(self.explained).sum(1))])

    def fit(self, features: int) -> Matrix:
        """Return A [N, features]."""
        z: Matrix = self.explained[:features]
        if self.factor is not None:
            z = np.asarray(np.linalg.solve(self.factor[:features, :features].T, z))
        return np.ascontiguousarray(z.T)

    def outputs(self, features: int) -> tuple[Matrix, Matrix]:
        """Return directions [N, N] of the fitted outputs and the variance along each, descending.

        Keeping the first r directions U of the fit, ``U U^T A``, is the best fit of rank r; the loss is
        that of the fit and the variances left out.
        """
        z = self.explained[:features]
        values, vectors = np.linalg.eigh(z.T @ z)
        return vectors[:, ::-1], np.maximum(values[::-1], 0.0)


def regression(gram: Matrix, cross: Matrix, total: float) -> Regression:
    """Return the fits of outputs to features.

    Args:
        gram: [m, m], second moments of the features.
        cross: [m, N], those of features and outputs.
        total: the variance of all outputs.
    """
    lifted = (gram + gram.T) / 2
    scale = max(float(np.trace(lifted)) / max(len(lifted), 1), 1e-300)
    lifted[np.diag_indices(len(lifted))] += _JITTER * scale
    factor: Matrix = np.asarray(np.linalg.cholesky(lifted))
    return Regression(factor, _forward(factor, cross), total)


def _forward(lower: Matrix, right: Matrix) -> Matrix:
    """Solve ``lower z = right`` block by block, which costs a fraction of a general solver."""
    found = np.empty_like(right)
    for k in range(0, len(lower), _BLOCK):
        here = slice(k, k + _BLOCK)
        rest = right[here] - lower[here, :k] @ found[:k]
        found[here] = np.linalg.solve(lower[here, here], rest)
    return found


def channel_basis(
    weight: Matrix,
    covariance: Matrix | None,
    channels: int,
    rank: int,
    outputs: Matrix | None = None,
) -> Matrix:
    """Return ``rank`` combinations of the input channels [rank, channels], those that count most first.

    Each place of the kernel is taken to see channels of the same covariance, independent of the other
    places; what is lost by that, the fit to the features makes good in part.

    Args:
        weight: [N, channels * places], the places of a channel side by side.
        covariance: of the rows that it reads, None for uncorrelated numbers of size 1.
        channels: how many.
        rank: combinations wanted.
        outputs: [N, r], directions of the outputs that alone are to be kept; all of them when None.

    Source: Kim et al. 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power
    Mobile Applications", section 3.1 (Tucker-2), with the channels whitened.
    """
    w = weight if outputs is None else outputs.T @ weight
    places = w.shape[1] // channels
    cube = w.reshape(-1, channels, places)
    stacked = np.ascontiguousarray(cube.transpose(0, 2, 1)).reshape(-1, channels)
    inner = stacked.T @ stacked
    if covariance is None:
        _, vectors = np.linalg.eigh(inner)
        return np.ascontiguousarray(vectors[:, ::-1][:, :rank].T)
    blocks = covariance.reshape(channels, places, channels, places)
    mean = np.einsum("csds->cd", blocks) / places
    mean[np.diag_indices(channels)] += _JITTER * max(float(np.trace(mean)) / channels, 1e-300)
    root = np.linalg.cholesky(mean)
    _, vectors = np.linalg.eigh(root.T @ inner @ root)
    leading = vectors[:, ::-1][:, :rank]
    return np.ascontiguousarray(np.linalg.solve(root.T, leading).T)


def channel_features(
    weight: Matrix, covariance: Matrix | None, basis: Matrix, places: int
) -> Regression:
    """Return the fits to combinations of channels, seen at every place of the kernel.

    Features are ordered by combination, ``places`` of each: r combinations are ``r * places`` features.

    Args:
        weight: [N, channels * places].
        covariance: of the rows, None for uncorrelated numbers of size 1.
        basis: [rank, channels], the combinations; orthonormal where the covariance is None.
        places: of the kernel.
    """
    rank, channels = basis.shape
    cube = weight.reshape(-1, channels, places)
    if covariance is None:
        cross = np.einsum("rc,ncs->rsn", basis, cube, optimize=True)
        total = float(np.vdot(weight, weight))
        return Regression(None, cross.reshape(rank * places, -1), total)
    blocks = covariance.reshape(channels, places * channels * places)
    seen = (basis @ blocks).reshape(rank * places, channels, places)
    cross = seen.reshape(rank * places, -1) @ weight.T
    gram = np.tensordot(seen, basis, axes=(1, 1))  # [rank * places, places, rank]
    gram = np.ascontiguousarray(gram.transpose(0, 2, 1)).reshape(rank * places, rank * places)
    return regression(gram, cross, float(np.vdot(weight @ covariance, weight)))


def kernel_basis(weight: Matrix, covariance: Matrix | None, channels: int, count: int) -> Matrix:
    """Return ``count`` kernels for each channel [channels, count, places], those that count most first.

    Args:
        weight: [N, channels * places].
        covariance: of the rows, None for uncorrelated numbers of size 1.
        channels: how many.
        count: kernels per channel, at most the places.

    Source: Guo et al. 2018, "Network Decoupling: From Regular to Depthwise Separable Convolutions".
    """
    places = weight.shape[1] // channels
    cube = np.ascontiguousarray(weight.reshape(-1, channels, places).transpose(1, 0, 2))
    found = np.empty((channels, count, places))
    for c in range(channels):
        root = np.eye(places)
        if covariance is not None:
            part = slice(c * places, (c + 1) * places)
            root = square_root(covariance[part, part])
            lift = _JITTER * max(float(np.trace(root)), 1e-300)
            root = root + lift * np.eye(places)
        _, vectors = np.linalg.eigh(root @ (cube[c].T @ cube[c]) @ root)
        found[c] = np.linalg.solve(root, vectors[:, ::-1][:, :count]).T
    return found


def kernel_features(weight: Matrix, covariance: Matrix | None, kernels: Matrix) -> Regression:
    """Return the fits to channels filtered by kernels of their own.

    Features are ordered by kernel, then by channel: R kernels are ``R * channels`` features.

    Args:
        weight: [N, channels * places].
        covariance: of the rows, None for uncorrelated numbers of size 1.
        kernels: [channels, R, places].
    """
    channels, count, places = kernels.shape
    total = float(np.vdot(weight, weight if covariance is None else weight @ covariance))
    first = np.ascontiguousarray(kernels.transpose(1, 0, 2))  # [R, channels, places]
    if covariance is None:
        cube = weight.reshape(-1, channels, places)
        cross = np.einsum("rcs,ncs->rcn", first, cube, optimize=True)
        own = np.einsum("rcs,tcs->crt", first, first)
        gram = np.zeros((count, channels, count, channels))
        for c in range(channels):
            gram[:, c, :, c] = own[c]
        return regression(
            gram.reshape(count * channels, -1), cross.reshape(count * channels, -1), total
        )
    blocks = covariance.reshape(channels, places, channels * places)
    seen = np.einsum("rcs,csk->rck", first, blocks, optimize=True).reshape(count * channels, -1)
    cross = seen @ weight.T
    by_channel = seen.reshape(count * channels, channels, places)
    gram = np.einsum("mcs,rcs->mrc", by_channel, first, optimize=True)
    return regression(gram.reshape(count * channels, -1), cross, total)


def composed_channels(fit: Matrix, basis: Matrix, places: int) -> Matrix:
    """Return the weight [N, channels * places] that a fit to combinations of channels amounts to."""
    rank, channels = basis.shape
    cube = fit.reshape(-1, rank, places)
    found: Matrix = np.einsum("nrs,rc->ncs", cube, basis, optimize=True)
    return found.reshape(len(fit), channels * places)


def composed_kernels(fit: Matrix, kernels: npt.NDArray[Any]) -> Matrix:
    """Return the weight [N, channels * places] that a fit to filtered channels amounts to."""
    channels, count, places = kernels.shape
    cube = fit.reshape(-1, count, channels)
    found: Matrix = np.einsum("nrc,crs->ncs", cube, kernels, optimize=True)
    return found.reshape(len(fit), channels * places)
