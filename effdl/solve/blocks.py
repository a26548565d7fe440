"""Weights of few bits in blocks: a scale and a zero point for every few inputs of every output.

A matrix of N outputs and K inputs is cut along K into blocks of ``size``. ``w = (q - zero) * scale``
with integers q and zero of ``bits`` bits, which is what MatMulNBits of ONNX Runtime computes with.
Errors are measured at the outputs: with second moments H = sum of x x^T of the inputs, a change D of the
weights changes them by tr(D H D^T) in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.uint8]
_CLIPS = np.linspace(1.0, 0.6, 21)
_TINY = float(np.finfo(np.float32).tiny)
_DAMPING = 0.01
"""Share of the mean second moment that is added to all, so that the inverse exists (GPTQ)."""
_PANEL = 128
_CHUNK = 1 << 18
"""Weights that hqq works on at a time: what fits into the processor's cache."""
_SWEEPS = 4


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of every block.

    Args:
        scale: [N, blocks], float32, positive.
        zero: [N, blocks], uint8.
        size: inputs of a block; the last block may be shorter.
        bits: of an integer.
    """

    scale: npt.NDArray[np.float32]
    zero: Integers
    size: int
    bits: int

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    def wide(self, inputs: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return scale and zero point of every weight, both [N, inputs]."""
        scale = np.repeat(self.scale, self.size, axis=1)[:, :inputs]
        zero = np.repeat(self.zero.astype(np.float32), self.size, axis=1)[:, :inputs]
        return scale, zero

    def nearest(self, weight: Float) -> Integers:
        """Return the nearest integers of [N, K] weights."""
        scale, zero = self.wide(weight.shape[1])
        steps = np.rint(np.asarray(weight, np.float32) / scale) + zero
        result: Integers = np.clip(steps, 0, self.top).astype(np.uint8)
        return result

    def weights(self, q: Integers) -> npt.NDArray[np.float32]:
        """Return the weights that integers [N, K] stand for."""
        scale, zero = self.wide(q.shape[1])
        return (q.astype(np.float32) - zero) * scale


def block_grid(
    weight: Float,
    size: int,
    bits: int,
    *,
    symmetric: bool = False,
    importance: Float | None = None,
) -> Grid:
    """Return the grid that spans each block, clipped where that lowers the squared error.

    Args:
        weight: [N, K].
        size: inputs of a block.
        bits: 2 to 8.
        symmetric: the zero point is the middle integer everywhere.
        importance: [K], positive: how much an error of each input counts (the diagonal of H).
    """
    blocks = _blocks(np.asarray(weight, np.float32), size)
    counts = np.ones(weight.shape[1], np.float32) if importance is None else importance
    counts = _blocks(np.asarray(counts, np.float32)[None], size)[0]
    low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
    best: Grid | None = None
    lowest = np.full(low.shape, np.inf, np.float32)
    for clip in _CLIPS:
        grid = _spanning(low * clip, high * clip, size, bits, symmetric)
        error = _block_error(blocks, grid, counts)
        if best is None:
            best, lowest = grid, error
            continue
        better = error < lowest
        lowest = np.where(better, error, lowest)
        best = Grid(
            np.where(better, grid.scale, best.scale),
            np.where(better, grid.zero, best.zero),
            size,
            bits,
        )
    assert best is not None
    return best


def _blocks(rows: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
    """Cut [N, K] into [N, blocks, size]; a short last block is filled with zeros."""
    short = -rows.shape[1] % size
    padded = np.pad(rows, ((0, 0), (0, short))) if short else rows
    return padded.reshape(rows.shape[0], -1, size)


def _spanning(low: Float, high: Float, size: int, bits: int, symmetric: bool) -> Grid:
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scale = np.maximum(-low / middle, high / (top - middle))
        zero = np.full(low.shape, middle, np.uint8)
    else:
        scale = (high - low) / top
        zero = np.zeros(low.shape, np.uint8)
    scale = np.where(scale > _TINY, scale, 1.0).astype(np.float32)
    if not symmetric:
        zero = np.clip(np.rint(-low / scale), 0, top).astype(np.uint8)
    return Grid(scale, zero, size, bits)


def _block_error(
    blocks: npt.NDArray[np.float32], grid: Grid, counts: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    scale, zero = grid.scale[..., None], grid.zero[..., None].astype(np.float32)
    steps = np.clip(np.rint(blocks / scale) + zero, 0, grid.top) - zero
    difference = steps * scale - blocks
    error: npt.NDArray[np.float32] = np.einsum("nbk,nbk,bk->nb", difference, difference, counts)
    return error


def hqq(weight: Float, size: int, bits: int, *, rounds: int = 20, power: float = 0.7) -> Grid:
    """Return the grid of half-quadratic quantization, which needs no data.

    The error is taken to be sparse: a small sum of |w - w'|^p with p below 1 lets a few outliers go. By
    turns, the error is shrunk to its outliers, and the grid is fitted to what is left by least squares
    (Badri and Shaji, HQQ, 2023, equations 5 to 9). There, zero points are real numbers and the scale
    stays; kernels want whole zero points, with which that gains nothing, so here the scale is fitted too.
    A block keeps its first grid where that leaves the smaller error.

    Args:
        weight: [N, K].
        size: inputs of a block.
        bits: 2 to 8.
        rounds: of the iteration.
        power: p.
    """
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    parts = [
        _hqq(
            _blocks(np.asarray(weight[start : start + rows], np.float32), size), bits, rounds, power
        )
        for start in range(0, weight.shape[0], rows)
    ]
    scale, zero = (np.concatenate(a) for a in zip(*((g.scale, g.zero) for g in parts), strict=True))
    return Grid(scale, zero, size, bits)


def _hqq(blocks: npt.NDArray[np.float32], bits: int, rounds: int, power: float) -> Grid:
    size = blocks.shape[2]
    best = _spanning(
        np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0), size, bits, symmetric=False
    )
    lowest, now = _sparse_error(blocks, best, power), best
    beta = np.float32(10.0)
    for _ in range(rounds):
        scale, zero = now.scale[..., None], now.zero[..., None].astype(np.float32)
        q = np.clip(np.rint(blocks / scale) + zero, 0, best.top)
        error = blocks - (q - zero) * scale
        magnitude = np.abs(error)
        shrunk = magnitude - np.power(np.maximum(magnitude, 1e-8), power - 1) / beta
        kept = blocks - np.sign(error) * np.maximum(shrunk, 0)
        now = _fitted(q, kept, now)
        beta *= np.float32(1.01)
        error_now = _sparse_error(blocks, now, power)
        better = error_now < lowest
        if not better.any():
            break
        lowest = np.where(better, error_now, lowest)
        best = Grid(
            np.where(better, now.scale, best.scale),
            np.where(better, now.zero, best.zero),
            size,
            bits,
        )
    return best


def _fitted(q: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], old: Grid) -> Grid:
    """Return the grid on which integers ``q`` come nearest to what is wanted, with whole zero points."""
    q_mean, mean = q.mean(2, keepdims=True), wanted.mean(2, keepdims=True)
    spread = ((q - q_mean) ** 2).sum(2)
    slope = ((q - q_mean) * (wanted - mean)).sum(2) / np.maximum(spread, 1e-12)
    slope = np.where((spread > 0) & (slope > _TINY), slope, old.scale)
    zero = np.clip(np.rint(q_mean[..., 0] - mean[..., 0] / slope), 0, old.top)
    steps = q - zero[..., None]
    total = (steps**2).sum(2)
    scale = (steps * wanted).sum(2) / np.maximum(total, 1e-12)
    scale = np.where((total > 0) & (scale > _TINY), scale, old.scale).astype(np.float32)
    return Grid(scale, zero.astype(np.uint8), old.size, old.bits)


def _sparse_error(
    blocks: npt.NDArray[np.float32], grid: Grid, power: float
) -> npt.NDArray[np.float32]:
    scale, zero = grid.scale[..., None], grid.zero[..., None].astype(np.float32)
    steps = np.clip(np.rint(blocks / scale) + zero, 0, grid.top) - zero
    error: npt.NDArray[np.float32] = np.power(np.abs(steps * scale - blocks), power).sum(2)
    return error


def output_error(weight: Float, rounded: Float, moments: Float) -> float:
    """Return tr(D H D^T) / tr(W H W^T): the squared error at the outputs, relative to them.

    Args:
        weight: [N, K]; ``rounded`` what stands for it.
        moments: [K, K].
    """
    difference = np.asarray(rounded, np.float64) - weight
    size = float(np.einsum("nk,nk->", np.asarray(weight @ moments, np.float64), weight))
    error = float(np.einsum("nk,nk->", difference @ moments, difference))
    return error / size if size > 0 else 0.0


def inverse_factor(h: Float) -> npt.NDArray[np.float64]:
    """Return the upper Cholesky factor of the inverse; a matrix that is not positive gets more damping."""
    size = max(float(np.mean(np.abs(np.diag(h)))), _TINY)
    for damping in (0.0, 0.1, 1.0, 10.0):
        try:
            raised = h + np.eye(len(h)) * damping * size
            factor: npt.NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(raised)).T
            return factor
        except np.linalg.LinAlgError:
            continue
    return np.eye(len(h))  # no input makes up for another


Bounds = tuple[Integers, Integers]
"""The least and the largest integer of every weight, both [N, K]."""


def gptq(weight: Float, moments: Float, grid: Grid, bounds: Bounds | None = None) -> Integers:
    """Round column by column, each time letting the columns still to come make up for the error.

    Columns whose inputs are largest come first (act-order), on a grid that is fixed before. Frantar et
    al., GPTQ, 2022, algorithm 1, with the inverse by Cholesky factors and columns in panels.

    Args:
        weight: [N, K].
        moments: [K, K], symmetric and not negative; inputs that are always zero get weight zero.
        grid: of every block.
        bounds: all that the grid has, unless they are narrower.

    Returns:
        Integers [N, K].
    """
    inputs = weight.shape[1]
    work = np.array(
        weight.T, np.float64, order="C"
    )  # a row per input: what is worked on lies together
    h = np.array(moments, np.float64)
    dead = np.diag(h) <= 0
    h[dead, dead] = 1.0
    work[dead] = 0.0
    h[np.diag_indices(inputs)] += _DAMPING * float(np.mean(np.diag(h)))
    order = np.argsort(-np.diag(h), kind="stable")
    upper = inverse_factor(h[np.ix_(order, order)])
    scale, zero = (np.ascontiguousarray(a.T[order], np.float64) for a in grid.wide(inputs))
    low, high = _limits(bounds, grid, order)
    work = work[order]
    q = np.empty(work.shape, np.uint8)
    for start in range(0, inputs, _PANEL):
        end = min(start + _PANEL, inputs)
        errors = np.empty((end - start, work.shape[1]))
        for k in range(start, end):
            steps = np.clip(np.rint(work[k] / scale[k]) + zero[k], low[k], high[k])
            q[k] = steps
            error = (work[k] - (steps - zero[k]) * scale[k]) / upper[k, k]
            work[k + 1 : end] -= np.multiply.outer(upper[k, k + 1 : end], error)
            errors[k - start] = error
        work[end:] -= upper[start:end, end:].T @ errors
    result = np.empty_like(q)
    result[order] = q
    return np.ascontiguousarray(result.T)


def _limits(bounds: Bounds | None, grid: Grid, order: Any = slice(None)) -> tuple[Any, Any]:
    """Return the bounds with a row per input, in an order."""
    if bounds is None:
        inputs = grid.size * grid.scale.shape[1]
        return np.zeros(inputs), np.full(inputs, float(grid.top))
    low, high = (np.ascontiguousarray(b.T[order], np.float64) for b in bounds)
    return low, high


def descend(
    weight: Float,
    q: Integers,
    moments: Float,
    grid: Grid,
    *,
    sweeps: int = _SWEEPS,
    bounds: Bounds | None = None,
) -> Integers:
    """Move single integers as long as that lowers the error at the outputs: coordinate descent.

    Every step sets one column to its best integers, the others given; the error never grows.

    Args:
        weight: [N, K].
        q: integers to start from, [N, K].
        moments: [K, K].
        grid: of every block.
        sweeps: over all columns, at most.
        bounds: all that the grid has, unless they are narrower.
    """
    inputs = weight.shape[1]
    low, high = _limits(bounds, grid)
    h = np.array(moments, np.float64)
    scale, zero = (np.ascontiguousarray(a.T, np.float64) for a in grid.wide(inputs))
    steps = np.array(q.T, np.float64, order="C")  # a row per input, as in gptq
    gradient = h @ ((steps - zero) * scale - weight.T)
    curvature = np.diag(h).copy()
    for _ in range(sweeps):
        moved = False
        for start in range(0, inputs, _PANEL):
            end = min(start + _PANEL, inputs)
            changes = np.zeros((end - start, weight.shape[0]))
            for k in range(start, end):
                if curvature[k] <= 0:
                    continue
                now = gradient[k] + h[k, start:k] @ changes[: k - start]
                new = np.clip(np.rint(steps[k] - now / (curvature[k] * scale[k])), low[k], high[k])
                changes[k - start] = (new - steps[k]) * scale[k]
                steps[k] = new
            if changes.any():
                moved = True
                gradient += h[:, start:end] @ changes
        if not moved:
            break
    return np.ascontiguousarray(steps.T).astype(np.uint8)


def awq_factors(
    weight: Float,
    moments: Float,
    magnitudes: Float,
    size: int,
    bits: int,
    *,
    symmetric: bool = False,
    steps: int = 20,
) -> npt.NDArray[np.float32]:
    """Return factors for the inputs that make large ones round finer, 1 where nothing is gained.

    The weights times s and the inputs divided by s compute the same; s = magnitude^a, with the a between 0
    and 1 of the smallest error at the outputs (Lin et al., AWQ, 2023, equations 4 and 5).

    Args:
        weight: [N, K], of all layers that read the input, one below the other.
        moments: [K, K].
        magnitudes: [K], the mean of |x|.
        size: inputs of a block.
        bits: 2 to 8.
        symmetric: of the grid.
        steps: values of a that are tried.

    Returns:
        s, [K], float32; its largest and smallest number are inverse to each other.
    """
    size_of_input = np.maximum(np.asarray(magnitudes, np.float64), 1e-6)
    best = np.ones(weight.shape[1], np.float32)
    lowest = np.inf
    for power in np.linspace(0, 1, steps + 1):
        factors = size_of_input**power
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype(np.float32)
        scaled = np.asarray(weight, np.float32) * factors
        grid = block_grid(scaled, size, bits, symmetric=symmetric)
        rounded = grid.weights(grid.nearest(scaled)) / factors
        error = output_error(weight, rounded, moments)
        if error < lowest:
            best, lowest = factors, error
    return best
